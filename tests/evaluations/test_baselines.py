"""baselines.py: detectors without gradients, and the accuracy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import nn

from cases import blobs
from robust_if import Recipe, Samples, Task
from robust_if.evaluations.baselines import ConfidentLearning, NearestNeighbours, accuracy, predict
from robust_if.models import logistic_regression
from unchanged import untouched

RECIPE = Recipe(epochs=8, lr=0.1, batch_size=32)


def noisy() -> tuple[Task, Samples, np.ndarray]:
    torch.manual_seed(0)
    data, mask = blobs(120, seed=0, flipped=20, distance=6)
    return Task(logistic_regression((2,), 2).double().eval()), data, mask


def test_confident_learning_finds_planted_flips_and_repeats() -> None:
    pytest.importorskip("cleanlab")
    task, data, mask = noisy()
    estimator = ConfidentLearning(RECIPE, folds=3)
    with untouched(task.model):
        got = estimator.score(task, data)
    assert roc_auc_score(mask, got.values) >= 0.97
    assert got.name == "confident-learning" and got.values.min() >= 0 and got.values.max() <= 1
    assert np.array_equal(got.values, estimator.score(task, data).values)


def test_confident_learning_does_not_depend_on_the_models_parameters() -> None:
    pytest.importorskip("cleanlab")
    task, data, _ = noisy()
    estimator, other = ConfidentLearning(RECIPE, folds=3), task.at({key: value + 5 for key, value in task.model.state_dict().items()})
    assert np.array_equal(estimator.score(task, data).values, estimator.score(other, data).values)


@pytest.mark.parametrize("k", [5, 10])
def test_nearest_neighbours_find_planted_flips(k: int) -> None:
    task, data, mask = noisy()
    got = NearestNeighbours(k).score(task, data)
    assert roc_auc_score(mask, got.values) >= 0.97
    assert got.name == "knn" and got.values.min() >= 0 and got.values.max() <= 1


def test_nearest_neighbours_by_hand() -> None:
    x = torch.tensor([[0.0], [1.0], [2.5], [10.0], [11.5]])
    y = torch.tensor([0, 0, 1, 1, 1])
    got = NearestNeighbours(2).score(Task(nn.Linear(1, 2).eval()), Samples((x, y))).values
    others = [[1, 2], [0, 2], [1, 0], [4, 2], [3, 2]]
    scale = x.numpy().std()
    distance = np.array([[abs(x[i] - x[j]).item() / scale for j in row] for i, row in enumerate(others)])
    weight = 1 / (distance + distance.mean())
    wrong = np.array([[y[i] != y[j] for j in row] for i, row in enumerate(others)])
    assert np.allclose(got, (weight * wrong).sum(1) / weight.sum(1), rtol=1e-6)


def test_a_copy_with_another_label_counts_against_a_sample_and_the_sample_itself_never_does() -> None:
    x = torch.tensor([[0.0], [0.0], [5.0], [5.0]])
    got = NearestNeighbours(1).score(Task(nn.Linear(1, 2).eval()), Samples((x, torch.tensor([0, 1, 1, 1])))).values
    assert got.tolist() == [1, 1, 0, 0]


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_accuracy_and_probabilities_by_hand(batch_size: int) -> None:
    model = nn.Linear(2, 3).double().eval()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 0], [0, 1], [-1, -1]]))
        model.bias.zero_()
    x = torch.tensor([[2.0, 0], [0, 2], [-1, -1], [3, 1], [0, 1]]).double()
    data = Samples((x, torch.tensor([0, 1, 2, 1, 0])))
    assert accuracy(Task(model), data, batch_size) == pytest.approx(3 / 5)
    logits = x.numpy() @ np.array([[1.0, 0], [0, 1], [-1, -1]]).T
    expected = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    assert np.allclose(predict(Task(model), data, batch_size), expected, atol=1e-12)
