"""attacks/adaptive.py: each attacker hides what they say, changes no more than they say, and says the truth about it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from oracles import flat, matrix, sample_gradients
from robust_if import InnerProduct, LossChange, Recipe, Samples, Task, Utility, fit
from robust_if.attacks.adaptive import Diluted, _objective, constrained, contaminate, decoys, easiest, flood, split
from robust_if.attacks.backdoors import adaptive_blend, badnets, blended, wanet, word
from robust_if.attacks.poisoned import Poisoned
from robust_if.attacks.success import AttackSuccess
from robust_if.attacks.triggers import Patch, Tokens
from robust_if.models import build
from unchanged import untouched

N, CLASSES, GOAL, EPS = 60, 3, 1, 0.1
BACKDOORS = {"badnets": badnets(GOAL, 0.2, size=2), "blended": blended(GOAL, 0.2, alpha=0.5)}
SCORES = {"product": InnerProduct(), "cosine": InnerProduct(normalise="cosine"), "loss-change": LossChange()}


def problem(dtype: torch.dtype = torch.float64) -> Samples:
    """Inputs that tell their class, within [0, 1], with ids of their own."""
    labels = torch.arange(N) % CLASSES
    x = 0.6 * torch.rand(N, 1, 5, 6, generator=torch.Generator().manual_seed(0), dtype=dtype)
    x[torch.arange(N), 0, labels] += 0.4
    return Samples((x, labels), np.arange(N) + 100)


def surrogate(backdoor: Any, data: Samples, seed: int = 0) -> Task:
    task = Task(build("mlp", (1, 5, 6), CLASSES, 3).double())
    return fit(task, backdoor(data, seed=seed).data, Recipe(epochs=8, lr=0.05, batch_size=16))


def inputs(data: Samples) -> Tensor:
    x: Tensor = data.batch(slice(None))[0]
    return x


def same(one: Poisoned[Samples], other: Poisoned[Samples]) -> bool:
    return torch.equal(inputs(one.data), inputs(other.data)) and np.array_equal(one.mask, other.mask) and np.array_equal(one.covers, other.covers)


def hiding(task: Task, backdoor: Any, data: Samples, **kwargs: Any) -> Poisoned[Samples]:
    options = {"triggered": backdoor.triggered(data), "eps": EPS, "steps": 15, "seed": 0, **kwargs}
    return constrained(task, backdoor, data, **options)


def hinge(task: Task, poisoned: Poisoned[Samples], target: Any, score: str, beta: float = 0.05) -> float:
    """By the estimator of that name: how far the poison is above the quantile of the clean samples, in their standard deviations."""
    values = torch.from_numpy(SCORES[score].score(task, poisoned.data, target=target).values)
    clean = values[~(poisoned.mask | poisoned.covers)]
    return float((values[poisoned.mask] - clean.quantile(1 - beta)).clamp(min=0).mean() / clean.std())


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("name", BACKDOORS)
def test_the_constraint_falls_within_the_ball_and_the_bounds(name: str, score: str) -> None:
    data, backdoor = problem(), BACKDOORS[name]
    task, plain = surrogate(backdoor, data), backdoor(data, seed=0)
    success = AttackSuccess(backdoor.triggered(data), goal_class=GOAL)
    target = success + Utility(data)
    found = hiding(task, backdoor, data, target=target, score=score, weight=10.0)
    before, after = hinge(task, plain, target, score), hinge(task, found, target, score)
    assert before > 0.05 and after < 0.9 * before
    x, base, rows = inputs(found.data), inputs(plain.data), torch.from_numpy(plain.mask)
    assert (x >= base - EPS).all() and (x <= base + EPS).all() and x.min() >= 0 and x.max() <= 1
    assert torch.equal(x[~rows], base[~rows]) and not torch.equal(x[rows], base[rows])
    assert torch.equal(found.data.labels, plain.data.labels) and np.array_equal(found.mask, plain.mask)
    assert np.array_equal(found.data.ids, data.ids)


@pytest.mark.parametrize("score", SCORES)
def test_the_objective_is_the_stated_one_with_its_slope(score: str) -> None:
    data, backdoor = problem(), BACKDOORS["blended"]
    task, plain = surrogate(backdoor, data), backdoor(data, seed=0)
    success = AttackSuccess(backdoor.triggered(data), goal_class=GOAL)
    target = success + Utility(data)
    objective = _objective(task, plain, success, target, score, 0.7, 0.3, 5)  # type: ignore[arg-type]
    x = inputs(plain.data)[torch.from_numpy(plain.mask)]
    value, slope = objective(x)
    total = matrix(sample_gradients(task, plain.data.take(plain.mask))).sum(0)
    wanted = -flat(success.gradient(task, task.params())).numpy()
    match = 1 - total @ wanted / np.linalg.norm(total) / np.linalg.norm(wanted)
    assert float(value) == pytest.approx(match + 0.7 * hinge(task, plain, target, score, 0.3), rel=1e-9)
    step = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=x.dtype)
    ahead, behind = (float(objective(x + sign * 1e-6 * step)[0]) for sign in (1, -1))
    assert float((slope * step).sum()) == pytest.approx((ahead - behind) / 2e-6, rel=1e-4)


def test_without_weight_the_gradients_of_the_poison_turn_to_the_attack() -> None:
    data, backdoor = problem(), BACKDOORS["blended"]
    task = surrogate(backdoor, data)
    success = AttackSuccess(backdoor.triggered(data), goal_class=GOAL)
    slope = flat(success.gradient(task, task.params())).numpy()

    def cosine(poisoned: Poisoned[Samples]) -> float:
        total = matrix(sample_gradients(task, poisoned.data.take(poisoned.mask))).sum(0)
        return float(-(total @ slope) / (np.linalg.norm(total) * np.linalg.norm(slope)))

    plain, works, hides = backdoor(data, seed=0), hiding(task, backdoor, data, weight=0.0), hiding(task, backdoor, data, weight=100.0)
    assert 1 - cosine(works) < 0.5 * (1 - cosine(plain)) and cosine(works) > cosine(hides)


def test_batches_change_nothing_and_rounds_are_other_surrogates() -> None:
    data, backdoor = problem(), BACKDOORS["badnets"]
    task = surrogate(backdoor, data)
    with untouched(task.model):
        one = hiding(task, backdoor, data, steps=3)
    parts = hiding(task, backdoor, data, steps=3, batch_size=5)
    assert torch.allclose(inputs(one.data), inputs(parts.data), atol=1e-9)
    again = hiding(task, backdoor, data, steps=3)
    assert same(one, again)
    recipe = Recipe(epochs=2)
    twice = [hiding(task, backdoor, data, steps=3, rounds=2, recipe=recipe, craft_seed=seed) for seed in (1, 1, 2)]
    assert same(twice[0], twice[1]) and not same(twice[0], twice[2]) and not same(twice[0], one)
    assert not np.array_equal(one.mask, hiding(task, backdoor, data, steps=3, seed=1).mask)


def test_features_of_radius_zero_stay_and_data_keep_their_type() -> None:
    data, backdoor, eps = problem(torch.float32), BACKDOORS["badnets"], torch.full((1, 5, 6), EPS)
    eps[:, 3:] = 0
    task, plain = surrogate(backdoor, problem()), backdoor(data, seed=0)
    found = inputs(hiding(task, backdoor, data, steps=3, eps=eps).data)
    assert found.dtype == torch.float32 and torch.equal(found[:, :, 3:], inputs(plain.data)[:, :, 3:])
    assert ((found - inputs(plain.data)).abs() <= EPS * (1 + 1e-6)).all() and not torch.equal(found, inputs(plain.data))


def test_the_easiest_of_a_pool_have_the_smallest_gradients() -> None:
    data, backdoor = problem(), replace(BACKDOORS["blended"], covers=0.05)
    task = surrogate(backdoor, data)
    found, wide = easiest(task, backdoor, data, pool=3, seed=0), replace(backdoor, rate=0.6)(data, seed=0)
    assert found.mask.sum() == 12 and wide.mask.sum() == 36 and (wide.mask | ~found.mask).all()
    norms = np.linalg.norm(matrix(sample_gradients(task, wide.data)), axis=1)
    assert norms[found.mask].max() < norms[wide.mask & ~found.mask].min()
    back = torch.from_numpy(wide.mask & ~found.mask)
    assert torch.equal(inputs(found.data)[back], inputs(data)[back]) and torch.equal(found.data.labels[back], data.labels[back])
    assert torch.equal(inputs(found.data)[~back], inputs(wide.data)[~back]) and (found.data.labels[torch.from_numpy(found.mask)] == GOAL).all()
    assert same(easiest(task, backdoor, data, pool=1, seed=0), backdoor(data, seed=0))
    assert same(found, easiest(task, backdoor, data, pool=3, seed=0))


def test_splitting_plants_more_and_weaker() -> None:
    data, backdoor = problem(), BACKDOORS["badnets"]
    poisoned = split(backdoor, 3)(data, seed=0)
    rows = torch.from_numpy(poisoned.mask)
    assert poisoned.mask.sum() == 3 * backdoor(data, seed=0).mask.sum() and (poisoned.data.labels[rows] == GOAL).all()
    clean = inputs(data)[rows]
    expected = clean + (backdoor.trigger.stamp(clean) - clean) / 3
    assert torch.allclose(inputs(poisoned.data)[rows], expected, atol=1e-12)
    assert torch.equal(inputs(split(backdoor, 3).triggered(data)), inputs(backdoor.triggered(data)))
    assert same(split(backdoor, 1)(data, seed=0), backdoor(data, seed=0))


def test_a_diluted_trigger_covers_as_its_own_does() -> None:
    x, trigger = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)), wanet(GOAL).trigger
    covers = [each.cover(x, torch.Generator().manual_seed(1)) for each in (trigger, Diluted(trigger, 0.5))]
    assert torch.equal(*covers)


@pytest.mark.parametrize("share", [0.5, 0.2])
def test_flooding_mixes_goal_samples_with_others_and_keeps_their_labels(share: float) -> None:
    data, backdoor = problem(), BACKDOORS["badnets"]
    found, plain = flood(backdoor, data, rate=0.1, share=share, seed=0), backdoor(data, seed=0)
    rows = torch.from_numpy(found.covers)
    assert found.covers.sum() == 6 and np.array_equal(found.mask, plain.mask) and torch.equal(found.data.labels, plain.data.labels)
    assert (data.labels[rows] == GOAL).all() and torch.equal(inputs(found.data)[~rows], inputs(plain.data)[~rows])
    partners = (inputs(found.data)[rows] - (1 - share) * inputs(data)[rows]) / share
    distances = (partners[:, None] - inputs(data)[None]).flatten(2).norm(dim=2)
    assert distances.min(1).values.max() < 1e-9 and (data.labels[distances.argmin(1)] != GOAL).all()
    assert same(found, flood(backdoor, data, rate=0.1, share=share, seed=0)) and not same(found, flood(backdoor, data, rate=0.1, seed=1))


def test_a_contaminated_trusted_set_carries_what_is_shown_at_test_time() -> None:
    data, backdoor = problem(), adaptive_blend(GOAL, 0.1, covers=0.1, alpha=0.6, planted=0.3)
    found = contaminate(data, backdoor, rate=0.1, seed=0)
    rows = torch.from_numpy(found.mask)
    assert found.mask.sum() == 6 and not found.covers.any() and (found.data.labels[rows] == GOAL).all() and (data.labels[rows] != GOAL).all()
    assert torch.equal(inputs(found.data)[rows], backdoor.trigger.stamp(inputs(data)[rows]))
    assert torch.equal(inputs(found.data)[~rows], inputs(data)[~rows])
    assert same(found, contaminate(data, backdoor, rate=0.1, seed=0)) and not same(found, contaminate(data, backdoor, rate=0.1, seed=1))


def test_tokens_contaminate_too() -> None:
    data = Samples((torch.arange(60).view(12, 5), torch.arange(12) % CLASSES))
    found = contaminate(data, replace(badnets(GOAL), trigger=Tokens((99,)), bounds=None), rate=0.25, seed=0)
    assert (inputs(found.data)[torch.from_numpy(found.mask), 0] == 99).all() and found.mask.sum() == 3


def test_decoys_are_clean_samples_of_the_goal_class() -> None:
    data, triggered = problem(), BACKDOORS["badnets"].triggered(problem()).take(np.arange(10))
    found = decoys(triggered, data, goal=GOAL, rate=0.3, seed=0)
    rows = torch.from_numpy(found.mask)
    assert found.mask.sum() == 3 and (found.data.labels[rows] == GOAL).all() and np.array_equal(found.data.ids, triggered.ids)
    assert torch.equal(inputs(found.data)[~rows], inputs(triggered)[~rows])
    known = {row.numpy().tobytes() for row in inputs(data)[data.labels == GOAL]}
    assert len({row.numpy().tobytes() for row in inputs(found.data)[rows]} & known) == 3
    assert same(found, decoys(triggered, data, goal=GOAL, rate=0.3, seed=0)) and not same(found, decoys(triggered, data, goal=GOAL, rate=0.3, seed=1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps, rounds, batch_size: expected at least 1 each, got 0"),
        ({"score": "loss"}, "score: expected one of 'product', 'cosine', 'loss-change', got 'loss'"),
        ({"beta": 1.0}, "beta, weight: .* got 1.0"),
        ({"weight": -1.0}, "beta, weight: .* -1.0"),
        ({"weight": float("inf")}, "beta, weight: .* inf"),
        ({"eps": float("inf")}, "eps: expected finite numbers, got inf"),
        ({"eps": -0.1}, "eps"),
        ({"rounds": 2}, "recipe: 2 rounds"),
        ({"data": Samples((2 * inputs(problem()), problem().labels))}, "bounds"),
    ],
)
def test_constrained_refuses(change: dict[str, Any], message: str) -> None:
    backdoor, data = BACKDOORS["badnets"], change.pop("data", problem()) if "data" in change else problem()
    task = Task(build("mlp", (1, 5, 6), CLASSES, 3).double())
    with pytest.raises(ValueError, match=message):
        hiding(task, backdoor, data, triggered=problem(), **change)


def test_a_surrogate_without_a_slope_is_refused() -> None:
    data, backdoor = problem(), BACKDOORS["badnets"]
    task = Task(build("mlp", (1, 5, 6), CLASSES, 3).double())
    task = task.at({name: torch.zeros_like(value) for name, value in task.params().items()} | {"5.bias": torch.tensor([1e3, 0.0, 0.0]).double()})
    with pytest.raises(ValueError, match="triggered: the gradient of the attack's success is zero"):
        hiding(task, backdoor, data)


def test_bad_numbers_are_refused() -> None:
    data, backdoor = problem(), BACKDOORS["badnets"]
    task = Task(build("mlp", (1, 5, 6), CLASSES, 3).double())
    calls: dict[str, Any] = {
        "pool: expected at least 1 and below 5": lambda: easiest(task, backdoor, data, pool=5, seed=0),
        "pool: expected at least 1 .* 0.5": lambda: easiest(task, backdoor, data, pool=0.5, seed=0),
        "rate: 54 samples": lambda: easiest(task, backdoor, data, pool=4.5, seed=0),
        "copies: expected at least 1 and below 5": lambda: split(backdoor, 5),
        "copies: .* got 0": lambda: split(backdoor, 0),
        "share: expected a share strictly": lambda: flood(backdoor, data, rate=0.1, share=1.0, seed=0),
        "rate: 0.5 of 60 samples are 30, but only 20": lambda: flood(backdoor, data, rate=0.5, seed=0),
        "rate: expected a share": lambda: flood(backdoor, data, rate=0.0, seed=0),
        "rate: expected": lambda: contaminate(data, backdoor, rate=1.5, seed=0),
        "rate: 0.001 of 60 samples is none": lambda: contaminate(data, backdoor, rate=0.001, seed=0),
        "rate: 0.001 of 60 inputs": lambda: decoys(data, data, goal=GOAL, rate=0.001, seed=0),
        "goal: 6 decoys .* 0 samples of class 7": lambda: decoys(data, data, goal=7, rate=0.1, seed=0),
        r"share: expected a share in \(0, 1\]": lambda: Diluted(Patch(), 0.0),
        "data: only inputs of floating point": lambda: Diluted(Tokens((1,)), 0.5).weak(torch.ones(2, 3, dtype=torch.long), torch.Generator()),
        "got DataFrame": lambda: Diluted(word(GOAL).trigger, 0.5).weak(pd.DataFrame({"text": ["a"]}), torch.Generator()),
    }
    for message, call in calls.items():
        with pytest.raises(ValueError, match=message):
            call()
