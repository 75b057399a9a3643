"""What a run found, as tables for a terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rich.markup import escape
from rich.table import Table


def detection(result: dict[str, Any]) -> Table:
    """How well each estimator found the bad samples."""
    judged = result["detection"][0]["auroc"] is not None
    listing = Table(title="Detection" if judged else "Estimators (no truth given to judge them by)", title_justify="left")
    for name in ("estimator", "target", "AUROC", "average precision", "TPR at 1 % FPR", "seconds"):
        listing.add_column(name, justify="left" if name in ("estimator", "target") else "right")
    for row in result["detection"]:
        metrics = ["–" if row[key] is None else f"{row[key]:.3f}" for key in ("auroc", "average_precision", "tpr_at_1_fpr")]
        listing.add_row(row["estimator"], row["target"] or "–", *metrics, f"{row['seconds']:.1f}")
    return listing


def worst(directory: Path) -> Table:
    """The twenty most harmful samples of a detection run."""
    scores, samples = pd.read_parquet(directory / "scores.parquet"), pd.read_parquet(directory / "samples.parquet")
    column = scores.columns[1]
    listing = Table(title=f"The twenty most harmful samples by {column}", title_justify="left")
    for name in ("id", "label", "suggested", "score", "removed"):
        listing.add_column(name, justify="right" if name == "score" else "left")
    merged = samples.assign(score=scores[column]).sort_values("score", ascending=False, kind="stable")
    for row in merged.head(20).itertuples():
        listing.add_row(*(escape(str(each)) for each in (row.id, row.label, row.suggested_label)), f"{row.score:.4g}", "yes" if row.removed else "no")
    return listing


def accuracy(result: dict[str, Any]) -> Table:
    """Test accuracies before and after."""
    names = {
        "before": "all samples", "after": "most harmful removed", "relabelled": "most harmful relabelled", "random": "as many removed at random",
        "oracle": "all wrong labels removed (oracle)",
    }  # fmt: skip
    listing = Table(title="Test accuracy after retraining", title_justify="left")
    listing.add_column("trained on")
    listing.add_column("accuracy", justify="right")
    for key, text in names.items():
        if result["accuracy"].get(key) is not None:
            runs = result["accuracy_runs"][key]
            listing.add_row(text, f"{result['accuracy'][key]:.3f} ± {np.std(runs):.3f}")
    return listing


def scores(directory: Path, rows: int = 10) -> Table:
    """The most harmful samples by the first column of ``scores.parquet``, with that estimator's scores for the other targets."""
    frame = pd.read_parquet(directory / "scores.parquet")
    first = frame.columns[1]
    shown = [column for column in frame.columns[1:] if column.partition(":")[0] == first.partition(":")[0]]
    listing = Table(title=f"The {min(rows, len(frame))} most harmful samples by {first}", title_justify="left")
    for column in ("id", *shown):
        listing.add_column(escape(column), justify="left" if column == "id" else "right", no_wrap=column == "id")
    for _, row in frame.sort_values(first, ascending=False, kind="stable").head(rows).iterrows():
        listing.add_row(escape(str(row["id"])), *(f"{row[column]:.4g}" for column in shown))
    return listing


def notes(result: dict[str, Any]) -> Table:
    """What each score is worth knowing for: its unit, its time, its solver."""
    listing = Table(title="Scores", title_justify="left")
    for column in ("score", "unit", "seconds", "notes"):
        listing.add_column(column, justify="right" if column == "seconds" else "left")
    for each in result["scores"]:
        text = ", ".join(f"{key} {_number(each[key])}" for key in ("damping", "iterations", "residual", "converged", "bf16_agreement") if key in each)
        listing.add_row(each["name"], each["units"], f"{each['seconds']:.1f}", text)
    return listing


def validation(result: dict[str, Any]) -> list[Table]:
    """How well scores predicted retraining: one table, and one more where the worst samples were removed."""
    listing = Table(title=f"Agreement with retraining ({result['subsets']} random halves x {result['seeds']} seeds)", title_justify="left")
    columns = {"lds": "LDS", "leave_one_out": "leave-one-out"}
    shown = {key: name for key, name in columns.items() if key in result["rows"][0]}
    for column in ("estimator", "target", *shown.values()):
        listing.add_column(column, no_wrap=True)
    for row in result["rows"]:
        cells = [_interval(row[key]) for key in shown]
        listing.add_row(row["estimator"], row["target"], *cells)
    if "brittleness" not in result["rows"][0]:
        return [listing]
    removal = Table(title="Target after retraining without the worst", title_justify="left")
    for column in ("estimator", "target", "samples", "all samples", "without the worst", "without random ones"):
        removal.add_column(column, justify="left" if column in ("estimator", "target") else "right", no_wrap=column == "target")
    for row in result["rows"]:
        means = {(each["k"], each["removed_by"] == "random draws"): each for each in row["brittleness"]}
        for k in sorted({k for k, _ in means}):
            worst, random = means[k, False], means[k, True]
            removal.add_row(row["estimator"], row["target"], str(k), *(f"{each:.4g}" for each in (worst["before"], worst["after"], random["after"])))
    return [listing, removal]


def _interval(found: dict[str, float | None]) -> str:
    value, low, high = (found[key] for key in ("value", "low", "high"))
    if value is None:
        return "– (constant)"
    return f"{value:.3f}" if low is None or high is None else f"{value:.3f} [{low:.3f}, {high:.3f}]"


def _number(value: Any) -> str:
    """A number, or the range of several by layer."""
    if isinstance(value, dict):
        return f"{min(value.values()):.2g} to {max(value.values()):.2g} by layer" if value else "–"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
