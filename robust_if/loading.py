"""Samples as they stand in a file, before features become numbers.

:func:`read` recognises the format of a path and returns a :class:`Dataset`; :meth:`Dataset.write` writes the cleaned samples back in the same
format. Each format is one file of :mod:`robust_if.formats`; the rules that hold for all of them (labels, ids, truth) stand here.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from robust_if.formats import FORMATS, Names, Parts
from robust_if.formats.parts import Features, Kind, Save


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
    """

    kind: Kind
    features: Features = field(repr=False)
    labels: NDArray[Any] = field(repr=False)
    ids: NDArray[Any] = field(repr=False)
    path: Path
    truth: NDArray[Any] | None = field(repr=False)
    rows: NDArray[np.int64] = field(repr=False)
    _save: Save = field(repr=False)

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
        )

    def with_labels(self, labels: ArrayLike) -> Dataset:
        """The same samples with other labels (n,); a truth of true labels is compared with these from now on.

        Raises:
            ValueError: if their number or type differs, or one of them is missing.
        """
        return replace(self, labels=self._labels(labels))

    def write(self, folder: str | Path, keep: ArrayLike, labels: ArrayLike) -> Path:
        """The path of a cleaned copy in the input's own format, under the input's name in ``folder``.

        All columns, arrays and ids stay. An image whose label changes moves to the folder of its class, and with it its id.

        Args:
            folder: made if need be; nothing in it is overwritten.
            keep: (n,) booleans, true for the samples that stay.
            labels: (n,) labels; those of samples that do not stay are ignored.

        Raises:
            ValueError: if a shape is wrong, nothing is kept, a label is missing or of another type, or the format cannot hold it.
            FileExistsError: if the copy exists already.
        """
        mask = np.asarray(keep)
        if mask.dtype != bool or mask.shape != (len(self),):
            raise ValueError(f"keep: expected {len(self)} booleans, got {mask.dtype} of shape {mask.shape}")
        if not mask.any():
            raise ValueError("keep: expected at least one sample to keep, got none")
        return self._save(Path(folder), self.rows[mask], self._labels(labels)[mask])

    def _labels(self, labels: ArrayLike) -> NDArray[Any]:
        new = np.asarray(labels)
        if new.shape != self.labels.shape:
            raise ValueError(f"labels: expected shape {self.labels.shape}, got {new.shape}")
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
    return Dataset(parts.kind, parts.features, labels, ids, path, truth, rows, parts.save)


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
