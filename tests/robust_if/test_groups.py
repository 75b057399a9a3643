"""groups.py: the effect of removing many samples, against real retraining."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from cases import case, relative
from oracles import flat, full_gradient, hessian, matrix, minimise, sample_gradients, unflat
from robust_if import InnerProduct, Samples, Sweep, Task, Utility
from robust_if.groups import greedy, group_effect
from robust_if.preconditioners import Identity, Preconditioner, Solution
from robust_if.task import Params

L2 = 1e-2


@dataclass(frozen=True)
class Exact(Preconditioner):
    """The inverse of the Hessian of the mean loss plus L2, formed."""

    notes: str = "damping"

    @property
    def name(self) -> str:
        return "exact"

    def build(self, task: Task, params: Params, data: Samples, sweep: Sweep, factors: Any = None) -> Callable[[Params], Solution]:
        curvature = hessian(lambda p: task.losses(p, data.batch(slice(None))).mean(), params)
        curvature = curvature + L2 * torch.eye(len(curvature)).to(curvature)
        return lambda vector: Solution(unflat(torch.linalg.solve(curvature, flat(vector)), vector), {self.notes: L2})


def retrained(task: Task, data: Samples) -> Task:
    """The task at the minimum of the mean loss plus L2 / 2 ‖θ‖²."""

    def risk(params: Params) -> Tensor:
        return task.losses(params, data.batch(slice(None))).mean() + L2 / 2 * sum(value.square().sum() for value in params.values())

    return task.at(minimise(risk, task.params()))


@dataclass(frozen=True)
class Problem:
    task: Task
    train: Samples
    target: Utility

    def without(self, rows: Any) -> float:
        """The target after real retraining without the samples at ``rows``."""
        task = retrained(self.task, self.train.take(np.setdiff1d(np.arange(len(self.train)), rows)))
        return self.target.value(task, task.params()).item()

    def truth(self, groups: Any) -> np.ndarray:
        return self.without([]) - np.array([self.without(group) for group in groups])


def squared(outputs: Tensor, batch: Any) -> Tensor:
    return (outputs[:, 0] - batch[1]) ** 2


def problem(seed: int, loss: str = "logistic", n: int = 60, copies: int = 1) -> Problem:
    """Linear models with their L2 minimum; one sixth of the samples has a wrong label, and ``copies`` of each are there."""
    draw = np.random.default_rng(seed)
    truth = draw.normal(size=4)

    def sample(count: int) -> tuple[np.ndarray, np.ndarray]:
        x = draw.normal(size=(count, 4))
        return x, (draw.uniform(size=count) < 1 / (1 + np.exp(-2 * x @ truth))).astype(int)

    x, y = sample(n)
    y[: n // 6] = 1 - y[: n // 6]
    rows = np.concatenate([np.repeat(np.arange(n // 6), copies), np.arange(n // 6, n)])
    parts = [Samples((torch.from_numpy(x[rows]), torch.from_numpy(y[rows]))), Samples(tuple(map(torch.from_numpy, sample(200))))]
    torch.manual_seed(0)
    task = Task(nn.Linear(4, 2).double().eval()) if loss == "logistic" else Task(nn.Linear(4, 1).double().eval(), squared)
    return Problem(retrained(task, parts[0]), parts[0], Utility(parts[1]))


def coherent_groups(train: Samples) -> list[np.ndarray]:
    """10, 20 and 30 % of the samples: those with the largest or smallest first feature, and a part of either class."""
    x, y, n = train.tensors[0][:, 0].numpy(), train.labels.numpy(), len(train)  # type: ignore[index]
    order = np.argsort(x)
    sizes = [round(share * n) for share in (0.1, 0.2, 0.3)]
    return [part for size in sizes for part in (order[:size], order[-size:], np.flatnonzero(y == 0)[-size:])]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_second_order_is_closer_to_retraining_than_first_order(seed: int) -> None:
    p = problem(seed)
    groups = coherent_groups(p.train)
    truth = p.truth(groups)
    first, second = (
        np.abs(group_effect(p.task, p.train, groups, target=p.target, preconditioner=Exact(), order=order) - truth).sum() for order in (1, 2)
    )
    assert second < 0.75 * first
    assert second < 0.5 * np.abs(truth).sum()


def test_all_orders_together_are_retraining_where_the_loss_is_quadratic() -> None:
    p = problem(0, "squared")
    groups = coherent_groups(p.train)
    errors = [
        relative(group_effect(p.task, p.train, groups, target=p.target, preconditioner=Exact(), order=order), p.truth(groups))
        for order in (1, 2, 4, 60)
    ]
    assert errors[0] > errors[1] > errors[2]
    assert errors[3] <= 1e-6


def test_second_order_is_the_formula_of_basu_with_an_l2_penalty() -> None:
    p = problem(3)
    params, n, group = p.task.params(), len(p.train), np.arange(7, 19)
    grads = matrix(sample_gradients(p.task, p.train))
    data, part = p.train.batch(slice(None)), p.train.take(group).batch(slice(None))
    whole, own = (hessian(lambda v, b=batch: p.task.losses(v, b).mean(), params).numpy() + L2 * np.eye(grads.shape[1]) for batch in (data, part))
    share = len(group) / n
    first = np.linalg.solve(whole, (grads[group] - grads.mean(0)).sum(0)) / (n - len(group))
    step = (1 - 2 * share) / (1 - share) * first + share / (1 - share) * np.linalg.solve(whole, own @ first)
    moved = unflat(flat(params) + torch.from_numpy(step), params)
    expected = p.target.value(p.task, params).item() - p.target.value(p.task, moved).item()
    got = group_effect(p.task, p.train, [group], target=p.target, preconditioner=Exact())
    assert got == pytest.approx([expected], rel=1e-10)


def test_a_single_sample_has_the_sign_and_nearly_the_size_of_its_score() -> None:
    p = problem(1, n=300)
    scores = InnerProduct(Exact()).score(p.task, p.train, target=p.target)
    rows = np.concatenate([scores.order()[:5], scores.order()[-5:]])
    slope = full_gradient(lambda v: p.target.value(p.task, v), p.task.params())
    grads = matrix(sample_gradients(p.task, p.train))
    inverse = Exact().build(p.task, p.task.params(), p.train, Sweep())
    centre = grads.mean(0) @ flat(inverse(unflat(torch.from_numpy(slope), p.task.params())).direction).numpy() / len(p.train)
    got = group_effect(p.task, p.train, [[row] for row in rows], target=p.target, preconditioner=Exact(), order=1)
    assert (np.sign(got) == np.sign(scores.values[rows])).all()
    assert relative(got, scores.values[rows] + centre) <= 0.05
    assert relative(got, p.truth([[row] for row in rows])) <= 0.1


@given(batch_size=st.integers(1, 70))
def test_batches_do_not_matter(batch_size: int) -> None:
    p = problem(0)
    groups, whole, parts = coherent_groups(p.train)[:2], Sweep(), Sweep(batch_size=batch_size)
    one, other = (group_effect(p.task, p.train, groups, target=p.target, preconditioner=Exact(), sweep=sweep) for sweep in (whole, parts))
    assert relative(other, one) <= 1e-10
    first, second = (greedy(p.task, p.train, 3, target=p.target, preconditioner=Exact(), sweep=sweep) for sweep in (whole, parts))
    assert np.array_equal(first.positions, second.positions) and relative(second.targets, first.targets) <= 1e-12


def test_masks_are_groups_too() -> None:
    p = problem(0)
    rows = np.array([3, 5, 8])
    got = group_effect(p.task, p.train, [rows, np.isin(np.arange(60), rows)], target=p.target, preconditioner=Exact())
    assert got[0] == got[1]


def test_first_order_works_without_curvature() -> None:
    c = case("mlp")
    got = group_effect(c.task, c.train, [[0, 1]], target=Utility(c.valid), preconditioner=Identity(), order=1)
    grads = matrix(sample_gradients(c.task, c.train))
    step = (grads[:2] - grads.mean(0)).sum(0) / (len(grads) - 2)
    moved = unflat(flat(c.task.params()) + torch.from_numpy(step), c.task.params())
    target = Utility(c.valid)
    assert got == pytest.approx([(target.value(c.task, c.task.params()) - target.value(c.task, moved)).item()], rel=1e-10)


# Greedy removal


@pytest.mark.parametrize("seed", range(4))
def test_scoring_again_beats_one_shot_removal_where_samples_are_duplicated(seed: int) -> None:
    p = problem(seed, n=36, copies=4)
    k = 16
    again = greedy(p.task, p.train, k, target=p.target, preconditioner=Exact())
    once = InnerProduct(Exact()).score(p.task, p.train, target=p.target).order()[:k]
    assert p.without(again.positions) < p.without(once)
    assert p.without(again.positions) == pytest.approx(again.targets[-1], rel=0.02)


@pytest.mark.parametrize("at_once", [1, 3])
def test_the_predicted_target_is_that_of_retraining_where_the_loss_is_quadratic(at_once: int) -> None:
    p = problem(1, "squared")
    got = greedy(p.task, p.train, 8, target=p.target, preconditioner=Exact(), at_once=at_once)
    stops = [*range(0, 8, at_once), 8]
    assert got.targets == pytest.approx([p.without(got.positions[:stop]) for stop in stops], rel=1e-9)


def test_the_first_round_removes_the_top_of_the_scores() -> None:
    p = problem(2)
    train = Samples(p.train.tensors, np.array([f"s{i}" for i in range(60)]))
    scores = InnerProduct(Exact()).score(p.task, train, target=p.target)
    got = greedy(p.task, train, 5, target=p.target, preconditioner=Exact(), at_once=5)
    assert got.ids.tolist() == scores.top(5).tolist() and len(got.targets) == 2
    assert got.targets[0] == pytest.approx(p.without([]), rel=1e-12)
    longer = greedy(p.task, train, 9, target=p.target, preconditioner=Exact(), at_once=2)
    assert len(set(longer.positions.tolist())) == 9 and len(longer.targets) == 6


# Bad input


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ([], r"groups\[1\]: expected from 1 to 59 samples, got shape \(0,\)"),
        (np.arange(60), r"groups\[1\]: expected from 1 to 59 samples, got shape \(60,\)"),
        (np.ones(60, dtype=bool), r"groups\[1\]: expected from 1 to 59 samples"),
        (np.ones(59, dtype=bool), r"groups\[1\]: expected a mask of shape \(60,\), got \(59,\)"),
        ([1, 60], r"groups\[1\]: expected positions from 0 to 59"),
        ([-1], r"groups\[1\]: expected positions from 0 to 59"),
        ([0.5], r"groups\[1\]: expected positions from 0 to 59"),
        ([4, 4], r"groups\[1\]: expected every sample once, but 1 stand in it again"),
    ],
)
def test_a_group_that_makes_no_sense_is_refused(group: Any, message: str) -> None:
    p = problem(0)
    with pytest.raises(ValueError, match=message):
        group_effect(p.task, p.train, [[0], group], target=p.target, preconditioner=Exact())


def test_numbers_out_of_range_are_refused() -> None:
    p = problem(0)
    with pytest.raises(ValueError, match="order: expected at least 1, got 0"):
        group_effect(p.task, p.train, [[0]], target=p.target, preconditioner=Exact(), order=0)
    with pytest.raises(ValueError, match="k: expected a number from 1 to 59, got 60"):
        greedy(p.task, p.train, 60, target=p.target, preconditioner=Exact())
    with pytest.raises(ValueError, match="at_once: expected at least 1, got 0"):
        greedy(p.task, p.train, 5, target=p.target, preconditioner=Exact(), at_once=0)


@pytest.mark.parametrize("preconditioner", [Identity(), Exact(notes="other")])
def test_curvature_without_one_damping_is_refused(preconditioner: Preconditioner) -> None:
    p = problem(0)
    message = "preconditioner: expected an inverse of the curvature with one damping for all parameters"
    with pytest.raises(ValueError, match=message):
        group_effect(p.task, p.train, [[0]], target=p.target, preconditioner=preconditioner)
    with pytest.raises(ValueError, match=message):
        greedy(p.task, p.train, 2, target=p.target, preconditioner=preconditioner)


def test_a_solver_that_did_not_converge_is_said(caplog: pytest.LogCaptureFixture) -> None:
    class Tired(Exact):
        def build(self, *args: Any, **kwargs: Any) -> Callable[[Params], Solution]:
            inverse = super().build(*args, **kwargs)
            return lambda vector: Solution(inverse(vector).direction, {"damping": L2, "converged": False, "residual": 0.3})

    p = problem(0)
    for call in (
        lambda: group_effect(p.task, p.train, [[0]], target=p.target, preconditioner=Tired()),
        lambda: greedy(p.task, p.train, 1, target=p.target, preconditioner=Tired()),
    ):
        caplog.clear()
        call()
        assert "exact: the solver did not converge (residual 0.3)" in caplog.text
