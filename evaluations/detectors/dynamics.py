"""Poison as samples that a fresh model learns earlier or later than others."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from robust_if.estimators.base import Estimator, Job, Result
from robust_if.estimators.baselines import losses
from robust_if.evaluations.detectors.features import class_labels, class_logits
from robust_if.task import Batch, Task
from robust_if.training import Recipe, fit, train


@dataclass(frozen=True)
class AUM(Estimator):
    """−1 times the area under the margin: the label's logit minus the largest other one, averaged over the checkpoints of a fresh training.

    A wrong label is fitted late and against the others, so its margin is small or negative for most of the training. All checkpoints count the same.
    Margins are those of the model in evaluation mode after an epoch, where the paper takes them on the way through it. The model's own parameters are
    not used.

    Args:
        recipe: the training; its ``keep`` says after how many of the epochs the margin is taken.
        seed: draws the initial parameters.

    Source: Pleiss et al. 2020 (arXiv 2001.10528), section 3.1. There the training stops before the learning rate drops, hence the constant one.
    """

    recipe: Recipe = field(default_factory=lambda: Recipe(epochs=20, keep=20, schedule="constant"))
    seed: int = 0
    needs_target: ClassVar[bool] = False

    @property
    def name(self) -> str:
        return "aum"

    def estimate(self, job: Job) -> Result:
        class_labels(job.samples)
        checkpoints = train(job.task.reset(self.seed), job.train, self.recipe, progress=job.sweep.progress)
        margins = [_margins(replace(job, name=f"{job.name}-{k}"), job.task.at(each.state)) for k, each in enumerate(checkpoints)]
        return Result(-np.mean(margins, axis=0))


def _margins(job: Job, task: Task) -> NDArray[np.float64]:
    params = task.params()
    with torch.no_grad():
        return job.map(lambda batch: margin(class_logits(task, params, batch), batch[1]))


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """The label's logit minus the largest of the others, ``(B,)``, for ``logits (B, K)``; with two classes labels may also be −1 and 1."""
    own = (labels.clamp(min=0) if logits.shape[1] == 2 else labels).long()[:, None]
    return logits.gather(1, own)[:, 0] - logits.scatter(1, own, -torch.inf).amax(1)


@dataclass(frozen=True)
class EarlyLoss(Estimator):
    """−1 times the loss after a short training that holds every loss near γ: the isolation stage of anti-backdoor learning (ABL).

    The training minimises sign(ℓ − γ) ℓ: what falls below γ is pushed up again, and what is learnt fastest, as a trigger is, stays low nevertheless.
    The model's own parameters are not used.

    Args:
        recipe: the short training, a fifth of a full one as published.
        gamma: γ, in the unit of the loss.
        seed: draws the initial parameters.

    Source: Li et al. 2021 (arXiv 2110.11571), section 3.2.

    Raises:
        ValueError: if ``gamma`` is negative.
    """

    recipe: Recipe = field(default_factory=lambda: Recipe(epochs=5, schedule="constant"))
    gamma: float = 0.5
    seed: int = 0
    needs_target: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not self.gamma >= 0:
            raise ValueError(f"gamma: expected at least 0, got {self.gamma}")

    @property
    def name(self) -> str:
        return "early-loss"

    def estimate(self, job: Job) -> Result:
        def held_near_gamma(outputs: Any, batch: Batch) -> Tensor:
            loss = job.task.loss(outputs, batch)
            return (loss - self.gamma).sign() * loss

        task = fit(replace(job.task.reset(self.seed), loss=held_near_gamma), job.train, self.recipe, progress=job.sweep.progress)
        task = replace(task, loss=job.task.loss)
        return Result(-losses(job, task, task.params()))
