"""The page of ``robust-if tradeoffs``: where objectives agree and disagree, and what each choice promised and did. It has no scripts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from robust_if.evaluations.report import card, words
from robust_if.evaluations.report.contents import shown
from robust_if.evaluations.report.pages import filled, require, write_page
from robust_if.evaluations.report.tradeoff_words import findings, label, number, seen, side, verdict

_NEEDED = (
    "title", "data", "kind", "model", "estimator", "units", "n_train", "n_valid", "n_test", "k", "level", "objectives", "pairs", "points", "samples",
    "front", "choices", "attack", "warnings", "settings", "command",
)  # fmt: skip
#: Predictions below this share of the most that can change are rounding.
NOTHING = 1e-9
#: Marks of a plot that are closer, in percent of its width and height, share one.
CLOSE = 6.5
#: Columns of a table that a card shows before a click.
FIELDS = 5

Json = Mapping[str, Any]


def render_tradeoffs(directory: Path) -> Path:
    """The path of ``report.html``, written into ``directory`` in one step.

    Args:
        directory: holds ``result.json`` as ``robust-if tradeoffs`` writes it.

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
    require(result, _NEEDED, "result.json", "tradeoffs")
    rows = [_row(result, at, each) for at, each in enumerate(result["choices"])]
    return filled(
        "tradeoffs.html.j2",
        result=result,
        headline=verdict(result),
        findings=findings(result),
        names={each["name"]: each["words"] for each in result["objectives"]},
        matrix=_matrix(result),
        scatter=[_scatter(result, a, b) for a, b in combinations(range(len(result["objectives"])), 2)],
        groups=[_group(result, each) for each in result["samples"]],
        charts=[_charts(result, a, b) for a, b in combinations(range(len(result["objectives"])), 2)],
        rows=rows,
        beyond=_beyond(result),
    )


def _row(result: Json, at: int, choice: Json) -> dict[str, Any]:
    """A choice for the two tables."""
    cells, promises = [], []
    for objective in result["objectives"]:
        found, soft = seen(choice, objective), choice["verified"][objective["name"]]["soft"]
        cells.append({"text": _value(found["value"], found["share"]), "name": found["name"], **_gain(found, found["share"])})
        share = None if choice["share"] is None else choice["share"][objective["name"]]
        promised = None
        if choice["predicted"] is not None and result["units"] == "target":
            promised = _signed(0.0 if abs(share or 0.0) < NOTHING else choice["predicted"][objective["name"]])
        share = None if share is None else f"{round(100 * share)}{words.SPACE}%".replace("-", words.MINUS)
        promises.append({"promised": promised, "share": share, "verified": _gain(soft, False), "value": words.number(_short(soft["value"]))})
    return {
        "name": label(result, choice["name"]), "number": number(result, choice), "removed": choice["removed"], "cells": cells, "promises": promises,
        "tried": choice["predicted"] is not None, "none": choice["name"] == "none",
    }  # fmt: skip


def _value(value: float | None, share: bool) -> str:
    return "\N{EN DASH}" if value is None else words.percent(value) if share else words.number(_short(value))


def _gain(found: Json, share: bool) -> dict[str, Any]:
    """A gain with its interval and its side."""
    ends = "" if found["low"] is None else f"{_signed(found['low'], share)} to {_signed(found['high'], share)}"
    return {"gain": "\N{EN DASH}" if found["gain"] is None else _signed(found["gain"], share), "interval": ends, "side": side(found)}


def _signed(value: float, share: bool = False) -> str:
    """With its sign; a share in points."""
    if share:
        return words.points(value)
    text = words.number(_short(abs(value)))
    return text if value == 0 else f"{'+' if value > 0 else words.MINUS}{text}"


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.3g}")


def _beyond(result: Json) -> list[str]:
    """Objectives of which a choice promised to take more than there is."""
    if result["units"] != "target":
        return []
    tried = [each["predicted"] for each in result["choices"] if each["predicted"] is not None]
    return [each["words"] for each in result["objectives"] if any(found[each["name"]] > each["validation"] > 0 for found in tried)]


def _matrix(result: Json) -> list[list[dict[str, Any]]]:
    """Rank correlations of all pairs, with how strongly a cell is coloured."""
    names = [each["name"] for each in result["objectives"]]
    known = {tuple(pair["pair"]): pair["correlation"] for pair in result["pairs"]}

    def cell(one: str, other: str) -> dict[str, Any]:
        rho = 1.0 if one == other else known.get((one, other), known.get((other, one)))
        if rho is None:
            return {"text": "\N{EN DASH}", "tint": 0, "side": "plus"}
        return {"text": words.number(round(rho, 2)), "tint": round(70 * abs(rho)) if one != other else 0, "side": "plus" if rho >= 0 else "minus"}

    return [[cell(one, other) for other in names] for one in names]


def _scatter(result: Json, a: int, b: int) -> dict[str, Any]:
    """Samples by what they do to two objectives: dots as paths, on axes that are bent (asinh) since scores have long tails."""
    harm = np.array(result["points"]["harm"])[:, [a, b]]
    size = np.abs(harm)
    scale = np.where((quarter := np.quantile(size, 0.75, axis=0)) > 0, quarter, 1.0)
    top = np.arcsinh(np.maximum(size.max(0), 1e-300) / scale)
    x, y = (50 + 48 * np.arcsinh(harm / scale) / np.where(top > 0, top, 1.0)).T
    torn = harm[:, 0] * harm[:, 1] < 0
    paths = {
        name: "".join(f"M{px:.1f} {100 - py:.1f}h0" for px, py in zip(x[mask], y[mask], strict=True))
        for name, mask in (("agreed", ~torn), ("torn", torn))
    }
    one, other = result["objectives"][a], result["objectives"][b]
    pair = next(each for each in result["pairs"] if each["pair"] == [one["name"], other["name"]])
    corners = [pair["against"][1], pair["together"], 1 - pair["together"] - sum(pair["against"]), pair["against"][0]]
    return {"one": one["words"], "other": other["words"], "paths": paths, "corners": [words.percent(max(each, 0.0), 0) for each in corners]}


def _group(result: Json, group: Json) -> dict[str, Any]:
    """Samples of one kind as cards."""
    called = {each["name"]: each["words"] for each in result["objectives"]}
    helped = [called[name] for name in group["helped"]]
    title = f"Harm {called[group['harmed'][0]]}, help {helped[0]}" if helped else "Harm both" if len(group["harmed"]) == 2 else "Harm all"
    cards = []
    for entry in group["entries"]:
        scores = [(called[each["name"]], _signed(entry["harm"][each["name"]] / each["typical"])) for each in result["objectives"]]
        known = card(shown({**entry, "score": 0.0}, "result.json: samples", ("harm",)))
        fields = [*known["first"], *known["rest"]]
        cards.append(known | {"scores": scores, "first": fields[:FIELDS], "rest": fields[FIELDS:]})
    return {"title": title, "cards": cards}


def _charts(result: Json, a: int, b: int) -> dict[str, Any]:
    """Two objectives: what choices promised, as a share of the most that so many removals can change, and what they did on test data."""
    pair = [result["objectives"][at] for at in (a, b)]
    tried = [each for each in result["choices"] if each["predicted"] is not None]
    promised = [
        {"mark": number(result, each), "at": [100 * each["share"][one["name"]] for one in pair], "span": None, "plain": False} for each in tried
    ]
    dots = [[100 * each["share"][one["name"]] for one in pair] for each in result["front"]]
    did, factors = [], [100 if "hard" in result["choices"][0]["verified"][one["name"]] else 1 for one in pair]
    for each in result["choices"]:
        found = [seen(each, one) for one in pair]
        if all(part["gain"] is not None for part in found):
            span = [[factor * part[end] for end in ("low", "high")] for factor, part in zip(factors, found, strict=True) if part["low"] is not None]
            at = [factor * part["gain"] for factor, part in zip(factors, found, strict=True)]
            plain = each["predicted"] is None
            did.append({"mark": number(result, each), "at": at, "span": span if len(span) == 2 and each["name"] != "none" else None, "plain": plain})
    names = [seen(result["choices"][0], one)["name"] for one in pair]
    units = ["points" if factor == 100 else "" for factor in factors]
    alike = [f"{name} better by, in {unit}" if unit else f"{name} better by" for name, unit in zip(names, units, strict=True)]
    return {
        "one": pair[0]["words"], "other": pair[1]["words"],
        "plots": [
            {"title": "Predicted", "axes": [f"{each['words']}: % of the most" for each in pair], **_placed(promised, dots, zero=False)},
            {"title": "Verified on test data", "axes": alike, **_placed(did, [], zero=True)},
        ],
    }  # fmt: skip


def _placed(marks: Sequence[Json], dots: Sequence[Sequence[float]], *, zero: bool) -> dict[str, Any]:
    """Marks, intervals and dots in percent of a plot, and its ticks."""
    ends = [[*(mark["at"][k] for mark in marks), *(dot[k] for dot in dots), *(x for m in marks if m["span"] for x in m["span"][k])] for k in (0, 1)]
    axes = [_axis([*each, *([0.0] if zero else [])]) for each in ends]

    def place(value: float, k: int) -> float:
        return round(100 * float(value - axes[k]["low"]) / float(axes[k]["high"] - axes[k]["low"]), 2)

    def placed(at: Sequence[float]) -> dict[str, float]:
        return {"x": place(at[0], 0), "y": place(at[1], 1)}

    spans = [
        {"plain": m["plain"], **placed(m["at"]), "ends": [[place(x, k) for x in m["span"][k]] for k in (0, 1)]}
        for m in marks
        if m["span"] is not None
    ]
    return {
        "marks": merged([{"mark": str(m["mark"]), "plain": m["plain"], **placed(m["at"])} for m in marks]), "spans": spans,
        "dots": [placed(dot) for dot in dots], "wide": axes[0]["ticks"], "high": axes[1]["ticks"], "zero": placed((0, 0)),
    }  # fmt: skip


def merged(marks: Sequence[Json]) -> list[dict[str, Any]]:
    """Marks that would hide one another as one, in their middle, that names them all."""
    groups: list[list[Json]] = []
    for mark in marks:
        near = next((group for group in groups if all(abs(mark[k] - each[k]) < CLOSE for each in group for k in "xy")), None)
        if near is None:
            groups.append([mark])
        else:
            near.append(mark)
    return [
        {"mark": " ".join(each["mark"] for each in group), "plain": all(each["plain"] for each in group),
         **{k: round(sum(each[k] for each in group) / len(group), 2) for k in "xy"}}
        for group in groups
    ]  # fmt: skip


def _axis(values: Sequence[float]) -> dict[str, Any]:
    """Ends of an axis with some room around the values, and its ticks with their places."""
    low, high = min(values), max(values)
    width = high - low or max(abs(high), 1.0)
    low, high = low - 0.08 * width, high + 0.08 * width
    power = 10.0 ** math.floor(math.log10(width / 5))
    step = next(each * power for each in (1, 2, 2.5, 5, 10) if each * power >= width / 5 * (1 - 1e-9))
    marks = [step * at for at in range(math.ceil(low / step), math.floor(high / step) + 1)]
    ticks = [{"at": round(100 * (each - low) / (high - low), 2), "text": f"{each + 0.0:.4g}".replace("-", words.MINUS)} for each in marks]
    return {"low": low, "high": high, "ticks": ticks}
