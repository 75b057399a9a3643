"""Poison as a second population in its class, which varies as every other class does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import median_abs_deviation

from robust_if.data import concatenate
from robust_if.estimators.base import Job, Result
from robust_if.evaluations.detectors.activations import two_means
from robust_if.evaluations.detectors.features import FeatureDetector, class_labels, features, principal

Rows = NDArray[np.float64]
Labels = NDArray[np.int64]


@dataclass(frozen=True)
class SCAn(FeatureDetector):
    """Membership in the smaller part of a class that is two populations rather than one, by a likelihood ratio.

    Features are φ = μ_y + ε with μ_y ~ N(0, S_μ) and ε ~ N(0, S_ε), S_ε the same for all classes; both covariances by EM. A class is tested for one
    mean against two, each sample with the nearer one. In the metric of S_ε the better pair is that of 2-means, and −2 log of the likelihood ratio is
    the sum of squares that the split explains. Divided by the number of samples, with which it grows even where nothing is wrong, it is J_y, and
    J*_y = (J_y − median) / (1.4826 MAD) over the classes; the paper flags classes above e² ≈ 7.4.

    The score is t, plus J*_y for samples in the smaller population of the class: t = d_b / (d_b + d_s) is the closeness to that population, from the
    distances to both means. With two classes J* only says which has more evidence; where all classes are alike it is 0. A class with fewer than 3
    samples scores 0 and has no part in the median.

    Args:
        size: principal components of the features that are kept.
        clean: take the covariances from the target's held-out data, as published; nothing else of the target is used. By default no target is needed:
            S_ε for a class is then that of all other classes, which hold no poison if all poison has one label.
        iterations: of EM.

    Source: Tang et al. 2021 (arXiv 1908.00686), section 4; the decomposition: Chen et al. 2012, "Bayesian face revisited".

    Raises:
        ValueError: if ``size`` or ``iterations`` is below 1, or there is only one class and no clean data.
    """

    size: int = 32
    clean: bool = False
    iterations: int = 10

    def __post_init__(self) -> None:
        for name in ("size", "iterations"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")

    @property
    def name(self) -> str:
        return "scan-clean" if self.clean else "scan"

    @property
    def needs_target(self) -> Any:  # type: ignore[override]
        """Only for its held-out data."""
        return self.clean

    def estimate(self, job: Job) -> Result:
        labels = class_labels(job.samples)
        if not self.clean:
            return Result(self.scores(self._features(job), labels))
        held_out = concatenate(job.target.held_out)
        clean_labels = class_labels(held_out)
        clean = features(job.task, held_out, job.sweep.batch_size, self.layer)
        return Result(self.scores(self._features(job), labels, clean, clean_labels))

    def scores(self, features: Rows, labels: Labels, clean: Rows | None = None, clean_labels: Labels | None = None) -> Rows:
        """One score per row of ``features (n, d)``; covariances from ``clean (m, d)`` with labels ``(m,)``, or else from the other classes."""
        found = np.unique(labels)
        rows = principal(np.vstack([features, features[:0] if clean is None else clean]), self.size)
        rows, clean = rows[: len(labels)], rows[len(labels) :]
        if clean_labels is None and len(found) < 2:
            raise ValueError(f"clean: with one class ({found[0]}) there are no other classes to compare it with; expected clean=True")
        if clean_labels is not None:
            common = metric(clean, clean_labels, self.iterations)
        splits = {}
        for label in found:
            own = labels == label
            whiten = metric(rows[~own], labels[~own], self.iterations) if clean_labels is None else common
            if (split := two_means(principal(rows[own] @ whiten, self.size))) is not None:
                splits[label] = split
        gains = np.array([explained / len(inside) for _, inside, explained in splits.values()])
        spread = median_abs_deviation(gains, scale="normal") if splits else 0.0
        evidence = (gains - np.median(gains)) / spread if spread > 1e-12 else np.zeros(len(gains))
        scores = np.zeros(len(labels))
        for (label, (closeness, inside, _)), strength in zip(splits.items(), evidence, strict=True):
            scores[labels == label] = closeness + strength * inside
        return scores


def metric(rows: Rows, labels: Labels, iterations: int) -> Rows:
    """S_ε^(−1/2) of ``rows (n, d)``, up to a rotation: ``(d, d)``. Eigenvalues below a thousandth of their mean count as that."""
    _, within = decomposition(rows - rows.mean(0), labels, iterations)
    values, axes = np.linalg.eigh(within)
    whiten: Rows = axes / np.sqrt(np.maximum(values, 1e-3 * values.mean()))
    return whiten


def decomposition(rows: Rows, labels: Labels, iterations: int) -> tuple[Rows, Rows]:
    """S_μ and S_ε of rows φ = μ_y + ε, each ``(d, d)``, by EM from the covariances of class means and of residuals.

    With m samples in a class the posterior of its mean has expectation W x̄ and covariance W S_ε / m, for W = S_μ (S_μ + S_ε / m)⁻¹ and x̄ the mean of
    its rows. No step lowers the likelihood.

    Args:
        rows: ``(n, d)``, of mean 0.
        labels: ``(n,)``.
        iterations: EM steps.
    """
    found, of, counts = np.unique(labels, return_inverse=True, return_counts=True)
    means = np.stack([rows[labels == label].mean(0) for label in found])
    residuals = rows - means[of]
    scatter = residuals.T @ residuals
    floor = 1e-6 * ((rows**2).mean() or 1.0) * np.eye(rows.shape[1])  # for fewer samples than features, and classes of one sample
    between, within = means.T @ means / len(found) + floor, scatter / len(rows) + floor
    for _ in range(iterations):
        moments, noise = np.zeros_like(between), scatter.copy()
        for mean, count in zip(means, counts, strict=True):
            weight = np.linalg.solve(between + within / count, between).T
            expected, covariance = weight @ mean, weight @ within / count
            moments += np.outer(expected, expected) + covariance
            noise += count * (np.outer(mean - expected, mean - expected) + covariance)
        between, within = moments / len(found), noise / len(rows)
    return between, within
