"""previews.py: how one sample is shown."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from robust_if.evaluations.previews import preview, thumbnail
from robust_if.loading import read


def decoded(uri: str) -> Image.Image:
    head, _, data = uri.partition(",")
    assert head == "data:image/png;base64"
    image = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
    assert image.format == "PNG"
    return image


@pytest.mark.parametrize(("height", "width"), [(8, 8), (28, 28), (5, 9), (96, 96), (95, 10)])
def test_a_small_grey_image_is_enlarged_by_a_whole_factor(height: int, width: int) -> None:
    levels = np.random.default_rng(0).integers(0, 256, (height, width)).astype(np.uint8)
    got = decoded(thumbnail(levels[None].astype(np.float32) / 255))
    factor = 96 // max(height, width)
    assert got.mode == "L" and got.size == (width * factor, height * factor)
    assert np.array_equal(np.asarray(got), levels.repeat(factor, 0).repeat(factor, 1))


@pytest.mark.parametrize("channels", [3, 4])
def test_colours_stay_and_further_channels_are_not_shown(channels: int) -> None:
    levels = np.random.default_rng(1).integers(0, 256, (channels, 32, 32)).astype(np.uint8)
    got = decoded(thumbnail(levels.astype(np.float32) / 255))
    assert got.mode == "RGB" and got.size == (96, 96)
    assert np.array_equal(np.asarray(got), np.moveaxis(levels[:3], 0, -1).repeat(3, 0).repeat(3, 1))


def test_a_large_image_is_reduced_and_keeps_its_proportions() -> None:
    got = decoded(thumbnail(np.full((3, 200, 400), 0.5, dtype=np.float32)))
    assert got.size == (96, 48)
    assert np.abs(np.asarray(got).astype(int) - 128).max() <= 1


def test_values_out_of_range_do_not_wrap_around() -> None:
    got = np.asarray(decoded(thumbnail(np.array([[[-0.2, 1.3]]], dtype=np.float32))))
    assert sorted(set(got.ravel().tolist())) == [0, 255]


def dataset(tmp_path: Path, frame: pd.DataFrame) -> Any:
    frame.to_csv(tmp_path / "data.csv", index=False)
    return read(tmp_path / "data.csv")


def test_a_row_shows_every_column_and_missing_cells_as_such(tmp_path: Path) -> None:
    frame = pd.DataFrame({"id": ["a", "b"], "height": [1.5, None], "colour": [None, "red <b>"], "label": ["x", "y"]})
    data = dataset(tmp_path, frame)
    assert preview(data, 0) == {"image": None, "text": None, "row": {"height": "1.5", "colour": None}}
    assert preview(data, 1) == {"image": None, "text": None, "row": {"height": None, "colour": "red <b>"}}


def test_a_text_is_shown_whole(tmp_path: Path) -> None:
    texts = ["the film was good", "the film was bad,\nreally bad", "I do not know it", "nobody went there"]
    data = dataset(tmp_path, pd.DataFrame({"text": texts, "label": [1, 0, 1, 0]}))
    assert data.kind == "text"
    assert [preview(data, i) for i in range(4)] == [{"image": None, "row": None, "text": text} for text in texts]


def test_a_missing_text_is_empty(tmp_path: Path) -> None:
    texts = ["the film was good", None, "I do not know it", "nobody went there"]
    data = dataset(tmp_path, pd.DataFrame({"text": texts, "label": [1, 0, 1, 0]}))
    assert preview(data, 1) == {"image": None, "row": None, "text": ""}


def test_an_image_data_set_shows_images(tmp_path: Path) -> None:
    levels = np.random.default_rng(2).integers(0, 256, (4, 8, 8)).astype(np.uint8)
    np.savez(tmp_path / "data.npz", images=levels, labels=[0, 1, 0, 1])
    got = preview(read(tmp_path / "data.npz"), 2)
    assert got["row"] is None and got["text"] is None
    assert np.array_equal(np.asarray(decoded(got["image"])), levels[2].repeat(12, 0).repeat(12, 1))
