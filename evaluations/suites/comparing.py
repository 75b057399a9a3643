"""Two runs of evaluations side by side: what became better or worse by more than noise."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import false_discovery_control, t

from robust_if.evaluations.suites.metrics import HIGHER_IS_BETTER

Verdict = Literal["worse", "changed", "better", "unclear", "same"]
#: Data, attack, defence and metric by their labels.
Key = tuple[str, str, str, str]
#: Share of the flagged differences that are expected to be noise.
RATE = 0.05


@dataclass(frozen=True)
class Difference:
    """One metric of one defence in two runs.

    Args:
        data: label.
        attack: label.
        defence: label.
        metric: name.
        before: mean over the seeds of the first run.
        after: mean over the seeds of the second run.
        difference: ``after - before``.
        low: lower end of its 95 % interval; ``None`` with fewer than two seeds in a run.
        high: upper end.
        seeds: of both runs.
        paired: whether both runs have the same seeds, so that the interval is that of the differences seed by seed; else it is Welch's.
        p: probability of a difference as large if there were none; ``None`` without an interval.
        verdict: ``"worse"`` or ``"better"`` beyond noise; ``"changed"`` where it is not known which of the two, or there is no interval;
            ``"unclear"`` within noise; ``"same"`` where no seed differs.
    """

    data: str
    attack: str
    defence: str
    metric: str
    before: float
    after: float
    difference: float
    low: float | None
    high: float | None
    seeds: tuple[int, int]
    paired: bool
    p: float | None
    verdict: Verdict = "unclear"


@dataclass(frozen=True)
class Comparison:
    """Two runs.

    Args:
        differences: in the order of the first run.
        only_first: metrics that the second run does not have.
        only_second: metrics that the first run does not have.
        failed: rows of the second run that failed, but did not in the first, in words.
    """

    differences: tuple[Difference, ...]
    only_first: tuple[Key, ...]
    only_second: tuple[Key, ...]
    failed: tuple[str, ...]

    @property
    def regressed(self) -> bool:
        """Whether anything became worse, or fails now."""
        return bool(self.failed) or any(each.verdict == "worse" for each in self.differences)

    def plain(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {**asdict(self), "regressed": self.regressed}


def compare(first: Path, second: Path, *, tolerance: float = 0.0) -> Comparison:
    """Match the rows of two runs by labels, metric by metric.

    A difference is flagged if it is larger than ``tolerance`` and beyond noise: of all flagged ones 5 % are expected to be noise (the procedure of
    Benjamini and Hochberg 1995 over all that differ). Runs of the same seeds are compared seed by seed, others by Welch's interval. With one seed
    there is no measure of noise; then only a positive ``tolerance`` makes a difference better or worse.

    Args:
        first: the folder of a run, or its ``result.json``.
        second: the same of the run that may be better or worse.
        tolerance: in units of the metric.

    Raises:
        ValueError: if there is no finished run, or the two have nothing in common.
    """
    if not tolerance >= 0:
        raise ValueError(f"tolerance: expected a number of at least 0, got {tolerance}")
    runs = [_rows(path) for path in (first, second)]
    before, after = (_values(rows) for rows in runs)
    shared = [key for key in before if key in after]
    if not shared:
        raise ValueError(f"compare: {first} and {second} have no data, attack, defence and metric in common")
    found = _flagged([_difference(key, before[key], after[key]) for key in shared], tolerance)
    fine = {_place(row) for row in runs[0] if row["error"] is None}
    failed = [" / ".join(map(str, _place(row))) for row in runs[1] if row["error"] is not None and _place(row) in fine]
    return Comparison(tuple(found), tuple(key for key in before if key not in after), tuple(key for key in after if key not in before), tuple(failed))


def stem(metric: str) -> str:
    """The name of a metric without what tells two uses of it apart: ``robust_accuracy (standard)`` is one of ``robust_accuracy``."""
    return metric.partition(" (")[0]


def better(metric: str) -> int:
    """1 if more of the metric is better, −1 if less is, 0 if that is not known."""
    known = HIGHER_IS_BETTER.get(stem(metric))
    return 0 if known is None else 1 if known else -1


def interval(values: ArrayLike) -> tuple[float, float, float]:
    """Mean of ``(n,)`` values and the ends of its 95 % interval by Student's t; NaN ends for fewer than two."""
    array = np.asarray(values, dtype=float)
    mean = float(array.mean())
    if len(array) < 2:
        return mean, float("nan"), float("nan")
    half = float(t.ppf(0.975, len(array) - 1) * array.std(ddof=1) / np.sqrt(len(array)))
    return mean, mean - half, mean + half


def _rows(path: Path) -> list[dict[str, Any]]:
    file = path / "result.json" if path.is_dir() else path
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        rows: list[dict[str, Any]] = found["rows"]
        for row in rows:
            _place(row), row["metrics"], row["error"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"compare: {path} is not the folder of a finished `robust-if evaluate`") from error
    return rows


def _place(row: Mapping[str, Any]) -> tuple[str, str, str, int]:
    return row["data"], row["attack"], row["defence"], row["seed"]


def _values(rows: Iterable[Mapping[str, Any]]) -> dict[Key, dict[int, float]]:
    """The values by seed; those that are not finite are left out."""
    found: dict[Key, dict[int, float]] = {}
    for row in rows:
        data, attack, defence, seed = _place(row)
        for metric, value in row["metrics"].items():
            if value is not None:
                found.setdefault((data, attack, defence, metric), {})[seed] = float(value)
    return found


def _difference(key: Key, before: Mapping[int, float], after: Mapping[int, float]) -> Difference:
    paired = set(before) == set(after)
    a, b = (np.array([values[seed] for seed in sorted(values)]) for values in (before, after))
    mean = float(b.mean() - a.mean())
    if min(len(a), len(b)) < 2:
        error, freedom = None, 0.0
    elif paired:
        mean, error, freedom = float((b - a).mean()), float((b - a).std(ddof=1)) / np.sqrt(len(a)), len(a) - 1.0
    else:
        parts = np.array([a.var(ddof=1) / len(a), b.var(ddof=1) / len(b)])
        error = float(np.sqrt(parts.sum()))
        freedom = float(parts.sum() ** 2 / (parts**2 / [len(a) - 1, len(b) - 1]).sum()) if error else len(a) + len(b) - 2.0
    half = p = None
    if error is not None:
        half = float(t.ppf(0.975, freedom) * error)
        p = float(2 * t.sf(abs(mean) / error, freedom)) if error else float(mean == 0)
    same = paired and bool((a == b).all())
    low, high = (None, None) if half is None else (mean - half, mean + half)
    return Difference(
        *key, float(a.mean()), float(b.mean()), mean, low, high, (len(a), len(b)), paired, p, "same" if same else "unclear"
    )  # fmt: skip


def _flagged(differences: Sequence[Difference], tolerance: float) -> list[Difference]:
    """The differences with their verdicts."""
    tested = [position for position, each in enumerate(differences) if each.verdict != "same" and each.p is not None]
    adjusted = dict(zip(tested, false_discovery_control([differences[each].p for each in tested]), strict=True)) if tested else {}
    return [replace(each, verdict=_verdict(each, adjusted.get(position), tolerance)) for position, each in enumerate(differences)]


def _verdict(each: Difference, p: float | None, tolerance: float) -> Verdict:
    if each.verdict == "same":
        return "same"
    if abs(each.difference) <= tolerance or (p is not None and p > RATE):
        return "unclear"
    sign = better(each.metric)
    if not sign or (p is None and not tolerance):
        return "changed"
    return "better" if sign * each.difference > 0 else "worse"
