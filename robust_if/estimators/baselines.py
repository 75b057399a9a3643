"""The cheap scores that every other one has to beat."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from robust_if.data import concatenate
from robust_if.estimators.base import Estimator, Job, Result
from robust_if.task import Params, Task
from robust_if.training import Recipe, fit
from robust_if.tuning import Tuning


@dataclass(frozen=True)
class Random(Estimator):
    """Uniform random numbers, the floor. Looks at no target."""

    seed: int = 0
    needs_target: ClassVar[bool] = False

    @property
    def name(self) -> str:
        return "random"

    def estimate(self, job: Job) -> Result:
        return Result(np.random.default_rng(self.seed).uniform(size=len(job.samples)))


@dataclass(frozen=True)
class Loss(Estimator):
    """The loss of every sample at the trained parameters. Looks at no target."""

    needs_target: ClassVar[bool] = False

    @property
    def name(self) -> str:
        return "loss"

    def estimate(self, job: Job) -> Result:
        return Result(losses(job, job.task, job.params))


@dataclass(frozen=True)
class TunedLoss(Estimator):
    """The loss of every sample after the parameters were tuned on the target; the baseline that the flat-minimum score has to beat."""

    tuning: Tuning = field(default_factory=Tuning)

    @property
    def name(self) -> str:
        return "tuned-loss"

    def estimate(self, job: Job) -> Result:
        return Result(losses(job, job.task, self.tuning.run(job.task, job.target, job.sweep.progress)))


@dataclass(frozen=True)
class ValidationLoss(Estimator):
    """The loss of every sample under a fresh model that was trained on the target's held-out data alone, and so never saw a wrong label.

    Args:
        recipe: how that model is trained.
        seed: draws its initial parameters.
    """

    recipe: Recipe = field(default_factory=lambda: Recipe(epochs=100, lr=0.05, batch_size=32))
    seed: int = 0

    @property
    def name(self) -> str:
        return "valid-only"

    def estimate(self, job: Job) -> Result:
        task = fit(job.task.reset(self.seed), concatenate(job.target.held_out), self.recipe, progress=job.sweep.progress)
        return Result(losses(job, task, task.params()))


def losses(job: Job, task: Task, params: Params) -> NDArray[np.float64]:
    """The losses of the job's samples under ``task`` at ``params``, ``(n,)``."""
    with torch.no_grad():
        return job.map(lambda batch: task.losses(params, batch))
