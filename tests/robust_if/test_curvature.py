"""curvature.py: products and dense matrices against Jacobians and Hessians of single samples by plain autograd."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from cases import CLASSES, NAMES, Case, case, relative
from oracles import flat, matrix, sample_gradients, unflat
from robust_if import Samples, Task
from robust_if.curvature import (
    Curvature,
    Kind,
    automatic_damping,
    flatten,
    mean_eigenvalue,
    residual,
    subset,
    unflatten,
)
from robust_if.gradients import _said
from unchanged import untouched

EVERY_MODEL = pytest.mark.parametrize("name", NAMES)
KINDS: tuple[Kind, ...] = ("ggn", "hessian", "fisher")
EVERY_KIND = pytest.mark.parametrize("kind", KINDS)


def rows(value: Tensor, leaves: list[Tensor]) -> np.ndarray:
    """Jacobian of a vector ``(m,)`` with respect to the leaves, ``(m, p)``: one backward pass per entry."""
    found = []
    for entry in value:
        grads = torch.autograd.grad(entry, leaves, retain_graph=True, create_graph=False, allow_unused=True)
        parts = zip(grads, leaves, strict=True)
        found.append(torch.cat([torch.zeros(leaf.numel()).double() if grad is None else grad.flatten() for grad, leaf in parts]))
    return torch.stack(found).numpy()


def expected(c: Case, kind: Kind) -> np.ndarray:
    """The curvature of the mean loss, ``(p, p)``, one sample after another."""
    task, n = c.task, len(c.train)
    leaves = {name: value.clone().requires_grad_() for name, value in task.params().items()}
    if kind == "fisher":
        grads = matrix(sample_gradients(task, c.train))
        return grads.T @ grads / n
    with sdpa_kernel(SDPBackend.MATH):
        if kind == "hessian":
            loss = task.losses(leaves, c.train.batch(slice(None))).mean()
            grads = torch.autograd.grad(loss, list(leaves.values()), create_graph=True)
            return rows(torch.cat([grad.flatten() for grad in grads]), list(leaves.values()))
        total = np.zeros((flat(leaves).numel(),) * 2)
        for i in range(n):
            batch = c.train.batch(slice(i, i + 1))
            outputs = task.outputs(leaves, batch)
            middle = torch.autograd.functional.hessian(lambda f, batch=batch: task.loss(f[None], batch).sum(), outputs[0].detach()).numpy()
            jacobian = rows(outputs[0], list(leaves.values()))
            total += jacobian.T @ middle @ jacobian / n
        return total


def random(c: Case, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=flat(c.task.params()).numel())


@EVERY_KIND
@EVERY_MODEL
def test_products_and_columns_are_those_of_single_samples(name: str, kind: Kind) -> None:
    c = case(name, train=6)
    exact, v = expected(c, kind), random(c)
    curvature = Curvature(c.task, c.task.params(), c.train, kind, batch_size=4)
    assert relative(curvature.flat(v), exact @ v) <= 1e-10
    if name in ("mlp", "cnn", "attention", "recurrent", "regression"):
        assert relative(curvature.dense(), exact) <= 1e-10


@cache
def whole_product(name: str, kind: Kind) -> np.ndarray:
    c = case(name)
    return Curvature(c.task, c.task.params(), c.train, kind).flat(random(c))


@EVERY_KIND
@pytest.mark.parametrize("name", ["cnn", "attention", "regression"])
@given(batch_size=st.integers(1, 15), order=st.permutations(range(13)))
def test_batches_and_order_do_not_matter(name: str, kind: Kind, batch_size: int, order: list[int]) -> None:
    c = case(name)
    got = Curvature(c.task, c.task.params(), c.train.take(order), kind, batch_size).flat(random(c))
    assert relative(got, whole_product(name, kind)) <= 1e-10


class _Square(torch.autograd.Function):
    """x², without a rule for forward mode or for torch.func."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x * grad


class Plain(nn.Module):
    """A layer whose derivative only ordinary autograd knows, and a parameter that the loss does not depend on."""

    def __init__(self, square: Any) -> None:
        super().__init__()
        self.square = square
        self.inner, self.out, self.idle = nn.Linear(5, 4), nn.Linear(4, CLASSES), nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.square(torch.tanh(self.inner(x))))


@EVERY_KIND
def test_an_operation_without_forward_mode_is_differentiated_backwards_and_said_once(kind: Kind, caplog: pytest.LogCaptureFixture) -> None:
    c = case("mlp")
    custom = Plain(_Square.apply).double().eval()
    smooth = Plain(torch.square).double().eval()
    smooth.load_state_dict(custom.state_dict())
    _said.clear()
    got, known = (Curvature(Task(model), Task(model).params(), c.train, kind, 5) for model in (custom, smooth))
    v = np.random.default_rng(0).normal(size=got.size)
    assert relative(got.flat(v), known.flat(v)) <= 1e-10
    assert caplog.text.count("no forward-mode rule") == 1
    assert relative(got.dense(), known.dense()) <= 1e-10


@EVERY_KIND
def test_parameters_that_the_loss_does_not_depend_on_have_no_curvature(kind: Kind) -> None:
    task = Task(Plain(torch.square).double().eval())
    product = Curvature(task, task.params(), case("mlp").train, kind)({name: torch.ones_like(value) for name, value in task.params().items()})
    assert not product["idle"].any() and product["out.weight"].any()


class PaddedAndTied(nn.Module):
    """The padding row of the embedding is no parameter there, but it is one in the output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(7, 6, padding_idx=0), nn.Linear(6, 7, bias=False)
        self.out.weight = self.embed.weight
        with torch.no_grad():
            self.embed.weight.normal_()

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(torch.tanh(self.embed(input=tokens).mean(1)))[:, :CLASSES]


@EVERY_KIND
def test_the_padding_row_is_constant_in_forward_mode_too(kind: Kind) -> None:
    c = case("tied")
    c = replace(c, task=Task(PaddedAndTied().double().eval()))
    assert relative(Curvature(c.task, c.task.params(), c.train, kind).dense(), expected(c, kind)) <= 1e-10


@EVERY_KIND
def test_patterns_restrict_the_curvature_to_their_block(kind: Kind) -> None:
    c = case("mlp")
    last = Task(c.task.model, parameters="5.*")
    size = flat(last.params()).numel()
    block = Curvature(last, last.params(), c.train, kind).dense()
    assert relative(block, Curvature(c.task, c.task.params(), c.train, kind).dense()[-size:, -size:]) <= 1e-10


@pytest.mark.parametrize("fused", [True, False])
@EVERY_KIND
@pytest.mark.parametrize("name", ["cnn", "attention", "encoder"])
def test_model_random_state_and_settings_are_left_as_they_were(name: str, kind: Kind, fused: bool) -> None:
    c = case(name)
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(fused)
    try:
        with untouched(c.task.model):
            curvature = Curvature(c.task, c.task.params(), c.train, kind)
            mean_eigenvalue(curvature, 3)
            subset(c.train, 5, 0)
        assert torch.backends.mha.get_fastpath_enabled() == fused
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def test_an_error_of_the_user_comes_through_and_leaves_no_hook() -> None:
    c = case("attention")

    def loss(outputs: Tensor, batch: Any) -> Tensor:
        raise ArithmeticError("from the user's loss")

    task = Task(c.task.model, loss)
    with untouched(c.task.model), pytest.raises(ArithmeticError, match="from the user's loss"):
        Curvature(task, task.params(), c.train)(task.params())


def test_the_mean_eigenvalue_is_near_the_trace_and_repeats() -> None:
    c = case("attention")
    curvature = Curvature(c.task, c.task.params(), c.train)
    trace = float(curvature.dense().trace()) / curvature.size
    estimates = [mean_eigenvalue(curvature, seed) for seed in range(8)]
    assert np.mean(estimates) == pytest.approx(trace, rel=0.1) and max(estimates) < 2 * trace
    assert mean_eigenvalue(curvature, 3) == estimates[3]


def test_single_precision_is_close_to_double() -> None:
    single, double = (Curvature(c.task, c.task.params(), c.train) for c in (case("cnn", torch.float32), case("cnn")))
    assert relative(single.flat(random(case("cnn"))), double.flat(random(case("cnn")))) <= 1e-5
    assert single.dense().dtype == torch.float64


def test_vectors_are_those_of_the_oracle() -> None:
    params = case("cnn").task.params()
    vector = np.arange(flat(params).numel(), dtype=float)
    assert np.array_equal(flatten(unflatten(vector, params)), vector)
    assert all(torch.equal(value, unflat(torch.from_numpy(vector), params)[name]) for name, value in unflatten(vector, params).items())


def test_the_residual_is_relative() -> None:
    c = case("logistic")
    curvature, v = Curvature(c.task, c.task.params(), c.train), random(c)
    assert residual(curvature, 0.3, np.zeros_like(v), v) == pytest.approx(1)
    assert residual(curvature, 0.3, v, curvature.flat(v) + 0.3 * v) == pytest.approx(0)
    assert residual(curvature, 0.3, 0 * v, 0 * v) == 0


def test_a_subset_is_drawn_by_its_seed_and_keeps_the_order() -> None:
    train = case("mlp").train
    some = [subset(train, 5, seed).ids.tolist() for seed in (0, 0, 1)]
    assert some[0] == some[1] != some[2] and all(len(ids) == 5 and ids == sorted(ids) for ids in some)
    assert subset(train, None, 0) is train and subset(train, 99, 0) is train


def test_bad_input_is_refused() -> None:
    c = case("mlp")
    with pytest.raises(ValueError, match="curvature: expected 'ggn', 'hessian' or 'fisher', got 'kfac'"):
        Curvature(c.task, c.task.params(), c.train, "kfac")  # type: ignore[arg-type]
    large = Task(nn.Linear(100, 100).eval())
    curvature = Curvature(large, large.params(), Samples((torch.zeros(2, 100), torch.zeros(2).long())))
    with pytest.raises(ValueError, match="curvature: a dense matrix is for up to 10,000 parameters, this task has 10,100"):
        curvature.dense()
    task = Task(c.task.model, lambda outputs, batch: outputs[0].sum(1), lambda model, batch: (model(batch[0]),))
    with pytest.raises(TypeError, match="forward: the Gauss-Newton matrix needs a model whose output is one tensor, got tuple"):
        Curvature(task, task.params(), c.train)(task.params())
    with pytest.raises(ValueError, match=r"damping: the mean eigenvalue of the curvature is -1, so there is no automatic damping"):
        automatic_damping(-1.0)
