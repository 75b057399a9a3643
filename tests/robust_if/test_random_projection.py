"""preconditioners/random_projection.py: curvature in a random subspace."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cases import NAMES, case, relative
from oracles import flat, sample_gradients
from robust_if import Sweep, Task
from robust_if.fisher import fisher_gradients
from robust_if.layers import LayerGradients, Live
from robust_if.pieces import Pieces, compact, dense
from robust_if.preconditioners.random_projection import Projection, RandomProjection, _shares
from robust_if.task import Params
from unchanged import untouched


class Kept:
    """The gradients of a task as a store keeps them, convolutions without their factors."""

    def __init__(self, live: Live) -> None:
        self.live = live

    def blocks(self) -> Iterator[tuple[slice, Pieces]]:
        return ((rows, [(name, compact(each)) for name, each in pieces]) for rows, pieces in self.live.blocks())


def direction(params: Params, seed: int = 5) -> Params:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(value.shape, generator=generator).to(value) for name, value in params.items()}


def dense_projection(params: Params, size: int, seed: int) -> Tensor:
    """P as a matrix ``(size, p)``, one block per parameter: the projection of every unit vector."""
    shares = _shares({name: value.numel() for name, value in params.items()}, size)
    blocks = []
    for name, value in params.items():
        drawn = Projection.draw(name, value, shares[name], seed)
        units = torch.eye(value.numel(), dtype=value.dtype).view(-1, *value.shape)
        blocks.append(torch.stack([drawn.matrix(unit).flatten() for unit in units], 1))
    return torch.block_diag(*blocks)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("damping", [None, 0.02])
def test_products_are_those_of_projected_features(name: str, damping: float | None) -> None:
    c = case(name)
    params = c.task.params()
    v = direction(params)
    with untouched(c.task.model):
        got = RandomProjection(40, damping, seed=7).build(c.task, params, c.train, Sweep(5))(v)
    grads = torch.cat([value.flatten(1) for value in sample_gradients(c.task, c.train).values()], 1)
    projection = dense_projection(params, 40, 7)
    features, wanted = grads @ projection.mT, projection @ flat(v)
    curvature = features.mT @ features / len(features)
    lam = 0.1 * float(curvature.trace()) / len(curvature) if damping is None else damping
    expected = features @ torch.linalg.solve(curvature + lam * torch.eye(len(curvature), dtype=curvature.dtype), wanted)
    assert relative(grads @ flat(got.direction), expected) <= 1e-9
    assert got.notes["damping"] == pytest.approx(lam)
    assert len(params) <= got.notes["size"] == len(curvature) <= 40


@pytest.mark.parametrize("name", NAMES)
def test_with_room_for_all_parameters_it_is_the_exact_damped_inverse(name: str) -> None:
    c = case(name)
    params = c.task.params()
    v = direction(params)
    got = RandomProjection(10_000, 0.05).build(c.task, params, c.train, Sweep())(v)
    grads = torch.cat([value.flatten(1) for value in sample_gradients(c.task, c.train).values()], 1)
    curvature = grads.mT @ grads / len(grads)
    exact = torch.linalg.solve(curvature + 0.05 * torch.eye(len(curvature), dtype=curvature.dtype), flat(v))
    assert got.notes["size"] == len(exact)
    assert relative(flat(got.direction), exact) <= 1e-8


def test_over_many_seeds_inner_products_are_kept() -> None:
    value = torch.zeros(6, 2, 5, dtype=torch.float64)
    a, b = (torch.randn(value.shape, generator=torch.Generator().manual_seed(k)).double() for k in (1, 2))
    b = a + 0.5 * b
    found = []
    for seed in range(600):
        drawn = Projection.draw("weight", value, 12, seed)
        found.append(float((drawn.matrix(a) * drawn.matrix(b)).sum()))
        assert drawn.size <= 12
    mean, error = torch.tensor(found).mean(), torch.tensor(found).std() / 600**0.5
    assert abs(float(mean) - float((a * b).sum())) <= 3 * float(error) <= 0.1 * float((a * b).sum())


@pytest.mark.parametrize("name", ["mlp", "regression"])
def test_the_sampled_curvature_is_that_of_the_projected_sampled_gradients(name: str) -> None:
    c = case(name)
    params = c.task.params()
    v = direction(params)
    got = RandomProjection(60, 0.03, "sampled", seed=2).build(c.task, params, c.train, Sweep(5), Kept(Live.of(c.task, params, c.train, 4)))(v)
    sampled = Live(fisher_gradients(LayerGradients(c.task, params, c.train.batch(slice(0, 4))), "sampled", 2), c.train, 64)
    rows = torch.cat([dense(each) for _, pieces in sampled.blocks() for _, each in pieces], 1)
    projection = dense_projection(params, 60, 2)
    features = rows @ projection.mT
    curvature = features.mT @ features / len(rows) + 0.03 * torch.eye(len(projection), dtype=rows.dtype)
    assert relative(flat(got.direction), projection.mT @ torch.linalg.solve(curvature, projection @ flat(v))) <= 1e-9


@given(st.integers(1, 14), st.permutations(range(13)), st.sampled_from(["cnn", "attention", "tied", "bare"]))
def test_neither_batch_size_nor_order_nor_the_form_of_the_gradients_matters(size: int, order: list[int], name: str) -> None:
    c = case(name)
    params = c.task.params()
    v = direction(params)
    method = RandomProjection(64)
    once = method.build(c.task, params, c.train, Sweep(64))(v).direction
    others = [
        method.build(c.task, params, c.train.take(order), Sweep(size))(v).direction,
        method.build(c.task, params, c.train, Sweep(64), Kept(Live.of(c.task, params, c.train, 4)))(v).direction,
    ]
    for other in others:
        assert relative(flat(other), flat(once)) <= 1e-9


def test_a_projection_depends_on_seed_name_and_shape_alone() -> None:
    value = torch.zeros(4, 6, dtype=torch.float64)
    first = Projection.draw("a", value, 8, 0)
    assert torch.equal(first.left, Projection.draw("a", value + 1, 8, 0).left)
    for other in (Projection.draw("b", value, 8, 0), Projection.draw("a", value, 8, 1)):
        assert not torch.allclose(first.left, other.left)
    assert relative(first.left @ first.left.mT, 2 * torch.eye(2)) <= 1e-12  # two rows of four: length √2, orthogonal


@given(st.lists(st.integers(1, 500), min_size=1, max_size=12), st.integers(12, 900))
def test_shares_fill_the_size_and_no_more(sizes: list[int], total: int) -> None:
    named = {str(k): size for k, size in enumerate(sizes)}
    shares = _shares(named, total)
    assert sum(shares.values()) == min(total, sum(sizes))
    assert all(1 <= shares[name] <= size for name, size in named.items())
    cut = [shares[name] for name in named if shares[name] < named[name]]
    assert not cut or max(cut) - min(cut) <= 1
    for name, size in named.items():
        assert Projection.draw(name, torch.zeros(size), shares[name], 0).size <= shares[name]


def test_restricted_parameters_are_projected_alone() -> None:
    c = case("mlp")
    task = Task(c.task.model, parameters="3.*")
    got = RandomProjection(1000, 0.1).build(task, task.params(), c.train, Sweep())(direction(task.params()))
    grads = sample_gradients(task, c.train)
    rows = torch.cat([value.flatten(1) for value in grads.values()], 1)
    curvature = rows.mT @ rows / len(rows) + 0.1 * torch.eye(rows.shape[1], dtype=rows.dtype)
    assert relative(flat(got.direction), torch.linalg.solve(curvature, flat(direction(task.params())))) <= 1e-9


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="size: expected at least 1, got 0"):
        RandomProjection(0)
    with pytest.raises(ValueError, match="damping: expected a positive number"):
        RandomProjection(damping=-1.0)
    with pytest.raises(ValueError, match="fisher: expected"):
        RandomProjection(fisher="none")  # type: ignore[arg-type]
    c = case("bare")
    with pytest.raises(ValueError, match="at least one number for each of the 5 parameter tensors, got 4"):
        RandomProjection(4).build(c.task, c.task.params(), c.train, Sweep())
    with pytest.raises(ValueError, match=r"scale, inner\.weight have none; use fisher='empirical'"):
        RandomProjection(fisher="sampled").build(c.task, c.task.params(), c.train, Sweep())
