"""robust_if/features.py: the input of the linear layer that is called last."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from cases import CLASSES, CLASSIFIERS, case, relative
from robust_if import Task
from robust_if.features import penultimate
from unchanged import untouched


class Backwards(nn.Module):
    """The layer that is called last is defined first, and gets its input by name."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.body, self.idle = nn.Linear(4, 3), nn.Linear(5, 4), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(input=torch.tanh(self.body(x)))


class Sum(nn.Module):
    """Logits at every position, summed: (B, T, 5) to (B, 3)."""

    def __init__(self, axis: int = 1) -> None:
        super().__init__()
        self.axis, self.head = axis, nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x if self.axis else x.transpose(0, 1)).sum(self.axis)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_the_last_layer_makes_the_outputs_of_them(name: str) -> None:
    c = case(name)
    batch, head = c.valid.batch(slice(None)), [module for module in c.task.model.modules() if isinstance(module, nn.Linear)][-1]
    with untouched(c.task.model):
        found = penultimate(c.task, c.task.params(), batch)
    assert found.shape == (len(c.valid), head.in_features)
    assert relative(F.linear(found, head.weight, head.bias)[:, :CLASSES].detach(), c.task.outputs(c.task.params(), batch).detach()) <= 1e-12


def test_the_order_of_calls_decides_not_that_of_definitions() -> None:
    task, x = Task(Backwards().eval()), torch.randn(6, 5)
    expected = torch.tanh(task.model.get_submodule("body")(x))
    assert torch.equal(penultimate(task, task.params(), (x, None)), expected)


def test_they_are_those_at_the_parameters_given_and_differentiable_in_these_and_in_the_input() -> None:
    c = case("mlp")
    x, y = c.valid.batch(slice(None))
    params = {key: (2 * value).requires_grad_() for key, value in c.task.params().items()}
    x.requires_grad_()
    found = penultimate(c.task, params, (x, y))
    hidden = F.relu(F.linear(F.relu(F.linear(x, params["1.weight"], params["1.bias"])), params["3.weight"], params["3.bias"]))
    assert relative(found.detach(), hidden.detach()) <= 1e-12
    wanted = [x, params["1.weight"], params["3.bias"]]
    for got, expected in zip(torch.autograd.grad(found.square().sum(), wanted), torch.autograd.grad(hidden.square().sum(), wanted), strict=True):
        assert relative(got, expected) <= 1e-12 and expected.any()


def test_positions_are_averaged() -> None:
    task, x = Task(Sum().eval()), torch.randn(6, 4, 5)
    assert torch.equal(penultimate(task, task.params(), (x, None)), x.mean(1))


def test_another_layer_gives_its_output() -> None:
    c = case("cnn")
    batch = c.valid.batch(slice(None))
    expected = c.task.model.get_submodule("first")(batch[0]).mean((2, 3))
    assert relative(penultimate(c.task, c.task.params(), batch, layer="first").detach(), expected.detach()) <= 1e-12


def test_layers_that_do_not_serve_are_named() -> None:
    task, batch = Task(Backwards().eval()), (torch.randn(6, 5), None)
    with pytest.raises(ValueError, match="layer: the model has no module 'tail'; it has head, body, idle"):
        penultimate(task, task.params(), batch, layer="tail")
    with pytest.raises(ValueError, match="layer: the model does not call idle"):
        penultimate(task, task.params(), batch, layer="idle")
    with pytest.raises(ValueError, match="does not call any linear layer"):
        penultimate(Task(nn.Conv1d(1, 1, 1).eval()), {}, (torch.randn(3, 1, 4), None))
    with pytest.raises(ValueError, match=r"expected a tensor \(6, …\), one row per sample, got shape \(4, 6, 5\)"):
        penultimate(Task(Sum(0).eval()), {}, (torch.randn(6, 4, 5), None))
