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
from robust_if.gradients import directional
from robust_if.sweep import fingerprint, rank_agreement
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


WRONG = [
    ({"batch_size": 0}, "batch_size: expected at least 1, got 0"),
    ({"batch_size": 2.5}, "batch_size: expected a whole number, got 2.5"),
    ({"rows_per_part": 0}, "rows_per_part: expected at least 1, got 0"),
    ({"engine": "spark"}, "engine: expected 'local' or 'ray', got 'spark'"),
    ({"workers": 2}, "workers: engine 'local' is this process alone"),
    ({"engine": "local", "workers": 0}, "workers: expected at least 1, got 0"),
    ({"precision": "fp8"}, "precision: expected 'full' or 'bf16', got 'fp8'"),
    ({"max_memory": "much"}, "max_memory: expected bytes, or text"),
    ({"progress": True}, "progress: expected a function of an iterable and a description, got bool"),
    ({"directory": __file__}, "directory: .* is a file; expected a folder"),
]


@pytest.mark.parametrize(("options", "message"), WRONG, ids=lambda one: next(iter(one)) if isinstance(one, dict) else "")
def test_what_is_out_of_range_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sweep(**options)


@pytest.mark.parametrize("function", [lambda batch: batch[0].sum(), lambda batch: batch[0][1:]], ids=["a mean", "too few"])
def test_a_function_without_one_value_per_sample_is_refused(function: Any) -> None:
    with pytest.raises(ValueError, match=r"function: expected one value per sample, shape \(20, …\), got shape"):
        Sweep().map(function, NUMBERS, LIKE, name="wrong")


def test_a_function_whose_values_change_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"function: expected values of one shape, got \(4, 1\) for the 4 samples from 16"):
        Sweep(rows_per_part=16).map(lambda batch: batch[0][:, None].repeat(1, 1 + (len(batch[0]) > 4)), NUMBERS, LIKE, name="wrong")


SINGLE = torch.zeros(1)


def _network(n: int = 300) -> tuple[Task, Samples, dict[str, Tensor]]:
    model = torch.nn.Sequential(torch.nn.Linear(6, 30), torch.nn.Tanh(), torch.nn.Linear(30, 3)).eval()
    task = Task(model)
    direction = {name: torch.randn_like(value) for name, value in task.params().items()}
    return task, Samples((torch.randn(n, 6), torch.randint(3, (n,)))), direction


def test_bfloat16_is_close_and_its_agreement_is_told(caplog: pytest.LogCaptureFixture) -> None:
    task, samples, direction = _network()
    before = {name: (value.dtype, value.clone()) for name, value in task.model.state_dict().items()}
    seen: list[tuple[int, bool]] = []

    def products(batch: Any) -> Tensor:
        seen.append((len(batch[0]), torch.is_autocast_enabled("cpu")))
        return directional(task, task.params(), batch, direction)

    notes: dict[str, Any] = {}
    with caplog.at_level("INFO"):
        low = Sweep(batch_size=280, precision="bf16").map(products, samples, SINGLE, name="products", notes=notes)
    assert seen == [(256, False), (256, True), (280, True), (20, True)]
    full = Sweep().map(products, samples, SINGLE, name="products", notes=notes)
    assert not torch.equal(low, full)
    assert (low - full).norm() < 0.1 * full.norm()
    assert set(notes) == {"bf16_agreement"} and 0.99 < notes["bf16_agreement"] < 1
    assert f"Spearman correlation of {notes['bf16_agreement']:.4f}" in caplog.text and not [r for r in caplog.records if r.levelname == "WARNING"]
    assert not torch.is_autocast_enabled("cpu")
    assert all(value.dtype == before[name][0] and torch.equal(value, before[name][1]) for name, value in task.model.state_dict().items())


def test_a_ranking_that_bfloat16_changes_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    x = torch.stack([torch.full((50,), 1000.0), torch.arange(50.0) / 8], 1)[torch.randperm(50)]
    notes: dict[str, Any] = {}
    got = Sweep(precision="bf16").map(lambda batch: (batch[0] @ torch.ones(2, 1))[:, 0], Samples((x,)), SINGLE, name="sums", notes=notes)
    assert notes["bf16_agreement"] < 0.99 and got.unique().numel() < 50
    assert "bfloat16 ranks the first 50 samples differently from full precision" in caplog.text


def test_bfloat16_of_a_float64_model_is_refused_and_so_are_parts_of_another_precision(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="precision: 'bf16' is for float32 models"):
        Sweep(precision="bf16").map(Counted(), NUMBERS, LIKE, name="double")
    samples = Samples((torch.arange(20.0),))
    Sweep(directory=tmp_path).map(Counted(), samples, SINGLE, name="double")
    with pytest.raises(ValueError, match=r"holds parts of another computation \(precision full there, bf16 here\)"):
        Sweep(directory=tmp_path, precision="bf16").map(Counted(), samples, SINGLE, name="double")


def test_what_fails_under_autocast_says_so() -> None:
    def fails(batch: tuple[Tensor]) -> Tensor:  # a product in bfloat16 is added to a float32 tensor in place
        return torch.zeros(20).index_add(0, torch.arange(20), torch.eye(20) @ batch[0])

    Sweep().map(fails, Samples((torch.arange(20.0),)), SINGLE, name="fails")
    with pytest.raises(RuntimeError, match=r"precision: this computation fails under torch.autocast \(.*\); use precision='full'"):
        Sweep(precision="bf16").map(fails, Samples((torch.arange(20.0),)), SINGLE, name="fails")


def test_agreement_is_that_of_the_worst_column() -> None:
    x = torch.arange(5.0)
    assert rank_agreement(torch.stack([x, x], 1), torch.stack([x, x], 1)) == pytest.approx(1)
    assert rank_agreement(torch.stack([x, x], 1), torch.stack([x, -x], 1)) == pytest.approx(-1)
    assert rank_agreement(x, torch.zeros(5)) == 0
    assert rank_agreement(torch.ones(5), torch.zeros(5)) == 1


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
    assert sum(calls) - len(c.valid) - 8 == TRAIN - 8  # four samples for the memory plan, and four to see whether forward mode works
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


def test_the_middle_of_a_large_tensor_in_a_setting_counts() -> None:
    one, other = torch.zeros(5000), torch.zeros(5000)
    other[2500] = 1
    assert repr(one) == repr(other)
    marks = {fingerprint({}, NUMBERS, setting) for setting in (one, other, (one,), (other,), [one, other])}
    assert len(marks) == 5 and fingerprint({}, NUMBERS, (one,)) == fingerprint({}, NUMBERS, (one.clone(),))
