"""attacks/evasion/fab.py and boundary.py: the nearest error, on linear models exactly."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linprog, minimize
from torch import Tensor, nn

from cases import case, relative
from robust_if import Task
from robust_if.attacks.evasion import APGD, FAB, Threat, WholeNumbers, margin
from robust_if.attacks.evasion.boundary import onto_plane
from robust_if.task import Batch
from unchanged import untouched
from victims import broken, digits, linear, one_and_two_logits, seeded


def nearest(task: Task, batch: Batch, eps: Tensor, low: float, high: float, norm: str) -> Tensor:
    """The distance, relative to eps, of the nearest error of a linear model, by another solver: over all wrong classes, in u = (x' − x) / eps."""
    weight, bias = (value.numpy() for value in (task.params()["1.weight"], task.params()["1.bias"]))
    found, radius = [], eps.numpy()
    for x, y in zip(batch[0].numpy(), batch[1].tolist(), strict=True):
        least = np.inf
        for goal in set(range(len(weight))) - {y}:
            w, b = weight[goal] - weight[y], bias[goal] - bias[y]
            slope, missing = w * radius, -(w @ x + b)
            if missing <= 0:
                least = 0.0
                continue
            limits = [((low - v) / r, (high - v) / r) if r > 0 else (0.0, 0.0) for v, r in zip(x, radius, strict=True)]
            if norm == "linf":  # minimise t with |u| <= t
                d = len(x)
                eye, one = np.eye(d), np.ones((d, 1))
                sides, ends = np.block([[eye, -one], [-eye, -one], [-slope[None], np.zeros((1, 1))]]), np.r_[np.zeros(2 * d), -missing]
                result = linprog(np.r_[np.zeros(d), 1.0], A_ub=sides, b_ub=ends, bounds=[*limits, (0, None)])
                least = min(least, result.fun if result.success else np.inf)
            else:
                far = np.array([b if s > 0 else a for s, (a, b) in zip(slope, limits, strict=True)])
                if slope @ far < missing:
                    continue
                start = far * 0.5
                result = minimize(
                    lambda u: u @ u, start, jac=lambda u: 2 * u, bounds=limits, method="SLSQP", options={"ftol": 1e-14, "maxiter": 500},
                    constraints={"type": "ineq", "fun": lambda u, s=slope, m=missing: s @ u - m, "jac": lambda _, s=slope: s},
                )  # fmt: skip
                least = min(least, float(np.sqrt(result.fun)))
        found.append(least)
    return torch.tensor(found)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("classes", [2, 3, 5])
def test_the_nearest_error_of_a_linear_model_is_found(norm: str, classes: int) -> None:
    task, (x, y) = linear(24, 6, classes)
    eps, low, high = torch.tensor([0.0, 0.3, 0.5, 1.0, 2.0, 0.7]).double(), -1.6, 1.5
    x = x.clamp(low, high)
    expected = nearest(task, (x, y), eps, low, high, norm)
    most = float(expected[expected < torch.inf].quantile(0.8))
    threat = Threat(most * eps, norm, (low, high))
    points, distance = FAB(threat, steps=60).nearest(task, task.params(), (x, y))
    inside = expected <= most
    assert (expected == 0).any() and (inside & (expected > 0)).sum() >= 5 and (~inside).any()
    assert relative(distance[inside], expected[inside] / most) <= 1e-4
    still = ~inside | (expected == 0)
    assert (distance[~inside] == torch.inf).all() and torch.equal(points[still], x[still])
    assert (margin(task.outputs(task.params(), (points, y)), (points, y))[inside] > 0).all()
    moved = ((points - x) / torch.where(eps > 0, most * eps, torch.inf)).norm(dim=1, p=torch.inf if norm == "linf" else 2)
    assert relative(moved[inside], distance[inside]) <= 1e-9


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_without_bounds_it_is_the_distance_to_a_plane(norm: str) -> None:
    task, (x, y) = linear(20, 5, 2)
    mutable = torch.tensor([True, True, False, True, True])
    weight, bias = task.params()["1.weight"], task.params()["1.bias"]
    w, b = weight[1] - weight[0], bias[1] - bias[0]
    gap = (x @ w + b) * (2 * y - 1)
    expected = gap / (w[mutable].norm() if norm == "l2" else w[mutable].abs().sum())
    points, distance = FAB(Threat(50.0, norm, mutable=mutable), steps=30).nearest(task, task.params(), (x, y))
    assert relative(50 * distance, expected.clamp(min=0)) <= 1e-6 and torch.equal(points[:, 2], x[:, 2]) and (gap > 0).sum() > 5


@given(seed=st.integers(0, 99), norm=st.sampled_from(["linf", "l2"]))
def test_the_nearest_point_of_a_plane_within_limits(seed: int, norm: Any) -> None:
    draw = seeded(seed)
    u, normal = (torch.randn(30, 7, generator=draw).double() for _ in range(2))
    normal[:10, 2], normal[0] = 0, 0
    low, high = u - torch.rand(30, 7, generator=draw), u + torch.rand(30, 7, generator=draw)
    low[10:15, 1:3], high[10:20, 3:], low[20:], high[20:25, 0] = -torch.inf, torch.inf, u[20:], u[20:25, 0]
    inner = low.clamp(min=-3) + torch.rand(30, 7, generator=draw) * (high.clamp(max=3) - low.clamp(min=-3))
    offset = (normal * inner).sum(1)
    got = onto_plane(u, normal, offset, low, high, norm)
    assert (got >= low).all() and (got <= high).all() and relative((got * normal).sum(1), offset) <= 1e-10
    size = {"linf": torch.inf, "l2": 2}[norm]
    assert ((got - u).norm(dim=1, p=size) <= (inner - u).norm(dim=1, p=size) + 1e-12).all()
    if norm == "l2":  # the nearest point of a convex set sees no allowed point in the direction of what is left
        assert (((u - got) * (inner - got)).sum(1) <= 1e-9).all()
    unreachable = onto_plane(u, normal, (normal * u).sum(1) + 1e9, u - 1, u + 1, norm)
    assert relative(unreachable, u + normal.sign()) <= 1e-12


@cache
def reference() -> Tensor:
    task, (x, y) = digits()
    return FAB(Threat(0.2, bounds=(0.0, 1.0)), steps=20, classes=2).nearest(task, task.params(), (x, y))[1]


def test_errors_are_near_and_in_the_ball() -> None:
    task, (x, y) = digits()
    for norm, eps in (("linf", 0.1), ("l2", 0.6)):
        threat = Threat(eps, norm, (0.0, 1.0))
        points, distance = FAB(threat, steps=15, classes=2).nearest(task, task.params(), (x, y))
        found = distance < torch.inf
        length = (points - x).flatten(1).norm(dim=1, p=torch.inf if norm == "linf" else 2)
        assert points.min() >= 0 and points.max() <= 1 and length.max() <= eps * (1 + 1e-6)
        assert torch.equal(broken(task, points, y), found) and torch.equal(points[~found], x[~found])
        assert relative(length[found] / eps, distance[found]) <= 1e-5
        apgd = broken(task, APGD(threat, steps=10).first_error(task, task.params(), (x, y)), y)
        assert 0.2 < found.float().mean() and found.float().mean() >= apgd.float().mean() - 0.05
    inside = reference() <= 0.75  # a search by distance does not depend on the radius beyond rounding
    points, distance = FAB(Threat(0.15, bounds=(0.0, 1.0)), steps=20, classes=2).nearest(task, task.params(), (x, y))
    assert relative(distance[inside] * 0.15, reference()[inside] * 0.2) <= 0.02


def test_the_first_error_is_one_of_the_errors() -> None:
    task, (x, y) = digits()
    attack = FAB(Threat(0.2, bounds=(0.0, 1.0)), steps=20, classes=2)
    first = attack.first_error(task, task.params(), (x, y))
    assert torch.equal(broken(task, first, y), reference() < torch.inf)


@given(size=st.integers(1, 8), seed=st.integers(0, 9), norm=st.sampled_from(["linf", "l2"]))
def test_a_sample_is_attacked_the_same_in_every_batch_and_order(size: int, seed: int, norm: Any) -> None:
    task, _, (x, y) = one_and_two_logits(8)
    attack = FAB(Threat(1.5, norm, (-3.0, 3.0)), steps=6)
    whole = attack(task, task.params(), (x, y))
    order = torch.randperm(len(x), generator=seeded(seed))
    parts = torch.cat([attack(task, task.params(), (x[rows], y[rows])) for rows in order.split(size)])
    assert (whole != x).any() and relative(parts, whole[order]) <= 1e-6


def test_nothing_of_the_model_or_the_random_state_changes() -> None:
    c = case("cnn")
    batch = c.valid.batch(slice(None))
    attack = FAB(Threat(0.5), steps=5)
    with untouched(c.task.model), torch.no_grad():
        one = attack(c.task, c.task.params(), batch)
        assert torch.equal(one, attack(c.task, c.task.params(), batch))


def test_one_logit_is_two_logits() -> None:
    one, two, batch = one_and_two_logits()
    attack = FAB(Threat(1.0), steps=30)
    expected = attack.nearest(two, two.params(), batch)
    got = attack.nearest(one, one.params(), (batch[0], batch[1].double()))
    assert relative(got[0], expected[0]) <= 1e-9 and (expected[1] < torch.inf).any()


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="project: FAB walks along a boundary"):
        FAB(Threat(1.0, project=(WholeNumbers(),)))
    with pytest.raises(ValueError, match="steps: expected at least 1, got 0"):
        FAB(Threat(1.0), steps=0)
    with pytest.raises(ValueError, match="classes: expected at least 1, got 0"):
        FAB(Threat(1.0), classes=0)
    task, batch = linear(6, 3, 2)
    attack = FAB(Threat(1.0), steps=2)
    with pytest.raises(ValueError, match="batch: the loss needs labels"):
        attack(task, task.params(), (batch[0],))
    with pytest.raises(ValueError, match="bounds: expected inputs within"):
        FAB(Threat(1.0, bounds=(0.0, 0.1)))(task, task.params(), batch)
    with pytest.raises(ValueError, match="labels from 0 to 1"):
        attack(task, task.params(), (batch[0], batch[1] + 2))

    class Steps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3, 2).double())

        def forward(self, x: Tensor) -> Tensor:
            return x.detach().round() @ self.weight.detach()

    stepped = Task(Steps().eval())
    with pytest.raises(ValueError, match="differentiable way, so FAB has no direction"):
        attack(stepped, stepped.params(), batch)


def test_torchattacks_finds_no_more_errors() -> None:
    theirs = pytest.importorskip("torchattacks")
    task, (x, y) = digits()
    ours = broken(task, FAB(Threat(0.1, bounds=(0.0, 1.0)), steps=10, classes=9)(task, task.params(), (x, y)), y)
    found = broken(task, theirs.FAB(task.model, eps=0.1, steps=10, seed=0, multi_targeted=True, n_classes=10)(x, y), y)
    assert 0.2 < found.float().mean() <= ours.float().mean() + 0.01
