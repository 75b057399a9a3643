"""The half moons of Yang et al. 2026 (arXiv 2405.17490): the inner product finds flipped labels of a small network."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.datasets import make_moons

from robust_if import InnerProduct, Recipe, Task, Utility, as_samples, train
from robust_if.models import mlp


def flipped_moons(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Inputs, labels, and the mask of the 20 samples deep in their moon whose label is wrong."""
    x, y = make_moons(n_samples=250, noise=0.125, random_state=42)
    upper = (y == 0) & (x[:, 1] >= 0.8) & (np.abs(x[:, 0]) <= 0.5)
    lower = (y == 1) & (x[:, 1] <= -0.45) & (x[:, 0] >= 0.5) & (x[:, 0] <= 1.5)
    draw = np.random.default_rng(seed)
    chosen = np.concatenate([draw.choice(np.flatnonzero(part), 10, replace=False) for part in (upper, lower)])
    flipped = np.isin(np.arange(len(y)), chosen)
    return x, np.where(flipped, 1 - y, y), flipped


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_most_harmful_samples_are_the_flipped_labels(seed: int) -> None:
    """Three hidden layers of 32; 100 epochs of the default recipe in batches of 32. The seed draws flips, initial parameters and order."""
    x, y, flipped = flipped_moons(seed)
    torch.manual_seed(seed)
    task = Task(mlp((2,), 2, width=32, depth=3).eval())
    task = task.at(train(task, as_samples((x, y)), Recipe(epochs=100, batch_size=32, seed=seed))[-1].state)
    valid = make_moons(n_samples=100, noise=0.1, random_state=42)
    scores = InnerProduct().score(task, (x, y), target=Utility(valid))  # type: ignore[arg-type]
    assert flipped.sum() == 20
    assert flipped[scores.top(20)].sum() >= 16
