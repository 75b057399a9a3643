"""What the rows of an evaluation say together: means over seeds, differences from no defence, and curves over an option that was varied."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from robust_if.evaluations.suites.comparing import better, interval, stem

#: The defence that others are compared with.
BASELINE = "none"
#: Metrics that say most, in this order; the first that a block has is the one that it is judged by.
FIRST = (
    "attack_success", "accuracy_attacked_again", "accuracy_stored", "accuracy", "robust_accuracy", "auroc", "relabel_accuracy",
    "equalized_odds_difference", "bad_kept", "demographic_parity_difference", "average_precision", "worst_class_accuracy",
)  # fmt: skip
#: Points that make a curve.
CURVE = 3


@dataclass(frozen=True)
class Cell:
    """One metric of one defence.

    Args:
        mean: over the seeds.
        low: lower end of its 95 % interval by Student's t, NaN for one seed.
        high: upper end.
        seeds: how many.
        change: mean difference from no defence, seed by seed; ``None`` without that, and for itself.
        verdict: ``"better"`` or ``"worse"`` than no defence where the interval of the difference leaves 0 out, else ``""``.
    """

    mean: float
    low: float
    high: float
    seeds: int
    change: float | None = None
    verdict: str = ""


@dataclass(frozen=True)
class Line:
    """One curve: a metric of one defence over the values of an option.

    Args:
        label: of the defence without the option.
        at: ``(k,)`` values of the option, ascending.
        cells: ``(k,)``.
    """

    label: str
    at: tuple[float, ...]
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Curves:
    """The curves of one metric.

    Args:
        metric: name.
        option: what is varied.
        lines: of the defences.
        baseline: without a defence, ``None`` if that was not run.
    """

    metric: str
    option: str
    lines: tuple[Line, ...]
    baseline: Cell | None


@dataclass(frozen=True)
class Block:
    """All defences against one attack on one data set.

    Args:
        metrics: those that a row has, see :func:`ordered`.
        cells: by defence and metric, in the order of the rows.
        families: by defence, its label without the options that were varied.
        costs: by defence, mean seconds and largest peak of memory in bytes; ``None`` where unknown.
        curves: where a defence was run with several values of an option.
    """

    data: str
    attack: str
    metrics: tuple[str, ...]
    cells: Mapping[str, Mapping[str, Cell]]
    families: Mapping[str, str]
    costs: Mapping[str, tuple[float | None, int | None]]
    curves: tuple[Curves, ...]


def blocks(rows: Sequence[Mapping[str, Any]]) -> list[Block]:
    """The rows of ``result.json`` by data and attack; those that failed count nowhere."""
    found: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["error"] is None:
            found.setdefault((row["data"], row["attack"]), []).append(row)
    return [_block(data, attack, each) for (data, attack), each in found.items()]


def ordered(metrics: Iterable[str]) -> list[str]:
    """Metrics, each once, those that say most first."""
    return sorted(dict.fromkeys(metrics), key=lambda name: FIRST.index(stem(name)) if stem(name) in FIRST else len(FIRST))


def _block(data: str, attack: str, rows: Sequence[Mapping[str, Any]]) -> Block:
    metrics = tuple(ordered(name for row in rows for name in row["metrics"]))
    defences: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        defences.setdefault(row["defence"], []).append(row)
    none = {row["seed"]: row["metrics"] for row in defences.get(BASELINE, [])}
    cells = {name: {metric: cell for metric in metrics if (cell := _cell(each, metric, none)) is not None} for name, each in defences.items()}
    families = {name: each[0]["family"] for name, each in defences.items()}
    costs = {name: _cost(each) for name, each in defences.items()}
    return Block(data, attack, metrics, cells, families, costs, tuple(_curves(defences, families, cells, metrics)))


def _cell(rows: Sequence[Mapping[str, Any]], metric: str, none: Mapping[int, Mapping[str, float | None]]) -> Cell | None:
    values = {row["seed"]: value for row in rows if (value := row["metrics"].get(metric)) is not None}
    if not values:
        return None
    pairs = [(value, none[seed].get(metric)) for seed, value in values.items() if seed in none]
    differences = [value - other for value, other in pairs if other is not None]
    mean, low, high = interval(list(values.values()))
    if rows[0]["defence"] == BASELINE or not differences:
        return Cell(mean, low, high, len(values))
    change, least, most = interval(differences)
    sign = better(metric) * (1 if least > 0 else -1 if most < 0 else 0)
    return Cell(mean, low, high, len(values), change, {1: "better", -1: "worse"}.get(sign, ""))


def _cost(rows: Sequence[Mapping[str, Any]]) -> tuple[float | None, int | None]:
    seconds = [row["seconds"] for row in rows if row["seconds"] is not None]
    peaks = [row["peak_bytes"] for row in rows if row["peak_bytes"] is not None]
    return float(np.mean(seconds)) if seconds else None, max(peaks, default=None)


def _curves(
    defences: Mapping[str, Sequence[Mapping[str, Any]]], families: Mapping[str, str], cells: Mapping[str, Mapping[str, Cell]], metrics: Sequence[str]
) -> list[Curves]:  # fmt: skip
    """Curves over each option that takes several numbers while all others of the defence stay; a value such as ``"auto"`` is no point of them."""
    found: dict[str, dict[str, dict[float, str]]] = {}  # option -> line -> value -> defence
    options = {name: rows[0]["options"]["defence"] for name, rows in defences.items()}
    for name, own in options.items():
        for option in (key for key, value in own.items() if _is_number(value)):
            alike = {
                float(other[option]): each
                for each, other in options.items()
                if families[each] == families[name] and _is_number(other.get(option)) and _without(other, option) == _without(own, option)
            }
            if len(alike) >= CURVE:
                label = re.sub(rf" {re.escape(option)}=\S+", "", name)  # not by value: the label may say 2 where the option is 2.0
                found.setdefault(option, {}).setdefault(label, dict(sorted(alike.items())))
    none = cells.get(BASELINE, {})
    drawn = [
        Curves(metric, option, tuple(line for label, by in lines.items() if (line := _line(label, by, metric, cells)) is not None), none.get(metric))
        for option, lines in found.items()
        for metric in metrics
    ]
    return [each for each in drawn if each.lines]


def _line(label: str, by: Mapping[float, str], metric: str, cells: Mapping[str, Mapping[str, Cell]]) -> Line | None:
    """The points that have the metric, ``None`` if they make no curve."""
    points = {at: cells[name][metric] for at, name in by.items() if metric in cells[name]}
    return Line(label, tuple(points), tuple(points.values())) if len(points) >= CURVE else None


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _without(options: Mapping[str, Any], option: str) -> dict[str, Any]:
    return {key: value for key, value in options.items() if key != option}
