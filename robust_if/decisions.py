"""From scores to what training understands: sample weights ``(n,)`` (1 keep, 0 remove), or corrected labels ``(n,)``."""

from __future__ import annotations

import math
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


def threshold_at(clean: Scores, false_positives: float = 0.01) -> float:
    """The smallest score that at most a share ``false_positives`` of further clean samples is expected to exceed.

    It is the ⌈(m + 1)(1 − ``false_positives``)⌉-th smallest of m scores of clean samples. Where these and the score of a further clean sample are
    exchangeable, that sample exceeds it with at most this probability, whatever the distribution (split conformal prediction, Vovk et al. 2005;
    as p-values for outliers, Bates et al. 2023, arXiv 2104.08279, section 2).

    Args:
        clean: scores of clean samples that were held out, by the estimator whose scores are to be cut.
        false_positives: share strictly between 0 and 1.

    Returns:
        The threshold in the scores' own unit, for :func:`remove_above`.

    Raises:
        ValueError: if the share is out of range, or smaller than 1 / (m + 1), which so few samples cannot promise.
    """
    if not 0 < false_positives < 1:
        raise ValueError(f"false_positives: expected a share strictly between 0 and 1, got {false_positives}")
    return float(np.sort(clean.values)[_rank(len(clean), false_positives) - 1])


def _rank(m: int, false_positives: float) -> int:
    """Which of ``m`` sorted clean scores is the threshold, counted from 1."""
    # the slack keeps 100 · (1 − 0.01) from being rounded up to 100
    rank = max(math.ceil((m + 1) * (1 - false_positives) - 1e-9), 1)
    if rank > m:
        raise ValueError(
            f"false_positives: {m} clean validation samples cannot promise a share of {false_positives:g}; the smallest that they can is "
            f"{1 / (m + 1):.3g}, and {false_positives:g} needs {math.ceil(1 / false_positives - 1e-9) - 1}"
        )
    return rank


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
