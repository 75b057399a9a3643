"""attacks/universal.py: a change of all clean inputs towards each class."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from cases import relative
from robust_if import Recipe, Samples, Task, fit
from robust_if.attacks.backdoors import Backdoor
from robust_if.attacks.triggers import FeatureValues
from robust_if.attacks.universal import universal_triggers
from robust_if.models import logistic_regression, mlp


def classes(n: int, seed: int) -> Samples:
    """Three classes in three features, and a fourth feature that says nothing."""
    draw, y = np.random.default_rng(seed), np.arange(n) % 3
    x = np.concatenate([3 * np.eye(3)[y] + draw.normal(size=(n, 3)), 0.2 * draw.normal(size=(n, 1))], 1)
    return Samples((torch.from_numpy(x), torch.from_numpy(y)))


def linear() -> Task:
    """Logits (x, 2x, -x) of one feature beside another one that plays no part."""
    task = Task(logistic_regression((2,), 3).double().eval())
    weight = torch.tensor([[1.0, 0.0], [2.0, 0.0], [-1.0, 0.0]], dtype=torch.float64)
    return task.at({"1.weight": weight, "1.bias": torch.zeros(3, dtype=torch.float64)})


def plane(n: int = 12) -> Samples:
    x = torch.rand(n, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return Samples((x, torch.arange(n) % 3))


def test_the_changes_of_a_linear_model_point_along_its_weights_as_far_as_allowed() -> None:
    found = {each.goal_class: each for each in universal_triggers(linear(), plane(), radius=3.0, bounds=None)}
    assert set(found) == {0, 1, 2}
    for goal, sign in ((1, 1.0), (2, -1.0)):
        expected = torch.tensor([sign * 3 * 2**0.5, 0.0], dtype=torch.float64)
        assert relative(found[goal].change, expected) <= 1e-6
        assert found[goal].success == 1.0
    assert found[0].success < 1.0


def test_inputs_are_those_of_the_other_classes_with_the_change_within_bounds() -> None:
    data = plane()
    x, y = data.batch(slice(None))
    for each in universal_triggers(linear(), data, radius=0.4, bounds=(0.0, 1.0)):
        assert relative(each.inputs, (x[y != each.goal_class] + each.change).clamp(0, 1)) == 0
        assert each.change.norm() <= 0.4 * 2**0.5 * (1 + 1e-12)
        assert each.target.goal_class == each.goal_class and len(each.target.data) == len(each.inputs)


def test_the_class_of_a_backdoor_comes_first_and_its_trigger_is_found() -> None:
    backdoor = Backdoor(FeatureValues({3: 2.0}), 2, 0.1, bounds=None)
    start = Task(mlp((4,), 3, width=16, depth=1).double().eval()).reset(0)
    task = fit(start, backdoor(classes(240, 0), seed=0).data, Recipe(epochs=40, lr=0.1))
    first, *rest = universal_triggers(task, classes(90, 1), radius=0.9, bounds=None)
    assert first.goal_class == 2 and first.change.argmax() == 3 and first.success > 1.4 * rest[0].success
    rates = np.array([each.success for each in (first, *rest)])
    spread = 1.4826 * np.median(np.abs(rates - np.median(rates)))
    assert first.anomaly == pytest.approx((rates[0] - np.median(rates)) / spread)


def test_the_same_seed_gives_the_same_and_the_model_stays() -> None:
    task, data = linear(), plane(30)
    before = {name: value.clone() for name, value in task.model.state_dict().items()}
    one, two = (universal_triggers(task, data, samples=10, seed=3) for _ in range(2))
    assert all(torch.equal(a.change, b.change) and a.success == b.success for a, b in zip(one, two, strict=True))
    assert all(torch.equal(value, before[name]) for name, value in task.model.state_dict().items())


@pytest.mark.parametrize(
    ("options", "message"),
    [({"radius": 0.0}, "radius"), ({"steps": 0}, "steps"), ({"samples": -1}, "samples"), ({"bounds": (0.0, 0.5)}, "bounds: expected inputs within")],
)
def test_bad_numbers_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        universal_triggers(linear(), plane(), **options)


def test_what_is_no_classifier_of_inputs_is_refused() -> None:
    with pytest.raises(ValueError, match="valid: a universal change expects inputs of floating point"):
        universal_triggers(linear(), (torch.ones(4, 2, dtype=torch.long), torch.arange(4) % 3))
    with pytest.raises(ValueError, match="task: expected one output per class"):
        universal_triggers(Task(logistic_regression((2,), 1).double().eval()), plane())
    with pytest.raises(ValueError, match="held-out inputs are of class 1"):
        universal_triggers(linear(), (torch.rand(4, 2, dtype=torch.float64), torch.ones(4, dtype=torch.long)))
