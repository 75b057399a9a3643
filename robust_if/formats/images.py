"""Images as one array: float32 of shape (n, channels, height, width), in [0, 1]."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

CHANNELS = {1, 3, 4}
MODES = ("L", "RGB", "RGBA")


def from_array(values: NDArray[Any], name: str) -> NDArray[np.float32]:
    """Images (n, H, W), (n, H, W, C) or (n, C, H, W), integers 0 to 255 or floats in [0, 1], as float32 (n, C, H, W).

    Raises:
        ValueError: if the channel axis cannot be told, or values lie outside the range.
    """
    unit = _unit(values, name)
    if unit.ndim == 3:
        return unit[:, None]
    first, last = unit.shape[1] in CHANNELS, unit.shape[3] in CHANNELS
    if first == last:
        raise ValueError(f"{name}: expected images (n, H, W, C) or (n, C, H, W) with 1, 3 or 4 channels, got shape {unit.shape}")
    return unit if first else unit.transpose(0, 3, 1, 2).copy()


def stack(images: Iterable[tuple[str, Any]]) -> NDArray[np.float32]:
    """Pillow images, each with the name an error calls it by, as float32 (n, C, H, W).

    Raises:
        ValueError: if two differ in size or mode (the first that differs is named), or the mode is not grey or colour.
    """
    arrays: list[NDArray[np.uint8]] = []
    expected: tuple[str, tuple[int, int]] | None = None
    for name, image in images:
        expected = expected or (image.mode, image.size)
        if image.mode not in MODES:
            raise ValueError(f"{name}: expected a grey (L) or colour (RGB, RGBA) image of 8 bits, got mode {image.mode}; convert it first")
        if (image.mode, image.size) != expected:
            raise ValueError(
                f"{name}: expected mode {expected[0]} and {_size(expected[1])} like the first image, got {image.mode} and {_size(image.size)}"
            )
        arrays.append(np.asarray(image))
    pixels = np.stack(arrays)
    return _unit(pixels[:, None] if pixels.ndim == 3 else pixels.transpose(0, 3, 1, 2), "images")


def _size(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]} pixels"


def _unit(values: NDArray[Any], name: str) -> NDArray[np.float32]:
    top = 255 if values.dtype.kind in "iu" else 1
    if values.size and not (values.min() >= 0 and values.max() <= top):
        raise ValueError(f"{name}: expected integers from 0 to 255 or floats from 0 to 1, got {values.dtype} from {values.min()} to {values.max()}")
    scaled = values.astype(np.float32, order="C")
    scaled /= top
    return scaled
