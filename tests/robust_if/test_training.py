"""training.py: the reference recipe."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cases import CLASSES, TRAIN, blobs, case, relative
from oracles import sample_gradients
from robust_if import Checkpoint, InnerProduct, Recipe, Samples, Task, Utility, train
from robust_if.sweep import silent
from robust_if.training import Progress
from unchanged import untouched

SGD = Recipe(epochs=6, lr=0.05, batch_size=4, keep=3)
RECIPES = {
    "sgd": SGD,
    "sgd without momentum": replace(SGD, momentum=0.0),
    "adamw": replace(SGD, optimizer="adamw", lr=0.01),
    "step": replace(SGD, schedule="step"),
    "constant": replace(SGD, schedule="constant"),
}
EVERY = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)


def dropout_net() -> Task:
    """Batch normalisation and dropout: what a resumed run can get wrong."""
    torch.manual_seed(1)
    return Task(nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, CLASSES)).eval())


def same(one: list[Checkpoint], other: list[Checkpoint]) -> bool:
    return len(one) == len(other) and all(
        a.weight == b.weight
        and a.tensors().keys() == b.tensors().keys()
        and all(torch.equal(value, b.tensors()[key]) for key, value in a.tensors().items())
        for a, b in zip(one, other, strict=True)
    )


def interrupt_after(epochs: int) -> Progress:
    def progress(items: Iterable[Any], _: str) -> Iterator[Any]:
        for position, item in enumerate(items):
            if position == epochs:
                raise KeyboardInterrupt
            yield item

    return progress


@EVERY
def test_weights_of_zero_equal_leaving_the_samples_out(recipe: Recipe) -> None:
    task, data = dropout_net(), case("mlp").train
    kept = np.array([0, 2, 3, 5, 6, 7, 8, 11])
    weights = np.isin(np.arange(TRAIN), kept).astype(float)
    assert same(train(task, data, recipe, weights=weights), train(task, data.take(kept), recipe))
    assert not same(train(task, data, recipe, weights=weights), train(task, data, recipe))


@EVERY
@pytest.mark.parametrize("epochs", [1, 3, 5])
def test_an_interrupted_run_resumes_and_ends_bit_identically(recipe: Recipe, epochs: int, tmp_path: Path) -> None:
    task, data = dropout_net(), case("mlp").train
    weights = np.linspace(0, 2, TRAIN)
    with pytest.raises(KeyboardInterrupt):
        train(task, data, recipe, weights=weights, directory=tmp_path, progress=interrupt_after(epochs))
    torch.rand(7)  # the random state of the second call is another one
    left: list[int] = []
    got = train(task, data, recipe, weights=weights, directory=tmp_path, progress=lambda items, _: left.extend(items) or left)  # type: ignore[func-returns-value]
    assert left == list(range(epochs, recipe.epochs))
    assert same(got, train(task, data, recipe, weights=weights))


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    task, data = dropout_net(), case("mlp").train
    first = train(task, data, SGD, directory=tmp_path)
    assert same(train(task, data, SGD, directory=tmp_path, progress=lambda items, _: pytest.fail("trained again") if list(items) else items), first)


def test_early_stopping_is_remembered(tmp_path: Path) -> None:
    data, _ = blobs(60, seed=0, distance=8)
    task = Task(nn.Linear(2, 2).double().eval())
    recipe = replace(SGD, epochs=50, accuracy=0.95, keep=1)
    done: list[int] = []

    def progress(items: Iterable[Any], _: str) -> Iterator[Any]:
        for item in items:
            done.append(item)
            yield item

    first = train(task, data, recipe, directory=tmp_path, progress=progress)
    assert 1 <= len(done) < 50 and len(first) == 1
    assert same(train(task, data, recipe, directory=tmp_path, progress=progress), first)
    trained = task.at(first[-1].state)
    assert (trained.outputs(trained.params(), data.batch(slice(None))).argmax(1) == data.labels).double().mean() >= 0.9


def test_seeds_reproduce_and_differ() -> None:
    task, data = dropout_net(), case("mlp").train
    runs = []
    for seed in (0, 0, 1):
        torch.rand(3)
        runs.append(train(task, data, replace(SGD, seed=seed)))
    assert same(runs[0], runs[1]) and not same(runs[0], runs[2])


OTHER_RUNS: dict[str, Any] = {
    "recipe": lambda task, data: (task, data, replace(SGD, lr=0.01), None),
    "seed": lambda task, data: (task, data, replace(SGD, seed=1), None),
    "data": lambda task, data: (task, data.take(range(12)), SGD, None),
    "labels": lambda task, data: (task, data.with_labels(np.zeros(TRAIN)), SGD, None),
    "weights": lambda task, data: (task, data, SGD, np.linspace(0.5, 1, TRAIN)),
    "model": lambda task, data: (task.reset(4), data, SGD, None),
    "parameters": lambda task, data: (replace(task, parameters="4.*"), data, SGD, None),
}


@pytest.mark.parametrize("change", OTHER_RUNS.values(), ids=OTHER_RUNS)
def test_the_directory_of_another_run_is_refused(change: Any, tmp_path: Path) -> None:
    task, data = dropout_net(), case("mlp").train
    train(task, data, SGD, directory=tmp_path)
    other, samples, recipe, weights = change(task, data)
    with pytest.raises(ValueError, match="belongs to another training run"):
        train(other, samples, recipe, weights=weights, directory=tmp_path)


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [("constant", [0.4] * 4), ("step", [0.4, 0.4, 0.04, 0.004]), ("cosine", [0.2 * (1 + np.cos(np.pi * epoch / 4)) for epoch in range(4)])],
)
def test_a_checkpoint_of_every_epoch_weighs_its_learning_rate(schedule: Any, rates: list[float]) -> None:
    c = case("logistic")
    kept = train(c.task, c.train, Recipe(epochs=4, lr=0.4, keep=4, schedule=schedule))
    assert [checkpoint.weight for checkpoint in kept] == pytest.approx(rates)
    assert len({checkpoint.state["1.weight"].sum().item() for checkpoint in kept}) == 4


@pytest.mark.parametrize("schedule", ["constant", "step", "cosine"])
@pytest.mark.parametrize("keep", [1, 2, 3, 5, 7, 12])
def test_the_weights_share_the_learning_rates_of_all_epochs_among_the_checkpoints(schedule: Any, keep: int) -> None:
    recipe, c = Recipe(epochs=7, lr=0.3, keep=keep, schedule=schedule), case("logistic")
    kept = sorted(recipe.kept() - {-1})
    weights = [checkpoint.weight for checkpoint in train(c.task, c.train, recipe)]
    parts = np.split([recipe.rate(epoch) for epoch in range(7)], [epoch + 1 for epoch in kept[:-1]])
    assert weights == pytest.approx([part.sum() for part in parts], rel=1e-12)
    if schedule == "constant" and keep == 1:
        assert weights == pytest.approx([7 * 0.3])


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_after_an_early_stop_the_weights_share_the_epochs_that_were_trained(keep: int) -> None:
    data, _ = blobs(60, seed=0, distance=4)
    recipe = Recipe(epochs=12, lr=0.03, batch_size=64, accuracy=0.8, keep=keep)
    done: list[int] = []
    kept = train(Task(nn.Linear(2, 2).double().eval()), data, recipe, progress=lambda items, _: (done.append(item) or item for item in items))
    assert len(done) not in (1, 12) and done[-1] not in recipe.kept()
    assert sum(checkpoint.weight for checkpoint in kept) == pytest.approx(sum(recipe.rate(epoch) for epoch in done), rel=1e-12)


def test_tracin_over_a_constant_rate_does_not_depend_on_how_often_equal_checkpoints_are_kept() -> None:
    c = case("logistic")
    recipe = Recipe(epochs=6, lr=1e-9, schedule="constant", momentum=0.0, weight_decay=0.0)
    few, many = (
        InnerProduct().score(c.task, c.train, target=Utility(c.valid), checkpoints=train(c.task, c.train, replace(recipe, keep=keep))).values
        for keep in (2, 6)
    )
    assert relative(few, many) <= 1e-6


def test_adam_checkpoints_hold_the_moments_of_the_optimiser() -> None:
    c = case("logistic")
    recipe = Recipe(epochs=1, lr=0.1, optimizer="adamw", batch_size=100, weight_decay=0.0)
    (kept,) = train(c.task, c.train, recipe)
    assert kept.moments is not None and kept.moments.steps == 1
    grads = {name: value.mean(0) for name, value in sample_gradients(c.task, c.train).items()}
    assert kept.moments.first.keys() == grads.keys()
    for name, grad in grads.items():
        assert torch.allclose(kept.moments.first[name], 0.1 * grad, rtol=1e-10, atol=1e-15)
        assert torch.allclose(kept.moments.second[name], 1e-3 * grad**2, rtol=1e-10, atol=1e-18)
    assert train(c.task, c.train, replace(recipe, optimizer="sgd"))[0].moments is None


def test_moments_are_copies_of_their_epoch_and_only_of_the_trained_parameters() -> None:
    c = case("mlp")
    task = Task(c.task.model, parameters="5.*")
    first, last = train(task, c.train, replace(SGD, optimizer="adamw", keep=2))
    assert first.moments is not None and last.moments is not None
    assert set(first.moments.first) == {"5.weight", "5.bias"}
    assert last.moments.steps == 2 * first.moments.steps
    assert not torch.equal(first.moments.second["5.bias"], last.moments.second["5.bias"])


def test_the_last_of_the_kept_checkpoints_is_the_end_of_the_run() -> None:
    c = case("logistic")
    recipe = Recipe(epochs=7, keep=2)
    assert sorted(recipe.kept()) == [3, 6]
    assert torch.equal(train(c.task, c.train, recipe)[-1].state["1.weight"], train(c.task, c.train, replace(recipe, keep=1))[0].state["1.weight"])


def test_one_full_batch_step_is_a_weighted_gradient_step() -> None:
    c = case("logistic")
    weights = np.linspace(0, 1, TRAIN)
    got = train(c.task, c.train, Recipe(epochs=1, lr=0.3, batch_size=100, weight_decay=0), weights=weights)[0].state["1.weight"]
    params = {key: value.clone().requires_grad_() for key, value in c.task.params().items()}
    losses = c.task.losses(params, c.train.batch(slice(None)))
    (slope,) = torch.autograd.grad((torch.from_numpy(weights) * losses).sum() / weights.sum(), params["1.weight"])
    assert torch.allclose(got, c.task.params()["1.weight"] - 0.3 * slope, rtol=0, atol=1e-14)


@pytest.mark.parametrize("batch_size", [1, 4, 6, 12])
def test_every_batch_size_trains(batch_size: int) -> None:
    c = case("logistic")
    start = c.task.params()["1.weight"]
    assert not torch.equal(train(c.task, c.train, replace(SGD, epochs=1, batch_size=batch_size))[0].state["1.weight"], start)


def test_only_the_named_parameters_are_trained() -> None:
    c = case("mlp")
    task = Task(c.task.model, parameters="5.*")
    before, after = task.model.state_dict(), train(task, c.train, replace(SGD, weight_decay=0.1))[-1].state
    assert {key for key in after if not torch.equal(after[key], before[key])} == {"5.weight", "5.bias"}


def test_augmentation_sees_every_batch_and_repeats_with_the_seed() -> None:
    c, sizes = case("logistic"), []

    def noise(batch: Any, generator: torch.Generator) -> Any:
        sizes.append(len(batch[0]))
        return batch[0] + torch.randn(batch[0].shape, generator=generator).double(), batch[1]

    recipe = replace(SGD, epochs=2, augment=noise, batch_size=5)
    assert same(train(c.task, c.train, recipe), train(c.task, c.train, recipe))
    assert sizes == [5, 5, 3] * 4
    assert not same(train(c.task, c.train, recipe), train(c.task, c.train, replace(recipe, augment=None)))


@pytest.mark.parametrize("stop", [None, 2])
def test_training_leaves_model_and_random_state_as_they_were(stop: int | None) -> None:
    task, data = dropout_net(), case("mlp").train
    next(task.model.parameters()).requires_grad_(False)
    with untouched(task.model):
        if stop is None:
            train(task, data, SGD)
        else:
            with pytest.raises(KeyboardInterrupt):
                train(task, data, SGD, progress=interrupt_after(stop))


def test_divergence_is_an_error_that_names_epoch_and_rate() -> None:
    task = Task(nn.Linear(5, 1).double().eval(), lambda outputs, batch: outputs[:, 0] ** 4)
    with pytest.raises(ValueError, match=r"training diverged in epoch \d+: the loss is (nan|inf); lower the learning rate \(100.0\)"):
        train(task, case("mlp").train, replace(SGD, lr=100.0, epochs=20))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (np.ones(TRAIN - 1), r"weights: expected one weight per sample, shape \(13,\), got \(12,\)"),
        (np.ones((TRAIN, 1)), r"weights: expected one weight per sample, shape \(13,\), got \(13, 1\)"),
        (-np.ones(TRAIN), "weights: expected finite numbers of at least 0"),
        (np.full(TRAIN, np.nan), "weights: expected finite numbers of at least 0"),
        (np.zeros(TRAIN), "weights: all are 0, so no sample is left to train on"),
    ],
)
def test_wrong_weights_are_refused(weights: Any, message: str) -> None:
    c = case("logistic")
    with pytest.raises(ValueError, match=message):
        train(c.task, c.train, SGD, weights=weights)


@pytest.mark.parametrize(("name", "value"), [("epochs", 0), ("batch_size", 0), ("keep", 0), ("lr", 0.0)])
def test_a_setting_out_of_range_is_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name}: expected "):
        Recipe(**{name: value})


def test_silent_progress_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(silent(range(3), "count")) == [0, 1, 2]
    assert capsys.readouterr() == ("", "")


def test_samples_may_be_a_data_set_of_dictionaries() -> None:
    c = case("regression")
    assert isinstance(c.train, Samples)

    def risk(task: Task) -> Tensor:
        return task.losses(task.params(), c.train.batch(slice(None))).mean()

    after = c.task.at(train(c.task, c.train, replace(SGD, epochs=30))[-1].state)
    assert risk(after) < 0.8 * risk(c.task)


def noisy(task: Task, model: nn.Module, batch: Any, generator: torch.Generator) -> Tensor:
    """An objective that draws from the recipe's generator."""
    moved = (batch[0] + 0.1 * torch.randn(batch[0].shape, generator=generator).to(batch[0]), *batch[1:])
    return task.loss(task.forward(model, moved), moved)


def test_the_objective_of_the_task_itself_changes_nothing() -> None:
    def own(task: Task, model: nn.Module, batch: Any, _: torch.Generator) -> Tensor:
        assert model.training and model is not task.model
        return task.loss(task.forward(model, batch), batch)

    task, data = dropout_net(), case("mlp").train
    assert same(train(task, data, replace(SGD, objective=own)), train(task, data, SGD))
    assert not same(train(task, data, replace(SGD, objective=noisy)), train(task, data, SGD))


@pytest.mark.parametrize("epochs", [1, 4])
@pytest.mark.parametrize("rho", [0.0, 0.05])
def test_a_run_with_an_objective_sharpness_and_new_weights_resumes_bit_identically(rho: float, epochs: int, tmp_path: Path) -> None:
    task, data = dropout_net(), case("mlp").train
    recipe = replace(SGD, objective=noisy, rho=rho)
    asked: list[int] = []

    def reweigh(now: Task, epoch: int) -> Any:
        """By the losses at the present parameters, in every second epoch; the epoch after an interruption goes on with the weights before it."""
        asked.append(epoch)
        x, y = data.batch(slice(None))
        losses = now.losses(now.params(), (x.float(), y)).detach().numpy()
        return None if epoch % 2 else (losses < np.quantile(losses, 0.7)) * losses

    whole = train(task, data, recipe, reweigh=reweigh)
    assert asked == list(range(6)) and not same(whole, train(task, data, recipe))
    asked.clear()
    with pytest.raises(KeyboardInterrupt):
        train(task, data, recipe, reweigh=reweigh, directory=tmp_path, progress=interrupt_after(epochs))
    torch.rand(3)
    assert same(train(task, data, recipe, reweigh=reweigh, directory=tmp_path), whole)
    assert asked == list(range(6))


def test_new_weights_count_from_their_epoch_on() -> None:
    task, data = dropout_net(), case("mlp").train
    weights = np.linspace(0, 2, TRAIN)
    given = train(task, data, SGD, weights=weights)
    assert same(train(task, data, SGD, reweigh=lambda _, epoch: weights if epoch == 0 else None), given)
    assert same(train(task, data, SGD, weights=np.ones(TRAIN), reweigh=lambda _, epoch: weights), given)
    assert same(train(task, data, SGD, weights=weights, reweigh=lambda *_: None), given)
    late = train(task, data, SGD, reweigh=lambda _, epoch: weights if epoch == 2 else None)
    first = replace(SGD, keep=6)
    half, plain = train(task, data, first, reweigh=lambda _, epoch: weights if epoch == 2 else None), train(task, data, first)
    assert same(half[:2], plain[:2]) and not same(half[2:3], plain[2:3]) and not same(late, given)


def test_who_chooses_weights_sees_the_model_as_it_is_and_cannot_change_it() -> None:
    task, data = dropout_net(), case("mlp").train
    seen: list[dict[str, Tensor]] = []

    def spoil(now: Task, _: int) -> None:
        seen.append({name: value.clone() for name, value in now.model.state_dict().items()})
        torch.rand(3)
        with torch.no_grad():
            for value in now.model.parameters():
                value.zero_()

    kept = train(task, data, replace(SGD, keep=6), reweigh=spoil)
    assert same(kept, train(task, data, replace(SGD, keep=6)))
    states = [task.model.state_dict(), *(each.state for each in kept[:-1])]
    assert all(torch.equal(value, state[name]) for at, state in zip(seen, states, strict=True) for name, value in at.items())


@pytest.mark.parametrize(
    ("weights", "message"), [(np.ones(3), r"weights: expected one weight per sample, shape \(13,\), got \(3,\)"), (np.zeros(TRAIN), "all are 0")]
)
def test_wrong_new_weights_are_refused(weights: Any, message: str) -> None:
    c = case("logistic")
    with pytest.raises(ValueError, match=message):
        train(c.task, c.train, SGD, reweigh=lambda *_: weights)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_a_sharpness_aware_step_takes_the_gradient_uphill(decay: float) -> None:
    """θ − lr (∇L(θ + ρ g / ‖g‖) + decay θ), the norm over all parameters, written out."""
    c, rho = case("mlp"), 0.3
    recipe = Recipe(epochs=1, lr=0.2, batch_size=100, momentum=0.0, weight_decay=decay, rho=rho)
    got = c.task.at(train(c.task, c.train, recipe)[0].state).params()
    start = c.task.params()

    def slope(params: dict[str, Tensor]) -> dict[str, Tensor]:
        leaves = {name: value.clone().requires_grad_() for name, value in params.items()}
        c.task.losses(leaves, c.train.batch(slice(None))).mean().backward()
        return {name: value.grad for name, value in leaves.items()}  # type: ignore[misc]

    first = slope(start)
    length = torch.sqrt(sum((each**2).sum() for each in first.values()))  # type: ignore[arg-type]
    uphill = slope({name: value + rho * first[name] / length for name, value in start.items()})
    for name, value in start.items():
        assert torch.allclose(got[name], value - 0.2 * (uphill[name] + decay * value), rtol=0, atol=1e-10)
    assert any(not torch.allclose(first[name], uphill[name], atol=1e-4) for name in first)


def test_the_rise_of_sharpness_spares_parameters_that_are_not_trained() -> None:
    c = case("mlp")
    task = Task(c.task.model, parameters="5.*")
    before, after = task.model.state_dict(), train(task, c.train, replace(SGD, rho=0.1))[-1].state
    assert {key for key in after if not torch.equal(after[key], before[key])} == {"5.weight", "5.bias"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rho": -0.1}, "rho: expected a number of at least 0, got -0.1"),
        ({"rho": float("nan")}, "rho: expected a number of at least 0, got nan"),
        ({"objective": noisy, "accuracy": 0.9}, "accuracy: under an objective of one's own no training accuracy is known"),
    ],
)
def test_objectives_and_sharpness_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Recipe(**options)


def test_the_directory_of_another_objective_or_choice_is_refused(tmp_path: Path) -> None:
    task, data = dropout_net(), case("mlp").train
    recipe = replace(SGD, objective=noisy)

    def choose(*_: Any) -> None: ...

    train(task, data, recipe, directory=tmp_path)
    for other, reweigh in ((SGD, None), (replace(recipe, rho=0.1), None), (recipe, choose)):
        with pytest.raises(ValueError, match="belongs to another training run"):
            train(task, data, other, reweigh=reweigh, directory=tmp_path)
