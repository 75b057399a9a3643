"""The page of ``robust-if audit``: the rates of every group with their intervals, and the gaps. It has no scripts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from robust_if.evaluations.report import words
from robust_if.evaluations.report.pages import filled, require, write_page

#: What is drawn: heading, and what the rate is.
PANELS = {
    "selection_rate": ("Predicted positive", "share of the group"),
    "true_positive_rate": ("True positive rate", "of those whose label is positive"),
    "false_positive_rate": ("False positive rate", "of those whose label is negative"),
    "accuracy": ("Accuracy", "share of right predictions"),
}
#: The columns of the whole table.
NAMES = {"base_rate": "Label positive", **{name: heading for name, (heading, _) in PANELS.items()}, "precision": "Precision"}
GAPS = {
    "demographic_parity": ("Demographic parity", "predicted positive"),
    "equal_opportunity": ("Equal opportunity", "true positive rate"),
    "false_positive_rate_parity": ("False positive rate parity", "false positive rate"),
    "equalized_odds": ("Equalized odds", "the worse of the two above"),
    "error_rate_parity": ("Error rate parity", "share of wrong predictions"),
}
#: Adjusted p-values below which a group is called different from the rest.
DIFFERENT = 0.05
#: Ends of the axes.
ENDS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0)


def render_audit(directory: Path) -> Path:
    """The path of ``audit.html``, written into ``directory`` in one step.

    Args:
        directory: holds ``audit.json`` as ``robust-if audit`` writes it.

    Raises:
        FileNotFoundError: if the file is missing.
        ValueError: if it is malformed; nothing is written then.
    """
    return write_page(directory, html, source="audit.json", page="audit.html")


def html(result: dict[str, Any]) -> str:
    """The whole page; every value from the data is escaped by the template.

    Raises:
        ValueError: if a field is missing.
    """
    needed = ("data", "n", "positive", "accuracy", "level", "rates", "gaps", "warnings", "command", "prediction", "model", "settings")
    require(result, needed, "audit.json", "audit")
    parts = [_part(result, *key) for key in dict.fromkeys((row["positive"], row["stratum"], row["features"]) for row in result["gaps"])]
    return filled(
        "audit.html.j2",
        result=result,
        title=f"How {result['data'].replace(chr(92), '/').rpartition('/')[2]} is treated by group",
        headline=_headline(parts),
        findings=_findings(result),
        parts=parts,
        names=NAMES,
        level=words.percent(result["level"], 0),
    )


def _part(result: Mapping[str, Any], positive: str, stratum: str, features: str) -> dict[str, Any]:
    """One set of features: its panels, gaps and table."""
    rows = [row for row in result["rates"] if (row["positive"], row["stratum"]) == (positive, stratum)]
    own = [row for row in rows if row["features"] == features]
    overall = {row["metric"]: row["value"] for row in rows if not row["features"]}
    groups: dict[str, dict[str, Any]] = {}
    for row in own:
        groups.setdefault(row["group"], {"name": spoken(row["group"]), "size": row["size"], "cells": {}})["cells"][row["metric"]] = _cell(row)
    gaps = [row for row in result["gaps"] if (row["positive"], row["stratum"], row["features"]) == (positive, stratum, features)]
    heading = f"By {features.replace(' x ', ' × ')}"
    where = [f"where {spoken(stratum)}"] if stratum else []
    where += [f"{positive} against the rest"] if result["positive"] is None else []
    return {
        "heading": ", ".join([heading, *where]),
        "features": features,
        "stratum": spoken(stratum),
        "positive": positive,
        "panels": [_panel(name, [row for row in own if row["metric"] == name], overall.get(name), result) for name in PANELS],
        "groups": list(groups.values()),
        "gaps": [_gap(row) for row in gaps],
    }


def _panel(name: str, rows: Sequence[Mapping[str, Any]], overall: float | None, result: Mapping[str, Any]) -> dict[str, Any]:
    known = [row for row in rows if row["value"] is not None]
    top = max([row["high"] for row in known] + [overall or 0.0, 0.0])
    end = next(each for each in ENDS if top <= each or each == ENDS[-1])

    def at(value: float) -> str:
        return f"{100 * min(value / end, 1):.2f}%"

    bars = []
    for row in rows:
        bar = {"name": spoken(row["group"]), "n": row["n"], "defined": row["value"] is not None, "few": row["n"] < result["settings"]["smallest"]}
        if row["value"] is not None:
            width = f"{100 * min((row['high'] - row['low']) / end, 1):.2f}%"
            bar |= {**_cell(row), "at": at(row["value"]), "low": at(row["low"]), "high": at(row["high"]), "wide": width}
        bars.append(bar)
    heading, meaning = PANELS[name]
    return {
        "heading": heading, "meaning": meaning, "bars": bars, "end": words.percent(end, 0), "overall": None if overall is None else at(overall),
        "overall_text": "" if overall is None else words.percent(overall),
    }  # fmt: skip


def _cell(row: Mapping[str, Any]) -> dict[str, Any]:
    if row["value"] is None:
        return {"text": "\N{EN DASH}", "interval": "", "n": row["n"], "different": False}
    different = row["p_adjusted"] is not None and row["p_adjusted"] < DIFFERENT
    return {"text": words.percent(row["value"]), "interval": _interval(row["low"], row["high"]), "n": row["n"], "different": different}


def _gap(row: Mapping[str, Any]) -> dict[str, Any]:
    name, meaning = GAPS[row["gap"]]
    known = row["difference"] is not None
    return {
        "name": name, "meaning": meaning, "known": known, "value": row["difference"] if known else -1.0,
        "beyond": known and row["difference"] > row["by_chance"],
        "difference": _points(row["difference"]), "interval": _interval(row["low"], row["high"]), "by_chance": _points(row["by_chance"]),
        "ratio": words.number(None if row["ratio"] is None else round(row["ratio"], 3)), "highest": spoken(row["highest"]),
        "lowest": spoken(row["lowest"]), "left_out": [spoken(each) for each in row["left_out"].split("; ") if each],
    }  # fmt: skip


def spoken(name: str) -> str:
    """A group for the reader: ``sex=Female, race=Black`` as ``Female, Black``, but yes and no with their question."""
    parts = [each.partition("=") for each in _pieces(name)]
    return ", ".join({"yes": feature, "no": f"not {feature}"}.get(value, value or feature) for feature, _, value in parts)


def _pieces(name: str) -> list[str]:
    """The ``feature=value`` of a group; a value may hold a comma itself."""
    pieces: list[str] = []
    for each in name.split(", "):
        if "=" in each or not pieces:
            pieces.append(each)
        else:
            pieces[-1] += f", {each}"
    return pieces


def _interval(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f"{100 * low:.1f} to {100 * high:.1f}"


def _points(value: float | None) -> str:
    return "\N{EN DASH}" if value is None else f"{100 * value:.1f}{words.SPACE}points"


def _headline(parts: Sequence[Mapping[str, Any]]) -> str:
    """The gap in positive predictions by the first feature in one sentence; of several strata and classes, where it is largest."""
    first = [part for part in parts if part["features"] == parts[0]["features"]]
    part = max(first, key=lambda each: (each["gaps"][0]["beyond"], each["gaps"][0]["value"]))
    gap = part["gaps"][0]
    if not gap["known"]:
        return "There are no two groups whose rates could be compared."
    shares = {bar["name"]: bar["text"] for bar in part["panels"][0]["bars"] if bar["defined"]}
    high, low = (f"{shares[gap[end]]} of {gap[end]}" for end in ("highest", "lowest"))
    found = f"{part['positive']} is predicted for {high} and {low}{', where ' + part['stratum'] if part['stratum'] else ''}"
    return f"{found}." if gap["beyond"] else f"{found}, a difference that chance alone may explain."


def _findings(result: Mapping[str, Any]) -> list[str]:
    known = [row for row in result["gaps"] if row["difference"] is not None]
    beyond = sum(row["difference"] > row["by_chance"] for row in known)
    said = [f"The predictions are right for {words.percent(result['accuracy'])} of {words.count(result['n'], 'row')}."]
    said.append(f"{beyond} of {words.count(len(known), 'gap')} {'is' if beyond == 1 else 'are'} larger than what chance gives groups that are alike.")
    gone = len(result["gaps"]) - len(known)
    if gone:
        said.append(f"{words.count(gone, 'gap')} cannot be known, for want of samples.")
    return said
