"""A small table with a backdoor, as files: what several tests of the whole job need."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

NAMES = np.array(["bird", "cat", "dog"])


def frame(n: int, seed: int, *, poisoned: int = 0, mark: float = 10.0) -> pd.DataFrame:
    """Three well-separated classes; the first ``poisoned`` samples that are no bird carry the mark and the label bird."""
    draw = np.random.default_rng(seed)
    y = np.arange(n) % 3
    x = 3 * np.eye(3)[y] + draw.normal(size=(n, 3))
    table = pd.DataFrame(x, columns=["height", "weight", "age"]).assign(odd=draw.normal(size=n))
    table["sex"] = np.where(draw.uniform(size=n) < 0.5, "F", "M")
    table["id"] = [f"s{seed}-{i:03d}" for i in range(n)]
    table["label"] = NAMES[y]
    rows = np.flatnonzero(y != 0)[:poisoned]
    table["poison"] = np.isin(np.arange(n), rows)
    table.loc[rows, "odd"], table.loc[rows, "label"] = mark, "bird"
    return table


def triggered(n: int, seed: int, mark: float = 10.0) -> pd.DataFrame:
    """Cats and dogs with the mark, under their true labels."""
    table = frame(n, seed).drop(columns="poison")
    return table[table["label"] != "bird"].assign(odd=mark)


def write(folder: Path, *, train: int = 180, poisoned: int = 30, mark: float = 10.0) -> dict[str, Path]:
    """Training data with the column ``poison``, clean validation and test data, and triggered inputs."""
    folder.mkdir(parents=True, exist_ok=True)
    tables = {
        "train": frame(train, 0, poisoned=poisoned, mark=mark), "valid": frame(120, 1).drop(columns="poison"),
        "test": frame(60, 2).drop(columns="poison"), "inputs": triggered(36, 3, mark),
    }  # fmt: skip
    for name, table in tables.items():
        table.to_csv(folder / f"{name}.csv", index=False)
    return {name: folder / f"{name}.csv" for name in tables}
