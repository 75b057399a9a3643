"""Data sets with columns: a ``datasets.Dataset`` or a data frame read row by row, and a choice of its rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from robust_if.formats.parts import require

Array = NDArray[Any]


def select(data: Any, weights: ArrayLike, *, column: str = "weight") -> Any:
    """The rows whose weight is not 0, in their order, with a column of the weights where they are not all 1.

    A ``Trainer`` of Hugging Face does not read such a column by itself; its loss has to be told of it.

    Args:
        data: a ``datasets.Dataset`` of n rows.
        weights: ``(n,)`` from 0, as the functions of :mod:`robust_if.decisions` return them.
        column: the name of the column of weights.

    Returns:
        A ``datasets.Dataset`` in memory. No file is written, nor is one beside those that ``data`` came from.

    Raises:
        TypeError: if ``data`` is none.
        ValueError: if the weights are not n finite numbers from 0 that are not all 0, or the column is needed and there is one of that name.
    """
    datasets = require("datasets", "choosing rows of a data set", "'robust-if[hf]'")
    if not isinstance(data, datasets.Dataset):
        raise TypeError(f"data: expected a datasets.Dataset, got {type(data).__name__}")
    values = np.asarray(weights)
    if values.shape != (len(data),):
        raise ValueError(f"weights: expected one per row, shape ({len(data)},), got {values.shape}")
    if values.dtype.kind not in "biuf":
        raise ValueError(f"weights: expected numbers, got {values.dtype}")
    values = values.astype(np.float64)
    refuse(range(len(data)), ~np.isfinite(values) | (values < 0), "weights: expected finite numbers from 0, got others", what="row")
    if not values.any():
        raise ValueError("weights: all are 0, so that no row is left; expected at least one that is not")
    kept = np.flatnonzero(values)
    # In memory: otherwise the library leaves its cache files in the folder of the input.
    chosen = data.select(kept, keep_in_memory=True)
    if (values[kept] == 1).all():
        return chosen
    if column in data.column_names:
        raise ValueError(f"column: the data set has a column {column!r} already; name the column of weights otherwise")
    return chosen.flatten_indices(keep_in_memory=True).add_column(column, values[kept])


@dataclass(frozen=True, eq=False)
class Rows:
    """A data set of n rows whose columns are read as lists.

    Args:
        data: a ``datasets.Dataset`` or a pandas data frame.
        names: of its columns.
        ids: ``(n,)`` those of the column ``id``, if there is one, otherwise the row numbers.
    """

    data: Any = field(repr=False)
    names: list[str]
    ids: Array = field(repr=False)

    @classmethod
    def of(cls, data: Any) -> Rows:
        """The rows of ``data``.

        Raises:
            TypeError: if it is none of the two.
            ValueError: if it has no row, or its ids are not unique numbers or texts.
        """
        if isinstance(data, dict):
            raise TypeError(f"data: expected one data set, got the splits {list(data)}; pass one of them")
        is_frame = isinstance(data, pd.DataFrame)
        if not is_frame and not all(hasattr(data, name) for name in ("column_names", "with_format", "__len__")):
            raise TypeError(f"data: expected a datasets.Dataset or a pandas data frame, got {type(data).__name__}")
        if len(data) == 0:
            raise ValueError("data: expected at least one row, got none")
        names = [str(name) for name in (data.columns if is_frame else data.column_names)]
        rows = cls(data if is_frame else data.with_format(None), names, np.arange(len(data)))
        return replace(rows, ids=_ids(rows.column("id"))) if "id" in names else rows

    def column(self, name: str) -> list[Any]:
        """The values of a column, as Python has them."""
        values = self.data[name]
        plain: list[Any] = values.tolist() if isinstance(values, pd.Series) else values[:]
        return plain

    def present(self, name: str) -> list[Any]:
        """The values of a column in which none may be missing."""
        values = self.column(name)
        refuse(self.ids, map(is_missing, values), f"{name}: expected a value in every row, got none")
        return values

    def texts(self, name: str, *, empty: bool = False) -> list[str]:
        """The values of a column of texts; ``empty`` ones may be allowed."""
        values = self.present(name)
        for i, value in zip(self.ids, values, strict=True):
            if not isinstance(value, str):
                advice = f"; data.cast_column({name!r}, datasets.Value('string')) makes texts of numbers" if isinstance(value, (int, float)) else ""
                raise ValueError(f"{name}: expected texts, got {type(value).__name__} (id {i}){advice}")
        if not empty:
            refuse(self.ids, (value == "" for value in values), f"{name}: expected a text, got an empty one")
        return values

    def integers(self, name: str) -> list[Array]:
        """The values of a column of lists of whole numbers, each ``(length,)``."""
        rows = [np.asarray(value, dtype=object if isinstance(value, str) else None) for value in self.present(name)]
        whole = [row.ndim == 1 and (row.dtype.kind in "biu" or row.size == 0) for row in rows]
        refuse(self.ids, (not each for each in whole), f"{name}: expected a list of whole numbers, got something else")
        return [row.astype(np.int64) for row in rows]


def refuse(ids: Sequence[Any] | Array, bad: Iterable[bool | np.bool_], message: str, *, what: str = "id") -> None:
    """Raise a ``ValueError`` of ``message`` that names the samples that are ``bad``, if any is."""
    named = [str(i) for i, is_bad in zip(ids, bad, strict=True) if is_bad]
    if named:
        several = f"{what}s {', '.join(named[:5])}{' …' if len(named) > 5 else ''}" if len(named) > 1 else f"{what} {named[0]}"
        raise ValueError(f"{message}: {len(named)} of {len(ids)}, {several}")


def is_missing(value: Any) -> bool:
    """Whether this is what stands for no value in a column: ``None``, ``NaN`` or ``pandas.NA``."""
    return value is None or value is pd.NA or (isinstance(value, float) and value != value)


def _ids(values: list[Any]) -> Array:
    refuse(range(len(values)), map(is_missing, values), "id: expected one in every row, got none", what="row")
    whole = all(isinstance(value, (int, np.integer)) and not isinstance(value, bool) for value in values)
    if not whole and not all(isinstance(value, str) for value in values):
        raise ValueError(f"id: expected whole numbers or texts, got {', '.join(sorted({type(value).__name__ for value in values}))}")
    often, times = Counter(values).most_common(1)[0]
    if times > 1:
        raise ValueError(f"id: expected unique ids, but {often!r} occurs {times} times")
    return np.asarray(values)
