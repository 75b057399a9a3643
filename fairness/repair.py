"""Repairing training data: remove, reweigh or relabel samples until a model is fair on validation data, in verified rounds.

A first-order prediction for many samples at once is off by a factor of two or more, so nothing is changed at once. Every round scores all samples at
the present model, takes a step within a trust region, refits, and keeps the step only if the merit fell: utility, plus what the worst gap exceeds its
bound by, plus a price for touching data. Of the kept rounds validation data choose the fairest. None of them overshoots: a gap that has changed its
sign is unfair the other way round.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from robust_if.fairness.learners import Fitted, Learner
from robust_if.fairness.rounds import Array, Judge, Labels, Round, Validation
from robust_if.fairness.steps import ACTIONS, Action, Effects, Terms, step
from robust_if.fairness.targets import FairnessGap
from robust_if.sweep import Progress, silent
from robust_if.targets import Target

#: A step that gains less merit is not worth a refit, a third of the trust region is tried instead; a tenth of it does while a gap is too large.
WORTH = 1e-3


@dataclass(frozen=True, eq=False)
class Repair:
    """Repaired training data.

    Args:
        rounds: the training data as given, and after every kept step.
        chosen: which of them the validation data chose.
        unmet: what could not be reached, in words; empty if all gaps are within their bound, and the model still tells the classes apart.
    """

    rounds: tuple[Round, ...]
    chosen: int
    unmet: str

    @property
    def best(self) -> Round:
        """The chosen round."""
        return self.rounds[self.chosen]

    @property
    def weights(self) -> Array:
        """``(n,)`` sample weights; 0 removed."""
        return self.best.weights

    @property
    def labels(self) -> Labels:
        """``(n,)`` labels."""
        return self.best.labels

    @property
    def fitted(self) -> Fitted:
        """The model of the chosen round."""
        return self.best.fitted

    @property
    def touched(self) -> NDArray[np.bool_]:
        """``(n,)`` samples with another weight or label than given."""
        return np.asarray((self.weights != 1) | (self.labels != self.rounds[0].labels))


def repair(
    learner: Learner,
    gaps: FairnessGap | Sequence[FairnessGap],
    action: Action = "reweigh",
    *,
    bound: float = 0.005,
    max_accuracy_loss: float | None = None,
    utility: Target | None = None,
    rounds: int = 10,
    budget: float = 0.05,
    cost: float = 0.05,
    max_weight: float = 2.0,
    judge: Judge | None = None,
    time_limit: float = 20.0,
    progress: Progress = silent,
) -> Repair:
    """Change training data until gaps on validation data are within a bound.

    Args:
        learner: how models are fitted and scored, such as :class:`~robust_if.fairness.logistic.Logistic`; samples that have weights already come
            in a :class:`~robust_if.fairness.weighting.Weighted` one.
        gaps: what should become fair, on validation data; of several the largest counts. None at all repairs ``utility`` alone.
        action: ``"reweigh"`` by a linear programme, with weights from 0 to ``max_weight``; ``"remove"``; or ``"relabel"``.
        bound: of the absolute value of every gap.
        max_accuracy_loss: on validation data, from 0 to 1; no limit by default.
        utility: what should stay low; the soft error on training and validation data by default.
        rounds: at most so many steps are tried.
        budget: trust region of the first steps, as a share of all samples.
        cost: price of changing every weight by one, in units of utility.
        max_weight: largest weight of ``"reweigh"``.
        judge: hard decisions of another model for the validation samples, where the learner only stands in for it.
        time_limit: seconds for each linear programme.
        progress: wraps the rounds.

    Returns:
        All kept rounds, the chosen one, and what could not be met.

    Raises:
        ValueError: if a setting is out of range, the validation data are the training data, or the gaps are of different samples.

    Source: this project; the linear programme after Li and Liu 2022 (arXiv 2202.00787), re-scored in rounds since influences do not add (Hu et al.
    2024, "Most Influential Subset Selection", NeurIPS).
    """
    gaps = (gaps,) if isinstance(gaps, FairnessGap) else tuple(gaps)
    terms = Terms(bound, max_accuracy_loss, rounds, budget, cost, max_weight, time_limit)
    _check(gaps, learner, action)
    n, labels = len(learner.train), learner.train.batch(slice(None))[1].numpy().astype(np.int64)
    weights = np.ones(n)
    valid = Validation.of(learner, gaps, utility, judge)
    now = valid.look(learner.fit(weights, labels), weights, labels)
    kept, region, scale = [now], budget * n, 1.0
    least = -np.inf if max_accuracy_loss is None else now.accuracy - max_accuracy_loss
    effects = Effects.of(action, now, valid)
    for _ in progress(range(rounds), f"repair by {action}"):
        found = step(action, effects, now, valid, terms, region=region, scale=scale)
        met = _worst(now, valid) <= bound
        if found is None or (judge and gaps and met):
            break
        if len(np.unique(found.labels[found.weights > 0])) > 1:
            tried = valid.look(learner.fit(found.weights, found.labels, now.fitted), found.weights, found.labels, found.predicted)
            scale *= 1.0 if now.fitted.calibrated else _realised(now, tried)
            gain = _merit(now, kept[0], valid, terms) - _merit(tried, kept[0], valid, terms)
            # the decisions of another model move in jumps that no step can promise; validation data choose among them at the end
            worth = judge is not None or gain >= (WORTH if met else WORTH / 10)
            if worth and tried.accuracy >= least and not _overshoots(tried, kept[0], valid, bound):
                kept.append(tried)
                now, effects = tried, Effects.of(action, tried, valid)
                continue
        region = min(region, found.size(now)) / 3
        if region < max(1.0, budget * n / (10 if met else 500)):
            break
    chosen, unmet = _choose(kept, valid, bound, max_accuracy_loss)
    return Repair(tuple(kept), chosen, unmet)


def _merit(found: Round, first: Round, valid: Validation, terms: Terms) -> float:
    worst = float(np.abs(valid.present(found)).max(initial=0.0))
    touched = np.abs(found.weights - 1).mean() + (found.labels != first.labels).mean()
    return found.verified["utility"] + max(worst - terms.bound, 0.0) + terms.cost * float(touched)


def _worst(found: Round, valid: Validation) -> float:
    """The largest gap of hard decisions."""
    return max((abs(found.hard[name]) for name in valid.contrasts), default=0.0)


def _overshoots(tried: Round, first: Round, valid: Validation, bound: float) -> bool:
    """Whether the largest gap of hard decisions was unfair the other way round at first."""
    worst = max(valid.contrasts, key=lambda name: abs(tried.hard[name]), default=None)
    if worst is None:
        return False
    return min(abs(tried.hard[worst]), abs(first.hard[worst])) > bound and tried.hard[worst] * first.hard[worst] < 0


def _realised(now: Round, tried: Round) -> float:
    """How much of the predicted change came true, where scores only rank."""
    predicted = sum(abs(tried.predicted[name] - value) for name, value in now.verified.items())
    came = sum(abs(tried.verified[name] - value) for name, value in now.verified.items())
    return float(np.clip(came / max(predicted, 1e-12), 0.01, 100.0))


def _choose(kept: Sequence[Round], valid: Validation, bound: float, loss: float | None) -> tuple[int, str]:
    """The round with the smallest gap beyond the bound, then the highest accuracy; and what is not met."""
    worst = [_worst(found, valid) for found in kept]
    chosen = min(range(len(kept)), key=lambda at: (max(worst[at] - bound, 0.0), -kept[at].accuracy))
    unmet = []
    if worst[chosen] > bound:
        names, limit = " and ".join(gap.notion for gap in valid.gaps), "" if loss is None else f" at an accuracy loss of at most {loss:g}"
        unmet.append(f"{names} within {bound:g} cannot be met{limit}: the best found on validation data is {worst[chosen]:.4f}, from {worst[0]:.4f}")
    if len(np.unique(kept[chosen].decisions)) < 2:
        unmet.append("the model decides for one class only, which is equal for all groups and of no use")
    return chosen, "; ".join(unmet)


def _check(gaps: Sequence[FairnessGap], learner: Learner, action: str) -> None:
    if action not in ACTIONS:
        raise ValueError(f"action: expected one of {', '.join(ACTIONS)}, got {action!r}")
    for gap in gaps:
        gap.check(learner.train)
        if not all(map(torch.equal, gap.data.batch(slice(None))[:2], gaps[0].data.batch(slice(None))[:2])):
            raise ValueError(f"gaps: expected all of them on the same validation samples, got others of {gaps[0].notion} and of {gap.notion}")
