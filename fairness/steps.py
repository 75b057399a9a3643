"""One step of a repair: which weights or labels change, and what that is predicted to do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Self

import numpy as np

from robust_if.fairness.programme import choose, reweigh
from robust_if.fairness.rounds import Array, Labels, Round, Validation
from robust_if.targets import Target

Action = Literal["remove", "reweigh", "relabel"]
ACTIONS = ("remove", "reweigh", "relabel")


@dataclass(frozen=True, eq=False)
class Terms:
    """What a repair aims at, costs and may do; see :func:`robust_if.fairness.repair.repair`.

    Raises:
        ValueError: if a number is out of range.
    """

    bound: float = 0.005
    max_accuracy_loss: float | None = None
    rounds: int = 10
    budget: float = 0.05
    cost: float = 0.05
    max_weight: float = 2.0
    time_limit: float = 20.0

    def __post_init__(self) -> None:
        if not self.cost >= 0 or not self.max_weight >= 1:
            raise ValueError(f"cost, max_weight: expected numbers from 0 and from 1 on, got {self.cost} and {self.max_weight}")
        if not self.bound >= 0 or not 0 < self.budget <= 1 or self.rounds < 1:
            got = f"{self.bound}, {self.budget} and {self.rounds}"
            raise ValueError(f"bound, budget, rounds: expected from 0 on, a share above 0, and at least 1, got {got}")
        if self.max_accuracy_loss is not None and not 0 <= self.max_accuracy_loss <= 1:
            raise ValueError(f"max_accuracy_loss: expected a share from 0 to 1, got {self.max_accuracy_loss}")


@dataclass(frozen=True, eq=False)
class Step:
    """New weights ``(n,)`` and labels ``(n,)``, and the values of all targets that they are predicted to give."""

    weights: Array
    labels: Labels
    predicted: dict[str, float]

    def size(self, now: Round) -> float:
        """Sum of the changes of weight, and number of changed labels, since a round."""
        return float(np.abs(self.weights - now.weights).sum() + (self.labels != now.labels).sum())


@dataclass(frozen=True, eq=False)
class Effects:
    """What changing each sample does at a round: scores ``(n, k)`` of all targets, and the label that it would get ``(n,)``."""

    scores: Array
    labels: Labels

    @classmethod
    def of(cls, action: Action, now: Round, valid: Validation) -> Self:
        """By weight, or by label for ``"relabel"``."""
        targets = list(valid.targets.values())
        if action != "relabel":
            return cls(now.fitted.scores(targets), now.labels)
        others = _suggested(now, valid, valid.present(now))
        return cls(now.fitted.flips(targets, others), others)


def step(action: Action, effects: Effects, now: Round, valid: Validation, terms: Terms, *, region: float, scale: float) -> Step | None:
    """The step from a round, ``None`` if no sample helps.

    Args:
        region: trust region, the largest sum of changes of weight, or number of changed labels.
        scale: of scores that only rank.
    """
    m, gaps, scores = len(valid.contrasts), valid.present(now), scale * effects.scores
    weights, labels, price = now.weights, now.labels, terms.cost / len(now.weights)
    limits = {"bound": terms.bound, "budget": region, "time_limit": terms.time_limit}
    if action == "reweigh":
        options = {"cost": price, "max_weight": terms.max_weight, **limits}
        change = -reweigh(weights, gaps, scores[:, :m], scores[:, -1], **options).change
        weights = np.clip(weights - change, 0, terms.max_weight)
    elif action == "remove":
        whole = weights[:, None] * scores
        change = weights * choose(gaps, whole[:, :m], weights * price - whole[:, -1], **limits)
        weights = weights - change
    else:
        change = choose(gaps, scores[:, :m], price - scores[:, -1], **limits).astype(np.float64)
        labels = np.where(change > 0, effects.labels, labels)
    if not change.any():
        return None
    return Step(weights, labels, {name: now.verified[name] - float(change @ scores[:, at]) for at, name in enumerate(valid.targets)})


def _suggested(now: Round, valid: Validation, gaps: Array) -> Labels:
    """Of the other classes, the one that lowers the worst gap and utility together most, ``(n,)``."""
    classes = int(max(now.labels.max(), valid.samples.batch(slice(None))[1].max())) + 1
    others = [(now.labels + shift) % classes for shift in range(1, classes)]
    if len(others) == 1:
        return np.asarray(others[0])
    targets: list[Target] = [valid.utility]
    if len(gaps):
        worst = int(np.abs(gaps).argmax())
        targets.append(float(np.sign(gaps[worst])) * list(valid.contrasts.values())[worst])
    gains = np.stack([now.fitted.flips(targets, each).sum(1) for each in others])
    return np.asarray(np.stack(others)[gains.argmax(0), np.arange(len(now.labels))])
