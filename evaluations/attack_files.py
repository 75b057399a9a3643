"""The files that a suspicion comes in: inputs on which an attack works, and the truth of a rehearsal."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from robust_if.formats.images import from_array
from robust_if.formats.npz import FEATURES
from robust_if.loading import Dataset, read


def read_inputs(
    path: Path,
    like: Dataset,
    *,
    label: str | None = None,
    id: str | None = None,  # noqa: A002
    name: str = "attack-inputs",
) -> Dataset:
    """Inputs in the format of the data ``like``; tables and archives may lack the labels, which are then empty.

    Args:
        name: of the option that gave the path, for messages.

    Raises:
        FileNotFoundError: if there is nothing at ``path``.
        ValueError: if it cannot be read.
    """
    try:
        return read(path, label=label, id=id)
    except ValueError as error:
        if not str(error).startswith("label: "):
            raise ValueError(f"{name}: {error}") from None
        features = _features(path, like, name)
        if features is None:
            raise ValueError(f"{name}: {error}") from None
    n = len(features)
    if n == 0:
        raise ValueError(f"{name}: {path} holds no sample")
    named = id or "id"
    ids = features[named].to_numpy() if isinstance(features, pd.DataFrame) and named in features and named not in like.features else np.arange(n)
    rows = like.take(np.zeros(n, dtype=np.int64))  # for what else a data set has; none of it is used
    return replace(rows, features=features, labels=np.full(n, ""), ids=ids, path=path, truth=None, rows=np.arange(n))


def _features(path: Path, like: Dataset, option: str) -> Any:
    """The features in a file without labels; ``None`` in a format that always has them."""
    name = path.name.lower()
    if name.endswith((".csv", ".csv.gz")):
        return pd.read_csv(path, encoding="utf-8-sig", low_memory=False)
    if name.endswith(".parquet"):
        return pd.read_parquet(path)
    if not name.endswith(".npz"):
        return None
    with np.load(path, allow_pickle=False) as archive:
        found = next((archive[each] for each in archive.files if each.lower() in FEATURES), None)
    if found is None or not isinstance(like.features, pd.DataFrame):
        return None if found is None else from_array(found, option)
    table = found.reshape(len(found), -1)
    if table.shape[1] != like.features.shape[1]:
        raise ValueError(f"{option}: expected {like.features.shape[1]} features as in training, got {table.shape[1]}")
    return pd.DataFrame(table, columns=like.features.columns)


def with_truth(data: Dataset, path: Path) -> Dataset:
    """The data with a truth that stands in a table of its own, as ``robust-if attack`` writes it: the columns ``id`` and ``poisoned``.

    Raises:
        ValueError: if a column is missing, ``poisoned`` is not boolean, or its ids are not those of the data, each once.
    """
    truth = pd.read_parquet(path) if path.name.lower().endswith(".parquet") else pd.read_csv(path)
    lacking = [name for name in ("id", "poisoned") if name not in truth]
    if lacking or truth["poisoned"].dtype != bool:
        raise ValueError(f"truth: {path} needs a column id and a boolean column poisoned, it has {dict(truth.dtypes.astype(str))}")
    marked = dict(zip(truth["id"].astype(str), truth["poisoned"], strict=True))
    names = data.ids.astype(str).tolist()
    if len(marked) < len(truth) or set(marked) != set(names):
        raise ValueError(f"truth: {path} holds {len(truth)} ids, expected the {len(names)} of {data.path}, each once")
    return replace(data, truth=np.array([marked[name] for name in names], dtype=bool))
