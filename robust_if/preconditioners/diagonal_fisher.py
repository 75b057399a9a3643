"""The diagonal of the empirical Fisher information."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from robust_if.data import Samples
from robust_if.layers import Factors, Live
from robust_if.pieces import Pieces, second_moment, squares
from robust_if.preconditioners.base import Inverse, Preconditioner, Solution, inverted
from robust_if.sweep import Sweep
from robust_if.task import Params, Task


@dataclass(frozen=True)
class DiagonalFisher(Preconditioner):
    """The diagonal of the empirical Fisher matrix: every coordinate is divided by its mean squared gradient plus λ.

    The cheapest curvature, one pass; it sees the scales of layers and coordinates, but no correlation between coordinates.

    Args:
        damping: λ; 0.1 times the mean of each parameter tensor's diagonal by default.

    Source: on the empirical Fisher matrix and its diagonal as curvature see Martens 2020 (arXiv 1412.1193).

    Raises:
        ValueError: for a damping that is not positive.
    """

    reads_factors: ClassVar[bool] = True
    has_quadratic: ClassVar[bool] = True

    damping: float | None = None

    def __post_init__(self) -> None:
        check_damping(self.damping)

    @property
    def name(self) -> str:
        return "diagonal-fisher"

    def build(self, task: Task, params: Params, data: Samples, sweep: Sweep, factors: Factors | None = None) -> Inverse:
        total = _second_moments(params, factors or Live.of(task, params, data, sweep.batch_size))
        diagonal = {name: value / len(data) for name, value in total.items()}
        damping = {name: 0.1 * float(value.mean()) if self.damping is None else self.damping for name, value in diagonal.items()}
        damped = {name: value + damping[name] for name, value in diagonal.items()}
        return Diagonal(damped, {"damping": damping if self.damping is None else self.damping})


@dataclass(frozen=True, eq=False)
class Diagonal:
    """v -> v divided entry by entry.

    Args:
        damped: the diagonal of C + λI, with the shapes of the parameters.
        notes: of every solution.
    """

    damped: Params
    notes: Mapping[str, Any]

    def __call__(self, vector: Params) -> Solution:
        # a parameter that no sample depends on has neither curvature nor damping, and is left out
        return Solution({name: torch.where(value > 0, vector[name] / value, 0.0) for name, value in self.damped.items()}, self.notes)

    def quadratic(self, pieces: Pieces, power: int = 1) -> Tensor:
        """gᵢᵀ P^power gᵢ of every sample, ``(B,)``."""
        return torch.stack([squares(each, inverted(self.damped[name], power)) for name, each in pieces]).sum(0)


def diagonal_fisher(task: Task, params: Params, data: Sequence[Samples], batch_size: int = 256) -> Params:
    """F_j = mean over the samples of (∂ℓᵢ/∂θ_j)², with the shapes of ``params``; one forward and one backward pass.

    Args:
        data: data sets whose samples are averaged over together.
    """
    total = {name: torch.zeros_like(value) for name, value in params.items()}
    for samples in data:
        for name, value in _second_moments(params, Live.of(task, params, samples, batch_size)).items():
            total[name] += value
    count = sum(len(samples) for samples in data)
    return {name: value / count for name, value in total.items()}


def check_damping(damping: float | None) -> None:
    """Raise a ``ValueError`` unless ``damping`` is a positive number, or ``None`` for the default."""
    if damping is not None and not 0 < damping < float("inf"):
        raise ValueError(f"damping: expected a positive number, or None for a tenth of the mean eigenvalue, got {damping!r}")


def _second_moments(params: Params, factors: Factors) -> Params:
    """Σ_i g²_i by parameter."""
    total = {name: torch.zeros_like(value) for name, value in params.items()}
    for _, pieces in factors.blocks():
        for name, each in pieces:
            total[name] += second_moment(each).view_as(total[name])
    return total
