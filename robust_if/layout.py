"""How per-sample gradients are laid out as arrays with a row per sample: of every parameter the smallest exact form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the name that every reader of torch code expects

from robust_if.pieces import Dense, Outer, Piece, Pieces, Rows, compact

#: The numbers that occur.
TYPES = ("float32", "float64", "float16", "bfloat16", "int32", "int64")


@dataclass(frozen=True)
class Entry:
    """How one parameter is stored.

    Args:
        name: of the parameter.
        kind: ``"outer"``, of shape (T, in, out); ``"rows"``, of shape (T, dim, count); or ``"dense"``, of shape (size,).
        columns: positions of its arrays in :attr:`Layout.columns`; parameters may share one.
        shape: of one sample's gradient in that form.
    """

    name: str
    kind: str
    columns: tuple[int, ...]
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        form = {"outer": (2, 3), "rows": (2, 3), "dense": (1, 1)}
        if form.get(self.kind) != (len(self.columns), len(self.shape)):
            raise ValueError(f"{self.name} is stored in an unknown way")

    @property
    def widths(self) -> tuple[int, ...]:
        """Numbers per sample in each of its arrays."""
        if self.kind == "dense":
            return self.shape
        positions, inner, outer = self.shape
        return (positions * inner, positions * outer) if self.kind == "outer" else (positions, positions * inner)

    @property
    def size(self) -> int:
        """Numbers in one sample's gradient."""
        return self.shape[0] if self.kind == "dense" else self.shape[1] * self.shape[2]

    def piece(self, parts: list[Tensor]) -> Piece:
        """The gradients, from the rows of its arrays."""
        if self.kind == "dense":
            return Dense(parts[0])
        positions, inner, outer = self.shape
        if self.kind == "outer":
            return Outer(parts[0].view(-1, positions, inner), parts[1].view(-1, positions, outer))
        return Rows(parts[0].long(), parts[1].view(-1, positions, inner), outer)


@dataclass(frozen=True)
class Layout:
    """What is stored of every sample.

    Args:
        entries: one per parameter.
        columns: type and width of every array, each of shape ``(n, width)``.
    """

    entries: tuple[Entry, ...]
    columns: tuple[tuple[str, int], ...]

    @property
    def row(self) -> int:
        """Bytes per sample."""
        return sum(getattr(torch, dtype).itemsize * width for dtype, width in self.columns)

    @classmethod
    def parse(cls, entries: Any, columns: Any) -> Layout:
        """The layout that ``dataclasses.asdict`` and JSON made plain; a ``ValueError``, ``TypeError`` or ``KeyError`` if it is not one."""
        known = tuple((str(dtype), whole(width)) for dtype, width in columns)
        if not known or any(dtype not in TYPES for dtype, _ in known):
            raise ValueError("its numbers are of an unknown type")
        read = tuple(Entry(str(e["name"]), str(e["kind"]), tuple(map(whole, e["columns"])), tuple(map(whole, e["shape"]))) for e in entries)
        for entry in read:
            if any(k >= len(known) for k in entry.columns) or tuple(known[k][1] for k in entry.columns) != entry.widths:
                raise ValueError(f"the shapes of {entry.name} do not fit each other")
        return cls(read, known)

    def bytes_of(self, names: list[str]) -> int:
        """Bytes per sample of the named parameters."""
        used = {column for entry in self.entries if entry.name in names for column in entry.columns}
        return sum(getattr(torch, self.columns[k][0]).itemsize * self.columns[k][1] for k in used)


def laid_out(pieces: Pieces, layout: Layout | None = None) -> tuple[Layout, list[Tensor]]:
    """The layout of the gradients in their smallest form, and its arrays, each ``(B, width)``; what shares memory is there once.

    Args:
        layout: that of samples with as many positions or more, whose form is taken: batches of text differ in length.
    """
    forms = {entry.name: entry for entry in layout.entries} if layout is not None else {}
    entries: list[Entry] = []
    found: list[Tensor] = []
    parts: list[Tensor] = []

    def place(values: Tensor, width: int | None = None) -> int:
        flat = values.flatten(1).contiguous()
        lacking = 0 if width is None else width - flat.shape[1]
        for k, other in enumerate(found):
            same = other.data_ptr() == flat.data_ptr() and other.shape == flat.shape and other.dtype == flat.dtype
            if same and parts[k].shape[1] == flat.shape[1] + lacking:
                return k
        found.append(flat)
        parts.append(F.pad(flat, (0, lacking)) if lacking else flat)
        return len(parts) - 1

    for name, each in pieces:
        piece, form = smallest(each), forms.get(name)
        if form is not None and form.kind == "dense":
            piece = Dense(piece.dense())
        if isinstance(piece, Dense):
            entries.append(Entry(name, "dense", (place(piece.grads),), (piece.size,)))
            continue
        # positions at which nothing happened come after a sample's own
        positions = piece.b.shape[1] if form is None else max(piece.b.shape[1], form.shape[0])
        outer = positions * piece.b.shape[2]
        if isinstance(piece, Outer):
            inner = piece.a.shape[2]
            entries.append(Entry(name, "outer", (place(piece.a, positions * inner), place(piece.b, outer)), (positions, inner, piece.b.shape[2])))
        else:
            index = piece.index.int() if piece.count <= 2**31 else piece.index
            entries.append(Entry(name, "rows", (place(index, positions), place(piece.b, outer)), (positions, piece.b.shape[2], piece.count)))
    return Layout(tuple(entries), tuple((str(part.dtype).removeprefix("torch."), part.shape[1]) for part in parts)), parts


def smallest(pieces: list[Piece]) -> Piece:
    """The same gradients in their smallest form (:func:`robust_if.pieces.compact`)."""
    (piece,) = pieces if len(pieces) == 1 else compact(pieces)
    if isinstance(piece, Outer) and piece.size == piece.b.shape[2] and bool((piece.a == 1).all()):
        # a bias; at a single position its gradient is a factor that its weight has too
        return Dense(piece.b[:, 0] if piece.b.shape[1] == 1 else piece.b.sum(1))
    return compact([piece])[0]


def whole(value: Any) -> int:
    """``value``, if it is a whole number from 0 on; otherwise a ``ValueError``."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"expected a whole number, got {value!r}")
    return value
