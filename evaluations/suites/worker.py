"""Works rows out in one process, one after another."""

from __future__ import annotations

import contextlib
import math
import platform
import random
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from numbers import Real
from typing import Any

import numpy as np
import torch
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

import robust_if
from robust_if.data import Samples
from robust_if.evaluations.suites.meter import Meter
from robust_if.evaluations.suites.parts import Attacked, Change, Defended, Scene
from robust_if.evaluations.suites.roles import Part
from robust_if.evaluations.suites.rows import Record, Row, jsonable
from robust_if.sweep import fingerprint
from robust_if.task import Task
from robust_if.training import Recipe, fit


class Worker:
    """Calling it with a row gives the row's record; an exception in a part becomes the error of the record.

    Scene, attack and undefended model are kept until a row of another job comes. Every part is called with one thread, with the global random states
    of Python, NumPy and torch set to the row's seed, and with its prints going to standard error; all is put back afterwards.
    """

    def __init__(self) -> None:
        self._job = ""
        self._shared: _Shared | _Failure | None = None
        with _alone():  # the first training of a process loads what takes seconds, and belongs to no row
            fit(Task(torch.nn.Linear(1, 2).eval()), Samples((torch.zeros(1, 1), torch.zeros(1, dtype=torch.int64))), Recipe(epochs=1))

    def __call__(self, row: Row) -> Record:
        """What comes out of the row."""
        begun = time.perf_counter()
        with _alone(), contextlib.redirect_stdout(sys.stderr):
            try:
                record = self._work(row)
            except _Failure as failure:
                record = Record(row.id, error=str(failure), traceback=failure.traceback)
        return replace(record, spent=time.perf_counter() - begun, versions=versions(), finished=datetime.now(UTC).isoformat(timespec="seconds"))

    def _work(self, row: Row) -> Record:
        for part in (row.data, row.attack, row.defence, *row.metrics):
            _found(part)  # loads its module, which belongs to no measurement
        shared = self._made(row)
        undefended, meter, judged = shared.undefended, Meter(), Meter()
        undefended.asked, undefended.meter = False, meter
        with meter.running():
            defended = _called(row.defence, row.seed, Defended, shared.attacked)
        needed, undefended.meter = undefended.seconds if undefended.asked else 0.0, judged
        metrics: dict[str, float | None] = {}
        with judged.running():
            for part in row.metrics:
                for name, value in _numbers(part, _called(part, row.seed, Mapping, shared.attacked, defended)).items():
                    if name in metrics:
                        raise _Failure(f"metric {part.label!r}: another metric has given {name!r} already; give its table a label of its own")
                    metrics[name] = value
        if shared.seal != _seal(shared.attacked):
            self._job = ""
            raise _Failure(f"defence {row.defence.label!r}, or a metric: it changed the data that other rows share; expected it to work on a copy")
        return Record(
            row.id, metrics, jsonable(defended.about), meter.seconds, meter.cpu_seconds, needed, shared.seconds, judged.seconds,
            peak_bytes=meter.peak, added_bytes=meter.added,
        )  # fmt: skip

    def _made(self, row: Row) -> _Shared:
        """What the rows of the job share; a failure to make it is kept, too."""
        if self._job != row.job:
            self._job, self._shared = row.job, None
            try:
                self._shared = _Shared.of(row)
            except _Failure as failure:
                self._shared = failure
        if isinstance(self._shared, _Failure):
            raise self._shared
        assert self._shared is not None
        return self._shared


class _Failure(Exception):  # noqa: N818
    """Why a row has no metrics, in one line."""

    traceback: str | None = None


class _Undefended:
    """The model that is trained on the data as the attacker left them, once; every caller gets a copy."""

    def __init__(self, scene: Scene) -> None:
        self.scene, self.meter, self.asked, self.seconds = scene, Meter(), False, 0.0
        self.task: Task | None = None

    def __call__(self) -> Task:
        self.asked = True
        with self.meter.paused():
            if self.task is None:
                begun = time.perf_counter()
                self.task = self.scene.fitted()
                self.seconds = time.perf_counter() - begun
            return self.task.at(self.task.model.state_dict())


@dataclass
class _Shared:
    """A scene after the attack, what it took to make it, and a digest by which a change in place is noticed."""

    attacked: Attacked
    undefended: _Undefended
    seconds: float
    seal: str

    @classmethod
    def of(cls, row: Row) -> _Shared:
        begun = time.perf_counter()
        scene = _called(row.data, row.seed, Scene)
        change = _called(row.attack, row.seed, Change, scene)
        undefended = _Undefended(change.scene)
        attacked = Attacked(change.scene, change.bad, change.success, change.seen, undefended)
        return cls(attacked, undefended, time.perf_counter() - begun, _seal(attacked))


def _found(part: Part) -> Callable[..., Any]:
    try:
        return part.function()
    except ValueError as error:
        raise _Failure(str(error)) from error


def _called(part: Part, seed: int, kind: Any, *arguments: Any) -> Any:
    """What the part returns for the arguments, its options and the seed."""
    function = _found(part)
    _seed_everything(seed)
    try:
        found = function(*arguments, seed=seed, **part.options)
    except Exception as error:
        failure = _Failure(f"{part.role} {part.label!r}: {type(error).__name__}: {' '.join(str(error).split())}")
        failure.traceback = traceback.format_exc()
        raise failure from error
    if not isinstance(found, kind):
        raise _Failure(f"{part.role} {part.label!r}: expected it to return a {kind.__name__}, got {type(found).__name__}")
    return found


def _numbers(part: Part, found: Mapping[Any, Any]) -> dict[str, float | None]:
    """The values of a metric under their names in the tables; ``None`` for what is not finite."""
    for name, value in found.items():
        if not isinstance(name, str) or not isinstance(value, Real):
            raise _Failure(f"metric {part.label!r}: expected numbers by name, got {value!r} for {name!r}")
    values = {f"{name} ({part.suffix})" if part.suffix else name: float(value) for name, value in found.items()}
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def _seal(attacked: Attacked) -> str:
    """A digest of all data that parts are handed."""
    scene = attacked.scene
    given = [each for each in (scene.train, scene.valid, scene.test, attacked.seen) if each is not None]
    return fingerprint(scene.task.model.state_dict(), given[0], *(fingerprint({}, each) for each in given[1:]))


def _seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    torch.manual_seed(seed)


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """One thread, and the global random states put back."""
    threads, pythons, numpys = torch.get_num_threads(), random.getstate(), np.random.get_state()  # noqa: NPY002
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1), torch.random.fork_rng():
            yield
    finally:
        torch.set_num_threads(threads)
        random.setstate(pythons)
        np.random.set_state(numpys)  # noqa: NPY002


@cache
def versions() -> dict[str, str]:
    """Of what the numbers depend on."""
    return {
        "python": platform.python_version(),
        "robust-if": robust_if.__version__,
        **{name: version(name) for name in ("torch", "numpy", "scikit-learn")},
    }
