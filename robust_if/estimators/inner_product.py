"""IP and influence functions: the product of the target's gradient, preconditioned or not, with every sample's gradient."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from robust_if.cosines import Stacked, cosines
from robust_if.estimators.base import Estimator, Job, Result
from robust_if.memory import footprint, plan
from robust_if.pieces import Piece, Pieces, products
from robust_if.preconditioners import Identity, Preconditioner, Quadratic
from robust_if.store import Store, factors_of
from robust_if.task import Params, Task

logger = logging.getLogger(__name__)

Normalise = Literal["none", "cosine", "layer", "relatif", "theta-relatif"]

#: What a score is divided by: the root of gᵢᵀ P^power gᵢ.
_POWERS = {"relatif": 1, "theta-relatif": 2}


@dataclass(frozen=True)
class InnerProduct(Estimator):
    """−(1/n) ⟨P ∇T(θ), ∇ℓ_i(θ)⟩: the influence of every sample on the target.

    With P the identity this is IP, over several checkpoints with learning rates as weights TracIn: all n products are one forward-mode pass (about 2
    forward passes, memory of one extra parameter copy). With P an approximate inverse of the curvature it is an influence function, the predicted
    decrease of the target when the sample is removed. Raw products are weak where layers or samples have very different gradient scales, as in deep
    nets and language models; the normalised forms need the layer rules instead of forward mode.

    The forms, each −⟨P ∇T, ∇ℓ_i⟩ divided by something; a sample whose divisor is 0 scores 0:

    * ``"none"``: n, as published.
    * ``"cosine"``: ‖P ∇T‖ ‖∇ℓ_i‖. Over checkpoints, with learning rates (by batch size) as weights, the sum is GAS with its sign turned: a training
      sample that pulls the target down has a negative score.
    * ``"layer"``: the mean of the cosines of the single layers. It is 1/L times the product of two gradients of which each of the L layers has been
      scaled to length 1: the layer-wise GAS up to that constant, with the target's layers scaled like the sample's. A layer is a module, its weight
      and bias together; one whose gradient is 0 counts as cosine 0.
    * ``"relatif"``: √(∇ℓ_iᵀ P ∇ℓ_i), ℓ-RelatIF: the influence on the target relative to that on all predictions, if P is the inverse of the Fisher
      matrix. With P the identity it is the cosine times ‖∇T‖.
    * ``"theta-relatif"``: ‖P ∇ℓ_i‖, θ-RelatIF: the influence on the target for each unit of length by which the sample moves the parameters.

    The last two need a preconditioner that measures single samples (:class:`~robust_if.preconditioners.Quadratic`); solvers that take one direction
    after another, and DataInf, which would take the product of every pair of samples, do not.

    Args:
        preconditioner: P; :class:`~robust_if.Identity` by default.
        normalise: one of the forms above.

    Raises:
        ValueError: for an unknown ``normalise``, or one of the last two with a preconditioner that does not measure single samples.

    Source: Yang et al. 2026, "Revisit, Extend, and Enhance Hessian-Free Influence Functions" (arXiv 2405.17490); TracIn: Pruthi et al. 2020
    (arXiv 2002.08484); influence functions: Koh and Liang 2017 (arXiv 1703.04730); the cosine form: GradCos, Charpiat et al. 2019; GAS: Hammoudeh and
    Lowd 2022, "Identifying a Training-Set Attack's Target Using Renormalized Influence Estimation" (arXiv 2201.10055); RelatIF: Barshan et al. 2020,
    "RelatIF: Identifying Explanatory Training Examples via Relative Influence" (arXiv 2003.11630).
    """

    preconditioner: Preconditioner = Identity()  # noqa: RUF009 - frozen
    normalise: Normalise = "none"

    def __post_init__(self) -> None:
        if not isinstance(self.preconditioner, Preconditioner):
            raise TypeError(f"preconditioner: expected one such as EKFAC(), got {self.preconditioner!r}")
        if self.normalise not in get_args(Normalise):
            raise ValueError(f"normalise: expected one of {', '.join(map(repr, get_args(Normalise)))}, got {self.normalise!r}")
        if self.normalise in _POWERS and not self.preconditioner.has_quadratic:
            raise ValueError(
                f"normalise: {self.normalise!r} needs gᵀ P g of every single sample, which {type(self.preconditioner).__name__} does not give; "
                "use Identity, DiagonalFisher, RandomProjection, KFAC, EKFAC, Arnoldi or Exact"
            )

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
        curved = f"influence function: {(type(self.preconditioner).__doc__ or '').splitlines()[0].rstrip('.')}"
        what = plain if isinstance(self.preconditioner, Identity) else curved
        return what + _SUMMARIES[self.normalise]

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
        elif self.normalise in _POWERS:
            assert isinstance(inverse, Quadratic)  # as its preconditioner says
            power = _POWERS[self.normalise]
            values = -job.layerwise(lambda pieces: _relative(pieces, directions, inverse, power))
        else:
            by_layer = self.normalise == "layer"
            stacked = Stacked({name: torch.stack([direction[name] for direction in directions]) for name in params})
            values = -job.layerwise(lambda pieces: cosines(pieces, stacked, by_layer))
        return [Result(values[:, k], notes=dict(solution.notes)) for k, solution in enumerate(solutions)]


_SUMMARIES: dict[Normalise, str] = {
    "none": "",
    "cosine": ", as a cosine (over checkpoints GAS)",
    "layer": ", as the mean of the layers' cosines",
    "relatif": ", relative to the sample's effect on all predictions (RelatIF)",
    "theta-relatif": ", relative to the sample's effect on the parameters (RelatIF)",
}


def _relative(pieces: Pieces, directions: list[Params], inverse: Quadratic, power: int) -> Tensor:
    """⟨v, gᵢ⟩ / √(gᵢᵀ P^power gᵢ) for every sample and direction, ``(B, k)``."""
    dots: list[Tensor] = []

    def multiplied() -> Iterator[tuple[str, list[Piece]]]:
        # the pieces of a layer are made once, and used for both while they are there
        for name, each in pieces:
            dots.append(products(each, torch.stack([direction[name] for direction in directions])))
            yield name, each

    lengths = inverse.quadratic(multiplied(), power).clamp(min=0).sqrt()[:, None]
    total = torch.stack(dots).sum(0).to(lengths)
    # a sample without gradient has no influence
    return torch.where(lengths > 0, total / lengths, 0.0)
