"""The inverse by dense algebra, for small models."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from robust_if.curvature import LARGEST, Curvature, Kind, automatic_damping, check, flatten, unflatten
from robust_if.data import Samples
from robust_if.layers import Factors
from robust_if.preconditioners.base import Inverse, Preconditioner, Solution
from robust_if.sweep import Sweep
from robust_if.task import Params, Task


@dataclass(frozen=True)
class Exact(Preconditioner):
    """(C + λI)⁻¹ by a Cholesky factorisation in float64, for up to 10,000 parameters: the classical influence function.

    Args:
        curvature: of the mean training loss: ``"ggn"``, ``"hessian"`` or ``"fisher"`` (:class:`~robust_if.curvature.Curvature`).
        damping: λ; a tenth of the curvature's mean eigenvalue by default. With the Hessian and the λ of an L2 penalty λ/2 ‖θ‖² under which the
            model was trained, C + λI is the Hessian of the training objective.

    Raises:
        ValueError: if a setting is out of range; by ``build``, if the model is too large or C + λI is not positive definite.

    Source: Koh and Liang 2017, "Understanding Black-box Predictions via Influence Functions" (arXiv 1703.04730), equation 2.
    """

    curvature: Kind = "ggn"
    damping: float | None = None

    def __post_init__(self) -> None:
        check(self.curvature, self.damping)

    @property
    def name(self) -> str:
        return f"exact-{self.curvature}"

    def check(self, params: Params) -> None:
        size = sum(value.numel() for value in params.values())
        if size > LARGEST:
            raise ValueError(f"task: the exact inverse is for up to {LARGEST:,} parameters, this task has {size:,}; use 'cg' or 'ekfac'")

    def build(self, task: Task, params: Params, data: Samples, sweep: Sweep, factors: Factors | None = None) -> Inverse:
        self.check(params)
        matrix = Curvature(task, params, data, self.curvature, sweep.batch_size).dense()
        damping = automatic_damping(matrix.trace().item() / len(matrix)) if self.damping is None else self.damping
        matrix.diagonal().add_(damping)
        factor, failed = torch.linalg.cholesky_ex(matrix)
        if failed:
            lowest = torch.linalg.eigvalsh(matrix)[0].item()
            raise ValueError(
                f"damping: the {self.curvature} plus {damping:.3g} is not positive definite, its lowest eigenvalue is {lowest:.3g}; "
                f"raise damping above {damping - lowest:.3g}"
            )

        def inverse(vector: Params) -> Solution:
            v = torch.from_numpy(flatten(vector))
            x = torch.cholesky_solve(v[:, None], factor)[:, 0]
            residual = ((matrix @ x - v).norm() / v.norm()).item() if v.any() else 0.0
            notes = {"damping": damping, "iterations": 0, "residual": residual, "converged": residual <= 1e-6}
            return Solution(unflatten(x.numpy(), params), notes)

        return inverse
