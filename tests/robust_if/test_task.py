"""task.py: a model with its per-sample loss."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cases import NAMES, TRAIN, case
from robust_if import Task
from robust_if.task import batch_length
from unchanged import snapshot, untouched


@pytest.mark.parametrize("name", NAMES)
def test_losses_are_those_of_the_module_itself(name: str) -> None:
    c = case(name)
    batch = c.train.batch(slice(None))
    with torch.no_grad():
        assert torch.allclose(c.task.losses(c.task.params(), batch), c.task.loss(c.task.forward(c.task.model, batch), batch), rtol=1e-12)


def test_a_model_in_training_mode_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model: expected a module in evaluation mode, got one in training mode \(Linear\); call model.eval\(\)"):
        Task(nn.Linear(2, 2))
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout()).eval()
    model[1].train()
    with pytest.raises(ValueError, match=r"got one in training mode \(1\)"):
        Task(model)


@pytest.mark.parametrize("patterns", ["fc.*", ("5.*", "fc.*")])
def test_a_pattern_that_matches_nothing_is_refused(patterns: str | tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=r"parameters: the pattern 'fc.\*' matches none of the model's 6 parameters, such as \['1.weight'"):
        Task(case("mlp").task.model, parameters=patterns)


@pytest.mark.parametrize("reduction", ["mean", "sum", "outputs"])
def test_a_loss_that_is_not_one_value_per_sample_is_refused(reduction: str) -> None:
    c = case("mlp")
    losses = {"mean": lambda outputs, batch: outputs.mean(), "sum": lambda outputs, batch: outputs.sum(), "outputs": lambda outputs, batch: outputs}
    task = Task(c.task.model, losses[reduction])
    with pytest.raises(ValueError, match=r"loss: expected one loss per sample, shape \(13,\), got shape"):
        task.losses(task.params(), c.train.batch(slice(None)))


def test_a_copy_at_another_state_leaves_the_model_alone() -> None:
    c = case("cnn")
    state = {name: value + 1 for name, value in c.task.model.state_dict().items()}
    with untouched(c.task.model):
        moved = c.task.at(state)
    assert all(torch.equal(moved.model.state_dict()[name], value) for name, value in state.items())


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"head.weight": torch.zeros(1)}, "checkpoint: it holds 'head.weight', which the model does not have"),
        ({"5.bias": torch.zeros(4)}, r"checkpoint: '5.bias' has shape \(4,\), the model expects \(3,\)"),
    ],
)
def test_a_state_that_does_not_fit_is_refused(entry: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        case("mlp").task.at(entry)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "bare"])
def test_a_reset_draws_all_parameters_from_the_seed_and_leaves_the_model_alone(name: str) -> None:
    c = case(name)
    with untouched(c.task.model):
        first, again, other = (c.task.reset(seed) for seed in (0, 0, 1))
    assert snapshot(first.model)[0] == snapshot(again.model)[0] != snapshot(other.model)[0]
    drawn = [key for key, value in first.params().items() if torch.equal(value, c.task.params()[key])]
    assert all("norm" in key or "flat" in key or "group" in key or "bias" in key or "before" in key or "after" in key for key in drawn), drawn


def test_a_reset_names_the_module_that_cannot_draw() -> None:
    with pytest.raises(ValueError, match=r"model: Bare has parameters but no reset_parameters\(\)"):
        case("bare").task.reset(0)


def test_the_length_of_a_batch_is_that_of_its_first_tensor() -> None:
    assert batch_length({"a": "text", "b": [torch.zeros(TRAIN, 2)]}) == TRAIN
    with pytest.raises(ValueError, match="batch: expected at least one tensor, got tuple"):
        batch_length(("text", 1))


def test_a_reset_draws_the_parameters_that_count_and_leaves_the_backbone() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 3)).eval()
    fresh = Task(model, parameters="2.*").reset(1).model.state_dict()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, fresh[name])}
    assert changed == {"2.weight", "2.bias"}
    everything = Task(model).reset(1).model.state_dict()
    assert not torch.equal(everything["0.weight"], model.state_dict()["0.weight"])
    assert torch.equal(everything["0.weight"], Task(model).reset(1).model.state_dict()["0.weight"])
