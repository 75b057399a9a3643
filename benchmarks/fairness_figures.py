"""The figures of ``benchmarks/fairness.py``, as SVG."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from fairness_rivals import NOTIONS

#: Those that the figures show.
COLOURS = {
    "unconstrained": "#888888", "ExponentiatedGradient": "#c9541b", "GridSearch": "#b59a00", "ThresholdOptimizer": "#9b4fb0",
    "Kamiran-Calders": "#5f8f9e", "FairBatch-like": "#c2578a", "CorrelationRemover": "#7a6a55", "remove, inverse Hessian": "#2a8f4f",
    "reweigh, inverse Hessian": "#1b6ac9", "relabel, inverse Hessian": "#20a4a4",
}  # fmt: skip


def curves(found: pd.DataFrame) -> str:
    """Test accuracy against test gap, a row of panels per data set and test, a column per notion.

    Of a curve only those points are drawn that pay on validation data: where a larger gap comes with higher accuracy.
    """
    panels = {}
    for (name, test), part in found.groupby(["data", "test"], sort=False):
        for notion in NOTIONS:
            rows = part[part["notion"] == notion]
            lines = {}
            for method in COLOURS:
                columns = ["valid_gap", "valid_accuracy", "gap", "accuracy"]
                own = rows[rows["method"] == method]
                often = own["seed"].nunique() / 2  # a point of a grid is not there in all splits
                points = own.groupby("point")[columns]
                mean = points.mean()[points.size() >= often].sort_values("valid_gap")
                pays = mean["valid_accuracy"] > mean["valid_accuracy"].cummax().shift(fill_value=-np.inf)
                lines[method] = mean.loc[pays, ["gap", "accuracy"]].sort_values("gap").to_numpy().tolist()
            panels[f"{name}{'' if test == 'test' else f' ({test})'}: {notion.replace('_', ' ')}"] = lines
    return drawing("Accuracy against the gap on test data", panels, COLOURS, "gap on test data", columns=len(NOTIONS), start=0.0)


def sizes_figure(found: pd.DataFrame) -> str:
    """Gaps before and after a repair on validation and test data, by the logarithm of the number of validation samples."""
    colours = {"valid before": "#c9b79b", "test before": "#888888", "valid after": "#c9541b", "test after": "#1b6ac9"}
    panels = {}
    for (method, notion), part in found.groupby(["method", "notion"], sort=False):
        means = part.groupby("size")[list(colours)].mean()
        panels[f"{method}: {notion.replace('_', ' ')}"] = {name: list(zip(np.log10(means.index), means[name], strict=True)) for name in colours}
    ticks = {float(np.log10(size)): f"{size:,}" for size in sorted(found["size"].unique()) if size != 2_000}
    return drawing("What a repair gains on validation and on test data", panels, colours, "validation samples", columns=3, ticks=ticks, low=0.0)


def drawing(
    title: str, panels: dict[str, dict[str, list[Any]]], colours: dict[str, str], below: str, *, columns: int, start: float | None = None,
    low: float | None = None, ticks: dict[float, str] | None = None,
) -> str:  # fmt: skip
    """Panels of lines with a shared legend; axes run from ``start`` and ``low`` where given, else from the smallest value."""
    rows, width, height = -(-len(panels) // columns), 240, 160
    legend = [name for name in colours if any(lines.get(name) for lines in panels.values())]
    bottom = 250 * rows + 20 * -(-len(legend) // 4) + 10
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {330 * columns} {bottom}" font-family="sans-serif" font-size="12" role="img">']
    out.append(f"<title>{title}</title>")
    for at, (name, lines) in enumerate(panels.items()):
        left, top = 70 + 330 * (at % columns), 40 + 250 * (at // columns)
        x, y = np.array([point for points in lines.values() for point in points] or [(0.0, 0.0)]).T
        x0, x1, y0, y1 = x.min() if start is None else start, x.max(), y.min() if low is None else low, y.max()
        across, up = width / max(x1 - x0, 1e-9), height / max(y1 - y0, 1e-9)
        out.append(f'<text x="{left}" y="{top - 16}" fill="#777777">{name}</text>')
        out.append(f'<path d="M{left} {top}V{top + height}H{left + width}" fill="none" stroke="#888888"/>')
        for value, words in (ticks or {each: f"{each:.2g}" for each in (x0, (x0 + x1) / 2, x1)}).items():
            place = left + across * (value - x0)
            out.append(f'<text x="{place:.0f}" y="{top + height + 16}" text-anchor="middle" fill="#777777">{words}</text>')
        for value in (y0, (y0 + y1) / 2, y1):
            out.append(f'<text x="{left - 6}" y="{top + height - up * (value - y0) + 4:.0f}" text-anchor="end" fill="#777777">{value:.3f}</text>')
        out.append(f'<text x="{left + width / 2:.0f}" y="{top + height + 34}" text-anchor="middle" fill="#777777">{below}</text>')
        for line, points in lines.items():
            places = [(left + across * (a - x0), top + height - up * (b - y0)) for a, b in points]
            path = " ".join(f"{a:.1f},{b:.1f}" for a, b in places)
            out.append(f'<polyline points="{path}" fill="none" stroke="{colours[line]}" stroke-width="2"/>')
            out += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3" fill="{colours[line]}"/>' for a, b in places]
    for at, name in enumerate(legend):
        left, top = 70 + 220 * (at % 4), 250 * rows + 16 + 20 * (at // 4)
        out.append(f'<path d="M{left} {top - 4}h20" stroke="{colours[name]}" stroke-width="3"/>')
        out.append(f'<text x="{left + 26}" y="{top}" fill="#777777">{name}</text>')
    return "\n".join([*out, "</svg>\n"])
