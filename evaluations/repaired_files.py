"""The files that a repair writes: weights, the repaired data in their own format, the result, and the page."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from robust_if.encoding import Encoder
from robust_if.evaluations.repaired import frame
from robust_if.evaluations.report.repair import render_repair, verdict
from robust_if.fairness.repair import Repair
from robust_if.formats.tables import is_csv, is_parquet
from robust_if.loading import Dataset
from robust_if.writing import plain, write_json


def write(directory: Path, said: dict[str, Any], found: Repair, train: Dataset, whole: Dataset, encoder: Encoder) -> dict[str, Any]:
    """Write everything; what ``result.json`` says.

    Args:
        directory: that was claimed for the run.
        said: the facts.
        found: the repair.
        train: the training samples as in the file.
        whole: the data that they were split from, or themselves.
        encoder: knows the labels as in the file.
    """
    weights = np.where(np.abs(found.weights - np.rint(found.weights)) < 1e-6, np.rint(found.weights), found.weights)
    labels = encoder.decode(found.labels)
    frame(found, train, labels, weights).to_csv(directory / "weights.csv", index=False)
    repaired = _copy(directory, said["action"], weights, labels, train, whole)
    files = {"weights": directory / "weights.csv", "repaired": repaired, "report": directory / "report.html"}
    result = {**said, "files": {name: None if path is None else str(path) for name, path in files.items()}}
    result["verdict"] = verdict(result)
    write_json(directory / "result.json", result, plain)
    render_repair(directory)
    shutil.rmtree(directory / "work", ignore_errors=True)
    return result


def _copy(directory: Path, action: str, weights: NDArray[np.float64], labels: NDArray[Any], train: Dataset, whole: Dataset) -> Path | None:
    """A copy in the input's own format: without the removed samples, with other labels, or with a column of weights; ``None`` if it can hold none.

    Samples that were split off for validation and test stay, with a weight of 1.
    """
    shutil.rmtree(directory / "repaired", ignore_errors=True)  # left by an interruption at this very place
    place = {row: at for at, row in enumerate(train.rows.tolist())}
    at = np.array([place.get(row, -1) for row in whole.rows.tolist()])
    inside = at >= 0
    new, weight, keep = whole.labels.copy(), np.ones(len(whole)), np.ones(len(whole), dtype=bool)
    weight[inside] = weights[at[inside]]
    if action == "relabel":
        merged = new.astype(object)
        merged[inside] = labels[at[inside]]
        new = np.array(merged.tolist())
    if action == "remove":
        keep = weight > 0
    if action != "reweigh":
        return whole.write(directory / "repaired", keep, new)
    if not is_csv(whole.path) and not is_parquet(whole.path):
        return None
    return _with_weights(whole.write(directory / "repaired", keep, new), weight)


def _with_weights(path: Path, weights: NDArray[np.float64]) -> Path:
    """The same table with a column ``sample_weight`` more; every other cell stays as it is written."""
    if is_parquet(path):
        import pyarrow.parquet as parquet

        with parquet.ParquetFile(path) as file:
            table = file.read()
        parquet.write_table(table.append_column(_free(table.column_names), [weights.tolist()]), path)
        return path
    cells = pd.read_csv(path, header=None, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    cells[len(cells.columns)] = [_free(cells.iloc[0].tolist()), *(f"{each:.6g}" for each in weights)]
    cells.to_csv(path, header=False, index=False)
    return path


def _free(names: list[str]) -> str:
    """A name for the column of weights that no other column has."""
    name = "sample_weight"
    while name in names:
        name += "_repaired"
    return name
