"""preconditioners/datainf.py, and the diagonal Fisher matrix as a preconditioner."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cases import NAMES, TARGETS, case, relative
from oracles import flat, matrix, sample_gradients
from robust_if import InnerProduct, Sweep, Task
from robust_if.layers import Live
from robust_if.pieces import Pieces, compact
from robust_if.preconditioners import Identity, Preconditioner
from robust_if.preconditioners.datainf import DataInf
from robust_if.preconditioners.diagonal_fisher import DiagonalFisher
from robust_if.task import Params
from unchanged import untouched

METHODS = pytest.mark.parametrize("method", [DataInf, DiagonalFisher])


class Kept:
    """The gradients of a task as a store keeps them: all in one block, in their smallest form."""

    def __init__(self, live: Live) -> None:
        self.live, self.passes = live, 0

    def blocks(self) -> Iterator[tuple[slice, Pieces]]:
        self.passes += 1
        for rows, pieces in self.live.blocks():
            yield rows, [(name, compact(each)) for name, each in pieces]


def direction(params: Params) -> Params:
    generator = torch.Generator().manual_seed(5)
    return {name: torch.randn(value.shape, generator=generator).to(value) for name, value in params.items()}


def mean_of_inverses(grads: Tensor, v: Tensor, damping: float | None) -> Tensor:
    """(1/n) Σ (g gᵀ + λI)⁻¹ v, by dense matrices."""
    lam = 0.1 * float((grads**2).mean()) if damping is None else damping
    damped = grads[:, :, None] * grads[:, None, :] + lam * torch.eye(len(v), dtype=v.dtype)
    return torch.linalg.solve(damped, v.expand(len(grads), -1)[:, :, None]).mean(0)[:, 0]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("damping", [None, 0.2])
def test_datainf_is_the_mean_of_inverses_of_every_tensor(name: str, damping: float | None) -> None:
    c = case(name)
    v = direction(c.task.params())
    with untouched(c.task.model):
        got = DataInf(damping).build(c.task, c.task.params(), c.train, Sweep(5))(v)
    assert list(got.direction) == list(v)
    for key, grads in sample_gradients(c.task, c.train).items():
        expected = mean_of_inverses(grads.flatten(1), v[key].flatten(), damping)
        if grads.any():
            assert relative(got.direction[key].flatten(), expected) <= 1e-9, key
        else:
            assert not got.direction[key].any(), key


@pytest.mark.parametrize("name", ["logistic", "mlp", "attention"])
def test_of_a_single_sample_it_is_the_exact_damped_inverse(name: str) -> None:
    c = case(name, train=1)
    v = direction(c.task.params())
    got = DataInf(0.05).build(c.task, c.task.params(), c.train, Sweep())(v).direction
    for key, grads in sample_gradients(c.task, c.train).items():
        curvature = grads.flatten(1).mT @ grads.flatten(1)
        exact = torch.linalg.solve(curvature + 0.05 * torch.eye(len(curvature), dtype=curvature.dtype), v[key].flatten())
        assert relative(got[key].flatten(), exact) <= 1e-10, key


@METHODS
def test_with_growing_damping_it_becomes_the_inner_product(method: type[DataInf | DiagonalFisher]) -> None:
    c = case("mlp")
    v = direction(c.task.params())
    near, far = (relative(flat(method(lam).build(c.task, c.task.params(), c.train, Sweep())(v).direction) * lam, flat(v)) for lam in (1e2, 1e8))
    assert far <= 1e-6 < near <= 0.1
    target = TARGETS["utility"](c.valid, 4)
    scores, plain = (InnerProduct(each).score(c.task, c.train, target=target).values for each in (method(1e8), Identity()))
    assert np.array_equal(np.argsort(scores), np.argsort(plain))


@given(st.integers(1, 14), st.permutations(range(13)), st.sampled_from([DataInf(), DiagonalFisher()]), st.sampled_from(["cnn", "attention", "bare"]))
def test_neither_batch_size_nor_order_nor_the_form_of_the_gradients_matters(size: int, order: list[int], method: Preconditioner, name: str) -> None:
    c = case(name)
    params = c.task.params()
    v = direction(params)
    once = method.build(c.task, params, c.train, Sweep(64))(v).direction
    kept = Kept(Live.of(c.task, params, c.train, 4))
    others = [
        method.build(c.task, params, c.train.take(order), Sweep(size))(v).direction,
        method.build(c.task, params, c.train, Sweep(64), kept)(v).direction,
    ]
    assert kept.passes == (2 if isinstance(method, DataInf) else 1)
    for other in others:
        for key in v:
            assert relative(other[key], once[key]) <= 1e-9, key


@METHODS
def test_restricted_parameters_have_the_same_directions(method: type[DataInf | DiagonalFisher]) -> None:
    c = case("attention")
    v = direction(c.task.params())
    whole = method().build(c.task, c.task.params(), c.train, Sweep())(v)
    task = Task(c.task.model, parameters=("up.*", "embed.weight"))
    part = method().build(task, task.params(), c.train, Sweep())({name: v[name] for name in task.params()})
    for key, value in part.direction.items():
        assert relative(value, whole.direction[key]) <= 1e-10, key
        assert part.notes["damping"][key] == pytest.approx(whole.notes["damping"][key])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("damping", [None, 0.2])
def test_the_diagonal_fisher_divides_by_mean_squares(name: str, damping: float | None) -> None:
    c = case(name)
    v = direction(c.task.params())
    got = DiagonalFisher(damping).build(c.task, c.task.params(), c.train, Sweep(5))(v)
    for key, grads in sample_gradients(c.task, c.train).items():
        second = (grads**2).mean(0)
        lam = 0.1 * float(second.mean()) if damping is None else damping
        expected = torch.where(second + lam > 0, v[key] / (second + lam), 0.0)
        assert relative(got.direction[key], expected) <= 1e-9, key
        assert (got.notes["damping"] if damping else got.notes["damping"][key]) == pytest.approx(lam)


@METHODS
def test_a_tensor_that_no_sample_depends_on_gets_no_direction(method: type[DataInf | DiagonalFisher]) -> None:
    c = case("mlp")
    c.task.model[3].bias.data.fill_(-1e6)  # no unit of the second hidden layer is ever active
    got = method().build(c.task, c.task.params(), c.train, Sweep())(direction(c.task.params())).direction
    assert not got["1.weight"].any() and got["5.bias"].any()
    assert all(torch.isfinite(value).all() for value in got.values())


@METHODS
@pytest.mark.parametrize("damping", [0.0, -1.0, float("inf"), float("nan")])
def test_damping_must_be_positive(method: type[DataInf | DiagonalFisher], damping: float) -> None:
    with pytest.raises(ValueError, match="damping: expected a positive number"):
        method(damping)


def test_influence_scores_follow_from_the_direction() -> None:
    c = case("mlp")
    target = TARGETS["gap"](c.valid, 4)
    scores = InnerProduct(DataInf()).score(c.task, c.train, target=target)
    slope = target.gradient(c.task, c.task.params())
    solved = DataInf().build(c.task, c.task.params(), c.train, Sweep())(slope)
    expected = -matrix(sample_gradients(c.task, c.train)) @ flat(solved.direction).numpy() / len(c.train)
    assert relative(scores.values, expected) <= 1e-9
    assert scores.estimator == "datainf" and scores.provenance["damping"] == solved.notes["damping"]
