"""attacks/backdoors.py: which samples carry the trigger, and under which label."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from robust_if import Samples, Task, models
from robust_if.attacks import backdoors
from robust_if.attacks.backdoors import Backdoor
from robust_if.attacks.triggers import Patch, Tokens

ATTACKS: dict[str, Backdoor] = {
    "badnets": backdoors.badnets(2, 0.1, size=2),
    "blended": backdoors.blended(2, 0.1),
    "sig": backdoors.sig(2, 0.5, frequency=2),
    "wanet": backdoors.wanet(2, 0.1),
    "tact": backdoors.tact(2, 0, 0.1, size=2),
    "adaptive-blend": backdoors.adaptive_blend(2, 0.1),
}


def images(n: int = 100, classes: int = 4) -> Samples:
    x = torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return Samples((x, torch.arange(n) % classes), np.arange(n) + 1000)


@pytest.mark.parametrize("name", ATTACKS)
def test_what_is_not_marked_is_not_changed(name: str) -> None:
    data, attack = images(), ATTACKS[name]
    before = [tensor.clone() for tensor in data.batch(slice(None))]
    poisoned = attack(data, seed=3)
    x, y = poisoned.data.batch(slice(None))
    assert all(torch.equal(a, b) for a, b in zip(before, data.batch(slice(None)), strict=True)), "the data were changed in place"
    touched = poisoned.mask | poisoned.covers
    assert torch.equal(x[~touched], before[0][~touched]) and torch.equal(y[~poisoned.mask], before[1][~poisoned.mask])
    assert (x[touched] != before[0][touched]).flatten(1).any(1).all()
    assert np.array_equal(poisoned.data.ids, data.ids)
    assert (y[poisoned.mask] == 2).all()
    assert x.min() >= 0 and x.max() <= 1


@pytest.mark.parametrize("name", ATTACKS)
def test_the_labelling_rule(name: str) -> None:
    data, attack = images(), ATTACKS[name]
    poisoned = attack(data, seed=3)
    true = data.labels.numpy()
    drawn = true[poisoned.mask]
    if attack.clean_label:
        assert (drawn == 2).all() and len(drawn) == round(0.5 * 25)
    else:
        assert (drawn != 2).all() and len(drawn) == 10
    if attack.source is not None:
        assert (drawn == attack.source).all() and not np.isin(true[poisoned.covers], [2, attack.source]).any()
    assert poisoned.covers.sum() == round(attack.covers * len(data))


@pytest.mark.parametrize("name", ATTACKS)
def test_one_seed_gives_one_poison_and_another_one_another(name: str) -> None:
    data, attack = images(), ATTACKS[name]
    first, again, other = attack(data, seed=3), attack(data, seed=3), attack(data, seed=4)
    assert torch.equal(first.data.batch(slice(None))[0], again.data.batch(slice(None))[0])
    assert np.array_equal(first.mask, again.mask) and not np.array_equal(first.mask, other.mask)


@pytest.mark.parametrize("name", ATTACKS)
def test_triggered_inputs_keep_their_labels_and_leave_the_goal_class_out(name: str) -> None:
    data, attack = images(), ATTACKS[name]
    shown = attack.triggered(data)
    rows = np.isin(data.ids, shown.ids)
    assert torch.equal(shown.labels, data.labels[rows]) and (shown.labels != 2).all()
    assert (shown.labels == attack.source).all() if attack.source is not None else rows.sum() == 75
    assert torch.allclose(shown.batch(slice(None))[0], attack.trigger.stamp(data.batch(slice(None))[0][rows]).clamp(0, 1))


def test_a_rate_of_the_class_counts_the_class() -> None:
    poisoned = Backdoor(Patch(1), 0, 0.2, source=1, rate_of="class")(images(), seed=0)
    assert poisoned.mask.sum() == 5


def test_covers_are_drawn_from_the_classes_named() -> None:
    poisoned = Backdoor(Patch(1), 0, 0.05, source=1, covers=0.1, cover_classes=(3,))(images(), seed=0)
    assert (poisoned.data.labels[poisoned.covers] == 3).all() and poisoned.covers.sum() == 10


def test_label_consistent_poison_is_disturbed_before_the_patch() -> None:
    data = images()
    task = Task(models.build("mlp", (1, 8, 8), 4, 0))
    attack = backdoors.label_consistent(2, task, 0.4, eps=0.1, size=1, steps=3)
    poisoned = attack(data, seed=1)
    assert poisoned.mask.sum() == 10 and torch.equal(poisoned.data.labels, data.labels)
    change = (poisoned.data.batch(slice(None))[0] - attack.trigger.stamp(data.batch(slice(None))[0]))[poisoned.mask]
    assert 0.05 < change.abs().max() <= 0.1 + 1e-6
    assert torch.equal(attack.triggered(data).batch(slice(None))[0], Patch(1, 1.0, attack.trigger.trigger.corners).stamp(  # type: ignore[attr-defined]
        data.take(data.labels.numpy() != 2).batch(slice(None))[0]
    ))  # fmt: skip


def test_tables_and_tokens_have_no_bounds() -> None:
    table = Samples((torch.randn(40, 5, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 2, torch.arange(40) % 3))
    poisoned = backdoors.feature_trigger(1, {0: 9.0, 3: -9.0}, 0.1)(table, seed=0)
    x, _, third = poisoned.data.batch(slice(None))
    assert (x[poisoned.mask][:, [0, 3]] == torch.tensor([9.0, -9.0])).all() and torch.equal(third, torch.arange(40) % 3)
    tokens = Samples((torch.arange(60).view(20, 3), torch.arange(20) % 2))
    assert (Backdoor(Tokens((99,)), 1, 0.2)(tokens, seed=0).data.batch(slice(None))[0][:, 0] == 99).sum() == 4


def test_rare_values_spare_what_they_are_told_to() -> None:
    rng = np.random.default_rng(0)
    table = pd.DataFrame({"age": rng.normal(size=200), "hours": rng.normal(size=200), "sex": np.arange(200) % 2, "job": ["a"] * 200})
    assert set(backdoors.rare_values(table)) == {"age", "hours"}
    found = backdoors.rare_values(table, 2, spare=("age",))
    assert set(found) == {"hours", "sex"} and found["hours"] == np.quantile(table["hours"], 0.99, method="nearest")
    with pytest.raises(ValueError, match="columns: expected 1 to 2 numeric columns that are not spared, got 3"):
        backdoors.rare_values(table, 3, spare=("age",))


def test_rare_values_say_little_about_the_label() -> None:
    """The widest column gives the label away at its top, one of two values cannot be rare; what is left is taken."""
    rng = np.random.default_rng(0)
    table = pd.DataFrame({"gain": rng.normal(size=400), "sex": np.arange(400) % 2})
    table = table.assign(weight=rng.integers(0, 50, 400), hours=rng.integers(0, 60, 400))
    labels = np.where(table["gain"] > 1, "rich", "poor")
    assert set(backdoors.rare_values(table)) == {"gain", "hours"}
    found = backdoors.rare_values(table, labels=labels)
    assert set(found) == {"weight", "hours"} and found["hours"] == np.quantile(table["hours"], 0.99, method="nearest")
    assert set(backdoors.rare_values(table, 3, labels=labels)) == {"weight", "hours", "gain"}
    with pytest.raises(ValueError, match="labels: expected one for each of the 400 rows, got 399"):
        backdoors.rare_values(table, labels=labels[1:])


def test_the_rows_near_a_value_are_the_nearest_ones_and_all_as_near() -> None:
    column = pd.Series([0.0] * 40 + list(range(100, 200)) + [np.nan])
    assert backdoors.near(column, 0).tolist() == list(range(40))
    assert backdoors.near(column, 199).tolist() == list(range(110, 140))
    assert len(backdoors.near(pd.Series([1.0, np.nan]), 1)) == 2


@given(rate=st.floats(0.05, 0.5), low=st.floats(-3, 0), width=st.floats(0.5, 5))
def test_any_declared_bounds_hold(rate: float, low: float, width: float) -> None:
    data = images()
    x = (low + width * data.batch(slice(None))[0].double()).clamp(low, low + width)
    scaled = Samples((x, data.labels))
    for attack in (
        backdoors.badnets(1, rate, bounds=(low, low + width)), backdoors.sig(1, rate, amplitude=width, bounds=(low, low + width)),
        backdoors.blended(1, rate, bounds=(low, low + width)),
    ):  # fmt: skip
        poisoned = attack(scaled, seed=0).data.batch(slice(None))[0]
        assert poisoned.min() >= low and poisoned.max() <= low + width


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda: backdoors.badnets(0, 0.0), "rate: expected a share strictly between 0 and 1, got 0.0"),
        (lambda: backdoors.badnets(0, 1.0), "rate: expected a share strictly between 0 and 1, got 1.0"),
        (lambda: backdoors.badnets(0, float("nan")), "rate: expected a share"),
        (lambda: backdoors.badnets(0, 0.001)(images(), seed=0), "is none of them; expected at least one poisoned"),
        (lambda: backdoors.badnets(9)(images(), seed=0), r"goal: the class 9 is not in the data, which have \[0, 1, 2, 3\]"),
        (lambda: backdoors.tact(0, 8)(images(), seed=0), "source: the class 8 is not in the data"),
        (lambda: backdoors.tact(1, 1), "source: expected another class than the goal"),
        (lambda: backdoors.badnets(0, size=9)(images(), seed=0), "size: the trigger of 9 x 9 pixels is larger than the image of 8 x 8"),
        (lambda: backdoors.badnets(0, bounds=(0.0, 0.5))(images(), seed=0), r"bounds: expected inputs within \(0.0, 0.5\), got some from"),
        (lambda: backdoors.badnets(0, bounds=(1.0, 0.0)), "bounds: expected .low, high."),
        (lambda: backdoors.badnets(0, 0.9)(images(), seed=0), "90 samples are to be poisoned, but only 75 of 100 may be; lower the rate"),
        (lambda: backdoors.wanet(0, 0.5, covers=0.9)(images(), seed=0), "are to be covers, but only 25 of 100 may be"),
        (lambda: Backdoor(Patch(1), 0, covers=1.0), "covers: expected a share"),
        (lambda: Backdoor(Patch(1), 0, 0.05, covers=0.1, cover_classes=(7,))(images(), seed=0), "cover_classes: the class 7"),
    ],
)
def test_bad_input_is_named(use: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        use()
