"""The data sets of the benchmarks, as training, validation and test samples with pixels in [0, 1].

Digits come with scikit-learn; Fashion-MNIST and CIFAR-10 are read from the folder that ROBUST_IF_DATA names.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch

import robust_if as rif
from robust_if.loading import read

DATA = Path(os.environ.get("ROBUST_IF_DATA", "../shared/data"))
Splits = tuple[rif.Samples, rif.Samples, rif.Samples]


def digits(seed: int, sizes: tuple[int, int, int] = (1200, 200, 397)) -> Splits:
    """scikit-learn's 8 x 8 digits."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    return split((x / 16).astype(np.float32).reshape(-1, 1, 8, 8), y, np.arange(len(x)), sizes, seed)


def fashion(seed: int, sizes: tuple[int, int, int] = (6000, 500, 2000)) -> Splits:
    """Fashion-MNIST, 28 x 28."""
    whole = read(DATA / "fashion_mnist" / "train-images-idx3-ubyte.gz")
    assert isinstance(whole.features, np.ndarray)
    return split(whole.features, whole.labels, np.arange(len(whole)), sizes, seed)


def cifar(seed: int, sizes: tuple[int, int, int] = (4000, 500, 1500)) -> Splits:
    """The first 10,000 images of CIFAR-10, without the few that are no exact copies; ids are torchvision's indices."""
    file = np.load(DATA / "cifar10" / "train_00000_09999.npz")
    x = np.cumsum(np.cumsum(file["residual"], axis=2, dtype=np.uint8), axis=3, dtype=np.uint8)
    x[:, 0] += x[:, 1]
    x[:, 2] += x[:, 1]
    kept = np.flatnonzero(file["lossless"])
    return split((x[kept] / 255).astype(np.float32), file["labels"][kept], file["index"][kept], sizes, seed)


def split(x: np.ndarray, y: np.ndarray, ids: np.ndarray, sizes: tuple[int, int, int], seed: int) -> Splits:
    """Samples drawn at random."""
    order = np.random.default_rng(seed).permutation(len(x))[: sum(sizes)]
    whole = rif.Samples((torch.from_numpy(x[order]), torch.from_numpy(y[order]).long()), ids[order])
    a, b = sizes[0], sizes[0] + sizes[1]
    return whole.take(np.arange(a)), whole.take(np.arange(a, b)), whole.take(np.arange(b, sum(sizes)))
