"""Curvature in a random subspace, reached by projecting the factors of the gradients."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from robust_if.data import Samples
from robust_if.fisher import Fisher, check_fisher, fisher_gradients
from robust_if.layers import Factors, Live
from robust_if.pieces import Outer, Piece, Pieces, Rows
from robust_if.preconditioners.base import Inverse, Preconditioner, Solution, inverted
from robust_if.preconditioners.diagonal_fisher import check_damping
from robust_if.sweep import Sweep
from robust_if.task import Params, Task


@dataclass(frozen=True)
class RandomProjection(Preconditioner):
    """Pᵀ (P C Pᵀ + λI)⁻¹ P, with C the mean of g_i g_iᵀ over all layers and P a random projection to ``size`` numbers, as in TRAK and LoGra.

    The features φ_i = P g_i are the gradients of each parameter as a matrix, projected from both sides: P_b G P_aᵀ = Σ_t (P_b b_t) ⊗ (P_a a_t), which
    takes the factors only. Unlike layer-wise approximations P C Pᵀ holds the correlations between layers. The rows of P_a and P_b are orthogonal and
    scaled so that P keeps inner products in expectation; where a parameter is no larger than its share of ``size``, it is kept exactly.

    It differs from the published TRAK: gradients are those of the loss, which hold the factor 1 − p that TRAK applies to those of the margin later;
    λ is not 0; scores are not thresholded; and there is one model and one projection, where TRAK averages over several of both (see ``Ensemble``).

    Args:
        size: numbers in φ, shared out equally among the parameters, of which small ones take no more than their own size.
        damping: λ; 0.1 times the mean eigenvalue of P C Pᵀ by default.
        fisher: ``"empirical"`` for gradients at the labels; ``"sampled"`` for the Gauss-Newton matrix (``robust_if/fisher.py``), which takes a pass
            of its own even where gradients are at hand.
        seed: of the projections, which depend on the parameter's name and shape too, and of the sampled gradients.

    Source: TRAK: Park et al. 2023 (arXiv 2303.14186), section 3; projections of factors: LoGra, Choe et al. 2024 (arXiv 2405.13954), section 3.

    Raises:
        ValueError: for a ``size`` that is smaller than the number of parameter tensors, a damping that is not positive, an unknown ``fisher``, or
            ``"sampled"`` where a parameter has no layer rule.
    """

    reads_factors: ClassVar[bool] = True
    to_scale: ClassVar[bool] = False
    has_quadratic: ClassVar[bool] = True

    size: int = 1024
    damping: float | None = None
    fisher: Fisher = "empirical"
    seed: int = 0

    def __post_init__(self) -> None:
        check_damping(self.damping)
        check_fisher(self.fisher)
        if self.size < 1:
            raise ValueError(f"size: expected at least 1, got {self.size}")

    @property
    def name(self) -> str:
        return "trak"

    def check(self, params: Params) -> None:
        if self.size < len(params):
            raise ValueError(f"size: expected at least one number for each of the {len(params)} parameter tensors, got {self.size}")

    def build(self, task: Task, params: Params, data: Samples, sweep: Sweep, factors: Factors | None = None) -> Inverse:
        self.check(params)
        live = factors if factors is not None and self.fisher == "empirical" else Live.of(task, params, data, sweep.batch_size)
        if self.fisher == "sampled" and isinstance(live, Live):
            if missing := live.gradients.uncovered:
                raise ValueError(f"fisher: 'sampled' needs a layer rule for every parameter, {', '.join(missing)} have none; use fisher='empirical'")
            live = Live(fisher_gradients(live.gradients, self.fisher, self.seed), data, sweep.batch_size)
        shares = _shares({name: value.numel() for name, value in params.items()}, self.size)
        projections = {name: Projection.draw(name, value, shares[name], self.seed) for name, value in params.items()}
        moment = torch.zeros(()).to(next(iter(projections.values())).left)
        for _, pieces in sweep.progress(live.blocks(), self.name):
            features = torch.cat([projections[name].gradients(each) for name, each in pieces], 1)
            moment = moment + features.mT @ features
        values, vectors = torch.linalg.eigh(moment / len(data))
        values = values.clamp(min=0)
        damping = 0.1 * float(values.mean()) if self.damping is None else self.damping
        return Subspace(projections, values, vectors, damping)


@dataclass(frozen=True, eq=False)
class Subspace:
    """v -> Pᵀ (P C Pᵀ + λI)⁻¹ P v.

    Args:
        projections: P, by parameter.
        values, vectors: eigenvalues ``(k,)`` and eigenvectors ``(k, k)`` of P C Pᵀ.
        damping: λ.
    """

    projections: Mapping[str, Projection]
    values: Tensor
    vectors: Tensor
    damping: float

    def __call__(self, direction: Params) -> Solution:
        projected = torch.cat([self.projections[name].matrix(value).flatten() for name, value in direction.items()])
        parts = self.solve(projected[None])
        return Solution(
            {name: self.projections[name].back(parts[name][0], direction[name]) for name in direction},
            {"damping": self.damping, "size": len(self.values)},
        )

    def quadratic(self, pieces: Pieces, power: int = 1) -> Tensor:
        """gᵢᵀ Q^power gᵢ of every sample, ``(B,)``, with Q the whole map v -> Pᵀ (P C Pᵀ + λI)⁻¹ P v."""
        features = torch.cat([self.projections[name].gradients(each) for name, each in pieces], 1)
        if power == 1:
            return (features @ self.vectors) ** 2 @ inverted(self.values + self.damping)
        solved = self.solve(features)
        return torch.stack([self.projections[name].stretch * (part**2).sum(1) for name, part in solved.items()]).sum(0)

    def solve(self, features: Tensor) -> dict[str, Tensor]:
        """(P C Pᵀ + λI)⁻¹ φ of every row φ of ``features (B, k)``, by parameter."""
        damped = self.values + self.damping
        turned = torch.where(damped > 0, features.to(self.vectors) @ self.vectors / damped, 0.0)
        parts = torch.split(turned @ self.vectors.mT, [each.size for each in self.projections.values()], 1)
        return dict(zip(self.projections, parts, strict=True))


@dataclass(frozen=True)
class Projection:
    """G -> left G rightᵀ for gradients of one parameter as matrices (first axis, all others).

    Args:
        left: ``(k, first axis)``.
        right: ``(l, all other axes)``.
    """

    left: Tensor
    right: Tensor

    @classmethod
    def draw(cls, name: str, like: Tensor, size: int, seed: int) -> Projection:
        """A projection to at most ``size`` numbers, the same for the same name, shape and seed on every machine."""
        rows, columns = _sides(like)
        first = min(rows, max(math.isqrt(size), size // columns))
        second = min(columns, size // first)
        digest = hashlib.sha256(f"{seed}/{name}/{tuple(like.shape)}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        dtype = torch.promote_types(like.dtype, torch.float32)
        return cls(*(_orthogonal(k, d, generator).to(like.device, dtype) for k, d in ((first, rows), (second, columns))))

    @property
    def size(self) -> int:
        """Numbers in a projected gradient."""
        return len(self.left) * len(self.right)

    @property
    def stretch(self) -> float:
        """By how much :meth:`back` makes squared lengths larger, the same for all: the rows of both sides are orthogonal and of one length."""
        return self.left.shape[1] / len(self.left) * self.right.shape[1] / len(self.right)

    def matrix(self, values: Tensor) -> Tensor:
        """A tensor like the parameter, projected: ``(k, l)``."""
        return self.left @ values.reshape(self.left.shape[1], -1).to(self.left) @ self.right.mT

    def back(self, features: Tensor, like: Tensor) -> Tensor:
        """leftᵀ F right, in the shape and type of the parameter."""
        return (self.left.mT @ features.view(len(self.left), -1) @ self.right).reshape(like.shape).to(like)

    def gradients(self, pieces: list[Piece]) -> Tensor:
        """Per-sample gradients, projected: ``(B, k l)``."""
        return torch.stack([self._piece(piece) for piece in pieces]).sum(0)

    def _piece(self, piece: Piece) -> Tensor:
        if isinstance(piece, Outer):
            return Outer(piece.a.to(self.right) @ self.right.mT, piece.b.to(self.left) @ self.left.mT).dense()
        if isinstance(piece, Rows):
            return Outer(piece.b.to(self.right) @ self.right.mT, self.left.mT[piece.index]).dense()
        grads = piece.grads.view(len(piece), self.left.shape[1], -1).to(self.left)
        projected: Tensor = self.left @ (grads @ self.right.mT)
        return projected.flatten(1)


def _sides(value: Tensor) -> tuple[int, int]:
    """The parameter as a matrix: its first axis and all others."""
    rows = value.shape[0] if value.ndim else 1
    return rows, value.numel() // rows


def _shares(sizes: Mapping[str, int], total: int) -> dict[str, int]:
    """``total`` shared out equally, where what small parameters leave goes to the larger ones."""
    shares: dict[str, int] = {}
    for k, name in enumerate(sorted(sizes, key=lambda name: sizes[name])):
        shares[name] = min(sizes[name], (total - sum(shares.values())) // (len(sizes) - k))
    return shares


def _orthogonal(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Random orthogonal rows of length √(columns / rows), so that the expectation of PᵀP is the identity."""
    q, r = torch.linalg.qr(torch.randn(columns, rows, generator=generator, dtype=torch.float64))
    signed: Tensor = q * r.diagonal().sign()
    return signed.mT * math.sqrt(columns / rows)
