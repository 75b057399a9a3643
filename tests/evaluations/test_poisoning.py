"""poisoning.py: attack success, recovered accuracy, the filter's own bias, defences side by side."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from robust_if import Recipe, Samples, Task
from robust_if.attacks.backdoors import Backdoor
from robust_if.attacks.triggers import FeatureValues
from robust_if.evaluations.poisoning import attack_success, defended, filter_bias, recovered_accuracy
from robust_if.models import build


def says(classes: list[int]) -> tuple[Task, torch.Tensor]:
    """A classifier that says the given class of each input, and those inputs."""
    model = torch.nn.Linear(4, 4, bias=False).eval()
    torch.nn.init.eye_(model.weight)
    return Task(model), torch.eye(4)[classes]


def test_success_counts_inputs_of_other_classes_alone() -> None:
    task, x = says([0, 0, 0, 1, 2])
    triggered = Samples((x, torch.tensor([0, 1, 2, 1, 3])))
    assert attack_success(task, triggered, 0) == 2 / 4
    assert recovered_accuracy(task, triggered, 0) == 1 / 4
    for measure in (attack_success, recovered_accuracy):
        with pytest.raises(ValueError, match="triggered: expected an input whose true class is not the goal class 0, but all 2 are of it"):
            measure(task, triggered.with_labels([0] * 5).take([0, 1]), 0)


def test_who_was_wrongly_removed_is_counted_by_class_and_group() -> None:
    mask = np.array([1, 1, 0, 0, 0, 0, 0, 0], dtype=bool)
    removed = np.array([1, 0, 1, 1, 0, 0, 0, 0], dtype=bool)
    labels, groups = np.array(list("aaaabbbb")), np.array(list("xyxyxyxy"))
    table = filter_bias(mask, removed, labels, groups, name="sex").set_index(["by", "value"])
    assert list(table.index) == [("all", ""), ("class", "a"), ("class", "b"), ("sex", "x"), ("sex", "y")]
    assert table.loc[("all", "")].to_dict() == {
        "n": 8, "removed": 3, "poisoned": 2, "precision": 1 / 3, "recall": 1 / 2, "false_positive_rate": 2 / 6
    }  # fmt: skip
    assert table["false_positive_rate"].tolist() == [2 / 6, 1, 0, 1 / 3, 1 / 3]
    assert np.isnan(table.loc[("class", "b"), "recall"]) and np.isnan(table.loc[("class", "b"), "precision"])
    blind = filter_bias(None, removed, labels)
    assert blind["removed"].tolist() == [3, 3, 0] and blind[["poisoned", "precision", "recall", "false_positive_rate"]].isna().all(axis=None)


@pytest.mark.parametrize(("name", "values"), [("mask", np.zeros(3)), ("labels", np.zeros(5)), ("groups", np.zeros((4, 1)))])
def test_lengths_that_differ_are_named(name: str, values: Any) -> None:
    given = {"mask": np.zeros(4), "labels": np.zeros(4), "groups": np.zeros(4)} | {name: values}
    with pytest.raises(ValueError, match=f"{name}: expected one value per sample"):
        filter_bias(given["mask"], np.zeros(4), given["labels"], given["groups"])


def draw(n: int, seed: int) -> Samples:
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 3
    x = torch.cat([4 * torch.eye(3)[y] + torch.randn(n, 3, generator=generator), torch.zeros(n, 1)], 1)
    return Samples((x, y))


def test_the_defences_stand_side_by_side() -> None:
    attack = Backdoor(FeatureValues({3: 6.0}), 0, 0.1, bounds=None)
    poisoned, test = attack(draw(150, 0), seed=0), draw(60, 1)
    given = {"test": test, "triggered": attack.triggered(test), "goal": 0, "recipe": Recipe(epochs=15, batch_size=32)}
    keep = np.where(np.arange(150) < 100, ~poisoned.mask, True)
    task = Task(build("logistic-regression", (4,), 3))
    found = defended(task, poisoned.data, poisoned.mask, {"mine": keep.astype(float)}, **given)  # type: ignore[arg-type]
    assert [each.name for each in found.defences] == ["undefended", "random filter", "perfect filter", "mine"]
    plain, random, perfect, mine = found.defences
    assert plain.attack_success > 0.9 and random.attack_success > 0.9 and not found.failed
    assert perfect.attack_success < 0.1 and perfect.recovered_accuracy > 0.8 > plain.recovered_accuracy
    assert min(each.clean_accuracy for each in found.defences) > 0.85
    assert (plain.removed, plain.recall) == (0, 0) and np.isnan(plain.precision)
    assert (random.removed, perfect.removed, perfect.precision, perfect.recall) == (15, 15, 1, 1) and random.recall < 0.5
    assert mine.removed == (~keep).sum() and mine.precision == 1 and mine.recall == mine.removed / 15


def test_an_attack_without_success_is_reported_as_failed() -> None:
    attack = Backdoor(FeatureValues({3: 0.0}), 0, 0.02, bounds=None)
    poisoned, test = attack(draw(150, 0), seed=0), draw(60, 1)
    task = Task(build("logistic-regression", (4,), 3))
    found = defended(
        task, poisoned.data, poisoned.mask, {}, test=test, triggered=attack.triggered(test), goal=0, recipe=Recipe(epochs=2)
    )  # fmt: skip
    assert found.failed


@pytest.mark.parametrize(
    ("mask", "decisions", "message"),
    [
        (np.zeros(150), {}, "mask: expected 150 truth values"),
        (np.ones(3), {}, "mask: expected 150 truth values"),
        (np.arange(150) < 9, {"all": np.zeros(150)}, "decisions: 'all' needs"),
        (np.arange(150) < 9, {"short": np.ones(3)}, "decisions: 'short' needs"),
        (np.arange(150) < 9, {"undefended": np.ones(150)}, "decisions: 'undefended' needs"),
    ],
)
def test_masks_and_decisions_that_do_not_fit_are_refused(mask: Any, decisions: dict[str, Any], message: str) -> None:
    data = draw(150, 0)
    task = Task(build("logistic-regression", (4,), 3))
    with pytest.raises(ValueError, match=message):
        defended(task, data, mask, decisions, test=data, triggered=data, goal=0, recipe=Recipe(epochs=1))
