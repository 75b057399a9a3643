"""DataInf: the inverse of a mean replaced by the mean of inverses, each in closed form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from robust_if.data import Samples
from robust_if.layers import Factors, Live
from robust_if.pieces import products, squares, weighted_sums
from robust_if.preconditioners.base import Inverse, Preconditioner, Solution
from robust_if.preconditioners.diagonal_fisher import check_damping
from robust_if.sweep import Sweep
from robust_if.task import Params, Task


@dataclass(frozen=True)
class DataInf(Preconditioner):
    """(1/n) Σ_i (g_i g_iᵀ + λI)⁻¹ v, for every parameter tensor by itself, in place of the inverse of the mean of g_i g_iᵀ + λI.

    By the formula of Sherman and Morrison this is (1/λ) (v − (1/n) Σ_i ⟨v, g_i⟩ / (λ + ‖g_i‖²) g_i): one pass over the gradients for their norms, and
    one for every direction, in which no gradient is kept. The error of exchanging the two grows with the square of a tensor's size, so the method
    suits small ones, such as low-rank adapters. As in the published code a layer is a parameter tensor: a weight and its bias are apart.

    Args:
        damping: λ for every tensor; 0.1 times the mean of ‖g_i‖² / size of each tensor by default, as published.

    Source: Kwon et al. 2024, "DataInf: Efficiently Estimating Data Influence in LoRA-tuned LLMs and Diffusion Models" (arXiv 2310.00902), section 3.

    Raises:
        ValueError: for a damping that is not positive.
    """

    reads_factors: ClassVar[bool] = True
    to_scale: ClassVar[bool] = False

    damping: float | None = None

    def __post_init__(self) -> None:
        check_damping(self.damping)

    @property
    def name(self) -> str:
        return "datainf"

    def build(self, task: Task, params: Params, data: Samples, sweep: Sweep, factors: Factors | None = None) -> Inverse:
        grads, n = factors or Live.of(task, params, data, sweep.batch_size), len(data)
        parts: dict[str, list[Tensor]] = {name: [] for name in params}
        for _, pieces in sweep.progress(grads.blocks(), f"{self.name}: norms"):
            for name, each in pieces:
                parts[name].append(squares(each))
        norms = {name: torch.cat(each) for name, each in parts.items()}
        damping = {name: 0.1 * float(each.mean()) / params[name].numel() if self.damping is None else self.damping for name, each in norms.items()}
        notes = {"damping": damping if self.damping is None else self.damping}

        return _MeanOfInverses(grads, norms, damping, n, sweep, notes)


@dataclass(frozen=True, eq=False)
class _MeanOfInverses:
    factors: Factors
    norms: Params
    damping: dict[str, float]
    n: int
    sweep: Sweep
    notes: dict[str, Any]

    def __call__(self, vector: Params) -> Solution:
        solved = self.several({name: value[None] for name, value in vector.items()})
        return Solution({name: value[0] for name, value in solved.items()}, self.notes)

    def several(self, vectors: Params) -> Params:
        """The solutions for k vectors ``(k, *shape)``, in one pass."""
        means = {name: torch.zeros_like(value) for name, value in vectors.items()}
        for rows, pieces in self.sweep.progress(self.factors.blocks(), "datainf"):
            for name, each in pieces:
                if self.damping[name] > 0:
                    weights = products(each, vectors[name]) / (self.damping[name] + self.norms[name][rows])[:, None]
                    means[name] += weighted_sums(each, weights).view_as(means[name]) / self.n
        # a parameter that no sample depends on has neither curvature nor damping, and is left out
        return {
            name: (v - means[name]) / self.damping[name] if self.damping[name] > 0 else torch.zeros_like(v) for name, v in vectors.items()
        }
