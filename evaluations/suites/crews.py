"""Who works rows out: this process, several of them, or Ray. A worker that dies costs the row it had in hand, and another takes its place."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol

from robust_if import cluster
from robust_if.evaluations.suites.rows import Record, Row
from robust_if.evaluations.suites.worker import Worker


class Crew(Protocol):
    """Some workers, numbered from 0; each has one row in hand at a time."""

    size: int

    def give(self, worker: int, row: Row) -> None:
        """Let an idle worker begin with a row."""

    def next(self) -> tuple[int, Record]:
        """Wait until any worker is done; which, and what came out."""


class Here:
    """This process; a part that ends it ends everything."""

    size = 1

    def __init__(self) -> None:
        self._worker = Worker()
        self._row: Row | None = None

    def give(self, worker: int, row: Row) -> None:
        self._row = row

    def next(self) -> tuple[int, Record]:
        assert self._row is not None
        return 0, self._worker(self._row)


class Processes:
    """Processes of this machine, started afresh rather than forked, so that no lock or thread of this one is copied.

    ``concurrent.futures`` gives up all that is under way when one process dies; here only that process' row is lost.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._context = multiprocessing.get_context("spawn")
        self._hands: dict[int, tuple[Any, Connection]] = {}
        self._rows: dict[int, Row] = {}
        self._started: set[int] = set()

    def give(self, worker: int, row: Row) -> None:
        if worker not in self._hands:
            self._started.discard(worker)
            ours, theirs = self._context.Pipe()
            process = self._context.Process(target=_serve, args=(theirs,), daemon=False)
            process.start()
            theirs.close()
            self._hands[worker] = process, ours
        self._rows[worker] = row
        with suppress(OSError):  # it died while it was idle; next() sees that
            self._hands[worker][1].send(row)

    def next(self) -> tuple[int, Record]:
        while True:
            ready = wait([self._hands[worker][1] for worker in self._rows])
            worker = next(worker for worker in self._rows if self._hands[worker][1] in ready)
            process, pipe = self._hands[worker]
            try:
                said: Record | None = pipe.recv()
            except (EOFError, OSError):
                row = self._rows.pop(worker)
                del self._hands[worker]
                process.join()
                if worker not in self._started:
                    raise RuntimeError(
                        f"workers: {_death(process.exitcode)} before it could begin; a script that runs a suite must do so under "
                        "`if __name__ == '__main__':`, since every worker imports it"
                    ) from None
                return worker, Record(row.id, error=f"{row.said()}: {_death(process.exitcode)}")
            if said is not None:
                self._rows.pop(worker)
                return worker, said
            self._started.add(worker)

    def close(self) -> None:
        """End all workers, whatever they have in hand."""
        for process, pipe in self._hands.values():
            process.kill() if self._rows else pipe.close()
        for process, _ in self._hands.values():
            process.join()
        self._hands.clear()


class Actors:
    """Actors of Ray, on this machine or a cluster."""

    def __init__(self, ray: Any, size: int) -> None:
        self.size = size
        self._ray = ray
        self._make = ray.remote(num_cpus=1, max_restarts=0)(Worker)
        self._actors: dict[int, Any] = {}
        self._rows: dict[Any, tuple[int, Row]] = {}

    def give(self, worker: int, row: Row) -> None:
        if worker not in self._actors:
            self._actors[worker] = self._make.remote()
        self._rows[self._actors[worker].__call__.remote(row)] = worker, row

    def next(self) -> tuple[int, Record]:
        reference = self._ray.wait(list(self._rows))[0][0]
        worker, row = self._rows.pop(reference)
        try:
            record: Record = self._ray.get(reference)
        except self._ray.exceptions.RayError as error:
            del self._actors[worker]
            record = Record(row.id, error=f"{row.said()}: the worker died: {' '.join(str(error).split())[:500]}")
        return worker, record


@contextmanager
def crew(engine: str, workers: int) -> Iterator[Crew]:
    """Workers, gone at the end whatever happens.

    Args:
        engine: ``"local"`` or ``"ray"``.
        workers: how many; 0 of ``"local"`` is this process.

    Raises:
        ImportError: if Ray is asked for and not installed.
    """
    if engine == "ray":
        ray = cluster._import("ray")
        with cluster._session(ray, workers):
            yield Actors(ray, workers)
    elif workers == 0:
        yield Here()
    else:
        processes = Processes(workers)
        try:
            yield processes
        finally:
            processes.close()


def _serve(pipe: Connection) -> None:
    """The life of a worker process: it ends with the pipe, or with the process that started it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()
    worker = Worker()
    pipe.send(None)  # it has begun
    while True:
        try:
            row = pipe.recv()
        except (EOFError, OSError):
            return
        pipe.send(worker(row))


def _end_with_parent() -> None:
    """A parent that was killed cannot end its workers, and what they go on with would be of no use."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _death(code: int | None) -> str:
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        return f"the worker was ended by {name}" + ("; the machine may have run out of memory" if name == "SIGKILL" else "")
    return f"the worker ended by itself with exit code {code}"
