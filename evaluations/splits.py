"""Validation and test data that are split off a file, by class, and checked labels where those are known."""

from __future__ import annotations

import numpy as np
from sklearn.model_selection import train_test_split

from robust_if.loading import Dataset


def split_off(data: Dataset, fraction: float, seed: int, name: str) -> tuple[Dataset, Dataset, str | None]:
    """The rest of ``data``, the part split off, and what a reader should be warned of.

    The part carries the true labels where they are known, and leaves the bad samples out where only these are.

    Args:
        name: ``"validation"`` or ``"test"``, for messages.

    Raises:
        ValueError: if the fraction is out of range, or a class is too small to be split.
    """
    option = f"{'valid' if name == 'validation' else name}-fraction"
    if not 0 < fraction < 1:
        raise ValueError(f"{option}: expected a share between 0 and 1, got {fraction}")
    try:
        rest, held = train_test_split(np.arange(len(data)), test_size=fraction, random_state=seed, stratify=data.labels)
    except ValueError as error:
        raise ValueError(f"{option}: cannot split {fraction} off by class: {error}") from None
    part = _corrected(data.take(np.sort(held)))
    noisy = f"The {name} data were split off the same file, so they are as noisy as it is; pass checked samples where you can."
    return data.take(np.sort(rest)), part, noisy if part.truth is None else None


def _corrected(data: Dataset) -> Dataset:
    if data.truth is None:
        return data
    return data.take(~data.truth) if data.truth.dtype == bool else data.with_labels(data.truth)
