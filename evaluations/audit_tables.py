"""An audit as tables for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.markup import escape
from rich.table import Table

from robust_if.evaluations.report.audit import DIFFERENT, spoken

#: The rates that tables show, with their headings.
SHOWN = {"selection_rate": "selected", "true_positive_rate": "TPR", "false_positive_rate": "FPR", "accuracy": "accuracy"}


def tables(result: Mapping[str, Any]) -> list[Table]:
    """The audit for a terminal: rates by group for every set of features, and the gaps."""
    parts: dict[tuple[str, str, str], dict[str, dict[str, Any]]] = {}
    for row in result["rates"]:
        if row["features"]:
            parts.setdefault((row["features"], row["positive"], row["stratum"]), {}).setdefault(row["group"], {})[row["metric"]] = row
    return [table for key, groups in parts.items() for table in (_rates(key, groups), _gaps(key, result))]


def _gaps(key: tuple[str, str, str], result: Mapping[str, Any]) -> Table:
    features, _, _ = key
    listing = Table(title=escape(f"Gaps by {features}, in points (chance: what they stay below if groups are alike)"), title_justify="left")
    for name in ("gap", "difference", "chance", "ratio", "highest", "lowest"):
        number = name in ("difference", "chance", "ratio")
        listing.add_column(name, justify="right" if number else "left", overflow="fold", no_wrap=number, min_width=12 if name == "gap" else None)
    for row in result["gaps"]:
        if (row["features"], row["positive"], row["stratum"]) == key:
            numbers = [_percent(row["difference"], row["low"], row["high"]), _percent(row["by_chance"]), _ratio(row["ratio"])]
            listing.add_row(row["gap"].replace("_", " "), *numbers, *(escape(spoken(row[end])) for end in ("highest", "lowest")))
    return listing


def _rates(key: tuple[str, str, str], groups: Mapping[str, Mapping[str, Any]]) -> Table:
    features, positive, stratum = key
    words = f"By {features}{f', {spoken(stratum)}' if stratum else ''}: predicted {positive}, in % (* differs from the rest)"
    listing = Table(title=escape(words), title_justify="left")
    listing.add_column("group", overflow="fold")
    for name in ("n", *SHOWN.values()):
        listing.add_column(name, justify="right", no_wrap=True)
    for group, rows in groups.items():
        cells = []
        for metric in SHOWN:
            row = rows[metric]
            different = row["p_adjusted"] is not None and row["p_adjusted"] < DIFFERENT
            cells.append(_percent(row["value"], row["low"], row["high"], "*" if different else ""))
        listing.add_row(escape(spoken(group)), f"{rows['selection_rate']['size']:,}", *cells)
    return listing


def _percent(value: float | None, low: float | None = None, high: float | None = None, mark: str = "") -> str:
    if value is None:
        return "–"
    ends = "" if low is None or high is None else f"\n{100 * low:.1f}–{100 * high:.1f}"
    return f"{100 * value:.1f}{mark}{ends}"


def _ratio(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
