"""LESS: the target's gradient against the Adam step that a sample would cause."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from robust_if.checkpoints import Moments
from robust_if.estimators.base import Estimator, Job, Result
from robust_if.pieces import CHUNK, Piece, Pieces, dense
from robust_if.task import Params


@dataclass(frozen=True)
class LESS(Estimator):
    """−cos(∇T(θ), Γ_i(θ)), summed over checkpoints with their weights; Γ_i is the step that Adam would take next on sample i alone, without its rate.

    With the optimiser's moments m, s after t steps and g = ∇ℓ_i: m' = β₁ m + (1 − β₁) g, s' = β₂ s + (1 − β₂) g², and
    Γ_i = (m' / (1 − β₁ᵗ⁺¹)) / (√(s' / (1 − β₂ᵗ⁺¹)) + ε), as Adam does it. Where the optimiser is Adam this, and not the gradient, is how a sample
    moves the model. The cosine keeps short sequences, whose gradients are large, from ruling. Gradients are whole, not projected: those of one
    parameter and a few samples at a time, never all of them.

    Args:
        normalise: the cosine, as published; the product without it.
        betas: the decays β₁, β₂ of the training run's optimiser.
        eps: ε of that optimiser.

    Source: Xia et al. 2024, "LESS: Selecting Influential Data for Targeted Instruction Tuning" (ICML 2024, arXiv 2402.04333), definition 3.1, there
    with projected gradients. One target stands for one subtask; the minimum of the scores over several targets is the paper's maximum over subtasks.
    """

    normalise: bool = True
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def __post_init__(self) -> None:
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas: expected two numbers in [0, 1), got {self.betas}")
        if not self.eps > 0:
            raise ValueError(f"eps: expected a positive number, got {self.eps}")

    @property
    def name(self) -> str:
        return "less" if self.normalise else "less-product"

    def estimate(self, job: Job) -> Result:
        return self.estimates(job)[0]

    def estimates(self, job: Job) -> list[Result]:
        moments = job.checkpoint.moments if job.checkpoint is not None else None
        if moments is None:
            raise ValueError(
                "checkpoints: LESS needs checkpoints that hold Adam's moments; pass checkpoints=train(task, data, Recipe(optimizer='adamw', keep=4))"
            )
        params = job.params
        slopes = [target.gradient(job.task, params) for target in job.targets]
        stacked = {name: torch.stack([slope[name].flatten() for slope in slopes]) for name in params}
        found = job.layerwise(lambda pieces: self._products(pieces, moments, stacked))
        products, squares = found[:, :-1], found[:, -1:]
        if self.normalise:
            lengths = torch.stack([(rows**2).sum(1) for rows in stacked.values()]).sum(0).cpu().double().numpy()
            scale = (squares * lengths) ** 0.5
            products = products / (scale + (scale == 0))  # a step or a target that stands still points nowhere: 0
        return [Result(-products[:, k]) for k in range(len(slopes))]

    def _products(self, pieces: Pieces, moments: Moments, slopes: Params) -> Tensor:
        """⟨∇T, Γ_i⟩ for every target, and ‖Γ_i‖²: ``(B, k + 1)``."""
        total: Tensor | None = None
        for name, each in pieces:
            rows = slopes[name]
            zero = torch.zeros_like(rows[0])
            first, second = (kind[name].to(rows).flatten() if name in kind else zero for kind in (moments.first, moments.second))
            parts = []
            for chunk in _chunks(each):
                steps = self._steps(dense(chunk), first, second, moments.steps + 1)
                parts.append(torch.cat([steps @ rows.T, (steps**2).sum(1, keepdim=True)], 1))
            total = torch.cat(parts) if total is None else total + torch.cat(parts)
        assert total is not None
        return total

    def _steps(self, grads: Tensor, first: Tensor, second: Tensor, count: int) -> Tensor:
        """Γ, the Adam steps of gradients ``(B, p)`` as the step number ``count``."""
        beta1, beta2 = self.betas
        mean = (beta1 * first + (1 - beta1) * grads) / (1 - beta1**count)
        scale = ((beta2 * second + (1 - beta2) * grads**2) / (1 - beta2**count)).sqrt() + self.eps
        return mean / scale


def _chunks(pieces: list[Piece]) -> list[list[Piece]]:
    """The same gradients, as many samples at a time as may be formed at once."""
    step = max(1, CHUNK // max(pieces[0].size, 1))
    return [[piece.take(slice(start, start + step)) for piece in pieces] for start in range(0, len(pieces[0]), step)]
