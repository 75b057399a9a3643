"""IDX files, the format of MNIST: one file of images and one of labels beside it, often compressed.

A file is two zero bytes, the element type (8: unsigned byte), the number of axes, each axis length as a big-endian 32-bit integer, the bytes.
Source: LeCun, Cortes and Burges, "The MNIST database", section "File formats".
"""

from __future__ import annotations

import gzip
import struct
from functools import partial
from math import prod
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from robust_if.formats.images import from_array, to_array
from robust_if.formats.parts import Copy, Names, Parts, fresh

PATTERN = "*images*idx3*"


def is_idx(path: Path) -> bool:
    """Whether this is an IDX images file, or a folder with one."""
    return bool(_image_files(path)) if path.is_dir() else path.match(PATTERN)


def read_idx(path: Path, names: Names) -> Parts:
    """The images of an IDX file with the labels of the file beside it; ids are positions, and there is no place for a truth.

    Raises:
        ValueError: if a folder holds several pairs, the labels are not there, a file is not what its header says, or a name is given.
    """
    if names != Names():
        raise ValueError(f"label, id and truth: IDX files have no names to choose from, got {names}")
    images = _one_images_file(path)
    labels = _labels_file(images)
    x, y = parse(images, axes=3), parse(labels, axes=1)
    if len(x) != len(y):
        raise ValueError(f"{labels}: expected one label per image ({len(x)}), got {len(y)}")
    return Parts(kind="image", features=from_array(x, images.name), labels=y, save=partial(_write_idx, images, labels))


def parse(path: Path, *, axes: int) -> NDArray[np.uint8]:
    """The array in an IDX file of unsigned bytes, compressed or not.

    Raises:
        ValueError: if the magic number, the number of axes or the length is not as expected.
    """
    with gzip.open(path) if _compressed(path) else path.open("rb") as file:
        magic = file.read(4)
        if magic != bytes([0, 0, 8, axes]):
            raise ValueError(f"{path}: expected an IDX file of bytes with {axes} axes (magic {bytes([0, 0, 8, axes]).hex()}), got {magic.hex()!r}")
        header = file.read(4 * axes)
        if len(header) < 4 * axes:
            raise ValueError(f"{path}: it ends within its header")
        shape = struct.unpack(f">{axes}I", header)
        # One byte more than announced: enough to notice a file that is too long, and no more than that is ever unpacked.
        content = file.read(prod(shape) + 1)
    if len(content) != prod(shape):
        held = "more" if len(content) > prod(shape) else len(content)
        raise ValueError(f"{path}: its header announces shape {shape}, {prod(shape)} bytes, but it holds {held}")
    return np.frombuffer(content, np.uint8).reshape(shape)


def _write_idx(images: Path, labels: Path, folder: Path, copy: Copy) -> Path:
    wrong = [label for label in np.unique(copy.labels).tolist() if not (isinstance(label, int) and 0 <= label <= 255)]
    if wrong:
        raise ValueError(f"labels: an IDX file holds integers from 0 to 255, got {wrong[:5]}")
    targets = [fresh(folder / images.name), fresh(folder / labels.name)]
    assert isinstance(copy.features, np.ndarray)
    pixels = parse(images, axes=3)[copy.rows]
    pixels[copy.changed] = to_array(copy.features[copy.changed], pixels, images.name)
    _dump(targets[0], pixels, compress=_compressed(images))
    _dump(targets[1], copy.labels.astype(np.uint8), compress=_compressed(labels))
    return targets[0]


def _dump(path: Path, values: NDArray[np.uint8], *, compress: bool) -> None:
    content = struct.pack(f">4B{values.ndim}I", 0, 0, 8, values.ndim, *values.shape) + values.tobytes()
    path.write_bytes(gzip.compress(content, compresslevel=6, mtime=0) if compress else content)


def _compressed(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"\x1f\x8b"


def _image_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob(PATTERN) if path.is_file())


def _one_images_file(path: Path) -> Path:
    if not path.is_dir():
        return path
    found = _image_files(path)
    if len(found) != 1:
        raise ValueError(f"{path}: expected one IDX images file, found {[file.name for file in found]}; pass the one to read")
    return found[0]


def _labels_file(images: Path) -> Path:
    name = images.name.removesuffix(".gz").replace("images", "labels").replace("idx3", "idx1")
    for candidate in (name, f"{name}.gz"):
        if (images.parent / candidate).is_file():
            return images.parent / candidate
    raise ValueError(f"{images}: expected its labels beside it in {name} or {name}.gz, found neither")
