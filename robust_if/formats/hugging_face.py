"""A Hugging Face data set in a folder, as ``Dataset.save_to_disk`` leaves it; needs the package ``datasets``.

A column of class labels is read by its class names. An image column is the only feature; the other columns are then carried along.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from robust_if.formats.images import png, stack
from robust_if.formats.parts import Columns, Copy, Names, Parts, Save, fresh, require, resolve
from robust_if.formats.tables import changes, from_frame, replaced


def is_saved(path: Path) -> bool:
    """Whether the folder holds the files of a saved data set, or of a dictionary of them."""
    return any((path / name).is_file() for name in ("state.json", "dataset_info.json", "dataset_dict.json"))


def read_saved(path: Path, names: Names) -> Parts:
    """A saved data set.

    Raises:
        ImportError: if ``datasets`` is not installed.
        ValueError: if the folder holds several splits, several image columns, or no sample.
    """
    data = _load(path)
    columns = resolve(names, data.column_names)
    images = [name for name, feature in data.features.items() if type(feature).__name__ == "Image"]
    frame = data.select_columns([name for name in data.column_names if name not in images]).to_pandas()
    _name_classes(frame, data.features[columns.label], [name for name in (columns.label, columns.truth) if name is not None])
    save = partial(_write_saved, path, columns.label, images)
    return _image_parts(data, frame, images, columns, save) if images else from_frame(frame, columns, save)


def _load(path: Path) -> Any:
    datasets = require("datasets", "reading a Hugging Face data set", "'robust-if[hf]'")
    try:
        data = datasets.load_from_disk(str(path))
    except IndexError as error:  # what the library raises for a data set without rows, which is saved without a file of rows
        raise ValueError(f"{path}: it holds no sample") from error
    if isinstance(data, datasets.DatasetDict):
        raise ValueError(f"{path}: expected one data set, found the splits {list(data)}; pass the folder of one of them")
    return data


def _name_classes(frame: pd.DataFrame, feature: Any, columns: list[str]) -> None:
    """Replace class numbers by class names in the label, and in a truth of the same numbers; -1 is a missing label."""
    if type(feature).__name__ != "ClassLabel":
        return
    for column in columns:
        if pd.api.types.is_integer_dtype(frame[column]):
            frame[column] = frame[column].map(dict(enumerate(feature.names)))


def _image_parts(data: Any, frame: pd.DataFrame, images: list[str], columns: Columns, save: Save) -> Parts:
    if len(images) > 1:
        raise ValueError(f"features: expected one column of images, got {images}")
    return Parts(
        kind="image",
        features=stack((f"row {row}", image) for row, image in enumerate(data[images[0]])),
        labels=frame[columns.label],
        save=save,
        ids=None if columns.id is None else frame[columns.id],
        truth=None if columns.truth is None else frame[columns.truth],
    )


def _write_saved(path: Path, label: str, images: list[str], folder: Path, copy: Copy) -> Path:
    data = _load(path)
    # In memory: otherwise the library leaves its cache files in the folder of the input.
    kept = data.select(copy.rows.tolist(), keep_in_memory=True).flatten_indices(keep_in_memory=True)
    columns = {label: [_stored(data.features[label], value) for value in copy.labels.tolist()]}
    if isinstance(copy.features, pd.DataFrame):
        columns |= {name: replaced(kept.data.column(name), at, values).to_pylist() for name, at, values in changes(copy)}
    elif copy.changed.any():
        files = kept.data.column(images[0]).to_pylist()
        columns[images[0]] = [
            {"bytes": png(image), "path": None} if changed else file for file, image, changed in zip(files, copy.features, copy.changed, strict=True)
        ]
    target = fresh(folder / path.resolve().name)
    for name, values in columns.items():
        kept = kept.remove_columns(name).add_column(name, values, feature=data.features[name])
    kept.select_columns(data.column_names).save_to_disk(str(target))
    return target


def _stored(feature: Any, label: Any) -> Any:
    if type(feature).__name__ != "ClassLabel":
        return label
    if label not in feature.names:
        raise ValueError(f"labels: expected one of the data set's classes {feature.names}, got {label!r}")
    return feature.names.index(label)
