"""Samples as they stand in a file, before features become numbers.

:func:`read` recognises the format of a path and returns a :class:`Dataset`; :meth:`Dataset.write` writes the cleaned or changed samples back in the
same format. Each format is one file of :mod:`robust_if.formats`; the rules that hold for all of them (labels, ids, truth) stand here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from robust_if.formats import FORMATS, Names, Parts
from robust_if.formats.parts import Copy, Features, Kind, Save


@dataclass(frozen=True, eq=False)
class Dataset:
    """n samples of one file; made by :func:`read`.

    Args:
        kind: ``"image"``; ``"text"`` if the only feature is free text; else ``"table"``.
        features: a data frame with one row per sample, or for images float32 (n, channels, height, width) in [0, 1].
        labels: (n,) integers, booleans or strings, as in the file.
        ids: (n,) unique integers or strings.
        path: the file or folder they were read from.
        truth: (n,) booleans, true where the label is wrong; or the true labels; or ``None`` if unknown. Never a feature.
        rows: (n,) position of every sample in the file.
        changed: true where features are not those of the file: (n, columns) of a table, (n,) of images.
    """

    kind: Kind
    features: Features = field(repr=False)
    labels: NDArray[Any] = field(repr=False)
    ids: NDArray[Any] = field(repr=False)
    path: Path
    truth: NDArray[Any] | None = field(repr=False)
    rows: NDArray[np.int64] = field(repr=False)
    changed: NDArray[np.bool_] = field(repr=False)
    _save: Save = field(repr=False)
    _renamed: Callable[[Copy], NDArray[Any]] = field(repr=False)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def mislabelled(self) -> NDArray[np.bool_] | None:
        """(n,) true where the label is known to be wrong; ``None`` without a truth.

        A truth of booleans is this mask; any other truth is the true label, and compared with the present one.
        """
        if self.truth is None or self.truth.dtype == bool:
            return self.truth
        wrong: NDArray[np.bool_] = self.truth != self.labels
        return wrong

    def take(self, index: ArrayLike) -> Dataset:
        """The samples at ``index`` (positions, or a boolean mask), in that order; they may be none."""
        at = np.asarray(index)
        at = np.flatnonzero(at) if at.dtype == bool else at.astype(np.int64)
        return replace(
            self,
            features=self.features.iloc[at].reset_index(drop=True) if isinstance(self.features, pd.DataFrame) else self.features[at],
            labels=self.labels[at],
            ids=self.ids[at],
            truth=None if self.truth is None else self.truth[at],
            rows=self.rows[at],
            changed=self.changed[at],
        )

    def with_labels(self, labels: ArrayLike) -> Dataset:
        """The same samples with other labels (n,); a truth of true labels is compared with these from now on.

        Raises:
            ValueError: if their number or type differs, or one of them is missing.
        """
        return replace(self, labels=self._labels(labels))

    def with_features(self, features: Features) -> Dataset:
        """The same samples with other features, of which :meth:`write` writes what differs from the file.

        Args:
            features: a data frame with the same columns and types, or for images float32 (n, channels, height, width) in [0, 1].

        Raises:
            ValueError: if shape, columns or types are others, or a pixel is out of range.
        """
        if isinstance(self.features, pd.DataFrame):
            table = _like_table(features, self.features)
            changed = table.ne(self.features).to_numpy(dtype=bool) & ~(table.isna() & self.features.isna()).to_numpy()
            return replace(self, features=table, changed=self.changed | changed)
        images = _like_images(features, self.features)
        return replace(self, features=images, changed=self.changed | (images != self.features).any((1, 2, 3)))

    def write(self, folder: str | Path, keep: ArrayLike, labels: ArrayLike) -> Path:
        """The path of a copy in the input's own format, under the input's name in ``folder``.

        All columns, arrays and ids stay, and so does every feature that :meth:`with_features` left alone. Changed images become 8 bits where the file
        has 8 bits. In a folder of images, one whose label changes moves to the folder of its class, one that changed becomes a .png, and the id of
        either with it: :meth:`renamed`.

        Args:
            folder: made if need be; nothing in it is overwritten.
            keep: (n,) booleans, true for the samples that stay.
            labels: (n,) labels; those of samples that do not stay are ignored.

        Raises:
            ValueError: if a shape is wrong, nothing is kept, a label is missing or of another type, or the format cannot hold it.
            FileExistsError: if the copy exists already.
        """
        return self._save(Path(folder), self._copy(keep, labels))

    def renamed(self, keep: ArrayLike, labels: ArrayLike) -> NDArray[Any]:
        """The ids that samples have in the copy that :meth:`write` makes with the same arguments, in the order of the samples that stay.

        They are the same ids, but row numbers start afresh where the file has no ids, and the id of an image in a folder is its new path.
        """
        return self._renamed(self._copy(keep, labels))

    def _copy(self, keep: ArrayLike, labels: ArrayLike) -> Copy:
        mask = np.asarray(keep)
        if mask.dtype != bool or mask.shape != (len(self),):
            raise ValueError(f"keep: expected {len(self)} booleans, got {mask.dtype} of shape {mask.shape}")
        if not mask.any():
            raise ValueError("keep: expected at least one sample to keep, got none")
        kept = self.take(mask)
        return Copy(kept.rows, self._labels(labels)[mask], kept.features, kept.changed)

    def _labels(self, labels: ArrayLike) -> NDArray[Any]:
        new = np.asarray(labels)
        if new.shape != self.labels.shape:
            raise ValueError(f"labels: expected shape {self.labels.shape}, got {new.shape}")
        if len(new) == 0:
            return self.labels  # whose type nothing tells
        plain = _plain(new, "labels", self.ids)
        if plain.dtype.kind != self.labels.dtype.kind:
            raise ValueError(f"labels: expected {self.labels.dtype.name} as in the file, got {plain.dtype.name}; decode encoded labels first")
        return plain


def read(path: str | Path, *, label: str | None = None, id: str | None = None, truth: str | None = None) -> Dataset:  # noqa: A002
    """The samples in a file or folder.

    Args:
        path: a .csv, .csv.gz or .parquet table; an .npz archive; an IDX images file, or a folder with one; a folder ``class/*.png|jpg``; or a
            Hugging Face data set saved on disk.
        label: column or array of the labels; the one called label(s), target(s), class or y by default.
        id: column or array of the ids; the one called id by default (in an archive also ids or index), else ids are row numbers from 0.
        truth: column or array that says which labels are wrong. Booleans are a mask, true where the label is wrong; anything else is the true
            label. It is not used as a feature.

    Raises:
        FileNotFoundError: if there is nothing at ``path``.
        ValueError: if the format is unknown, a name is not in the file, it holds no sample, a label is missing, or an id occurs twice.
        ImportError: if the format needs a package that is not installed.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such file or folder")
    for _, recognises, reader in FORMATS:
        if recognises(path):
            return _checked(path, reader(path, Names(label, id, truth)))
    raise ValueError(f"{path}: expected one of: {'; '.join(name for name, _, _ in FORMATS)}")


def _checked(path: Path, parts: Parts) -> Dataset:
    n = len(parts.features)
    if n == 0:
        raise ValueError(f"{path}: it holds no sample")
    rows = np.arange(n)
    ids = rows if parts.ids is None else _plain(parts.ids, "ids", rows)
    values, counts = np.unique(ids, return_counts=True)
    if len(values) < n:
        raise ValueError(f"ids: expected unique ids, but {values[counts.argmax()].item()!r} occurs {counts.max()} times")
    labels = _plain(parts.labels, "labels", ids)
    truth = None if parts.truth is None else _plain(parts.truth, "truth", ids)
    if truth is not None and truth.dtype != bool and set(truth.tolist()).isdisjoint(labels.tolist()):
        raise ValueError(
            f"truth: expected true labels or booleans, but none of its values {np.unique(truth).tolist()[:5]} is a label "
            f"{np.unique(labels).tolist()[:5]}; write a mask of the wrong labels as true and false"
        )
    changed = np.zeros(parts.features.shape if isinstance(parts.features, pd.DataFrame) else n, dtype=bool)
    renamed = parts.renamed or partial(_same_ids, None if parts.ids is None else ids)
    return Dataset(parts.kind, parts.features, labels, ids, path, truth, rows, changed, parts.save, renamed)


def _same_ids(ids: NDArray[Any] | None, copy: Copy) -> NDArray[Any]:
    return np.arange(len(copy.rows)) if ids is None else ids[copy.rows]


def _like_table(new: Features, old: pd.DataFrame) -> pd.DataFrame:
    if not isinstance(new, pd.DataFrame) or len(new) != len(old) or list(new.columns) != list(old.columns):
        got = f"{len(new)} rows of {list(new.columns)[:20]}" if isinstance(new, pd.DataFrame) else f"{type(new).__name__} of shape {np.shape(new)}"
        raise ValueError(f"features: expected a data frame of {len(old)} rows with the columns {list(old.columns)[:20]}, got {got}")
    for name in old:
        kinds = new[name].dtype, old[name].dtype
        if kinds[0] != kinds[1] and not all(isinstance(kind, pd.StringDtype) or kind.kind == "O" for kind in kinds):
            raise ValueError(f"features: column {name!r} is {kinds[1]} in the file, got {kinds[0]}")
    return new.reset_index(drop=True)


def _like_images(new: Features, old: NDArray[np.float32]) -> NDArray[np.float32]:
    if not isinstance(new, np.ndarray) or new.shape != old.shape or new.dtype != old.dtype:
        got = f"{new.dtype} of shape {new.shape}" if isinstance(new, np.ndarray) else type(new).__name__
        raise ValueError(f"features: expected images as an array, float32 of shape {old.shape}, got {got}")
    if not (new.size == 0 or (new.min() >= 0 and new.max() <= 1)):
        raise ValueError(f"features: expected pixels from 0 to 1, got some from {new.min()} to {new.max()}")
    return new


def _plain(values: Any, what: str, ids: NDArray[Any]) -> NDArray[Any]:
    """``values`` as booleans, int64 or strings.

    Raises:
        ValueError: if one is missing (its id is named), or is a number that is not whole.
    """
    column = pd.Series(values).reset_index(drop=True).astype(object).infer_objects()
    missing = column.isna().to_numpy() | (column.astype(str).str.strip() == "").to_numpy()
    if missing.any():
        where = ", ".join(str(i) for i in ids[missing][:5])
        raise ValueError(f"{what}: {missing.sum()} of {len(column)} are missing, ids {where}; fill or drop them first")
    if pd.api.types.is_bool_dtype(column):
        return column.to_numpy(dtype=bool)
    if pd.api.types.is_numeric_dtype(column):
        numbers = column.to_numpy()
        broken = ~np.isfinite(numbers) | (numbers != np.floor(numbers))
        if broken.any():
            raise ValueError(f"{what}: expected whole numbers or strings, got {numbers[broken][0].item()} at id {ids[broken][0]}")
        return numbers.astype(np.int64)
    return np.array([str(value) for value in column])
