"""The inverse by a stochastic Neumann series."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch

from robust_if.curvature import Curvature, Kind, automatic_damping, check, flatten, mean_eigenvalue, residual, subset
from robust_if.data import Samples
from robust_if.layers import Factors
from robust_if.preconditioners.base import Inverse, Preconditioner, Solution
from robust_if.sweep import Sweep
from robust_if.task import Params, Task

#: By how much the automatic scale exceeds the largest eigenvalue, since that of a batch is larger than that of the mean.
HEADROOM = 2.0


@dataclass(frozen=True)
class LiSSA(Preconditioner):
    """(C + λI)⁻¹ v by r ← v + r − (C_b r + λ r) / σ with the curvature C_b of a batch drawn anew in every step; the result is r / σ.

    Components along an eigenvalue e of C need about σ / (e + λ) steps, so a small damping takes thousands of them, and batches leave noise that only
    larger batches or more repeats reduce. :class:`~robust_if.ConjugateGradient` needs fewer products; this is here for comparison.

    Args:
        curvature: of the mean training loss: ``"ggn"``, ``"hessian"`` or ``"fisher"`` (:class:`~robust_if.curvature.Curvature`).
        damping: λ; a tenth of the curvature's mean eigenvalue by default.
        iterations: steps per repeat.
        batch_size: samples per step; the series is deterministic where it reaches ``samples``.
        scale: σ, at least half the largest eigenvalue of every C_b + λI; by default twice that of C + λI, by power iteration.
        repeats: independent runs that are averaged.
        tolerance: the residual ‖(C + λI) x − v‖ / ‖v‖ up to which the result counts as converged.
        samples: over how many training samples the curvature is averaged, drawn by ``seed``; ``None`` for all. Batches are drawn from these.
        seed: of all draws; every direction sees the same batches.

    Raises:
        ValueError: if a setting is out of range; when it is applied, if the series diverges.

    Source: Agarwal et al. 2017, "Second-Order Stochastic Optimization for Machine Learning in Linear Time" (arXiv 1602.03943), section 3; as an
    influence function Koh and Liang 2017 (arXiv 1703.04730), section 3.
    """

    curvature: Kind = "ggn"
    damping: float | None = None
    iterations: int = 200
    batch_size: int = 100
    scale: float | None = None
    repeats: int = 1
    tolerance: float = 0.1
    samples: int | None = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        check(self.curvature, self.damping, self.samples)
        for name in ("iterations", "batch_size", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.scale is not None and not self.scale > 0:
            raise ValueError(f"scale: expected a positive number, got {self.scale}")
        if not 0 < self.tolerance < 1:
            raise ValueError(f"tolerance: expected a number between 0 and 1, got {self.tolerance}")

    @property
    def name(self) -> str:
        return "lissa"

    def build(self, task: Task, params: Params, data: Samples, sweep: Sweep, factors: Factors | None = None) -> Inverse:
        whole = Curvature(task, params, subset(data, self.samples, self.seed), self.curvature, sweep.batch_size)
        damping = automatic_damping(mean_eigenvalue(whole, self.seed)) if self.damping is None else self.damping
        scale = HEADROOM * (largest_eigenvalue(whole, self.seed) + damping) if self.scale is None else self.scale
        if not scale > 0:
            raise ValueError("scale: the curvature and the damping are 0, so there is nothing to invert; pass a positive damping")

        def inverse(vector: Params) -> Solution:
            total = {name: torch.zeros_like(value) for name, value in vector.items()}
            for repeat in range(self.repeats):
                r = vector
                for batch in self._batches(whole, repeat):
                    image = batch(r)
                    r = {name: v + r[name] - (image[name] + damping * r[name]) / scale for name, v in vector.items()}
                total = {name: total[name] + value / (self.repeats * scale) for name, value in r.items()}
            if not all(torch.isfinite(value).all() for value in total.values()):
                raise ValueError(f"scale: the series of LiSSA diverged at {scale:.3g}; pass a larger scale, larger batches or a larger damping")
            left = residual(whole, damping, flatten(total), flatten(vector))
            notes = {"damping": damping, "iterations": self.iterations * self.repeats, "residual": left, "converged": left <= self.tolerance}
            return Solution(total, {**notes, "scale": scale})

        return inverse

    def _batches(self, whole: Curvature, repeat: int) -> Iterator[Curvature]:
        """The curvature of one batch per step."""
        draw, count = np.random.default_rng((self.seed, repeat)), len(whole.data)
        for _ in range(self.iterations):
            if self.batch_size >= count:
                yield whole
            else:
                yield replace(whole, data=whole.data.take(np.sort(draw.choice(count, self.batch_size, replace=False))))


def largest_eigenvalue(curvature: Curvature, seed: int = 0, steps: int = 10) -> float:
    """The eigenvalue of largest magnitude, from below, by power iteration from a random vector."""
    vector = np.random.default_rng(seed).normal(size=curvature.size)
    length = 0.0
    for _ in range(steps):
        vector = curvature.flat(vector / np.linalg.norm(vector))
        length = float(np.linalg.norm(vector))
        if length == 0:
            break
    return length
