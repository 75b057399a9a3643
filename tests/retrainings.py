"""A small setting to retrain in, and a quick stand-in for training that counts its calls."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from cases import Gap, case
from robust_if import Recipe, Samples, Task, Utility
from robust_if.targets import Target

N, L2 = 13, 0.05
FEW = Recipe(epochs=2, batch_size=4, lr=0.1)
CALLS: list[tuple[int, int]] = []


def setting(name: str = "logistic") -> tuple[Task, Samples, list[Target]]:
    c = case(name, train=N)
    return c.task, c.train, [Utility(c.valid), Gap(c.valid)]


def nudge(task: Task, samples: Samples, weights: NDArray[np.float64], seed: int) -> Task:
    """A quick stand-in for training: the parameters moved by an amount that depends on subset and seed."""
    CALLS.append((int(weights.sum()), seed))
    shift = 0.1 * float(weights @ np.arange(1, len(samples) + 1)) / len(samples) + 0.01 * seed
    return task.at({name: value + shift * (torch.arange(value.numel()).view_as(value) % 3) for name, value in task.params().items()})


def calls() -> list[tuple[int, int]]:
    made = CALLS.copy()
    CALLS.clear()
    return made
