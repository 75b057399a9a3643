"""The data of the demo: scikit-learn's digits as files, some of their labels wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from sklearn.datasets import load_digits

from robust_if.attacks.labels import uniform
from robust_if.data import as_samples
from robust_if.loading import Dataset, read


def digits(folder: Path) -> tuple[Dataset, Dataset, Dataset]:
    """scikit-learn's digits as files: 1,200 for training with 20 % of their labels flipped, 200 for validation, 397 for the test."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    pixels, labels = (images[order] * 255 / 16).astype(np.uint8).reshape(-1, 8, 8), labels[order]
    noisy = uniform(as_samples((pixels[:1200], labels[:1200])), 0.2, seed=0).data.labels.numpy()
    folder.mkdir(parents=True, exist_ok=True)
    _save(folder / "train.npz", images=pixels[:1200], labels=noisy, truth=labels[:1200])
    _save(folder / "valid.npz", images=pixels[1200:1400], labels=labels[1200:1400])
    _save(folder / "test.npz", images=pixels[1400:], labels=labels[1400:])
    return read(folder / "train.npz", truth="truth"), read(folder / "valid.npz"), read(folder / "test.npz")


def _save(path: Path, **arrays: Any) -> None:
    """Write an archive, unless it is there already; another file of that name is not overwritten."""
    if not path.exists():
        np.savez(path, **arrays)
        return
    with np.load(path, allow_pickle=False) as file:
        if set(file.files) != set(arrays) or not all(np.array_equal(file[name], array) for name, array in arrays.items()):
            raise ValueError(f"out: {path} exists and holds something else; choose another folder")
