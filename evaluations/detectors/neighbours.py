"""Poison as samples whose neighbours in feature space are of another class."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from robust_if.evaluations.detectors.features import FeatureDetector
from robust_if.neighbours import nearest


@dataclass(frozen=True)
class DeepKNN(FeatureDetector):
    """Share of the k nearest samples in feature space that carry another label.

    Args:
        k: neighbours, all other samples where there are fewer. To outvote poison it takes more than twice as many as there is poison in a class.

    Source: Peri et al. 2020 (arXiv 1909.13374), section 3, which drops a sample that most of its neighbours contradict.

    Raises:
        ValueError: if ``k`` is below 1.
    """

    k: int = 30

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"k: expected at least 1, got {self.k}")

    @property
    def name(self) -> str:
        return "deep-knn"

    def scores(self, features: NDArray[np.float64], labels: NDArray[np.int64]) -> NDArray[np.float64]:
        if len(features) < 2:
            return np.zeros(len(features))
        _, found = nearest(features, len(features), self.k)
        share: NDArray[np.float64] = (labels[found] != labels[:, None]).mean(1)
        return share
