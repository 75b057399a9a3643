"""estimators/retraining.py: the oracle, and that other scores have its sign and size where they should."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from cases import blobs
from oracles import flat, hessian, matrix, minimise, sample_gradients
from robust_if import InnerProduct, Recipe, Retraining, Samples, Task, Utility, train
from robust_if.task import Params

RIDGE = 0.05
RECIPE = Recipe(epochs=60, lr=1.0, momentum=0.5, batch_size=1000, weight_decay=RIDGE, schedule="constant")  # gradient descent down to rounding
N, FLIPPED = 48, 12


def ridge_risk(task: Task, data: Samples, params: Params) -> torch.Tensor:
    return task.losses(params, data.batch(slice(None))).mean() + RIDGE / 2 * flat(params).square().sum()


@pytest.fixture(scope="module")
def setting() -> tuple[Task, Samples, Utility]:
    """A model at the minimum of its training risk, from which every retraining starts; the first samples have a wrong label."""
    data, _ = blobs(N, seed=1, flipped=FLIPPED)
    task = Task(nn.Linear(2, 2).double().eval())
    start = {name: torch.zeros_like(value) for name, value in task.params().items()}
    return task.at(minimise(lambda params: ridge_risk(task, data, params), start)), data, Utility(blobs(200, seed=2)[0])


def by_hand(setting: tuple[Task, Samples, Utility], left_out: np.ndarray) -> float:
    task, data, target = setting
    moved = task.at(train(task, data.take(np.flatnonzero(~left_out)), RECIPE)[-1].state)
    return float(target.value(moved, moved.params()))


def influence(setting: tuple[Task, Samples, Utility]) -> np.ndarray:
    """−(1/n) ⟨∇T, H⁻¹ ∇ℓ_i⟩ with the exact Hessian of the training risk."""
    task, data, target = setting
    slope = flat(target.gradient(task, task.params())).numpy()
    curvature = hessian(lambda params: ridge_risk(task, data, params), task.params()).numpy()
    return -matrix(sample_gradients(task, data)) @ np.linalg.solve(curvature, slope) / N


def test_leave_one_out_is_retraining_by_hand_and_influence_predicts_it(setting: tuple[Task, Samples, Utility]) -> None:
    task, data, target = setting
    got = Retraining(RECIPE).score(task, data, target=target)
    whole = by_hand(setting, np.zeros(N, dtype=bool))
    for i in (0, 7, N - 1):
        assert got.values[i] == pytest.approx(whole - by_hand(setting, np.arange(N) == i), rel=1e-12, abs=1e-15)
    assert (got.units, got.estimator, got.target) == ("target", "leave-one-out", "utility")

    assert float(target.value(task, task.params())) == pytest.approx(whole, rel=1e-10)
    predicted = influence(setting)
    assert np.corrcoef(predicted, got.values)[0, 1] >= 0.99
    assert np.polyfit(predicted, got.values, 1)[0] == pytest.approx(1, abs=0.2)
    clear = np.abs(predicted) > 0.1 * np.abs(predicted).max()
    assert (np.sign(predicted) == np.sign(got.values))[clear].all()

    def wrong_labels_are_the_harmful_ones(values: np.ndarray) -> bool:  # but for a few near the boundary, where they are as good as right
        return bool((values[:FLIPPED] > 0).mean() >= 0.75 and values[:FLIPPED].mean() > 0 > values[FLIPPED:].mean())

    assert wrong_labels_are_the_harmful_ones(got.values)
    product = InnerProduct().score(task, data, target=target).values
    assert np.corrcoef(product, got.values)[0, 1] >= 0.9
    assert wrong_labels_are_the_harmful_ones(product)


def test_leave_group_out_gives_every_sample_the_effect_of_its_group(setting: tuple[Task, Samples, Utility]) -> None:
    task, data, target = setting
    groups = np.arange(N) // FLIPPED
    got = Retraining(RECIPE, groups=tuple(groups)).score(task, data, target=target)
    whole = by_hand(setting, np.zeros(N, dtype=bool))
    expected = [whole - by_hand(setting, groups == group) for group in range(N // FLIPPED)]
    assert got.values == pytest.approx(np.repeat(expected, FLIPPED), rel=1e-12)
    assert got.estimator == "leave-group-out" and got.values[0] > 0


def test_the_target_is_averaged_over_seeds(setting: tuple[Task, Samples, Utility]) -> None:
    task, data, target = setting
    recipe, groups = Recipe(epochs=2, batch_size=5), tuple(np.arange(N) % 2)
    singles = [Retraining(recipe, groups=groups, seeds=(seed,)).score(task, data, target=target).values for seed in (3, 4)]
    both = Retraining(recipe, groups=groups, seeds=(3, 4)).score(task, data, target=target).values
    assert not np.allclose(*singles)
    assert both == pytest.approx(np.mean(singles, axis=0), rel=1e-12)


def test_samples_that_were_not_trained_on_cannot_be_left_out(setting: tuple[Task, Samples, Utility]) -> None:
    task, data, target = setting
    with pytest.raises(ValueError, match="samples: retraining can only leave out training samples; do not pass samples"):
        Retraining(RECIPE).score(task, data, target=target, samples=data.take([0]))
    with pytest.raises(ValueError, match=r"groups: expected one number per training sample, shape \(48,\), got \(2,\)"):
        Retraining(RECIPE, groups=(0, 1)).score(task, data, target=target)
