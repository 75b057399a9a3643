"""Finished parts of a pass on disk, so that interrupted work resumes: Parquet files beside a manifest, each written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor

from robust_if.writing import write_json, write_whole

logger = logging.getLogger(__name__)

_FORMAT = 1


@dataclass(frozen=True)
class Parts:
    """The parts of one computation in one folder.

    ``manifest.json`` says which computation it is and is there before the first part. Each ``part-*.parquet`` holds the column ``id`` and one float64
    column per number of a sample's value (``value``, or ``value_0``, ``value_1``, …), and a digest of its content and of the manifest, so that a part
    which is damaged or comes from elsewhere is found out and computed again.

    Args:
        folder: where the files are; made with the first part.
        ids: ``(n,)`` of all samples.
        fingerprint: of model, estimator, target and data.
        rows_per_part: samples in one part.
        precision: of the computation; parts of another precision do not mix.

    Raises:
        ValueError: if the folder holds parts of another computation, parts without a manifest, or a manifest that cannot be read.
    """

    folder: Path
    ids: NDArray[Any] = field(repr=False)
    fingerprint: str
    rows_per_part: int
    precision: str = "full"

    def __post_init__(self) -> None:
        if not self._manifest.is_file():
            if any(self.folder.glob("part-*")):
                raise ValueError(f"directory: {self.folder} holds parts but no manifest.json that says of what; {_ADVICE}")
            return
        try:
            found = dict(json.loads(self._manifest.read_bytes()))
        except (ValueError, TypeError) as error:
            raise ValueError(f"directory: {self._manifest} is damaged ({error}); {_ADVICE}") from error
        differing = [name for name, value in self._identity.items() if found.get(name) != value]
        if differing:
            what = [
                "model, estimator, target or data differ" if name == "fingerprint" else f"{name} {found.get(name)} there, {self._identity[name]} here"
                for name in differing
            ]
            raise ValueError(f"directory: {self.folder} holds parts of another computation ({'; '.join(what)}); {_ADVICE}")

    def read(self, start: int) -> Tensor | None:
        """The values ``(rows, …)`` of the part whose first sample is ``start``; ``None`` if it has still to be computed."""
        path = self._path(start)
        if not path.is_file():
            return None
        content = path.read_bytes()
        try:
            table = pq.read_table(pa.BufferReader(content))
            about = json.loads(table.schema.metadata[b"robust_if"])
            columns = [table[name].to_numpy() for name in table.column_names[1:]]
            values = np.stack(columns, 1).reshape(len(table), *about["shape"])
            whole = about["digest"] == self._digest(start, values) and table["id"].to_pylist() == self._ids(start).tolist()
        except (OSError, ValueError, TypeError, KeyError, pa.ArrowException):
            whole = False
        if not whole:
            logger.warning("%s is damaged or belongs to another computation: it is computed again", path)
            return None
        return torch.from_numpy(values)

    def write(self, start: int, values: Tensor) -> None:
        """Keep the values ``(rows, …)`` of the part whose first sample is ``start``."""
        array = values.numpy()
        flat = array.reshape(len(array), -1)
        names = ["value"] if array.ndim == 1 else [f"value_{column}" for column in range(flat.shape[1])]
        if not self._manifest.is_file():
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self._manifest, {**self._identity, "columns": ["id", *names]})
        table = pa.table([pa.array(self._ids(start)), *(pa.array(column) for column in flat.T)], names=["id", *names])
        about = {"shape": array.shape[1:], "digest": self._digest(start, array)}
        sink = pa.BufferOutputStream()
        # a dictionary takes 0.0 and -0.0 for the same value
        pq.write_table(table.replace_schema_metadata({"robust_if": json.dumps(about)}), sink, use_dictionary=False)
        write_whole(self._path(start), sink.getvalue())

    @property
    def _manifest(self) -> Path:
        return self.folder / "manifest.json"

    @property
    def _identity(self) -> dict[str, Any]:
        return {
            "format": _FORMAT,
            "fingerprint": self.fingerprint,
            "rows": len(self.ids),
            "rows_per_part": self.rows_per_part,
            "precision": self.precision,
        }

    def _path(self, start: int) -> Path:
        return self.folder / f"part-{start:012d}.parquet"

    def _ids(self, start: int) -> NDArray[Any]:
        return self.ids[start : start + self.rows_per_part]

    def _digest(self, start: int, values: NDArray[np.float64]) -> str:
        digest = hashlib.sha256(json.dumps([self._identity, start, self._ids(start).tolist(), values.shape], default=str).encode())
        digest.update(values.tobytes())
        return digest.hexdigest()


_ADVICE = "choose another directory, or delete this one to start afresh"
