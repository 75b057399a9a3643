"""The inverse by dense algebra, for small models."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from robust_if.curvature import LARGEST, Curvature, Kind, automatic_damping, check, flatten, unflatten
from robust_if.data import Samples
from robust_if.layers import Factors
from robust_if.pieces import CHUNK, Pieces, dense
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

    has_quadratic: ClassVar[bool] = True

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
        return DenseInverse(matrix, factor, damping)


@dataclass(frozen=True, eq=False)
class DenseInverse:
    """v -> (C + λI)⁻¹ v.

    Args:
        matrix: C + λI, ``(p, p)`` float64 on the CPU.
        factor: its Cholesky factor.
        damping: λ.
    """

    matrix: Tensor
    factor: Tensor
    damping: float

    def __call__(self, vector: Params) -> Solution:
        v = torch.from_numpy(flatten(vector))
        x = torch.cholesky_solve(v[:, None], self.factor)[:, 0]
        residual = ((self.matrix @ x - v).norm() / v.norm()).item() if v.any() else 0.0
        notes = {"damping": self.damping, "iterations": 0, "residual": residual, "converged": residual <= 1e-6}
        return Solution(unflatten(x.numpy(), vector), notes)

    def quadratic(self, pieces: Pieces, power: int = 1) -> Tensor:
        """gᵢᵀ P^power gᵢ of every sample, ``(B,)``, by a solution for each."""
        parts = []
        for grads in _rows(pieces):
            solved = torch.cholesky_solve(grads.mT, self.factor).mT
            parts.append(((grads if power == 1 else solved) * solved).sum(1))
        return torch.cat(parts)


def _rows(pieces: Pieces) -> Iterator[Tensor]:
    """Whole gradients, ``(b, p)`` float64 on the CPU, of as many samples at a time as may be formed at once."""
    found = [each for _, each in pieces]
    step = max(1, CHUNK // sum(each[0].size for each in found))
    for start in range(0, len(found[0][0]), step):
        rows = slice(start, start + step)
        yield torch.cat([dense([piece.take(rows) for piece in each]).to("cpu", torch.float64) for each in found], 1)
