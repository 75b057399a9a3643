"""The pass over the data on several processes or machines, by Ray Data. Ray is an extra, imported only here and only when it is asked for."""

from __future__ import annotations

import importlib
import logging
import os
import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load, save
from torch import Tensor

from robust_if.data import Samples

Compute = Callable[[Samples, slice], Tensor]
T = TypeVar("T")


def run(
    compute: Compute, samples: Samples, parts: Sequence[slice], *, workers: int | None, device: torch.device, retries: int = 3
) -> Generator[tuple[slice, Tensor]]:
    """``compute(samples, rows)`` of every part, as they are done, by actors that each hold one copy of ``compute``.

    The samples are put into the object store once; a worker reads from there. A part whose worker died is computed again by another. Starting a
    worker takes some seconds: this pays for passes of minutes. Ray is used as it is where ``ray.init`` was called or ``RAY_ADDRESS`` is set
    (robust-if must be installed on its machines); else it is started on this machine and shut down afterwards.

    Args:
        workers: processes; by default one per core, or per GPU for a model on CUDA, of what Ray has.
        device: of the model; on CUDA each worker asks for one GPU.
        retries: how often one part may lose its worker before the pass fails: one that always ends its process would go round for ever.

    Yields:
        The rows of a part and its values ``(rows, …)``, in any order, each part exactly once.

    Raises:
        ImportError: if Ray is not installed.
        ValueError: if the model is on CUDA, but not on its first device, or Ray has no GPU.
        RuntimeError: if a part arrives twice or not at all. An error in a worker is a ``ray.exceptions.RayTaskError`` with the traceback.
    """
    if device.type == "cuda" and device.index not in (None, 0):
        raise ValueError(f"engine: a worker sees one GPU, as cuda:0, but the model is on {device}; move it to cuda:0")
    ray = _import("ray")
    data = _import("ray.data")
    with _session(ray, workers):
        kind = "GPU" if device.type == "cuda" else "CPU"
        available = int(ray.cluster_resources().get(kind, 0))
        if kind == "GPU" and not available:
            raise ValueError("engine: the model is on CUDA, but Ray has no GPU")
        size = min(workers or max(available, 1), len(parts))
        shared = [ray.put(compute), ray.put(_Arrays.of(samples) if isinstance(samples.tensors, tuple) else samples)]
        attempts = ray.remote(num_cpus=0)(_counter()).remote()
        starts = data.from_items([{"start": rows.start, "stop": rows.stop} for rows in parts], override_num_blocks=len(parts))
        done = starts.map_batches(
            _Worker,
            batch_size=1,
            fn_constructor_args=(shared, attempts, retries),
            compute=data.ActorPoolStrategy(size=size),
            num_cpus=1,
            num_gpus=1 if kind == "GPU" else None,
        )
        done.context.enable_progress_bars = False
        arriving = ((slice(row["start"], row["stop"]), load(row["part"])["values"]) for row in done.iter_rows())
        yield from exactly_once(parts, arriving)


def exactly_once(parts: Sequence[slice], arriving: Iterable[tuple[slice, T]]) -> Iterator[tuple[slice, T]]:
    """``arriving``, checked to be every one of ``parts`` once.

    Raises:
        RuntimeError: if a part arrives twice, was not asked for, or is missing at the end.
    """
    missing = {(rows.start, rows.stop) for rows in parts}
    for rows, part in arriving:
        if (rows.start, rows.stop) not in missing:
            raise RuntimeError(f"engine: the part of rows {rows.start} to {rows.stop} arrived twice, or was never asked for")
        missing.remove((rows.start, rows.stop))
        yield rows, part
    if missing:
        raise RuntimeError(f"engine: {len(missing)} of {len(parts)} parts never arrived, the first from row {min(missing)[0]}")


def _counter() -> type:
    """The class of an actor that counts how often each part was begun; made here, so that Ray ships it by value and its process loads no torch."""

    class Attempts:
        def __init__(self) -> None:
            self.counts: dict[int, int] = {}

        def begin(self, start: int) -> int:
            self.counts[start] = self.counts.get(start, 0) + 1
            return self.counts[start]

    return Attempts


class _Worker:
    """One process of the pass; Ray makes it once and hands it part after part."""

    def __init__(self, shared: Sequence[Any], attempts: Any, retries: int) -> None:
        self.ray, self.attempts, self.retries = _import("ray"), attempts, retries
        self.compute, self.samples = self.ray.get(list(shared))

    def __call__(self, batch: dict[str, NDArray[Any]]) -> dict[str, Any]:
        rows = slice(int(batch["start"][0]), int(batch["stop"][0]))
        if (begun := self.ray.get(self.attempts.begin.remote(rows.start)) - 1) > self.retries:
            raise RuntimeError(
                f"engine: the part of rows {rows.start} to {rows.stop} lost its worker {begun} times; it may have run out of memory, or crashed"
            )
        if isinstance(self.samples, _Arrays):
            part = self.compute(self.samples.take(rows), slice(0, rows.stop - rows.start))
        else:
            part = self.compute(self.samples, rows)
        return {"start": batch["start"], "stop": batch["stop"], "part": [save({"values": part.contiguous()})]}


@dataclass(frozen=True)
class _Arrays:
    """Tensors as arrays of bytes, which all workers of a machine read from one place in memory: ``(n, bytes of a sample)`` each."""

    arrays: list[NDArray[np.uint8]]
    like: list[Tensor]

    @classmethod
    def of(cls, samples: Samples) -> _Arrays:
        assert isinstance(samples.tensors, tuple)
        tensors = [tensor.detach().cpu().contiguous() for tensor in samples.tensors]
        arrays = [tensor.flatten().view(torch.uint8).view(len(tensor), tensor.nbytes // len(tensor)).numpy() for tensor in tensors]
        return cls(arrays, [tensor[:0].clone() for tensor in tensors])

    def take(self, rows: slice) -> Samples:
        """A copy of the samples in ``rows``: what Ray shares cannot be written to, and a model may work in place."""
        copies = [torch.from_numpy(array[rows].copy()) for array in self.arrays]
        return Samples(tuple(copy.flatten().view(like.dtype).view(-1, *like.shape[1:]) for copy, like in zip(copies, self.like, strict=True)))


@contextmanager
def _session(ray: Any, workers: int | None) -> Iterator[None]:
    """Ray as it runs already, or a quiet one of our own."""
    if ray.is_initialized():
        yield
        return
    quiet = {"logging_level": logging.ERROR, "log_to_driver": False}
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if "RAY_ADDRESS" in os.environ:
        ray.init(**quiet)
    else:
        # workers import what this process can import
        paths = {"env_vars": {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}}
        ray.init(address="local", num_cpus=workers, include_dashboard=False, runtime_env=paths, **quiet)
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    try:
        yield
    finally:
        ray.shutdown()


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"engine: 'ray' needs {name}, which is not installed: pip install 'robust-if[ray]'") from error
