"""Poison as inputs whose prediction survives being mixed with other inputs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from robust_if.data import batches, concatenate, to
from robust_if.estimators.base import Estimator, Job, Result
from robust_if.evaluations.detectors.features import class_logits
from robust_if.task import Batch


@dataclass(frozen=True)
class STRIP(Estimator):
    """−1 times the mean entropy, in nats, of the predictions for a sample mixed with clean held-out ones.

    A trigger that decides the prediction whatever else is in the input keeps the entropy low. The held-out samples are those of the target, of which
    nothing else is used; every training sample is mixed with the same ones. Inputs must be floating-point tensors: tokens cannot be mixed.

    Args:
        count: held-out samples that are drawn; all where there are fewer.
        bounds: smallest and largest valid input. Inputs are mixed as images are added, above the smallest and cut off at the largest, so that a white
            patch stays white. ``None`` for inputs without bounds, such as tables, whose mixture is the mean of the two.
        seed: draws the held-out samples.

    Source: Gao et al. 2019 (arXiv 1902.06531), section IV, where the inputs are those at test time.

    Raises:
        ValueError: if ``count`` is below 1, or an input is not floating-point, lies outside ``bounds``, or has not the held-out ones' shape.
    """

    count: int = 50
    bounds: tuple[float, float] | None = (0.0, 1.0)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"count: expected at least 1, got {self.count}")
        if self.bounds is not None and not self.bounds[0] < self.bounds[1]:
            raise ValueError(f"bounds: expected (low, high) with low < high, got {self.bounds}")

    @property
    def name(self) -> str:
        return "strip"

    def estimate(self, job: Job) -> Result:
        held_out, like = concatenate(job.target.held_out), next(job.task.model.parameters())
        drawn = np.random.default_rng(self.seed).choice(len(held_out), min(self.count, len(held_out)), replace=False)
        others = self._inputs(to(held_out.take(drawn).batch(slice(None)), like))
        for batch in batches(job.samples, job.sweep.batch_size, like):
            x = self._inputs(batch)
            if x.shape[1:] != others.shape[1:]:
                raise ValueError(f"target: expected held-out inputs of shape {tuple(x.shape[1:])} as in the data, got {tuple(others.shape[1:])}")
        params = job.params

        def entropy(batch: Batch) -> Tensor:
            total = torch.zeros(len(batch[0])).to(others)
            for other in others:
                log_p = class_logits(job.task, params, (self._mixed(batch[0], other), *batch[1:])).log_softmax(1)
                total -= (log_p.exp() * log_p).sum(1)
            return total / len(others)

        with torch.no_grad():
            return Result(-job.map(entropy))

    def _mixed(self, x: Tensor, other: Tensor) -> Tensor:
        if self.bounds is None:
            return (x + other) / 2
        low, high = self.bounds
        return (x + other - low).clamp(low, high)

    def _inputs(self, batch: Batch) -> Tensor:
        x = batch[0] if isinstance(batch, (tuple, list)) else batch
        if not isinstance(x, Tensor) or not x.is_floating_point():
            got = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"data: strip mixes inputs, so it needs samples (x, y) with floating-point x, got {got}")
        if self.bounds is not None:
            low, high = self.bounds
            slack = 1e-5 * (high - low)
            if x.min() < low - slack or x.max() > high + slack:
                raise ValueError(
                    f"bounds: expected inputs within {self.bounds}, got some from {float(x.min()):g} to {float(x.max()):g}; "
                    "give their own bounds, or None where there are none"
                )
        return x
