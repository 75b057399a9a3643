"""Unlearning as a detector: what the model forgets together with the most suspicious samples was taught with them.

Who holds triggered inputs needs no more than :class:`~robust_if.LossChange` with the target ``AttackSuccess(inputs, goal_class=c) + Utility(valid)``,
and puts the samples that carry the goal class first. Without triggered inputs the training set itself has to lend the suspects.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import torch

from robust_if.data import Samples
from robust_if.estimators.base import Estimator, Job, Result
from robust_if.estimators.baselines import ValidationLoss
from robust_if.estimators.ensemble import scaled_ranks
from robust_if.estimators.train_on_validation import LossChange
from robust_if.predictions import Certainty
from robust_if.task import Task
from robust_if.tuning import Plain, Tuning


@dataclass(frozen=True)
class Unlearning(Estimator):
    """The larger of two ranks: of a first suspicion, and of how much a sample's loss rises when the most suspicious samples are unlearnt.

    The ``share`` of samples with the largest first suspicion, S, are unlearnt: the parameters θ are tuned for a short while on
    T + mean over S of −log(1 − p_y), with T the loss on clean validation data, and a sample scores ℓ_i(θ̃) − ℓ_i(θ). Samples that were taught by one
    trigger are forgotten together, those in S and those missed; samples that are only hard share nothing with one another, and what they have in
    common with clean data T holds fast. Flips that follow no pattern are found by the first suspicion, hence the larger of the two.

    The target must look at clean held-out data ``(x, y)`` with class labels; no triggered input is needed, and nothing is known of the attack.
    ``members`` of the scores are the two ranks in [0, 1], ``(2, n)``.

    Args:
        suspicion: gives the first scores; by default the loss under a fresh model of the validation data alone, which never saw the trigger.
        share: of samples that are unlearnt. It need not match the share of poison.
        tuning: how the samples are unlearnt.

    Raises:
        ValueError: if ``share`` is not strictly between 0 and 1.

    Source: this project. Raising the loss of the most suspicious few to find or to forget the rest is the idea of anti-backdoor learning (Li et al.
    2021, arXiv 2110.11571), where they are those of small early loss; the score is that of "Train on Validation" (Jain et al. 2026,
    arXiv 2510.00386).
    """

    suspicion: Estimator = field(default_factory=ValidationLoss)
    share: float = 0.05
    tuning: Tuning = field(default_factory=lambda: Tuning(steps=100, flatness=Plain()))

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ValueError(f"share: expected a share strictly between 0 and 1, got {self.share}")

    @property
    def name(self) -> str:
        return "unlearning"

    def check(self, task: Task) -> None:
        self.suspicion.check(task)

    def estimate(self, job: Job) -> Result:
        first = self.suspicion.estimate(replace(job, name=f"{job.name}-suspicion")).values
        top = np.argsort(-first, kind="stable")[: max(1, round(self.share * len(first)))]
        unlearnt = Certainty(Samples(tuple(job.samples.batch(torch.from_numpy(top))[:2])))
        change = LossChange(self.tuning).estimate(replace(job, targets=(unlearnt + job.target,), name=f"{job.name}-change")).values
        ranks = scaled_ranks(np.stack([first, change]))
        return Result(ranks.max(0), members=ranks, notes={"unlearnt": len(top)})
