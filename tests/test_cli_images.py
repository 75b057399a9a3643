"""robust-if trace-images: a diffusion model in a folder, traced from the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from robust_if.pairs import pairwise
from robust_if.sweep import Sweep
from robust_if.task import Task
from test_cli import invoke

diffusers = pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny denoiser, twelve training images, and two of these again as queries."""
    folder = tmp_path_factory.mktemp("images")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = diffusers.UNet2DModel(
            sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8,), norm_num_groups=4, layers_per_block=1, num_class_embeds=2,
            down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), attention_head_dim=4,
        )  # fmt: skip
    model.save_pretrained(folder / "model")
    diffusers.DDPMScheduler(num_train_timesteps=100).save_pretrained(folder / "model" / "scheduler")
    images = np.random.default_rng(0).random((12, 1, 8, 8)).astype(np.float32)
    labels = np.array(["one", "two"])[np.arange(12) % 2]
    np.savez(folder / "data.npz", x=images, y=labels)
    np.savez(folder / "queries.npz", x=images[[3, 8]], y=labels[[3, 8]])
    np.savez(folder / "strange.npz", x=images[:2], y=np.array(["one", "three"]))
    np.savez(folder / "large.npz", x=np.zeros((2, 1, 9, 9), np.float32), y=labels[:2])
    return {path.stem: path for path in folder.iterdir()}


def trace(made: dict[str, Path], out: Path, **given: object) -> Any:
    options = {"model": made["model"], "queries": made["queries"], "out": out, **given}
    return invoke("trace-images", made["data"], *(each for key, value in options.items() for each in (f"--{key}", value)))


def test_an_image_that_was_trained_on_finds_itself(made: dict[str, Path], tmp_path: Path) -> None:
    found = trace(made, tmp_path / "out", estimator="ip-cosine", top=3)
    assert found.exit_code == 0, found.stderr
    table = pd.read_csv(tmp_path / "out" / "influential.csv")
    first = table[(table["rank"] == 1) & (table["direction"] == "behind")]
    assert first["sample"].tolist() == [3, 8] and first["score"].to_numpy() == pytest.approx(-1, abs=1e-4)
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("data:image/png") == 2 + len(table) and "The training images behind 2\N{NO-BREAK SPACE}images" in page and "<script" not in page
    assert [each["label"] for each in json.loads((tmp_path / "out" / "result.json").read_text())["queries"]] == ["two", "one"]


def test_the_matrix_is_that_of_the_task(made: dict[str, Path], tmp_path: Path) -> None:
    assert trace(made, tmp_path / "out", estimator="ip", seed=4).exit_code == 0
    model = diffusers.UNet2DModel.from_pretrained(made["model"]).eval()
    task = Task.from_diffusers(model, diffusers.DDPMScheduler(num_train_timesteps=100), seed=4)
    with np.load(made["data"]) as kept:
        x, y = torch.from_numpy(kept["x"]) * 2 - 1, torch.arange(12) % 2
    expected = pairwise(task, (x, y), (x[[3, 8]], y[[3, 8]]), sweep=Sweep(batch_size=16))
    np.testing.assert_allclose(np.load(tmp_path / "out" / "matrix.npy"), expected, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"model": "nowhere"}, "nowhere holds no config.json; expected a local folder"),
        ({"queries": "strange"}, "queries: the class 'three' does not occur in the data, which have ['one', 'two']"),
        ({"queries": "large"}, "queries: the model takes images of shape (1, 8, 8), got (1, 9, 9)"),
        ({"estimator": "loss"}, "estimator: expected one of ip, ip-cosine, ip-layer"),
        ({"top": 0}, "top: expected at least 1, got 0"),
    ],
)
def test_a_wrong_option_is_one_line_and_leaves_nothing(made: dict[str, Path], tmp_path: Path, given: dict[str, Any], message: str) -> None:
    found = trace(made, tmp_path / "out", **{key: made.get(str(value), value) for key, value in given.items()})
    assert found.exit_code == 2 and message in found.stderr and not (tmp_path / "out").exists()
