"""The diagonal of the empirical Fisher information."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from robust_if.data import Samples
from robust_if.layers import Live
from robust_if.pieces import second_moment
from robust_if.task import Params, Task


def diagonal_fisher(task: Task, params: Params, data: Sequence[Samples], batch_size: int = 256) -> Params:
    """F_j = mean over the samples of (∂ℓᵢ/∂θ_j)², with the shapes of ``params``; one forward and one backward pass.

    Args:
        data: data sets whose samples are averaged over together.
    """
    total = {name: torch.zeros_like(value) for name, value in params.items()}
    for samples in data:
        for _, pieces in Live.of(task, params, samples, batch_size).blocks():
            for name, each in pieces:
                total[name] += second_moment(each).view_as(total[name])
    count = sum(len(samples) for samples in data)
    return {name: value / count for name, value in total.items()}
