"""checkpoints.py: states of a model on disk."""

from __future__ import annotations

import os
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from cases import NAMES, case
from robust_if import Checkpoint, Recipe, load_checkpoint, train
from robust_if.checkpoints import FIRST, SECOND, STEPS, Moments


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_checkpoint_comes_back_bit_identically(name: str, tmp_path: Path) -> None:
    model = case(name).task.model
    Checkpoint.of(model, 0.1).save(tmp_path / "model.safetensors")
    got = load_checkpoint(tmp_path / "model.safetensors", model)
    assert got.weight == 0.1 and set(got.state) == set(model.state_dict())
    assert all(torch.equal(got.state[key], value) and got.state[key].dtype == value.dtype for key, value in model.state_dict().items())
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_checkpoint_is_a_copy() -> None:
    model = case("logistic").task.model
    kept = Checkpoint.of(model)
    with torch.no_grad():
        model[1].weight.zero_()  # type: ignore[index]
    assert kept.state["1.weight"].any()


class Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("write", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))], ids=["torch.save", "pickle"])
def test_a_pickled_checkpoint_is_refused_and_never_opened(write: Any, tmp_path: Path) -> None:
    write({"1.weight": Trap(tmp_path / "sprung")}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match="is not a safetensors file .* Pickled checkpoints can run code when they are opened and are not read"):
        load_checkpoint(tmp_path / "model.pt")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("content", [b"", b"x", b"\0" * 100])
def test_a_broken_file_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="is not a safetensors file"):
        load_checkpoint(tmp_path / "model.safetensors")


def test_a_checkpoint_that_does_not_fit_the_model_is_refused(tmp_path: Path) -> None:
    model, path = case("mlp").task.model, tmp_path / "model.safetensors"
    whole = model.state_dict()
    for change, message in {
        "shape": r"'5.bias' has shape \(4,\), the model expects \(3,\)",
        "extra": "it holds 'head.bias', which the model does not have",
        "missing": "lacks '1.weight' and 1 more of the model's parameters",
        "nan": "holds values that are not finite; the training run diverged",
    }.items():
        state = {
            "shape": {**whole, "5.bias": torch.zeros(4)},
            "extra": {**whole, "head.bias": torch.zeros(4)},
            "missing": {key: value for key, value in whole.items() if not key.startswith("1.")},
            "nan": {**whole, "5.bias": torch.full((3,), torch.nan)},
        }[change]
        save_file(state, path)
        with pytest.raises(ValueError, match=message):
            load_checkpoint(path, model)


def test_a_part_of_the_parameters_will_do_for_a_task_that_counts_no_others(tmp_path: Path) -> None:
    task, path = case("mlp").task, tmp_path / "part.safetensors"
    part = replace(task, parameters="5.*")
    save_file(part.params(), path, metadata={"weight": "0.5"})
    assert load_checkpoint(path, part).state.keys() == {"5.weight", "5.bias"}
    assert load_checkpoint(path, part).weight == 0.5
    for whole in (task, task.model):
        with pytest.raises(ValueError, match="lacks '1.weight' and 3 more of the model's parameters"):
            load_checkpoint(path, whole)
    with pytest.raises(ValueError, match="lacks '1.weight' and 1 more"):
        load_checkpoint(path, replace(task, parameters=("1.*", "5.*")))


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="checkpoint: there is no file .*model.safetensors"):
        load_checkpoint(tmp_path / "model.safetensors")


# Moments of the optimiser

ADAM = Recipe(epochs=2, optimizer="adamw", batch_size=5)


def with_moments(name: str = "mlp") -> Checkpoint:
    c = case(name)
    return train(c.task, c.train, ADAM)[-1]


@pytest.mark.parametrize("name", NAMES)
def test_moments_come_back_bit_identically(name: str, tmp_path: Path) -> None:
    kept = with_moments(name)
    kept.save(tmp_path / "model.safetensors")
    got = load_checkpoint(tmp_path / "model.safetensors", case(name).task.model)
    assert kept.moments is not None and got.moments is not None
    assert got.state.keys() == kept.state.keys() and (got.weight, got.moments.steps) == (kept.weight, kept.moments.steps)
    for before, after in ((kept.moments.first, got.moments.first), (kept.moments.second, got.moments.second)):
        assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


def test_equal_checkpoints_give_equal_bytes(tmp_path: Path) -> None:
    for name in ("first", "second"):
        with_moments().save(tmp_path / name)
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()


class Odd(torch.nn.Module):
    """Names that look like those of the moments."""

    def __init__(self) -> None:
        super().__init__()
        self.adam = torch.nn.ModuleDict({"first": torch.nn.Linear(2, 2), "/": torch.nn.Linear(2, 2)})
        self.steps = torch.nn.Parameter(torch.zeros(3))


def test_names_of_a_model_never_clash_with_those_of_moments(tmp_path: Path) -> None:
    model = Odd()
    params = dict(model.named_parameters())
    optimizer = torch.optim.Adam(params.values())
    torch.stack([value.square().sum() for value in params.values()]).sum().backward()
    optimizer.step()
    kept = Checkpoint.of(model, 1.0, Moments.of(optimizer, params))
    kept.save(tmp_path / "model.safetensors")
    got = load_checkpoint(tmp_path / "model.safetensors", model)
    assert set(got.state) == set(model.state_dict())
    assert got.moments is not None and set(got.moments.second) == set(params)


def test_other_optimisers_have_no_moments() -> None:
    model = Odd()
    params = dict(model.named_parameters())
    assert Moments.of(torch.optim.SGD(params.values(), lr=0.1, momentum=0.9), params) is None
    assert Moments.of(torch.optim.AdamW(params.values()), params) is None


def nan(tensors: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    return {**tensors, name: torch.full_like(tensors[name], torch.nan)}


WRONG: dict[str, Any] = {
    "one moment only": (lambda s: {key: value for key, value in s.items() if key != SECOND + "5.bias"}, "only one of the two moments of '5.bias'"),
    "shape": (lambda s: {**s, FIRST + "5.bias": torch.zeros(4)}, r"a moment of '5.bias' has shape \(4,\)"),
    "integers": (lambda s: {**s, FIRST + "5.bias": torch.zeros(3).int()}, "a moment of '5.bias' has shape .* torch.int32"),
    "unknown parameter": (
        lambda s: {**s, FIRST + "9.bias": torch.zeros(4), SECOND + "9.bias": torch.zeros(4)}, "a moment of '9.bias' .* the parameter has shape none",
    ),
    "negative": (lambda s: {**s, SECOND + "5.bias": -torch.ones(3)}, "the second moment of '5.bias' is negative"),
    "nan": (lambda s: nan(s, FIRST + "5.bias"), "holds values that are not finite"),
    "no steps": (lambda s: {key: value for key, value in s.items() if key != STEPS}, ".adam.steps is not a number of steps"),
    "negative steps": (lambda s: {**s, STEPS: torch.tensor(-1)}, ".adam.steps is not a number of steps"),
    "steps of no number": (lambda s: {**s, STEPS: torch.tensor([])}, ".adam.steps is not a number of steps"),
    "fractional steps": (lambda s: {**s, STEPS: torch.tensor(0.5)}, ".adam.steps is not a number of steps"),
    "something else": (lambda s: {**s, ".other": torch.zeros(1)}, "it holds '.other', which is neither a model's nor Adam's"),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize("known", [True, False])
def test_moments_that_make_no_sense_are_refused(kind: str, known: bool, tmp_path: Path) -> None:
    change, message = WRONG[kind]
    save_file(change(with_moments().tensors()), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="checkpoint: .*" + message):
        load_checkpoint(tmp_path / "model.safetensors", case("mlp").task.model if known else None)


@pytest.mark.parametrize("weight", ["x", "nan", "inf", "", "1e999"])
def test_a_weight_that_is_no_number_is_refused(weight: str, tmp_path: Path) -> None:
    save_file(case("mlp").task.model.state_dict(), tmp_path / "model.safetensors", metadata={"weight": weight})
    with pytest.raises(ValueError, match="has the weight .*, expected a finite number"):
        load_checkpoint(tmp_path / "model.safetensors")


def test_a_checkpoint_with_other_moments_is_another_checkpoint() -> None:
    kept = with_moments()
    assert kept.moments is not None
    without = Checkpoint.from_tensors(replace(kept, moments=None).tensors(), 0.5)
    assert without.moments is None and without.weight == 0.5 and without.state.keys() == kept.state.keys()
