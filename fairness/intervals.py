"""How sure rates of groups are: intervals by resampling the cells of a table, tests of one group against the rest, and what chance alone gives."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr, ndtri
from scipy.stats import false_discovery_control, fisher_exact

from robust_if.fairness.confusion import Array, quotient

#: Numbers drawn at a time.
AT_ONCE = 20_000_000
#: The usual condition for the normal approximation: with a smaller expected count the test is Fisher's.
EXPECTED = 5.0


def resampled(place: NDArray[np.int64], size: int, weight: Array | None, replicates: int, rng: np.random.Generator) -> Array:
    """Tables ``(replicates, size)`` as drawing n samples with replacement gives them, without drawing a sample: cell counts are multinomial.

    Samples of one cell and one weight are alike, so these are what is counted.

    Args:
        place: ``(n,)`` cell of every sample.
        size: number of cells.
        weight: ``(n,)`` of the samples; ``None`` counts them.

    Source: Efron and Tibshirani 1993, An Introduction to the Bootstrap, section 6.
    """
    if weight is None:
        kinds, counts = np.unique(place, return_counts=True)
        each = np.ones(len(kinds))
    else:
        values, codes = np.unique(weight, return_inverse=True)
        pairs, counts = np.unique(place * len(values) + codes, return_counts=True)
        kinds, each = pairs // len(values), values[pairs % len(values)]
    first = np.flatnonzero(np.diff(kinds, prepend=-1))
    tables = np.zeros((replicates, size))
    step = max(1, AT_ONCE // len(kinds))
    for start in range(0, replicates, step):
        drawn = rng.multinomial(len(place), counts / len(place), min(step, replicates - start))
        tables[start : start + step, kinds[first]] = np.add.reduceat(drawn * each, first, axis=1)
    return tables


def percentiles(values: Array, level: float) -> tuple[Array, Array]:
    """The ends of the central interval along the first axis, without NaN; NaN where nothing else is there."""
    ordered = np.sort(values, axis=0)  # NaN last
    last = np.count_nonzero(~np.isnan(values), axis=0) - 1

    def at(share: float) -> Array:
        position = share * np.maximum(last, 0)
        below = np.floor(position).astype(np.int64)
        above = np.minimum(below + 1, np.maximum(last, 0))
        low, high = (np.take_along_axis(ordered, each[None], 0)[0] for each in (below, above))
        with np.errstate(invalid="ignore"):
            between: Array = low + (position - below) * (high - low)
        return between

    return at((1 - level) / 2), at((1 + level) / 2)


def shifted(value: Array, draws: Array, level: float) -> tuple[Array, Array]:
    """Percentiles of replicates less their bias, between 0 and 1: gaps of resampled groups are larger than the gap of the groups themselves.

    Args:
        value: ``(...)`` what was found.
        draws: ``(replicates, ...)`` the same of every replicate.

    Source: Efron and Tibshirani 1993, An Introduction to the Bootstrap, section 10, for the estimate of bias.
    """
    there = ~np.isnan(draws)
    bias = quotient(np.where(there, draws, 0).sum(0), there.sum(0)) - value
    low, high = (np.clip(end - bias, 0, 1) for end in percentiles(draws, level))
    return low, high


def wilson(share: Array, among: Array, level: float) -> tuple[Array, Array]:
    """Wilson's interval of a proportion, which does not shrink to a point where nothing or everything was counted; NaN among none.

    Source: Brown, Cai and DasGupta 2001, Interval Estimation for a Binomial Proportion, equation 4.
    """
    z = float(ndtri((1 + level) / 2))
    with np.errstate(invalid="ignore", divide="ignore"):
        p = quotient(share, among)
        middle = (p + z**2 / (2 * among)) / (1 + z**2 / among)
        half = z * np.sqrt(p * (1 - p) / among + z**2 / (4 * among**2)) / (1 + z**2 / among)
    return np.maximum(middle - half, 0), np.minimum(middle + half, 1)


def differs(share: Array, among: Array, rest: Array, rest_among: Array) -> Array:
    """Two-sided p-values that a proportion is another than that of the rest, in the shape of the arguments; NaN where either is undefined.

    The two-proportion test; Fisher's exact test where a count of at most :data:`EXPECTED` is expected and counts are whole.
    """
    p = np.full(np.shape(share), np.nan)
    for at in np.ndindex(p.shape):
        a, n, b, m = (float(each[at]) for each in (share, among, rest, rest_among))
        if not (n > 0 and m > 0):
            continue
        pooled = min(max((a + b) / (n + m), 0.0), 1.0)
        if min(n, m) * min(pooled, 1 - pooled) < EXPECTED and all(value == round(value) for value in (a, n, b, m)):
            p[at] = fisher_exact([[round(a), round(n - a)], [round(b), round(m - b)]]).pvalue
        else:
            error = np.sqrt(pooled * (1 - pooled) * (1 / n + 1 / m))
            p[at] = 1.0 if error == 0 else min(1.0, 2 * float(ndtr(-abs(a / n - b / m) / error)))
    return p


def adjusted(p: Array) -> Array:
    """p-values ``(k,)`` by Benjamini and Hochberg, so that calling those below 0.05 different is wrong in at most 5 % of the calls; NaN stays NaN."""
    there = ~np.isnan(p)
    found = np.full(len(p), np.nan)
    if there.any():
        found[there] = false_discovery_control(p[there])
    return found


def by_chance(share: Array, among: Array, spread: Callable[[Array], Array], replicates: int, rng: np.random.Generator) -> Array:
    """Gaps ``(replicates,)`` of groups that all have the same rate: what chance alone gives, which for many small groups is much.

    Args:
        share: ``(G,)`` counted in every group.
        among: ``(G,)`` of so many.
        spread: makes gaps ``(replicates,)`` of rates ``(replicates, G)``.
    """
    n = np.round(among).astype(np.int64)
    total = float(among.sum())
    p = min(max(float(share.sum()) / total, 0.0), 1.0) if total > 0 else 0.0
    drawn = rng.binomial(n, p, (replicates, len(n)))
    return spread(quotient(drawn.astype(np.float64), np.broadcast_to(n, drawn.shape).astype(np.float64)))
