"""estimators/ensemble.py: members of every kind, and how their scores are put together."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import rankdata

from cases import TRAIN, Gap, case, relative
from robust_if import Checkpoint, Ensemble, Estimator, InnerProduct, Loss, Sweep, Utility
from robust_if.estimators.base import Job, Result
from robust_if.estimators.ensemble import masked
from robust_if.estimators.less import LESS
from robust_if.store import Store

NOISY = {"perturbation": "gaussian", "std": 0.3}
THINNED = {"perturbation": "dropout", "rate": 0.5}
EVERY_KIND = pytest.mark.parametrize("kind", [NOISY, THINNED, "states"], ids=["gaussian", "dropout", "states"])


def ensemble(kind: Any, members: int = 4, **options: Any) -> Ensemble:
    if kind == "states":
        return Ensemble(members=tuple(Checkpoint.of(case("mlp").task.reset(m).model, 0.1) for m in range(members)), **options)
    return Ensemble(members=members, **kind, **options)


def test_the_default_is_the_published_ensemble() -> None:
    got = Ensemble()
    assert got.name == "ip-ensemble" and got.base == InnerProduct() and got.aggregate == "mean"
    assert (got.members, got.perturbation, got.rate, got.std) == (5, "auto", 0.01, 0.01)
    c = case("mlp")
    scores = got.score(c.task, c.train, target=Utility(c.valid))
    assert scores.members.shape == (5, TRAIN) and scores.provenance["members"] == 5


def test_independent_models_and_checkpoints_count_the_same_whatever_their_weights() -> None:
    c = case("mlp")
    tasks = [c.task.reset(m) for m in range(3)]
    states = [Checkpoint.of(task.model, weight) for task, weight in zip(tasks, (1.0, 0.1, 7.0), strict=True)]
    singles = np.stack([InnerProduct().score(task, c.train, target=Utility(c.valid)).values for task in tasks])
    got = Ensemble(members=states).score(c.task, c.train, target=Utility(c.valid))
    assert relative(got.members, singles) <= 1e-12 and relative(got.values, singles.mean(0)) <= 1e-12
    assert relative(got.spread(), singles.std(0, ddof=1)) <= 1e-10


@EVERY_KIND
@pytest.mark.parametrize("aggregate", ["mean", "rank", "vote"])
def test_several_targets_share_their_members(kind: Any, aggregate: Any, tmp_path: Any) -> None:
    c, estimator = case("mlp"), ensemble(kind, aggregate=aggregate)
    targets = {"a": Utility(c.valid), "b": Gap(c.valid)}
    got = estimator.score(c.task, c.train, target=targets, sweep=Sweep(directory=tmp_path))
    again = estimator.score(c.task, c.train, target=targets, sweep=Sweep(directory=tmp_path))
    assert [each.target for each in got] == ["a", "b"]
    for one, other, target in zip(got, again, targets.values(), strict=True):
        alone = estimator.score(c.task, c.train, target=target)
        assert relative(one.values, alone.values) <= 1e-12 and relative(one.members, alone.members) <= 1e-12
        assert np.array_equal(one.values, other.values)


def test_one_pass_over_the_samples_per_member_serves_all_targets() -> None:
    class Counting(InnerProduct):
        def estimates(self, job: Job) -> list[Result]:
            calls.append(len(job.targets))
            return super().estimates(job)

    c, calls = case("mlp"), []
    Ensemble(Counting(), members=3).score(c.task, c.train, target={"a": Utility(c.valid), "b": Gap(c.valid)})
    assert calls == [2, 2, 2]


# Ranks and votes


def raw(kind: Any, **options: Any) -> np.ndarray:
    c = case("mlp")
    return ensemble(kind, **options).score(c.task, c.train, target=Utility(c.valid)).members


@EVERY_KIND
def test_ranks_are_scaled_and_averaged(kind: Any) -> None:
    c, members = case("mlp"), raw(kind)
    got = ensemble(kind, aggregate="rank").score(c.task, c.train, target=Utility(c.valid))
    expected = (np.stack([rankdata(row) for row in members]) - 1) / (TRAIN - 1)
    assert relative(got.members, expected) <= 1e-12 and relative(got.values, expected.mean(0)) <= 1e-12
    assert (got.units, got.name) == ("rank", "ip-ensemble-rank:utility")
    assert got.members.min() == 0 and got.members.max() == 1


@EVERY_KIND
@pytest.mark.parametrize(("top", "count"), [(0.3, 4), (0.01, 1), (0.9, 12)])
def test_votes_are_shares_of_members_and_ranks_only_break_ties(kind: Any, top: float, count: int) -> None:
    c, members = case("mlp"), raw(kind)
    got = ensemble(kind, aggregate="vote", top=top).score(c.task, c.train, target=Utility(c.valid))
    votes = sum(np.isin(np.arange(TRAIN), np.argsort(-row)[:count]) for row in members)
    ranks = np.stack([rankdata(row) for row in members]).mean(0)
    assert np.abs(got.values - votes / len(members)).max() < 1e-3 / len(members)
    assert got.order().tolist() == np.lexsort((-ranks, -votes)).tolist()
    assert relative(got.members.mean(0), got.values) <= 1e-14
    assert got.units == "rank"


class Steps(Estimator):
    """Scores with ties: the sample's label."""

    needs_target = False

    @property
    def name(self) -> str:
        return "steps"

    def estimate(self, job: Job) -> Result:
        return Result(np.minimum(job.samples.labels.numpy(), 1).astype(float), suggestions=1 - job.samples.labels.numpy(), notes={"same": 1})


@pytest.mark.parametrize("aggregate", ["rank", "vote"])
def test_samples_that_tie_stay_equal(aggregate: Any) -> None:
    c = case("mlp")
    got = Ensemble(Steps(), members=3, aggregate=aggregate).score(c.task, c.train)
    above = np.minimum(c.train.labels.numpy(), 1) == 1
    assert np.ptp(got.values[above]) == 0 and np.ptp(got.values[~above]) == 0 and got.values[above][0] > got.values[~above][0]
    if aggregate == "vote":
        assert np.round(got.values, 3).tolist() == above.astype(float).tolist()


def test_suggestions_and_notes_of_the_members_are_kept() -> None:
    c = case("mlp")
    got = Ensemble(Steps(), members=3).score(c.task, c.train)
    assert got.suggestions.tolist() == (1 - c.train.labels.numpy()).tolist()
    assert got.provenance["same"] == 1 and got.provenance["members"] == 3


@pytest.mark.parametrize("aggregate", ["rank", "vote"])
def test_a_single_sample_is_in_the_middle_of_itself(aggregate: Any) -> None:
    c = case("mlp")
    got = Ensemble(members=2, aggregate=aggregate).score(c.task, c.train.take([3]), target=Utility(c.valid))
    assert got.values == pytest.approx(0.5 if aggregate == "rank" else 1, abs=1e-3)


def test_rank_of_one_member_orders_as_its_base() -> None:
    c = case("cnn")
    base = InnerProduct().score(c.task, c.train, target=Utility(c.valid))
    for aggregate in ("rank", "vote"):
        got = Ensemble(members=1, aggregate=aggregate).score(c.task, c.train, target=Utility(c.valid))  # type: ignore[arg-type]
        assert got.order().tolist() == base.order().tolist()


# Attention


def test_masks_that_do_not_reach_an_attention_are_said_once(caplog: pytest.LogCaptureFixture) -> None:
    c = case("encoder")
    with caplog.at_level(logging.WARNING, logger="robust_if.estimators.ensemble"):
        got = Ensemble(members=3, **THINNED).score(c.task, c.train, target=Utility(c.valid))
    assert [record.message for record in caplog.records if record.name == "robust_if.estimators.ensemble"] == [
        "ip-ensemble: the masks do not reach layer.self_attn.out_proj, whose weights their attention uses by itself"
    ]
    assert len({tuple(member) for member in got.members}) == 3
    caplog.clear()
    Ensemble(members=3, perturbation="gaussian").score(c.task, c.train, target=Utility(c.valid))
    assert "masks" not in caplog.text


def test_masks_sit_at_every_layer_after_the_first() -> None:
    def hooked(name: str) -> list[str]:
        model = masked(case(name).task, 0.5, torch.Generator()).model
        return [key for key, module in model.named_modules() if module._forward_pre_hooks]

    assert hooked("encoder") == ["layer.linear2", "out"]
    assert hooked("mlp") == ["3", "5"]


# Bad input


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Ensemble(members=()), ValueError, "members: expected at least 1, got 0"),
        (lambda: Ensemble(members=(1, 2)), TypeError, r"members: expected a number, or checkpoints such as Checkpoint.of\(model\), got \(1, 2\)"),
        (lambda: Ensemble(members=2.5), TypeError, "members: expected a number, or checkpoints"),
        (lambda: Ensemble(std=-1.0), ValueError, "std: expected at least 0, got -1.0"),
        (lambda: Ensemble(aggregate="median"), ValueError, "aggregate: expected 'mean', 'rank' or 'vote', got 'median'"),
        (lambda: Ensemble(aggregate="vote", top=1.0), ValueError, "top: expected a share between 0 and 1, got 1.0"),
    ],
)
def test_a_setting_out_of_range_is_refused(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_stored_gradients_cannot_serve_perturbed_members() -> None:
    c = case("mlp")
    job = Job(c.task, c.train, c.train, (Utility(c.valid),), Sweep(), "ip-ensemble", index=object.__new__(Store))
    for estimator in (Ensemble(), ensemble("states", 2)):
        with pytest.raises(ValueError, match="index: it holds the gradients of one model, which cannot serve the members of an ensemble"):
            estimator.estimates(job)


def test_checkpoints_of_states_are_refused() -> None:
    c = case("mlp")
    with pytest.raises(ValueError, match="checkpoints: the members of this ensemble are states of their own"):
        ensemble("states", 2).score(c.task, c.train, target=Utility(c.valid), checkpoints=[Checkpoint.of(c.task.model)])


def test_members_hand_their_checkpoint_to_the_base() -> None:
    c = case("mlp")
    with pytest.raises(ValueError, match="checkpoints: LESS needs checkpoints that hold Adam's moments"):
        Ensemble(LESS(), members=[Checkpoint.of(c.task.model)]).score(c.task, c.train, target=Utility(c.valid))


def test_ranks_over_checkpoints_are_the_weighted_sum() -> None:
    c = case("mlp")
    tasks = [c.task, c.task.reset(5)]
    states = [Checkpoint.of(task.model, weight) for task, weight in zip(tasks, (0.3, 0.05), strict=True)]
    estimator = Ensemble(Loss(), members=3, aggregate="rank", **THINNED)  # type: ignore[arg-type]
    singles = [estimator.score(replace(c, task=task).task, c.train).values for task in tasks]
    got = estimator.score(c.task, c.train, checkpoints=states)
    assert relative(got.values, 0.3 * singles[0] + 0.05 * singles[1]) <= 1e-12
