"""checkpoints.py: states of a model on disk."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from cases import NAMES, case
from robust_if import Checkpoint, load_checkpoint


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


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="checkpoint: there is no file .*model.safetensors"):
        load_checkpoint(tmp_path / "model.safetensors")
