"""A folder of images, one sub-folder per class: ``class/*.png`` or ``class/*.jpg``. The id of an image is its path inside the folder.

An image that did not change is copied byte by byte. One that did is written as PNG, whatever it was, because JPEG would change it again; so
``cat/1.jpg`` becomes ``cat/1.png``.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robust_if.formats.images import png, stack
from robust_if.formats.parts import Copy, Names, Parts, fresh, require

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
        renamed=partial(_places, files),
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


def _places(files: list[Path], copy: Copy) -> NDArray[Any]:
    """The (m,) paths of the images inside the copy."""
    names = [str(label) for label in copy.labels.tolist()]
    for name in set(names):
        if name in ("", ".", "..") or Path(name).name != name:
            raise ValueError(f"labels: expected names of sub-folders, got {name!r}")
    kept = [files[row] for row in copy.rows]
    wanted = [file.with_suffix(".png").name if changed else file.name for file, changed in zip(kept, copy.changed, strict=True)]
    places: dict[int, str] = {}
    taken: set[str] = set()
    # Files that stay where they are come first, so that one that moves never takes the name of another.
    for i in sorted(range(len(kept)), key=lambda i: (kept[i].parent.name, kept[i].name) != (names[i], wanted[i])):
        place = wanted[i]
        while f"{names[i]}/{place}" in taken:
            place = f"{kept[i].parent.name}_{place}"
        places[i] = f"{names[i]}/{place}"
        taken.add(places[i])
    return np.array([places[i] for i in range(len(kept))])


def _write_folder(path: Path, files: list[Path], folder: Path, copy: Copy) -> Path:
    places = _places(files, copy)
    target = fresh(folder / path.resolve().name)
    for row, place, image, changed in zip(copy.rows, places, copy.features, copy.changed, strict=True):
        if changed:
            fresh(target / place).write_bytes(png(image))
        else:
            shutil.copyfile(files[row], fresh(target / place))
    return target
