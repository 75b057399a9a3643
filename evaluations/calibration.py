"""Thresholds that promise a rate of false positives, calibrated on clean held-out samples, and raised until an attack no longer works."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from robust_if.checkpoints import Checkpoint
from robust_if.data import Samples, concatenate
from robust_if.decisions import remove_above, threshold_at
from robust_if.estimators import Estimator
from robust_if.scores import Scores
from robust_if.sweep import Sweep
from robust_if.targets import Target
from robust_if.task import Task

#: Rates of false positives that are tried one after another.
RATES = (0.01, 0.02, 0.05, 0.1)
#: Success up to which an attack counts as ended, and by how much a larger rate has to lower it to be worth its false positives.
ENDED, SLACK = 0.02, 0.05


def calibrated(
    estimator: Estimator,
    task: Task,
    train: Samples,
    *,
    target: Target,
    clean: Samples,
    goal_class: int | None = None,
    checkpoints: Sequence[Checkpoint] = (),
    sweep: Sweep = Sweep(),  # noqa: B008 - frozen
) -> tuple[Scores, Scores]:
    """Scores of the training samples and of clean ones, in one pass, so that ranks too can be compared.

    Args:
        clean: held-out samples ``(x, y)`` that ``target`` does not look at.
        goal_class: samples of other labels are put below all samples that carry this one, see :meth:`robust_if.Scores.put_first`.

    Returns:
        Scores of ``train``, and those of ``clean``, which :func:`robust_if.threshold_at` makes a threshold of.
    """
    n, both = len(train), concatenate([train, clean])
    found = estimator.score(task, train, target=target, samples=both, checkpoints=checkpoints, sweep=sweep)
    if goal_class is not None:
        found = found.put_first(both.labels.cpu().numpy() == goal_class)

    def part(rows: slice, samples: Samples) -> Scores:
        members = None if found.members is None else found.members[:, rows]
        suggestions = None if found.suggestions is None else found.suggestions[rows]
        return replace(found, values=found.values[rows], ids=samples.ids, members=members, suggestions=suggestions)

    return part(slice(0, n), train), part(slice(n, None), clean)


def thresholds(clean: Scores, rates: Sequence[float] = RATES) -> list[tuple[float, float]]:
    """Rates of false positives and the thresholds that promise them; rates that so few clean samples cannot promise are left out.

    Every threshold holds where a clean training sample is like a held-out one. A model that remembers its training samples scores them lower, which
    keeps the promise, or higher, which breaks it, so measure the rate where you know the truth.

    Raises:
        ValueError: if the clean samples are too few for any of the rates.
    """
    possible = [rate for rate in rates if rate * (len(clean) + 1) >= 1 - 1e-9] or [max(rates)]
    return [(rate, threshold_at(clean, rate)) for rate in possible]


@dataclass(frozen=True)
class Removed:
    """What a threshold removes.

    Args:
        weights: ``(n,)``, 0 for the samples that are removed.
        threshold: in the unit of the scores.
        false_positives: the share of clean samples that it promises to remove at most.
        success: of the attack on a model trained without what was removed.
    """

    weights: NDArray[np.float64]
    threshold: float
    false_positives: float
    success: float


def remove_until_ended(
    scores: Scores, known: Sequence[tuple[float, float]], success: Callable[[NDArray[np.float64]], float], *, usual: float = 0.0
) -> Removed:
    """Remove at the smallest rate of false positives that ends the attack, or brings it nearly as far down as any rate does.

    A larger rate is not tried where it would remove more than half of the samples.

    Args:
        scores: of the training samples.
        known: rising rates with their thresholds, see :func:`thresholds`.
        success: trains a model with the given weights ``(n,)`` and says how well the attack still works on inputs at hand, 0 to 1.
        usual: what a model says of them that never saw poison; a trigger on a table or in a text may be taken for the goal class by itself.

    Raises:
        ValueError: if all training samples would be removed.
    """
    tried: list[Removed] = []
    for rate, threshold in known:
        weights = remove_above(scores, threshold)
        if tried and weights.mean() < 0.5:
            break
        if not weights.any():
            raise ValueError(f"scores: a threshold for {rate:g} of the clean samples would remove all {len(scores)} samples")
        tried.append(Removed(weights, threshold, rate, success(weights)))
        if tried[-1].success <= max(ENDED, usual):
            break
    lowest = min(each.success for each in tried)
    return next(each for each in tried if each.success <= max(ENDED, usual, lowest + SLACK))
