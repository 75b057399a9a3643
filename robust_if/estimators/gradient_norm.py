"""How large a sample's own gradient is: self-influence and its square root."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from robust_if.estimators.base import Estimator, Job, Result
from robust_if.pieces import squares


@dataclass(frozen=True)
class SelfInfluence(Estimator):
    """‖∇ℓ_i‖², summed over checkpoints with learning rates as weights: how much a sample lowers its own loss. Looks at no target.

    Source: Pruthi et al. 2020 (arXiv 2002.08484), section 4.1, where mislabelled samples have a large one.
    """

    needs_target: ClassVar[bool] = False

    @property
    def name(self) -> str:
        return "self-influence"

    def estimate(self, job: Job) -> Result:
        return Result(job.layerwise(lambda pieces: torch.stack([squares(each) for _, each in pieces]).sum(0)))


@dataclass(frozen=True)
class GradNorm(Estimator):
    """‖∇ℓ_i‖. Looks at no target.

    Source: GraNd, Paul et al. 2021 (arXiv 2107.07075).
    """

    needs_target: ClassVar[bool] = False

    @property
    def name(self) -> str:
        return "grad-norm"

    def estimate(self, job: Job) -> Result:
        return Result(np.sqrt(SelfInfluence().estimate(job).values))
