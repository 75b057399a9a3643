"""Rows of an evaluation: what one is, what came out of it, and the files in which finished rows are kept."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

import robust_if
from robust_if.evaluations.suites.roles import Part
from robust_if.writing import plain, write_json

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Row:
    """One defence against one attack on one data set with one seed, judged by all metrics."""

    data: Part
    attack: Part
    defence: Part
    metrics: tuple[Part, ...]
    seed: int

    @cached_property
    def id(self) -> str:
        """A digest of everything that determines the row: the parts' names, options and files, the seed, and the version of robust-if.

        Titles and labels do not count (but for those that name a metric's values), nor do other rows; so suites can grow and be renamed.
        """
        return _digest(self.settings())

    @cached_property
    def job(self) -> str:
        """A digest of what the row shares with others: data, attack and seed."""
        return _digest({name: value for name, value in self.settings().items() if name not in ("defence", "metrics")})

    def settings(self) -> dict[str, Any]:
        """What determines the row, as plain values."""
        return {
            "data": self.data.settings,
            "attack": self.attack.settings,
            "defence": self.defence.settings,
            "metrics": [{**part.settings, "suffix": part.suffix} for part in self.metrics],
            "seed": self.seed,
            "robust_if": robust_if.__version__,
        }

    def said(self) -> str:
        """The row in words."""
        return f"{self.data.label} / {self.attack.label} / {self.defence.label} / seed {self.seed}"


@dataclass(frozen=True)
class Record:
    """What came out of a row.

    Times are of the wall clock in one process with one thread, so other work on the machine makes them longer.

    Args:
        id: of the row.
        metrics: by name; ``None`` where a metric is not a finite number.
        about: facts that the defence tells.
        seconds: of the defence, without the undefended model.
        cpu_seconds: processor time of the defence, which other work on the machine hardly changes.
        undefended_seconds: of training the undefended model, which the rows of a job share, if this defence asked for it; else 0.
        shared_seconds: of making the scene and the attack, which the rows of a job share.
        metric_seconds: of all metrics.
        spent: seconds from the beginning of the row to its end, with what it made for the rows after it.
        peak_bytes: the most memory that the whole process held while the defence ran, Python, torch and the data included; ``None`` if unknown.
        added_bytes: by how much that is more than when the defence began. Memory that earlier rows freed, but the process kept, is not counted.
        error: why there are no metrics; ``None`` for a row that is finished.
        traceback: of the error.
        versions: of Python, torch, NumPy and robust-if.
        finished: when, in UTC.
    """

    id: str
    metrics: Mapping[str, float | None] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)
    seconds: float | None = None
    cpu_seconds: float | None = None
    undefended_seconds: float | None = None
    shared_seconds: float | None = None
    metric_seconds: float | None = None
    spent: float = 0.0
    peak_bytes: int | None = None
    added_bytes: int | None = None
    error: str | None = None
    traceback: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    finished: str = ""


#: What a record tells beside metrics, in this order.
COSTS = ("seconds", "cpu_seconds", "undefended_seconds", "shared_seconds", "metric_seconds", "peak_bytes", "added_bytes")


def write(directory: Path, row: Row, record: Record) -> None:
    """Write the record with the settings of its row to ``directory/rows``, whole or not at all."""
    write_json(directory / "rows" / f"{row.id}.json", {**asdict(record), "row": jsonable({**named(row), "settings": row.settings()})})


def read(directory: Path, ids: Iterable[str]) -> dict[str, Record]:
    """The records that ``directory/rows`` holds of these rows."""
    names, found = {known.name for known in fields(Record)}, dict[str, Record]()
    for each in ids:
        path = directory / "rows" / f"{each}.json"
        if path.is_file():
            try:
                found[each] = Record(**{name: value for name, value in json.loads(path.read_text(encoding="utf-8")).items() if name in names})
            except (ValueError, TypeError, AttributeError):
                logger.warning("%s cannot be read; the row is worked out again", path)
    return found


def named(row: Row) -> dict[str, Any]:
    """The row as tables and files name it."""
    parts = {"data": row.data, "attack": row.attack, "defence": row.defence}
    options = {role: dict(part.options) for role, part in parts.items()}
    return {"id": row.id, **{role: part.label for role, part in parts.items()}, "seed": row.seed, "family": row.defence.family, "options": options}


def frame(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """One line per row and metric, in the order of the rows; a row that has no metric, because it failed for instance, has one line without.

    Args:
        rows: as ``result.json`` holds them.
    """
    columns = ("id", "data", "attack", "defence", "seed")
    lines = [
        {**{name: row[name] for name in columns}, "metric": metric, "value": value, **{name: row[name] for name in COSTS}, "error": row["error"]}
        for row in rows
        for metric, value in (row["metrics"] or {None: None}).items()
    ]
    kinds = {"seed": "int64", "value": "float64", **{name: "Int64" if name.endswith("bytes") else "float64" for name in COSTS}}
    texts = dict.fromkeys(("id", "data", "attack", "defence", "metric", "error"), "string")
    return pd.DataFrame(lines, columns=[*columns, "metric", "value", *COSTS, "error"]).astype({**kinds, **texts})


def jsonable(values: Mapping[str, Any]) -> dict[str, Any]:
    """Plain values as JSON gives them back: NaN and infinity, which it has no words for, are ``None``; what else it does not know is text."""
    found: dict[str, Any] = json.loads(json.dumps(plain(dict(values)), default=_said), parse_constant=lambda _: None)
    return found


def _digest(settings: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=_said).encode()).hexdigest()[:12]


def _said(value: Any) -> Any:
    """What JSON does not know, as text that is the same in every process."""
    return str(getattr(value, "__qualname__", value))
