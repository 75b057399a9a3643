"""What a run found, as tables for a terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rich.markup import escape
from rich.table import Table

#: Characters of a text or a row that a table shows.
SNIPPET = 80


def detection(result: dict[str, Any]) -> list[Table]:
    """How well each estimator found the bad samples; a table for every verdict."""
    rows, attack = result["detection"], result.get("attack")
    if attack is None:
        return [_detection(rows, "Detection")]
    return [_detection(rows[:1], "Verdict: poisoned"), _detection(rows[1:], "Verdict: harms utility (judged by the same truth)")]


def _detection(rows: list[dict[str, Any]], title: str) -> Table:
    judged = rows[0]["auroc"] is not None
    none = "Estimators" if title == "Detection" else title.partition(" (")[0]
    listing = Table(title=title if judged else f"{none} (no truth given to judge them by)", title_justify="left")
    for name in ("estimator", "target", "AUROC", "average precision", "TPR at 1 % FPR", "seconds"):
        named = name in ("estimator", "target")
        listing.add_column(name, justify="left" if named else "right", no_wrap=named)
    for row in rows:
        metrics = ["–" if row[key] is None else f"{row[key]:.3f}" for key in ("auroc", "average_precision", "tpr_at_1_fpr")]
        listing.add_row(row["estimator"], row["target"] or "–", *metrics, f"{row['seconds']:.1f}")
    return listing


def worst(directory: Path) -> Table:
    """The twenty samples of a detection run with the highest scores of the verdict that removes."""
    scores, samples = pd.read_parquet(directory / "scores.parquet"), pd.read_parquet(directory / "samples.parquet")
    column = scores.columns[1]
    word = "suspicious" if "poisoned" in samples else "harmful"
    listing = Table(title=f"The twenty most {word} samples{f' by {column}' if word == 'harmful' else ''}", title_justify="left")
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
    attack = result.get("attack")
    if attack is not None:
        names |= {"after": "poisoned removed", "relabelled": "poisoned relabelled", "oracle": "without any poison (oracle)"}
    listing = Table(title="Test accuracy after retraining" if attack is None else "After retraining", title_justify="left")
    listing.add_column("trained on")
    listing.add_column("accuracy", justify="right")
    if attack is not None:
        listing.add_column("attack success", justify="right")
    for key, text in names.items():
        if result["accuracy"].get(key) is not None:
            cells = [(result["accuracy"][key], result["accuracy_runs"][key])]
            cells += [] if attack is None else [(attack["success"][key], attack["success_runs"][key])]
            listing.add_row(text, *(f"{mean:.3f} ± {np.std(runs):.3f}" for mean, runs in cells))
    return listing


def filtered(result: dict[str, Any]) -> list[Table]:
    """Whom the removal hit, by class and by group; nothing of a run that did not ask."""
    rows = result.get("filter", [])
    if not rows:
        return []
    known = rows[0]["poisoned"] is not None
    listing = Table(title="Who was removed", title_justify="left")
    columns = {"n": "samples", "removed": "removed"}
    columns |= {"precision": "precision", "recall": "recall", "false_positive_rate": "false positives"} if known else {}
    listing.add_column("by")
    for name in columns.values():
        listing.add_column(name, justify="right")
    for row in rows:
        listing.add_row(escape(f"{row['by']} {row['value']}".strip()), *(_cell(row[key]) for key in columns))
    return [listing]


def verdicts(result: dict[str, Any]) -> list[str]:
    """What a run with attack inputs says in words."""
    attack = result.get("attack")
    if attack is None:
        return []
    inputs = f"{attack['measured']} triggered input{'' if attack['measured'] == 1 else 's'}"
    seen = f"the very {'one' if attack['measured'] == 1 else 'ones'} that the scores saw"
    where = f"{inputs}, {seen}" if attack["shared"] else f"{inputs} that no score saw"
    counts = f"poisoned: {attack['poisoned']} samples; harms utility: {attack['harms_utility']} (by {attack['harms_by']}), {attack['both']} in both"
    said = [f"attack success was measured on {where}", f"{counts}; only the first verdict removes"]
    if attack["success"]["oracle"] is not None:
        said.append(f"without any poison {100 * attack['success']['oracle']:.1f} % of these inputs are taken for the goal class")
    return said


def carried(result: dict[str, Any]) -> list[str]:
    """How often clean samples that carry a trigger, or parts of it, have the goal label already; nothing where that is not known."""
    shares = result.get("goal_shares", {})
    if len(shares) < 2:
        return []
    said = [
        f"{name}: no sample" if found["goal_share"] is None else f"{name}: {100 * found['goal_share']:.0f} % of {found['samples']:,}"
        for name, found in shares.items()
    ]
    return [f"clean samples with the label {result['goal_class']}: {'; '.join(said)}"]


def prediction(result: dict[str, Any]) -> str:
    """What the model says of the explained sample."""
    label = "no label" if result["true"] in ("", None) else f"label {result['true']}"
    return f"sample {result['id']} ({result['among']}, {label}): the model says {result['predicted']} with probability {result['probability']:.3f}"


def explanation(result: dict[str, Any], rows: int = 10) -> list[Table]:
    """The strongest training samples for and against a prediction."""
    titles = {"for": "Training samples that made the model say it", "against": "Training samples that speak against it"}
    return [_strongest(title, result[side][:rows]) for side, title in titles.items()]


def _strongest(title: str, entries: list[dict[str, Any]]) -> Table:
    listing = Table(title=title, title_justify="left", min_width=len(title) + 2)
    for name in ("id", "label", "score", *([] if all(entry["image"] for entry in entries) else ["content"])):
        listing.add_column(name, justify="right" if name == "score" else "left", no_wrap=name != "content")
    for entry in entries:
        content = entry["text"] or ", ".join(f"{name} {value}" for name, value in (entry["row"] or {}).items())
        cells = [str(entry["id"]), str(entry["label"]), f"{entry['score']:.4g}", " ".join(content.split())[:SNIPPET]]
        listing.add_row(*(escape(cell) for cell in cells[: len(listing.columns)]))
    return listing


def _cell(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}" if isinstance(value, float) else f"{value:,}"


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
