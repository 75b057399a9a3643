"""What a trade-off found, as plain facts: the objectives with their hard metrics, conflicts, and every choice with what it promised and did."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import t as student

from robust_if.attacks.targets import AdversarialLoss
from robust_if.evaluations.baselines import predict
from robust_if.evaluations.previews import preview
from robust_if.evaluations.report.tradeoff_words import verdict
from robust_if.evaluations.report.tradeoffs import render_tradeoffs
from robust_if.evaluations.robustness import robust_accuracy
from robust_if.fairness.metrics import COMPARED, gap
from robust_if.fairness.targets import FairnessGap
from robust_if.loading import Dataset
from robust_if.objectives import Choice, Conflicts, fronts
from robust_if.scores import Scores, table
from robust_if.targets import Target
from robust_if.task import Task
from robust_if.writing import plain, write_json

#: What a target is called in a sentence, and what the page calls its value.
WORDS = {
    "utility": ("utility", "loss"),
    "adversarial": ("robustness", "loss under attack"),
    "robust_gap": ("robust gap", "loss that the attack adds"),
}
#: Test samples that are attacked by the ensemble of attacks at most.
ATTACKED = 1000
#: Points in the scatter, half of them those with the largest scores, and samples shown of every kind.
POINTS, SHOWN = 3000, 3
#: Of the intervals over seeds.
LEVEL = 0.95

Measured = dict[str, dict[str, float]]


@dataclass(frozen=True, eq=False)
class Objective:
    """A target on validation data, which is scored, and the same on test data, by which it is verified."""

    valid: Target
    test: Target

    @property
    def name(self) -> str:
        """Of the target."""
        return self.valid.name

    @property
    def words(self) -> str:
        """Of the target, for a sentence."""
        return WORDS.get(self.name, (self.name.replace("_", " "), ""))[0]

    @property
    def is_gap(self) -> bool:
        """Whether it compares groups."""
        return isinstance(self.valid, FairnessGap)

    @property
    def metric(self) -> str | None:
        """What decisions are judged by, in words; ``None`` for a target that decisions do not have."""
        if isinstance(self.test, FairnessGap):
            return f"{self.words} gap" if self.test.notion in COMPARED else None
        if isinstance(self.test, AdversarialLoss):
            return "robust accuracy"
        return "accuracy" if self.name == "utility" else None

    def hard(self, task: Task) -> float:
        """The metric of the model's decisions on test data; a model that is attacked is attacked anew."""
        if isinstance(self.test, AdversarialLoss):
            return float(self.attacked(task).accuracy)
        decided = predict(task, self.test.held_out[0]).argmax(1)
        y = self.test.held_out[0].batch(slice(None))[1].numpy()
        if isinstance(self.test, FairnessGap):
            codes = self.test.held_out[0].batch(slice(None))[2].numpy()
            return gap(self.test.notion, y, decided, codes, positive=self.test.positive)
        return float((decided == y).mean())

    def attacked(self, task: Task, *, checks: bool = False, radius: str | None = None) -> Any:
        """Robust accuracy against an ensemble of attacks, on evenly spaced test samples; ``radius`` is what the text calls that of the attack."""
        assert isinstance(self.test, AdversarialLoss)
        rows = np.unique(np.linspace(0, len(self.test.data) - 1, min(ATTACKED, len(self.test.data))).round().astype(int))
        return robust_accuracy(task, self.test.data.take(rows), self.test.attack.threat, preset="lite", checks=checks, radius=radius)

    def measured(self, task: Task) -> dict[str, float]:
        """``soft``, the target itself on test data, and ``hard``, its metric where it has one."""
        with torch.no_grad():
            found = {"soft": float(self.test.value(task, task.params()))}
        return found | ({} if self.metric is None else {"hard": self.hard(task)})

    def facts(self) -> dict[str, Any]:
        """For the page."""
        value = WORDS.get(self.name, ("", f"soft {self.metric}" if self.is_gap and self.metric else self.words))[1]
        return {"name": self.name, "words": self.words, "value": value, "metric": self.metric, "is_gap": self.is_gap}


@dataclass(frozen=True, eq=False)
class Verified:
    """Choices by name, and per name, ``"none"`` and ``"random"`` included, what was measured with every seed, by objective."""

    choices: Mapping[str, Choice]
    measured: Mapping[str, Sequence[Measured]]

    def facts(self, objectives: Sequence[Objective], reach: Mapping[str, float]) -> list[dict[str, Any]]:
        """A row per choice: what it promised, and values and gains on test data; a gain is positive where the objective got better."""
        rows = []
        for name, runs in self.measured.items():
            choice = self.choices.get(name)
            row: dict[str, Any] = {"name": name, "mix": None, "removed": None, "predicted": None, "share": None, "verified": {}}
            if choice is not None:
                shares = {key: value / reach[key] for key, value in choice.predicted.items()}
                row |= {"mix": dict(choice.mix), "removed": choice.removed, "predicted": dict(choice.predicted), "share": shares}
            for each in objectives:
                row["verified"][each.name] = {
                    kind: _change([run[each.name][kind] for run in runs], [run[each.name][kind] for run in self.measured["none"]], up)
                    for kind, up in (("soft", False), ("hard", not each.is_gap))
                    if kind in runs[0][each.name]
                }
            rows.append(row)
        return rows


def _change(after: Sequence[float], before: Sequence[float], up: bool) -> dict[str, Any]:
    """Mean value over the seeds, and how much better it is than without removal, seed by seed: mean and Student's interval."""
    gains = (np.array(after) - np.array(before)) * (1 if up else -1)
    mean, half = float(gains.mean()), math.nan
    if len(gains) > 1:
        half = float(student.ppf((1 + LEVEL) / 2, len(gains) - 1) * gains.std(ddof=1) / math.sqrt(len(gains)))
    ends = {"low": _known(mean - half), "high": _known(mean + half)}
    return {"value": _known(float(np.mean(after))), "runs": [_known(each) for each in after], "gain": _known(mean), **ends}


def write(
    directory: Path, asked: dict[str, Any], train: Dataset, objectives: Sequence[Objective], task: Task, scores: Sequence[Scores], found: Conflicts,
    front: Sequence[Choice], verified: Verified, k: int,
) -> dict[str, Any]:  # fmt: skip
    """Write scores.parquet, choices.csv, result.json and report.html; what ``result.json`` says."""
    frame = table(scores)
    frame["front"] = fronts(scores)
    frame.to_parquet(directory / "scores.parquet", index=False)
    weights = {name: choice.weights for name, choice in verified.choices.items()}
    table(scores)[["id"]].assign(**weights).to_csv(directory / "choices.csv", index=False)
    reach = {name: float(np.sort(np.abs(found.harm[:, at]))[::-1][:k].sum()) or 1.0 for at, name in enumerate(found.names)}
    typical = {name: float(np.abs(found.harm[:, at]).mean()) or 1.0 for at, name in enumerate(found.names)}
    params, warnings, budget = task.params(), [], None
    with torch.no_grad():
        values = {each.name: float(each.valid.value(task, params)) for each in objectives}
    for each in objectives:
        if isinstance(each.test, AdversarialLoss) and budget is None:
            unit = "of the pixel range" if train.kind == "image" else "standard deviations"
            judged = each.attacked(task, checks=True, radius=f"{asked['settings']['eps']:g} {unit}")
            budget, warnings = judged.budget, [] if judged.believable else [f"robust accuracy: {judged.verdict}"]
    result = {
        "tradeoffs": True, **asked, "kind": train.kind, "n_train": len(train), "k": k, "level": LEVEL,
        "objectives": [
            each.facts() | {"validation": values[each.name], "reach": reach[each.name], "typical": typical[each.name]} for each in objectives
        ],
        "pairs": _pairs(found, verified.choices, k), "points": _points(found), "samples": _samples(found, train, reach),
        "front": [{"mix": dict(each.mix), "share": {key: value / reach[key] for key, value in each.predicted.items()}} for each in front],
        "choices": verified.facts(objectives, reach), "attack": budget,
        "files": {name: str(directory / file) for name, file in (
            ("scores", "scores.parquet"), ("choices", "choices.csv"), ("model", "model.safetensors"), ("report", "report.html"),
        )},
    }  # fmt: skip
    result["warnings"] = [*asked["warnings"], *warnings]
    result["verdict"] = verdict(result)
    write_json(directory / "result.json", result, plain)
    render_tradeoffs(directory)
    return result


def _pairs(found: Conflicts, choices: Mapping[str, Choice], k: int) -> list[dict[str, Any]]:
    """Two targets at a time: rank correlation, shares of samples by what they do, and how much of the two removals is the same."""
    rows = []
    gone = {name: np.argsort(-found.harm[:, at], kind="stable")[:k] for at, name in enumerate(found.names)}
    for a, one in enumerate(found.names):
        for b in range(a + 1, len(found.names)):
            other = found.names[b]
            rows.append({
                "pair": [one, other], "correlation": _known(float(found.correlations[a, b])), "together": float(found.together[a, b]),
                "against": [float(found.against[a, b]), float(found.against[b, a])],
                "shared": len(np.intersect1d(gone[one], gone[other])) / k,
                "helping": [float((found.harm[gone[one], b] < 0).mean()), float((found.harm[gone[other], a] < 0).mean())],
            })  # fmt: skip
    return rows


def _points(found: Conflicts) -> dict[str, Any]:
    """Samples for the scatter: half of them those with the largest scores, the others at random."""
    n = len(found.harm)
    rows: NDArray[np.int64] = np.arange(n)
    if n > POINTS:
        size = np.abs(found.harm / (np.abs(found.harm).mean(0) + 1e-300)).max(1)
        order = np.argsort(-size, kind="stable")
        rest = np.random.default_rng(0).permutation(order[POINTS // 2 :])[: POINTS - POINTS // 2]
        rows = np.sort(np.concatenate([order[: POINTS // 2], rest]))
    return {"n": n, "harm": [[float(f"{value:.4g}") for value in found.harm[row]] for row in rows]}


def _samples(found: Conflicts, data: Dataset, reach: Mapping[str, float]) -> list[dict[str, Any]]:
    """The sharpest conflicts between every two targets, both ways round, and samples that harm all."""

    def shown(rows: NDArray[np.int64]) -> list[dict[str, Any]]:
        return [
            {"id": plain(data.ids[row]), "label": str(data.labels[row]).strip(), **preview(data, row)}
            | {"harm": dict(zip(found.names, found.harm[row].tolist(), strict=True))}
            for row in rows.tolist()
        ]

    least = (found.harm / np.array([reach[name] for name in found.names])).min(1)
    worst = np.argsort(-least, kind="stable")[:SHOWN]
    groups = [{"harmed": list(found.names), "helped": [], "entries": shown(worst[least[worst] > 0])}]
    for one in found.names:
        for other in found.names:
            if one != other:
                groups.append({"harmed": [one], "helped": [other], "entries": shown(found.sharpest(one, other, SHOWN))})
    return [group for group in groups if group["entries"]]


def _known(value: float) -> float | None:
    """A number, ``None`` where it is not known."""
    return value if math.isfinite(value) else None
