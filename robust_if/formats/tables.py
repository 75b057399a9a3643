"""Tables in CSV and Parquet files: one row per sample, one column for its label, perhaps one for its id and one for the truth.

The cleaned copy is made from the file itself, not from the parsed values: every cell but a corrected label is written as it was read.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from robust_if.formats.parts import Columns, Names, Parts, Save, fresh, kind_of, require, resolve

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
    return from_frame(frame, columns, partial(_write_csv, path, list(frame.columns).index(columns.label), frame[columns.label]))


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


def _write_csv(path: Path, position: int, old: pd.Series[Any], folder: Path, rows: NDArray[np.int64], labels: NDArray[Any]) -> Path:
    cells = pd.read_csv(path, header=None, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    before, texts = old.tolist(), cells.iloc[1:, position].tolist()
    # A corrected label is spelt as the file spells its class: "01", "1.0" or "TRUE".
    spelling = dict(zip(before, texts, strict=True))
    cells.iloc[rows + 1, position] = [
        texts[row] if before[row] == label else spelling.get(label, str(label)) for row, label in zip(rows, labels.tolist(), strict=True)
    ]
    target = fresh(folder / path.name)
    cells.iloc[np.concatenate([[0], rows + 1])].to_csv(target, header=False, index=False)
    return target


def _write_parquet(path: Path, label: str, folder: Path, rows: NDArray[np.int64], labels: NDArray[Any]) -> Path:
    pyarrow = require("pyarrow", "writing Parquet", "pyarrow")
    table = _parquet(path).take(rows)
    position = table.schema.get_field_index(label)
    field = table.schema.field(position)
    target = fresh(folder / path.name)
    require("pyarrow.parquet", "writing Parquet", "pyarrow").write_table(
        table.set_column(position, field, pyarrow.array(labels.tolist(), type=field.type)), target
    )
    return target


def _parquet(path: Path) -> Any:
    with require("pyarrow.parquet", "reading Parquet", "pyarrow").ParquetFile(path) as file:
        return file.read()
