"""The inverse by conjugate gradients, with or without a preconditioner."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.sparse.linalg import LinearOperator, cg

from robust_if.curvature import Curvature, Kind, Vector, automatic_damping, check, flatten, mean_eigenvalue, residual, subset, unflatten
from robust_if.data import Samples
from robust_if.layers import Factors
from robust_if.preconditioners.base import Inverse, Preconditioner, Solution
from robust_if.sweep import Sweep
from robust_if.task import Params, Task


@dataclass(frozen=True)
class ConjugateGradient(Preconditioner):
    """(C + λI)⁻¹ v by conjugate gradients: one product with the curvature per iteration, for models of any size.

    An indefinite Hessian is no case for conjugate gradients. A direction of negative curvature stops the iteration, and the solution so far (v itself
    if there is none) is returned as not converged, with ``negative_curvature`` in its notes.

    Args:
        curvature: of the mean training loss: ``"ggn"``, ``"hessian"`` or ``"fisher"`` (:class:`~robust_if.curvature.Curvature`).
        damping: λ; a tenth of the curvature's mean eigenvalue by default.
        iterations: products at most, per direction.
        tolerance: the residual ‖(C + λI) x − v‖ / ‖v‖ at which to stop.
        samples: over how many training samples the curvature is averaged, drawn by ``seed``; ``None`` for all.
        seed: of that draw, and of the damping's estimate.
        preconditioner: an approximate inverse, built on all training data, that makes fewer iterations do; it should be positive definite and use
            a damping like ``damping``. With EK-FAC and five to ten iterations this is the method of choice for large models.

    Raises:
        ValueError: if a setting is out of range.

    Source: Martens 2010, "Deep learning via Hessian-free optimization", section 4; as an influence function Koh and Liang 2017 (arXiv 1703.04730),
    section 3.
    """

    curvature: Kind = "ggn"
    damping: float | None = None
    iterations: int = 50
    tolerance: float = 1e-2
    samples: int | None = 1000
    seed: int = 0
    preconditioner: Preconditioner | None = None

    def __post_init__(self) -> None:
        check(self.curvature, self.damping, self.samples)
        if self.iterations < 1:
            raise ValueError(f"iterations: expected at least 1, got {self.iterations}")
        if not 0 < self.tolerance < 1:
            raise ValueError(f"tolerance: expected a number between 0 and 1, got {self.tolerance}")

    @property
    def name(self) -> str:
        return "cg" if self.preconditioner is None else f"{self.preconditioner.name}-cg"

    @property
    def reads_factors(self) -> bool:  # type: ignore[override]
        """As the inner preconditioner."""
        return self.preconditioner is not None and self.preconditioner.reads_factors

    def build(self, task: Task, params: Params, data: Samples, sweep: Sweep, factors: Factors | None = None) -> Inverse:
        curvature = Curvature(task, params, subset(data, self.samples, self.seed), self.curvature, sweep.batch_size)
        damping = automatic_damping(mean_eigenvalue(curvature, self.seed)) if self.damping is None else self.damping
        inner = None if self.preconditioner is None else self.preconditioner.build(task, params, data, sweep, factors)

        def inverse(vector: Params) -> Solution:
            v = flatten(vector)
            x, iterations, negative = self._solve(curvature, damping, v, params, inner)
            left = residual(curvature, damping, x, v)
            notes = {"damping": damping, "iterations": iterations, "residual": left, "converged": left <= self.tolerance and not negative}
            return Solution(unflatten(x, params), {**notes, "negative_curvature": True} if negative else notes)

        return inverse

    def _solve(self, curvature: Curvature, damping: float, v: Vector, params: Params, inner: Inverse | None) -> tuple[Vector, int, bool]:
        """The solution, the iterations that it took, and whether a direction of negative curvature stopped them."""
        last, iterations = v, 0

        def product(direction: Vector) -> Vector:
            image = curvature.flat(direction.ravel()) + damping * direction.ravel()
            if direction.ravel() @ image <= 0:
                raise _NegativeCurvature
            return image

        def precondition(vector: Vector) -> Vector:
            assert inner is not None
            return flatten(inner(unflatten(vector.ravel(), params)).direction)

        def count(x: Vector) -> None:
            nonlocal last, iterations
            last, iterations = x, iterations + 1

        def operator(function: Callable[[Vector], Vector]) -> LinearOperator:
            return LinearOperator((len(v), len(v)), matvec=function, dtype=np.float64)

        if not v.any():
            return v, 0, False
        m = None if inner is None else operator(precondition)
        stop = 0.9 * self.tolerance * float(np.linalg.norm(v))  # a little below: the recurrence's residual drifts from the true one
        try:
            x, _ = cg(operator(product), v, rtol=0.0, atol=stop, maxiter=self.iterations, M=m, callback=count)
        except _NegativeCurvature:
            return last, iterations, True
        return x, iterations, False


class _NegativeCurvature(Exception):  # noqa: N818 - a signal, not an error
    """The search direction p has pᵀ (C + λI) p ≤ 0."""
