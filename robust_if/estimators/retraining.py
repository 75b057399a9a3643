"""The oracle: leave samples out, train again, and look at the target."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np
from numpy.typing import ArrayLike

from robust_if.estimators.base import Estimator, Job, Result
from robust_if.scores import Units
from robust_if.training import Recipe, fit


@dataclass(frozen=True)
class Retraining(Estimator):
    """T(trained on all) − T(trained without the sample), in units of the target; exact up to the randomness of training.

    Every run starts at the task's present parameters, so pass an untrained model, or a trained one for warm starts.

    Args:
        recipe: how to train.
        groups: ``(n,)`` group number of every training sample: leave one group out at a time, and give its effect to all its samples. Leave-one-out
            without it.
        seeds: the target is averaged over training runs with these seeds, the same for every group.

    Source: leave-one-out retraining; Koh and Liang 2017 (arXiv 1703.04730), section 4.1, for its use as ground truth.
    """

    recipe: Recipe = field(default_factory=Recipe)
    groups: tuple[int, ...] | None = None
    seeds: tuple[int, ...] = (0,)
    units: ClassVar[Units] = "target"

    @property
    def name(self) -> str:
        return "leave-one-out" if self.groups is None else "leave-group-out"

    def estimate(self, job: Job) -> Result:
        n = len(job.train)
        if job.samples is not job.train:
            raise ValueError("samples: retraining can only leave out training samples; do not pass samples")
        groups = np.arange(n) if self.groups is None else np.asarray(self.groups)
        if groups.shape != (n,):
            raise ValueError(f"groups: expected one number per training sample, shape ({n},), got {groups.shape}")
        everything = self._target(job, np.ones(n))
        effects = {
            int(group): everything - self._target(job, (groups != group).astype(np.float64))
            for group in job.sweep.progress(np.unique(groups).tolist(), job.name)
        }
        return Result(np.array([effects[int(group)] for group in groups]))

    def _target(self, job: Job, weights: ArrayLike) -> float:
        values = []
        for seed in self.seeds:
            task = fit(job.task, job.train, replace(self.recipe, seed=seed), weights=weights)
            values.append(float(job.target.value(task, task.params())))
        return float(np.mean(values))


