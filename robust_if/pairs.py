"""Which training sample harms which held-out sample: the matrix of all their influences."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from robust_if.cosines import Directions, Stacked, cosines
from robust_if.data import Samples, as_samples, batches, to
from robust_if.gradients import channels_last
from robust_if.layers import Factors, LayerGradients, Live
from robust_if.layout import smallest, whole
from robust_if.memory import text
from robust_if.pieces import CHUNK, Dense, Outer, Piece, Pieces, gram, squares
from robust_if.preconditioners import Identity, Inverse, Preconditioner, RandomProjection
from robust_if.preconditioners.base import Several
from robust_if.preconditioners.random_projection import Subspace
from robust_if.store import Store, check_space, factors_of, fitted, limit_of, marks_of
from robust_if.sweep import Sweep
from robust_if.task import Params, Task
from robust_if.writing import write_json

logger = logging.getLogger(__name__)

_FORMAT = 1

Normalise = Literal["none", "cosine", "layer"]


def pairwise(
    task: Task,
    train: Any,
    queries: Any,
    *,
    preconditioner: Preconditioner = Identity(),  # noqa: B008 - frozen
    normalise: Normalise = "none",
    directory: str | Path | None = None,
    sweep: Sweep = Sweep(),  # noqa: B008 - frozen
    index: Store | None = None,
) -> NDArray[Any]:
    """−(1/n) ⟨∇ℓ_q, P ∇ℓ_i⟩ of every training sample i (row) with every query q (column); positive: without i, the loss of q would be lower.

    The mean over the queries is what :class:`~robust_if.InnerProduct` gives for their :class:`~robust_if.Utility`. The queries' gradients are held in
    factored form, those of the training samples stream past; only as many queries as fit in memory are taken at a time, each with a pass of its own.

    Args:
        task: the model, in evaluation mode, and its loss.
        train: n training samples, ``Samples``, ``(X, y)`` or a map-style data set.
        queries: q held-out samples, in the same form.
        preconditioner: P; the identity by default.
        normalise: ``"none"``; ``"cosine"`` in place of the product, of P ∇ℓ_q and ∇ℓ_i; or ``"layer"``, the mean of the single layers' cosines, for
            models whose layers or samples have very different gradient scales, such as language models.
        directory: where the matrix is written as it is made, so that the same call goes on after an interruption, and memory stays bounded.
        sweep: batch size, progress, and ``max_memory``, half of which the queries' gradients may take (1 GiB without it).
        index: the stored gradients of ``train``, which saves the passes over the data.

    Returns:
        ``(n, q)`` in the floating-point type of the parameters (float32 for smaller ones); with ``directory`` a read-only memory map.

    Raises:
        ValueError: if ``directory`` holds another matrix, ``index`` is of another model or data, or ``normalise`` is unknown or asked of a
            projection.
        OSError: if the matrix does not fit on the disk.

    Source: influence functions, Koh and Liang 2017 (arXiv 1703.04730), equation 2; without curvature, Pruthi et al. 2020 (arXiv 2002.08484).
    """
    if not isinstance(preconditioner, Preconditioner):
        raise TypeError(f"preconditioner: expected one such as Identity(), got {preconditioner!r}")
    if normalise not in get_args(Normalise):
        raise ValueError(f"normalise: expected one of {', '.join(map(repr, get_args(Normalise)))}, got {normalise!r}")
    if normalise != "none" and isinstance(preconditioner, RandomProjection):
        raise ValueError(f"normalise: {preconditioner.name!r} knows products alone and no lengths; expected 'none', got {normalise!r}")
    train, queries, like = as_samples(train), as_samples(queries), next(iter(task.params().values()))
    if index is not None:
        index.check(task, train)
    probe = next(batches(queries, 4, like))
    params, sweep = channels_last(task, task.params(), probe), fitted(task, probe, sweep)
    dtype = np.dtype("float64" if like.dtype == torch.float64 else "float32")
    shape = (len(train), len(queries))
    how = f"{preconditioner!r}, {normalise}"
    matrix = _Matrix(np.empty(shape, dtype)) if directory is None else _Matrix.at(Path(directory), task, train, queries, how, dtype)
    if matrix.columns.start < len(queries):
        _fill(matrix, task, params, train, queries, preconditioner, normalise, sweep, index)
    return matrix.values if matrix.directory is None else np.load(matrix.directory / "matrix.npy", mmap_mode="r", allow_pickle=False)


def _fill(
    matrix: _Matrix, task: Task, params: Params, train: Samples, queries: Samples, preconditioner: Preconditioner, normalise: Normalise, sweep: Sweep,
    index: Store | None,
) -> None:  # fmt: skip
    plain, numbers = isinstance(preconditioner, Identity), sum(value.numel() for value in params.values())
    size = Store.size(task, queries) // len(queries) if plain else 2 * numbers * next(iter(params.values())).element_size()
    step = min(len(queries), max(1, limit_of(sweep) // max(1, size)))
    blocks = list(matrix.blocks(step))
    if index is not None:
        factors: Factors = index
    elif preconditioner.reads_factors or len(blocks) > 1:
        factors = factors_of(task, params, train, sweep)
    else:
        factors = Live.of(task, params, train, sweep.batch_size)
    if len(blocks) > 1:
        logger.info("pairwise: %d queries at a time, %d passes over the training samples", step, len(blocks))
    if not plain:
        inverse = preconditioner.build(task, params, train, sweep, factors if isinstance(factors, Store) else None)
    for columns in blocks:
        some = queries.take(range(columns.start, columns.stop))
        each: Directions
        if plain:
            each = _raw(task, params, some, sweep)
        elif isinstance(inverse, Subspace):
            each = _Projected.of(task, params, some, sweep, inverse)
        else:
            each = _preconditioned(task, params, some, sweep, inverse)
        for rows, pieces in sweep.progress(factors.blocks(), "pairwise"):
            if rows.stop > matrix.done(columns):  # the gradients of a block are not computed before they are asked for
                block = -_products(pieces, each) / len(train) if normalise == "none" else -cosines(pieces, each, normalise == "layer")
                matrix.write(rows, columns, block, sweep.rows_per_part)


def _products(pieces: Pieces, directions: Directions) -> Tensor:
    return torch.stack([directions.products(name, [smallest(found)]) for name, found in pieces]).sum(0)


def _raw(task: Task, params: Params, queries: Samples, sweep: Sweep) -> Directions:
    factors = factors_of(task, params, queries, sweep)
    found = factors.pieces(slice(None)) if isinstance(factors, Store) else next(factors.blocks())[1]
    return _Raw({name: _form(pieces) for name, pieces in found})


@dataclass(frozen=True)
class _Raw:
    kept: dict[str, Piece]

    def products(self, name: str, pieces: list[Piece]) -> Tensor:
        query = self.kept[name]
        step = max(1, CHUNK // _pair(pieces[0], query))
        parts = [gram(pieces, [query.take(slice(start, start + step))]) for start in range(0, len(query), step)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def squares(self, name: str) -> Tensor:
        return squares([self.kept[name]])


def _form(pieces: list[Piece]) -> Piece:
    """The form in which the gradients are multiplied, made once where it fits in memory."""
    (piece,) = pieces
    if isinstance(piece, Outer):
        positions, inner, outer = *piece.a.shape[1:], piece.b.shape[2]
        if positions**2 * (inner + outer) < piece.size:
            return piece
    return Dense(piece.dense()) if len(piece) * piece.size <= CHUNK else piece


def _pair(piece: Piece, query: Piece) -> int:
    """Numbers that each query adds to what multiplication holds in memory."""
    if isinstance(query, Dense):
        return len(piece)
    positions = query.b.shape[1] * (piece.b.shape[1] if not isinstance(piece, Dense) else 1)
    return len(piece) if positions == 1 else max(query.size, len(piece) * positions)


@dataclass(frozen=True)
class _Projected:
    """In a subspace products take the features alone, and no direction is ever formed."""

    subspace: Subspace
    solved: Params

    @classmethod
    def of(cls, task: Task, params: Params, queries: Samples, sweep: Sweep, subspace: Subspace) -> _Projected:
        found = [
            torch.cat([subspace.projections[name].gradients(each) for name, each in pieces], 1)
            for _, pieces in Live.of(task, params, queries, sweep.batch_size).blocks()
        ]
        return cls(subspace, subspace.solve(torch.cat(found)))

    def products(self, name: str, pieces: list[Piece]) -> Tensor:
        return self.subspace.projections[name].gradients(pieces) @ self.solved[name].mT

    def squares(self, name: str) -> Tensor:
        raise AssertionError("refused before")


def _preconditioned(task: Task, params: Params, queries: Samples, sweep: Sweep, inverse: Inverse) -> Stacked:
    like = next(iter(params.values()))
    gradients = LayerGradients(task, params, to(queries.batch(slice(0, 4)), like))
    directions = {name: like.new_empty(len(queries), *value.shape) for name, value in params.items()}
    start, failed = 0, 0
    for batch in batches(queries, sweep.batch_size, like):
        for name, grads in gradients.dense(batch):
            directions[name][start : start + len(grads)] = grads
            count = len(grads)
        start += count
    if isinstance(inverse, Several):
        return Stacked(inverse.several(directions))
    for q in range(len(queries)):
        solution = inverse({name: value[q] for name, value in directions.items()})
        failed += not solution.notes.get("converged", True)
        for name, value in solution.direction.items():
            directions[name][q] = value
    if failed:
        logger.warning("pairwise: the solver did not converge for %d of %d queries; raise damping or the number of iterations", failed, len(queries))
    return Stacked(directions)


@dataclass
class _Matrix:
    """The matrix ``(n, q)`` in memory or on disk, and how far it is filled: all columns before ``columns``, and ``rows`` rows of those."""

    values: NDArray[Any]
    directory: Path | None = None
    columns: slice = field(default_factory=lambda: slice(0, 0))
    rows: int = 0

    @classmethod
    def at(cls, directory: Path, task: Task, train: Samples, queries: Samples, how: str, dtype: np.dtype[Any]) -> _Matrix:
        """The matrix in ``directory``, made if it is not there; refused if it is another one."""
        marks = {**marks_of(task, train), "queries": marks_of(task, queries)["data"], "preconditioner": how}
        shape = (len(train), len(queries))
        manifest = {"format": _FORMAT, "pairwise": list(shape), "type": dtype.name, "marks": marks}
        path = directory / "matrix.npy"
        if not (directory / "manifest.json").is_file():
            directory.mkdir(parents=True, exist_ok=True)
            size = len(train) * len(queries) * dtype.itemsize
            logger.info("pairwise: %s in %s", text(size), directory)
            check_space(directory, size)
            values = np.lib.format.open_memmap(path, "w+", dtype, shape)
            matrix = cls(values, directory)
            matrix.note()
            write_json(directory / "manifest.json", manifest)
            return matrix
        try:
            found = dict(json.loads((directory / "manifest.json").read_bytes()))
            if found == manifest:
                values = np.load(path, mmap_mode="r+", allow_pickle=False)
                progress = json.loads((directory / "progress.json").read_bytes())
                start, stop, rows = (whole(progress[name]) for name in ("start", "stop", "rows"))
                if not isinstance(values, np.memmap) or values.shape != shape or values.dtype != dtype or not start <= stop <= len(queries):
                    raise ValueError("its files do not fit its manifest")
        except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
            raise ValueError(f"directory: the matrix in {directory} is damaged ({error}); delete it to start afresh") from error
        if found != manifest:
            other = found.get("marks", {})
            differing = [name for name, mark in marks.items() if not isinstance(other, dict) or other.get(name) != mark] or ["kind of result"]
            raise ValueError(f"directory: {directory} holds something made with another {', another '.join(differing)}; choose another, or delete it")
        return cls(values, directory, slice(start, stop), rows)

    def blocks(self, step: int) -> Iterator[slice]:
        """Columns still to be filled: first the block that was interrupted, then ``step`` at a time."""
        start = self.columns.start
        if self.rows:
            yield self.columns
            start = self.columns.stop
        for first in range(start, self.values.shape[1], step):
            yield slice(first, min(first + step, self.values.shape[1]))

    def done(self, columns: slice) -> int:
        """Rows that are finished in these columns."""
        return self.rows if columns == self.columns else 0

    def write(self, rows: slice, columns: slice, block: Tensor, rows_per_part: int) -> None:
        """Fill a block, and note it on disk after every ``rows_per_part`` rows."""
        self.values[rows, columns] = block.to("cpu", torch.from_numpy(self.values[:0]).dtype).numpy()
        if self.directory is not None and (rows.stop == len(self.values) or rows.stop - self.done(columns) >= rows_per_part):
            self.values.flush()  # type: ignore[attr-defined]
            last = rows.stop == len(self.values)
            self.columns, self.rows = (slice(columns.stop, columns.stop), 0) if last else (columns, rows.stop)
            self.note()

    def note(self) -> None:
        """Write down how far it is filled."""
        assert self.directory is not None
        write_json(self.directory / "progress.json", {"start": self.columns.start, "stop": self.columns.stop, "rows": self.rows})
