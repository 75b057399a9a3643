"""IP and influence functions: the product of the target's gradient, preconditioned or not, with every sample's gradient."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from robust_if.estimators.base import Estimator, Job, Result
from robust_if.memory import footprint, plan
from robust_if.pieces import Pieces, products, squares
from robust_if.preconditioners import Identity, Preconditioner
from robust_if.store import Store, factors_of
from robust_if.task import Params, Task

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class InnerProduct(Estimator):
    """−(1/n) ⟨P ∇T(θ), ∇ℓ_i(θ)⟩: the influence of every sample on the target.

    With P the identity this is IP, over several checkpoints with learning rates as weights TracIn: all n products are one forward-mode pass (about 2
    forward passes, memory of one extra parameter copy). With P an approximate inverse of the curvature it is an influence function, the predicted
    decrease of the target when the sample is removed. Raw products are weak where layers or samples have very different gradient scales, as in deep
    nets and language models; the normalised forms need the layer rules instead of forward mode.

    Args:
        preconditioner: P; :class:`~robust_if.Identity` by default.
        normalise: ``"none"`` as published; ``"cosine"`` divides by ‖P ∇T‖ ‖∇ℓ_i‖; ``"layer"`` averages the cosines of the single layers.

    Source: Yang et al. 2026, "Revisit, Extend, and Enhance Hessian-Free Influence Functions" (arXiv 2405.17490); TracIn: Pruthi et al. 2020
    (arXiv 2002.08484); influence functions: Koh and Liang 2017 (arXiv 1703.04730); the cosine form: GradCos, Charpiat et al. 2019.
    """

    preconditioner: Preconditioner = Identity()  # noqa: RUF009 - frozen
    normalise: Literal["none", "cosine", "layer"] = "none"

    def __post_init__(self) -> None:
        if not isinstance(self.preconditioner, Preconditioner):
            raise TypeError(f"preconditioner: expected one such as EKFAC(), got {self.preconditioner!r}")
        if self.normalise not in ("none", "cosine", "layer"):
            raise ValueError(f"normalise: expected 'none', 'cosine' or 'layer', got {self.normalise!r}")

    @property
    def name(self) -> str:
        return self.preconditioner.name if self.normalise == "none" else f"{self.preconditioner.name}-{self.normalise}"

    @property
    def units(self) -> Any:  # type: ignore[override]
        """Without curvature to scale, or normalised, a score only ranks."""
        return "target" if self.preconditioner.to_scale and self.normalise == "none" else "rank"

    @property
    def summary(self) -> str:
        plain = "the inner product of the target's and the sample's gradients (IP; over checkpoints TracIn)"
        curved = f"influence function: {(type(self.preconditioner).__doc__ or '').splitlines()[0]}"
        what = plain if isinstance(self.preconditioner, Identity) else curved
        return what + {"none": "", "cosine": ", as a cosine", "layer": ", as the mean of the layers' cosines"}[self.normalise]

    def check(self, task: Task) -> None:
        self.preconditioner.check(task.params())

    def estimate(self, job: Job) -> Result:
        return self.estimates(job)[0]

    def estimates(self, job: Job) -> list[Result]:
        task, params = job.task, job.params
        slopes = [target.gradient(task, params) for target in job.targets]
        if not isinstance(self.preconditioner, Identity):  # its passes hold what the layer rules need
            job = replace(job, sweep=plan(footprint(task, params, job.probe(), "layerwise"), job.sweep))
        factors = job.index
        if factors is None and self.preconditioner.reads_factors:
            kept = factors_of(task, params, job.train, job.sweep)
            factors = kept if isinstance(kept, Store) else None
            if job.samples is job.train:
                job = replace(job, index=factors)
        inverse = self.preconditioner.build(task, params, job.train, job.sweep, factors)
        solutions = [inverse(slope) for slope in slopes]
        for target, solution in zip(job.targets, solutions, strict=True):
            if not solution.notes.get("converged", True):
                logger.warning(
                    "%s: the solver did not converge for %s (residual %.2g after %s iterations); raise damping or the number of iterations",
                    self.name, target.name, solution.notes["residual"], solution.notes["iterations"],
                )  # fmt: skip
        directions = [solution.direction for solution in solutions]
        if self.normalise == "none":
            values = -job.products(directions) / len(job.train)
        else:
            by_layer = self.normalise == "layer"
            values = -job.layerwise(lambda pieces: _cosines(pieces, directions, by_layer))
        return [Result(values[:, k], notes=dict(solution.notes)) for k, solution in enumerate(solutions)]


def _cosines(pieces: Pieces, directions: list[Params], by_layer: bool) -> Tensor:
    """Cosines between every sample's gradient and every direction, ``(B, k)``: of the whole gradients, or averaged over the layers."""
    dots: dict[str, Tensor] = {}
    norms: dict[str, Tensor] = {}
    lengths: dict[str, Tensor] = {}
    for name, each in pieces:
        group = name.rpartition(".")[0] if by_layer else ""
        stacked = torch.stack([direction[name] for direction in directions])
        dots[group] = dots.get(group, 0) + products(each, stacked)
        norms[group] = norms.get(group, 0) + squares(each)
        lengths[group] = lengths.get(group, 0) + (stacked.flatten(1) ** 2).sum(1)
    total = torch.zeros_like(next(iter(dots.values())))
    for group, dot in dots.items():
        scale = norms[group].sqrt()[:, None] * lengths[group].sqrt()
        # a sample without gradient points nowhere: its cosine counts as 0
        total += torch.where(scale > 0, dot / scale, 0.0)
    return total / len(dots)
