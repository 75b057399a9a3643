"""evaluations/attribution.py: retraining as ground truth, and how scores are compared with it."""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import pearsonr, spearmanr

from cases import Gap, blobs, case, relative
from oracles import flat, full_gradient, hessian, matrix, minimise, sample_gradients
from robust_if import Recipe, Retraining, Samples, Scores, Task, Utility, fit
from robust_if.evaluations.attribution import brittleness, lds, leave_one_out, loo_correlation
from robust_if.evaluations.retraining import Converged, FromScratch, half_subsets, retrain
from robust_if.models import logistic_regression
from robust_if.targets import Target

N, L2 = 13, 0.05
FEW = Recipe(epochs=2, batch_size=4, lr=0.1)
CALLS: list[tuple[int, int]] = []


def setting(name: str = "logistic") -> tuple[Task, Samples, list[Target]]:
    c = case(name, train=N)
    return c.task, c.train, [Utility(c.valid), Gap(c.valid)]


def nudge(task: Task, samples: Samples, weights: NDArray[np.float64], seed: int) -> Task:
    """A quick stand-in for training: the parameters moved by an amount that depends on subset and seed."""
    CALLS.append((int(weights.sum()), seed))
    shift = 0.1 * float(weights @ np.arange(1, len(samples) + 1)) / len(samples) + 0.01 * seed
    return task.at({name: value + shift * (torch.arange(value.numel()).view_as(value) % 3) for name, value in task.params().items()})


def calls() -> list[tuple[int, int]]:
    made = CALLS.copy()
    CALLS.clear()
    return made


@pytest.fixture(autouse=True)
def no_calls() -> None:
    CALLS.clear()


# --- retraining ----------------------------------------------------------------------------------------------------------------------------------


def test_values_are_those_of_models_trained_on_the_subsets() -> None:
    task, train, targets = setting("mlp")
    subsets = half_subsets(N, 3, seed=0)
    got = retrain(task, train, targets, FEW, subsets, seeds=(0, 5))
    assert got.shape == (3, 2, 2)
    for k, subset in enumerate(subsets):
        for s, seed in enumerate((0, 5)):
            fitted = fit(task, train.take(subset), replace(FEW, seed=seed))
            assert relative(got[k, s], [float(target.value(fitted, fitted.params())) for target in targets]) <= 1e-12
    assert not np.allclose(got[:, 0], got[:, 1]) and relative(retrain(task, train, targets[1], FEW, subsets), got[:, :1, 1:]) <= 1e-12


def test_from_scratch_draws_the_start_from_the_seed() -> None:
    task, train, _ = setting("mlp")
    w = np.ones(N)
    one, other = FromScratch(FEW)(task, train, w, 1), FromScratch(FEW)(task.reset(9), train, w, 1)
    expected = fit(task.reset(1), train, replace(FEW, seed=1))
    assert torch.equal(flat(one.params()), flat(other.params())) and torch.equal(flat(one.params()), flat(expected.params()))
    assert not torch.equal(flat(one.params()), flat(FromScratch(FEW)(task, train, w, 2).params()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_converged_is_the_minimum_of_the_weighted_mean_loss(dtype: torch.dtype) -> None:
    c = case("logistic", dtype)
    exact = case("logistic")
    w = np.arange(N) % 3.0
    before = flat(c.task.params()).clone()
    got = Converged(L2)(c.task, c.train, w, 0)

    def objective(params: dict[str, torch.Tensor]) -> torch.Tensor:
        weights = torch.from_numpy(w / w.sum())
        return weights @ exact.task.losses(params, exact.train.batch(slice(None))) + L2 / 2 * flat(params).square().sum()

    assert flat(got.params()).dtype == torch.float64
    assert relative(flat(got.params()), flat(minimise(objective, exact.task.params()))) <= 1e-7
    assert torch.equal(flat(c.task.params()), before) and all(p.requires_grad and p.grad is None for p in c.task.model.parameters())


def test_converged_moves_only_the_parameters_that_count() -> None:
    task, train, _ = setting("mlp")
    last = Task(task.model, parameters="5.*")
    got = Converged(L2)(last, train, np.ones(N), 0).model.state_dict()
    assert {name for name, value in task.model.state_dict().items() if not torch.equal(value, got[name])} == {"5.weight", "5.bias"}


def test_a_minimum_that_is_not_reached_is_an_error() -> None:
    task, train, _ = setting()
    with pytest.raises(ValueError, match=r"the minimum was not reached: a gradient of .* expected 1.0e-10"):
        Converged(L2, steps=1)(task, train, np.ones(N), 0)
    with pytest.raises(ValueError, match="l2: expected a number of at least 0, got -1"):
        Converged(-1)
    with pytest.raises(ValueError, match="tolerance: expected a positive"):
        Converged(1, tolerance=0)


# --- the cache -----------------------------------------------------------------------------------------------------------------------------------


def test_finished_trainings_are_never_repeated_and_further_ones_join_them(tmp_path: Path) -> None:
    task, train, targets = setting()
    subsets = half_subsets(N, 6, seed=0)
    first = retrain(task, train, targets, nudge, subsets[:4], seeds=(0, 1), directory=tmp_path)
    assert len(calls()) == 8
    again = retrain(task, train, targets, nudge, subsets[::-1], seeds=(1, 2), directory=tmp_path)
    assert len(calls()) == 12 - 4
    assert np.array_equal(again[::-1][:4, 0], first[:, 1])
    assert np.array_equal(again, retrain(task, train, targets, nudge, subsets[::-1], seeds=(1, 2))), "as without a cache"


def test_the_same_subset_twice_is_trained_once() -> None:
    task, train, targets = setting()
    got = retrain(task, train, targets, nudge, np.ones((3, N), dtype=bool))
    assert calls() == [(N, 0)] and (got == got[0]).all()


def killed_after_three(directory: Path) -> None:
    def fatal(*args: object) -> Task:
        if len(CALLS) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return nudge(*args)  # type: ignore[arg-type]

    fatal.__qualname__ = nudge.__qualname__
    task, train, targets = setting()
    retrain(task, train, targets, fatal, half_subsets(N, 8, seed=0), directory=directory)


def test_a_killed_process_loses_one_training_at_most(tmp_path: Path) -> None:
    child = multiprocessing.get_context("fork").Process(target=killed_after_three, args=(tmp_path,))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    (tmp_path / f"{'0' * 32}-0.1.tmp").write_text("[1.0")  # as a kill in the middle of writing leaves it
    task, train, targets = setting()
    subsets = half_subsets(N, 8, seed=0)
    got = retrain(task, train, targets, nudge, subsets, directory=tmp_path)
    assert len(calls()) == 8 - 3 and np.array_equal(got, retrain(task, train, targets, nudge, subsets))


def test_the_progress_bar_counts_what_is_left(tmp_path: Path) -> None:
    task, train, targets = setting()
    seen: list[int] = []
    subsets = half_subsets(N, 5, seed=0)
    retrain(task, train, targets, nudge, subsets[:2], directory=tmp_path)
    retrain(task, train, targets, nudge, subsets, directory=tmp_path, progress=lambda items, _: [seen.append(1) or each for each in items])
    assert len(seen) == 3


def test_another_computation_in_the_folder_is_refused(tmp_path: Path) -> None:
    task, train, targets = setting()
    subsets = half_subsets(N, 2, seed=0)
    retrain(task, train, targets, FEW, subsets, directory=tmp_path)
    others = [
        (task.reset(3), train, targets, FEW),
        (Task(task.model, parameters="1.weight"), train, targets, FEW),
        (task, train.with_labels((train.labels + 1) % 3), targets, FEW),
        (task, train, targets[:1], FEW),
        (task, train, [Utility(train), targets[1]], FEW),
        (task, train, [2 * targets[0], targets[1]], FEW),
        (task, train, targets, replace(FEW, lr=0.2)),
        (task, train, targets, replace(FEW, augment=augment)),
        (task, train, targets, FromScratch(FEW)),
        (task, train, targets, nudge),
    ]
    for each in others:
        with pytest.raises(ValueError, match=r"directory: .* holds another computation"):
            retrain(*each, subsets, directory=tmp_path)
    assert not CALLS and len(list(tmp_path.glob("*-0.json"))) == 2


def augment(batch: object, generator: torch.Generator) -> object:
    return batch


def test_a_recipe_that_has_no_lasting_name_is_refused_before_training(tmp_path: Path) -> None:
    task, train, targets = setting()
    with pytest.raises(ValueError, match="cannot be recognised in another process; expected a named function or a frozen dataclass"):
        retrain(task, train, targets, functools.partial(nudge), half_subsets(N, 2, seed=0), directory=tmp_path)
    assert not CALLS and retrain(task, train, targets, functools.partial(nudge), half_subsets(N, 2, seed=0)).shape == (2, 1, 2)


@pytest.mark.parametrize(
    ("subsets", "message"),
    [
        (np.ones((2, N)), "subsets: expected booleans of shape .* got float64"),
        (np.ones((2, N + 1), dtype=bool), rf"subsets: expected booleans of shape \(m, {N}\), got bool of shape \(2, {N + 1}\)"),
        (np.ones(N, dtype=bool), "subsets: expected booleans"),
        (np.ones((0, N), dtype=bool), "subsets: expected at least one"),
        (np.arange(2)[:, None] > np.zeros(N), "subsets: expected at least one, and a sample in each"),
    ],
)
def test_bad_subsets_are_refused_before_training(subsets: NDArray[np.bool_], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        retrain(*setting(), nudge, subsets)
    assert not CALLS


@pytest.mark.parametrize("seeds", [(), (1, 1)])
def test_bad_seeds_and_no_targets_are_refused(seeds: tuple[int, ...]) -> None:
    task, train, targets = setting()
    with pytest.raises(ValueError, match="targets and seeds: expected at least one of each"):
        retrain(task, train, targets, nudge, half_subsets(N, 2, seed=0), seeds=seeds)
    with pytest.raises(ValueError, match="got 0 targets"):
        retrain(task, train, [], nudge, half_subsets(N, 2, seed=0))


@dataclass(frozen=True)
class Broken:
    def __call__(self, task: Task, samples: Samples, weights: NDArray[np.float64], seed: int) -> Task:
        return task.at({name: value * float("nan") for name, value in task.params().items()})


def test_a_diverged_model_is_an_error_and_not_kept(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="subset 0 with seed 0 has targets that are not finite"):
        retrain(*setting(), Broken(), half_subsets(N, 2, seed=0), directory=tmp_path)
    assert not list(tmp_path.glob("*-0.json"))


# --- subsets and effects -------------------------------------------------------------------------------------------------------------------------


def test_half_subsets_have_their_size_follow_the_seed_and_take_every_sample_alike() -> None:
    subsets = half_subsets(20, 400, seed=1)
    assert subsets.shape == (400, 20) and subsets.dtype == bool and (subsets.sum(1) == 10).all()
    assert np.abs(subsets.mean(0) - 0.5).max() < 0.1 and len(np.unique(subsets, axis=0)) > 390
    assert np.array_equal(subsets, half_subsets(20, 400, seed=1)) and not np.array_equal(subsets, half_subsets(20, 400, seed=2))
    assert (half_subsets(20, 3, seed=0, fraction=0.9).sum(1) == 18).all()
    for bad in (0.0, 1.0, 2.0, 0.01):
        with pytest.raises(ValueError, match="fraction: expected a share"):
            half_subsets(20, 3, seed=0, fraction=bad)
    with pytest.raises(ValueError, match="m: expected at least one"):
        half_subsets(20, 0, seed=0)


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
