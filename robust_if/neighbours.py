"""Nearest neighbours in input space."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_matrix, csr_matrix
from sklearn.feature_extraction.text import TfidfTransformer
from sklearn.neighbors import NearestNeighbors


def word_weights(tokens: NDArray[np.int64]) -> csr_matrix:
    """TF-IDF weights of texts, each row of length 1: ``(n, vocabulary)`` from tokens ``(n, T)``, negative where there is none."""
    row, column = np.nonzero(tokens >= 0)
    counts = coo_matrix((np.ones(len(row)), (row, tokens[row, column])), shape=(len(tokens), int(tokens.max()) + 1))
    return csr_matrix(TfidfTransformer(sublinear_tf=True).fit_transform(counts.tocsr()))


def nearest(rows: NDArray[np.floating] | csr_matrix, n: int, k: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Euclidean distances and positions, each ``(n, k)``, of the k nearest other rows to each of the first ``n`` rows.

    Args:
        rows: ``(m, d)``.
        n: how many rows are asked for, at most m.
        k: how many neighbours; fewer where there are not so many other rows.
    """
    distances, found = NearestNeighbors(n_neighbors=min(k + 1, rows.shape[0])).fit(rows).kneighbors(rows[:n])
    itself = found == np.arange(n)[:, None]
    itself[~itself.any(1), -1] = True  # among exact copies a row may be missing from its own list: the farthest one leaves
    return distances[~itself].reshape(n, -1), found[~itself].reshape(n, -1)


def near_duplicates(rows: NDArray[np.floating], labels: NDArray[Any], width: float | None = None) -> csr_matrix:
    """exp(−d² / w²) for pairs of rows of one label within 3 w of each other, 1 on the diagonal: a sparse matrix ``(n, n)``.

    Args:
        rows: ``(n, d)``; every feature is scaled to a standard deviation of 1 before distances d are taken.
        labels: ``(n,)``.
        width: w; half of the median distance to the nearest other row of the same label by default, for each label, and at least 0.001.
    """
    spread = rows.std(0)
    scaled = rows / np.where(spread > 0, spread, 1)
    parts = []
    for label in np.unique(labels):
        own = np.flatnonzero(labels == label)
        neighbours = NearestNeighbors().fit(scaled[own])
        w = width
        if w is None:
            w = max(float(np.median(neighbours.kneighbors(n_neighbors=1)[0])) / 2, 1e-3) if len(own) > 1 else 1.0
        near = neighbours.radius_neighbors_graph(scaled[own], 3 * w, mode="distance").tocoo()
        parts.append((own[near.row], own[near.col], np.exp(-((near.data / w) ** 2))))
    row, column, value = (np.concatenate(each) for each in zip(*parts, strict=True))
    return coo_matrix((value, (row, column)), shape=(len(labels), len(labels))).tocsr()
