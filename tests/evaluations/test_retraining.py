"""evaluations/retraining.py: every subset is trained on once, and kept."""

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
from numpy.typing import NDArray

from cases import case, relative
from oracles import flat, minimise
from retrainings import CALLS, FEW, L2, N, calls, nudge, setting
from robust_if import Samples, Task, Utility, fit
from robust_if.evaluations.retraining import Converged, FromScratch, half_subsets, retrain


@pytest.fixture(autouse=True)
def no_calls() -> None:
    calls()


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
