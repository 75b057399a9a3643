"""Flipped labels, at random or chosen: what is returned carries the truth apart from the data, so that no estimator can see it.

The rate is strictly between 0 and 1; it is a share of all samples, rounded to whole ones, unless a function says otherwise.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.special import softmax
from scipy.stats import truncnorm

from robust_if.attacks.poisoned import Poisoned, number
from robust_if.data import Samples, batches
from robust_if.estimators import InnerProduct
from robust_if.preconditioners import Exact
from robust_if.targets import Target
from robust_if.task import Task

Labels = NDArray[np.int64]


def uniform(data: Samples, rate: float, *, seed: int, classes: int | None = None) -> Poisoned[Samples]:
    """Exactly ``rate`` of the samples, drawn at random, get another label, drawn uniformly from the other classes.

    Args:
        data: samples ``(x, y, …)``; all but the labels stay as they are.
        rate: share of all samples.
        seed: draws samples and labels.
        classes: number of classes; the largest label plus one by default.

    Raises:
        ValueError: if the rate is not strictly between 0 and 1 or means no sample, or a label is not in 0 … ``classes`` − 1. All flips raise this.
    """
    labels, count = _labels(data, classes)
    rng = np.random.default_rng(seed)
    chosen = _drawn(np.arange(len(labels)), number(rate, len(labels)), rng)
    labels[chosen] = (labels[chosen] + rng.integers(1, count, size=len(labels))[chosen]) % count
    return _poisoned(data, labels)


def pair(data: Samples, rate: float, *, seed: int, classes: int | None = None) -> Poisoned[Samples]:
    """Exactly ``rate`` of the samples, drawn at random, get the label of the next class, c + 1 modulo the number of classes.

    Source: pair flipping, Han et al. 2018 (Co-teaching, arXiv 1804.06872).
    """
    labels, count = _labels(data, classes)
    chosen = _drawn(np.arange(len(labels)), number(rate, len(labels)), np.random.default_rng(seed))
    labels[chosen] = (labels[chosen] + 1) % count
    return _poisoned(data, labels)


def targeted(data: Samples, source: int, goal: int, rate: float, *, seed: int, rate_of: Literal["class", "dataset"] = "class") -> Poisoned[Samples]:
    """Samples of the class ``source``, drawn at random, get the label ``goal``.

    Args:
        rate: how many, as a share of what ``rate_of`` names.
        rate_of: ``"class"``, the samples of ``source``; or ``"dataset"``, all samples.

    Raises:
        ValueError: if a class is absent, both are the same, or ``source`` has fewer samples than the rate means.
    """
    labels, _ = _labels(data, None)
    for name, label in (("source", source), ("goal", goal)):
        if label not in labels:
            raise ValueError(f"{name}: no sample has the label {label}; the labels are {np.unique(labels).tolist()[:10]}")
    if source == goal:
        raise ValueError(f"goal: expected another class than source, got {goal} for both")
    if rate_of not in ("class", "dataset"):
        raise ValueError(f"rate_of: expected 'class' or 'dataset', got {rate_of!r}")
    rows = np.flatnonzero(labels == source)
    count = number(rate, len(rows), of=f"samples of class {source}") if rate_of == "class" else number(rate, len(labels))
    if count > len(rows):
        raise ValueError(f"rate: {rate} of the data set is {count} samples, but class {source} has {len(rows)}")
    labels[_drawn(rows, count, np.random.default_rng(seed))] = goal
    return _poisoned(data, labels)


def boundary(data: Samples, rate: float, surrogate: Task | ArrayLike) -> Poisoned[Samples]:
    """The samples that a surrogate takes most easily for another class get the label of that class. Deterministic.

    A sample's other class is the most probable one besides its label; the samples with the largest probability of it are flipped. Such labels are
    wrong and plausible, so that a loss hardly tells them from samples that are hard by nature.

    Args:
        surrogate: a trained task with one output per class; or probabilities ``(n, classes)``.

    Raises:
        ValueError: if the probabilities do not fit the data.
    """
    p = _probabilities(surrogate, data) if isinstance(surrogate, Task) else np.asarray(surrogate, dtype=np.float64)
    if p.ndim != 2 or len(p) != len(data) or p.shape[1] < 2 or not (np.isfinite(p).all() and (p >= 0).all()):
        raise ValueError(f"surrogate: expected finite probabilities, shape ({len(data)}, classes), none of them negative, got shape {p.shape}")
    return _largest(data, rate, p)


def influence_chosen(
    data: Samples, rate: float, task: Task, target: Target, *, estimator: InnerProduct = InnerProduct(Exact())  # noqa: B008 - frozen
) -> Poisoned[Samples]:  # fmt: skip
    """The flips that are predicted to raise a target most: adversarial labelling. Deterministic.

    Giving sample i the label c moves the target by −(1/n) ⟨∇T, P (∇ℓ(x_i, c) − ∇ℓ(x_i, y_i))⟩ to first order: the influence of the flipped sample
    less that of the sample as it is. Each sample counts with its best class, and the flips with the largest gains are made, all to the same model.

    Args:
        task: the attacker's model, trained on ``data``.
        target: what the attacker raises, such as the validation loss or a fairness gap, on held-out data of the attacker.
        estimator: P; the exact inverse by default, for up to 10,000 parameters.

    Source: the influence of a changed sample, Koh and Liang 2017 (arXiv 1703.04730), section 2.2; labelling as a poisoning of fair classifiers, Van
    et al. 2022 (arXiv 2110.08932).
    """
    number(rate, len(data))
    outputs = _probabilities(task, data.take([0])).shape[1]
    labels, count = _labels(data, outputs)
    candidates = (data.with_labels(np.full(len(labels), c)) for c in range(count))
    influence = np.stack([estimator.score(task, data, target=target, samples=each).values for each in candidates], 1)
    return _largest(data, rate, influence - np.take_along_axis(influence, labels[:, None], 1))


def instance_dependent(data: Samples, rate: float, *, seed: int, classes: int | None = None, std: float = 0.1) -> Poisoned[Samples]:
    """Labels flip with a probability and to a class that depend on the features.

    Sample i flips with probability q_i ~ N(``rate``, ``std``²) truncated to [0, 1]; the new class is drawn from softmax(x_i W_y) without its own
    class, where each class y has its own Gaussian projection W_y. The realised share of flips therefore varies around ``rate``.

    Source: Xia et al. 2020, "Part-dependent Label Noise" (arXiv 2006.07836), algorithm 2.
    """
    labels, count = _labels(data, classes)
    number(rate, len(labels))
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


def given(data: Samples, noisy: ArrayLike) -> Poisoned[Samples]:
    """Real noise: labels that somebody gave, ``(n,)``, in the place of those of ``data``, which are taken as the truth.

    Raises:
        ValueError: if there is not one label per sample, or none differs from the truth.
    """
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


def _labels(data: Samples, classes: int | None) -> tuple[Labels, int]:
    """A copy of the labels, and the number of classes."""
    labels = data.labels.numpy().copy()
    count = int(labels.max()) + 1 if classes is None else classes
    if labels.min() < 0 or labels.max() >= count:
        raise ValueError(f"classes: expected labels from 0 to {count - 1}, got {labels.min()} to {labels.max()}")
    if count < 2:
        raise ValueError(f"classes: label noise needs at least 2 classes, got {count}")
    return labels, count


def _drawn(rows: Labels, count: int, rng: np.random.Generator) -> Labels:
    return rng.permutation(rows)[:count]


def _largest(data: Samples, rate: float, gains: NDArray[np.float64]) -> Poisoned[Samples]:
    """The flips with the largest of the gains ``(n, classes)``; among equal ones those of the first samples."""
    labels, _ = _labels(data, gains.shape[1])
    others = gains.copy()
    np.put_along_axis(others, labels[:, None], -np.inf, 1)
    chosen = np.argsort(-others.max(1), kind="stable")[: number(rate, len(labels))]
    labels[chosen] = others[chosen].argmax(1)
    return _poisoned(data, labels)


def _probabilities(task: Task, data: Samples) -> NDArray[np.float64]:
    """The task's probabilities of the classes, ``(n, classes)``."""
    params = task.params()
    with torch.no_grad():
        outputs = torch.cat([task.outputs(params, batch) for batch in batches(data, 256, next(task.model.parameters()))])
    if outputs.ndim != 2 or outputs.shape[1] < 2:
        raise ValueError(f"task: expected one output per class, shape (n, classes), got {tuple(outputs.shape)}")
    return torch.softmax(outputs, 1).double().cpu().numpy()


def _poisoned(data: Samples, labels: NDArray[Any]) -> Poisoned[Samples]:
    return Poisoned(data.with_labels(labels), labels != data.labels.numpy())
