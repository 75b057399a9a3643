"""What a repair did, as plain facts for ``result.json``: gaps before and after, round by round and by group, and which samples were changed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from robust_if.evaluations.kinds import changed_kinds, collected, harmful_kinds, readable
from robust_if.fairness.audit import Audit, audit
from robust_if.fairness.groups import Groups
from robust_if.fairness.learners import Learner
from robust_if.fairness.metrics import COMPARED, gap
from robust_if.fairness.repair import Repair
from robust_if.fairness.rounds import Array, Labels, Round
from robust_if.fairness.targets import FairnessGap
from robust_if.loading import Dataset
from robust_if.writing import plain

#: The metrics that every repair reports besides accuracy: name in the rounds of a repair, and in an audit.
METRICS = {
    "demographic_parity": "demographic_parity",
    "true_positive_rate_parity": "equal_opportunity",
    "false_positive_rate_parity": "false_positive_rate_parity",
    "equalized_odds": "equalized_odds",
    "error_rate_parity": "error_rate_parity",
}
#: The rates by group that are drawn.
RATES = ("selection_rate", "true_positive_rate", "false_positive_rate")
#: A gap that grew by more than this on test data, beyond what chance gives equal groups, is called worse; clearly so above its interval before.
WORSE = 0.01
#: Epsilon of weights: a linear programme leaves some at 1 − 1e-9.
SAME = 1e-6


@dataclass(frozen=True, eq=False)
class Repaired:
    """A finished repair with its decisions on test data.

    Args:
        found: the repair.
        groups, strata: of ``"train"``, ``"valid"`` and ``"test"``.
        classes: the labels as in the file.
        positive: number of the class whose prediction is the benefit.
        rounds: decisions on test data after every round, ``(n_test,)`` each.
        before, after: the same of the models that count: one where the fit is a closed form, else one per seed.
        y: ``(n_test,)`` labels.
        train: training samples as in the file.
    """

    found: Repair
    learner: Learner
    gaps: tuple[FairnessGap, ...]
    groups: dict[str, Groups]
    strata: dict[str, Groups] | None
    classes: NDArray[Any]
    positive: int | None
    rounds: Sequence[Labels] = field(repr=False)
    before: Sequence[Labels] = field(repr=False)
    after: Sequence[Labels] = field(repr=False)
    y: Labels = field(repr=False)
    train: Dataset = field(repr=False)

    @property
    def first(self) -> Round:
        """The data as given."""
        return self.found.rounds[0]

    @cached_property
    def pair(self) -> tuple[str, str] | None:
        """The two groups of a signed gap: its sign is positive where the first one has the higher rate. ``None`` where gaps have no sign."""
        present = np.flatnonzero(self.groups["valid"].sizes)
        if len(present) != 2 or np.count_nonzero(self.groups["test"].sizes) != 2 or self.positive is None or self.strata is not None:
            return None
        names = self.groups["valid"].names
        return names[present[1]], names[present[0]]

    def gap(self, notion: str, decided: Labels) -> float:
        """The gap of hard decisions on test data, without its sign; NaN where it cannot be known."""
        strata = None if self.strata is None else self.strata["test"]
        return gap(notion, self.y, decided, self.groups["test"], control_features=strata, positive=self.positive)

    def audited(self, decided: Labels, *, strata: bool = True, smallest: int = 30, seed: int = 0) -> Audit:
        """The audit of decisions on test data; class numbers stand for labels."""
        control = self.strata["test"] if self.strata is not None and strata else None
        return audit(
            self.y, decided, self.groups["test"], control_features=control, positive=self.positive, classes=range(len(self.classes)),
            smallest=smallest, seed=seed,
        )  # fmt: skip


def facts(done: Repaired, *, smallest: int, seed: int) -> dict[str, Any]:
    """Everything of ``result.json`` that the repair brought about."""
    audits = [done.audited(decided, smallest=smallest, seed=seed) for decided in (done.before[0], done.after[0])]
    bars = (
        audits if done.strata is None else [done.audited(each[0], strata=False, smallest=smallest, seed=seed) for each in (done.before, done.after)]
    )
    metrics = [_accuracy(done, bars), *(_metric(done, name, audits) for name in METRICS)]
    table = readable(done.train)
    shown = _shown_class(done, metrics)
    return {
        "chosen": done.found.chosen, "unmet": done.found.unmet, "classes": [plain(each) for each in done.classes],
        "groups": _groups(done, bars, shown), "bars_of": str(done.classes[shown]).strip(),
        "positive_sign": None if done.pair is None else list(done.pair), "level": audits[0].level, "metrics": metrics, "rounds": _rounds(done),
        "changed": _counts(done.found), "changed_by": _by_group(done), "kinds": changed_kinds(done.found, table),
        "harmful": harmful_kinds(done.learner, done.gaps[_worst(done)], table, done.first),
        "collect": collected(done.learner, done.gaps[_worst(done)], done.train, table, done.first),
        "warnings": list(dict.fromkeys(f"test: {each}" for each in audits[1].warnings)),
    }  # fmt: skip


def is_target(metric: str, targets: Sequence[str]) -> bool:
    """Whether a metric is one of those that were repaired; equal opportunity is another name of true positive rate parity, and so on."""
    return any(COMPARED[metric] == COMPARED[name] for name in targets)


def _worst(done: Repaired) -> int:
    """Number of the target whose gap was largest on validation data."""
    sizes = [max(abs(done.first.hard[each.name]) for each in gap.signed()) for gap in done.gaps]
    return int(np.argmax(sizes))


def _accuracy(done: Repaired, audits: Sequence[Audit]) -> dict[str, Any]:
    tests = []
    for found, decided in zip(audits, (done.before, done.after), strict=True):
        row = found.rates[(found.rates["features"] == "") & (found.rates["metric"] == "accuracy")].iloc[0]
        numbers = {key: _clean(row[key]) for key in ("value", "low", "high")}
        tests.append({**numbers, "highest": "", "lowest": "", "where": "", "runs": [float((each == done.y).mean()) for each in decided]})
    validation = {"before": done.first.accuracy, "predicted": None, "verified": None, "after": done.found.best.accuracy}
    return {
        "name": "accuracy", "target": False, "worse": "", "turned": False, "validation": validation, "before": tests[0], "after": tests[1]
    }  # fmt: skip


def _metric(done: Repaired, name: str, audits: Sequence[Audit]) -> dict[str, Any]:
    now, signed = done.found.best, done.pair is not None and len(COMPARED[name]) == 1
    tests = []
    for found, decided in zip(audits, (done.before, done.after), strict=True):
        row = _widest(found, METRICS[name], done)
        turned = signed and done.pair is not None and row["highest"] not in ("", done.pair[0])
        value, low, high = ((None if row[key] is None else -row[key]) if turned else row[key] for key in ("difference", "low", "high"))
        if signed and row["low"] == 0:  # within what chance gives equal groups, so that nobody knows the sign
            low, high = -row["high"], row["high"]
        elif turned:
            low, high = high, low
        runs = [_clean(done.gap(name, each)) for each in decided]
        tests.append(
            {"value": value, "low": low, "high": high, "highest": row["highest"], "lowest": row["lowest"], "where": row["where"], "runs": runs}
        )
    sizes = [None if each["value"] is None else abs(each["value"]) for each in tests]
    beyond = [each["low"] is not None and not each["low"] <= 0 <= each["high"] for each in tests]
    grew = sizes[0] is not None and sizes[1] is not None and beyond[1] and sizes[1] > sizes[0] + WORSE
    clearly = grew and tests[0]["low"] is not None and sizes[1] > max(abs(tests[0]["low"]), abs(tests[0]["high"]))
    validation = {"before": done.first.hard[name], "predicted": now.predicted[name], "verified": now.verified[name], "after": now.hard[name]}
    return {
        "name": name, "target": is_target(name, [each.notion for each in done.gaps]),
        "worse": "clearly" if clearly else "perhaps" if grew else "",
        "turned": bool(signed and all(beyond) and tests[0]["value"] * tests[1]["value"] < 0),
        "validation": {key: _clean(value if signed else abs(value)) for key, value in validation.items()}, "before": tests[0], "after": tests[1],
    }  # fmt: skip


def _widest(found: Audit, name: str, done: Repaired) -> dict[str, Any]:
    """The row of the largest gap among strata and classes."""
    rows = found.gaps[(found.gaps["gap"] == name) & (found.gaps["features"] == " x ".join(done.groups["test"].features))]
    row = rows.iloc[int(rows["difference"].fillna(-1.0).to_numpy().argmax())]
    where = [row["stratum"]] if row["stratum"] else []
    where += [f"class {str(done.classes[int(row['positive'])]).strip()}"] if done.positive is None else []
    numbers = {key: _clean(row[key]) for key in ("difference", "low", "high")}
    return {**numbers, "highest": row["highest"], "lowest": row["lowest"], "where": ", ".join(where), "positive": int(row["positive"])}


def _rounds(done: Repaired) -> list[dict[str, Any]]:
    """The largest gap that was to be repaired, and accuracy, after every round."""
    first, rows = done.first, []
    contrasts = [each.name for gap in done.gaps for each in gap.signed()]
    for at, (each, decided) in enumerate(zip(done.found.rounds, done.rounds, strict=True)):
        gaps = [done.gap(gap.notion, decided) for gap in done.gaps]
        rows.append({
            "round": at, "changed": float(np.abs(each.weights - first.weights).sum() + (each.labels != first.labels).sum()),
            "validation": {"gap": max(abs(each.hard[name]) for name in contrasts), "accuracy": each.accuracy},
            "test": {"gap": _clean(float(np.nanmax(gaps))) if not np.isnan(gaps).all() else None, "accuracy": float((decided == done.y).mean())},
        })  # fmt: skip
    return rows


def _shown_class(done: Repaired, metrics: Sequence[Mapping[str, Any]]) -> int:
    """The class whose rates by group are drawn: the positive one, else the one with the widest gap."""
    if done.positive is not None:
        return done.positive
    target = next((each for each in metrics if each["target"]), metrics[1])
    words = target["before"]["where"].rpartition("class ")[2]
    return next((at for at, each in enumerate(done.classes) if str(each).strip() == words), len(done.classes) - 1)


def _groups(done: Repaired, audits: Sequence[Audit], shown: int) -> list[dict[str, Any]]:
    """Rates of every group on test data, before and after."""
    tests = []
    for found in audits:
        own = found.rates[(found.rates["features"] == " x ".join(done.groups["test"].features)) & (found.rates["positive"] == str(shown))]
        tests.append({(row["group"], row["metric"]): row for row in own.to_dict("records")})
    rows = []
    for at, name in enumerate(done.groups["test"].names):
        rates = {
            metric: [
                {key: _clean(test[name, metric][key]) for key in ("value", "low", "high")} | {"n": int(test[name, metric]["n"])} for test in tests
            ]
            for metric in RATES
        }
        sizes = {f"n_{part}": int(each.sizes[at]) for part, each in done.groups.items()}
        rows.append({"group": name, **sizes, "rates": rates})
    return rows


def changes(found: Repair) -> dict[str, NDArray[np.bool_]]:
    """Which samples ``(n,)`` were removed, weighted down or up, or relabelled."""
    old, new = found.rounds[0].weights, found.weights
    gone = (new <= SAME) & (old > SAME)
    return {
        "removed": gone, "down": (new < old - SAME) & ~gone, "up": new > old + SAME,
        "relabelled": np.asarray(found.labels != found.rounds[0].labels),
    }  # fmt: skip


def _counts(found: Repair) -> dict[str, Any]:
    every = changes(found)
    total = {name: int(mask.sum()) for name, mask in every.items()}
    return total | {
        "samples": int(np.any(list(every.values()), axis=0).sum()),
        "weight": float(np.abs(found.weights - found.rounds[0].weights).sum()),
    }


def _by_group(done: Repaired) -> list[dict[str, Any]]:
    """How many samples of every group and label were changed."""
    groups, labels, every = done.groups["train"], done.first.labels, changes(done.found)
    rows = []
    for group, label in product(range(len(groups.values)), range(len(done.classes))):
        inside = (groups.codes == group) & (labels == label)
        if inside.any():
            counts = {name: int((mask & inside).sum()) for name, mask in every.items()}
            rows.append({"group": groups.names[group], "label": str(done.classes[label]).strip(), "n": int(inside.sum()), **counts})
    return rows


def _clean(value: Any) -> float | None:
    """A number, ``None`` where it is not known."""
    number = float(value)
    return None if math.isnan(number) else number


def frame(found: Repair, data: Dataset, labels: NDArray[Any], weights: Array) -> pd.DataFrame:
    """One row per training sample, for ``weights.csv``."""
    changed = np.any(list(changes(found).values()), axis=0)
    return pd.DataFrame({"id": data.ids, "weight": weights, "label": labels, "original_label": data.labels, "changed": changed})
