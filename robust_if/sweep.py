"""The one loop over the data: batches in order, progress, memory, and parts on disk so that interrupted work resumes."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._pytree import tree_leaves

from robust_if.data import Samples, to
from robust_if.task import Batch

logger = logging.getLogger(__name__)

Progress = Callable[[Iterable[Any], str], Iterable[Any]]


def silent(items: Iterable[Any], _: str) -> Iterable[Any]:
    """Progress that shows nothing."""
    return items


@dataclass(frozen=True)
class Sweep:
    """How the training data are passed over.

    Args:
        batch_size: samples at a time. Halved by itself, with a line in the log, where memory runs out; it never changes a score beyond rounding.
        progress: wraps the loop, ``(iterable, description) -> iterable``; ``rich.progress.track`` fits.
        directory: where finished parts are kept, so that the same call resumes after an interruption. Nothing is written without it.
        rows_per_part: samples in one part on disk.
    """

    batch_size: int = 256
    progress: Progress = field(default=silent, repr=False)
    directory: Path | None = field(default=None, repr=False)
    rows_per_part: int = 4096

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, got {self.batch_size}")

    def map(self, function: Callable[[Batch], Tensor], samples: Samples, like: Tensor, *, name: str, fingerprint: str = "") -> Tensor:
        """``function`` of every batch, concatenated over the samples in their order, on the CPU in float64.

        Args:
            function: ``batch -> (B,)`` or ``(B, …)``.
            like: a parameter; batches take its device and floating-point type.
            name: what is computed, for the progress bar and the folder of the parts.
            fingerprint: identifies model, estimator, target and data (:func:`fingerprint`); parts with another one are refused.

        Raises:
            ValueError: if ``directory`` holds parts of another computation.
        """
        starts = range(0, len(samples), self.rows_per_part)
        parts = [
            self._part(function, samples, like, slice(start, start + self.rows_per_part), self._path(name, fingerprint, start))
            for start in self.progress(starts, name)
        ]
        return torch.cat(parts)

    def _path(self, name: str, mark: str, start: int) -> Path | None:
        if self.directory is None:
            return None
        folder = self.directory / name
        manifest = folder / "manifest.json"
        if manifest.is_file():
            found = json.loads(manifest.read_text())
            if found != {"fingerprint": mark}:
                raise ValueError(
                    f"directory: {folder} holds parts of another computation (model, estimator, target or data differ); "
                    "choose another directory, or delete this one to start afresh"
                )
        else:
            folder.mkdir(parents=True, exist_ok=True)
            manifest.write_text(json.dumps({"fingerprint": mark}))
        return folder / f"part-{start:09d}.safetensors"

    def _part(self, function: Callable[[Batch], Tensor], samples: Samples, like: Tensor, rows: slice, path: Path | None) -> Tensor:
        if path is not None and path.is_file():
            return load_file(path)["values"]
        stop = min(rows.stop, len(samples))
        size, start, values = self.batch_size, rows.start, []
        while start < stop:
            try:
                batch = to(samples.batch(slice(start, min(start + size, stop))), like)
                values.append(function(batch).detach().to("cpu", torch.float64))
                start += size
            except torch.OutOfMemoryError:
                if size == 1:
                    raise
                size //= 2
                logger.warning("out of memory: going on with batches of %d", size)
        part = torch.cat(values)
        if path is not None:
            save_file({"values": part}, path.with_suffix(".tmp"))
            os.replace(path.with_suffix(".tmp"), path)
        return part


def fingerprint(state: Mapping[str, Tensor], samples: Samples, *settings: object) -> str:
    """A digest of parameters, data and settings; equal digests mean the same computation.

    Settings count by their repr, functions by their name. Of a map-style data set the ids and a few samples count, since reading it whole may take
    long.
    """
    digest = hashlib.sha256()
    for name, value in state.items():
        digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    digest.update(repr(samples.ids.tolist()).encode())
    probe = torch.linspace(0, len(samples) - 1, min(len(samples), 8)).long()
    content = samples.tensors if isinstance(samples.tensors, tuple) else tree_leaves(samples.batch(probe))
    for leaf in content:
        digest.update(f"{tuple(leaf.shape)}{leaf.dtype}".encode() if isinstance(leaf, Tensor) else repr(leaf).encode())
        if isinstance(leaf, Tensor):
            digest.update(leaf.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    for setting in settings:
        digest.update(getattr(setting, "__qualname__", repr(setting)).encode())
    return digest.hexdigest()
