"""Poison as samples whose gradient lies apart from the others'."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from sklearn.ensemble import IsolationForest

from robust_if.estimators.base import Estimator, Job, Result
from robust_if.preconditioners.random_projection import Projection
from robust_if.task import Task


@dataclass(frozen=True)
class GradientForest(Estimator):
    """Isolation forest on per-sample gradients, randomly projected: the fewer random cuts isolate a gradient, the higher the score.

    The gradients are those of ``task.parameters``; name the last layer there, such as ``"fc.*"``, for its gradients alone. Scores lie in [0, 1].

    Args:
        size: numbers to which a gradient is projected, shared out equally among the parameters; at least one for each.
        trees: of the forest.
        seed: of the projections and of the forest; the order of the samples does not matter.

    Source: isolation forest: Liu et al. 2008 (ICDM), by scikit-learn; projections of the factors: Choe et al. 2024 (arXiv 2405.13954).

    Raises:
        ValueError: if ``size`` or ``trees`` is below 1, or there are more parameters than numbers in ``size``.
    """

    size: int = 128
    trees: int = 200
    seed: int = 0
    needs_target: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for name in ("size", "trees"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")

    @property
    def name(self) -> str:
        return "gradient-forest"

    def check(self, task: Task) -> None:
        if self.size < len(task.params()):
            raise ValueError(f"size: expected at least one number for each of the {len(task.params())} parameter tensors, got {self.size}")

    def estimate(self, job: Job) -> Result:
        params = job.params
        projections = {name: Projection.draw(name, value, self.size // len(params), self.seed) for name, value in params.items()}
        rows = job.layerwise(lambda pieces: torch.cat([projections[name].gradients(each) for name, each in pieces], 1))
        forest = IsolationForest(n_estimators=self.trees, random_state=self.seed).fit(rows[np.lexsort(rows.T)])
        return Result(-forest.score_samples(rows))
