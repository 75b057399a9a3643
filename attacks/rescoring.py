"""Training samples chosen anew while a model is trained, by their influence on a target such as the loss under attack."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from robust_if.attacks.evasion import Attack
from robust_if.data import Samples, as_samples, batches
from robust_if.decisions import remove_top
from robust_if.estimators import Estimator, InnerProduct, Random
from robust_if.scores import Scores
from robust_if.sweep import fingerprint
from robust_if.targets import Target
from robust_if.task import Task

Rule = Literal["harmful", "learnt", "random"]


@dataclass(frozen=True, eq=False)
class Rescoring:
    """Every few epochs scores the training samples at the parameters of that moment, and leaves some out until the next time.

    It is a :class:`~robust_if.training.Reweigh`: give it to ``train`` or ``fit`` as ``reweigh``. All samples are scored each time, also those that
    were left out, so that each can come back. A choice depends on the model, the epoch and the settings alone, so that a resumed training makes the
    same.

    Rules:

    * ``"harmful"``: leaves out the samples of highest score, those whose removal is predicted to lower the target most, but none at or below 0.
    * ``"learnt"``: draws samples with a probability in proportion to |score|, and weighs those that are drawn by the inverse of it, so that the
      weighted loss stays what it was in the mean. What is learnt already has next to no gradient, hence next to no influence, and is seldom drawn; a
      probability is never below half of ``keep``, so that no weight is large.
    * ``"random"``: leaves samples out at random: the control.

    Args:
        train: the training samples, those that ``train`` is given.
        target: on held-out samples; :class:`~robust_if.attacks.targets.AdversarialLoss` for robustness.
        estimator: scores them; the plain inner product of gradients by default, which costs two forward passes.
        attack: applied to the training samples before they are scored, so that they are scored by their gradients under attack, which are the ones
            that adversarial training sums; none by default. One step (:class:`~robust_if.attacks.evasion.FGSM`) costs about four forward passes.
        rule: one of the above.
        keep: share of the samples that stays, in ``"harmful"`` at least.
        start: the first epoch, counted from 0, before which samples are chosen; the scores of an untrained model tell nothing.
        every: epochs from one choice to the next.
        seed: of what is drawn.

    Raises:
        ValueError: if a number is out of range, the rule is unknown, or the target is measured on the training samples.

    Source: the scores are those of Yang et al. 2026 (arXiv 2405.17490); leaving out what is learnt and keeping the loss unbiased by weights is the
    idea of InfoBatch, Qin et al. 2024 (arXiv 2303.04947), which goes by the loss.
    """

    train: Samples = field(repr=False)
    target: Target = field(repr=False)
    estimator: Estimator = InnerProduct()  # noqa: RUF009 - frozen
    attack: Attack | None = field(default=None, kw_only=True)
    rule: Rule = field(default="harmful", kw_only=True)
    keep: float = field(default=0.9, kw_only=True)
    start: int = field(default=5, kw_only=True)
    every: int = field(default=5, kw_only=True)
    seed: int = field(default=0, kw_only=True)
    #: Digest of the training and held-out samples, by which a training directory knows them.
    data: str = field(init=False)

    def __post_init__(self) -> None:
        if self.rule not in get_args(Rule):
            raise ValueError(f"rule: expected one of {', '.join(get_args(Rule))}, got {self.rule!r}")
        if not 0 < self.keep <= 1:
            raise ValueError(f"keep: expected a share above 0 and up to 1, got {self.keep}")
        for name, least in (("start", 0), ("every", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: expected at least {least}, got {getattr(self, name)}")
        object.__setattr__(self, "train", as_samples(self.train))
        self.target.check(self.train)
        parts = [fingerprint({}, each) for each in (self.train, *self.target.held_out)]
        object.__setattr__(self, "data", fingerprint({}, self.train, parts, self.target))

    def __call__(self, task: Task, epoch: int) -> NDArray[np.float64] | None:
        """Weights ``(n,)`` in the epochs ``start``, ``start + every``, …, ``None`` in others."""
        if epoch < self.start or (epoch - self.start) % self.every:
            return None
        scores, draws = self.scores(task, epoch), np.random.default_rng([self.seed, epoch])
        if self.rule == "learnt":
            chances = probabilities(np.abs(scores.values), self.keep)
            return np.asarray((draws.random(len(chances)) < chances) / chances)
        weights = remove_top(scores, fraction=1 - self.keep)
        return weights if self.rule == "random" else np.where(scores.values > 0, weights, 1.0)

    def scores(self, task: Task, epoch: int = 0) -> Scores:
        """Of all training samples, at the parameters of ``task``."""
        if self.rule == "random":
            return Random(int(np.random.default_rng([self.seed, epoch]).integers(2**31))).score(task, self.train)
        samples = self.train if self.attack is None else attacked(task, self.train, self.attack)
        return self.estimator.score(task, samples, target=self.target)


def attacked(task: Task, data: Any, attack: Attack, *, batch_size: int = 256) -> Samples:
    """The samples with their inputs as the attack leaves them at the parameters of ``task``, with their ids.

    Scored in place of the clean ones, their gradients are those of the loss under attack, the attacked points taken as fixed (Danskin's theorem).
    """
    samples, params = as_samples(data), task.params()
    parts = [(attack(task, params, batch), *batch[1:]) for batch in batches(samples, batch_size, next(iter(params.values())))]
    return Samples(tuple(torch.cat(each) for each in zip(*parts, strict=True)), samples.ids)


def probabilities(sizes: NDArray[np.float64], mean: float) -> NDArray[np.float64]:
    """Probabilities ``(n,)`` with the given mean, in proportion to ``sizes`` where that is neither below half the mean nor above 1."""
    if not sizes.any():
        return np.full(len(sizes), mean)
    low, high = mean / 2 / float(sizes.max()), 1 / float(sizes[sizes > 0].min())
    for _ in range(100):  # the mean grows with the factor, which is halved on a logarithmic scale
        middle = np.sqrt(low) * np.sqrt(high)
        low, high = (middle, high) if np.clip(middle * sizes, mean / 2, 1).mean() < mean else (low, middle)
    return np.asarray(np.clip(high * sizes, mean / 2, 1))
