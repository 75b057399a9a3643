"""The report's figures in Plotly. Colours are those of the light theme; the page swaps each for its dark partner, see :data:`COLOURS`."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from robust_if.evaluations.report import words
from robust_if.evaluations.report.contents import Contents

# Light and dark partner of every colour. The series are Okabe and Ito's colour-blind-safe hues, darkened until they reach 4.5:1 on white.
COLOURS = {
    "ink": ("#1d1f23", "#e9e7e2"),
    "soft": ("#5c6066", "#a8a9ab"),
    "line": ("#dfdcd5", "#35383d"),
    "paper": ("#fffefb", "#16181b"),
    "card": ("#f7f5f0", "#1e2125"),
    "series-0": ("#0068a8", "#5db7ee"),
    "series-1": ("#b84700", "#ff8f57"),
    "series-2": ("#00765a", "#3cc9a3"),
    "series-3": ("#9c4a82", "#e79fca"),
    "series-4": ("#8a6200", "#e8b73f"),
    "series-5": ("#4d6472", "#a9bdca"),
}
DASHES = ("solid", "8px,3px", "2px,3px", "10px,3px,2px,3px", "14px,4px", "5px,5px")
BINS = 60
POINTS = 250

_LIGHT = {name: light for name, (light, _) in COLOURS.items()}
_AXIS = {
    "gridcolor": _LIGHT["line"], "linecolor": _LIGHT["line"], "zeroline": False, "fixedrange": True, "automargin": True,
    "title": {"standoff": 10, "font": {"size": 13}}, "tickfont": {"size": 12},
}  # fmt: skip

Figure = dict[str, Any]


@dataclass(frozen=True)
class Chart:
    """A figure as plain JSON values, what it shows in words for readers who do not see it, and a note below it."""

    figure: Figure
    alt: str
    note: str = ""


def accuracy(contents: Contents) -> Chart:
    """Accuracy before and after removal and of the controls: a bar mark for the mean, a dot for every run."""
    return _shares(words.accuracies(contents), contents.result["accuracy"], contents.result["accuracy_runs"], "Test accuracy")


def success(contents: Contents) -> Chart | None:
    """The same for the attack's success; ``None`` where no attack was suspected."""
    attack = contents.attack
    return None if attack is None else _shares(words.successes(contents), attack["success"], attack["success_runs"], "Attack success")


def _shares(rows: list[dict[str, str]], means: Mapping[str, Any], runs: Mapping[str, Any], title: str) -> Chart:
    figure, values = go.Figure(), []
    for row in rows:
        colour = _LIGHT["series-0" if row["key"] in ("after", "relabelled") else "soft"]
        mean, single = 100 * means[row["key"]], [100 * run for run in runs.get(row["key"], [])]
        values += [mean, *single]
        figure.add_scatter(
            x=single, y=[row["name"]] * len(single), mode="markers", marker={"size": 8, "color": colour, "opacity": 0.45},
            hovertemplate="%{x:.2f} %<extra>one run</extra>",
        )  # fmt: skip
        figure.add_scatter(
            x=[mean], y=[row["name"]], mode="markers", marker={"size": 20, "symbol": "line-ns", "line": {"width": 3, "color": colour}},
            hovertemplate="%{x:.2f} %<extra>mean</extra>",
        )  # fmt: skip
        figure.add_annotation(
            text=f"<b>{row['share']}</b>", x=mean, y=row["name"], yshift=13, yanchor="bottom", showarrow=False, borderpad=1,
            font={"color": colour, "size": 13}, bgcolor=_LIGHT["paper"],
        )  # fmt: skip
    figure.add_vline(x=100 * means["before"], line={"color": _LIGHT["soft"], "width": 1, "dash": "dot"}, layer="below")
    margin = 0.08 * (max(values) - min(values)) or 1.0
    figure.update_xaxes(title_text=title, ticksuffix=" %", range=[min(values) - margin, max(values) + margin], nticks=6)
    figure.update_yaxes(categoryorder="array", categoryarray=[row["name"] for row in rows][::-1], range=[-0.5, len(rows) - 0.35], showgrid=False)
    alt = f"{title}: " + "; ".join(f"{row['name'].lower()} {row['share']}" for row in rows) + "."
    return Chart(_finish(figure, height=60 + 54 * len(rows)), alt)


def scores(contents: Contents, name: str) -> Chart:
    """How the scores of one estimator are spread, one panel per group, on an axis that is bent where the tails are long."""
    values, truth = contents.scores[name].to_numpy(), contents.truth
    good, wrong = ("Correct label", "Mislabelled") if contents.attack is None else ("Clean", "Poisoned")
    groups = {wrong: truth, good: ~truth} if truth is not None else {"Removed": contents.removed, "Kept": ~contents.removed}
    groups = {title: members for title, members in groups.items() if members.any()}
    scale = _scale(values)
    bent = values if scale is None else np.arcsinh(values / scale)
    cut, label = _cut(contents, name)
    at = cut if cut is None or scale is None else float(np.arcsinh(cut / scale))
    edges = _edges(bent, at)
    original = edges if scale is None else np.sinh(edges) * scale
    figure = go.Figure()
    gap = 0.12
    height = (1 - gap * (len(groups) - 1)) / len(groups)
    for i, (title, members) in enumerate(groups.items()):
        counts = np.histogram(bent[members], edges)[0]
        bottom = max(0.0, 1 - (i + 1) * height - i * gap)
        axis = "" if i == 0 else str(i + 1)
        colour = _LIGHT["series-1" if title in (wrong, "Removed") else "series-0"]
        figure.add_bar(
            x=(edges[:-1] + edges[1:]) / 2, y=counts, width=np.diff(edges), marker={"color": colour, "line": {"width": 0}}, yaxis=f"y{axis}",
            customdata=[f"{words.number(float(a))} to {words.number(float(b))}" for a, b in pairwise(original)],
            hovertemplate="%{y} samples<br>score %{customdata}<extra>" + title + "</extra>",
        )  # fmt: skip
        figure.add_annotation(
            text=f"<b>{title}</b> {members.sum():,}", x=0, y=bottom + height, xref="paper", yref="paper", xanchor="left", yanchor="bottom",
            showarrow=False, font={"color": colour, "size": 13},
        )  # fmt: skip
        figure.update_layout({f"yaxis{axis}": {**_AXIS, "domain": [bottom, bottom + height], "rangemode": "tozero", "nticks": 4}})
    figure.update_xaxes(title_text="Score (more harmful to the right)", showgrid=False, anchor=f"y{len(groups) if len(groups) > 1 else ''}")
    if scale is not None:
        ticks = _ticks(values, scale)
        figure.update_xaxes(tickvals=np.arcsinh(ticks / scale), ticktext=[_tick(tick) for tick in ticks], ticks="outside", tickcolor=_LIGHT["line"])
    if at is not None:
        figure.add_shape(
            type="line", x0=at, x1=at, y0=0, y1=1, xref="x", yref="paper", line={"color": _LIGHT["ink"], "width": 1.5, "dash": "dash"},
        )  # fmt: skip
        figure.add_annotation(
            text=label, x=at, y=1, yshift=18, xref="x", yref="paper", yanchor="bottom", showarrow=False, font={"size": 12, "color": _LIGHT["ink"]},
            xanchor="right" if at > edges[0] + 0.6 * np.ptp(edges) else "left",
        )  # fmt: skip
    medians = "; ".join(f"median of {title.lower()} {words.number(float(np.median(values[members])))}" for title, members in groups.items())
    low, high = (words.number(float(value)) for value in (values.min(), values.max()))
    alt = f"Histogram of {words.spoken(name)}: {len(values):,} scores from {low} to {high}; {medians}."
    figure.update_layout(bargap=0)
    return Chart(_finish(figure, height=175 + 130 * len(groups), top=46), alt, _note(contents, name, scale, len(groups), cut))


def _note(contents: Contents, name: str, scale: float | None, panels: int, cut: float | None) -> str:
    notes = []
    if scale is not None:
        notes.append(f"The tails are long, so the axis is bent (asinh): even steps below about {scale:.1g} either side of zero, even ratios beyond.")
    if panels > 1:
        notes.append("Each panel has its own vertical scale.")
    if cut is not None:
        notes.append("Samples right of the dashed line were removed.")
    elif name != contents.result["decided_by"]:
        notes.append(f"Removal was decided by {words.spoken(contents.result['decided_by'])}, so no line is drawn here.")
    return " ".join(notes)


def _cut(contents: Contents, name: str) -> tuple[float | None, str]:
    # A line is drawn only where it is true that everything right of it, and nothing left of it, was removed.
    if name != contents.result["decided_by"]:
        return None, ""
    values, removed, threshold = contents.scores[name].to_numpy(), contents.removed, contents.result["threshold"]
    if threshold is not None and np.array_equal(values > threshold, removed):
        return float(threshold), f"threshold {words.number(float(threshold))}"
    if removed.any() and not removed.all() and values[removed].min() > values[~removed].max():
        return float((values[removed].min() + values[~removed].max()) / 2), "cut"
    return None, ""


def _edges(values: NDArray[np.float64], cut: float | None) -> NDArray[np.float64]:
    """Edges of the bins; one of them lies just above the cut, so that no bar mixes removed and kept samples."""
    width = float(np.ptp(values)) / BINS or 1 / BINS
    if cut is None:
        even: NDArray[np.float64] = values.min() + width * np.arange(BINS + 1) * (1 + 1e-9)
        return even
    middle = np.nextafter(cut, np.inf)
    below = max(int(np.ceil((cut - values.min()) / width + 1e-6)), 0)
    above = max(int(np.ceil((values.max() - cut) / width + 1e-6)), 0)
    edges: NDArray[np.float64] = np.concatenate([middle - width * np.arange(below, 0, -1), [middle], middle + width * np.arange(1, above + 1)])
    return edges


def _scale(values: NDArray[np.float64]) -> float | None:
    """Where the axis turns from linear to logarithmic; ``None`` where the tails are short enough for a linear axis."""
    low, high = np.quantile(values, [0.25, 0.75])
    middle = float(high - low)
    if middle == 0:
        middle = float(np.abs(values).mean())
    return middle if middle and float(np.ptp(values)) > 10 * middle else None


def _ticks(values: NDArray[np.float64], scale: float) -> NDArray[np.float64]:
    powers = 10.0 ** np.arange(np.floor(np.log10(scale)), np.ceil(np.log10(np.abs(values).max())) + 1)
    candidates = np.concatenate([[0.0], powers[::-1], -powers[::-1], 3 * powers[::-1], -3 * powers[::-1]])
    low, high = np.arcsinh(values.min() / scale), np.arcsinh(values.max() / scale)
    chosen: list[float] = []
    for tick in candidates:
        at = np.arcsinh(tick / scale)
        if low <= at <= high and all(abs(at - np.arcsinh(other / scale)) > 0.13 * (high - low) for other in chosen):
            chosen.append(float(tick))
    return np.array(sorted(chosen))


def _tick(value: float) -> str:
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:,.6g}".replace("-", words.MINUS)
    mantissa, exponent = f"{value:.0e}".split("e")
    power = f"10<sup>{int(exponent)}</sup>".replace("-", words.MINUS)
    return {"1": power, "-1": words.MINUS + power}.get(mantissa, f"{mantissa}·{power}".replace("-", words.MINUS))


def checking(contents: Contents) -> tuple[Chart, Chart] | None:
    """Precision and recall against the number of samples checked, most harmful first, a line per estimator; ``None`` without a known truth."""
    truth = contents.truth
    if truth is None or not truth.any():
        return None
    n, wrong, removed = len(truth), int(truth.sum()), int(contents.result["removed"])
    k = np.unique(np.concatenate([np.linspace(1, n, POINTS), np.geomspace(1, n, 40), [wrong, max(removed, 1)]]).round().astype(int))
    precision, recall = go.Figure(), go.Figure()
    for figure, best, chance in ((precision, np.minimum(wrong / k, 1), np.full(len(k), wrong / n)), (recall, np.minimum(k / wrong, 1), k / n)):
        _line(figure, k, best, "best possible", "soft", "dot", 1.0)
        _line(figure, k, chance, "by chance", "soft", "dot", 1.0)
    at: dict[str, list[str]] = {"precision": [], "recall": []}
    for i, name in enumerate(contents.deciding):
        hits = expected_hits(contents.scores[name].to_numpy(), truth)
        colour, dash = f"series-{i % 6}", DASHES[(i + i // 6) % 6]
        for figure, kind, share in ((precision, "precision", hits[k] / k), (recall, "recall", hits[k] / wrong)):
            _line(figure, k, share, words.spoken(str(name)), colour, dash, 2.0)
            if removed:
                here = share[np.searchsorted(k, removed)]
                at[kind].append(f"{words.spoken(str(name))} {words.percent(float(here), 0)}")
                filled = name == contents.result["decided_by"]
                marker = {"size": 9 if filled else 7, "color": _LIGHT[colour if filled else "paper"], "line": {"width": 2, "color": _LIGHT[colour]}}
                figure.add_scatter(x=[removed], y=[here], mode="markers", marker=marker, hoverinfo="skip", cliponaxis=False)
    charts = []
    for figure, kind in ((precision, "precision"), (recall, "recall")):
        if removed:
            figure.add_vline(x=removed, line={"color": _LIGHT["ink"], "width": 1, "dash": "dash"}, layer="below")
            side = "right" if removed > 0.6 * n else "left"
            figure.add_annotation(
                text=f"{removed:,} removed", x=removed, y=1, yref="paper", yanchor="bottom", xanchor=side, showarrow=False, font={"size": 12},
            )  # fmt: skip
        figure.update_xaxes(title_text="Samples checked", range=[0, n], nticks=5, tickformat=",d", showgrid=False)
        figure.update_yaxes(range=[0, 1.03], tickformat=".0%", tickvals=[0, 0.25, 0.5, 0.75, 1])
        numbers = f", at {words.count(removed, 'removed sample')}: {'; '.join(at[kind])}" if removed else ""
        charts.append(Chart(_finish(figure, height=330, top=30), f"{kind.capitalize()} against the number of samples checked{numbers}."))
    return charts[0], charts[1]


def expected_hits(values: NDArray[np.float64], truth: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Bad samples among the first k = 0, ..., n by score, ``(n + 1,)``, on average over the orders that ties allow."""
    order = np.argsort(-values, kind="stable")
    hits = np.concatenate([[0], np.cumsum(truth[order])])
    # Inside a group of ties the average over all orders is the straight line between the group's ends.
    ends = np.concatenate([[0], np.flatnonzero(np.diff(values[order])) + 1, [len(values)]])
    between: NDArray[np.float64] = np.interp(np.arange(len(values) + 1), ends, hits[ends])
    return between


def _line(figure: Any, x: Any, y: Any, name: str, colour: str, dash: str, width: float) -> None:
    figure.add_scatter(
        x=x, y=y, mode="lines", line={"color": _LIGHT[colour], "dash": dash, "width": width},
        hovertemplate="%{x:,d} checked: %{y:.1%}<extra>" + html.escape(name) + "</extra>",
    )  # fmt: skip


def _finish(figure: Any, *, height: int, top: int = 12) -> Figure:
    figure.update_xaxes(**_AXIS)
    figure.update_yaxes(**_AXIS)
    figure.update_layout(
        template="none", height=height, margin={"l": 8, "r": 14, "t": top, "b": 8}, showlegend=False, dragmode=False, hovermode="closest",
        paper_bgcolor="rgba(0,0,0,0)", plot_bgcolor="rgba(0,0,0,0)", font={"size": 13, "color": _LIGHT["soft"]},
        hoverlabel={"bgcolor": _LIGHT["card"], "bordercolor": _LIGHT["line"], "font": {"color": _LIGHT["ink"]}},
    )  # fmt: skip
    plain: Figure = json.loads(figure.to_json())
    return plain
