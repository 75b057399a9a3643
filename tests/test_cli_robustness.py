"""cli.py: robustness, of a model that is trained and of one that is given, on images and tables."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn.datasets import load_digits

from robust_if.commands import options as shared
from robust_if.evaluations import robustness_files
from robust_if.evaluations.robustness import CLEAN
from test_cli import invoke

MASKED = """
import torch
from torch import nn

class Rounded(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner((2 * x).round() / 2 if not self.training else x)

def rounded(shape, classes):
    return Rounded(nn.Sequential(nn.Flatten(), nn.Linear(int(torch.Size(shape).numel()), 32), nn.ReLU(), nn.Linear(32, classes)))
"""


def people(seed: int, n: int) -> pd.DataFrame:
    """Two classes that lie along three columns of numbers, one of them of whole numbers, and a category that says nothing."""
    draw = np.random.default_rng(seed)
    y = draw.permutation(np.arange(n) % 2)
    frame = pd.DataFrame(1.5 * y[:, None] + draw.normal(size=(n, 2)), columns=["income", "debt"])
    frame["age"] = (40 + 10 * y + 8 * draw.normal(size=n)).round().astype(int)
    frame["town"] = np.array(["A", "B", "C"])[draw.integers(3, size=n)]
    return frame.assign(id=[f"p{seed}-{i}" for i in range(n)], label=np.where(y, "good", "bad"))


@pytest.fixture
def table(tmp_path: Path) -> dict[str, Path]:
    paths = {name: tmp_path / f"{name}.csv" for name in ("data", "test")}
    for seed, (path, n) in enumerate(zip(paths.values(), (200, 60), strict=True)):
        people(seed, n).to_csv(path, index=False)
    return paths


@pytest.fixture
def images(tmp_path: Path) -> dict[str, Path]:
    pixels, labels = load_digits(return_X_y=True)
    paths = {"data": tmp_path / "digits.npz"}
    np.savez(paths["data"], images=(pixels[:400] * 255 / 16).astype(np.uint8).reshape(-1, 8, 8), labels=labels[:400])
    return paths


def command(paths: dict[str, Path], out: Path, *more: object, **options: object) -> list[object]:
    given = {**paths, "out": out, "eps": 0.2, "preset": "lite", "model": "logistic-regression", "epochs": 15, "samples": 40, "seed": 1}
    given |= {key.replace("_", "-"): value for key, value in options.items()}
    return ["robustness", *(each for key, value in given.items() if value is not None for each in (f"--{key}", value)), *more]


def measured(*args: object) -> dict[str, Any]:
    result = invoke(*args, "--json")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.count("\n") == 1
    found: dict[str, Any] = json.loads(result.stdout, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    return found


def essence(result: dict[str, Any]) -> dict[str, Any]:
    """What of a result does not depend on the clock, the folder or the command."""
    kept = {key: value for key, value in result.items() if key not in ("files", "command", "seconds", "warnings", "model", "n_train")}
    return {**kept, "members": [{key: value for key, value in each.items() if key != "seconds"} for each in result["members"]]}


def test_the_files_say_what_is_printed(table: dict[str, Path], tmp_path: Path) -> None:
    found = measured(*command(table, out := tmp_path / "out"))
    assert found == json.loads((out / "result.json").read_text())
    assert sorted(path.name for path in out.iterdir()) == ["manifest.json", "model.safetensors", "result.json", "samples.parquet"]
    samples = pd.read_parquet(out / "samples.parquet")
    assert list(samples) == ["id", "label", "predicted", "right", "robust", "broken_by"] and len(samples) == found["n"] == 40
    assert np.array_equal(samples["right"], samples["label"] == samples["predicted"]) and found["clean_accuracy"] == samples["right"].mean()
    assert np.array_equal(samples["robust"], samples["broken_by"] == "") and found["accuracy"] == samples["robust"].mean()
    assert set(samples["broken_by"]) <= {"", CLEAN, *(each["name"] for each in found["members"])} and samples["id"].str.startswith("p1-").all()
    assert 0.3 < found["accuracy"] < found["clean_accuracy"] < 1 and found["believable"] and found["n_train"] == 180 and found["n_test"] == 60
    assert "0.2 standard deviations" in found["budget"] and any("40 of 60 test samples" in text for text in found["warnings"])


def test_the_same_command_finds_the_finished_run_and_another_is_refused(table: dict[str, Path], tmp_path: Path, monkeypatch: Any) -> None:
    first = measured(*command(table, tmp_path / "out"))
    monkeypatch.setattr(robustness_files, "fit", lambda *_, **__: pytest.fail("it was trained"))
    assert measured(*command(table, tmp_path / "out")) == first
    other = invoke(*command(table, tmp_path / "out", eps=0.3))
    assert other.exit_code == 2 and "is not empty" in other.stderr and json.loads((tmp_path / "out" / "result.json").read_text()) == first
    monkeypatch.undo()
    assert measured(*command(table, tmp_path / "out", "--overwrite", eps=0.3))["accuracy"] <= first["accuracy"]


def test_columns_that_cannot_change_help(table: dict[str, Path], tmp_path: Path) -> None:
    free, held = (
        measured(*command(table, tmp_path / name, eps=0.5, immutable=columns)) for name, columns in (("free", None), ("held", "income,debt"))
    )
    assert free["accuracy"] < held["accuracy"] < held["clean_accuracy"] == free["clean_accuracy"]
    assert held["immutable"] == ["income", "debt"] and "1 of 6 features may move" in held["threat"]


def test_a_model_that_is_given_is_not_trained(table: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = measured(*command(table, tmp_path / "trained"))
    monkeypatch.setattr(robustness_files, "fit", lambda *_, **__: pytest.fail("it was trained"))
    given = measured(*command(table, tmp_path / "given", checkpoint=tmp_path / "trained" / "model.safetensors", epochs=None))
    assert essence(given) == essence(first) and given["n_train"] is None
    assert "model" not in given["files"] and "model.safetensors was trained elsewhere" in given["warnings"][0]


def test_an_interrupted_run_goes_on(table: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = measured(*command(table, tmp_path / "whole"))

    def stopping(items: Iterable[Any], description: str) -> Iterable[Any]:
        if description == "1-apgd-t":
            raise KeyboardInterrupt
        yield from items

    monkeypatch.setattr(shared, "progress", stopping)
    stopped = invoke(*command(table, tmp_path / "out"))
    assert stopped.exit_code == 1 and "goes on from there" in stopped.stderr and not (tmp_path / "out" / "result.json").exists()
    seen: list[tuple[str, int]] = []

    def watching(items: Iterable[Any], description: str) -> Iterable[Any]:
        items = list(items)
        seen.append((description, len(items)))
        return items

    monkeypatch.setattr(shared, "progress", watching)
    assert essence(measured(*command(table, tmp_path / "out"))) == essence(whole)
    assert seen[0] == ("train", 0)  # no epoch is left


def test_images_are_attacked_within_their_pixel_range(images: dict[str, Path], tmp_path: Path) -> None:
    result = invoke(*command(images, tmp_path / "out", eps=0.05, samples=0, test_fraction=0.1, model="mlp", epochs=10))
    assert result.exit_code == 0, result.stderr
    for text in (
        "none (clean)",
        "apgd-ce",
        "apgd-t",
        "square",
        "robust",
        "interval",
        "seconds",
        "black box",
        "whole range",
        "No check speaks against",
    ):
        assert text in result.stdout, text
    found = json.loads((tmp_path / "out" / "result.json").read_text())
    assert "L∞ radius 0.05 of the pixel range" in found["threat"] and "radius 0.05 of the pixel" in " ".join(result.stdout.split())
    assert found["n"] == found["n_test"] == 36 and 0 < found["accuracy"] < found["clean_accuracy"]
    assert f"{100 * found['accuracy']:.1f}" in result.stdout and "test data were split off" in result.stderr


def test_a_model_that_hides_its_gradients_is_not_believed(images: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "masked.py").write_text(MASKED)
    monkeypatch.chdir(tmp_path)
    given = command(images, tmp_path / "out", eps=0.05, test_fraction=0.1, model="masked:rounded", epochs=10)
    result = invoke(*given)
    assert result.exit_code == 0, result.stderr
    assert "NOT TO BE BELIEVED" in result.stdout and "DO NOT BELIEVE this number" in result.stderr and "NO" in result.stdout
    found = json.loads((tmp_path / "out" / "result.json").read_text())
    assert found["believable"] is False and {"gradients", "whole range"} <= {each["name"] for each in found["checks"] if each["passed"] is False}
    unchecked = invoke(*given, "--no-checks", "--overwrite")
    assert "Unchecked" in unchecked.stdout and "black box" not in unchecked.stdout


@pytest.mark.parametrize(
    ("message", "wrong"),
    [
        ("eps: expected a positive number, got -1.0", {"eps": -1}),
        ("there is no column 'sex'", {"immutable": "sex"}),
        ("samples: expected at least 1, got -5", {"samples": -5}),
        ("whole numbers", {"norm": "l2"}),
        ("unknown name 'forest'", {"model": "forest"}),
        ("model.safetensors", {"checkpoint": "model.safetensors"}),
        ("test-fraction", {"test": None, "test_fraction": 2}),
    ],
)
def test_errors_come_before_any_training(
    message: str, wrong: dict[str, Any], table: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(robustness_files, "fit", lambda *_, **__: pytest.fail("it was trained"))
    result = invoke(*command(table, tmp_path / "out", **wrong))
    assert result.exit_code == 2 and message in " ".join(result.stderr.split()), result.stderr
    assert not (tmp_path / "out").exists()


def test_the_data_are_not_overwritten(table: dict[str, Path], tmp_path: Path) -> None:
    result = invoke(*command(table, tmp_path, "--overwrite"))
    assert result.exit_code == 2 and "holds the data" in result.stderr and all(path.is_file() for path in table.values())
