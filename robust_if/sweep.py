"""The one loop over the data: batches in order, progress, precision, memory, and parts on disk so that interrupted work resumes."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import re
import warnings
from collections.abc import Callable, Generator, Iterable, Mapping, MutableMapping
from contextlib import closing, nullcontext
from dataclasses import dataclass, field, fields, is_dataclass
from functools import partial
from numbers import Integral
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from scipy.stats import ConstantInputWarning, spearmanr
from torch import Tensor
from torch.utils._pytree import tree_leaves

from robust_if import cluster
from robust_if.data import Samples, to
from robust_if.parts import Parts
from robust_if.task import Batch

logger = logging.getLogger(__name__)

Progress = Callable[[Iterable[Any], str], Iterable[Any]]
Engine = Literal["local", "ray"]
Precision = Literal["full", "bf16"]

#: Samples on which the ranking in bfloat16 is compared with the one in full precision, and the agreement below which a warning is due.
COMPARED, AGREEMENT = 256, 0.99

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


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
        rows_per_part: samples in one part on disk, or in one unit of work of a cluster.
        engine: ``"local"``, or ``"ray"`` for several processes or machines (:mod:`robust_if.cluster`).
        workers: processes of ``"ray"``; by default one per core, or per GPU for a model on CUDA.
        precision: ``"full"`` as the parameters are, or ``"bf16"``: float32 models under ``torch.autocast`` to bfloat16, for the passes over the data.
        max_memory: bytes, or text such as ``"2GB"``, that a pass may take in one process; :func:`robust_if.memory.plan` chooses the batch size.

    Raises:
        ValueError: if an argument is out of range.
        ImportError: if the engine is not installed.
    """

    batch_size: int = 128
    progress: Progress = field(default=silent, repr=False)
    directory: Path | None = field(default=None, repr=False)
    rows_per_part: int = 4096
    engine: Engine = "local"
    workers: int | None = None
    precision: Precision = "full"
    max_memory: int | str | None = None

    def __post_init__(self) -> None:
        for name in ("batch_size", "rows_per_part", *(["workers"] if self.workers is not None else [])):
            value = getattr(self, name)
            if not isinstance(value, Integral) or isinstance(value, bool):
                raise ValueError(f"{name}: expected a whole number, got {value!r}")
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        for name, allowed in (("engine", get_args(Engine)), ("precision", get_args(Precision))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: expected {' or '.join(map(repr, allowed))}, got {getattr(self, name)!r}")
        if self.workers is not None and self.engine == "local":
            raise ValueError(f"workers: engine 'local' is this process alone; expected engine='ray' with workers={self.workers}")
        if self.engine == "ray" and importlib.util.find_spec("ray") is None:
            raise ImportError("engine: 'ray' is not installed: pip install 'robust-if[ray]'")
        if not callable(self.progress):
            raise ValueError(f"progress: expected a function of an iterable and a description, got {type(self.progress).__name__}")
        if self.directory is not None:
            object.__setattr__(self, "directory", Path(self.directory))
            if self.directory.exists() and not self.directory.is_dir():
                raise ValueError(f"directory: {self.directory} is a file; expected a folder, or a path at which to make one")
        if self.max_memory is not None:
            parse_bytes(self.max_memory)

    def map(
        self,
        function: Callable[[Batch], Tensor],
        samples: Samples,
        like: Tensor,
        *,
        name: str,
        fingerprint: str = "",
        notes: MutableMapping[str, Any] | None = None,
    ) -> Tensor:
        """``function`` of every batch, concatenated over the samples in their order, on the CPU in float64.

        Batches begin anew with every part, so that a resumed result equals an uninterrupted one bit for bit. Memory: the result and one part.

        Args:
            function: ``batch -> (B,)`` or ``(B, …)``.
            like: a parameter; batches take its device and floating-point type.
            name: what is computed, for the progress bar and the folder of the parts.
            fingerprint: identifies model, estimator, target and data (:func:`fingerprint`); parts with another one are refused.
            notes: takes up what a reader of the result should know: ``"bf16_agreement"``, the Spearman correlation with full precision on the first
                samples (the lowest of the columns).

        Raises:
            ValueError: if ``directory`` holds parts of another computation, ``function`` does not give one value per sample, or bfloat16 is asked
                of a float64 model, which ``torch.autocast`` leaves as it is.
        """
        parts = None
        if self.directory is not None:
            parts = Parts(self.directory / name, samples.ids, fingerprint, self.rows_per_part, self.precision)
        if self.precision == "bf16":
            agreement = self._agreement(function, samples, like)
            logger.info("%s: bfloat16 ranks the first samples as full precision does to a Spearman correlation of %.4f", name, agreement)
            if notes is not None:
                notes["bf16_agreement"] = agreement
        rows = [slice(start, min(start + self.rows_per_part, len(samples))) for start in range(0, len(samples), self.rows_per_part)]
        compute = partial(compute_part, function, like.new_empty(0), self.batch_size, self.precision)
        result: Tensor | None = None
        with closing(self._arriving(compute, samples, rows, parts, like.device)) as arriving:
            for _, (where, part) in zip(self.progress(rows, name), arriving, strict=True):
                if result is None:
                    result = torch.empty(len(samples), *part.shape[1:], dtype=torch.float64)
                if part.shape != result[where].shape:
                    raise ValueError(
                        f"function: expected values of one shape, got {tuple(part.shape)} for the {where.stop - where.start} samples from "
                        f"{where.start}, and {tuple(result.shape[1:])} for each sample before"
                    )
                result[where] = part
        assert result is not None  # there is at least one sample
        return result

    def _arriving(
        self, compute: cluster.Compute, samples: Samples, rows: list[slice], parts: Parts | None, device: torch.device
    ) -> Generator[tuple[slice, Tensor]]:
        """Every part with its rows: first those on disk, then the others as they are computed and kept."""
        missing = []
        for where in rows:
            kept = None if parts is None else parts.read(where.start)
            if kept is None:
                missing.append(where)
            else:
                yield where, kept
        if self.engine == "ray" and missing:
            fresh = cluster.run(compute, samples, missing, workers=self.workers, device=device)
        else:
            fresh = ((where, compute(samples, where)) for where in missing)
        with closing(fresh):
            for where, part in fresh:
                if parts is not None:
                    parts.write(where.start, part)
                yield where, part

    def _agreement(self, function: Callable[[Batch], Tensor], samples: Samples, like: Tensor) -> float:
        """Spearman correlation of bfloat16 and full precision on the first batch, the lowest of the columns."""
        if like.dtype == torch.float64:
            raise ValueError("precision: 'bf16' is for float32 models, autocast leaves float64 as it is; use model.float(), or precision='full'")
        rows = slice(0, min(COMPARED, self.batch_size, len(samples)))
        full = compute_part(function, like, self.batch_size, "full", samples, rows)
        try:
            low = compute_part(function, like, self.batch_size, "bf16", samples, rows)
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise RuntimeError(f"precision: this computation fails under torch.autocast ({error}); use precision='full'") from error
        agreement = rank_agreement(full, low)
        if agreement < AGREEMENT:
            logger.warning(
                "precision: bfloat16 ranks the first %d samples differently from full precision (Spearman %.4f, expected at least %g); "
                "use precision='full' if the order matters",
                rows.stop, agreement, AGREEMENT,
            )  # fmt: skip
        return agreement


def compute_part(function: Callable[[Batch], Tensor], like: Tensor, batch_size: int, precision: Precision, samples: Samples, rows: slice) -> Tensor:
    """``function`` of the samples in ``rows``, batch by batch, ``(rows, …)`` on the CPU in float64; batches are halved where memory runs out.

    Raises:
        ValueError: if ``function`` does not give one value per sample.
    """
    size, start, values = batch_size, rows.start, []
    while start < rows.stop:
        stop = min(start + size, rows.stop)
        try:
            batch = to(samples.batch(slice(start, stop)), like)
            # weights are cast once per use: a cache would keep casts of parameters that are traced or changed
            low = torch.autocast(like.device.type, torch.bfloat16, cache_enabled=False) if precision == "bf16" else nullcontext()
            with low:
                value = function(batch)
            values.append(value.detach().to("cpu", torch.float64))
        except torch.OutOfMemoryError:
            if size == 1:
                raise
            size //= 2
            logger.warning("out of memory: going on with batches of %d", size)
            continue
        if value.ndim == 0 or len(value) != stop - start:
            raise ValueError(f"function: expected one value per sample, shape ({stop - start}, …), got shape {tuple(value.shape)}")
        start = stop
    return torch.cat(values)


def rank_agreement(one: Tensor, other: Tensor) -> float:
    """Spearman correlation of two tensors ``(n, …)`` over the samples, the lowest of the columns; 1 where neither orders the samples."""
    columns = zip(one.reshape(len(one), -1).T.numpy(), other.reshape(len(other), -1).T.numpy(), strict=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConstantInputWarning)
        found = [1.0 if np.ptp(a) == np.ptp(b) == 0 else float(np.nan_to_num(spearmanr(a, b).statistic)) for a, b in columns]
    return min(found)


def parse_bytes(value: int | str) -> int:
    """Bytes from a number or text such as ``"500MB"`` (10⁶) or ``"1.5 GiB"`` (2³⁰).

    Raises:
        ValueError: if it is neither, or not positive.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(value)) if isinstance(value, (int, str)) and value is not True else None
    if match is None or match[2].upper() not in _UNITS or float(match[1]) <= 0:
        raise ValueError(f"max_memory: expected bytes, or text such as '500MB' or '2GB', got {value!r}")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def fingerprint(state: Mapping[str, Tensor], samples: Samples, *settings: object) -> str:
    """A digest of parameters, data and settings; equal digests mean the same computation.

    Settings count by their repr, functions by their name, tensors and fields of dataclasses by their content. Of a map-style data set the ids and a
    few samples count, since reading it whole may take long.
    """
    digest = hashlib.sha256()
    for name, value in state.items():
        digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        digest.update(_bytes(value))
    for start in range(0, len(samples), _IDS):
        digest.update(repr(samples.ids[start : start + _IDS].tolist()).encode())
    probe = torch.linspace(0, len(samples) - 1, min(len(samples), 8)).long()
    content = samples.tensors if isinstance(samples.tensors, tuple) else tree_leaves(samples.batch(probe))
    for leaf in content:
        digest.update(f"{tuple(leaf.shape)}{leaf.dtype}".encode() if isinstance(leaf, Tensor) else repr(leaf).encode())
        if isinstance(leaf, Tensor):
            digest.update(_bytes(leaf))
    for setting in settings:
        digest.update(_said(setting).encode())
    return digest.hexdigest()


def _said(setting: object) -> str:
    """A setting as text; the repr of a large tensor would leave out its middle."""
    if isinstance(setting, Tensor):
        return f"{tuple(setting.shape)}{setting.dtype}{hashlib.sha256(_bytes(setting)).hexdigest()}"
    if isinstance(setting, (tuple, list)):
        return f"[{', '.join(map(_said, setting))}]"
    if is_dataclass(setting) and not isinstance(setting, type):
        shown = (f"{each.name}={_said(getattr(setting, each.name))}" for each in fields(setting) if each.repr)
        return f"{type(setting).__qualname__}({', '.join(shown)})"
    return str(getattr(setting, "__qualname__", repr(setting)))


#: Ids that are turned into text at a time.
_IDS = 2**16


def _bytes(value: Tensor) -> Any:
    """The memory of a tensor, not copied where it lies in one piece on the CPU."""
    return value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
