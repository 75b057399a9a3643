"""sweep.py: the one loop over the data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cases import SHORT, TRAIN, Gap, case
from robust_if import Ensemble, FlatMinima, InnerProduct, Loss, Samples, Sweep, Task, TunedLoss, Utility
from robust_if.estimators import ValidationLoss
from robust_if.sweep import fingerprint
from robust_if.training import Recipe

LIKE = torch.zeros(1, dtype=torch.float64)
NUMBERS = Samples((torch.arange(20.0, dtype=torch.float64),))


class Counted:
    """Doubles a batch and remembers the samples it saw; batches above ``room`` run out of memory."""

    def __init__(self, room: int = 100) -> None:
        self.room, self.seen, self.sizes = room, [], []  # type: ignore[var-annotated]

    def __call__(self, batch: tuple[Tensor]) -> Tensor:
        if len(batch[0]) > self.room:
            raise torch.OutOfMemoryError("out of memory")
        self.seen += batch[0].int().tolist()
        self.sizes.append(len(batch[0]))
        return 2 * batch[0]


def interrupt_after(parts: int) -> Any:
    def progress(items: Iterable[Any], _: str) -> Iterator[Any]:
        for position, item in enumerate(items):
            if position == parts:
                raise KeyboardInterrupt
            yield item

    return progress


def test_values_are_in_the_order_of_the_samples() -> None:
    got = Sweep(batch_size=3, rows_per_part=7).map(Counted(), NUMBERS, LIKE, name="double")
    assert torch.equal(got, 2 * torch.arange(20.0, dtype=torch.float64))


def test_interrupted_parts_resume_without_being_computed_again(tmp_path: Path) -> None:
    first, second, third = Counted(), Counted(), Counted()
    sweep = Sweep(batch_size=3, rows_per_part=6, directory=tmp_path)
    with pytest.raises(KeyboardInterrupt):
        replace(sweep, progress=interrupt_after(2)).map(first, NUMBERS, LIKE, name="double", fingerprint="a")
    assert first.seen == list(range(12))
    expected = 2 * torch.arange(20.0, dtype=torch.float64)
    assert torch.equal(sweep.map(second, NUMBERS, LIKE, name="double", fingerprint="a"), expected)
    assert second.seen == list(range(12, 20))
    assert torch.equal(sweep.map(third, NUMBERS, LIKE, name="double", fingerprint="a"), expected)
    assert third.seen == []


def test_parts_of_another_computation_are_refused(tmp_path: Path) -> None:
    sweep = Sweep(directory=tmp_path)
    sweep.map(Counted(), NUMBERS, LIKE, name="double", fingerprint="a")
    with pytest.raises(ValueError, match="holds parts of another computation"):
        sweep.map(Counted(), NUMBERS, LIKE, name="double", fingerprint="b")


def test_nothing_is_written_without_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Sweep().map(Counted(), NUMBERS, LIKE, name="double")
    assert list(tmp_path.iterdir()) == []


def test_batches_halve_where_memory_runs_out_and_the_log_says_so(caplog: pytest.LogCaptureFixture) -> None:
    function = Counted(room=3)
    got = Sweep(batch_size=8).map(function, NUMBERS, LIKE, name="double")
    assert torch.equal(got, 2 * torch.arange(20.0, dtype=torch.float64))
    assert function.seen == list(range(20)) and set(function.sizes) == {2}
    assert [record.message for record in caplog.records] == [f"out of memory: going on with batches of {size}" for size in (4, 2)]


def test_a_single_sample_that_does_not_fit_is_an_error() -> None:
    with pytest.raises(torch.OutOfMemoryError):
        Sweep(batch_size=8).map(Counted(room=0), NUMBERS, LIKE, name="double")


def test_a_batch_size_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="batch_size: expected at least 1, got 0"):
        Sweep(batch_size=0)


def test_scores_resume_after_an_interruption(tmp_path: Path) -> None:
    c = case("mlp")
    target = Utility(c.valid)
    sweep = Sweep(batch_size=2, rows_per_part=4, directory=tmp_path)
    calls: list[int] = []

    def loss(outputs: Tensor, batch: Any) -> Tensor:
        calls.append(len(batch[0]))
        return torch.nn.functional.cross_entropy(outputs, batch[1], reduction="none")

    task = Task(c.task.model, loss)
    with pytest.raises(KeyboardInterrupt):
        InnerProduct().score(task, c.train, target=target, sweep=replace(sweep, progress=interrupt_after(2)))
    calls.clear()
    got = InnerProduct().score(task, c.train, target=target, sweep=sweep)
    assert sum(calls) - len(c.valid) == TRAIN - 8
    assert np.allclose(got.values, InnerProduct().score(c.task, c.train, target=target).values, rtol=1e-12)


CHANGES = {
    "model": lambda c: {"task": c.task.reset(1)},
    "parameters": lambda c: {"task": Task(c.task.model, parameters="5.*")},
    "data": lambda c: {"train": c.train.with_labels(1 - c.train.labels.clamp(max=1))},
    "ids": lambda c: {"train": Samples(c.train.tensors, np.arange(TRAIN) + 1)},
    "held-out data": lambda c: {"valid": c.valid.take([0, 1, 2])},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("estimator", [InnerProduct(), InnerProduct(normalise="cosine"), FlatMinima(SHORT, damping=1e-2)], ids=lambda one: one.name)
def test_parts_are_refused_where_anything_that_makes_the_score_differs(estimator: Any, change: Any, tmp_path: Path) -> None:
    c = case("mlp")
    sweep = Sweep(directory=tmp_path)
    estimator.score(c.task, c.train, target=Utility(c.valid), sweep=sweep)
    estimator.score(c.task, c.train, target=Utility(c.valid), sweep=sweep)
    other = replace(c, **change(c))
    with pytest.raises(ValueError, match="holds parts of another computation"):
        estimator.score(other.task, other.train, target=Utility(other.valid), sweep=sweep)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (FlatMinima(SHORT), FlatMinima(replace(SHORT, seed=1))),
        (TunedLoss(SHORT), TunedLoss(replace(SHORT, steps=2))),
        (ValidationLoss(Recipe(epochs=1)), ValidationLoss(Recipe(epochs=2))),
        (Ensemble(members=2, perturbation="dropout", rate=0.5), Ensemble(members=2, perturbation="dropout", rate=0.5, seed=1)),
        (Ensemble(Loss(), members=2, perturbation="dropout", rate=0.5), Ensemble(Loss(), members=2, perturbation="dropout", rate=0.4)),
    ],
    ids=["tuning", "steps", "recipe", "seed", "rate"],
)
def test_parts_of_an_estimator_with_other_settings_are_refused(one: Any, other: Any, tmp_path: Path) -> None:
    c = case("mlp")
    sweep = Sweep(directory=tmp_path)
    one.score(c.task, c.train, target=Utility(c.valid), sweep=sweep)
    with pytest.raises(ValueError, match="holds parts of another computation"):
        other.score(c.task, c.train, target=Utility(c.valid), sweep=sweep)


def test_the_training_data_count_where_other_samples_are_scored(tmp_path: Path) -> None:
    c = case("mlp")
    sweep, estimator = Sweep(directory=tmp_path), FlatMinima(SHORT, fisher="train")
    estimator.score(c.task, c.train, target=Utility(c.valid), samples=c.valid, sweep=sweep)
    with pytest.raises(ValueError, match="holds parts of another computation"):
        estimator.score(c.task, c.train.take([0, 1, 2]), target=Utility(c.valid), samples=c.valid, sweep=sweep)


@pytest.mark.parametrize("what", ["candidates", "pairs"])
def test_tables_of_labels_and_pairs_are_refused_for_another_model(what: str, tmp_path: Path) -> None:
    c, estimator, sweep = case("mlp"), FlatMinima(SHORT), Sweep(directory=tmp_path)
    options = {"target": Utility(c.valid), "sweep": sweep} | ({"queries": c.valid} if what == "pairs" else {})
    first = getattr(estimator, what)(c.task, c.train, **options)
    assert np.array_equal(getattr(estimator, what)(c.task, c.train, **options), first)
    with pytest.raises(ValueError, match="holds parts of another computation"):
        getattr(estimator, what)(c.task.reset(1), c.train, **options)


def test_targets_checkpoints_and_members_keep_their_parts_apart(tmp_path: Path) -> None:
    from robust_if import Checkpoint

    c = case("cnn")
    checkpoints = [Checkpoint.of(task.model) for task in (c.task, c.task)]
    for target in (Utility(c.valid), Gap(c.valid), 2 * Gap(c.valid)):
        for estimator in (InnerProduct(), Ensemble(members=2)):
            for kept in ([], checkpoints):
                expected = estimator.score(c.task, c.train, target=target, checkpoints=kept)
                got = estimator.score(c.task, c.train, target=target, checkpoints=kept, sweep=Sweep(directory=tmp_path))
                assert np.array_equal(got.values, expected.values)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.int64, torch.bool, torch.uint8])
def test_fingerprints_differ_where_a_value_a_type_or_a_shape_does(dtype: torch.dtype) -> None:
    value = torch.tensor([[1, 0], [0, 1]]).to(dtype)
    marks = {fingerprint({"a": one}, NUMBERS) for one in (value, 1 - value.int(), value.flatten(), value[0, 0])}
    assert len(marks) == 4
    assert fingerprint({"a": value}, NUMBERS, 1) == fingerprint({"a": value.clone()}, NUMBERS, 1) != fingerprint({"a": value}, NUMBERS, 2)
