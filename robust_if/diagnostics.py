"""What can be said before an influence function is paid for."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from robust_if.curvature import LARGEST, Curvature, flatten, subset
from robust_if.data import as_samples
from robust_if.preconditioners.conjugate_gradient import ConjugateGradient
from robust_if.sweep import Sweep
from robust_if.targets import Target
from robust_if.task import Task

#: The residual up to which the solution counts as found.
LOOSE = 0.1


@dataclass(frozen=True)
class Prediction:
    """How far the inner product is from the influence function, for one target.

    Args:
        correlation: the predicted Pearson correlation of their scores, from 0 to 1.
        angle: between ∇T and H⁻¹ ∇T, in degrees.
        damping: the λ in H = C + λI.
        residual: of the solution H⁻¹ ∇T; unless it is small, ``correlation`` is an upper bound.
        advice: one sentence.
    """

    correlation: float
    angle: float
    damping: float
    residual: float
    advice: str

    def __str__(self) -> str:
        bound = "" if self.residual <= LOOSE else f" at most (the solver stopped at a residual of {self.residual:.2g})"
        return f"predicted correlation of IP and IF{bound} {self.correlation:.3f}, angle {self.angle:.0f}°, damping {self.damping:.3g}: {self.advice}"


def predicted_correlation(
    task: Task,
    train: Any,
    target: Target,
    *,
    damping: float | None = None,
    samples: int | None = 500,
    iterations: int = 12,
    seed: int = 0,
    sweep: Sweep = Sweep(),  # noqa: B008 - frozen
) -> Prediction:
    """The correlation of IP and influence scores that is to be expected: ‖v‖² / √(vᵀH⁻¹v · vᵀHv) with v = ∇T.

    H is the damped Gauss-Newton matrix of a subsample, and H⁻¹ v comes from a few conjugate gradient steps: about 20 products, a small part of what
    the influence function costs. The formula holds where the second moment of the training gradients is proportional to H, as near the minimum of a
    log-likelihood; with label noise, or on a network that was not trained to convergence, it is a rough guide.

    Args:
        train: training data.
        damping: λ; a tenth of the mean eigenvalue by default. The larger it is, the closer are the two.
        samples: training samples over which the curvature is averaged; ``None`` for all.
        iterations: conjugate gradient steps.

    Raises:
        ValueError: if ∇T is zero, or a setting is out of range.

    Source: the inequality of Kantorovich bounds it from below by the condition number of H; the question is that of Yang et al. 2026
    (arXiv 2405.17490).
    """
    solver = ConjugateGradient("ggn", damping, iterations=iterations, tolerance=1e-3, samples=samples, seed=seed)
    params, data = task.params(), as_samples(train)
    slope = target.gradient(task, params)
    v = flatten(slope)
    if not v.any():
        raise ValueError(f"target: the gradient of {target.name} is zero, so no sample has an influence")
    solution = solver.build(task, params, data, sweep)(slope)
    u, used = flatten(solution.direction), float(solution.notes["damping"])
    image = Curvature(task, params, subset(data, samples, seed), "ggn", sweep.batch_size).flat(v) + used * v
    correlation = min(1.0, float(v @ v / math.sqrt((v @ u) * (v @ image))))
    cosine = float(v @ u / (np.linalg.norm(v) * np.linalg.norm(u)))
    angle = math.degrees(math.acos(max(-1.0, min(1.0, cosine))))
    return Prediction(correlation, angle, used, float(solution.notes["residual"]), _advice(correlation, len(v)))


def _advice(correlation: float, size: int) -> str:
    if correlation >= 0.95:
        return "the inner product orders samples almost as the influence function does, so curvature is not worth its cost"
    precise = "exact-ggn" if size <= LARGEST else "ekfac-cg"
    change = "part of the order" if correlation >= 0.7 else "the order"
    return f"curvature changes {change}: compare ip, ekfac and {precise} by retraining before you trust one of them"
