"""Training on the target and watching the training samples, instead of the other way round."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from robust_if.estimators.base import Estimator, Job, Result
from robust_if.tuning import Plain, Tuning


@dataclass(frozen=True)
class LossChange(Estimator):
    """ℓ_i(θ̃) − ℓ_i(θ), with θ̃ tuned from θ on the target for a short while: a sample whose loss rises when the target falls is harmful.

    To first order in the learning rate this is the inner product (IP); a longer tuning adds the curvature along its path. It takes the tuning and two
    forward passes over the samples, no gradient of theirs, and works for any target.

    Args:
        tuning: how θ̃ is found; a few steps, since the change is of interest and not the minimum.

    Source: Jain, Montanari and Sasoglu 2026, "Train on Validation" (ICLR 2026, arXiv 2510.00386), who choose the samples that change most; here the
    sign is kept, since harmful samples are asked for.
    """

    tuning: Tuning = field(default_factory=lambda: Tuning(steps=100, flatness=Plain()))

    @property
    def name(self) -> str:
        return "loss-change"

    def estimate(self, job: Job) -> Result:
        task, before = job.task, job.params
        after = self.tuning.run(task, job.target, job.sweep.progress)
        with torch.no_grad():
            return Result(job.map(lambda batch: task.losses(after, batch) - task.losses(before, batch)))
