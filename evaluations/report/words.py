"""The report's sentences and numbers, as plain text; the template escapes them."""

from __future__ import annotations

import json
import math
from typing import Any

from robust_if.evaluations.report.contents import Contents

SPACE = "\N{NO-BREAK SPACE}"
MINUS = "\N{MINUS SIGN}"

NAMES = {
    "before": ("Before", "trained on all samples"),
    "after": ("After removal", "retrained without the removed samples"),
    "random": ("Random removal", "retrained without as many samples drawn at random"),
    "oracle": ("Oracle", "retrained without exactly the truly mislabelled samples"),
    "relabelled": ("Relabelled", "retrained with the suggested label in place of removal"),
}


def percent(share: float, digits: int = 1) -> str:
    """``0.912`` as ``91.2 %``; more digits where the rounded number would claim a full 0 % or 100 %."""
    text = f"{100 * share:.{digits}f}"
    while 0 < share < 1 and digits < 4 and float(text) in (0.0, 100.0):
        digits += 1
        text = f"{100 * share:.{digits}f}"
    return f"{text}{SPACE}%"


def points(change: float, digits: int = 1) -> str:
    """A difference of two shares in percentage points, with its sign."""
    text = f"{abs(100 * change):.{digits}f}"
    return text if float(text) == 0 else f"{'+' if change > 0 else MINUS}{text}"


def count(number: int, noun: str, plural: str | None = None) -> str:
    """``1,200 samples``, ``1 sample``."""
    return f"{number:,}{SPACE}{noun if number == 1 else plural or noun + 's'}"


def number(value: Any) -> str:
    """A value from the data as short text: floats to four digits, everything else as it is; a dash for nothing."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "\N{EN DASH}"
    if isinstance(value, float):
        return f"{value:.4g}".replace("-", MINUS)
    if isinstance(value, list | tuple):
        return ", ".join(map(number, value))
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def digits(contents: Contents) -> int:
    """Digits worth showing of an accuracy in percent: two only where the test set is large enough to carry them."""
    return 2 if contents.result["n_test"] >= 10_000 else 1


def column(estimator: str, target: str) -> str:
    """The name of a column of scores, as :attr:`robust_if.Scores.name` writes it."""
    return f"{estimator}:{target}" if target else estimator


def spoken(name: str) -> str:
    """A column of scores for the reader: ``fvm:utility`` becomes ``fvm on utility``."""
    estimator, _, target = name.partition(":")
    return f"{estimator} on {target}" if target else estimator


def headline(contents: Contents) -> str:
    """The finding in one sentence; it says so when accuracy fell, stayed, or nothing was removed."""
    result, places = contents.result, digits(contents)
    before, after = (percent(result["accuracy"][key], places) for key in ("before", "after"))
    if not result["removed"]:
        return f"None of the {count(result['n_train'], 'sample')} was removed; test accuracy is {before}."
    opening = f"Removing {result['removed']:,} of {count(result['n_train'], 'sample')}"
    if before == after:
        return f"{opening} left test accuracy at {before}."
    verb = "raised" if result["accuracy"]["after"] > result["accuracy"]["before"] else "lowered"
    return f"{opening} {verb} test accuracy from {before} to {after}."


def findings(contents: Contents) -> list[str]:
    """The sentences below the headline: what the truth says, what the controls say, and how sure the runs make it."""
    return [sentence for sentence in (_truth(contents), _control(contents), _relabelled(contents), _runs(contents)) if sentence]


def _truth(contents: Contents) -> str:
    removed, truth = contents.removed, contents.truth
    if truth is None:
        return "Which labels are wrong is not known for these data, so retraining is the only evidence."
    wrong, hits = int(truth.sum()), int((truth & removed).sum())
    if not removed.any():
        return f"{count(wrong, 'sample')} {'is' if wrong == 1 else 'are'} truly mislabelled."
    k = int(removed.sum())
    if not hits:
        return f"None of the {k:,} removed is truly mislabelled; {wrong:,} of all samples are."
    share = f"{hits:,} of the {k:,} removed {'is' if hits == 1 else 'are'} truly mislabelled ({percent(hits / k, 0)})"
    opening = f"All {k:,} removed are truly mislabelled" if hits == k > 1 else share
    return f"{opening}; that is {percent(hits / wrong, 0)} of the {wrong:,} mislabelled samples in the data."


def _control(contents: Contents) -> str:
    accuracy = contents.result["accuracy"]
    if accuracy["random"] is None or not contents.result["removed"]:
        return ""
    shown = percent(accuracy["random"], digits(contents))
    if accuracy["random"] >= accuracy["after"]:
        return f"Removing as many samples at random did at least as well ({shown}): here the scores did not help."
    return f"Removing as many samples at random gave {shown}."


def _relabelled(contents: Contents) -> str:
    share = contents.result["accuracy"]["relabelled"]
    if share is None or not contents.result["removed"]:
        return ""
    return f"Keeping them with the suggested label instead gave {percent(share, digits(contents))}."


def _runs(contents: Contents) -> str:
    runs = contents.result["accuracy_runs"]
    before, after = runs.get("before", []), runs.get("after", [])
    if not contents.result["removed"]:
        return ""
    if len(before) != len(after) or len(before) < 2:
        return "This compares single training runs; how much they vary by chance is not known." if len(before) < 2 else ""
    higher = sum(b < a for b, a in zip(before, after, strict=True))
    return f"Accuracy was higher after removal in {higher} of {len(before)} pairs of training runs."


def sampling(contents: Contents) -> str:
    """How far chance in the choice of test samples can move one accuracy: half a 95 % Wilson interval."""
    n, p, z = contents.result["n_test"], contents.result["accuracy"]["before"], 1.96
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return (
        f"With {count(n, 'test sample')}, the choice of test samples alone moves a single accuracy by about ±{100 * half:.1f} points "
        f"(95{SPACE}% interval). All rows share the same test samples, so their differences are usually known better than that."
    )


def accuracies(contents: Contents) -> list[dict[str, str]]:
    """The rows of the accuracy table, in the order of the chart."""
    accuracy, runs, places = contents.result["accuracy"], contents.result["accuracy_runs"], digits(contents)
    rows = []
    for key, (name, meaning) in NAMES.items():
        if accuracy[key] is not None:
            single = runs.get(key, [])
            spread = f"{percent(min(single), places).rstrip(SPACE + '%')} to {percent(max(single), places)}" if len(single) > 1 else "\N{EN DASH}"
            measured = count(len(single), "run") if single else ""
            change = "" if key == "before" else points(accuracy[key] - accuracy["before"], places)
            shown = percent(accuracy[key], places)
            rows.append({"key": key, "name": name, "meaning": meaning, "accuracy": shown, "change": change, "spread": spread, "runs": measured})
    return rows


METRICS = {
    "auroc": "AUROC",
    "average_precision": "Average precision",
    "precision_at_k": "Precision at k",
    "tpr_at_1_fpr": f"TPR at 1{SPACE}% FPR",
    "tpr_at_5_fpr": f"TPR at 5{SPACE}% FPR",
    "seconds": "Seconds",
}


def detection(contents: Contents) -> list[dict[str, Any]]:
    """The rows of the detection table: per metric its text, its interval and whether it is the best of its column."""
    entries = contents.result["detection"]
    shown = [{key: _metric(key, entry.get(key)) for key in METRICS} for entry in entries]
    rows = []
    for entry, texts in zip(entries, shown, strict=True):
        cells = []
        for key, title in METRICS.items():
            known = [(other[key], text[key]) for other, text in zip(entries, shown, strict=True) if other.get(key) is not None]
            # Compared as shown: two values that read the same are both best.
            winner = max(known)[1] if key != "seconds" and len(known) > 1 else None
            interval = entry.get("auroc_interval") if key == "auroc" else None
            spread = f"{interval[0]:.3f} to {interval[1]:.3f}" if interval else ""
            cells.append({"title": title, "text": texts[key], "interval": spread, "best": entry.get(key) is not None and texts[key] == winner})
        name = column(entry["estimator"], entry["target"])
        decides = name == contents.result["decided_by"]
        rows.append({"estimator": entry["estimator"], "target": entry["target"], "cells": cells, "decides": decides})
    return rows


def _metric(key: str, value: float | None) -> str:
    if value is None:
        return "\N{EN DASH}"
    if key == "seconds":
        return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 0.1 else f"{value:.2g}"
    return f"{value:.3f}"
