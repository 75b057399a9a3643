"""The page of ``robust-if evaluate``: every defence against every attack, with intervals, curves and costs. It has no scripts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from robust_if.evaluations.report import words
from robust_if.evaluations.report.pages import filled, require, write_page
from robust_if.evaluations.suites.comparing import better
from robust_if.evaluations.suites.summary import BASELINE, Block, Cell, Curves, blocks

#: Metrics that the table of a block has; the others are in a table that can be opened.
SHOWN = 5
#: Defences that are there to compare with.
REFERENCES = (BASELINE, "random", "oracle")
WIDTH, HEIGHT = 320.0, 190.0
LEFT, RIGHT, TOP, BOTTOM = 40.0, 8.0, 10.0, 26.0
DASHES = ("", "7 3", "2 3", "9 3 2 3", "12 4", "4 4")


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
        ValueError: if a field is missing.
    """
    needed = ("title", "about", "suite", "command", "versions", "environment", "started", "seconds", "seeds", "rows", "warnings")
    require(result, needed, "result.json", "evaluate")
    found = blocks(result["rows"])
    failed = [row for row in result["rows"] if row["error"] is not None]
    return filled(
        "suite.html.j2",
        result=result,
        headline=_headline(found),
        sentences=[said for block in found if (said := _sentence(block))],
        blocks=[_shown(block, place) for place, block in enumerate(found)],
        failed=failed,
        duration=_duration(result["seconds"]),
        rows=len(result["rows"]),
        shown=SHOWN,
    )


def _shown(block: Block, place: int) -> dict[str, Any]:
    lines = []
    shares = {metric for metric in block.metrics if all(abs(own[metric].mean) <= 1 for own in block.cells.values() if metric in own)}
    for defence, cells in block.cells.items():
        seconds, peak = block.costs[defence]
        shown = [_cell(metric, cells.get(metric), metric in shares) for metric in block.metrics]
        cost = ["–" if seconds is None else _duration(seconds), "–" if peak is None else f"{peak / 2**20:,.0f} MB"]
        lines.append({"name": defence, "cells": shown, "seconds": cost[0], "memory": cost[1], "baseline": defence == BASELINE})
    kept = [curves for curves in block.curves if curves.metric in block.metrics[:2] and curves.metric in shares]
    heading = f"{block.data}, {block.attack}" if block.attack != BASELINE else f"{block.data}, no attack"
    return {
        "id": f"block-{place}", "heading": heading, "names": [metric.replace("_", " ") for metric in block.metrics], "lines": lines,
        "curves": [_drawn(each) for each in kept], "compared": BASELINE in block.cells and len(block.cells) > 1,
    }  # fmt: skip


def _cell(metric: str, cell: Cell | None, percent: bool) -> dict[str, Any]:
    title = metric.replace("_", " ")
    if cell is None:
        return {"title": title, "text": "–", "half": "", "verdict": ""}
    half = "" if math.isnan(cell.low) else f"± {_value(cell.mean - cell.low, percent)}"
    return {"title": title, "text": _value(cell.mean, percent), "half": half, "verdict": cell.verdict}


def _value(value: float, percent: bool) -> str:
    return f"{100 * value:.1f}" if percent else words.number(value)


def _drawn(curves: Curves) -> dict[str, Any]:
    """A chart as coordinates, in the units of an SVG of 320 x 190."""
    xs = sorted({at for line in curves.lines for at in line.at})
    cells = [cell for line in curves.lines for cell in line.cells] + ([curves.baseline] if curves.baseline else [])
    ends = [each for cell in cells for each in (cell.mean, cell.low, cell.high) if not math.isnan(each)]
    bottom, top = max(min(ends), min(cell.mean for cell in cells) - 0.1), min(max(ends), max(cell.mean for cell in cells) + 0.1)
    room = 0.06 * (top - bottom) or 0.01
    bottom, top = bottom - room, top + room

    def x(value: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * ((value - xs[0]) / (xs[-1] - xs[0]))

    def y(value: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (1 - (min(max(value, bottom), top) - bottom) / (top - bottom))

    lines = []
    for place, line in enumerate(curves.lines):
        points = " ".join(f"{x(at):.1f},{y(cell.mean):.1f}" for at, cell in zip(line.at, line.cells, strict=True))
        whiskers = [
            (f"{x(at):.1f}", f"{y(cell.low):.1f}", f"{y(cell.high):.1f}")
            for at, cell in zip(line.at, line.cells, strict=True) if not math.isnan(cell.low)
        ]  # fmt: skip
        dots = [(f"{x(at):.1f}", f"{y(cell.mean):.1f}") for at, cell in zip(line.at, line.cells, strict=True)]
        said = ", ".join(f"{at:g}: {100 * cell.mean:.1f}" for at, cell in zip(line.at, line.cells, strict=True))
        series = {"colour": f"series-{place % 6}", "dash": DASHES[place % len(DASHES)], "said": said}
        lines.append({"label": line.label, "points": points, "whiskers": whiskers, "dots": dots, **series})
    ticks = [(f"{y(value):.1f}", f"{100 * value:.0f}") for value in _ticks(bottom, top)]
    shown = xs if len(xs) <= 6 else xs[:: max(1, len(xs) // 5)]
    direction = {1: "more is better", -1: "less is better", 0: ""}[better(curves.metric)]
    return {
        "metric": curves.metric.replace("_", " "), "option": curves.option.replace("_", " "), "direction": direction, "lines": lines, "ticks": ticks,
        "marks": [(f"{x(value):.1f}", f"{value:g}") for value in shown],
        "baseline": f"{y(curves.baseline.mean):.1f}" if curves.baseline else None,
    }  # fmt: skip


def _ticks(bottom: float, top: float) -> list[float]:
    """Two to six round values within the range."""
    step = next(each for each in (0.01, 0.02, 0.05, 0.1, 0.2, 0.25, 0.5, 1, 5, 20, 100, 1e3, 1e6, math.inf) if (top - bottom) / each <= 5)
    return [step * k for k in range(math.ceil(bottom / step), math.floor(top / step) + 1)] if math.isfinite(step) else []


def _headline(found: Sequence[Block]) -> str:
    judged = [(block, name, cells, metric) for block in found if BASELINE in block.cells and (metric := _metric(block)) is not None
              for name, cells in block.cells.items() if metric in cells and not name.startswith(REFERENCES)]  # fmt: skip
    if not judged:
        return f"{words.count(len(found), 'setting')} evaluated." if found else "No row is finished."
    helps = sum(cells[metric].verdict == "better" for _, _, cells, metric in judged)
    hurts = sum(cells[metric].verdict == "worse" for _, _, cells, metric in judged)
    return f"{helps} of {words.count(len(judged), 'defence')} beat no defence by more than noise, {hurts} {'is' if hurts == 1 else 'are'} worse."


def _sentence(block: Block) -> str:
    """The best defence of a block in words."""
    metric = _metric(block)
    if metric is None or BASELINE not in block.cells:
        return ""
    sign = better(metric) or 1
    others = {name: cells[metric] for name, cells in block.cells.items() if metric in cells and not name.startswith(REFERENCES)}
    if not others:
        return ""
    name, cell = max(others.items(), key=lambda each: sign * each[1].mean)
    where = f"{block.data}, {block.attack}" if block.attack != BASELINE else block.data
    none = block.cells[BASELINE].get(metric)
    if any(abs(each.mean) > 1 for each in others.values()):
        return ""  # no share
    against = "" if none is None else f", {words.percent(none.mean)} without a defence"
    noise = "" if cell.verdict == "better" or none is None else "; noise may explain the difference"
    return f"{where}: {metric.replace('_', ' ')} {words.percent(cell.mean)} with {name}{against}{noise}."


def _metric(block: Block) -> str | None:
    return block.metrics[0] if block.metrics else None


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
