"""models.py: ready models, and the user's own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from robust_if.models import MODELS, build
from unchanged import untouched


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 9, 12)])
@pytest.mark.parametrize("name", MODELS)
def test_models_map_inputs_to_logits_in_evaluation_mode(name: str, shape: tuple[int, ...]) -> None:
    model = build(name, shape, 5)
    assert not any(module.training for module in model.modules())
    assert model(torch.randn(2, *shape)).shape == (2, 5)


@pytest.mark.parametrize("name", ["logistic-regression", "mlp"])
@pytest.mark.parametrize("shape", [(4,), (2, 3)])
def test_flat_models_take_inputs_of_any_shape(name: str, shape: tuple[int, ...]) -> None:
    assert build(name, shape, 2)(torch.randn(3, *shape)).shape == (3, 2)


def test_parameters_come_from_the_seed_and_the_global_random_state_stays() -> None:
    with untouched(nn.Identity()):
        first, again, other = (build("mlp", (4,), 2, seed=seed)[1].weight for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("name", ["cnn", "resnet18"])
@pytest.mark.parametrize("shape", [(4,), (1, 3, 3), (2, 1, 8, 8)])
def test_image_models_refuse_inputs_that_are_no_images(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"model: this one takes images of shape \(channels, height, width\), at least \d x \d, got inputs of shape"):
        build(name, shape, 2)


def test_the_users_model_is_found_by_module_and_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine_found.py").write_text("from torch import nn\n\ndef model(shape, classes):\n    return nn.Linear(shape[0], classes)\n")
    monkeypatch.chdir(tmp_path)
    assert build("mine_found:model", (4,), 3).out_features == 3


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("transformer", "model: unknown name 'transformer'; expected one of logistic-regression, mlp, cnn, resnet18, or module:function"),
        ("not_there:model", "model: cannot import 'not_there:model': No module named 'not_there'"),
        ("mine:absent", "model: cannot import 'mine:absent': module 'mine' has no attribute 'absent'"),
        ("mine:number", "model: mine:number returned int, expected a torch.nn.Module"),
        ("mine_broken:model", "model: cannot import 'mine_broken:model': No module named 'absent_dependency'"),
    ],
)
def test_a_model_that_cannot_be_made_is_refused(name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text("def number(shape, classes):\n    return 1\n")
    (tmp_path / "mine_broken.py").write_text("import absent_dependency\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        build(name, (4,), 2)
