"""attacks/linear.py: the closed-form attack on linear models."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from cases import blobs, case, relative
from robust_if import Task
from robust_if.attacks.evasion import Threat, WholeNumbers
from robust_if.attacks.linear import LinearAttack
from robust_if.fairness.logistic import Logistic
from robust_if.task import Batch
from unchanged import untouched


def linear(features: int, classes: int, bias: bool = True) -> Task:
    return Task(nn.Linear(features, classes, bias=bias).double().eval())


def batch(n: int = 30, features: int = 5, classes: int = 2) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(3)
    return torch.randn(n, features, generator=draw).double(), torch.randint(classes, (n,), generator=draw)


def predicted(task: Task, x: Tensor) -> Tensor:
    outputs = task.outputs(task.params(), (x,))
    return outputs.argmax(1) if outputs.ndim == 2 and outputs.shape[1] > 1 else (outputs.reshape(-1) > 0).long()


def one_logit(outputs: Tensor, rows: Batch) -> Tensor:
    return F.binary_cross_entropy_with_logits(outputs.reshape(-1), rows[1].to(outputs), reduction="none")


@pytest.mark.parametrize("outputs", ["two logits", "one logit", "one axis"])
@pytest.mark.parametrize("overshoot", [0.5, 1.3, 4.0])
def test_two_classes_have_the_published_formula(outputs: str, overshoot: float) -> None:
    x, y = batch()
    task = linear(5, 2 if outputs == "two logits" else 1)
    if outputs == "one axis":
        task = Task(task.model, one_logit, forward=lambda model, rows: model(rows[0])[:, 0])
    weight, bias = task.params()["weight"], task.params()["bias"]
    w, b = (weight[1] - weight[0], bias[1] - bias[0]) if outputs == "two logits" else (weight[0], bias[0])
    f = x @ w + b
    got = LinearAttack(overshoot=overshoot)(task, task.params(), (x, y))
    assert relative(got, x - overshoot * (f / w.square().sum())[:, None] * w) <= 1e-12
    assert relative(got @ w + b, (1 - overshoot) * f) <= 1e-12
    assert relative((got - x).norm(dim=1), overshoot * f.abs() / w.norm()) <= 1e-12


def test_accuracy_under_it_is_one_minus_the_clean_one() -> None:
    data, _ = blobs(60, 0, flipped=11)
    x, y = data.batch(slice(None))
    model = Logistic(x.numpy(), y.numpy(), 0.5).fit()
    points = LinearAttack()(model.task, model.task.params(), (x, y))
    clean, attacked = (float((predicted(model.task, each) == y).double().mean()) for each in (x, points))
    assert 0.5 < clean < 1 and attacked == pytest.approx(1 - clean, abs=1e-12)


def test_more_classes_move_to_the_nearest_boundary() -> None:
    x, y = batch(classes=4)
    task = linear(5, 4)
    weight, bias = task.params()["weight"], task.params()["bias"]
    logits = x @ weight.T + bias
    got = LinearAttack(overshoot=1 + 1e-6)(task, task.params(), (x, y))
    for i in range(len(x)):
        own = int(logits[i].argmax())
        to = {k: float((logits[i, own] - logits[i, k]) / (weight[k] - weight[own]).norm()) for k in range(4) if k != own}
        nearest = min(to, key=lambda k: to[k])
        assert abs(float((got[i] - x[i]).norm()) - to[nearest]) <= 1e-5 and int(predicted(task, got[i : i + 1])) == nearest


def test_labels_are_not_looked_at() -> None:
    x, y = batch(classes=3)
    task = linear(5, 3)
    points = [LinearAttack()(task, task.params(), given) for given in ((x, y), (x, (y + 1) % 3), (x,))]
    assert torch.equal(points[0], points[1]) and torch.equal(points[0], points[2])


def test_an_input_on_the_boundary_stays_and_so_does_one_without_a_slope() -> None:
    task = linear(2, 1, bias=False).at({"weight": torch.tensor([[1.0, -1.0]]).double()})
    x = torch.tensor([[2.0, 2.0], [1.0, 0.0]]).double()
    got = LinearAttack(overshoot=1.5)(task, task.params(), (x,))
    assert torch.equal(got[0], x[0]) and relative(got[1], torch.tensor([0.25, 0.75])) <= 1e-12
    still = task.at({"weight": torch.zeros(1, 2).double()})
    assert torch.equal(LinearAttack()(still, still.params(), (x,)), x)


def test_features_that_must_not_move_stay() -> None:
    x, y = batch()
    task, moves = linear(5, 2), torch.tensor([True, False, True, True, False])
    got = LinearAttack(Threat(math.inf, mutable=moves), overshoot=1.3)(task, task.params(), (x, y))
    w = (task.params()["weight"][1] - task.params()["weight"][0]) * moves
    f = task.outputs(task.params(), (x,)) @ torch.tensor([-1.0, 1.0]).double()
    assert torch.equal(got[:, ~moves], x[:, ~moves]) and relative(got, x - 1.3 * (f / w.square().sum())[:, None] * w) <= 1e-12


@given(size=st.integers(1, 9), name=st.sampled_from(["mlp", "cnn"]))
def test_other_models_take_one_step_of_deepfool_whatever_the_batch(size: int, name: str) -> None:
    c = case(name)
    rows, params, attack = c.valid.batch(slice(None)), c.task.params(), LinearAttack(overshoot=1.02)
    whole = attack(c.task, params, rows)
    parts = torch.cat([attack(c.task, params, tuple(each[k : k + size] for each in rows)) for k in range(0, len(whole), size)])
    assert whole.shape == rows[0].shape and not whole.requires_grad and relative(parts, whole) <= 1e-12
    leaf = rows[0][:1].clone().requires_grad_()
    logits = c.task.model(leaf)[0]
    own, found = int(logits.argmax()), []
    for k in [k for k in range(3) if k != own]:
        (slope,) = torch.autograd.grad(logits[k] - logits[own], leaf, retain_graph=True)
        found.append((float((logits[own] - logits[k]).detach() / slope.norm()), slope / slope.norm()))
    distance, direction = min(found, key=lambda each: each[0])
    assert relative(whole[:1], rows[0][:1] + 1.02 * distance * direction) <= 1e-10


def test_nothing_else_changes_and_types_are_those_of_the_parameters() -> None:
    single, double = case("cnn", torch.float32), case("cnn")
    attack = LinearAttack()
    with untouched(single.task.model), torch.no_grad():
        got = attack(single.task, single.task.params(), double.valid.batch(slice(None)))
    assert got.dtype == torch.float32
    assert relative(got, attack(double.task, double.task.params(), double.valid.batch(slice(None)))) <= 1e-4
    assert attack.name == "linear" and attack == LinearAttack() and repr(attack).endswith("overshoot=1.3)")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LinearAttack(overshoot=0.0), "overshoot: expected a positive number, got 0"),
        (lambda: LinearAttack(overshoot=math.nan), "overshoot: expected a positive number, got nan"),
        (lambda: LinearAttack(Threat(0.1)), "threat: the linear attack has no budget, bounds or projections"),
        (lambda: LinearAttack(Threat(math.inf, bounds=(0.0, 1.0))), "threat: the linear attack has no budget"),
        (lambda: LinearAttack(Threat(math.inf, project=(WholeNumbers(),))), "threat: the linear attack has no budget"),
    ],
)
def test_bad_settings_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_bad_inputs_and_models_are_refused() -> None:
    x, y = batch()
    task = linear(5, 2)
    for rows, message in [
        ({"features": x}, r"batch: an attack expects batches \(input, …\) .* got dict"),
        ((x.long(), y), "inputs: an attack expects inputs of floating point, got torch.int64"),
        ((x.log(), y), "inputs: expected finite numbers"),
    ]:
        with pytest.raises(ValueError, match=message):
            LinearAttack()(task, task.params(), rows)
    nowhere = Task(task.model, forward=lambda model, rows: model(rows[0].detach()))
    with pytest.raises(ValueError, match="model: its outputs do not depend on the inputs in a differentiable way"):
        LinearAttack()(nowhere, task.params(), (x, y))
    free = Task(task.model, forward=lambda model, rows: model(rows[0].detach()), parameters="bias")
    with pytest.raises(ValueError, match="model: its outputs do not depend on the inputs in a differentiable way"):
        LinearAttack()(free, free.params(), (x, y))
    broken = Task(task.model, forward=lambda model, rows: model(rows[0]) * math.nan)
    with pytest.raises(ValueError, match="model: its outputs are NaN at sample 0"):
        LinearAttack()(broken, task.params(), (x, y))
    with pytest.raises(ValueError, match="model: expected a classifier's logits"):
        LinearAttack()(Task(task.model, forward=lambda model, rows: model(rows[0])[:, None]), task.params(), (x, y))
