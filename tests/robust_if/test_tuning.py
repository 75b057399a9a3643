"""tuning.py: moving a copy of the parameters to a (flat) minimum of a target."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cases import TARGETS, Case, case
from robust_if import SAM, FriendlySAM, LowPass, Plain, Task, Tuning, Utility
from unchanged import untouched

RULES = {"low pass": LowPass(0.1), "sam": SAM(0.3), "friendly sam": FriendlySAM(0.3), "plain": Plain()}
EVERY = pytest.mark.parametrize("flatness", RULES.values(), ids=RULES)


def bump(params: dict[str, Tensor], direction: dict[str, Tensor], rho: float) -> dict[str, Tensor]:
    norm = torch.cat([value.flatten() for value in direction.values()]).norm()
    return {key: value + rho * direction[key] / norm for key, value in params.items()}


@EVERY
def test_tuning_follows_its_rule_step_by_step(flatness: Any) -> None:
    c, lr, momentum = case("mlp"), 0.2, 0.5
    target, generator = Utility(c.valid), torch.Generator().manual_seed(7)
    params, velocity, mean = dict(c.task.params()), {}, {}  # type: ignore[var-annotated]
    for _ in range(3):
        grad = target.gradient(c.task, params)
        if isinstance(flatness, LowPass):
            noisy = {}
            for key, value in params.items():
                size = value.norm(dim=1, keepdim=True) if value.ndim == 2 else value.norm()
                noisy[key] = value + 0.1 * size * torch.randn(value.shape, generator=generator).double()
            grad = target.gradient(c.task, noisy)
        elif isinstance(flatness, SAM):
            grad = target.gradient(c.task, bump(params, grad, 0.3))
        elif isinstance(flatness, FriendlySAM):
            own = {key: value - mean.get(key, torch.zeros(())) for key, value in grad.items()}
            mean = {key: 0.95 * mean.get(key, torch.zeros(())) + 0.05 * value for key, value in grad.items()}
            grad = target.gradient(c.task, bump(params, own, 0.3))
        velocity = {key: momentum * velocity.get(key, 0) + value for key, value in grad.items()}
        params = {key: value - lr * velocity[key] for key, value in params.items()}
    got = Tuning(steps=3, lr=lr, momentum=momentum, flatness=flatness, seed=7).run(c.task, target)
    for key, value in params.items():
        assert torch.allclose(got[key], value, rtol=1e-9, atol=1e-11), key


@pytest.mark.parametrize("kind", TARGETS)
@EVERY
def test_tuning_lowers_the_target_and_repeats_with_its_seed(flatness: Any, kind: str) -> None:
    c = case("mlp")
    target, tuning = TARGETS[kind](c.valid, 4), Tuning(steps=25, lr=0.05, batch_size=9, flatness=flatness)
    with untouched(c.task.model):
        first, again = tuning.run(c.task, target), tuning.run(c.task, target)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert target.value(c.task, first) < target.value(c.task, c.task.params())


def test_no_step_leaves_the_parameters_where_they_are() -> None:
    c = case("mlp")
    got = Tuning(steps=0).run(c.task, Utility(c.valid))
    assert all(torch.equal(got[key], value) and got[key] is not value for key, value in c.task.params().items())


def test_tuning_that_diverges_says_so() -> None:
    c: Case = replace(case("logistic"), task=Task(nn.Linear(5, 1).double().eval(), lambda outputs, batch: outputs[:, 0] ** 4))
    with pytest.raises(ValueError, match=r"tuning on utility diverged: weight is not finite after 50 steps; lower the learning rate \(10.0\)"):
        Tuning(steps=50, lr=10.0).run(c.task, Utility(c.valid))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"steps": -1}, "steps: expected at least 0, got -1"), ({"lr": 0.0}, "lr: expected a positive number, got 0.0")],
)
def test_a_setting_out_of_range_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Tuning(**options)
