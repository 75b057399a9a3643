"""Poison as a part of its class that stands apart in feature space: activation clustering and spectral signatures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from sklearn.cluster import KMeans

from robust_if.evaluations.detectors.features import FeatureDetector, by_class, principal


@dataclass(frozen=True)
class ActivationClustering(FeatureDetector):
    """Membership in a small one of the two clusters of a class, by 2-means on the class's reduced features.

    A class is reduced to ``size`` components and split by 2-means; p is the smaller cluster's share of the class. With d_b and d_s a sample's
    distances to the centres of the bigger and of the smaller cluster, t = d_b / (d_b + d_s) lies in [0, 1] and is above 1/2 in the smaller one. The
    score is t, plus 1 − p for the smaller cluster's samples where p < ``small``: so those of the smallest clusters come first, and there is an order
    within every cluster. A class with fewer than 3 samples, or without variance, scores 0.

    Args:
        size: components that are kept.
        reduction: ``"pca"``, whose components keep their variance; or ``"ica"`` as published: independent components are a rotation of the principal
            ones scaled to equal variance, and 2-means does not see rotations, so those are taken. All directions then look alike to it, and which
            split it finds is less stable.
        small: the share up to which a cluster is suspicious by its size.

    Source: Chen et al. 2018 (arXiv 1811.03728), sections 4 and 5, where whole clusters are flagged by size or silhouette.

    Raises:
        ValueError: if ``size`` is below 1, the reduction is unknown, or ``small`` is not in [0, 0.5].
    """

    size: int = 10
    reduction: Literal["pca", "ica"] = "pca"
    small: float = 0.35

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size: expected at least 1, got {self.size}")
        if self.reduction not in ("pca", "ica"):
            raise ValueError(f"reduction: expected 'pca' or 'ica', got {self.reduction!r}")
        if not 0 <= self.small <= 0.5:
            raise ValueError(f"small: expected a share from 0 to 0.5, got {self.small}")

    @property
    def name(self) -> str:
        return "activation-clustering"

    def scores(self, features: NDArray[np.float64], labels: NDArray[np.int64]) -> NDArray[np.float64]:
        return by_class(self._score, features, labels)

    def _score(self, rows: NDArray[np.float64]) -> NDArray[np.float64]:
        clusters = two_means(principal(rows, self.size, whiten=self.reduction == "ica"))
        if clusters is None:
            return np.zeros(len(rows))
        closeness, inside, _ = clusters
        share = float(inside.mean())
        return closeness + (1 - share if share < self.small else 0) * inside


@dataclass(frozen=True)
class SpectralSignatures(FeatureDetector):
    """((φ_i − mean) · v)² within the sample's class, with v the first right singular vector of the class's centred features.

    Both the singular vector and the projection are of centred features, as in the paper; implementations that project uncentred features rank by the
    class mean instead. Scores have the unit of squared features: over classes they are comparable as far as the classes spread alike.

    Source: Tran et al. 2018 (arXiv 1811.00636), algorithm 1, which drops 1.5 ε n samples of every class.
    """

    @property
    def name(self) -> str:
        return "spectral"

    def scores(self, features: NDArray[np.float64], labels: NDArray[np.int64]) -> NDArray[np.float64]:
        return by_class(lambda rows: (principal(rows, 1) ** 2).sum(1), features, labels)


def two_means(rows: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.bool_], float] | None:
    """2-means of ``rows (m, d)`` about their mean: closeness to the smaller cluster, who is in it, and the sum of squares that the split explains.

    Lloyd's iterations start from cuts across each of the first ten columns, at the mean and one standard deviation off it, and the best end counts.
    So there is nothing random in it, and the order of the rows does not matter. Give principal components, along which clusters part.

    Returns:
        ``(m,)`` d_b / (d_b + d_s), ``(m,)`` true in the smaller cluster, and the explained sum of squares; ``None`` if there is nothing to split.
    """
    if len(rows) < 3 or not rows.any():
        return None
    sides = [column > cut * column.std() for column in rows.T[:10] for cut in (-1, 0, 1)]
    starts = [np.stack([rows[~side].mean(0), rows[side].mean(0)]) for side in sides if 0 < side.sum() < len(rows)]
    best = min((KMeans(2, init=start, n_init=1).fit(rows) for start in starts), key=lambda fit: float(fit.inertia_))
    counts = np.bincount(best.labels_, minlength=2)
    small = min((0, 1), key=lambda cluster: (counts[cluster], *best.cluster_centers_[cluster]))
    distances = np.linalg.norm(rows[:, None] - best.cluster_centers_, axis=2)
    return distances[:, 1 - small] / distances.sum(1), best.labels_ == small, float((rows**2).sum() - best.inertia_)
