"""Tables in CSV and Parquet files: one row per sample, one column for its label, perhaps one for its id and one for the truth.

A copy is made from the file itself, not from the parsed values: every cell but a corrected label or a changed feature is written as it was read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from robust_if.formats.parts import Columns, Copy, Names, Parts, Save, fresh, kind_of, require, resolve

# An index that pandas wrote as a column: a row number, never a feature.
INDEX_COLUMN = re.compile(r"Unnamed: 0|__index_level_\d+__")


def is_csv(path: Path) -> bool:
    """Whether the name ends in .csv or .csv.gz."""
    return path.name.lower().endswith((".csv", ".csv.gz"))


def is_parquet(path: Path) -> bool:
    """Whether the name ends in .parquet."""
    return path.name.lower().endswith(".parquet")


def read_csv(path: Path, names: Names) -> Parts:
    """A comma-separated file with a header, in UTF-8."""
    try:
        frame = pd.read_csv(path, encoding="utf-8-sig", low_memory=False)
    except pd.errors.EmptyDataError as error:
        raise ValueError(f"{path}: the file is empty") from error
    except pd.errors.ParserError as error:
        raise ValueError(f"{path}: expected comma-separated rows of one length, but {error}") from error
    if not isinstance(frame.index, pd.RangeIndex):
        raise ValueError(f"{path}: its rows have more cells than its header has names ({list(frame.columns)})")
    columns = resolve(names, list(frame.columns))
    return from_frame(frame, columns, partial(_write_csv, path, columns.label, frame))


def read_parquet(path: Path, names: Names) -> Parts:
    """A Parquet file; needs pyarrow."""
    frame = _parquet(path).to_pandas(ignore_metadata=True)
    columns = resolve(names, list(frame.columns))
    return from_frame(frame, columns, partial(_write_parquet, path, columns.label))


def from_frame(frame: pd.DataFrame, columns: Columns, save: Save) -> Parts:
    """The parts of a table ; all columns that are not named are features.

    Raises:
        ValueError: if no column is left.
    """
    named = {columns.label, columns.id, columns.truth} - {None}
    features = frame[[column for column in frame if column not in named and not INDEX_COLUMN.fullmatch(str(column))]]
    if features.shape[1] == 0:
        raise ValueError(f"features: expected a column besides {sorted(map(str, named))}, the file has none")
    return Parts(
        kind=kind_of(features),
        features=features,
        labels=frame[columns.label],
        save=save,
        ids=None if columns.id is None else frame[columns.id],
        truth=None if columns.truth is None else frame[columns.truth],
    )


def _write_csv(path: Path, label: str, frame: pd.DataFrame, folder: Path, copy: Copy) -> Path:
    cells = pd.read_csv(path, header=None, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    kept = cells.iloc[np.concatenate([[0], copy.rows + 1])].copy()
    for name, at, values in [(label, np.arange(len(copy.rows)), pd.Series(copy.labels)), *changes(copy)]:
        position = list(frame.columns).index(name)
        texts: list[str] = cells.iloc[1:, position].tolist()
        kept.iloc[at + 1, position] = _spelt(frame[name], texts, copy.rows[at], values)
    target = fresh(folder / path.name)
    kept.to_csv(target, header=False, index=False)
    return target


def _spelt(old: pd.Series[Any], texts: list[str], rows: NDArray[np.int64], new: pd.Series[Any]) -> list[str]:
    """The cells of new values: as they stand in their rows, else as the file spells the value ("01", "1.0" or "TRUE"), else as Python does."""
    before = old.tolist()
    spelling = dict(zip(before, texts, strict=True))
    missing = next((text for text, gone in zip(texts, old.isna(), strict=True) if gone), "")
    cells = zip(rows, new.tolist(), new.isna(), strict=True)
    return [missing if gone else texts[row] if before[row] == value else spelling.get(value, str(value)) for row, value, gone in cells]


def _write_parquet(path: Path, label: str, folder: Path, copy: Copy) -> Path:
    table = _parquet(path).take(copy.rows)
    for name, at, values in [(label, np.arange(len(copy.rows)), pd.Series(copy.labels.tolist(), dtype=object)), *changes(copy)]:
        position = table.schema.get_field_index(name)
        table = table.set_column(position, table.schema.field(position), replaced(table.column(position), at, values))
    target = fresh(folder / path.name)
    require("pyarrow.parquet", "writing Parquet", "pyarrow").write_table(table, target)
    return target


def changes(copy: Copy) -> Iterator[tuple[Any, NDArray[np.int64], pd.Series[Any]]]:
    """Of every column of a table with changed cells: its name, their positions in the copy, and their values."""
    assert isinstance(copy.features, pd.DataFrame)
    for name, changed in zip(copy.features, copy.changed.T, strict=True):
        if changed.any():
            yield name, np.flatnonzero(changed), copy.features[name][changed]


def replaced(column: Any, at: NDArray[np.int64], values: pd.Series[Any]) -> Any:
    """An Arrow column with other values at some positions; the others pass through untouched.

    Raises:
        ValueError: if the column's type cannot hold a value.
    """
    pyarrow = require("pyarrow", "writing Parquet", "pyarrow")
    plain = values.astype(object) if isinstance(values.dtype, pd.CategoricalDtype) else values
    try:
        new = pyarrow.array(plain, type=column.type, from_pandas=True)
    except pyarrow.ArrowException as error:
        raise ValueError(f"features, labels: expected values that a column of type {column.type} can hold: {error}") from error
    cells = column.to_pylist()
    for position, value in zip(at.tolist(), new.to_pylist(), strict=True):
        cells[position] = value
    return pyarrow.array(cells, type=column.type)


def _parquet(path: Path) -> Any:
    with require("pyarrow.parquet", "reading Parquet", "pyarrow").ParquetFile(path) as file:
        return file.read()
