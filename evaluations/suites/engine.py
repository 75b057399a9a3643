"""Runs a suite: row by row, on several workers, going on where an earlier call stopped."""

from __future__ import annotations

import json
import logging
import os
import platform
import shlex
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

import numpy as np

from robust_if.evaluations.report.suite import render_suite
from robust_if.evaluations.suites.crews import Crew, crew
from robust_if.evaluations.suites.rows import COSTS, Record, Row, frame, jsonable, named, read, write
from robust_if.evaluations.suites.suite import Suite
from robust_if.evaluations.suites.worker import Worker, versions
from robust_if.sweep import Engine
from robust_if.writing import write_json, write_whole

logger = logging.getLogger(__name__)

#: The entry of manifest.json by which an output folder is known as that of an evaluation.
MARK = "robust-if evaluation"
#: A worker without work takes half of what waits for another one, if at least so many rows wait: it has to make scene and attack once more.
SPLIT = 4


@dataclass(frozen=True)
class Standing:
    """How far a run is.

    Args:
        done: rows with a record, those of earlier calls among them.
        total: all rows.
        left: seconds that the others may take, from the mean of the rows so far with the same defence; ``None`` before there is any.
        row: the row that has just ended, and its record; ``None`` at the beginning.
    """

    done: int
    total: int
    left: float | None
    row: tuple[Row, Record] | None = None


def run(
    suite: Suite,
    directory: Path,
    *,
    engine: Engine = "local",
    workers: int | None = None,
    overwrite: bool = False,
    command: Sequence[str] = (),
    watch: Callable[[Standing], None] = lambda _: None,
) -> dict[str, Any]:
    """Work out all rows that ``directory`` does not hold yet, and write ``result.json``, ``results.parquet`` and ``report.html``.

    Every finished row is a file at once, so whatever ends a run costs the rows in hand, one per worker. The same call goes on from there; rows whose
    settings have changed are worked out, others are not; rows that failed are tried again. The numbers depend on neither workers nor interruptions.

    Args:
        suite: what to run.
        directory: new, empty, or that of an earlier evaluation.
        engine: ``"local"`` for processes of this machine, ``"ray"`` for Ray.
        workers: how many; by default one per core, and no more than there is work for. 0 is this process alone, for debugging.
        overwrite: forget what the folder of an earlier evaluation holds.
        command: by which the run can be repeated; ``robust-if evaluate`` with the suite's name by default.
        watch: is told at the beginning and after every row.

    Returns:
        What ``result.json`` says, see :func:`finish`.

    Raises:
        ValueError: if an argument is out of range, or the folder is somebody else's.
        ImportError: if Ray is asked for and not installed.
    """
    _check(engine, workers)
    rows = suite.rows()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    size = cores if workers is None else workers
    _claim(directory, suite, rows, overwrite, command, {"engine": engine, "workers": size})
    records = {name: record for name, record in read(directory, (row.id for row in rows)).items() if record.error is None}
    waiting = [row for row in rows if row.id not in records]
    if records:
        logger.info("%d of %d rows in %s are finished already", len(records), len(rows), directory)
    watch(Standing(len(records), len(rows), _left(waiting, rows, records, size)))
    if waiting:
        with crew(engine, min(size, len(waiting))) as workforce:
            for row, record in _worked_out(waiting, workforce):
                write(directory, row, record)
                records[row.id] = record
                left = _left([each for each in rows if each.id not in records], rows, records, size)
                watch(Standing(len(records), len(rows), left, (row, record)))
    return finish(directory)


def repeat(suite: Suite, wanted: str, directory: Path | None = None) -> tuple[Row, Record, Record | None]:
    """Work one row out again, in this process; nothing is written.

    Args:
        wanted: id of the row, or its beginning.
        directory: of a run, whose record of the row is looked up.

    Returns:
        The row, its new record, and the one in ``directory``, ``None`` if there is none.

    Raises:
        ValueError: if no row, or more than one, has such an id.
    """
    rows = suite.rows()
    found = [row for row in rows if wanted and row.id.startswith(wanted)]
    if len(found) != 1:
        known = ", ".join(row.id for row in (found or rows)[:8])
        raise ValueError(f"row: expected the id of one row of {suite.name}, {wanted!r} is that of {len(found)}; ids are {known}, …")
    stored = None if directory is None else read(directory, [found[0].id]).get(found[0].id)
    return found[0], Worker()(found[0]), stored


def finish(directory: Path) -> dict[str, Any]:
    """Write ``results.parquet``, ``result.json`` and the report from the manifest and the rows of a finished run; what ``result.json`` says.

    Raises:
        ValueError: if a row is missing.
    """
    manifest = json.loads((directory / "manifest.json").read_text(encoding="utf-8"))
    records = read(directory, (row["id"] for row in manifest["rows"]))
    missing = [row["id"] for row in manifest["rows"] if row["id"] not in records]
    if missing:
        raise ValueError(f"{directory}: {len(missing)} of {len(manifest['rows'])} rows are not finished, the first is {missing[0]}")
    rows = []
    for row in manifest["rows"]:
        record = records[row["id"]]
        costs = {name: getattr(record, name) for name in COSTS}
        told = {"error": record.error, "traceback": record.traceback, "finished": record.finished, "versions": record.versions}
        repeated = [*manifest["command"], "--out", str(directory), "--row", row["id"]]
        rows.append({**row, "metrics": record.metrics, "about": record.about, **costs, **told, "command": shlex.join(repeated)})
    others = sorted({f"{name} {row['versions'][name]}" for row in rows for name in row["versions"] if row["versions"][name] != versions().get(name)})
    warnings = [f"some rows were worked out under {', '.join(others)}"] if others else []
    environment = {**versions(), "platform": platform.platform(), "cpus": os.cpu_count(), "threads": 1, **manifest["crew"]}
    result = {
        **{name: manifest[name] for name in ("title", "suite", "about", "seeds")},
        "command": shlex.join([*manifest["command"], "--out", str(directory)]),
        "versions": versions(),
        "environment": environment,
        "started": manifest["started"],
        "seconds": sum(records[row["id"]].spent for row in rows),
        "warnings": warnings,
        "rows": rows,
    }
    frame(rows).to_parquet(directory / "results.parquet", index=False)
    write_json(directory / "result.json", result)
    render_suite(directory)
    return result


def _worked_out(rows: Iterable[Row], workforce: Crew) -> Iterator[tuple[Row, Record]]:
    """The rows as they end. Rows of one job go to one worker, so that scene, attack and undefended model are made once."""
    jobs: dict[str, deque[Row]] = {}
    for row in rows:
        jobs.setdefault(row.job, deque()).append(row)
    waiting, hands, busy = deque(jobs.values()), [deque[Row]() for _ in range(workforce.size)], dict[int, Row]()

    def begin(worker: int) -> None:
        if not hands[worker] and waiting:
            hands[worker] = waiting.popleft()
        elif not hands[worker]:
            longest = max(hands, key=len)
            hands[worker].extendleft(longest.pop() for _ in range(len(longest) // 2 if len(longest) >= SPLIT else 0))
        if hands[worker]:
            busy[worker] = hands[worker].popleft()
            workforce.give(worker, busy[worker])

    for worker in range(workforce.size):
        begin(worker)
    while busy:
        worker, record = workforce.next()
        yield busy.pop(worker), record
        begin(worker)


def _left(waiting: Sequence[Row], rows: Sequence[Row], records: Mapping[str, Record], workers: int) -> float | None:
    """Seconds that the waiting rows may take, from the mean of those with the same defence, else of all."""
    spent: dict[str, list[float]] = {}
    for row in rows:
        if row.id in records:
            spent.setdefault(row.defence.label, []).append(records[row.id].spent)
    if not spent:
        return None
    means = {label: float(np.mean(each)) for label, each in spent.items()}
    overall = float(np.mean(list(means.values())))
    return sum(means.get(row.defence.label, overall) for row in waiting) / max(1, min(workers, len(waiting)))


def _check(engine: str, workers: int | None) -> None:
    if engine not in get_args(Engine):
        raise ValueError(f"engine: expected {' or '.join(map(repr, get_args(Engine)))}, got {engine!r}")
    least = 1 if engine == "ray" else 0
    if workers is not None and (type(workers) is not int or workers < least):
        raise ValueError(f"workers: expected a whole number of at least {least}, got {workers!r}")
    if engine == "ray" and find_spec("ray") is None:
        raise ImportError("engine: 'ray' is not installed: pip install 'robust-if[ray]'")


def _claim(directory: Path, suite: Suite, rows: Sequence[Row], overwrite: bool, command: Sequence[str], crew: Mapping[str, Any]) -> None:
    """Make the directory that of this evaluation; rows of an earlier one stay, unless ``overwrite``."""
    try:
        known = json.loads((directory / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = None
    ours = isinstance(known, dict) and MARK in known
    if directory.is_file() or (directory.exists() and any(directory.iterdir()) and not ours):
        raise ValueError(f"out: {directory} is there and holds something else; choose another folder")
    if overwrite and ours:
        shutil.rmtree(directory)
        ours = False
    (directory / "rows").mkdir(parents=True, exist_ok=True)
    for name in ("result.json", "results.parquet", "report.html"):  # of the earlier call: they are there when this one is finished
        (directory / name).unlink(missing_ok=True)
    started = known["started"] if ours else datetime.now(UTC).isoformat(timespec="seconds")
    manifest = {
        MARK: suite.title, "title": suite.title, "suite": suite.name, "about": suite.about, "seeds": suite.seeds,
        "command": list(command) or ["robust-if", "evaluate", suite.name], "started": started, "crew": dict(crew),
        "rows": [jsonable(named(row)) for row in rows],
    }  # fmt: skip
    write_json(directory / "manifest.json", manifest)
    write_whole(directory / "suite.toml", suite.text.encode())
