"""Data sets of texts in files: JSON lines, CSV, Parquet, or a folder that Hugging Face saved; nothing is downloaded, and no cache is left behind."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from robust_if.formats.hugging_face import is_saved
from robust_if.formats.parts import fresh, require

ENDINGS = ".jsonl, .json, .csv, .csv.gz or .parquet"


def read(path: Path | str, *, texts: Sequence[str] = ("prompt", "completion", "text")) -> Any:
    """A ``datasets.Dataset`` in memory.

    Args:
        path: a file of JSON lines (``.jsonl``; ``.json``, which may be one list instead), ``.csv``, ``.csv.gz``, ``.parquet``, or a folder that
            ``Dataset.save_to_disk`` wrote. Text is in UTF-8.
        texts: columns of a CSV file that are texts even if they look like numbers. In such a file an empty cell is a missing value, and no other is.

    Raises:
        FileNotFoundError: if there is no such file.
        ImportError: if ``datasets`` is not installed.
        ValueError: if its ending is another one, it is broken (a line of JSON is named), it has no row, or the folder holds several splits.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such file or folder")
    datasets = require("datasets", "reading a data set of texts", "'robust-if[hf]'")
    if path.is_dir():
        data = _saved(path, datasets)
    else:
        ending = _ending(path)
        data = datasets.Dataset(_csv(path, texts) if ending == ".csv" else _parquet(path) if ending == ".parquet" else _json(path))
    if len(data) == 0:
        raise ValueError(f"{path}: expected at least one row, got none")
    return data


def write(data: Any, folder: Path | str, *, like: Path | str) -> Path:
    """``data`` in a new file of the name and the format of ``like`` in ``folder``.

    A saved folder and a Parquet file keep the types of all columns; of a class label the others hold the number.

    Returns:
        The file, or the folder that was saved.

    Raises:
        FileExistsError: if it is there already; it is never overwritten.
        ValueError: if the ending of ``like`` is unknown, or a column cannot be written in this format.
    """
    like = Path(like)
    ending = "" if like.is_dir() else _ending(like)
    target = Path(folder) / like.resolve().name
    if ending == "":
        data.save_to_disk(str(fresh(target)))
        return target
    table: pa.Table = data.with_format("arrow")[:]
    if ending == ".parquet":
        pq.write_table(table, fresh(target))
        return target
    _FORMATS[ending](table, target, like)
    return target


def _ending(path: Path) -> str:
    name = path.name.lower().removesuffix(".gz") if path.name.lower().endswith(".csv.gz") else path.name.lower()
    ending = Path(name).suffix
    if ending not in (".jsonl", ".json", ".csv", ".parquet"):
        raise ValueError(f"{path}: expected a file that ends in {ENDINGS}, or a folder that Dataset.save_to_disk wrote")
    return ending


def _saved(path: Path, datasets: Any) -> Any:
    if (path / "dataset_dict.json").is_file():
        raise ValueError(f"{path}: expected one data set, found the splits {_splits(path)}; pass the folder of one of them")
    if not is_saved(path):
        raise ValueError(f"{path}: expected a folder that Dataset.save_to_disk wrote, or a file that ends in {ENDINGS}")
    try:
        # In memory: otherwise the library leaves its cache files in this folder later on.
        return datasets.load_from_disk(str(path), keep_in_memory=True)
    except IndexError as error:  # what the library raises for a data set without rows, which is saved without a file of rows
        raise ValueError(f"{path}: expected at least one row, got none") from error
    except Exception as error:
        raise ValueError(f"{path}: the saved data set cannot be read: {error}") from error


def _splits(path: Path) -> list[str]:
    try:
        return [str(name) for name in json.loads((path / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]]
    except (ValueError, KeyError, TypeError):
        return sorted(each.name for each in path.iterdir() if each.is_dir())


def _csv(path: Path, texts: Sequence[str]) -> pa.Table:
    kept = {"keep_default_na": False, "na_values": [""], "dtype_backend": "numpy_nullable", "dtype": dict.fromkeys(texts, "string")}
    try:
        frame = pd.read_csv(path, encoding="utf-8-sig", low_memory=False, **kept)  # type: ignore[call-overload]
    except (pd.errors.EmptyDataError, pd.errors.ParserError, UnicodeDecodeError, EOFError, OSError) as error:
        raise ValueError(f"{path}: expected comma-separated rows under a header, in UTF-8, but {error}") from error
    if not isinstance(frame.index, pd.RangeIndex):
        raise ValueError(f"{path}: its rows have more cells than its header has names ({list(frame.columns)})")
    return pa.Table.from_pandas(frame, preserve_index=False).replace_schema_metadata(None)


def _parquet(path: Path) -> pa.Table:
    try:
        return pq.read_table(path, partitioning=None)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: it cannot be read as Parquet: {error}") from error


def _json(path: Path) -> pa.Table:
    try:
        content = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected text in UTF-8, but {error}") from error
    rows = _list(path, content) if _is_list(path, content) else _lines(path, content)
    columns: dict[str, list[Any]] = {}
    for row in rows:
        columns |= {name: [] for name in row if name not in columns}
    try:
        for name, values in columns.items():
            values.extend(row.get(name) for row in rows)
            pa.array(values)
    except (pa.ArrowException, UnicodeEncodeError, OverflowError) as error:
        raise ValueError(f"{path}: the values of {name!r} are not of one type: {error}") from error
    return pa.table(columns)


def _is_list(path: Path, content: str) -> bool:
    return path.suffix.lower() == ".json" and content.lstrip().startswith("[")


def _list(path: Path, content: str) -> list[dict[str, Any]]:
    try:
        rows = json.loads(content)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: broken JSON in line {error.lineno}: {error.msg}") from error
    wrong = next((k for k, row in enumerate(rows) if not isinstance(row, dict)), None)
    if wrong is not None:
        raise ValueError(f"{path}: expected a list of objects, got {type(rows[wrong]).__name__} in its place {wrong}")
    return list(rows)


def _lines(path: Path, content: str) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(content.split("\n"), start=1):  # a text may hold other ends of lines
        if line.strip() == "":
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}: broken JSON in line {number}: {error.msg}; expected one object per line") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}: expected one object per line, got {type(row).__name__} in line {number}")
        rows.append(row)
    return rows


def _write_csv(table: pa.Table, target: Path, like: Path) -> None:
    nested = [field.name for field in table.schema if pa.types.is_nested(field.type)]
    if nested:
        raise ValueError(f"{target.name}: a CSV file holds no lists, but {nested} are such; write JSON lines or Parquet")
    # Whole numbers among which one is missing stay whole, and texts are quoted: a lone carriage return would end a row otherwise.
    frame = table.to_pandas(integer_object_nulls=True, ignore_metadata=True)
    frame.to_csv(fresh(target), index=False, encoding="utf-8", quoting=csv.QUOTE_NONNUMERIC)


def _write_json(table: pa.Table, target: Path, like: Path) -> None:
    try:
        rows = [json.dumps(row, ensure_ascii=False) for row in table.to_pylist()]
    except TypeError as error:
        raise ValueError(f"{target.name}: a column cannot be written as JSON: {error}") from error
    if like.is_file() and like.suffix.lower() == ".json" and _is_list(like, like.read_text(encoding="utf-8-sig")):
        content = "[\n" + ",\n".join(rows) + "\n]\n"
    else:
        content = "".join(f"{row}\n" for row in rows)
    fresh(target).write_text(content, encoding="utf-8", newline="\n")


_FORMATS: dict[str, Callable[[pa.Table, Path, Path], None]] = {".csv": _write_csv, ".json": _write_json, ".jsonl": _write_json}
