"""A folder of images, one sub-folder per class: ``class/*.png`` or ``class/*.jpg``. The id of an image is its path inside the folder."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robust_if.formats.images import stack
from robust_if.formats.parts import Names, Parts, fresh, require

SUFFIXES = {".png", ".jpg", ".jpeg"}


def is_folder(path: Path) -> bool:
    """Whether this is a folder with images one level down."""
    return path.is_dir() and bool(_files(path))


def read_folder(path: Path, names: Names) -> Parts:
    """All images one level down, sorted by path, of one size and mode; the class is the name of the sub-folder.

    Raises:
        ValueError: if a name is given, a link leads out of the folder, an image cannot be read or differs from the first.
    """
    if names != Names():
        raise ValueError(f"label, id and truth: an image folder has no names to choose from, got {names}")
    files = _files(path)
    root = path.resolve()
    for file in files:
        if not file.resolve().is_relative_to(root):
            raise ValueError(f"{file}: it links to a file outside of {path}; copy the file into the folder")
    return Parts(
        kind="image",
        features=stack(_opened(path, files)),
        labels=np.array([file.parent.name for file in files]),
        save=partial(_write_folder, path, files),
        ids=np.array([file.relative_to(path).as_posix() for file in files]),
    )


def _files(path: Path) -> list[Path]:
    return sorted(file for file in path.glob("*/*") if file.suffix.lower() in SUFFIXES and not file.name.startswith(".") and file.is_file())


def _opened(path: Path, files: list[Path]) -> Iterator[tuple[str, Any]]:
    pillow = require("PIL.Image", "reading images", "pillow")
    for file in files:
        try:
            with pillow.open(file) as image:
                image.load()
                yield file.relative_to(path).as_posix(), image
        except OSError as error:
            raise ValueError(f"{file}: the image cannot be read, {error}") from error


def _write_folder(path: Path, files: list[Path], folder: Path, rows: NDArray[np.int64], labels: NDArray[Any]) -> Path:
    names = [str(label) for label in labels.tolist()]
    for name in set(names):
        if name in ("", ".", "..") or Path(name).name != name:
            raise ValueError(f"labels: expected names of sub-folders, got {name!r}")
    target = fresh(folder / path.resolve().name)
    kept = list(zip((files[row] for row in rows), names, strict=True))
    # Files that stay in their class come first, so that a corrected one never takes the name of another.
    for file, name in sorted(kept, key=lambda pair: pair[0].parent.name != pair[1]):
        place = target / name / file.name
        if place.exists():
            place = place.with_name(f"{file.parent.name}_{file.name}")
        shutil.copyfile(file, fresh(place))
    return target
