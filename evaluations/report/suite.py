"""The page of ``robust-if evaluate``: every defence against every attack, with intervals, curves and costs. It has no scripts."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from robust_if.evaluations.report import words
from robust_if.evaluations.report.pages import filled, require, write_page
from robust_if.evaluations.suites.comparing import better, stem
from robust_if.evaluations.suites.summary import BASELINE, Block, Cell, Curves, blocks

_NEEDED = ("title", "about", "suite", "command", "versions", "environment", "started", "seconds", "seeds", "rows", "warnings")
_ROW = ("data", "attack", "defence", "seed", "family", "options", "metrics", "seconds", "peak_bytes", "error", "command")
#: Metrics that the table of a block has; the others are in a table that can be opened.
SHOWN = 5
#: Metrics of a block that are drawn over an option.
CHARTS = 2
#: Defences that are there to compare with.
REFERENCES = (BASELINE, "random", "oracle")
WIDTH, HEIGHT = 320.0, 190.0
LEFT, RIGHT, TOP, BOTTOM = 40.0, 8.0, 10.0, 26.0
#: Between the whiskers of two lines, and the least between the numbers below an axis.
ASIDE, APART = 2.5, 30.0
#: Values of an option that are further apart than by this factor are drawn on a logarithmic axis.
WIDE = 30
COLOURS, DASHES = 6, ("", "7 3", "2 3", "9 3 2 3", "12 4", "4 4")


def render_suite(directory: Path) -> Path:
    """The path of ``report.html``, written into ``directory`` in one step.

    Args:
        directory: holds ``result.json`` as ``robust-if evaluate`` writes it.

    Raises:
        FileNotFoundError: if the file is missing.
        ValueError: if it is malformed; nothing is written then.
    """
    return write_page(directory, html)


def html(result: dict[str, Any]) -> str:
    """The whole page; the template escapes every value.

    Raises:
        ValueError: if a field is missing or malformed.
    """
    _check(result)
    found = blocks(result["rows"])
    shares = _shares(found)
    return filled(
        "suite.html.j2",
        result=result,
        headline=_headline(found),
        sentences=[said for block in found if (said := _sentence(block, shares))],
        blocks=[_shown(block, shares, place) for place, block in enumerate(found)],
        failed=[row for row in result["rows"] if row["error"] is not None],
        duration=_duration(result["seconds"]),
        started=f"{result['started'][:16].replace('T', ' ')}{' UTC' if result['started'].endswith('+00:00') else ''}",
        rows=len(result["rows"]),
        shown=SHOWN,
    )


def _check(result: dict[str, Any]) -> None:
    require(result, _NEEDED, "result.json", "evaluate")
    kinds = {
        "environment": dict,
        "versions": dict,
        "rows": list,
        "seeds": list,
        "warnings": list,
        "started": str,
        "about": str,
        "seconds": (int, float),
    }
    for name, kind in kinds.items():
        if not isinstance(result[name], kind):  # type: ignore[arg-type]
            raise ValueError(f"result.json: {name}: expected what `robust-if evaluate` writes, got {result[name]!r:.80}")
    require(result["environment"], ("workers",), "result.json: environment", "evaluate")
    for place, row in enumerate(result["rows"]):
        where = f"result.json: rows[{place}]"
        require(row, _ROW, where, "evaluate")
        if not isinstance(row["metrics"], dict) or not all(_is_finite(value) for value in row["metrics"].values() if value is not None):
            raise ValueError(f"{where}: metrics: expected numbers or null by name, got {row['metrics']!r:.80}")
        if not isinstance(row["options"], dict) or not isinstance(row["options"].get("defence"), dict):
            raise ValueError(f"{where}: options: expected those of the defence by name, got {row['options']!r:.80}")
        if not all(isinstance(row[name], str) for name in ("data", "attack", "defence", "family")) or not isinstance(row["seed"], int):
            raise ValueError(f"{where}: expected labels that are strings, and a seed that is a whole number")
        if not all(row[name] is None or _is_finite(row[name]) for name in ("seconds", "peak_bytes")):
            raise ValueError(f"{where}: seconds, peak_bytes: expected numbers or null, got {row['seconds']!r} and {row['peak_bytes']!r}")


def _is_finite(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _shares(found: Sequence[Block]) -> set[str]:
    """Metrics that are written in percent: those of this package that are shares, and others that are named so."""
    means: dict[str, list[float]] = {}
    for block in found:
        for cells in block.cells.values():
            for metric, cell in cells.items():
                means.setdefault(metric, []).append(cell.mean)
    named = {metric for metric in means if better(metric) or stem(metric).endswith(("share", "rate", "accuracy"))}
    return {metric for metric in named if all(abs(mean) <= 1 for mean in means[metric])}


def _shown(block: Block, shares: Collection[str], place: int) -> dict[str, Any]:
    lines = []
    for defence, cells in block.cells.items():
        seconds, peak = block.costs[defence]
        shown = [_cell(metric, cells.get(metric), metric in shares) for metric in block.metrics]
        cost = ["–" if seconds is None else _duration(seconds), "–" if peak is None else f"{peak / 2**20:,.0f} MB"]
        lines.append({"name": defence, "cells": shown, "seconds": cost[0], "memory": cost[1], "baseline": defence == BASELINE})
    heading = f"{block.data}, {block.attack}" if block.attack != BASELINE else f"{block.data}, no attack"
    return {
        "id": f"block-{place}", "heading": heading, "names": [_named(metric, metric in shares) for metric in block.metrics], "lines": lines,
        "curves": _charts(block, shares), "compared": BASELINE in block.cells and len(block.cells) > 1,
    }  # fmt: skip


def _named(metric: str, percent: bool) -> str:
    return metric.replace("_", " ") + (f",{words.SPACE}%" if percent else "")


def _cell(metric: str, cell: Cell | None, percent: bool) -> dict[str, Any]:
    title = _named(metric, percent)
    if cell is None:
        return {"title": title, "text": "–", "half": "", "verdict": ""}
    half = "" if math.isnan(cell.low) else f"±{words.SPACE}{_value(cell.mean - cell.low, percent)}"
    return {"title": title, "text": _value(cell.mean, percent), "half": half, "verdict": cell.verdict}


def _value(value: float, percent: bool) -> str:
    return f"{100 * value:.1f}".replace("-", words.MINUS) if percent else words.number(value)


def _charts(block: Block, shares: Collection[str]) -> list[dict[str, Any]]:
    """The first metrics that an option changes; a defence has the same colour in all of them."""
    labels = {line.label: None for curves in block.curves for line in curves.lines}
    places = {label: place for place, label in enumerate(labels)}
    found = []
    for option in dict.fromkeys(curves.option for curves in block.curves):
        varied = [each for each in block.curves if each.option == option and any(len({c.mean for c in line.cells}) > 1 for line in each.lines)]
        found += [_drawn(each, each.metric in shares, places) for each in varied[:CHARTS]]
    return found


def _drawn(curves: Curves, percent: bool, places: Mapping[str, int]) -> dict[str, Any]:
    """A chart as coordinates, in the units of an SVG of 320 x 190."""
    xs = sorted({at for line in curves.lines for at in line.at})
    bend = math.log if xs[0] > 0 and xs[-1] > WIDE * xs[0] else float
    bottom, top = _range([cell for line in curves.lines for cell in line.cells] + ([curves.baseline] if curves.baseline else []), percent)

    def x(value: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * ((bend(value) - bend(xs[0])) / (bend(xs[-1]) - bend(xs[0])))

    def y(value: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (1 - (min(max(value, bottom), top) - bottom) / (top - bottom))

    lines = []
    for turn, line in enumerate(curves.lines):
        aside = ASIDE * (turn - (len(curves.lines) - 1) / 2)
        points = [(f"{x(at):.1f}", f"{y(cell.mean):.1f}") for at, cell in zip(line.at, line.cells, strict=True)]
        whiskers = [
            (f"{x(at) + aside:.1f}", f"{y(cell.low):.1f}", f"{y(cell.high):.1f}")
            for at, cell in zip(line.at, line.cells, strict=True) if not math.isnan(cell.low)
        ]  # fmt: skip
        place = places[line.label]
        look = {"colour": f"series-{place % COLOURS}", "dash": DASHES[(place + place // COLOURS) % len(DASHES)]}
        said = ", ".join(f"{at:g}: {_value(cell.mean, percent)}" for at, cell in zip(line.at, line.cells, strict=True))
        lines.append({"label": line.label, "points": points, "whiskers": whiskers, "said": said, **look})
    return {
        "metric": _named(curves.metric, percent), "option": curves.option.replace("_", " "), "lines": lines,
        "direction": {1: "more is better", -1: "less is better", 0: ""}[better(curves.metric)], "bent": bend is math.log,
        "ticks": [(f"{y(value):.1f}", f"{100 * value:.4g}" if percent else words.number(value)) for value in _ticks(bottom, top)],
        "marks": _marks([(x(value), f"{value:g}") for value in xs]),
        "baseline": f"{y(curves.baseline.mean):.1f}" if curves.baseline else None,
    }  # fmt: skip


def _range(cells: Sequence[Cell], percent: bool) -> tuple[float, float]:
    """Ends of an axis with some room. Intervals may leave it, where they are so long that nothing else could be seen."""
    means = [cell.mean for cell in cells]
    ends = [each for cell in cells for each in (cell.mean, cell.low, cell.high) if not math.isnan(each)]
    slack = max(max(means) - min(means), 0.1 if percent else 0.0) or math.inf
    bottom, top = max(min(ends), min(means) - slack), min(max(ends), max(means) + slack)
    if percent and min(means) >= 0:
        bottom, top = max(bottom, 0.0), min(top, 1.0)
    room = 0.06 * (top - bottom) or 0.1 * abs(top) or 0.01
    return bottom - room, top + room


def _ticks(bottom: float, top: float) -> list[float]:
    """Three to six round values within the range."""
    width = top - bottom
    power = 10.0 ** math.floor(math.log10(width / 5))
    step = next(each * power for each in (1, 2, 2.5, 5, 10) if each * power >= width / 5 * (1 - 1e-9))
    return [step * k + 0.0 for k in range(math.ceil(bottom / step), math.floor(top / step) + 1)]


def _marks(marks: Sequence[tuple[float, str]]) -> list[tuple[str, str]]:
    """Those that do not touch the one before them."""
    kept: list[tuple[float, str]] = []
    for at, text in marks:
        if not kept or at - kept[-1][0] >= APART:
            kept.append((at, text))
    return [(f"{at:.1f}", text) for at, text in kept]


def _headline(found: Sequence[Block]) -> str:
    judged = [(cells[metric], block) for block in found if BASELINE in block.cells and (metric := _metric(block)) is not None
              for name, cells in block.cells.items() if metric in cells and block.families[name] not in REFERENCES]  # fmt: skip
    if not judged:
        return f"{words.count(len(found), 'setting')} evaluated." if found else "No row is finished."
    helps, hurts = (sum(cell.verdict == verdict for cell, _ in judged) for verdict in ("better", "worse"))
    settings = f"{len(judged)} defended {'setting' if len(judged) == 1 else 'settings'}"
    verb, other = "beat" if helps > 1 else "beats", "are" if hurts > 1 else "is"
    return f"{helps or 'None'} of {settings} {verb} no defence by more than noise, {hurts or 'none'} {other} worse."


def _sentence(block: Block, shares: Collection[str]) -> str:
    """The best defence of a block in words."""
    metric = _metric(block)
    if metric is None or BASELINE not in block.cells:
        return ""
    sign = better(metric)
    others = {name: cells[metric] for name, cells in block.cells.items() if metric in cells and block.families[name] not in REFERENCES}
    none = block.cells[BASELINE].get(metric)
    if not others or metric not in shares:
        return ""
    name, cell = max(others.items(), key=lambda each: sign * each[1].mean)
    where = f"{block.data}, {block.attack}" if block.attack != BASELINE else block.data
    against = "" if none is None else f", {words.percent(none.mean)} without a defence"
    noise = "; noise may explain the difference" if none is not None and not cell.verdict else ""
    return f"{where}: {metric.replace('_', ' ')} {words.percent(cell.mean)} with {name}{against}{noise}."


def _metric(block: Block) -> str | None:
    """The metric that a block is judged by, if it is known what is better."""
    return block.metrics[0] if block.metrics and better(block.metrics[0]) else None


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f}{words.SPACE}s"
    minutes = round(seconds / 60)
    return f"{minutes}{words.SPACE}min" if minutes < 60 else f"{minutes // 60}{words.SPACE}h {minutes % 60}{words.SPACE}min"
