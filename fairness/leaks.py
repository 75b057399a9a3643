"""Whether validation data are the training data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import torch
from torch import Tensor

from robust_if.data import Samples


def same_samples(one: Samples, other: Samples) -> bool:
    """Whether two data sets hold the same (x, y), in any order.

    Lengths, shapes and labels are compared first; where these agree, which is rare, both data sets are read once.
    """
    if len(one) != len(other):
        return False
    first, second = one.batch(slice(0, 1)), other.batch(slice(0, 1))
    if not all(isinstance(each, (tuple, list)) and len(each) > 1 and isinstance(each[0], Tensor) for each in (first, second)):
        return False
    if first[0].shape != second[0].shape or first[1].shape != second[1].shape:
        return False
    if not torch.equal(*(each.labels.cpu().double().sort(0).values for each in (one, other))):
        return False
    return Counter(_digests(one)) == Counter(_digests(other))


def _digests(samples: Samples) -> Iterator[int]:
    """One number for every (x, y), in single precision, since the same data may be held in another one."""
    for start in range(0, len(samples), 1024):
        x, y = (each.cpu().float().numpy() for each in samples.batch(slice(start, start + 1024))[:2])
        yield from (hash((a.tobytes(), b.tobytes())) for a, b in zip(x, y, strict=True))
