"""The published defence protocol: the formulas, and that it is honest about what it cannot show."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import softmax

from robust_if.evaluations.suites import published
from robust_if.evaluations.suites.parts import Attacked, Defended, Scene
from robust_if.task import Task


@pytest.fixture(scope="module")
def scene() -> published.Linear:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 5)) * [1, 3, 1, 0.5, 2] + 1
    y = (x @ [1, 0.3, -1, 2, 0] + rng.logistic(size=400) > 0).astype(np.int64)
    return published._scene(x, y, 240, 1.0, False)


def attacked(scene: published.Linear, seed: int, **options: Any) -> Attacked:
    change = published.across_the_boundary(scene, seed=seed, **options)
    return Attacked(change.scene, None, None, None, scene.fitted)


def linear(found: Attacked) -> published.Linear:
    assert isinstance(found.scene, published.Linear)
    return found.scene


@pytest.mark.parametrize("honest", [False, True])
def test_attack_moves_a_share_of_points_by_the_printed_formula(scene: published.Linear, honest: bool) -> None:
    found = linear(attacked(scene, 3, honest=honest))
    w = scene.learner.fit().coef
    x, y = scene.test.batch(slice(None))
    expected = x.numpy().copy()
    rows = expected[found.moved]
    expected[found.moved] = rows - 1.3 * ((rows @ w) / (w @ w))[:, None] * w
    assert np.allclose(found.test.batch(slice(None))[0].numpy(), expected)
    assert torch.equal(found.test.labels, y)
    assert 0.05 * len(x) - 1 <= len(found.moved) <= 0.25 * len(x)
    assert found.untouched is scene.test
    assert (found.valid is found.test) is not honest
    assert (len(found.valid) == len(scene.valid)) or not honest


def test_attacked_points_of_any_linear_model_are_right_where_they_were_wrong(scene: published.Linear) -> None:
    found = attacked(scene, 0, least=1.0, most=1.0)
    judged = published.accuracies(found, Defended(scene.fitted()), seed=0)
    assert judged["accuracy_attacked_again"] == pytest.approx(1 - judged["accuracy_untouched"])


@pytest.mark.parametrize("estimator", ["if", "ip"])
def test_scores_are_the_published_formula(scene: published.Linear, estimator: str) -> None:
    found = linear(attacked(scene, 1))
    model = scene.learner.fit()
    x, y = (each.numpy() for each in found.valid.batch(slice(None)))
    v = x.T @ (model.predict_proba(x) - y)
    g = scene.learner.x * (model.probabilities - scene.learner.y)[:, None]
    u = np.linalg.solve(model.curvature, v) if estimator == "if" else v
    benefit = g @ u
    assert np.corrcoef(benefit, -published._scores(found, estimator, 0))[0, 1] > 1 - 1e-9


def test_actions(scene: published.Linear) -> None:
    found, n = attacked(scene, 2), len(scene.train)
    removed, relabelled, reweighed = (
        published.influence(found, seed=0, action=action, fraction=0.1) for action in ("remove", "relabel", "reweigh")  # type: ignore[arg-type]
    )
    assert removed.scores is not None
    assert removed.weights is not None
    assert relabelled.labels is not None
    worst = np.argsort(-removed.scores.values, kind="stable")[: int(0.1 * n)]
    assert set(np.flatnonzero(removed.weights == 0)) == set(worst)
    assert set(np.flatnonzero(relabelled.labels != scene.learner.y)) == set(worst)
    benefit = -removed.scores.values
    expected = np.clip(4 * n * softmax((benefit - benefit.mean()) / benefit.std()), 0, 2)
    assert np.allclose(reweighed.weights, expected)


def test_same_seed_same_answer_and_refusals(scene: published.Linear) -> None:
    one, two = (published.influence(attacked(scene, 5), seed=1, estimator="ip-ensemble") for _ in range(2))
    assert one.weights is not None
    assert np.array_equal(one.weights, two.weights)
    with pytest.raises(ValueError, match="estimator: expected random or one of"):
        published.influence(attacked(scene, 5), seed=1, estimator="mystery")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="action: expected remove"):
        published.influence(attacked(scene, 5), seed=1, action="forget")  # type: ignore[arg-type]
    other = Scene(Task(torch.nn.Linear(2, 2).eval()), scene.recipe, scene.train, scene.valid, scene.test)
    with pytest.raises(ValueError, match="data: this attack"):
        published.across_the_boundary(other, seed=0)
