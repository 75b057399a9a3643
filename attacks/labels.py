"""Label noise: what it returns carries the truth apart from the data, so that no estimator can see it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import softmax
from scipy.stats import truncnorm

from robust_if.data import Samples


@dataclass(frozen=True, eq=False)
class Poisoned:
    """Tampered data and, apart from them, the truth.

    Args:
        data: what the victim trains on; the ids are those of the original.
        mask: ``(n,)``, true where the sample was changed.
    """

    data: Samples
    mask: NDArray[np.bool_]


def symmetric(data: Samples, rate: float, *, seed: int, classes: int | None = None) -> Poisoned:
    """Exactly ``rate`` of the samples, drawn at random, get another label, drawn uniformly from the other classes.

    Args:
        rate: share of samples that are changed, 0 to 1, rounded to whole samples.
        seed: draws samples and labels.
        classes: number of classes; the largest label plus one by default.
    """
    labels, count = _labels(data, rate, classes)
    rng = np.random.default_rng(seed)
    chosen = _chosen(len(labels), rate, rng)
    shift = rng.integers(1, count, size=len(labels))
    return _poisoned(data, np.where(chosen, (labels + shift) % count, labels))


def pair(data: Samples, rate: float, *, seed: int, classes: int | None = None) -> Poisoned:
    """Exactly ``rate`` of the samples, drawn at random, get the label of the next class, c + 1 modulo the number of classes.

    Source: pair flipping, Han et al. 2018 (Co-teaching, arXiv 1804.06872).
    """
    labels, count = _labels(data, rate, classes)
    chosen = _chosen(len(labels), rate, np.random.default_rng(seed))
    return _poisoned(data, np.where(chosen, (labels + 1) % count, labels))


def instance_dependent(data: Samples, rate: float, *, seed: int, classes: int | None = None, std: float = 0.1) -> Poisoned:
    """Labels flip with a probability and to a class that depend on the features.

    Sample i flips with probability q_i ~ N(``rate``, ``std``²) truncated to [0, 1]; the new class is drawn from softmax(x_i W_y) without its own
    class, where each class y has its own Gaussian projection W_y. The realised share of flips therefore varies around ``rate``.

    Source: Xia et al. 2020, "Part-dependent Label Noise" (arXiv 2006.07836), algorithm 2.
    """
    labels, count = _labels(data, rate, classes)
    rng = np.random.default_rng(seed)
    features = data.batch(slice(None))[0].flatten(1).double().numpy()
    features = (features - features.mean(0)) / (features.std(0) + 1e-12)
    flip = truncnorm.rvs(-rate / std, (1 - rate) / std, loc=rate, scale=std, size=len(labels), random_state=rng)
    projections = rng.standard_normal((count, features.shape[1], count)) / np.sqrt(features.shape[1])
    noisy = labels.copy()
    for y in range(count):
        rows = np.flatnonzero(labels == y)
        logits = features[rows] @ projections[y]
        logits[:, y] = -np.inf
        other = softmax(logits, axis=1)
        flips = rng.uniform(size=len(rows)) < flip[rows]
        drawn = (other.cumsum(1) > rng.uniform(size=(len(rows), 1))).argmax(1)
        noisy[rows[flips]] = drawn[flips]
    return _poisoned(data, noisy)


def given(data: Samples, noisy: ArrayLike) -> Poisoned:
    """Real noise: labels that somebody gave, ``(n,)``, in the place of those of ``data``, which are taken as the truth."""
    labels = np.asarray(noisy)
    if labels.shape != (len(data),):
        raise ValueError(f"noisy: expected one label per sample, shape ({len(data)},), got {labels.shape}")
    return _poisoned(data, labels)


def read_labels(path: Path, name: str) -> NDArray[Any]:
    """The array ``name`` of an ``.npz`` file of labels, such as ``worse_label`` of CIFAR-10N.

    Raises:
        ValueError: if the file holds no such array, or Python objects.
    """
    with np.load(path, allow_pickle=False) as file:
        if name not in file:
            raise ValueError(f"name: {path} holds no array {name!r}; it has {', '.join(file.files)}")
        labels: NDArray[Any] = file[name]
    return labels


def _labels(data: Samples, rate: float, classes: int | None) -> tuple[NDArray[np.int64], int]:
    if not 0 <= rate <= 1:
        raise ValueError(f"rate: expected a share from 0 to 1, got {rate}")
    labels = data.labels.numpy()
    count = int(labels.max()) + 1 if classes is None else classes
    if labels.min() < 0 or labels.max() >= count:
        raise ValueError(f"classes: expected labels from 0 to {count - 1}, got {labels.min()} to {labels.max()}")
    if count < 2:
        raise ValueError(f"classes: label noise needs at least 2 classes, got {count}")
    return labels, count


def _chosen(n: int, rate: float, rng: np.random.Generator) -> NDArray[np.bool_]:
    chosen = np.zeros(n, dtype=bool)
    chosen[rng.permutation(n)[: round(rate * n)]] = True
    return chosen


def _poisoned(data: Samples, labels: NDArray[Any]) -> Poisoned:
    return Poisoned(data.with_labels(labels), labels != data.labels.numpy())
