"""The factored gradient store: built once for a model and its training data, then any target costs a fraction of a forward pass.

Of every parameter the smallest exact form of the per-sample gradients is kept (:func:`robust_if.pieces.compact`): the factors of a linear layer, the
gradients of a convolution, the rows that an embedding read. Each stored array is one ``.npy`` file with a row per sample.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from robust_if.data import Samples, as_samples, batches, to
from robust_if.gradients import channels_last
from robust_if.layers import Factors, Live, some
from robust_if.layout import Layout, laid_out, whole
from robust_if.memory import footprint, plan, text
from robust_if.pieces import Pieces
from robust_if.sweep import Sweep, fingerprint, parse_bytes
from robust_if.task import Batch, Params, Task
from robust_if.token_losses import NO_TOKEN, is_tokens
from robust_if.writing import write_json

logger = logging.getLogger(__name__)

#: Bytes of gradients that are kept in memory, that one block of a store holds, and after which a build notes how far it got.
MEMORY, BLOCK, PART = 2**30, 2**23, 2**28

_FORMAT = 1


@dataclass(frozen=True, eq=False)
class Store:
    """The per-sample gradients of one model on its training data, on disk or in memory. Made by :meth:`build`, found again by :meth:`open`.

    Args:
        layout: what is stored of every sample.
        columns: the arrays, each ``(n, width)``.
        device: where the blocks are wanted.
        marks, ids: digests of the model and of the data, and the samples' ids ``(n,)``.
    """

    layout: Layout
    columns: list[Tensor] = field(repr=False)
    device: torch.device
    marks: Mapping[str, str] = field(default_factory=dict, repr=False)
    ids: NDArray[Any] | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.columns[0])

    @property
    def bytes(self) -> int:
        """Size of the arrays."""
        return len(self) * self.layout.row

    def describe(self) -> str:
        """One line: how many samples, and how large."""
        return f"the gradients of {len(self):,} samples for {len(self.layout.entries)} parameters, {text(self.bytes)}"

    def blocks(self) -> Iterator[tuple[slice, Pieces]]:
        """Rows of consecutive samples, from the first to the last, and their gradients."""
        step = max(1, BLOCK // max(1, self.layout.row))
        for start in range(0, len(self), step):
            rows = slice(start, min(start + step, len(self)))
            yield rows, self.pieces(rows)

    def pieces(self, rows: slice) -> Pieces:
        """The gradients of the samples in ``rows``."""
        for entry in self.layout.entries:
            yield entry.name, [entry.piece([self.columns[k][rows].to(self.device) for k in entry.columns])]

    def check(self, task: Task, train: Samples) -> None:
        """Raise a ``ValueError`` unless the store was built for this model and these data."""
        params = task.params()
        differing = [name for name, mark in marks_of(task, as_samples(train)).items() if self.marks.get(name) != mark]
        if differing or {entry.name: entry.size for entry in self.layout.entries} != {name: value.numel() for name, value in params.items()}:
            raise ValueError(
                f"index: it was built for another {' and another '.join(differing) or 'model'}; build one with Store.build for this model "
                "(its parameters, loss and patterns count) and exactly these training data (their ids and order count)"
            )
        device = next(iter(params.values())).device
        if device != self.device:
            raise ValueError(f"index: it was opened for {self.device}, the model is on {device}; use Store.open(directory, device={str(device)!r})")

    @classmethod
    def size(cls, task: Task, train: Any) -> int:
        """Bytes that :meth:`build` will take on disk, from the gradients of a few samples."""
        samples = as_samples(train)
        return len(samples) * _probe(Live.of(task, task.params(), samples, 1)).row

    @classmethod
    def build(cls, task: Task, train: Any, directory: str | Path, *, sweep: Sweep = Sweep()) -> Store:  # noqa: B008 - frozen
        """Keep the gradients of all training samples in ``directory``: one forward and one backward pass.

        The same call goes on where an interrupted one stopped, with the same result bit for bit; of a finished store it only opens the files.

        Args:
            task: the model, in evaluation mode, and its loss.
            train: training data, ``Samples``, ``(X, y)`` or a map-style data set.
            directory: a folder of its own; made if need be.
            sweep: batch size, progress, and after how many rows at most the build notes how far it got.

        Raises:
            ValueError: if ``directory`` holds another store, the samples differ in shape, or ``sweep`` asks for a cluster or bfloat16.
            OSError: if the disk has too little space, which is checked before any long work.
        """
        samples, directory = as_samples(train), Path(directory)
        like = next(iter(task.params().values()))
        probe = next(batches(samples, 4, like))
        params, sweep = channels_last(task, task.params(), probe), fitted(task, probe, sweep)
        live = Live.of(task, params, samples, sweep.batch_size)
        layout, uncovered = _probe(live), live.gradients.uncovered
        logger.info("store: %s x %s samples = %s in %s", text(layout.row), f"{len(samples):,}", text(layout.row * len(samples)), directory)
        if uncovered:
            share = layout.bytes_of(uncovered) / max(1, layout.row)
            logger.info("store: no layer rule for %s, kept as they are: %.0f%% of the size", some(uncovered), 100 * share)
        manifest = {"format": _FORMAT, "samples": len(samples), "marks": marks_of(task, samples), **asdict(layout)}
        done = _prepare(directory, json.loads(json.dumps(manifest)), layout, samples)
        with ExitStack() as stack:
            files = []
            for k, (dtype, width) in enumerate(layout.columns):
                offset = _mapped(directory, k).offset + done * width * getattr(torch, dtype).itemsize
                files.append(stack.enter_context(_path(directory, k).open("r+b")))
                files[-1].seek(offset)
            noted = done
            for start in sweep.progress(range(done, len(samples), sweep.batch_size), "store"):
                stop = min(start + sweep.batch_size, len(samples))
                found, parts = laid_out(live.gradients.pieces(to(samples.batch(slice(start, stop)), like)), layout)
                _same(found, layout, start)
                for file, part in zip(files, parts, strict=True):
                    part = part.cpu()
                    file.write((part.view(torch.int16) if part.dtype == torch.bfloat16 else part).numpy().data)
                if stop == len(samples) or stop - noted >= sweep.rows_per_part or (stop - noted) * layout.row >= PART:
                    for file in files:
                        file.flush()
                        os.fsync(file.fileno())
                    write_json(directory / "progress.json", {"rows": stop})
                    noted = stop
        return cls.open(directory, device=like.device)

    @classmethod
    def open(cls, directory: str | Path, *, device: str | torch.device = "cpu") -> Store:
        """The store in ``directory``; its files are mapped, not read, and nothing in them is trusted or executed.

        Args:
            device: where the gradients are wanted, that of the model.

        Raises:
            ValueError: if there is no store, it is not finished, or its files are not those that its manifest describes.
        """
        directory = Path(directory)
        if not (directory / "manifest.json").is_file():
            raise ValueError(f"index: no store in {directory}; make one with Store.build(task, train, {str(directory)!r})")
        try:
            manifest = json.loads((directory / "manifest.json").read_bytes())
            if manifest["format"] != _FORMAT:
                raise ValueError(f"format {manifest['format']!r}, expected {_FORMAT}")
            samples, layout = whole(manifest["samples"]), Layout.parse(manifest["entries"], manifest["columns"])
            marks = {str(name): str(mark) for name, mark in manifest["marks"].items()}
            done = json.loads((directory / "progress.json").read_bytes())["rows"]
            if done == samples:
                columns = [_column(directory, k, samples, *column) for k, column in enumerate(layout.columns)]
                if (ids := np.load(directory / "ids.npy", allow_pickle=False)).shape != (samples,):
                    raise ValueError(f"ids.npy has shape {ids.shape}, expected ({samples},)")
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ValueError(f"index: the store in {directory} is damaged ({error}); delete it and build it anew") from error
        if done != samples:
            raise ValueError(
                f"index: the store in {directory} is not finished, {done} of {samples} samples are there; "
                f"call Store.build(task, train, {str(directory)!r}) again, it goes on where it stopped"
            )
        return cls(layout, columns, torch.device(device), marks, ids)


def factors_of(task: Task, params: Params, data: Samples, sweep: Sweep) -> Factors:
    """The gradients of ``data`` at ``params``: computed once and kept in memory where they fit there, otherwise computed anew on every pass.

    They may take 1 GiB, or half of the sweep's ``max_memory``; how much they take is known from a few samples before the pass.
    """
    live = Live.of(task, params, data, sweep.batch_size)
    layout, like = _probe(live), next(iter(params.values()))
    limit = limit_of(sweep)
    if len(data) * layout.row > limit:
        logger.info("gradients take %s, more than %s: they are computed anew on every pass", text(len(data) * layout.row), text(limit))
        return live
    columns = [torch.empty(len(data), width, dtype=getattr(torch, dtype), device=like.device) for dtype, width in layout.columns]
    for rows, pieces in live.blocks():
        found, parts = laid_out(pieces, layout)
        _same(found, layout, rows.start)
        for column, part in zip(columns, parts, strict=True):
            column[rows] = part
    return Store(layout, columns, like.device, ids=data.ids)


def fitted(task: Task, probe: Batch, sweep: Sweep) -> Sweep:
    """``sweep`` with batches that fit its ``max_memory``; a ``ValueError`` where it asks for what is not done here."""
    if sweep.engine != "local" or sweep.precision != "full":
        raise ValueError(f"sweep: expected engine='local' and precision='full' here, got {sweep.engine!r} and {sweep.precision!r}")
    return sweep if sweep.max_memory is None else plan(footprint(task, task.params(), probe, "layerwise"), sweep)


def limit_of(sweep: Sweep) -> int:
    """Bytes of gradients that may be kept in memory."""
    return MEMORY if sweep.max_memory is None else parse_bytes(sweep.max_memory) // 2


def _probe(live: Live) -> Layout:
    """The layout, from two samples; of texts from the longest, since batches of shorter ones can be filled up."""
    like, samples = next(iter(live.gradients.params.values())), live.samples
    if isinstance(samples.tensors, tuple) and is_tokens(samples.tensors[0]):
        samples = samples.take(torch.argsort((samples.tensors[0] != NO_TOKEN).sum(1), descending=True, stable=True)[:2].numpy())
    return laid_out(live.gradients.pieces(to(samples.batch(slice(0, 2)), like)))[0]


def _same(found: Layout, expected: Layout, start: int) -> None:
    if found != expected:
        odd = [entry.name for entry, other in zip(found.entries, expected.entries, strict=True) if entry != other]
        raise ValueError(f"train: from sample {start} on the gradients of {odd[:3]} have another form than before; expected samples of one shape")


def check_space(directory: Path, needed: int) -> None:
    """Raise an ``OSError`` if the disk of ``directory`` has less than ``needed`` bytes."""
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise OSError(f"directory: {text(needed)} are needed, the disk of {directory} has {text(free)} free")


def marks_of(task: Task, samples: Samples) -> dict[str, str]:
    """Digests of the model, with its loss and the parameters that count, and of the data."""
    model = fingerprint(task.model.state_dict(), Samples((torch.zeros(1),)), task.patterns, task.loss, task.forward)
    return {"model": model, "data": fingerprint({}, samples)}


def _prepare(directory: Path, manifest: dict[str, Any], layout: Layout, samples: Samples) -> int:
    """Files of the full size, and the number of rows in them that are finished."""
    path, done = directory / "manifest.json", 0
    if path.is_file():
        try:
            found, done = json.loads(path.read_bytes()), int(json.loads((directory / "progress.json").read_bytes())["rows"])
        except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
            raise ValueError(f"directory: the store in {directory} is damaged ({error}); delete it and build it anew") from error
        if found != manifest or not 0 <= done <= len(samples):
            raise ValueError(f"directory: {directory} holds the store of another model or other data; choose another, or delete it")
        logger.info("store: going on after %d of %d samples", done, len(samples))
    directory.mkdir(parents=True, exist_ok=True)
    check_space(directory, layout.row * (len(samples) - done))
    if not path.is_file():
        for k, (dtype, width) in enumerate(layout.columns):
            np.lib.format.open_memmap(_path(directory, k), "w+", _written(dtype), (len(samples), width))
        np.save(directory / "ids.npy", np.asarray(samples.ids.tolist()), allow_pickle=False)
        write_json(directory / "progress.json", {"rows": 0})
        write_json(path, manifest)
    return done


def _written(dtype: str) -> np.dtype[Any]:
    """The type in the file; numpy has no bfloat16."""
    return np.dtype("int16" if dtype == "bfloat16" else dtype)


def _path(directory: Path, k: int) -> Path:
    return directory / f"column-{k:04d}.npy"


def _mapped(directory: Path, k: int) -> np.memmap[Any, Any]:
    values = np.load(_path(directory, k), mmap_mode="r", allow_pickle=False)
    if not isinstance(values, np.memmap):
        raise ValueError(f"{_path(directory, k).name} is not one array")
    return values


def _column(directory: Path, k: int, samples: int, dtype: str, width: int) -> Tensor:
    values, written = _mapped(directory, k), _written(dtype)
    if values.shape != (samples, width) or values.dtype != written or not values.flags.c_contiguous:
        raise ValueError(f"{_path(directory, k).name} holds {values.dtype} {values.shape}, expected {written} {(samples, width)}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the file is read-only, and nobody writes to a piece
        return torch.from_numpy(values).view(getattr(torch, dtype))
