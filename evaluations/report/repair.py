"""The page of ``robust-if repair``: what was changed, what that did to every metric, round by round and by group. It has no scripts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from robust_if.evaluations.report import card, words
from robust_if.evaluations.report.contents import shown
from robust_if.evaluations.report.pages import filled, require, write_page

NAMES = {
    "accuracy": ("Accuracy", "right predictions"),
    "demographic_parity": ("Demographic parity", "positive predictions"),
    "true_positive_rate_parity": ("Equal opportunity", "true positive rate"),
    "false_positive_rate_parity": ("False positive rate parity", "false positive rate"),
    "equalized_odds": ("Equalized odds", "the larger of the two above"),
    "error_rate_parity": ("Error rate parity", "wrong predictions"),
}
RATES = {
    "selection_rate": ("Predicted positive", "share of the group"),
    "true_positive_rate": ("True positive rate", "of those whose label is positive"),
    "false_positive_rate": ("False positive rate", "of those whose label is negative"),
}
#: The rate that a gap compares, as a sentence says it.
_RATE = {
    "demographic_parity": "share of positive predictions",
    "true_positive_rate_parity": "true positive rate",
    "false_positive_rate_parity": "false positive rate",
    "error_rate_parity": "error rate",
}
_DONE = {"reweigh": "Reweighing", "remove": "Removing", "relabel": "Relabelling"}
_NEEDED = (
    "title", "data", "kind", "model", "estimator", "action", "targets", "bound", "sensitive", "n_train", "n_valid", "n_test", "metrics", "rounds",
    "chosen", "groups", "changed", "changed_by", "kinds", "harmful", "collect", "warnings", "settings", "command", "verdict", "unmet",
)  # fmt: skip


def render_repair(directory: Path) -> Path:
    """The path of ``report.html``, written into ``directory`` in one step.

    Args:
        directory: holds ``result.json`` as ``robust-if repair`` writes it.

    Raises:
        FileNotFoundError: if the file is missing.
        ValueError: if it is malformed; nothing is written then.
    """
    return write_page(directory, html)


def html(result: dict[str, Any]) -> str:
    """The whole page; every value from the data is escaped by the template.

    Raises:
        ValueError: if a field is missing.
    """
    require(result, _NEEDED, "result.json", "repair")
    samples = [card({**shown(each, f"result.json: collect[{at}]", ()), "suggested": None}) for at, each in enumerate(result["collect"]["samples"])]
    kinds = [*result["harmful"], *result["collect"]["kinds"]]
    return filled(
        "repair.html.j2",
        result=result,
        headline=verdict(result, intervals=False),
        findings=findings(result),
        worse=worse(result),
        metrics=[_row(result, each) for each in result["metrics"]],
        curve=_curve(result),
        panels=[_panel(result, name) for name in RATES],
        few=result["settings"]["smallest"],
        samples=samples,
        unknown=[key for key in ("predicted", "verified") if all(each[key] is None for each in kinds)],
    )


def verdict(result: Mapping[str, Any], *, intervals: bool = True) -> str:
    """What was changed, and what became of the worst target and of accuracy on test data, in one line."""
    metric, accuracy, changed = target(result), result["metrics"][0], result["changed"]["samples"]
    sizes = [_size(metric[when]["value"]) for when in ("before", "after")]
    name = NAMES[metric["name"]][0].lower()
    right = [_percent(accuracy[when], intervals) for when in ("before", "after")]
    if not changed:
        return f"No sample was changed: the gap in {name} is {_gap(metric['before'], intervals)} on test data, accuracy {right[0]}."
    opening = f"{_DONE[result['action']]} {changed:,} of {words.count(result['n_train'], 'training sample')}"
    if sizes[0] is None or sizes[1] is None:
        return f"{opening} took accuracy from {right[0]} to {right[1]} on test data; the gap in {name} cannot be known there."
    did = "cut" if sizes[1] < sizes[0] else "raised"
    gaps = [_gap(metric[when], intervals) for when in ("before", "after")]
    gaps[0] = gaps[0] if intervals else gaps[0].removesuffix(f"{words.SPACE}points")
    return f"{opening} {did} the gap in {name} from {gaps[0]} to {gaps[1]} on test data; accuracy went from {right[0]} to {right[1]}."


def target(result: Mapping[str, Any]) -> Mapping[str, Any]:
    """Of the metrics that were to be repaired the one whose gap on validation data was widest."""
    found: Mapping[str, Any] = max((each for each in result["metrics"] if each["target"]), key=lambda each: abs(each["validation"]["before"] or 0.0))
    return found


def worse(result: Mapping[str, Any]) -> list[str]:
    """What the repair made worse on test data, in words; the metrics that were not repaired are those at risk."""
    said = []
    for each in result["metrics"][1:]:
        name, rate, highest = NAMES[each["name"]][0], _RATE.get(each["name"], ""), each["after"]["highest"]
        after, where = _gap(each["after"]), ""
        if rate and highest:
            where = f", and now {highest} has the higher one" if each["turned"] else f", with {highest} at the higher end"
        if each["worse"]:
            did, sure = ("got", "") if each["worse"] == "clearly" else ("may have got", ", which the interval of before still holds")
            said.append(f"{name} {did} worse: the gap{f' in the {rate}' if rate else ''} went from {_gap(each['before'])} to {after}{where}{sure}.")
        elif each["turned"] and each["target"]:
            said.append(f"{name} turned round: {highest} now has the higher {rate}, by {after}.")
    return said


def findings(result: Mapping[str, Any]) -> list[str]:
    """The sentences below the headline."""
    metric, changed = target(result), result["changed"]
    said = []
    parts = {
        "removed": "lost all weight" if result["action"] == "reweigh" else "removed",
        "down": "count less",
        "up": "count more",
        "relabelled": "relabelled",
    }
    counts = [f"{changed[key]:,} {text}" for key, text in parts.items() if changed[key]]
    if counts:
        said.append(f"Of the training samples {', '.join(counts)}.")
    inside = metric["validation"]
    if inside["before"] is not None and inside["after"] is not None and changed["samples"]:
        before, after = (f"{_points(abs(inside[key]))}" for key in ("before", "after"))
        said.append(f"On validation data, which decided, the gap went from {before} to {after}{words.SPACE}points; the test says what of that holds.")
    runs = [each for each in metric["after"]["runs"] if each is not None]
    if len(runs) > 1:
        spread = f"{_points(min(runs))} to {_points(max(runs))}"
        said.append(
            f"Over {len(runs)} trainings from scratch the gap after the repair is {spread}{words.SPACE}points; intervals are those of the first one."
        )
    if result["unmet"]:
        said.append(f"Not reached: {result['unmet'].replace('_', ' ')}.")
    return said


def _row(result: Mapping[str, Any], metric: Mapping[str, Any]) -> dict[str, Any]:
    """One metric of the large table, in points or percent."""
    name, meaning = NAMES[metric["name"]]
    share = metric["name"] == "accuracy"
    inside = {
        key: (words.percent(value) if share else _signed(value)) if value is not None else "\N{EN DASH}"
        for key, value in metric["validation"].items()
    }
    tests = {}
    for when in ("before", "after"):
        found = metric[when]
        known = found["value"] is not None
        text = (words.percent(found["value"]) if share else _signed(found["value"])) if known else "\N{EN DASH}"
        runs = sorted((_points(each) for each in found["runs"] if each is not None), key=float) if len(found["runs"]) > 1 else []
        tests[when] = {
            "text": text, "interval": f"{_signed(found['low'])} to {_signed(found['high'])}" if known and found["low"] is not None else "",
            "runs": f"seeds {runs[0]} to {runs[-1]}" if runs else "", "where": found["where"],
        }  # fmt: skip
    return {**metric, "words": name, "meaning": meaning, "inside": inside, "tests": tests}


def _curve(result: Mapping[str, Any]) -> dict[str, Any]:
    """Accuracy against the gap over the rounds: places in percent of the plot, ticks, and the rows of the table below."""
    rows = result["rounds"]
    series = {
        name: [(each[name]["gap"], each[name]["accuracy"], each["round"]) for each in rows if each[name]["gap"] is not None]
        for name in ("validation", "test")
    }
    every = [point for points in series.values() for point in points]
    wide, high = (_axis([100 * point[at] for point in every], zero=not at) for at in (0, 1))

    def place(value: float, axis: Mapping[str, Any]) -> float:
        return round(100 * float(100 * value - axis["low"]) / float(axis["high"] - axis["low"]), 2)

    lines = []
    for name, points in series.items():
        dots = [{"x": place(x, wide), "y": place(y, high), "round": at, "chosen": at == result["chosen"]} for x, y, at in points]
        lines.append({"name": name, "dots": dots, "path": " ".join(f"{dot['x']},{100 - dot['y']}" for dot in dots)})
    table = [
        {
            "round": each["round"], "chosen": each["round"] == result["chosen"], "changed": f"{each['changed']:,.0f}",
            **{f"{name}_{key}": (_points(each[name][key]) if key == "gap" else words.percent(each[name][key])) if each[name][key] is not None
               else "\N{EN DASH}" for name in series for key in ("gap", "accuracy")},
        }
        for each in rows
    ]  # fmt: skip
    ends = {
        name: f"{_points(each['gap'])} points at {words.percent(each['accuracy'])}"
        for name, each in rows[result["chosen"]].items()
        if name in series and each["gap"] is not None
    }
    alt = f"Accuracy against the gap over {len(rows)} rounds; chosen is round {result['chosen']}: " + ", ".join(
        f"{name} {text}" for name, text in ends.items()
    )
    return {"lines": lines, "wide": wide["ticks"], "high": high["ticks"], "table": table, "alt": alt, "bound": place(result["bound"], wide)}


def _axis(values: Sequence[float], *, zero: bool) -> dict[str, Any]:
    """Ends of an axis in percent, and its ticks with their places."""
    low, high = (0.0 if zero else min(values, default=0.0)), max(values, default=1.0)
    rough = max(high - low, 0.5) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(each * power for each in (1, 2, 2.5, 5, 10) if each * power >= rough)
    low, high = math.floor(low / step + 1e-9) * step, math.ceil(max(high, low + step) / step - 1e-9) * step
    marks = [low + step * at for at in range(round((high - low) / step) + 1)]
    return {"low": low, "high": high, "ticks": [{"at": round(100 * (each - low) / (high - low), 2), "text": f"{each:.4g}"} for each in marks]}


def _panel(result: Mapping[str, Any], name: str) -> dict[str, Any]:
    """One rate of every group, before and after, with places in percent of the axis."""
    heading, meaning = RATES[name]
    known = [each["high"] for group in result["groups"] for each in group["rates"][name] if each["high"] is not None]
    end = next(each for each in (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0) if each >= max(known, default=0) or each == 1)
    bars = []
    for group in result["groups"]:
        before, after = (_mark(each, end) for each in group["rates"][name])
        n = group["rates"][name][0]["n"]
        bars.append(
            {
                "name": group["group"],
                "n": n,
                "few": n < result["settings"]["smallest"],
                "marks": [{"when": "before", **before}, {"when": "after", **after}],
            }
        )
    return {"heading": heading, "meaning": meaning, "bars": bars, "end": words.percent(end, 0)}


def _mark(rate: Mapping[str, Any], end: float) -> dict[str, Any]:
    if rate["value"] is None:
        return {"defined": False, "text": "undefined", "interval": "", "at": "0", "low": "0", "wide": "0"}
    at, low, high = (100 * min(rate[key] / end, 1) for key in ("value", "low", "high"))
    return {
        "defined": True, "text": words.percent(rate["value"]), "interval": f"{100 * rate['low']:.1f} to {100 * rate['high']:.1f}",
        "at": f"{at:.2f}%", "low": f"{low:.2f}%", "wide": f"{high - low:.2f}%",
    }  # fmt: skip


def _size(value: float | None) -> float | None:
    return None if value is None else abs(value)


def _points(value: float) -> str:
    return f"{100 * value:.1f}"


def _signed(value: float) -> str:
    """Points with a sign where they have one; never −0.0."""
    text = f"{abs(100 * value):.1f}"
    return text if value >= 0 or float(text) == 0 else f"{words.MINUS}{text}"


def _gap(found: Mapping[str, Any], intervals: bool = True) -> str:
    """A gap on test data by its size: ``17.9 points (16.6 to 19.2)``."""
    if found["value"] is None:
        return "unknown"
    ends = sorted(abs(each) for each in (found["low"], found["high"]) if each is not None)
    if ends and found["low"] < 0 < found["high"]:
        ends[0] = 0.0
    interval = f" ({_points(ends[0])} to {_points(ends[1])})" if intervals and len(ends) == 2 else ""
    return f"{_points(abs(found['value']))}{words.SPACE}points{interval}"


def _percent(found: Mapping[str, Any], intervals: bool) -> str:
    interval = f" ({_points(found['low'])} to {_points(found['high'])})" if intervals and found["low"] is not None else ""
    return words.percent(found["value"]) + interval
