"""evaluations/attribution.py: retraining as ground truth, and how scores are compared with it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import pearsonr, spearmanr

from cases import Gap, blobs, relative
from oracles import flat, full_gradient, hessian, matrix, sample_gradients
from retrainings import CALLS, FEW, L2, N, calls, nudge, setting
from robust_if import Retraining, Samples, Scores, Task, Utility
from robust_if.evaluations.attribution import brittleness, lds, leave_one_out, loo_correlation
from robust_if.evaluations.retraining import Converged, half_subsets, retrain
from robust_if.models import logistic_regression
from robust_if.targets import Target


@pytest.fixture(autouse=True)
def no_calls() -> None:
    calls()


# --- effects --------------------------------------------------------------------------------------------------------------------------------------


def test_leaving_one_out_equals_the_retraining_estimator() -> None:
    task, train, targets = setting("mlp")
    got = leave_one_out(task, train, targets, FEW, seeds=(0, 1))
    assert got.shape == (N, 2)
    for t, target in enumerate(targets):
        assert relative(got[:, t], Retraining(FEW, seeds=(0, 1)).score(task, train, target=target).values) <= 1e-9
    assert relative(leave_one_out(task, train, targets, FEW, seeds=(0, 1), which=[5, 2]), got[[5, 2]]) <= 1e-12


@pytest.mark.parametrize("which", [[-1], [N], [0.5], [[1]], np.ones(N, dtype=bool)])
def test_positions_that_are_none_are_refused(which: object) -> None:
    with pytest.raises(ValueError, match=f"which: expected positions from 0 to {N - 1}"):
        leave_one_out(*setting(), nudge, which=which)  # type: ignore[arg-type]


def influence(task: Task, train: Samples, target: Target) -> NDArray[np.float64]:
    """−(1/n) ⟨∇T, H⁻¹ ∇ℓ_i⟩ at the minimum with L2, by dense algebra."""
    params = task.params()
    curvature = hessian(lambda p: task.losses(p, train.batch(slice(None))).mean() + L2 / 2 * flat(p).square().sum(), params)
    slope = full_gradient(lambda p: target.value(task, p), params)
    return -matrix(sample_gradients(task, train)) @ np.linalg.solve(curvature.numpy(), slope) / len(train)


def test_exact_influence_predicts_leaving_one_out_and_subsets_in_sign_and_size() -> None:
    n = 60
    (train, _), (valid, _) = blobs(n, 0, flipped=6), blobs(40, 1)
    start = Task(logistic_regression((2,), 2).double().eval())
    targets = [Utility(valid), Gap(valid)]
    full = Converged(L2)(start, train, np.ones(n), 0)
    effects = leave_one_out(full, train, targets, Converged(L2))
    subsets = half_subsets(n, 40, seed=0)
    values = retrain(full, train, targets, Converged(L2), subsets).mean(1)
    for t, target in enumerate(targets):
        scores = influence(full, train, target)
        for found in loo_correlation(scores, effects[:, t]):
            assert found.value > 0.97 and found.low <= found.value <= found.high
        # the decay acts on the mean over the samples that are left, which adds the same constant to every effect
        assert np.polyfit(scores, effects[:, t], 1)[0] == pytest.approx(1, abs=0.1)
        found = lds(scores, subsets, values[:, t])
        assert found.value > 0.85 and 0.7 < found.low < found.value < found.high <= 1
        assert lds(-scores, subsets, values[:, t]).value == pytest.approx(-found.value)
    assert lds(np.random.default_rng(0).normal(size=n), subsets, values[:, 0]).value < 0.5


# --- correlations --------------------------------------------------------------------------------------------------------------------------------


@given(seed=st.integers(0, 99), ties=st.booleans(), q=st.integers(1, 3))
def test_lds_is_the_mean_of_the_rank_correlations_of_scipy(seed: int, ties: bool, q: int) -> None:
    draw = np.random.default_rng(seed)
    subsets, scores, values = half_subsets(10, 15, seed), draw.normal(size=(10, q)), draw.normal(size=(15, q))
    if ties:
        scores, values = np.round(scores), np.round(values)
    expected = [spearmanr(subsets @ scores[:, j], values[:, j]).statistic for j in range(q)]
    assert lds(scores, subsets, values).value == pytest.approx(np.mean(expected), abs=1e-12)
    assert lds(Scores(scores[:, 0], np.arange(10), "any"), subsets, values[:, 0]).value == pytest.approx(expected[0], abs=1e-12)


def test_no_correlation_is_defined_where_one_side_does_not_vary() -> None:
    draw = np.random.default_rng(0)
    subsets, scores, values = half_subsets(10, 15, 0), draw.normal(size=(10, 2)), draw.normal(size=(15, 2))
    for constant in (0.0, 0.1):  # sums of 0.1 in different orders differ in their last digit
        flat_scores = np.where([True, False], constant, scores)
        for found in (lds(np.full(10, constant), subsets, values[:, 0]), lds(flat_scores, subsets, values)):
            assert np.isnan([found.value, found.low, found.high]).all()
    assert np.isnan(lds(scores[:, 0], subsets, np.full(15, 0.3)).value)
    for found in (*loo_correlation(np.zeros(5), np.arange(5)), *loo_correlation(np.arange(5), np.full(5, 0.1))):
        assert np.isnan([found.value, found.low, found.high]).all()


def test_small_differences_on_a_large_scale_are_still_ranked() -> None:
    subsets = half_subsets(10, 15, 0)
    scores = 1e-9 * np.random.default_rng(0).normal(size=10) + 1.0
    assert lds(scores, subsets, subsets @ (scores - 1)).value == pytest.approx(1)
    assert lds(1e-300 * (scores - 1), subsets, subsets @ (scores - 1)).value == pytest.approx(1)


def test_leave_one_out_correlations_are_those_of_scipy() -> None:
    draw = np.random.default_rng(0)
    x, y = draw.normal(size=(2, 30)) + np.arange(30) / 8
    pearson, spearman = loo_correlation(x, y)
    assert pearson.value == pytest.approx(pearsonr(x, y).statistic) and spearman.value == pytest.approx(spearmanr(x, y).statistic)
    assert loo_correlation(x, y) == (pearson, spearman) != loo_correlation(x, y, seed=1)
    narrow = loo_correlation(x, y, level=0.5)[0]
    assert pearson.low < narrow.low < pearson.value < narrow.high < pearson.high


def test_the_interval_covers_the_truth_and_shrinks_with_more_subsets() -> None:
    draw = np.random.default_rng(0)
    scores, widths = draw.normal(size=50), []
    for m in (50, 800):
        subsets = half_subsets(50, m, 0)
        predicted = subsets @ scores
        found = lds(scores, subsets, predicted + predicted.std() * draw.normal(size=m))
        assert found.low < 6 / np.pi * np.arcsin(np.sqrt(0.5) / 2) < found.high  # Spearman's ρ of a normal pair of correlation √½
        widths.append(found.high - found.low)
    assert widths[0] / widths[1] == pytest.approx(4, rel=0.4)


def test_shapes_that_do_not_fit_are_refused() -> None:
    subsets = half_subsets(10, 5, 0)
    for scores, which, values in (
        (np.zeros(9), subsets, np.zeros(5)),
        (np.zeros(10), subsets, np.zeros(4)),
        (np.zeros((10, 2)), subsets, np.zeros(5)),
        (np.zeros(10), subsets, np.zeros((5, 1))),
        (np.zeros(10), subsets.astype(int), np.zeros(5)),
    ):
        with pytest.raises(ValueError, match=r"expected scores \(n,\) or \(n, q\), boolean subsets"):
            lds(scores, which, values)
    with pytest.raises(ValueError, match="at least 3 values"):
        lds(np.zeros(10), subsets[:2], np.zeros(2))
    with pytest.raises(ValueError, match="all finite"):
        lds(np.zeros(10), subsets, np.full(5, np.nan))
    with pytest.raises(ValueError, match="scores and effects: expected one of each"):
        loo_correlation(np.zeros(4), np.zeros(5))


# --- brittleness ---------------------------------------------------------------------------------------------------------------------------------


def test_brittleness_tells_harmful_samples_from_random_ones(tmp_path: Path) -> None:
    (train, wrong), (valid, _) = blobs(60, 0, flipped=12, distance=3.0), blobs(60, 1, distance=3.0)
    task = Task(logistic_regression((2,), 2).double().eval())
    scores = Scores(wrong.astype(float), train.ids, "truth")
    found = brittleness(task, train, [Utility(valid), Gap(valid)], Converged(L2), scores, removed=(0.2, 3), draws=4, seeds=(0, 1), directory=tmp_path)
    assert list(found.columns) == ["target", "k", "removed_by", "draw", "seed", "before", "after"]
    assert len(found) == 2 * 2 * (1 + 4) * 2 and set(found["k"]) == {12, 3} and set(found["removed_by"]) == {"truth", "random draws"}
    utility = found[(found["target"] == "utility") & (found["k"] == 12)]
    by = utility.groupby("removed_by")
    assert utility["before"].nunique() == 1 and by["after"].max()["truth"] < by["after"].min()["random draws"] < 1
    clean = Converged(L2)(task, train.take(~wrong), np.ones(48), 0)
    assert by["after"].max()["truth"] == pytest.approx(float(Utility(valid).value(clean, clean.params())), rel=1e-9)
    assert (by["after"].max()["truth"] < utility["before"]).all(), "without harmful samples the target is lower"
    assert by["after"].nunique()["random draws"] == 4


def test_random_draws_are_shared_between_scores(tmp_path: Path) -> None:
    task, train, targets = setting()
    for k, name in enumerate(("one", "other")):
        scores = Scores(np.roll(np.arange(N), k).astype(float), train.ids, name)
        brittleness(task, train, targets, nudge, scores, removed=(2, 4), draws=3, directory=tmp_path)
        assert len(calls()) == (1 + 2 + 2 * 3 if k == 0 else 2)


@pytest.mark.parametrize("removed", [(), (0,), (N,), (0.0,), (1.0,), (2.5,), (-0.1,), (float("nan"),)])
def test_removals_that_leave_nothing_or_remove_nothing_are_refused(removed: tuple[float, ...]) -> None:
    task, train, targets = setting()
    with pytest.raises(ValueError, match=f"removed: expected counts from 1 to {N - 1} or shares"):
        brittleness(task, train, targets, nudge, Scores(np.arange(N), train.ids, "any"), removed=removed)
    assert not CALLS


def test_scores_of_other_samples_and_targets_of_one_name_are_refused() -> None:
    task, train, targets = setting()
    with pytest.raises(ValueError, match="scores: expected one per training sample in the same order"):
        brittleness(task, train, targets, nudge, Scores(np.arange(N), train.ids[::-1], "any"))
    with pytest.raises(ValueError, match="targets: expected different names"):
        brittleness(task, train, [targets[0], targets[0]], nudge, Scores(np.arange(N), train.ids, "any"))
