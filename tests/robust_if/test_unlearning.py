"""estimators/unlearning.py: samples that are forgotten together with an attack, or with the most suspicious ones."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from cases import case, relative
from oracles import flat, full_gradient
from robust_if import Certainty, LossChange, Plain, Recipe, Samples, Task, Tuning, Unlearning, Utility, fit
from robust_if.attacks.backdoors import Backdoor
from robust_if.attacks.poisoned import Poisoned
from robust_if.attacks.success import AttackSuccess
from robust_if.attacks.triggers import FeatureValues
from robust_if.estimators import Loss, ValidationLoss
from robust_if.models import mlp

BACKDOOR = Backdoor(FeatureValues({3: 6.0}), 0, 0.1, bounds=None)
FIRST = ValidationLoss(Recipe(epochs=20, lr=0.05))


def classes(n: int, seed: int) -> Samples:
    """Three classes in three features, and a fourth feature that says nothing."""
    draw, y = np.random.default_rng(seed), np.arange(n) % 3
    x = np.concatenate([2.5 * np.eye(3)[y] + draw.normal(size=(n, 3)), draw.normal(size=(n, 1))], 1)
    return Samples((torch.from_numpy(x), torch.from_numpy(y)))


@cache
def attacked() -> tuple[Task, Poisoned[Samples], Samples, Samples]:
    """A model with a backdoor, the poison, validation data and triggered inputs."""
    poison = BACKDOOR(classes(240, 0), seed=0)
    start = Task(mlp((4,), 3, width=16, depth=1).double().eval()).reset(0)
    task = fit(start, poison.data, Recipe(epochs=40, lr=0.1))
    return task, poison, classes(90, 1), BACKDOOR.triggered(classes(60, 2))


def test_certainty_is_exact_and_that_of_one_class_is_attack_success() -> None:
    c = case("mlp")
    x, y = c.valid.batch(slice(None))[:2]
    params, target = c.task.params(), Certainty(Samples((x, y)), batch_size=4)
    p = c.task.outputs(params, (x,)).softmax(1).gather(1, y[:, None])[:, 0]
    assert relative(target.value(c.task, params), -(1 - p).log().mean()) <= 1e-12
    assert relative(flat(target.gradient(c.task, params)), full_gradient(lambda p: target.value(c.task, p), params)) <= 1e-10
    ones = Certainty((x, torch.ones_like(y)))
    assert relative(ones.value(c.task, params), AttackSuccess(x, goal_class=1).value(c.task, params)) <= 1e-12


@pytest.mark.parametrize("count", [1, 10])
def test_what_is_forgotten_with_the_attack_is_the_poison(count: int) -> None:
    task, poison, valid, triggered = attacked()
    inputs = triggered.take(np.arange(count))
    scores = LossChange().score(task, poison.data, target=AttackSuccess(inputs, goal_class=0) + Utility(valid))
    ordered = scores.put_first(poison.data.labels == 0)
    assert roc_auc_score(poison.mask, ordered.values) >= 0.99
    before = Loss().score(task, poison.data)
    assert roc_auc_score(poison.mask, before.values) < 0.8


def test_clean_data_alone_find_the_poison() -> None:
    task, poison, valid, _ = attacked()
    scores = Unlearning(FIRST).score(task, poison.data, target=Utility(valid))
    assert scores.name == "unlearning:utility" and scores.units == "rank"
    assert roc_auc_score(poison.mask, scores.values) >= 0.98
    assert scores.members is not None
    assert np.array_equal(scores.members.max(0), scores.values)
    assert roc_auc_score(poison.mask, scores.members[1]) >= 0.98


def test_it_is_the_loss_change_of_the_most_suspicious() -> None:
    task, poison, valid, _ = attacked()
    tuning = Tuning(steps=5, flatness=Plain())
    got = Unlearning(FIRST, share=0.05, tuning=tuning).score(task, poison.data, target=Utility(valid))
    first = FIRST.score(task, poison.data, target=Utility(valid)).values
    top = np.argsort(-first, kind="stable")[:12]
    change = LossChange(tuning).score(task, poison.data, target=Certainty(poison.data.take(top)) + Utility(valid)).values
    assert got.members is not None and got.provenance["unlearnt"] == 12
    for member, values in zip(got.members, (first, change), strict=True):
        assert np.array_equal(np.argsort(member), np.argsort(values))


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1])
def test_a_share_is_between_none_and_all(share: float) -> None:
    with pytest.raises(ValueError, match="share: expected a share strictly between 0 and 1"):
        Unlearning(share=share)
