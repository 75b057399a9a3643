"""Poison as what disturbs a robust estimate of its class's covariance."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import expm
from sklearn.covariance import MinCovDet

from robust_if.evaluations.detectors.features import FeatureDetector, by_class, principal

#: Standard deviation of the noise under the robust estimate, in that of the data: where half of a class are copies, there would be no covariance.
NOISE = 0.1


@dataclass(frozen=True)
class SPECTRE(FeatureDetector):
    """Quantum entropy (QUE) score of the class's features, whitened by a robust covariance.

    Within a class, the features are reduced to the first ``rank`` principal components and whitened by the minimum covariance determinant estimate of
    mean and covariance, h_i. With C the second moment of the h_i and Q = exp(α (C − I) / (‖C‖ − 1)), the score is h_iᵀ Q h_i / tr Q. Directions in
    which the data vary more than their clean part weigh most: for α = 0 the score is the squared Mahalanobis distance over the rank, for α → ∞ the
    squared projection on the first of these directions. A clean sample of any class has an expected score near 1, so scores compare over classes.

    Two choices differ from the published code: the covariance estimate, which needs no bound on the share of poison, and a fixed rank instead of a
    search. A class takes at most one component for ten samples; one with fewer than ten samples, or without variance, scores 1.

    Args:
        rank: components that are kept, k.
        alpha: how much the directions of large variance count, α.
        seed: of the random subsets of the robust estimate; the order of the samples does not matter.

    Source: Hayase et al. 2021 (arXiv 2104.11315), algorithms 1 and 2; the score: Dong et al. 2019 (arXiv 1906.11366).

    Raises:
        ValueError: if ``rank`` is below 1 or ``alpha`` is negative.
    """

    rank: int = 10
    alpha: float = 4.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank: expected at least 1, got {self.rank}")
        if not self.alpha >= 0:
            raise ValueError(f"alpha: expected at least 0, got {self.alpha}")

    @property
    def name(self) -> str:
        return "spectre"

    def scores(self, features: NDArray[np.float64], labels: NDArray[np.int64]) -> NDArray[np.float64]:
        return by_class(self._score, features, labels)

    def _score(self, rows: NDArray[np.float64]) -> NDArray[np.float64]:
        projected = principal(rows, min(self.rank, len(rows) // 10), whiten=True)
        if projected.shape[1] == 0:
            return np.ones(len(rows))
        noise = np.random.default_rng(self.seed).normal(scale=NOISE, size=projected.shape)
        robust = MinCovDet(random_state=self.seed).fit(projected[np.lexsort(projected.T)] + noise)
        values, axes = np.linalg.eigh(robust.covariance_)
        return que((projected - robust.location_) @ axes / np.sqrt(values), self.alpha)


def que(whitened: NDArray[np.float64], alpha: float) -> NDArray[np.float64]:
    """hᵀ Q h / tr Q of every row h of ``whitened (m, k)``, with Q = exp(α (C − I) / (‖C‖ − 1)) and C the rows' second moment."""
    excess = whitened.T @ whitened / len(whitened) - np.eye(whitened.shape[1])
    largest = np.linalg.eigvalsh(excess)[-1]
    weights = expm(alpha * excess / largest) if largest > 1e-9 else np.eye(len(excess))  # no direction varies more than it should
    scores: NDArray[np.float64] = np.einsum("ij,jk,ik->i", whitened, weights, whitened) / np.trace(weights)
    return scores
