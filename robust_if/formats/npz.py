"""NumPy archives: an array of features, one of labels, perhaps one of ids and one of the truth. Pickled objects are refused."""

from __future__ import annotations

import zipfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from robust_if.formats.images import from_array, to_array
from robust_if.formats.parts import Copy, Kind, Names, Parts, fresh, kind_of, one_of, resolve

FEATURES = ("x", "images", "data")


def is_npz(path: Path) -> bool:
    """Whether the name ends in .npz."""
    return path.name.lower().endswith(".npz")


def read_npz(path: Path, names: Names) -> Parts:
    """Features ``x``, ``images`` or ``data``: (n, d) numbers, (n,) text, or images of three or four axes; labels (n,) or (n, 1).

    Raises:
        ValueError: if an array is missing, holds Python objects, has another length than the features, or a feature is not finite.
    """
    arrays = _arrays(path)
    columns = resolve(names, list(arrays), ids=("id", "ids", "index"))
    x = one_of("features", [name for name in arrays if name not in (columns.label, columns.id, columns.truth)], FEATURES)
    kind, features = _features(arrays[x], x)
    return Parts(
        kind=kind,
        features=features,
        labels=_column(arrays, columns.label, len(features)),
        save=partial(_write_npz, path, x, columns.label, len(features)),
        ids=None if columns.id is None else _column(arrays, columns.id, len(features)),
        truth=None if columns.truth is None else _column(arrays, columns.truth, len(features)),
    )


def _arrays(path: Path) -> dict[str, NDArray[Any]]:
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path}: expected a NumPy archive as numpy.savez writes it, got another file")
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: _read_one(archive, path, name) for name in archive.files}
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path}: the archive is damaged, {error}") from error


def _read_one(archive: Any, path: Path, name: str) -> NDArray[Any]:
    try:
        array: NDArray[Any] = archive[name]
    except ValueError as error:
        raise ValueError(
            f"{path}: cannot read the array {name!r} ({error}); Python objects are pickled and may run code: save numbers or strings"
        ) from error
    return array.astype(str) if array.dtype.kind == "S" else array


def _features(x: NDArray[Any], name: str) -> tuple[Kind, pd.DataFrame | NDArray[np.float32]]:
    if x.ndim in (3, 4):
        return "image", from_array(x, name)
    if x.ndim not in (1, 2):
        raise ValueError(f"{name}: expected (n,), (n, d), (n, H, W), (n, H, W, C) or (n, C, H, W), got shape {x.shape}")
    if x.dtype.kind == "f" and not np.isfinite(x).all():
        rows = np.flatnonzero(~np.isfinite(x.reshape(len(x), -1)).all(1))
        raise ValueError(f"{name}: {len(rows)} samples hold NaN or infinity, first in row {rows[0]}; fill them or use a table, which imputes")
    frame = pd.DataFrame(x[:, None] if x.ndim == 1 else x)
    frame.columns = pd.Index([f"{name}{column}" for column in frame] if frame.shape[1] > 1 else [name])
    return kind_of(frame), frame


def _column(arrays: dict[str, NDArray[Any]], name: str, n: int) -> NDArray[Any]:
    column = arrays[name]
    if column.shape not in ((n,), (n, 1)):
        raise ValueError(f"{name}: expected one value per sample, shape ({n},), got {column.shape}")
    return column.reshape(n)


def _cast(labels: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    cast = labels if dtype.kind in "SU" else labels.astype(dtype)
    if not np.array_equal(cast, labels):
        raise ValueError(f"labels: expected values that the file's type {dtype} can hold, got {labels[cast != labels][:1].tolist()}")
    return cast


def _changed(x: NDArray[Any], name: str, copy: Copy) -> NDArray[Any]:
    """The features ``x`` of the samples that stay, (m, …), with what changed."""
    if not copy.changed.any():
        return x
    if not isinstance(copy.features, pd.DataFrame):
        new = to_array(copy.features[copy.changed], x, name)
    elif x.dtype.kind == "U":
        new = copy.features.to_numpy()[copy.changed].astype(str)
        x = x.astype(np.promote_types(x.dtype, new.dtype))  # a longer string is not cut
    else:
        new = copy.features.to_numpy()[copy.changed]
    x[copy.changed.reshape(x.shape) if isinstance(copy.features, pd.DataFrame) else copy.changed] = new
    return x


def _write_npz(path: Path, features: str, label: str, n: int, folder: Path, copy: Copy) -> Path:
    arrays = _arrays(path)
    kept = {name: array[copy.rows] if array.ndim and len(array) == n else array for name, array in arrays.items()}
    kept[features] = _changed(kept[features], features, copy)
    kept[label] = _cast(copy.labels, arrays[label].dtype).reshape(len(copy.rows), *arrays[label].shape[1:])
    with zipfile.ZipFile(path) as archive:
        compressed = any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist())
    target = fresh(folder / path.name)
    (np.savez_compressed if compressed else np.savez)(target, **kept)  # type: ignore[arg-type]
    return target
