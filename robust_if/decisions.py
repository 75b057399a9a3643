"""From scores to what training understands: sample weights ``(n,)`` (1 keep, 0 remove), or corrected labels ``(n,)``."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.mixture import GaussianMixture

from robust_if.scores import Scores

Weights = NDArray[np.float64]


def remove_top(scores: Scores, *, k: int | None = None, fraction: float | None = None) -> Weights:
    """Weights that remove the ``k`` most harmful samples, or the given ``fraction`` of all (rounded down).

    Raises:
        ValueError: unless exactly one of ``k`` (0 to n) and ``fraction`` (0 to 1) is given.
    """
    if (k is None) == (fraction is None):
        raise ValueError(f"remove_top: expected either k or fraction, got k={k} and fraction={fraction}")
    if fraction is not None:
        if not 0 <= fraction <= 1:
            raise ValueError(f"fraction: expected a share from 0 to 1, got {fraction}")
        k = int(fraction * len(scores) + 1e-9)
    assert k is not None
    if not 0 <= k <= len(scores):
        raise ValueError(f"k: expected a number from 0 to {len(scores)}, got {k}")
    weights = np.ones(len(scores))
    weights[scores.order()[:k]] = 0.0
    return weights


def remove_above(scores: Scores, threshold: float = 0.0) -> Weights:
    """Weights that remove every sample whose score is greater than ``threshold``, in the scores' own unit."""
    return (scores.values <= threshold).astype(np.float64)


def automatic_threshold(scores: Scores) -> float:
    """The score above which a sample more likely belongs to the harmful of two groups.

    Scores have heavy tails, so their logarithm is taken, or asinh where some are negative, on a scale that leaves the bulk of one Gaussian nearly as
    it is; then a mixture of two Gaussians is fitted and the threshold is the highest score at which the group with the larger mean does not win. The
    idea of splitting losses by a two-component mixture is that of Arazo et al. 2019 (arXiv 1904.11238) and DivideMix (arXiv 2002.07394).
    Log-odds need none of this: their threshold is 0, where a label is as probably wrong as right.

    Returns:
        The threshold in the scores' own unit; the largest score (nothing is removed) where one group describes the data better (by BIC), or the means
        of two are less than two standard deviations apart (Ashman et al. 1994), as they are where one skewed group is cut in half.
    """
    if scores.units == "log-odds":
        return 0.0
    values = scores.values
    if len(np.unique(values)) < 3:
        return float(values.max())
    bent = _bent(values)[:, None]
    one, two = _mixture(bent, 1), _mixture(bent, 2)
    means, variances = two.means_.ravel(), two.covariances_.ravel()
    if two.bic(bent) >= one.bic(bent) or np.ptp(means) < 2 * np.sqrt(variances.mean()):
        return float(values.max())
    harmful = int(means.argmax())
    # Above its own mean a sample is harmful even where the broader group's tail would win again.
    kept = (two.predict(bent) != harmful) & (bent.ravel() < means[harmful])
    return float(values[kept].max()) if kept.any() else float(values.max())


def _bent(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The logarithm of scores that are never negative; asinh of the others on three times their interquartile range."""
    if values.min() >= 0:
        return np.asarray(np.log(np.maximum(values, values[values > 0].min())))
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
    return np.asarray(np.arcsinh((values - middle) / (3 * (high - low) or values.std())))


def _mixture(bent: NDArray[np.float64], groups: int) -> GaussianMixture:
    """The likeliest of several fits: from k-means, and from a harmful group near the top, since k-means overlooks a small one."""
    starts: list[Any] = [None] if groups == 1 else [None, *(np.quantile(bent, [[0.5], [share]]) for share in (0.8, 0.95, 0.99))]
    fits = [GaussianMixture(groups, reg_covar=1e-4 * bent.var(), means_init=start, random_state=0).fit(bent) for start in starts]
    return max(fits, key=lambda fit: fit.lower_bound_)


def remove_automatic(scores: Scores) -> Weights:
    """Weights that remove the samples above :func:`automatic_threshold`."""
    return remove_above(scores, automatic_threshold(scores))


def relabel(labels: ArrayLike, suggestions: ArrayLike, weights: ArrayLike) -> NDArray[Any]:
    """Labels ``(n,)`` in which the samples of weight 0 carry the suggested label instead of their own.

    Raises:
        ValueError: if the three lengths differ.
    """
    old, new, kept = np.asarray(labels), np.asarray(suggestions), np.asarray(weights)
    if not old.shape == new.shape == kept.shape:
        raise ValueError(f"relabel: expected three arrays of one shape, got labels {old.shape}, suggestions {new.shape}, weights {kept.shape}")
    return np.where(kept == 0, new, old)
