"""IP: the inner product of the target's gradient with every sample's gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from robust_if.estimators.base import Estimator, Job, Result
from robust_if.gradients import directional
from robust_if.layers import LayerGradients
from robust_if.task import Batch


@dataclass(frozen=True)
class InnerProduct(Estimator):
    """IP_i = −(1/n) ⟨∇T(θ), ∇ℓ_i(θ)⟩; over several checkpoints with learning rates as weights it is TracIn.

    All n products are one forward-mode pass (about 2 forward passes, memory of one extra parameter copy). Raw products are weak where layers
    or samples have very different gradient scales, as in deep nets and language models; the other two forms need the layer rules instead.

    Args:
        normalise: ``"none"`` as published; ``"cosine"`` divides by ‖∇T‖ ‖∇ℓ_i‖; ``"layer"`` averages the cosines of the single layers.

    Source: Yang et al. 2026, "Revisit, Extend, and Enhance Hessian-Free Influence Functions" (arXiv 2405.17490); TracIn: Pruthi et al. 2020
    (arXiv 2002.08484); the cosine form: GradCos, Charpiat et al. 2019.
    """

    normalise: Literal["none", "cosine", "layer"] = "none"

    def __post_init__(self) -> None:
        if self.normalise not in ("none", "cosine", "layer"):
            raise ValueError(f"normalise: expected 'none', 'cosine' or 'layer', got {self.normalise!r}")

    @property
    def name(self) -> str:
        return "ip" if self.normalise == "none" else f"ip-{self.normalise}"

    def estimate(self, job: Job) -> Result:
        assert job.target is not None
        task, params = job.task, job.params
        slope = job.target.gradient(task, params)
        if self.normalise == "none":
            values = job.map(lambda batch: directional(task, params, batch, slope))
            return Result(-values / len(job.train))
        gradients = LayerGradients(task, params, job.probe())
        groups = {name: name.rpartition(".")[0] if self.normalise == "layer" else "" for name in params}
        lengths = {group: torch.sqrt(sum(inner_square(slope[name]) for name in params if groups[name] == group)) for group in set(groups.values())}  # type: ignore[arg-type]

        def cosines(batch: Batch) -> Tensor:
            products, squares = gradients.products_and_squares(batch, slope)
            total = torch.zeros_like(next(iter(products.values())))
            for group, length in lengths.items():
                members = [name for name in params if groups[name] == group]
                product = torch.stack([products[name] for name in members]).sum(0)
                norm = torch.stack([squares[name] for name in members]).sum(0).sqrt()
                # a sample without gradient points nowhere: its cosine counts as 0
                total += torch.where(norm * length > 0, product / (norm * length), 0.0)
            return total / len(lengths)

        return Result(-job.map(cosines))


def inner_square(value: Tensor) -> Tensor:
    """‖value‖², a scalar."""
    return (value * value).sum()
