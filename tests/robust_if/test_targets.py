"""targets.py: differentiable scalars of the parameters."""

from __future__ import annotations

import pytest
import torch

from cases import NAMES, TARGETS, VALID, Case, Gap, case, relative
from oracles import flat, full_gradient
from robust_if import Target, Utility

TABLE = pytest.mark.parametrize("kind", TARGETS)


def at_once(kind: str, c: Case) -> Target:
    """The target in one batch, so that its value is one autograd graph."""
    return TARGETS[kind](c.valid, VALID)


def value(target: Target, c: Case, params: dict[str, torch.Tensor]) -> torch.Tensor:
    """The target by hand on the whole held-out set, without the streaming."""
    if isinstance(target, (Utility, Gap)):
        return target.reduce(target.moments(c.task, params, c.valid.batch(slice(None))).mean(0))
    return sum(factor * value(part, c, params) for factor, part in zip(target.factors, target.targets, strict=True))  # type: ignore[attr-defined]


@TABLE
@pytest.mark.parametrize("size", [1, 2, 4, VALID, 100])
@pytest.mark.parametrize("name", ["mlp", "attention"])
def test_two_pass_gradient_is_full_batch_autograd_for_any_batch_size(kind: str, size: int, name: str) -> None:
    c = case(name)
    target, params = TARGETS[kind](c.valid, size), c.task.params()
    assert relative(flat(target.gradient(c.task, params)), full_gradient(lambda p: value(target, c, p), params)) <= 1e-12
    assert relative(target.value(c.task, params), value(target, c, params)) <= 1e-12


@TABLE
@pytest.mark.parametrize("name", NAMES)
def test_gradient_is_full_batch_autograd_for_every_model(kind: str, name: str) -> None:
    c = case(name)
    target, params = TARGETS[kind](c.valid, 4), c.task.params()
    assert relative(flat(target.gradient(c.task, params)), full_gradient(lambda p: value(target, c, p), params)) <= 1e-12


@TABLE
def test_gradient_is_the_slope_that_finite_differences_see(kind: str) -> None:
    c = case("mlp")
    target, params = at_once(kind, c), c.task.params()
    slope = target.gradient(c.task, params)
    step = 1e-5
    ends = [target.value(c.task, {name: params[name] + sign * step * slope[name] for name in params}) for sign in (1, -1)]
    assert ((ends[0] - ends[1]) / (2 * step)).item() == pytest.approx(flat(slope).square().sum().item(), rel=1e-7)


def test_a_mean_of_per_batch_gaps_would_not_pass() -> None:
    """The table above can fail: the gap of batches differs from the gap of the whole by far more than the tolerance."""
    c = case("mlp")
    whole = flat(Gap(c.valid).gradient(c.task, c.task.params()))
    halves = [Gap(c.valid.take(rows)) for rows in ([0, 1, 2, 3, 4], [5, 6, 7, 8])]
    mean = sum(half.gradient(c.task, c.task.params())["1.weight"] * len(half.data) / VALID for half in halves)
    assert relative(mean, Gap(c.valid).gradient(c.task, c.task.params())["1.weight"]) > 0.01
    assert whole.norm() > 0


def test_sums_and_multiples_are_those_of_value_and_gradient() -> None:
    c = case("mlp")
    utility, gap, params = Utility(c.valid), Gap(c.valid), c.task.params()
    both = 2 * utility + gap * -0.5
    values = [target.value(c.task, params).item() for target in (utility, gap)]
    assert both.value(c.task, params).item() == pytest.approx(2 * values[0] - 0.5 * values[1], rel=1e-14)
    expected = 2 * flat(utility.gradient(c.task, params)) - 0.5 * flat(gap.gradient(c.task, params))
    assert relative(flat(both.gradient(c.task, params)), expected) <= 1e-14
    assert both.name == "2*utility+-0.5*gap"
    assert len(both.held_out) == 2


def test_gradient_does_not_depend_on_whether_gradients_are_switched_on() -> None:
    c = case("mlp")
    expected = flat(Gap(c.valid).gradient(c.task, c.task.params()))
    with torch.no_grad():
        got = flat(Gap(c.valid).gradient(c.task, c.task.params()))
    assert torch.equal(got, expected)


@TABLE
def test_minibatches_are_of_the_same_kind_and_repeat_with_the_generator(kind: str) -> None:
    c = case("mlp")
    target = at_once(kind, c)
    drawn = [target.minibatch(4, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    ids = [[samples.ids.tolist() for samples in one.held_out] for one in drawn]
    assert ids[0] == ids[1] != ids[2]
    assert all(len(part) == len(set(part)) == 4 for part in ids[0])
    assert {type(one) for one in drawn} == {type(target)}
    whole = target.minibatch(VALID, torch.Generator())
    assert [samples.ids.tolist() for samples in whole.held_out] == [samples.ids.tolist() for samples in target.held_out]


@TABLE
def test_values_carry_no_graph(kind: str) -> None:
    c = case("mlp")
    assert not at_once(kind, c).value(c.task, c.task.params()).requires_grad


def test_a_target_without_data_is_refused() -> None:
    with pytest.raises(ValueError, match="expected at least one sample, got none"):
        Utility((torch.zeros(0, 5), torch.zeros(0)))  # type: ignore[arg-type]
