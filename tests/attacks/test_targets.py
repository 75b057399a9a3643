"""attacks/targets.py: the loss under attack as a target."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.data import Dataset

from cases import blobs, case, relative
from oracles import flat, full_gradient
from robust_if import Plain, Samples, Task, Tuning, Utility
from robust_if.attacks.targets import AdversarialLoss
from robust_if.models import logistic_regression

EPS = 0.1


def linear(n: int = 20) -> tuple[Task, Samples, Tensor]:
    """A binary logistic model, data, and for every sample the direction (n, 2) in which its loss falls: its class's weights minus the other's."""
    task, (data, _) = Task(logistic_regression((2,), 2).double().eval()), blobs(n, 0)
    weight = task.params()["1.weight"]
    return task, data, torch.where(data.labels[:, None] == 1, weight[1] - weight[0], weight[0] - weight[1])


def inputs(data: Samples) -> Tensor:
    return data.batch(slice(None))[0]


@pytest.mark.parametrize("steps", [1, 3, 10])
def test_a_linear_model_under_attack_has_its_closed_form(steps: int) -> None:
    task, data, falls = linear()
    bias = task.params()["1.bias"]
    margin = (falls * inputs(data)).sum(1) + torch.where(data.labels == 1, bias[1] - bias[0], bias[0] - bias[1])
    expected = F.softplus(-(margin - EPS * falls.abs().sum(1))).mean()
    target = AdversarialLoss(data, eps=EPS, steps=steps)
    assert relative(target.value(task, task.params()), expected) <= 1e-12
    worst = target.attack(task, task.params(), data.batch(slice(None)))
    assert relative(worst, inputs(data) - EPS * falls.sign()) <= 1e-12
    assert target.name == "adversarial"


def test_bounds_cut_the_worst_point_off() -> None:
    task, data, falls = linear()
    low, high = float(inputs(data).min()), float(inputs(data).max())
    got = AdversarialLoss(data, eps=2.0, bounds=(low, high)).attack(task, task.params(), data.batch(slice(None)))
    expected = (inputs(data) - 2.0 * falls.sign()).clamp(low, high)
    assert relative(got, expected) <= 1e-12 and (expected == low).any() and (expected == high).any()


def test_features_may_have_their_own_radius_and_bounds_or_stay() -> None:
    task, data, falls = linear()
    eps, low, high = torch.tensor([0.2, 1.5]).double(), inputs(data).amin(0), inputs(data).amax(0)
    batch, params = data.batch(slice(None)), task.params()
    got = AdversarialLoss(data, eps=eps, bounds=(low, high)).attack(task, params, batch)
    assert relative(got, (inputs(data) - eps * falls.sign()).maximum(low).minimum(high)) <= 1e-12
    fixed = AdversarialLoss(data, eps=1.5, mutable=torch.tensor([False, True])).attack(task, params, batch)
    assert torch.equal(fixed[:, 0], inputs(data)[:, 0]) and relative(fixed[:, 1], (inputs(data) - 1.5 * falls.sign())[:, 1]) <= 1e-12
    assert torch.equal(fixed, AdversarialLoss(data, eps=torch.tensor([0, 1.5])).attack(task, params, batch))


@pytest.mark.parametrize("name", ["mlp", "cnn", "bare"])
def test_the_attack_stays_in_the_ball_and_never_lowers_a_loss(name: str) -> None:
    c = case(name)
    batch, params = c.valid.batch(slice(None)), c.task.params()
    low, high = float(batch[0].min()), float(batch[0].max())
    target = AdversarialLoss(c.valid, eps=EPS, bounds=(low, high))
    point = target.attack(c.task, params, batch)
    assert (point - batch[0]).abs().max() <= EPS * (1 + 1e-12) and point.min() >= low and point.max() <= high
    attacked, clean = c.task.losses(params, (point, batch[1])), c.task.losses(params, batch)
    assert (attacked >= clean).all() and attacked.mean() > clean.mean() + 1e-3
    assert relative(target.value(c.task, params), attacked.mean().detach()) <= 1e-12


def test_of_all_points_met_the_worst_counts() -> None:
    def peak(outputs: Tensor, batch: Any) -> Tensor:
        return torch.exp(-((outputs[:, 0] - batch[1]) ** 2))

    task = Task(nn.Linear(1, 1, bias=False).double().eval(), peak).at({"weight": torch.ones(1, 1).double()})
    data = Samples((torch.zeros(3, 1).double(), torch.tensor([0.1, 0.45, 5.0]).double()))
    # with steps of 0.3 the points met are 0 0.3 0 …, 0 0.3 0.6 0.3 …, 0 0.3 0.6 0.9 1.0
    points = AdversarialLoss(data, eps=1.0, steps=6, alpha=0.3).attack(task, task.params(), data.batch(slice(None)))
    assert points[0, 0] == 0 and points[1, 0].item() in (pytest.approx(0.3), pytest.approx(0.6)) and points[2, 0] == 1


@given(size=st.integers(1, 12), name=st.sampled_from(["mlp", "cnn"]))
def test_value_and_gradient_take_no_notice_of_the_batch_size(size: int, name: str) -> None:
    c = case(name)
    params = c.task.params()
    one, other = (AdversarialLoss(c.valid, eps=EPS, batch_size=b) for b in (size, 100))
    assert relative(one.value(c.task, params), other.value(c.task, params)) <= 1e-12
    assert relative(flat(one.gradient(c.task, params)), flat(other.gradient(c.task, params))) <= 1e-11


@pytest.mark.parametrize("name", ["logistic", "mlp", "cnn"])
def test_the_gradient_takes_the_attacked_points_as_fixed(name: str) -> None:
    c = case(name)
    target, params = AdversarialLoss(c.valid, eps=EPS, batch_size=4), c.task.params()
    x, y = c.valid.batch(slice(None))
    points = target.attack(c.task, params, (x, y))
    expected = full_gradient(lambda p: c.task.losses(p, (points, y)).mean(), params)
    assert relative(flat(target.gradient(c.task, params)), expected) <= 1e-12
    assert relative(full_gradient(lambda p: target.value(c.task, p), params), expected) <= 1e-12
    assert relative(flat(Utility(c.valid).gradient(c.task, params)), expected) > 1e-3


def test_the_attack_happens_at_the_parameters_given() -> None:
    task, data, falls = linear()
    turned = {name: -value for name, value in task.params().items()}
    points = AdversarialLoss(data, eps=EPS).attack(task, turned, data.batch(slice(None)))
    assert relative(points, inputs(data) + EPS * falls.sign()) <= 1e-12


def test_model_and_data_stay_as_they_were() -> None:
    c = case("cnn")
    state = {name: value.clone() for name, value in c.task.model.state_dict().items()}
    x = inputs(c.valid).clone()
    AdversarialLoss(c.valid, eps=EPS).gradient(c.task, c.task.params())
    assert all(torch.equal(value, state[name]) for name, value in c.task.model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in c.task.model.parameters()) and torch.equal(inputs(c.valid), x)


def test_single_precision_models_take_double_precision_data() -> None:
    single, double = case("mlp", torch.float32), case("mlp")
    low, high = 0.1, 0.9  # not numbers of single precision: the edges may differ by rounding
    x = torch.rand(9, 5).double().clamp(low, high).index_fill(0, torch.tensor([0]), low)
    data = Samples((x, double.valid.labels))
    values = [AdversarialLoss(data, eps=EPS, bounds=(low, high)).value(c.task, c.task.params()) for c in (single, double)]
    assert values[0].dtype == torch.float32 and relative(values[0].detach(), values[1].detach()) <= 1e-5


def test_under_no_grad_the_attack_is_the_same() -> None:
    c = case("mlp")
    target = AdversarialLoss(c.valid, eps=EPS)
    with torch.no_grad():
        value = target.value(c.task, c.task.params())
    assert not value.requires_grad and value == target.value(c.task, c.task.params())


class Pairs(Dataset[tuple[Tensor, Tensor]]):
    def __init__(self, data: Samples) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        x, y = self.data.batch(torch.tensor([i]))
        return x[0], y[0]


def test_a_map_style_data_set_gives_the_same() -> None:
    c = case("mlp")
    values = [AdversarialLoss(data, eps=EPS).value(c.task, c.task.params()) for data in (c.valid, Samples(Pairs(c.valid)))]
    assert values[0] == values[1]


def test_other_inputs_of_a_batch_reach_the_loss_untouched() -> None:
    c = case("mlp")
    weights = torch.rand(len(c.valid)).double()
    task = Task(c.task.model, lambda outputs, batch: batch[2] * F.cross_entropy(outputs, batch[1], reduction="none"))
    x, y = c.valid.batch(slice(None))
    target = AdversarialLoss(Samples((x, y, weights)), eps=EPS)
    points = AdversarialLoss(c.valid, eps=EPS).attack(c.task, c.task.params(), (x, y))
    assert relative(target.value(task, task.params()).detach(), (weights * c.task.losses(c.task.params(), (points, y))).mean().detach()) <= 1e-12


def test_a_minibatch_is_attacked_in_the_same_way_and_tuning_lowers_the_target() -> None:
    task, data, _ = linear(60)
    target = AdversarialLoss(data, eps=EPS, steps=3, alpha=0.05, bounds=(-9.0, 9.0))
    part = target.minibatch(7, torch.Generator().manual_seed(0))
    assert len(part.data) == 7 and (part.eps, part.steps, part.alpha, part.bounds) == (EPS, 3, 0.05, (-9.0, 9.0))
    both = Utility(data) + 0.5 * target
    tuned = Tuning(steps=30, lr=0.1, batch_size=20, flatness=Plain()).run(task, both)
    assert both.value(task, tuned) < both.value(task, task.params()) and both.name == "utility+0.5*adversarial"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eps": 0.0}, "eps: expected a positive number, .* got 0"),
        ({"eps": -1.0}, "eps: expected a positive number"),
        ({"eps": float("nan")}, "eps: expected a positive number"),
        ({"eps": 1.0, "alpha": 0.0}, "alpha: expected a positive number"),
        ({"eps": 1.0, "steps": 0}, "steps: expected at least 1, got 0"),
        ({"eps": 1.0, "bounds": (1.0, 0.0)}, r"bounds: expected \(low, high\)"),
        ({"eps": 1.0, "bounds": (0.0, 1.0)}, r"bounds: expected data within \(0.0, 1.0\), got 1.0687 in sample 0, feature \(0,\)"),
        ({"eps": torch.tensor([0.1, -0.1])}, "eps: expected a positive number"),
        ({"eps": torch.zeros(2)}, "eps: expected a positive number"),
        ({"eps": torch.ones(3)}, r"eps: .* broadcasts to the shape of one sample, \(2,\), got \(3,\)"),
        ({"eps": 1.0, "mutable": torch.tensor([True] * 3)}, r"mutable: .* broadcasts to the shape of one sample, \(2,\), got \(3,\)"),
        ({"eps": 1.0, "mutable": torch.tensor([False, False])}, "mutable: expected at least one feature that may move, got none"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdversarialLoss(blobs(10, 0)[0], **settings)


def test_inputs_that_cannot_be_moved_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expects inputs of floating point, got torch.int64"):
        AdversarialLoss(case("attention").valid, eps=EPS)
    with pytest.raises(ValueError, match=r"expects batches \(input, …\) .* got dict"):
        AdversarialLoss(case("regression").valid, eps=EPS)


def test_the_outlier_of_a_map_style_data_set_is_found_when_it_comes() -> None:
    c = case("mlp")
    x = torch.zeros(9, 5).double()
    x[8, 0] = 2
    target = AdversarialLoss(Samples(Pairs(Samples((x, c.valid.labels), np.arange(9)))), eps=EPS, bounds=(0.0, 1.0))
    with pytest.raises(ValueError, match="bounds: expected inputs within"):
        target.value(c.task, c.task.params())
