"""Images as one array: float32 of shape (n, channels, height, width), in [0, 1]."""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robust_if.formats.parts import require

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


def to_array(images: NDArray[np.float32], like: NDArray[Any], name: str) -> NDArray[Any]:
    """Images (m, C, H, W) in [0, 1] in the type and the layout of ``like``, from which :func:`from_array` made such images.

    Raises:
        ValueError: if they are brighter than an integer type can hold.
    """
    values = images if like.dtype.kind == "f" else np.rint(images * 255)
    if like.dtype.kind != "f" and values.size and values.max() > np.iinfo(like.dtype).max:
        raise ValueError(f"{name}: {like.dtype} holds pixels up to {np.iinfo(like.dtype).max}, got {int(values.max())}; save the images as uint8")
    if like.ndim == 3:
        values = values[:, 0]
    elif like.shape[1] not in CHANNELS:
        values = values.transpose(0, 2, 3, 1)
    return values.astype(like.dtype)


def png(image: NDArray[np.float32]) -> bytes:
    """One image (C, H, W) in [0, 1] as a PNG file of 8 bits, which loses nothing but the rounding."""
    pillow = require("PIL.Image", "writing images", "pillow")
    pixels = np.rint(image * 255).astype(np.uint8)
    buffer = io.BytesIO()
    pillow.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def _size(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]} pixels"


def _unit(values: NDArray[Any], name: str) -> NDArray[np.float32]:
    top = 255 if values.dtype.kind in "iu" else 1
    if values.size and not (values.min() >= 0 and values.max() <= top):
        raise ValueError(f"{name}: expected integers from 0 to 255 or floats from 0 to 1, got {values.dtype} from {values.min()} to {values.max()}")
    scaled = values.astype(np.float32, order="C")
    scaled /= top
    return scaled
