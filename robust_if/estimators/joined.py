"""Scores summed over near duplicates, so that many copies that do little harm each are judged together."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix

from robust_if.estimators.base import Estimator, Job, Result
from robust_if.estimators.baselines import ValidationLoss
from robust_if.neighbours import near_duplicates
from robust_if.task import Task


@dataclass(frozen=True)
class Joined(Estimator):
    """Another estimator's scores, summed over the samples of one label that lie close together: s_i → Σ_j exp(−d_ij² / w²) s_j.

    Poison that is added in many near copies hides one by one, since leaving any of them out changes little; together the copies do not. Distances d
    are Euclidean, of inputs with every feature scaled to a standard deviation of 1; w is half of the median distance to the nearest sample of the
    same label, for each label. Where no sample has near duplicates the scores stay nearly as they were. Log-odds o are first bent to the positive
    side, log(1 + e^o), so that many samples that are probably right do not add up against a wrong one.

    The inputs must be numbers, ``(x, y)`` with class labels, and are held in memory.

    Args:
        base: any estimator; by default the loss under a model of the validation data alone.
        width: w in standard deviations of a feature; from the data by default.

    Raises:
        ValueError: if ``width`` is not positive.

    Source: this project, for the anchoring attacks of Mehrabi et al. 2021 (arXiv 2012.08723).
    """

    base: Estimator = field(default_factory=ValidationLoss)
    width: float | None = None

    def __post_init__(self) -> None:
        if self.width is not None and not self.width > 0:
            raise ValueError(f"width: expected a positive number, got {self.width}")

    @property
    def name(self) -> str:
        return f"{self.base.name}-joined"

    @property
    def summary(self) -> str:
        return f"{self.base.name}, summed over near duplicates of one label"

    @property
    def needs_target(self) -> bool:  # type: ignore[override]
        return self.base.needs_target

    def check(self, task: Task) -> None:
        self.base.check(task)

    def estimate(self, job: Job) -> Result:
        return self.estimates(job)[0]

    def estimates(self, job: Job) -> list[Result]:
        inputs, labels = self._table(job)
        near = near_duplicates(inputs, labels, self.width)
        found = self.base.estimates(replace(job, name=f"{job.name}-base"))
        return [replace(each, values=self._summed(near, each.values), members=None) for each in found]

    def _summed(self, near: csr_matrix, values: NDArray[np.float64]) -> NDArray[np.float64]:
        summed: NDArray[np.float64] = near @ (np.logaddexp(0, values) if self.base.units == "log-odds" else values)
        return summed

    def _table(self, job: Job) -> tuple[NDArray[np.float64], NDArray[Any]]:
        x, y = job.samples.batch(slice(None))[:2]
        if not x.is_floating_point():
            raise ValueError(f"data: near duplicates are found among inputs of floating point, got {x.dtype}")
        return x.flatten(1).double().cpu().numpy(), y.cpu().numpy()
