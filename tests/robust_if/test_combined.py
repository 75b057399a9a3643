"""estimators/combined.py: ranks of several estimators in one score."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import rankdata

import robust_if as rif
from cases import TRAIN, Gap, case, relative
from robust_if import Checkpoint, ConjugateGradient, Ensemble, GradNorm, InnerProduct, Loss, SelfInfluence, Store, Sweep, Task, Utility
from robust_if.estimators import Combined, Estimator
from robust_if.estimators.base import Job, Result
from robust_if.estimators.named import named

RAW, COSINE = InnerProduct(), InnerProduct(normalise="cosine")
BOTH = pytest.mark.parametrize("how", ["max", "mean"])


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks in [0, 1], 1 for the largest."""
    return (rankdata(values) - 1) / (len(values) - 1)


def values(estimator: Estimator, c: Any, **options: Any) -> np.ndarray:
    return estimator.score(c.task, c.train, **({"target": Utility(c.valid)} | options)).values


class Steps(Estimator):
    """Scores with ties, from the labels, and an opinion of what the label should be."""

    needs_target = False

    @property
    def name(self) -> str:
        return "steps"

    def estimate(self, job: Job) -> Result:
        labels = job.samples.labels.numpy()
        return Result(np.minimum(labels, 1).astype(float), suggestions=2 - labels, notes={"seen": len(labels)})


# What the score is


@BOTH
def test_it_is_the_maximum_or_the_mean_of_the_scaled_ranks(how: Any) -> None:
    c, estimators = case("cnn"), (RAW, COSINE, Loss())
    got = Combined(estimators, how).score(c.task, c.train, target=Utility(c.valid))
    single = np.stack([ranks(values(each, c)) for each in estimators])
    assert relative(got.members, single) <= 1e-12
    assert relative(got.values, single.max(0) if how == "max" else single.mean(0)) <= 1e-12
    assert (got.units, got.members.min(), got.members.max()) == ("rank", 0, 1)


def test_the_maximum_finds_what_either_of_two_finds() -> None:
    c = case("mlp")
    got = Combined((RAW, COSINE)).score(c.task, c.train, target=Utility(c.valid))
    for each in (RAW, COSINE):
        assert got.values[np.argmax(values(each, c))] == 1


@BOTH
def test_ties_share_their_rank(how: Any) -> None:
    c = case("mlp")
    got = Combined((Steps(), Loss()), how).score(c.task, c.train)
    labels = np.minimum(c.train.labels.numpy(), 1)
    low = (labels == 0).sum()
    assert relative(got.members[0], np.where(labels == 0, (low - 1) / 2, (low + TRAIN - 1) / 2) / (TRAIN - 1)) <= 1e-12


def test_one_sample_alone_is_in_the_middle() -> None:
    c = case("mlp")
    assert values(Combined((RAW, COSINE)), c, samples=c.train.take([3])).tolist() == [0.5]


def test_ranks_are_among_what_is_scored() -> None:
    c, some = case("mlp"), case("mlp").train.take([3, 0, 7, 2])
    expected = np.maximum(*(ranks(values(each, c, samples=some)) for each in (RAW, COSINE)))
    assert relative(values(Combined((RAW, COSINE)), c, samples=some), expected) <= 1e-12


# Checkpoints, targets, an index


@BOTH
def test_scores_are_summed_over_checkpoints_before_they_are_ranked(how: Any) -> None:
    c = case("mlp")
    checkpoints = [Checkpoint.of(c.task.reset(seed).model, weight) for seed, weight in enumerate((0.3, 0.05, 1e-6))]
    single = np.stack([ranks(values(each, c, checkpoints=checkpoints)) for each in (RAW, COSINE)])
    got = Combined((RAW, COSINE), how).score(c.task, c.train, target=Utility(c.valid), checkpoints=checkpoints)
    assert relative(got.members, single) <= 1e-12
    assert relative(got.values, single.max(0) if how == "max" else single.mean(0)) <= 1e-12
    assert relative(values(Combined((RAW, COSINE), how), c, checkpoints=checkpoints[:2]), got.values) <= 1e-12  # a checkpoint of no weight is none


def test_one_call_of_every_estimator_serves_all_targets() -> None:
    class Counting(InnerProduct):
        def estimates(self, job: Job) -> list[Result]:
            calls.append(len(job.targets))
            return super().estimates(job)

    c, calls = case("mlp"), []
    estimator = Combined((Counting(), Counting(normalise="cosine"), Loss()))
    together = estimator.score(c.task, c.train, target={"a": Utility(c.valid), "b": Gap(c.valid)})
    assert calls == [2, 2]
    for got, target in zip(together, (Utility(c.valid), Gap(c.valid)), strict=True):
        assert relative(got.members, estimator.score(c.task, c.train, target=target).members) <= 1e-12


def test_it_needs_a_target_only_where_one_of_its_estimators_does() -> None:
    c, blind = case("mlp"), Combined((Loss(), GradNorm()))
    got = blind.score(c.task, c.train)
    assert not blind.needs_target and got.target == "" and np.array_equal(got.values, values(blind, c))
    with pytest.raises(ValueError, match="target: Combined needs a target"):
        Combined((Loss(), RAW)).score(c.task, c.train)


def test_an_index_gives_the_same(tmp_path: Path) -> None:
    c, estimator = case("cnn"), Combined((RAW, COSINE, SelfInfluence()))
    index = Store.build(c.task, c.train, tmp_path)
    assert relative(values(estimator, c, index=index), values(estimator, c)) <= 1e-12


def test_parts_of_every_estimator_are_kept_apart(tmp_path: Path) -> None:
    c, estimator = case("mlp"), Combined((RAW, COSINE, Loss()))
    first, again = (values(estimator, c, sweep=Sweep(directory=tmp_path)) for _ in range(2))
    assert np.array_equal(first, again) and len(list(tmp_path.iterdir())) == 3


def test_an_ensemble_may_be_made_of_it_and_it_of_ensembles() -> None:
    c = case("mlp")
    inner = Combined((RAW, COSINE))
    got = Ensemble(inner, members=3, std=0.1, perturbation="gaussian").score(c.task, c.train, target=Utility(c.valid))
    assert relative(got.members[0], values(inner, c)) <= 1e-12 and got.name == "ip-or-cosine-ensemble:utility"
    noisy = Ensemble(members=3, std=0.1, perturbation="gaussian")
    assert relative(values(Combined((noisy, Loss())), c), np.maximum(ranks(values(noisy, c)), ranks(values(Loss(), c)))) <= 1e-12


# Its name, and what it reports


def test_names_are_fit_for_files_and_say_what_all_share_once() -> None:
    assert Combined((RAW, COSINE)).name == "ip-or-cosine"
    assert Combined((RAW, Loss(), GradNorm()), "mean").name == "ip-and-loss-and-grad-norm"
    assert Combined((Loss(), RAW)).summary == "the largest of the ranks of loss, ip"


def test_raw_and_normalised_products_are_there_by_name() -> None:
    c = case("mlp")
    assert named()["ip-or-cosine"] == Combined((RAW, COSINE))
    got = rif.score(c.task, c.train, target=Utility(c.valid), estimator="ip-or-cosine")
    assert np.array_equal(got.values, values(Combined((RAW, COSINE)), c)) and got.estimator == "ip-or-cosine"


def test_notes_and_suggestions_of_the_estimators_are_passed_on() -> None:
    c, weak = case("mlp"), InnerProduct(ConjugateGradient(damping=1e-3, iterations=1, tolerance=1e-6))
    got = Combined((weak, Steps(), RAW)).score(c.task, c.train, target=Utility(c.valid))
    assert [each["name"] for each in got.provenance["combined"]] == ["cg", "steps", "ip"]
    assert got.provenance["combined"][1]["seen"] == TRAIN and got.provenance["converged"] is False
    assert got.suggestions.tolist() == (2 - c.train.labels).tolist()
    assert "converged" not in Combined((Steps(), RAW)).score(c.task, c.train, target=Utility(c.valid)).provenance


# Bad input


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Combined((RAW,)), ValueError, "estimators: expected at least 2, got 1"),
        (lambda: Combined((RAW, Loss(), InnerProduct())), ValueError, r"estimators: expected different ones, InnerProduct\(.*\) is there twice"),
        (lambda: Combined((RAW, "loss")), TypeError, "estimators: expected some such as"),  # type: ignore[arg-type]
        (lambda: Combined(RAW), TypeError, "estimators: expected some such as"),  # type: ignore[arg-type]
        (lambda: Combined((RAW, Loss()), "median"), ValueError, "how: expected 'max' or 'mean', got 'median'"),  # type: ignore[arg-type]
    ],
)
def test_a_setting_out_of_range_is_refused(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_a_list_of_estimators_will_do() -> None:
    assert Combined([RAW, COSINE]) == Combined((RAW, COSINE))  # type: ignore[arg-type]


def test_every_estimator_checks_the_task_before_any_work() -> None:
    class Picky(Steps):
        def check(self, task: Task) -> None:
            raise ValueError("task: not for me")

        def estimate(self, job: Job) -> Result:
            pytest.fail("worked")

    c = case("mlp")
    with pytest.raises(ValueError, match="task: not for me"):
        Combined((Steps(), Picky())).score(c.task, c.train)


def test_values_that_have_no_rank_name_their_estimator_and_samples() -> None:
    c = case("logistic")
    task = Task(c.task.model, lambda outputs, batch: outputs.sum(1) / (batch[1] != 2))
    with pytest.raises(ValueError, match=r"scores: loss gave values that are not finite for \d+ of 13 samples, ids \["):
        values(Combined((Steps(), Loss())), replace(c, task=task))
