"""gradients.py: derivatives of per-sample losses."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cases import NAMES, case, relative
from oracles import flat, full_gradient, matrix, sample_gradients
from robust_if import InnerProduct, Task, Utility
from robust_if.gradients import directional, gradient, per_sample

EVERY = pytest.mark.parametrize("name", NAMES)


@EVERY
def test_per_sample_gradients_are_those_of_single_backward_passes(name: str) -> None:
    c = case(name)
    got = per_sample(c.task, c.task.params(), c.train.batch(slice(None)))
    assert relative(matrix(got), matrix(sample_gradients(c.task, c.train))) <= 1e-10


@EVERY
def test_directional_derivatives_are_products_with_single_gradients(name: str) -> None:
    c = case(name)
    params, batch = c.task.params(), c.train.batch(slice(None))
    direction = gradient(lambda p: c.task.losses(p, c.valid.batch(slice(None))).mean(), params)
    expected = matrix(sample_gradients(c.task, c.train)) @ flat(direction).numpy()
    assert relative(directional(c.task, params, batch, direction), expected) <= 1e-10


@pytest.mark.parametrize("name", ["logistic", "mlp", "cnn", "attention", "tied", "bare", "recurrent", "regression"])
def test_directional_derivatives_take_forward_mode_and_no_detour(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    c = case(name)
    monkeypatch.setattr("robust_if.gradients.per_sample", lambda *_: pytest.fail("took per-sample gradients"))
    directional(c.task, c.task.params(), c.train.batch(slice(None)), c.task.params())


class NoForwardRule(torch.autograd.Function):
    """x² without a rule for forward mode."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: torch.Tensor) -> torch.Tensor:
        return x**2

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return 2 * ctx.saved_tensors[0] * grad


def test_without_a_forward_rule_per_sample_gradients_are_taken_and_the_log_says_so_once(caplog: pytest.LogCaptureFixture, monkeypatch) -> None:
    monkeypatch.setattr("robust_if.gradients._said", set())
    c = case("logistic")
    task = Task(c.task.model, lambda outputs, batch: NoForwardRule.apply(outputs).sum(1))
    expected = matrix(sample_gradients(task, c.train)) @ flat(task.params()).numpy()
    for _ in range(2):
        assert relative(directional(task, task.params(), c.train.batch(slice(None)), task.params()), expected) <= 1e-10
    assert [record.message for record in caplog.records if "per-sample gradients instead" in record.message] != []
    assert len(caplog.records) == 1


def test_a_score_then_takes_the_layers_factors(monkeypatch: pytest.MonkeyPatch) -> None:
    c = case("logistic")
    task = Task(c.task.model, lambda outputs, batch: NoForwardRule.apply(outputs).sum(1))
    target = Utility(c.valid)
    slope = flat(target.gradient(task, task.params())).numpy()
    monkeypatch.setattr("robust_if.gradients.per_sample", lambda *_: pytest.fail("took per-sample gradients"))
    found = InnerProduct().score(task, c.train, target=target).values
    assert relative(found, -matrix(sample_gradients(task, c.train)) @ slope / len(c.train)) <= 1e-10


def test_random_numbers_in_the_loss_are_refused() -> None:
    c = case("logistic")
    task = Task(c.task.model, lambda outputs, batch: torch.dropout(outputs, 0.5, train=True).sum(1))
    with pytest.raises(RuntimeError, match="random operation"):
        per_sample(task, task.params(), c.train.batch(slice(None)))


def test_running_out_of_memory_is_not_mistaken_for_a_missing_rule() -> None:
    def loss(outputs: torch.Tensor, batch: object) -> torch.Tensor:
        raise torch.OutOfMemoryError

    c = case("logistic")
    with pytest.raises(torch.OutOfMemoryError):
        directional(Task(c.task.model, loss), c.task.params(), c.train.batch(slice(None)), c.task.params())


def test_gradient_is_zero_where_the_function_does_not_depend_on_a_parameter() -> None:
    params = {"used": torch.tensor([2.0]), "unused": torch.ones(3)}
    with torch.no_grad():
        got = gradient(lambda p: (p["used"] ** 3).sum(), params)
    assert got["used"].item() == 12 and not got["unused"].any()
    assert not any(value.requires_grad for value in (*got.values(), *params.values()))


def test_restricting_the_parameters_restricts_the_gradient() -> None:
    c = case("cnn")
    task = Task(c.task.model, parameters=("out.*", "third.weight"))
    assert list(task.params()) == ["third.weight", "out.weight", "out.bias"]
    whole, part = sample_gradients(c.task, c.train), per_sample(task, task.params(), c.train.batch(slice(None)))
    assert relative(matrix(part), matrix({name: whole[name] for name in part})) <= 1e-10
    mean = full_gradient(lambda p: task.losses(p, c.train.batch(slice(None))).mean(), task.params())
    assert relative(mean, np.mean(matrix(part), axis=0)) <= 1e-10
