"""How well scores single out the samples that are truly bad, with bootstrap intervals."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from robust_if.scores import Scores


@dataclass(frozen=True)
class Detection:
    """Detection metrics of one column of scores, each with a percentile interval.

    ``auroc``: area under the ROC curve. ``average_precision``: Σ (R_k − R_{k−1}) P_k. ``precision_at_k``: share of bad samples among the k highest
    scores, k = number of bad samples unless given. ``tpr_at_01_fpr``, ``tpr_at_1_fpr``, ``tpr_at_5_fpr``: share of bad samples found where 0.1, 1 or
    5 % of the good ones are flagged.
    """

    auroc: float
    average_precision: float
    precision_at_k: float
    tpr_at_01_fpr: float
    tpr_at_1_fpr: float
    tpr_at_5_fpr: float
    intervals: Mapping[str, tuple[float, float]]


#: False-positive rate by metric.
RATES = {"tpr_at_01_fpr": 0.001, "tpr_at_1_fpr": 0.01, "tpr_at_5_fpr": 0.05}


def detection(
    scores: Scores,
    mask: ArrayLike,
    *,
    ignore: ArrayLike | None = None,
    k: int | None = None,
    replicates: int = 200,
    level: float = 0.95,
    seed: int = 0,
) -> Detection:
    """Compare scores with the truth.

    Args:
        scores: one score per sample, high = bad.
        mask: ``(n,)`` boolean, true where the sample is bad.
        ignore: ``(n,)`` boolean, true where a sample counts as neither good nor bad, such as the covers of a backdoor.
        k: for ``precision_at_k``.
        replicates: bootstrap resamples of the samples for the intervals; 0 gives no interval.
        level: of the intervals.
        seed: draws the resamples.

    Raises:
        ValueError: if the mask has another length, or all samples are good or all bad.
    """
    bad = np.asarray(mask, dtype=bool)
    if bad.shape != scores.values.shape:
        raise ValueError(f"mask: expected one truth value per sample, shape {scores.values.shape}, got {bad.shape}")
    values = scores.values
    if ignore is not None:
        kept = ~np.asarray(ignore, dtype=bool)
        if kept.shape != bad.shape:
            raise ValueError(f"ignore: expected one truth value per sample, shape {bad.shape}, got {kept.shape}")
        bad, values = bad[kept], values[kept]
    if not 0 < bad.sum() < len(bad):
        raise ValueError(f"mask: expected both good and bad samples, got {bad.sum()} bad of {len(bad)}")
    order = np.argsort(-values, kind="stable")
    ties = np.flatnonzero(np.r_[True, np.diff(values[order]) != 0])
    k = int(bad.sum()) if k is None else k
    point = _metrics(bad[order], np.ones((1, len(bad))), ties, k)
    intervals = {}
    if replicates:
        counts = np.random.default_rng(seed).multinomial(len(bad), np.full(len(bad), 1 / len(bad)), size=replicates).astype(np.float64)
        tails = [(1 - level) / 2, (1 + level) / 2]
        for name, drawn in _metrics(bad[order], counts, ties, k).items():
            low, high = np.nanquantile(drawn, tails)
            intervals[name] = (float(low), float(high))
    return Detection(**{name: float(value[0]) for name, value in point.items()}, intervals=intervals)


def _metrics(bad: NDArray[np.bool_], counts: NDArray[np.float64], ties: NDArray[np.int64], k: int) -> dict[str, NDArray[np.float64]]:
    """All metrics of every row of ``counts`` (how often each sample was drawn), for samples sorted by falling score; equal scores are one step."""
    positive = np.add.reduceat(counts * bad, ties, axis=1)
    negative = np.add.reduceat(counts * ~bad, ties, axis=1)
    tp, fp = positive.cumsum(1), negative.cumsum(1)
    positives, negatives = tp[:, -1:], fp[:, -1:]
    with np.errstate(invalid="ignore", divide="ignore"):
        tpr, fpr = tp / positives, fp / negatives
        precision = np.nan_to_num(tp / (tp + fp))
        return {
            "auroc": ((negative * (tp - positive / 2)).sum(1, keepdims=True) / (positives * negatives))[:, 0],
            "average_precision": (positive / positives * precision).sum(1),
            "precision_at_k": np.array([np.interp(min(k, t[-1] + f[-1]), np.r_[0, t + f], np.r_[0, t]) / k for t, f in zip(tp, fp, strict=True)]),
        } | {name: np.array([np.interp(rate, np.r_[0, f], np.r_[0, t]) for t, f in zip(tpr, fpr, strict=True)]) for name, rate in RATES.items()}
