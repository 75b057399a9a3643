"""Availability poison: every sample is changed a little so that a model trained on them is of no use on clean inputs. Labels stay.

The change is a shortcut: easy to learn, tells the class, and is absent at test time. Since nearly all samples are poison there is nothing to filter;
what helps is adversarial training or augmentation.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from math import inf

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import make_classification
from torch import Tensor

from robust_if.attacks.crafting import Region
from robust_if.attacks.evasion import Bounds, Limit, Threat, pgd
from robust_if.attacks.poisoned import Poisoned
from robust_if.data import Samples, as_samples, to
from robust_if.task import Task


def linear_patches(
    data: Samples, *, eps: Limit = 6 / 255, bounds: Bounds | None = (0.0, 1.0), patch: int = 8, seed: int
) -> Poisoned[Samples]:  # fmt: skip
    """Add noise that is constant on patches and linearly separable by class (LSP).

    A sample's noise is one draw of scikit-learn's ``make_classification``: far-apart Gaussian clusters around corners of a hypercube, one for each
    class, with a dimension for every patch and channel. It is scaled to a root mean square of ``eps``; single values may exceed that.

    Args:
        data: ``(input, label)`` samples: images ``(C, H, W)`` or ``(H, W)``, or rows ``(d,)``, whose patches are runs of features.
        eps: root mean square of the noise in the unit of the inputs, or a tensor that scales the noise of each feature.
        bounds: smallest and largest valid input, to which the result is clamped, numbers or one per feature; ``None`` for inputs without.
        patch: side of a patch; those at the far edges are cut where the sides do not divide.
        seed: draws the noise.

    Raises:
        ValueError: if there are too few patches to separate the classes, a number is out of range, or inputs lie outside ``bounds``.

    Source: Yu et al. 2022 (arXiv 2111.00898); the defaults are those for images of 32 x 32.
    """
    data, x, labels = _parts(data)
    if patch < 1:
        raise ValueError(f"patch: expected at least 1, got {patch}")
    Region.around(x, eps, bounds, "data")
    if not torch.as_tensor(eps).any():
        raise ValueError("eps: expected some number above 0, got none")
    channels, *sides = _channels_first(x).shape[1:]
    grid = (channels, *(-(-side // patch) for side in sides))
    count, (classes, sizes) = int(np.prod(grid)), np.unique(labels, return_counts=True)
    if len(classes) > 2 ** min(count, 60):
        raise ValueError(f"patch: {count} patches in an input of {tuple(x.shape[1:])} cannot separate {len(classes)} classes; use smaller patches")
    values, drawn = make_classification(
        len(classes) * int(sizes.max()), count, n_informative=count, n_redundant=0, n_classes=len(classes), n_clusters_per_class=1, flip_y=0,
        class_sep=10, random_state=seed,
    )  # fmt: skip
    noise = np.empty((len(x), count))
    for k, label in enumerate(classes):
        noise[labels == label] = values[drawn == k][: sizes[k]]
    spread = torch.from_numpy(noise).view(len(x), *grid)
    for axis, side in enumerate(sides, start=2):
        spread = spread.repeat_interleave(patch, axis).narrow(axis, 0, side)
    spread = spread / spread.square().mean(tuple(range(1, spread.ndim)), keepdim=True).sqrt()
    change = torch.as_tensor(eps, dtype=torch.float64) * spread.reshape(x.shape)
    return _poisoned(data, Region.around(x, inf, bounds, "data").project(x + change.to(x)))


def one_pixel_shortcut(data: Samples, *, bounds: tuple[float, float] = (0.0, 1.0)) -> Poisoned[Samples]:
    """Set one pixel of every image to an extreme colour, the same for all images of a class (OPS).

    The pixel and the colour, each channel at one of its bounds, are those for which the mean change over the class is largest in relation to its
    standard deviation; among equals those of largest mean. No two classes share both. Nothing is drawn, so there is no seed.

    Args:
        data: ``(input, label)`` samples: images ``(C, H, W)`` or ``(H, W)``, or rows ``(d,)``, of which one feature is set.
        bounds: smallest and largest valid input.

    Raises:
        ValueError: if there are more classes than pixels and colours, more than 8 channels, or inputs lie outside ``bounds``.

    Source: Wu et al. 2023 (arXiv 2205.12141); its code divides by the standard deviation, as here.
    """
    data, x, labels = _parts(data)
    Region.around(x, inf, bounds, "data")
    pixels = _channels_first(x).flatten(2).double()
    channels, classes = pixels.shape[1], np.unique(labels)
    if channels > 8:
        raise ValueError(f"data: expected at most 8 channels, the first axis of a sample, got inputs of shape {tuple(x.shape[1:])}")
    colours = torch.tensor(list(product(bounds, repeat=channels)), dtype=torch.float64)
    if len(classes) > len(colours) * pixels.shape[2]:
        raise ValueError(f"data: {pixels.shape[2]} pixels in {len(colours)} colours are too few for {len(classes)} classes")
    free = torch.ones(len(colours), pixels.shape[2], dtype=torch.bool)
    changed = pixels.clone()
    for label in classes:
        rows = torch.from_numpy(np.flatnonzero(labels == label))
        colour, pixel = _shortcut(pixels[rows], colours, free)
        free[colour, pixel] = False
        changed[rows, :, pixel] = colours[colour]
    return _poisoned(data, changed.view(x.shape).to(x))


def _shortcut(pixels: Tensor, colours: Tensor, free: Tensor) -> tuple[int, int]:
    """The colour and the pixel of the best shortcut for images ``(n, C, P)``, among those that are ``free``, ``(colours, P)``."""
    changes = torch.stack([(colour[:, None] - pixels).abs().sum(1) for colour in colours])
    mean, deviation = changes.mean(1), changes.std(1, correction=0)
    score = torch.where(mean > 0, mean / deviation, 0.0).where(free, -1.0)
    best = mean.where(score == score.max(), -1.0).argmax()
    return int(best) // pixels.shape[2], int(best) % pixels.shape[2]


def targeted_adversarial(
    task: Task, data: Samples, *, eps: Limit = 8 / 255, bounds: Bounds | None = (0.0, 1.0), steps: int = 250,
    permutation: Sequence[int] | None = None, batch_size: int = 256,
) -> Poisoned[Samples]:  # fmt: skip
    """Attack every input so that a clean model takes it for another class, one for each class, while the label stays (TAP).

    A model trained on that learns the features of another class for every class. Projected gradient descent starts at the clean input, so nothing
    is drawn, and there is no seed.

    Args:
        task: the crafting model, trained on ``data``.
        data: ``(input, label)`` samples with labels from 0 to K − 1, the input of floating point and any shape.
        eps: largest change of an input, a number or one per feature, in the unit of the inputs.
        bounds: smallest and largest valid input, numbers or one per feature; ``None`` for inputs without.
        steps: of the attack.
        permutation: the class that an input of class k is to be taken for, at position k; k + 1 modulo K by default.
        batch_size: how many inputs are attacked at a time; it does not change the result beyond rounding.

    Raises:
        ValueError: if ``permutation`` is none or leaves a class as it is, and as :func:`robust_if.attacks.evasion.pgd` does.

    Source: Fowl et al. 2021 (arXiv 2106.10807), the class-targeted attack; without its restarts.
    """
    data, x, labels = _parts(data)
    region = Region.around(x, eps, bounds, "data")
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
    count = int(labels.max()) + 1 if permutation is None else len(permutation)
    goals = [(k + 1) % count for k in range(count)] if permutation is None else list(permutation)
    if labels.min() < 0 or labels.max() >= count:
        raise ValueError(f"permutation: expected labels from 0 to {count - 1}, got {labels.min()} to {labels.max()}")
    if sorted(goals) != list(range(count)) or any(k == goal for k, goal in enumerate(goals)):
        raise ValueError(f"permutation: expected every class from 0 to {count - 1} once, none at its own position, got {goals}")
    wanted, params = data.labels.new_tensor(goals)[data.labels], task.params()
    like = next(task.model.parameters())
    attacked = [
        pgd(task, params, to(batch, like), Threat(eps, bounds=bounds), steps=steps, targeted=True)
        for batch in zip(torch.split(x, batch_size), torch.split(wanted, batch_size), strict=True)
    ]
    return _poisoned(data, region.project(torch.cat(attacked).to(x)))


def _parts(data: Samples) -> tuple[Samples, Tensor, NDArray[np.int64]]:
    data = as_samples(data)
    return data, data.batch(slice(None))[0], data.labels.cpu().numpy()


def _channels_first(x: Tensor) -> Tensor:
    """Inputs ``(n, C, …)``, with one channel where they have none."""
    if x.ndim < 2:
        raise ValueError(f"data: expected rows (d,) or images, got inputs of shape {tuple(x.shape[1:])}")
    return x if x.ndim > 3 else x[:, None]


def _poisoned(data: Samples, changed: Tensor) -> Poisoned[Samples]:
    """The data with other inputs; poison is what differs."""
    inputs, *rest = data.batch(slice(None))
    mask = (changed != inputs).flatten(1).any(1).cpu().numpy()
    return Poisoned(Samples((changed, *rest), data.ids), mask)
