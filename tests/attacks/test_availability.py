"""attacks/availability.py: every sample carries a shortcut to its class, and a model trained on them is of little use on clean inputs."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from cases import relative
from robust_if import Recipe, Samples, Task, fit
from robust_if.attacks.availability import linear_patches, one_pixel_shortcut, targeted_adversarial
from robust_if.attacks.evasion import Threat, box, pgd
from robust_if.attacks.poisoned import Poisoned
from robust_if.models import build
from unchanged import untouched

N, CLASSES, EPS = 60, 4, 0.1

#: By rank of a sample: rows, grey images, images of two channels, and volumes; all with sides that patches of 3 do not divide.
SHAPES = [(11,), (7, 8), (2, 7, 8), (2, 4, 5, 4)]
RANKS = pytest.mark.parametrize("shape", SHAPES, ids=str)


def problem(shape: tuple[int, ...] = (2, 7, 8)) -> Samples:
    """Inputs in [0, 1] with ids of their own."""
    x = torch.rand(N, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return Samples((x, torch.arange(N) % CLASSES), np.arange(N) + 100)


def model(shape: tuple[int, ...]) -> Task:
    return Task(build("mlp", shape, CLASSES, 1).double())


def inputs(data: Samples) -> Tensor:
    return data.batch(slice(None))[0]


ATTACKS: dict[str, Callable[[Samples], Poisoned[Samples]]] = {
    "patches": lambda data: linear_patches(data, eps=EPS, patch=3, seed=0),
    "pixel": one_pixel_shortcut,
    "targeted": lambda data: targeted_adversarial(model(tuple(inputs(data).shape[1:])), data, eps=EPS, steps=10),
}


@RANKS
@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_inputs_change_within_the_bounds_and_labels_and_ids_stay(attack: Any, shape: tuple[int, ...]) -> None:
    data = problem(shape)
    before = inputs(data).clone()
    poisoned, again = attack(data), attack(data)
    after = inputs(poisoned.data)
    assert poisoned.mask.all() and np.array_equal(poisoned.mask, (after != before).flatten(1).any(1).numpy())
    assert after.min() >= 0 and after.max() <= 1 and after.shape == before.shape and after.dtype == before.dtype
    assert torch.equal(poisoned.data.labels, data.labels) and np.array_equal(poisoned.data.ids, data.ids)
    assert torch.equal(inputs(data), before) and torch.equal(inputs(again.data), after)


@RANKS
def test_patches_are_constant_linearly_separable_and_as_strong_as_stated(shape: tuple[int, ...]) -> None:
    data = problem(shape)
    change = inputs(linear_patches(data, eps=EPS, bounds=None, patch=3, seed=0).data) - inputs(data)
    assert relative(change.flatten(1).square().mean(1).sqrt(), torch.full((N,), EPS, dtype=change.dtype)) <= 1e-6
    spatial = change if len(shape) > 2 else change[:, None]
    for axis in range(2, spatial.ndim):
        steps = spatial.diff(dim=axis).abs().transpose(0, axis).flatten(1).amax(1)
        borders = torch.arange(1, spatial.shape[axis]) % 3 == 0
        assert (steps[~borders] < 1e-12).all() and (steps[borders] > 1e-3).all()
    probe = LogisticRegression(C=1e6).fit(change.flatten(1).numpy(), data.labels.numpy())
    assert probe.score(change.flatten(1).numpy(), data.labels.numpy()) == 1
    assert len(change.flatten(1).unique(dim=0)) == N  # a draw of its own for every sample


def test_patches_differ_by_seed_and_scale_by_feature() -> None:
    data, eps = problem(), torch.zeros(2, 7, 8, dtype=torch.float64)
    eps[0] = EPS
    one, other = (inputs(linear_patches(data, eps=EPS, bounds=None, patch=3, seed=seed).data) for seed in (0, 1))
    part = inputs(linear_patches(data, eps=eps, bounds=None, patch=3, seed=0).data)
    assert not torch.equal(one, other)
    assert torch.equal(part[:, 0], one[:, 0]) and torch.equal(part[:, 1], inputs(data)[:, 1])


@RANKS
@pytest.mark.parametrize("bounds", [(0.0, 1.0), (-1.0, 3.0)])
def test_the_pixel_of_a_class_is_the_best_of_all(shape: tuple[int, ...], bounds: tuple[float, float]) -> None:
    data = problem(shape)
    data = Samples((inputs(data) ** torch.linspace(0.3, 3, int(np.prod(shape)), dtype=torch.float64).view(shape), data.labels))
    before, after = (
        inputs(each).reshape(N, shape[0] if len(shape) > 2 else 1, -1).numpy() for each in (data, one_pixel_shortcut(data, bounds=bounds).data)
    )
    taken = set()
    for label in range(CLASSES):
        rows = data.labels.numpy() == label
        (pixel,) = np.flatnonzero((before[rows] != after[rows]).any((0, 1)))
        (colour,) = np.unique(after[rows][:, :, pixel], axis=0)
        found = {}
        for place in range(before.shape[2]):
            for value in np.ndindex(*[2] * before.shape[1]):
                shown = np.array([bounds[i] for i in value])
                changes = [np.abs(shown - image[:, place]).sum() for image in before[rows]]
                found[place, tuple(shown)] = np.mean(changes) / np.std(changes)
        best = max((key for key in found if key not in taken), key=found.__getitem__)
        assert (pixel, tuple(colour)) == best
        taken.add(best)


def test_a_pixel_that_never_varies_is_best_and_no_two_classes_share_one() -> None:
    x = torch.rand(N, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    x[:, 0, 3, 1], x[:, 0, 2, 2] = 0.0, 0.25
    after = inputs(one_pixel_shortcut(Samples((x, torch.arange(N) % 3))).data)
    changed = [[tuple(place) for place in (after != x)[k::3].any(0)[0].nonzero().tolist()] for k in range(3)]
    assert changed == [[(3, 1)], [(2, 2)], [(2, 2)]]
    assert (after[0::3, 0, 3, 1] == 1).all() and (after[1::3, 0, 2, 2] == 1).all() and (after[2::3, 0, 2, 2] == 0).all()


@pytest.mark.parametrize("size", [1, 7, 256])
def test_every_input_is_attacked_towards_the_class_that_is_named(size: int) -> None:
    data, task, goals = problem(), model((2, 7, 8)), [2, 3, 1, 0]
    with untouched(task.model):
        poisoned = targeted_adversarial(task, data, eps=EPS, steps=10, permutation=goals, batch_size=size)
    wanted, low_high = torch.tensor(goals)[data.labels], box(inputs(data), EPS, (0.0, 1.0))
    expected = pgd(task, task.params(), (inputs(data), wanted), Threat(EPS, bounds=(0.0, 1.0)), steps=10, targeted=True)
    after = inputs(poisoned.data)
    assert relative(after, expected) <= 1e-9 and (after >= low_high[0]).all() and (after <= low_high[1]).all()
    losses = [task.losses(task.params(), (x, wanted)) for x in (inputs(data), after)]
    assert (losses[1] < losses[0]).all()


def test_the_next_class_is_the_default_goal_and_types_stay() -> None:
    data = problem((11,))
    single = Samples((inputs(data).float(), data.labels))
    named = targeted_adversarial(model((11,)), single, eps=EPS, steps=5, permutation=[1, 2, 3, 0])
    assert torch.equal(inputs(named.data), inputs(targeted_adversarial(model((11,)), single, eps=EPS, steps=5).data))
    other = targeted_adversarial(Task(build("mlp", (11,), CLASSES)), data, eps=EPS, steps=5)
    for poisoned, clean in ((named, single), (other, data)):
        low, high = box(inputs(clean), EPS, (0.0, 1.0))
        after = inputs(poisoned.data)
        assert after.dtype == inputs(clean).dtype and (after >= low).all() and (after <= high).all()


@cache
def digits() -> tuple[Tensor, Tensor]:
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    return torch.tensor(x[order] / 16, dtype=torch.float32).view(-1, 1, 8, 8), torch.tensor(y[order])


#: A pixel at full contrast outdoes strokes only where these are fainter than it, so the inputs are scaled for that attack.
@pytest.mark.parametrize(
    ("attack", "name", "contrast", "epochs"),
    [
        (lambda data, task: linear_patches(data, eps=0.25, patch=2, seed=0), "mlp", 1.0, 8),
        (lambda data, task: one_pixel_shortcut(data), "cnn", 0.4, 12),
        (lambda data, task: targeted_adversarial(task, data, eps=0.25, steps=15), "mlp", 1.0, 8),
    ],
    ids=ATTACKS,
)
def test_a_model_trained_on_the_poison_fails_on_clean_digits(attack: Any, name: str, contrast: float, epochs: int) -> None:
    x, y = digits()
    x = 0.5 + contrast * (x - 0.5)
    train, start, recipe = Samples((x[:1000], y[:1000])), Task(build(name, (1, 8, 8), 10)), Recipe(epochs=epochs, batch_size=32)
    clean = fit(start, train, recipe)
    victim = fit(start, attack(train, clean).data, recipe)
    before, after = ((task.model(x[1000:]).argmax(1) == y[1000:]).float().mean() for task in (clean, victim))
    assert before > 0.9 and after < before - 0.2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda data: linear_patches(data, patch=0, seed=0), "patch: expected at least 1, got 0"),
        (lambda data: linear_patches(Samples((inputs(data)[:, :1], data.labels)), seed=0), "patch: 1 patches .* cannot separate 4 classes"),
        (lambda data: linear_patches(data, eps=0.0, seed=0), "eps: expected some number above 0"),
        (lambda data: linear_patches(data, eps=-0.1, seed=0), "eps: expected numbers of at least 0"),
        (lambda data: linear_patches(data, bounds=(0.5, 1.0), seed=0), "bounds: expected data within"),
        (lambda data: one_pixel_shortcut(data, bounds=(0.5, 1.0)), "bounds: expected data within"),
        (lambda data: one_pixel_shortcut(Samples((torch.rand(N, 9, 4, 4), data.labels))), "data: expected at most 8 channels"),
        (lambda data: one_pixel_shortcut(Samples((torch.rand(N, 1), data.labels))), "data: 1 pixels in 2 colours are too few for 4 classes"),
        (lambda data: one_pixel_shortcut(Samples((torch.rand(N), data.labels))), r"data: expected rows \(d,\) or images"),
        (lambda data: one_pixel_shortcut(Samples((inputs(data).long(), data.labels))), "floating point, got torch.int64"),
        (lambda data: targeted_adversarial(model((2, 7, 8)), data, bounds=(0.5, 1.0)), "bounds: expected data within"),
        (lambda data: targeted_adversarial(model((2, 7, 8)), data, permutation=[0, 2, 3, 1]), "permutation: expected every class from 0 to 3 once"),
        (lambda data: targeted_adversarial(model((2, 7, 8)), data, permutation=[1, 0]), "permutation: expected labels from 0 to 1, got 0 to 3"),
        (lambda data: targeted_adversarial(model((2, 7, 8)), data, steps=0), "steps: expected"),
        (lambda data: targeted_adversarial(model((2, 7, 8)), data, batch_size=0), "batch_size: expected at least 1"),
    ],
)
def test_bad_arguments_are_named(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(problem())
