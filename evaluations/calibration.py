"""Scores with a threshold that promises a rate of false positives, calibrated on clean held-out samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from robust_if.checkpoints import Checkpoint
from robust_if.data import Samples, concatenate
from robust_if.decisions import threshold_at
from robust_if.estimators import Estimator
from robust_if.scores import Scores
from robust_if.sweep import Sweep
from robust_if.targets import Target
from robust_if.task import Task


def calibrated(
    estimator: Estimator,
    task: Task,
    train: Samples,
    *,
    target: Target,
    clean: Samples,
    false_positives: float = 0.01,
    goal_class: int | None = None,
    checkpoints: Sequence[Checkpoint] = (),
    sweep: Sweep = Sweep(),  # noqa: B008 - frozen
) -> tuple[Scores, float]:
    """Scores of the training samples, and the threshold that at most a share of clean samples is expected to exceed.

    Training and clean samples are scored in one pass, so that ranks too can be compared. The promise holds where a clean training sample is like a
    held-out one; a model that remembers its training samples scores them lower, which keeps the promise, or higher, which breaks it, so measure the
    rate where you know the truth.

    Args:
        clean: held-out samples ``(x, y)`` that ``target`` does not look at.
        false_positives: share strictly between 0 and 1, of all clean samples.
        goal_class: samples of other labels are put below all samples that carry this one, see :meth:`robust_if.Scores.put_first`.

    Returns:
        Scores ``(n,)`` of ``train``, and the threshold in their unit, for :func:`robust_if.remove_above`.

    Raises:
        ValueError: if there are too few clean samples for the promise.
    """
    n = len(train)
    threshold_at(Scores(np.zeros(len(clean)), clean.ids, "check"), false_positives)  # refused before the long work
    both = concatenate([train, clean])
    found = estimator.score(task, train, target=target, samples=both, checkpoints=checkpoints, sweep=sweep)
    if goal_class is not None:
        found = found.put_first(both.labels.cpu().numpy() == goal_class)
    parts = [
        replace(
            found, values=found.values[rows], ids=ids, members=None if found.members is None else found.members[:, rows],
            suggestions=None if found.suggestions is None else found.suggestions[rows],
        )
        for rows, ids in ((slice(0, n), train.ids), (slice(n, None), clean.ids))
    ]  # fmt: skip
    return parts[0], threshold_at(parts[1], false_positives)
