"""Nearest neighbours in input space."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from sklearn.neighbors import NearestNeighbors


def nearest(rows: NDArray[np.floating], n: int, k: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Euclidean distances and positions, each ``(n, k)``, of the k nearest other rows to each of the first ``n`` rows.

    Args:
        rows: ``(m, d)``.
        n: how many rows are asked for, at most m.
        k: how many neighbours; fewer where there are not so many other rows.
    """
    distances, found = NearestNeighbors(n_neighbors=min(k + 1, len(rows))).fit(rows).kneighbors(rows[:n])
    itself = found == np.arange(n)[:, None]
    itself[~itself.any(1), -1] = True  # among exact copies a row may be missing from its own list: the farthest one leaves
    return distances[~itself].reshape(n, -1), found[~itself].reshape(n, -1)
