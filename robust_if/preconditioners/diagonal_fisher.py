"""The diagonal of the empirical Fisher information."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from robust_if.data import Samples, batches
from robust_if.layers import LayerGradients
from robust_if.task import Params, Task


def diagonal_fisher(task: Task, params: Params, data: Sequence[Samples], batch_size: int = 256) -> Params:
    """F_j = mean over the samples of (∂ℓᵢ/∂θ_j)², with the shapes of ``params``; one forward and one backward pass.

    Args:
        data: data sets whose samples are averaged over together.
    """
    like = next(iter(params.values()))
    total = {name: torch.zeros_like(value) for name, value in params.items()}
    gradients: LayerGradients | None = None
    for samples in data:
        for batch in batches(samples, batch_size, like):
            gradients = gradients or LayerGradients(task, params, batch)
            for name, squares in gradients.second_moment(batch).items():
                total[name] += squares
    count = sum(len(samples) for samples in data)
    return {name: value / count for name, value in total.items()}
