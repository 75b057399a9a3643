"""The inverse on the leading eigenvectors of the curvature."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh
from torch import Tensor

from robust_if.curvature import Curvature, Kind, Vector, automatic_damping, check, flatten, mean_eigenvalue, subset, unflatten
from robust_if.data import Samples
from robust_if.layers import Factors
from robust_if.pieces import Pieces, products
from robust_if.preconditioners.base import Inverse, Preconditioner, Solution, inverted
from robust_if.sweep import Sweep
from robust_if.task import Params, Task


@dataclass(frozen=True)
class Arnoldi(Preconditioner):
    """Q diag(1 / (e + λ)) Qᵀ v, with the largest eigenvalues e of the curvature and their eigenvectors Q; what v has outside of them is dropped.

    The share that was kept is reported as ``captured``, and ``residual`` is √(1 − captured); ``converged`` says whether all eigenpairs were found,
    not that they suffice. Memory: about 2 · rank + 1 float64 vectors of all parameters while they are being computed.

    Args:
        rank: eigenpairs; all of them where the model has no more parameters.
        curvature: of the mean training loss: ``"ggn"``, ``"hessian"`` or ``"fisher"`` (:class:`~robust_if.curvature.Curvature`).
        damping: λ; a tenth of the curvature's mean eigenvalue by default.
        samples: over how many training samples the curvature is averaged, drawn by ``seed``; ``None`` for all.
        seed: of that draw, of the start vector, and of the damping's estimate.
        restarts: of the implicitly restarted Lanczos iteration, at most.

    Raises:
        ValueError: if a setting is out of range; by ``build``, if no eigenpair was found, or an eigenvalue plus λ is not positive.

    Source: Schioppa et al. 2022, "Scaling Up Influence Functions" (AAAI 2022, arXiv 2112.03052), section 4; for a symmetric matrix Arnoldi's
    iteration is Lanczos's, here ARPACK's.
    """

    has_quadratic: ClassVar[bool] = True

    rank: int = 20
    curvature: Kind = "hessian"
    damping: float | None = None
    samples: int | None = 1000
    seed: int = 0
    restarts: int = 20

    def __post_init__(self) -> None:
        check(self.curvature, self.damping, self.samples)
        for name in ("rank", "restarts"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")

    @property
    def name(self) -> str:
        return "arnoldi"

    def build(self, task: Task, params: Params, data: Samples, sweep: Sweep, factors: Factors | None = None) -> Inverse:
        curvature = Curvature(task, params, subset(data, self.samples, self.seed), self.curvature, sweep.batch_size)
        damping = automatic_damping(mean_eigenvalue(curvature, self.seed)) if self.damping is None else self.damping
        values, vectors, taken = self._eigenpairs(curvature)
        wanted = min(self.rank, curvature.size)
        if not len(values):
            raise ValueError(f"restarts: no eigenpair was found in {self.restarts} restarts; raise restarts, or lower rank ({self.rank})")
        if values.min() + damping <= 0:
            raise ValueError(f"damping: the {self.curvature} has the eigenvalue {values.min():.3g}; raise damping above {-values.min():.3g}")
        notes = {"damping": damping, "iterations": taken, "converged": len(values) == wanted, "rank": len(values)}
        return Leading(values + damping, vectors, params, notes)

    def _eigenpairs(self, curvature: Curvature) -> tuple[Vector, Vector, int]:
        """Eigenvalues ``(k,)``, eigenvectors ``(p, k)``, and the products that they took."""
        size = curvature.size
        if self.rank >= size:
            values, vectors = np.linalg.eigh(curvature.dense().numpy())
            return values, vectors, size
        products = 0

        def product(vector: Vector) -> Vector:
            nonlocal products
            products += 1
            return curvature.flat(vector.ravel())

        start = np.random.default_rng(self.seed).normal(size=size)
        try:
            matrix = LinearOperator((size, size), matvec=product, dtype=np.float64)
            values, vectors = eigsh(matrix, k=self.rank, which="LA", v0=start, maxiter=self.restarts, tol=1e-6)
        except ArpackNoConvergence as error:
            values, vectors = error.eigenvalues, error.eigenvectors
        return values, vectors, products


@dataclass(frozen=True, eq=False)
class Leading:
    """v -> Q diag(1 / (e + λ)) Qᵀ v.

    Args:
        damped: e + λ, ``(k,)``.
        vectors: Q, ``(p, k)``.
        like: the parameters.
        notes: of every solution, besides how much of its v was kept.
    """

    damped: Vector
    vectors: Vector
    like: Params
    notes: Mapping[str, Any]

    def __call__(self, vector: Params) -> Solution:
        v = flatten(vector)
        inside = self.vectors.T @ v
        left = float(np.linalg.norm(v - self.vectors @ inside) / np.linalg.norm(v)) if v.any() else 0.0
        solved = unflatten(self.vectors @ (inside / self.damped), self.like)
        return Solution(solved, {**self.notes, "residual": left, "captured": 1 - left**2})

    def quadratic(self, pieces: Pieces, power: int = 1) -> Tensor:
        """gᵢᵀ P^power gᵢ of every sample, ``(B,)``."""
        inside = torch.stack([products(each, self._directions[name]) for name, each in pieces]).sum(0)
        return inside**2 @ inverted(torch.from_numpy(self.damped).to(inside), power)

    @cached_property
    def _directions(self) -> Params:
        """The eigenvectors in the shapes of the parameters, ``(k, *shape)``."""
        return unflatten(self.vectors.T, self.like)
