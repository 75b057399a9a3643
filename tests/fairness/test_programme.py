"""fairness/programme.py: the conditions that its solutions must meet, and plain formulations of the same problems."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import linprog

from robust_if.fairness.programme import choose, li_liu, reweigh

N = 40
SEEDS = range(6)


def drawn(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores of a gap and of a utility, related to each other."""
    random = np.random.default_rng(seed)
    f = random.normal(size=N) / 50
    return f, 0.5 * f + random.normal(size=N) / 50


def fractional(x: np.ndarray) -> int:
    return int(np.count_nonzero((x > 1e-7) & (x < 1 - 1e-7)))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("beta", "gamma"), [(0.5, 0.2), (1.0, 0.0), (0.2, 0.6)])
def test_li_liu_removes_the_least_that_meets_both_demands(seed: int, beta: float, gamma: float) -> None:
    f, u = drawn(seed)
    gap = 0.8 * f[f > 0].sum()
    removed = 1 - li_liu(gap, f, u, beta=beta, gamma=gamma)
    assert removed.min() >= 0 and removed.max() <= 1 and fractional(removed) <= 2
    assert f @ removed >= beta * gap - 1e-9 and u @ removed >= gamma * u[u > 0].sum() - 1e-9
    # the dual bounds the least sum from below: for every price of the two demands, the rows above the line are removed
    grid = np.linspace(0, 200, 401)
    demands = np.array([beta * gap, gamma * u[u > 0].sum()])
    prices = np.stack([each.ravel() for each in np.meshgrid(grid, grid)], 1)
    bounds = prices @ demands + np.minimum(0, 1 - prices @ np.stack([f, u])).sum(1)
    assert bounds.max() <= removed.sum() + 1e-9 <= bounds.max() + 0.05


@pytest.mark.parametrize("seed", SEEDS)
def test_li_liu_closes_a_gap_beyond_reach_as_far_as_the_share_allows(seed: int) -> None:
    f, u = drawn(seed)
    gap = 1.5 * f[f > 0].sum()
    removed = 1 - li_liu(gap, f, u, alpha=0.1)
    assert removed.sum() <= 0.1 * N + 1e-9 and u @ removed >= -1e-9 and fractional(removed) <= 2
    best = np.sort(f)[::-1][: N // 10].sum()
    assert 0 < f @ removed <= best + 1e-9
    free = 1 - li_liu(gap, f, np.zeros(N), alpha=0.1)
    assert abs(f @ free - best) <= 1e-9 and set(np.flatnonzero(free)) == set(np.argsort(-f)[: N // 10])


def test_li_liu_removes_the_highest_scores_where_utility_does_not_matter() -> None:
    f = np.array([0.1, 0.3, -0.2, 0.2, 0.05])
    np.testing.assert_allclose(li_liu(0.6, f, np.zeros(5), beta=0.75), [1, 0, 1, 0.25, 1])


def test_li_liu_leaves_a_negative_gap_as_published() -> None:
    f, u = drawn(0)
    np.testing.assert_array_equal(li_liu(-0.3, f, u, gamma=0.0), np.ones(N))
    np.testing.assert_array_equal(li_liu(0.0, f, u, gamma=0.0), np.ones(N))


def test_li_liu_says_what_cannot_be_met() -> None:
    f = np.array([0.1, 0.2, -0.1])
    with pytest.raises(
        ValueError, match=r"close 1 of the gap 0.25 \(at most 0.3 can be closed\) and gain 0.5 of the utility \(0.5 of 1\) at once; lower one"
    ):
        li_liu(0.25, f, np.array([-4.0, -4.0, 1.0]), beta=1.0, gamma=0.5)
    with pytest.raises(ValueError, match=r"fairness, utility: expected two arrays of shape \(n,\), got \(3,\) and \(2,\)"):
        li_liu(0.1, f, f[:2])


def problem(seed: int, k: int = 2) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    return random.uniform(0, 2, N), random.normal(size=k) / 10, random.normal(size=(N, k)) / 50, random.normal(size=N) / 50


def plainly(w, gaps, s, u, bound, cost, budget, max_weight, radius, elastic=10.0):  # type: ignore[no-untyped-def]
    """The same programme in the new weights v, |v − w| ≤ m, |v − 1| ≤ d and the excess: the least price, and the least excess of all."""
    n, k, e = N, len(gaps), np.eye(N)
    o = np.zeros((n, n))
    one = np.ones((k, 1))
    rows = np.vstack([
        np.hstack([e, -e, o, np.zeros((n, 1))]), np.hstack([-e, -e, o, np.zeros((n, 1))]),
        np.hstack([e, o, -e, np.zeros((n, 1))]), np.hstack([-e, o, -e, np.zeros((n, 1))]),
        np.hstack([s.T, np.zeros((k, 2 * n)), -one]), np.hstack([-s.T, np.zeros((k, 2 * n)), -one]),
        np.concatenate([np.zeros(n), np.ones(n), np.zeros(n + 1)])[None],
    ])  # fmt: skip
    limits = np.concatenate([w, -w, np.ones(n), -np.ones(n), bound - gaps + s.T @ w, bound + gaps - s.T @ w, [min(budget, 1e6)]])
    box = [*zip(np.maximum(w - radius, 0), np.minimum(w + radius, max_weight), strict=True), *[(0, None)] * (2 * n + 1)]
    price = np.concatenate([u, np.zeros(n), np.full(n, cost), [elastic]])
    return linprog(price, A_ub=rows, b_ub=limits, bounds=box).fun - u @ w


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("budget", "cost"), [(np.inf, 0.0), (4.0, 0.004), (1.0, 0.02), (np.inf, 0.05)])
def test_reweigh_is_the_best_within_its_limits(seed: int, budget: float, cost: float) -> None:
    w, gaps, s, u = problem(seed)
    options = {"bound": 0.01, "cost": cost, "budget": budget, "max_weight": 2.0, "radius": 0.6}
    found = reweigh(w, gaps, s, u, **options)
    after = w + found.change
    assert after.min() >= -1e-9 and after.max() <= 2 + 1e-9
    assert np.abs(found.change).max() <= 0.6 + 1e-9 and np.abs(found.change).sum() <= budget + 1e-7
    assert found.excess >= 0 and np.abs(gaps + s.T @ found.change).max() <= 0.01 + found.excess + 1e-9
    price = u @ found.change + cost * np.abs(after - 1).sum() + 10 * found.excess
    assert abs(price - plainly(w, gaps, s, u, **options)) <= 1e-8


@pytest.mark.parametrize("seed", SEEDS)
def test_reweigh_meets_bounds_that_can_be_met_and_else_comes_as_close_as_it_can(seed: int) -> None:
    w, gaps, s, _ = problem(seed, k=1)
    gaps = np.sign(gaps) * 0.2
    assert reweigh(w, gaps, s, np.zeros(N), bound=0.01).excess <= 1e-9
    tight = reweigh(w, gaps, s, np.zeros(N), bound=0.01, budget=1.0)
    toward = -np.sign(gaps) * s[:, 0]
    room = np.minimum(0.6, np.where(toward > 0, 2 - w, w))
    order = np.argsort(-np.abs(toward))
    left, reached = 1.0, 0.0
    for i in order:  # the strongest rows first, each as far as it goes
        step = min(room[i], left)
        left, reached = left - step, reached + step * abs(toward[i])
    assert abs(tight.excess - (0.2 - 0.01 - reached)) <= 1e-9 and tight.excess > 0


def test_cost_pulls_weights_back_to_one() -> None:
    w, _, s, u = problem(0)
    far = reweigh(w, np.zeros(2), np.zeros_like(s), np.zeros(N), cost=0.1, radius=2.0)
    np.testing.assert_allclose(w + far.change, 1.0, atol=1e-9)
    distances = [np.abs(1 + reweigh(np.ones(N), np.zeros(2), s, u, bound=1.0, cost=cost).change - 1).sum() for cost in (0.0, 0.01, 0.02, 1.0)]
    assert distances == sorted(distances, reverse=True) and distances[0] > distances[2] > distances[3] == 0


def test_reweigh_without_gaps_follows_utility_alone() -> None:
    _, _, _, u = problem(1)
    found = reweigh(np.ones(N), [], np.zeros((N, 0)), u, cost=0.01)
    np.testing.assert_allclose(found.change, np.where(np.abs(u) > 0.01, -0.6 * np.sign(u), 0), atol=1e-9)


def test_reweigh_says_when_time_ran_out() -> None:
    w, gaps, s, u = problem(0)
    with pytest.raises(ValueError, match="time_limit: the linear programme of .* changes and 2 gaps was not solved in 0 s; give more time"):
        reweigh(w, gaps, s, u, time_limit=0.0)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("budget", [3, 10, np.inf])
def test_choose_is_the_best_up_to_the_samples_that_the_vertex_splits(seed: int, budget: float) -> None:
    _, gaps, s, u = problem(seed)
    price = 0.005 - u
    found = choose(gaps, s, price, bound=0.01, budget=budget)
    assert found.dtype == bool and found.sum() <= budget + 2
    rows = np.column_stack([np.vstack([-s.T, s.T, np.ones((1, N))]), [-1.0] * 4 + [0.0]])
    limits = np.concatenate([0.01 - gaps, 0.01 + gaps, [min(budget, N)]])
    best = linprog(np.append(price, 10.0), A_ub=rows, b_ub=limits, bounds=[(0, 1)] * N + [(0, None)])
    assert np.count_nonzero(np.abs(found - best.x[:N]) > 1e-7) <= 3  # as many as rows that bind


def test_choose_without_gaps_takes_the_lowest_prices_below_0() -> None:
    price = np.array([0.3, -0.2, -0.5, 0.1, -0.1])
    assert choose([], np.zeros((5, 0)), price).tolist() == [False, True, True, False, True]
    assert choose([], np.zeros((5, 0)), price, budget=1).tolist() == [False, False, True, False, False]


def test_choose_lowers_a_gap_of_either_sign() -> None:
    s = np.array([[0.1], [-0.1], [0.02]])
    assert choose([0.1], s, np.full(3, 0.01)).tolist() == [True, False, False]
    assert choose([-0.1], s, np.full(3, 0.01)).tolist() == [False, True, False]
    assert not choose([0.1], s, np.full(3, 5.0)).any()  # at no price beyond ten times the gain
