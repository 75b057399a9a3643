"""Ground truth for data attribution: retrain on subsets, look at every target, and compare with what scores predicted.

Scores predict to first order T(subset) ≈ T(all) − Σ scores of the samples left out, that is a constant + Σ scores of the samples kept; so good
scores correlate positively with the targets of retrained models, for any target and any subsets.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.stats import rankdata

from robust_if.data import Samples, as_samples
from robust_if.evaluations.retraining import Fit, retrain
from robust_if.scores import Scores
from robust_if.sweep import Progress, silent
from robust_if.targets import Target
from robust_if.task import Task
from robust_if.training import Recipe


def leave_one_out(
    task: Task,
    train: Samples,
    targets: Target | Sequence[Target],
    recipe: Recipe | Fit,
    *,
    which: ArrayLike | None = None,
    seeds: Sequence[int] = (0,),
    directory: Path | None = None,
    progress: Progress = silent,
) -> NDArray[np.float64]:
    """The true decrease of every target when a sample is left out, T(all) − T(without i), the mean over seeds.

    Args:
        which: positions ``(k,)`` of the samples that are left out in turn; all of them by default. The other arguments are those of :func:`retrain`.

    Returns:
        ``(k, t)`` decreases in the targets' units, positive = harmful, as scores are.
    """
    n = len(as_samples(train))
    positions = np.arange(n) if which is None else np.asarray(which)
    if positions.ndim != 1 or not np.issubdtype(positions.dtype, np.integer) or not ((positions >= 0) & (positions < n)).all():
        raise ValueError(f"which: expected positions from 0 to {n - 1}, shape (k,), got {which!r}")
    subsets = np.concatenate([np.ones((1, n), dtype=bool), positions[:, None] != np.arange(n)])
    values = retrain(task, train, targets, recipe, subsets, seeds=seeds, directory=directory, progress=progress).mean(1)
    effects: NDArray[np.float64] = values[0] - values[1:]
    return effects


def brittleness(
    task: Task,
    train: Samples,
    targets: Target | Sequence[Target],
    recipe: Recipe | Fit,
    scores: Scores,
    *,
    removed: Sequence[float] = (0.05, 0.1, 0.2),
    draws: int = 3,
    draw_seed: int = 0,
    seeds: Sequence[int] = (0,),
    directory: Path | None = None,
    progress: Progress = silent,
) -> pd.DataFrame:
    """Retraining without the samples of highest score, beside retraining without as many random ones.

    Args:
        scores: one per training sample; the highest are removed.
        removed: how many, as counts (``int``) or as shares of all samples (``float`` below 1).
        draws: how many times as many random samples are removed; the same for all scores, so that a shared ``directory`` trains them once.
        draw_seed: draws them. The other arguments are those of :func:`retrain`.

    Returns:
        One row per target, k, removal and training seed: ``target``, ``k`` (samples removed), ``removed_by`` (the scores' name, or "random draws"),
        ``draw`` (0 for scores), ``seed``, and ``before`` and ``after``, the target trained with and without them, in its own units.
    """
    train, targets = as_samples(train), [targets] if isinstance(targets, Target) else list(targets)
    n = len(train)
    if not np.array_equal(scores.ids, train.ids):
        raise ValueError("scores: expected one per training sample in the same order, got other ids")
    counts = [round(each * n) if isinstance(each, float) and each < 1 else each for each in removed]
    if not counts or not all(isinstance(k, (int, np.integer)) and 0 < k < n for k in counts):
        raise ValueError(f"removed: expected counts from 1 to {n - 1} or shares below 1 of {n} samples, got {tuple(removed)}")
    names = [target.name for target in targets]
    if len(set(names)) != len(names):
        raise ValueError(f"targets: expected different names, which tell the rows of the table apart, got {names}")
    random = [np.random.default_rng([draw_seed, draw]).permutation(n) for draw in range(draws)]
    cases = [(k, who, draw, order[:k]) for k in counts for who, orders in ((scores.name, [scores.order()]), ("random draws", random))
             for draw, order in enumerate(orders)]  # fmt: skip
    subsets = np.ones((1 + len(cases), n), dtype=bool)
    for row, case in zip(subsets[1:], cases, strict=True):
        row[case[3]] = False
    values = retrain(task, train, targets, recipe, subsets, seeds=seeds, directory=directory, progress=progress)
    return pd.DataFrame([
        {"target": name, "k": int(k), "removed_by": who, "draw": draw, "seed": seed, "before": values[0, s, t], "after": values[1 + c, s, t]}
        for t, name in enumerate(names) for c, (k, who, draw, _) in enumerate(cases) for s, seed in enumerate(seeds)
    ])  # fmt: skip


@dataclass(frozen=True)
class Correlation:
    """A correlation with a percentile interval; NaN, all three, where one side does not vary and no correlation is defined."""

    value: float
    low: float
    high: float


def lds(
    scores: Scores | ArrayLike, subsets: ArrayLike, values: ArrayLike, *, replicates: int = 1000, level: float = 0.95, seed: int = 0
) -> Correlation:
    """Linear datamodelling score: Spearman correlation over subsets of the sum of their members' scores with the target after training on them.

    Args:
        scores: ``(n,)``, or ``(n, q)`` scores for ``q`` targets, such as the losses of single held-out samples.
        subsets: ``(m, n)`` boolean, as they were trained on.
        values: ``(m,)`` or ``(m, q)`` values of the target, usually the mean over seeds of what :func:`retrain` gives.
        replicates: bootstrap resamples of the subsets for the interval.
        level: of the interval.
        seed: draws the resamples.

    Returns:
        The mean over ``q`` of the correlations; NaN if one of them is not defined.

    Source: Park et al. 2023, "TRAK" (arXiv 2303.14186), definition 2.4, there with the sign of a model's output.
    """
    chosen, true = np.asarray(subsets), np.asarray(values, dtype=np.float64)
    each = np.asarray(scores.values if isinstance(scores, Scores) else scores, dtype=np.float64)
    if chosen.dtype != bool or chosen.shape[1:] != each.shape[:1] or true.shape != (len(chosen), *each.shape[1:]) or each.ndim not in (1, 2):
        raise ValueError(
            "expected scores (n,) or (n, q), boolean subsets (m, n) and values (m,) or (m, q), "
            f"got {each.shape}, {chosen.dtype} {chosen.shape} and {true.shape}"
        )
    predicted = chosen.astype(np.float64) @ each
    # sums that differ by nothing but rounding are constant, and would be ranked by the rounding
    predicted = np.where(np.ptp(predicted, axis=0) > 1e-13 * np.abs(each).sum(0), predicted, 0.0)
    return _correlation(rankdata, predicted, true, replicates, level, seed)


def loo_correlation(
    scores: ArrayLike, effects: ArrayLike, *, replicates: int = 1000, level: float = 0.95, seed: int = 0
) -> tuple[Correlation, Correlation]:
    """Pearson and Spearman correlation of scores ``(k,)`` with the true effects ``(k,)`` of the same samples, resampling the samples."""
    x, y = np.asarray(scores, dtype=np.float64), np.asarray(effects, dtype=np.float64)
    if x.ndim != 1 or x.shape != y.shape:
        raise ValueError(f"scores and effects: expected one of each per sample, shape (k,), got {x.shape} and {y.shape}")
    return _correlation(None, x, y, replicates, level, seed), _correlation(rankdata, x, y, replicates, level, seed)


def _correlation(
    ranks: Callable[..., NDArray[np.float64]] | None, x: NDArray[np.float64], y: NDArray[np.float64], replicates: int, level: float, seed: int
) -> Correlation:
    """Correlation of the columns of ``x`` and ``y``, ``(m,)`` or ``(m, q)``, the mean over q, with an interval from resampled rows."""
    if len(x) < 3 or not np.isfinite(x).all() or not np.isfinite(y).all():
        raise ValueError(f"a correlation expects at least 3 values on each side, all finite, got {len(x)}")
    rows = np.random.default_rng(seed).integers(len(x), size=(replicates, len(x)))

    def mean(index: NDArray[np.int64]) -> NDArray[np.float64]:
        columns = zip(x.reshape(len(x), -1).T, y.reshape(len(y), -1).T, strict=True)
        found = [_pearson(*(side[index] if ranks is None else ranks(side[index], axis=1) for side in pair)) for pair in columns]
        return np.asarray(np.mean(found, axis=0))

    value = float(mean(np.arange(len(x))[None])[0])
    if np.isnan(value) or not replicates:
        return Correlation(value, np.nan, np.nan)
    low, high = np.nanquantile(mean(rows), [(1 - level) / 2, (1 + level) / 2])
    return Correlation(value, float(low), float(high))


def _pearson(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    """Row by row, ``(r,)``; NaN where a row is constant."""
    x, y = (np.where(np.ptp(side, axis=1, keepdims=True) > 0, side - side.mean(1, keepdims=True), 0.0) for side in (x, y))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray((x * y).sum(1) / np.sqrt((x * x).sum(1) * (y * y).sum(1)))
