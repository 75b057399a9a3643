"""estimators/less.py and estimators/train_on_validation.py: against torch's own optimiser, and plain loops."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cases import NAMES, TARGETS, TRAIN, VALID, Case, Gap, case, relative
from oracles import flat, matrix, sample_gradients
from robust_if import Checkpoint, InnerProduct, Plain, Recipe, Sweep, Task, Tuning, Utility, train
from robust_if import pieces as pieces_module
from robust_if.checkpoints import Moments
from robust_if.data import to
from robust_if.estimators import less as less_module
from robust_if.estimators.less import LESS
from robust_if.estimators.train_on_validation import LossChange

ADAM = Recipe(epochs=4, lr=3e-3, optimizer="adamw", batch_size=5, weight_decay=0.0, keep=2)
EVERY_MODEL = pytest.mark.parametrize("name", NAMES)


def steps(task: Task, c: Case, moments: Moments) -> torch.Tensor:
    """The step, without its rate, that torch's Adam takes on every training sample alone, ``(n, p)``."""
    rows = []
    for i in range(len(c.train)):
        model = copy.deepcopy(task.model)
        params = {name: value.requires_grad_() for name, value in model.named_parameters()}
        optimizer = torch.optim.Adam(params.values(), lr=1.0)
        for name, value in params.items():
            slots = {"exp_avg": moments.first[name].clone(), "exp_avg_sq": moments.second[name].clone()}
            optimizer.state[value] = {"step": torch.tensor(float(moments.steps)), **slots}
        batch = to(c.train.batch(slice(i, i + 1)), next(model.parameters()))
        task.loss(task.forward(model, batch), batch).sum().backward()
        for value in params.values():
            value.grad = torch.zeros_like(value) if value.grad is None else value.grad
        optimizer.step()
        rows.append(flat(task.params()) - flat({name: value.detach() for name, value in params.items()}))
    return torch.stack(rows)


def trained(name: str) -> tuple[Case, list[Checkpoint]]:
    """A case with the checkpoints of a short run; moments that no parameter lacks."""
    c = case(name)
    kept = train(c.task, c.train, ADAM)
    names = c.task.params()
    full = []
    for each in kept:
        assert each.moments is not None
        zero = {key: torch.zeros_like(value) for key, value in names.items()}
        full.append(replace(each, moments=Moments({**zero, **each.moments.first}, {**zero, **each.moments.second}, each.moments.steps)))
    return c, full


@EVERY_MODEL
def test_less_is_minus_the_cosine_with_the_step_of_torchs_adam(name: str) -> None:
    c, kept = trained(name)
    target = Utility(c.valid)
    cosines, products = np.zeros(TRAIN), np.zeros(TRAIN)
    for checkpoint in kept:
        task = c.task.at(checkpoint.state)
        assert checkpoint.moments is not None
        gamma, slope = steps(task, c, checkpoint.moments), flat(target.gradient(task, task.params()))
        cosines += checkpoint.weight * (gamma @ slope / (gamma.norm(dim=1) * slope.norm())).numpy()
        products += checkpoint.weight * (gamma @ slope).numpy()
    got, plain = (LESS(normalise=normalise).score(c.task, c.train, target=target, checkpoints=kept) for normalise in (True, False))
    assert relative(got.values, -cosines) <= 1e-8 and relative(plain.values, -products) <= 1e-8
    assert (got.estimator, plain.estimator, got.units) == ("less", "less-product", "rank")


@given(batch_size=st.integers(1, TRAIN + 2), chunk=st.integers(1, 500))
def test_batches_and_chunks_do_not_matter(batch_size: int, chunk: int) -> None:
    c, kept = trained("cnn")
    expected = LESS().score(c.task, c.train, target=Utility(c.valid), checkpoints=kept).values
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(less_module, "CHUNK", chunk)
        patch.setattr(pieces_module, "CHUNK", chunk)
        got = LESS().score(c.task, c.train, target=Utility(c.valid), checkpoints=kept, sweep=Sweep(batch_size=batch_size)).values
    assert relative(got, expected) <= 1e-10


def test_several_targets_take_one_pass_and_a_part_of_the_parameters_will_do() -> None:
    c, kept = trained("mlp")
    part = replace(c.task, parameters="5.*")
    targets = {kind: make(c.valid, VALID) for kind, make in TARGETS.items()}
    for task in (c.task, part):
        got = LESS().score(task, c.train, target=targets, checkpoints=kept)
        for scores, target in zip(got, targets.values(), strict=True):
            assert relative(scores.values, LESS().score(task, c.train, target=target, checkpoints=kept).values) <= 1e-12
    assert relative(got[0].values, LESS().score(c.task, c.train, target=targets["utility"], checkpoints=kept).values) > 1e-3


def test_a_parameter_without_moments_counts_from_zero() -> None:
    c, (_, last) = trained("mlp")
    assert last.moments is not None

    def without(moments: Moments) -> Moments:
        return Moments(*({key: value for key, value in kind.items() if key != "5.bias"} for kind in (moments.first, moments.second)), moments.steps)

    def zeroed(moments: Moments) -> Moments:
        zero = torch.zeros(3).double()
        return Moments({**moments.first, "5.bias": zero}, {**moments.second, "5.bias": zero}, moments.steps)

    got, expected = (
        LESS().score(c.task, c.train, target=Utility(c.valid), checkpoints=[replace(last, moments=change(last.moments))]).values
        for change in (without, zeroed)
    )
    assert np.array_equal(got, expected)


def test_without_memory_the_step_is_the_sign_of_the_gradient() -> None:
    c, (_, last) = trained("mlp")
    got = LESS(betas=(0.0, 0.0), eps=1e-30, normalise=False).score(c.task, c.train, target=Utility(c.valid), checkpoints=[replace(last, weight=1.0)])
    task = c.task.at(last.state)
    signs = np.sign(matrix(sample_gradients(task, c.train)))
    assert relative(got.values, -signs @ flat(Utility(c.valid).gradient(task, task.params())).numpy()) <= 1e-9


@pytest.mark.parametrize("kind", ["none", "sgd", "plain"])
def test_checkpoints_without_moments_are_refused_with_the_way_to_get_them(kind: str) -> None:
    c = case("mlp")
    kept: Any = {"none": (), "sgd": train(c.task, c.train, Recipe(epochs=1)), "plain": [Checkpoint.of(c.task.model)]}[kind]
    with pytest.raises(ValueError, match=r"hold Adam's moments; pass checkpoints=train\(task, data, Recipe\(optimizer='adamw', keep=4\)\)"):
        LESS().score(c.task, c.train, target=Utility(c.valid), checkpoints=kept)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"betas": (0.9, 1.0)}, r"betas: expected two numbers in \[0, 1\), got \(0.9, 1.0\)"),
        ({"betas": (0.9,)}, "betas: expected two numbers"),
        ({"eps": 0.0}, "eps: expected a positive number, got 0.0"),
    ],
)
def test_a_setting_out_of_range_is_refused(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LESS(**options)


# Training on the target


@EVERY_MODEL
def test_loss_change_is_the_loss_after_tuning_minus_the_loss_before(name: str) -> None:
    c, tuning = case(name), Tuning(steps=4, lr=0.05, batch_size=5, flatness=Plain())
    whole = c.train.batch(slice(None))
    after = tuning.run(c.task, Utility(c.valid))
    expected = (c.task.losses(after, whole) - c.task.losses(c.task.params(), whole)).detach()
    got = LossChange(tuning).score(c.task, c.train, target=Utility(c.valid), sweep=Sweep(batch_size=5))
    assert relative(got.values, expected) <= 1e-12 and (got.estimator, got.units) == ("loss-change", "rank")


@pytest.mark.parametrize("kind", TARGETS)
def test_one_small_step_is_the_inner_product(kind: str) -> None:
    c, rate = case("mlp"), 1e-6
    target = TARGETS[kind](c.valid, VALID)
    got = LossChange(Tuning(steps=1, lr=rate, batch_size=VALID, momentum=0.0, flatness=Plain())).score(c.task, c.train, target=target)
    assert relative(got.values / rate, TRAIN * InnerProduct().score(c.task, c.train, target=target).values) <= 1e-4


def test_a_sample_that_the_target_contradicts_is_harmful() -> None:
    c = case("logistic")
    labels = c.train.labels.numpy()
    wrong = c.train.with_labels((labels + 1) % 3)
    got = LossChange().score(c.task, wrong, target=Utility(c.train))
    right = LossChange().score(c.task, c.train, target=Utility(c.train))
    assert got.values.mean() > 0 > right.values.mean()


def test_loss_change_serves_a_target_that_is_no_mean() -> None:
    c = case("cnn")
    values = LossChange(Tuning(steps=3, flatness=Plain())).score(c.task, c.train, target=Gap(c.valid)).values
    assert np.isfinite(values).all() and values.any()
