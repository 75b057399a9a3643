"""The report's sentences and numbers, as plain text; the template escapes them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from robust_if.evaluations.report.contents import Contents

#: Attack success after removal, or more than after the oracle's, above which the report says that poison is left.
LEFT = 0.05
SPACE = "\N{NO-BREAK SPACE}"
MINUS = "\N{MINUS SIGN}"

NAMES = {
    "before": ("Before", "trained on all samples"),
    "after": ("After removal", "retrained without the removed samples"),
    "random": ("Random removal", "retrained without as many samples drawn at random"),
    "oracle": ("Oracle", "retrained without exactly the truly mislabelled samples"),
    "relabelled": ("Relabelled", "retrained with the suggested label in place of removal"),
}


ATTACKED = NAMES | {
    "after": ("After removal", "retrained without the samples called poisoned"),
    "oracle": ("Without any poison", "retrained without exactly the truly poisoned samples (oracle)"),
    "relabelled": ("Relabelled", "retrained with the labels that the model after removal gives them"),
}


def bad(contents: Contents) -> str:
    """What a truly bad sample is called."""
    return "mislabelled" if contents.attack is None else "poisoned"


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
    """The finding in one sentence; it says so when accuracy fell, stayed, or nothing was removed, and when a suspected attack does not work."""
    result, places = contents.result, digits(contents)
    before, after = (percent(result["accuracy"][key], places) for key in ("before", "after"))
    attack = contents.attack
    if attack is not None and attack["failed"]:
        return f"The suspected attack does not work on this model: its success is {percent(attack['success']['scored'])}."
    if attack is not None:
        before, after = (percent(attack["success"][key]) for key in ("before", "after"))
    subject = "test accuracy" if attack is None else "attack success"
    if not result["removed"]:
        return f"None of the {count(result['n_train'], 'sample')} was removed; {subject} is {before}."
    opening = f"Removing {result['removed']:,} of {count(result['n_train'], 'sample')}{'' if attack is None else ' as poisoned'}"
    if before == after:
        return f"{opening} left {subject} at {before}."
    values = result["accuracy"] if attack is None else attack["success"]
    return f"{opening} {'raised' if values['after'] > values['before'] else 'lowered'} {subject} from {before} to {after}."


def findings(contents: Contents) -> list[str]:
    """The sentences below the headline: what the truth says, what the controls say, and how sure the runs make it."""
    if contents.attack is None:
        parts = (_truth(contents), _control(contents), _relabelled(contents), _runs(contents))
    else:
        parts = (_attacked(contents), _truth(contents), _left(contents), _measured(contents))
    return [sentence for sentence in parts if sentence]


def _attacked(contents: Contents) -> str:
    accuracy = contents.result["accuracy"]
    before, after = (percent(accuracy[key], digits(contents)) for key in ("before", "after"))
    return f"Test accuracy was {before} before and {after} after." if contents.result["removed"] else f"Test accuracy is {before}."


def _left(contents: Contents) -> str:
    assert contents.attack is not None
    success = contents.attack["success"]
    if not contents.result["removed"] or contents.attack["failed"]:
        return ""
    controls = f"Removing as many samples at random left attack success at {percent(success['random'])}"
    controls += "." if success["oracle"] is None else f"; without any poison, behind a perfect filter, it is {percent(success['oracle'])}."
    if success["after"] <= LEFT:
        return controls
    if success["oracle"] is not None and success["after"] <= success["oracle"] + LEFT:
        return f"{controls} What success there still is comes without poison: such inputs look like the goal class by themselves."
    controls += " The attack still works on some inputs, so poison is left in the data"
    controls += "." if success["oracle"] is not None else ", or such inputs look like the goal class by themselves."
    return controls


def _measured(contents: Contents) -> str:
    attack = contents.attack
    assert attack is not None
    inputs = f"{count(attack['measured'], 'triggered input')} with the goal class {attack['goal_class']}"
    if attack["shared"]:
        return f"Attack success was measured on {inputs}, the very {'one' if attack['measured'] == 1 else 'ones'} that the scores had seen."
    return f"Attack success was measured on {inputs} that no score had seen."


def _truth(contents: Contents) -> str:
    removed, truth = contents.removed, contents.truth
    if truth is None:
        what = "Which labels are wrong" if contents.attack is None else "Which samples are poisoned"
        return f"{what} is not known for these data, so retraining is the only evidence."
    word = bad(contents)
    wrong, hits = int(truth.sum()), int((truth & removed).sum())
    if not removed.any():
        return f"{count(wrong, 'sample')} {'is' if wrong == 1 else 'are'} truly {word}."
    k = int(removed.sum())
    if not hits:
        return f"None of the {k:,} removed is truly {word}; {wrong:,} of all samples are."
    share = f"{hits:,} of the {k:,} removed {'is' if hits == 1 else 'are'} truly {word} ({percent(hits / k, 0)})"
    opening = f"All {k:,} removed are truly {word}" if hits == k > 1 else share
    return f"{opening}; that is {percent(hits / wrong, 0)} of the {wrong:,} {word} samples in the data."


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
    return _measurements(contents, contents.result["accuracy"], contents.result["accuracy_runs"], digits(contents))


def successes(contents: Contents) -> list[dict[str, str]]:
    """The rows of the table of attack success; none where no attack was suspected."""
    return [] if contents.attack is None else _measurements(contents, contents.attack["success"], contents.attack["success_runs"], 1)


def _measurements(contents: Contents, means: Mapping[str, Any], runs: Mapping[str, Any], places: int) -> list[dict[str, str]]:
    rows = []
    for key, (name, meaning) in (NAMES if contents.attack is None else ATTACKED).items():
        if means[key] is not None:
            single = runs.get(key, [])
            spread = f"{percent(min(single), places).rstrip(SPACE + '%')} to {percent(max(single), places)}" if len(single) > 1 else "\N{EN DASH}"
            measured = count(len(single), "run") if single else ""
            change = "" if key == "before" else points(means[key] - means["before"], places)
            rows.append({
                "key": key, "name": name, "meaning": meaning, "share": percent(means[key], places), "change": change, "spread": spread,
                "runs": measured,
            })  # fmt: skip
    return rows


def verdicts(contents: Contents) -> list[dict[str, Any]]:
    """The tables of estimators: one, or with a suspected attack one for each of the two verdicts, with what is said above it."""
    rows, attack = detection(contents), contents.attack
    if attack is None:
        return [{"id": "detection", "title": "How well each estimator finds mislabelled samples", "said": [], "rows": rows, "cards": []}]
    promise = attack["max_false_positives"]
    text = (
        f"A sample is called poisoned if the model forgets it when it unlearns the attack. That holds for {count(attack['poisoned'], 'sample')}, and "
        "these were removed."
    )
    poisoned = [text]
    if promise is not None:
        poisoned.append(
            f"The threshold is the one that at most {percent(promise)} of clean samples exceed, as the validation samples show. Training samples "
            "were learnt by heart and validation samples were not, so among those more may exceed it, most of all in the goal class. Where no share "
            "was asked for, it is the smallest of a few after which the attack inputs are taken for the goal class no more often than by a model of "
            "the validation samples alone."
        )
    harms = (
        f"This is another question: whether leaving a sample out is predicted to lower the loss on clean validation samples. By "
        f"{spoken(attack['harms_by'])} and the automatic threshold that holds for {count(attack['harms_utility'], 'sample')}, {attack['both']:,} of "
        "them also called poisoned. Nothing was removed by this verdict."
    )
    first = {"id": "poisoned", "title": "Verdict: poisoned", "said": poisoned, "rows": rows[:1], "cards": []}
    return [first, {"id": "harms", "title": "Verdict: harms utility", "said": [harms], "rows": rows[1:], "cards": contents.harmful}]


def bias(contents: Contents) -> list[dict[str, str]]:
    """The rows of the table of those who were removed."""
    rows = []
    for row in contents.result["filter"]:
        name = {"all": "All samples", "class": f"Class {row['value']}"}.get(row["by"], f"{row['by']} {row['value']}")
        shares = {key: "\N{EN DASH}" if row.get(key) is None else percent(row[key]) for key in ("precision", "recall", "false_positive_rate")}
        rows.append({"name": name, "n": f"{row['n']:,}", "removed": f"{row['removed']:,}", **shares})
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
            rivals = [pair for pair in zip(entries, shown, strict=True) if contents.attack is None or pair[0]["target"] == entry["target"]]
            known = [(other[key], text[key]) for other, text in rivals if other.get(key) is not None]
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
