"""From scores to a training set: the samples behind a query, and the share of the data that is worth keeping, as sample weights ``(n,)``.

A low score is good: removing the sample is predicted to raise the target. Of equal scores the sample that comes first in the data wins. Shares are
rounded up to whole samples, so that the samples kept for a share are among those kept for a larger one, and no group loses all of its samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from robust_if.scores import Scores

Weights = NDArray[np.float64]

#: Queries whose columns are read at once; a matrix of pairs may lie on disk, row after row.
BLOCK = 64


def most_influential(matrix: ArrayLike, k: int, *, harmful: bool = True) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The ``k`` training samples that matter most for each query.

    Args:
        matrix: ``(n, q)`` influences as :func:`robust_if.pairwise` gives them, positive = without the sample the query's loss would be lower.
        k: samples for every query.
        harmful: the samples that raise the query's loss, largest value first; ``False`` for those that lower it, the samples behind an answer, most
            negative value first.

    Returns:
        Their positions and their values, each ``(q, k)``.

    Raises:
        ValueError: if the matrix has another shape or a value that is not finite, or ``k`` is not from 1 to n.
    """
    pairs = _matrix(matrix)
    n, q = pairs.shape
    if not isinstance(k, Integral) or not 1 <= k <= n:
        raise ValueError(f"k: expected a whole number from 1 to {n}, got {k!r}")
    positions, values = np.empty((q, k), dtype=np.int64), np.empty((q, k))
    for start in range(0, q, BLOCK):
        columns = np.array(pairs[:, start : start + BLOCK].T, dtype=np.float64, order="C")
        _check_finite(columns.T, start)
        for row, column in enumerate(columns, start):
            found = _lowest(-column if harmful else column, int(k))
            positions[row], values[row] = found, column[found]
    return positions, values


def keep_best(scores: Scores | ArrayLike, share: float, *, groups: ArrayLike | None = None) -> Weights:
    """Weights that keep the given share of the samples, those with the lowest scores.

    Without groups this leaves what ``remove_top(scores, fraction=1 - share)`` leaves, apart from ties.

    Args:
        scores: n scores, positive = harmful.
        share: of the samples, above 0 and at most 1.
        groups: ``(n,)`` group of each sample, such as its class; the same share of every group is kept, its best. Scores differ between classes for
            reasons of their own, such as how hard a class is, so that the best of all samples may hardly hold one of them.

    Returns:
        ``(n,)``, 1 keep, 0 remove; ⌈share · m⌉ ones among the m samples of each group.

    Raises:
        ValueError: if the share is out of range, a score is not finite, or there is not one group per sample.
    """
    values = _vector(scores)
    _check_share(share)
    weights = np.zeros(len(values))
    for rows in _rows(groups, len(values)):
        weights[rows[_lowest(values[rows], _count(share, len(rows)))]] = 1.0
    return weights


def cover(scores: Sequence[Scores] | ArrayLike, share: float) -> Weights:
    """Weights that keep the given share of the samples, those that are best for at least one of several targets, taken in turns.

    In round r every target names the sample that is its r-th best; a sample that was named before is kept once. So there is an r such that the r best
    samples of each target are kept; only the last round may stop before all targets had their turn, the first targets first.

    LESS (Xia et al. 2024, arXiv 2402.04333) gives a sample the largest of its similarities to several validation subtasks, here
    the lowest of its scores, and keeps the best. That compares values of different targets: one whose gradients are larger, or whose samples are all
    more alike, then takes most places. Turns ask only for the order within each target. Where scores of all targets are on one scale, the published
    rule is ``keep_best(np.min(matrix, axis=1), share)``.

    Args:
        scores: scores of the same n samples for each of q targets, or a matrix ``(n, q)``.
        share: of the samples, above 0 and at most 1.

    Returns:
        ``(n,)``, 1 keep, 0 remove; ⌈share · n⌉ ones.

    Raises:
        ValueError: if there is no target, scores are of different samples or not finite, or the share is out of range.
    """
    matrix = _matrix(_columns(scores)).astype(np.float64)
    _check_finite(matrix)
    _check_share(share)
    n = len(matrix)
    ranks = np.empty(matrix.shape, dtype=np.int64)
    np.put_along_axis(ranks, np.argsort(matrix, axis=0, kind="stable"), np.arange(n)[:, None], axis=0)
    order = np.lexsort((ranks.argmin(1), ranks.min(1)))
    weights = np.zeros(n)
    weights[order[: _count(share, n)]] = 1.0
    return weights


def _lowest(values: NDArray[np.float64], k: int) -> NDArray[np.int64]:
    """Positions of the ``k`` lowest values, lowest first, without sorting the others."""
    candidates = np.flatnonzero(values <= np.partition(values, k - 1)[k - 1])
    return candidates[np.argsort(values[candidates], kind="stable")[:k]]


def _count(share: float, n: int) -> int:
    # the slack keeps 0.7 · 10, which is a little more than 7, from being rounded up to 8
    return math.ceil(share * n * (1 - 1e-12))


def _check_share(share: float) -> None:
    if not 0 < share <= 1:
        raise ValueError(f"share: expected a number above 0 and at most 1, got {share}")


def _rows(groups: ArrayLike | None, n: int) -> list[NDArray[np.int64]]:
    """The positions of the samples of each group."""
    if groups is None:
        return [np.arange(n)]
    names: NDArray[Any] = np.asarray(groups)
    if names.shape != (n,):
        raise ValueError(f"groups: expected one group per sample, shape ({n},), got {names.shape}")
    unknown = [i for i, name in enumerate(names.tolist()) if name is None or name != name]
    if unknown:
        raise ValueError(
            f"groups: expected a group for every sample, got none for {len(unknown)} of {n}, positions {unknown[:5]}; name a group of their own"
        )
    _, number = np.unique(names, return_inverse=True)
    return [np.flatnonzero(number == each) for each in range(number.max() + 1)]


def _vector(scores: Scores | ArrayLike) -> NDArray[np.float64]:
    values = scores.values if isinstance(scores, Scores) else np.asarray(scores, dtype=np.float64)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"scores: expected one value per sample, shape (n,), got shape {values.shape}")
    _check_finite(values[:, None])
    return values


def _columns(scores: Sequence[Scores] | ArrayLike) -> ArrayLike:
    """The scores of each target as a column, where they are not a matrix already."""
    if isinstance(scores, Scores):
        return scores.values[:, None]
    if not isinstance(scores, (list, tuple)) or not any(isinstance(each, Scores) for each in scores):
        return scores  # type: ignore[return-value]
    for each in scores:
        if not isinstance(each, Scores):
            raise ValueError(f"scores: expected Scores for every target, or a matrix, got one {type(each).__name__} among them")
        if not np.array_equal(each.ids, scores[0].ids):
            raise ValueError(f"scores: expected the same samples for every target, but {scores[0].name!r} and {each.name!r} differ in their ids")
    return np.stack([each.values for each in scores], 1)


def _matrix(matrix: ArrayLike) -> NDArray[Any]:
    pairs = np.asanyarray(matrix)
    if pairs.ndim != 2 or 0 in pairs.shape or pairs.dtype.kind not in "biuf":
        raise ValueError(f"matrix: expected numbers of shape (n, q), samples by queries or targets, got shape {pairs.shape} of {pairs.dtype}")
    return pairs


def _check_finite(matrix: NDArray[np.float64], first: int = 0) -> None:
    """Name the first values that are NaN or infinite; ``first`` is the number of the first column."""
    bad = np.argwhere(~np.isfinite(matrix))
    if len(bad):
        where = [tuple(each) if matrix.shape[1] > 1 or first else each[0] for each in np.add(bad[:5], (0, first)).tolist()]
        raise ValueError(f"scores: expected finite numbers, got {len(bad)} that are not, at {', '.join(map(str, where))}")
