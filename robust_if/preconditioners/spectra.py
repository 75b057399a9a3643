"""Curvature of single blocks of parameters, as eigenvalues in a Kronecker basis: what K-FAC and EK-FAC are made of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from robust_if.pieces import CHUNK, Outer, Piece, Pieces, dense, second_moment, squares
from robust_if.preconditioners.base import inverted
from robust_if.task import Params

#: Largest side of a Kronecker factor, whose eigenvectors are computed; a layer beyond it is taken by its diagonal.
LARGEST_SIDE = 8192
#: Largest parameter without Kronecker structure whose own matrix of second moments is kept whole.
LARGEST_DENSE = 512
#: Strips in which a second moment is summed, at least so many columns wide; what lies below them is known by symmetry.
STRIPS, NARROWEST = 6, 48

Kind = Literal["kronecker", "dense", "diagonal", "empirical diagonal"]


@dataclass(frozen=True)
class Block:
    """Parameters whose curvature is approximated together, as one matrix.

    Args:
        names: a layer's weight and perhaps its bias, which is the last column; or one parameter.
        kind: how the curvature is approximated.
        shape: (rows, columns) of the matrix; one row unless the kind is ``"kronecker"``.
    """

    names: tuple[str, ...]
    kind: Kind
    shape: tuple[int, int]

    def outer(self, pieces: list[Piece]) -> Outer:
        """The gradients as outer products, without the column of the bias; of a dense block 1 ⊗ g."""
        if self.kind == "kronecker" and isinstance(pieces[0], Outer):
            return pieces[0]
        grads = dense(pieces)
        return Outer(grads[:, None], grads.new_ones(len(grads), 1, 1))

    def join(self, params: Params) -> Tensor:
        """The matrix of the block's parameters."""
        return torch.cat([params[name].reshape(self.shape[0], -1) for name in self.names], 1)

    def split(self, matrix: Tensor, like: Params) -> Params:
        """The inverse of :meth:`join`, in the shapes and types of ``like``."""
        parts = zip(self.names, torch.split(matrix, [like[name].numel() // self.shape[0] for name in self.names], 1), strict=True)
        return {name: part.reshape(like[name].shape).to(like[name]) for name, part in parts}


def blocks(pieces: Pieces, others: Sequence[tuple[str, int]]) -> Iterator[Block]:
    """The blocks of the parameters whose gradients are ``pieces``, for any samples, and of the ``others`` by name and size."""
    layers: list[tuple[list[str], Outer]] = []
    for name, each in pieces:
        piece, size = each[0], each[0].size
        if len(each) > 1 or not isinstance(piece, Outer):
            yield Block((name,), "dense" if size <= LARGEST_DENSE else "diagonal", (1, size))
        elif max(piece.a.shape[2], piece.b.shape[2]) >= LARGEST_SIDE:
            yield Block((name,), "diagonal", (1, size))
        elif layers and layers[-1][1].b is piece.b and piece.a.shape[2] == 1:
            layers[-1][0].append(name)
        else:
            layers.append(([name], piece))
    yield from (Block(tuple(names), "kronecker", (piece.b.shape[2], piece.a.shape[2] + len(names) - 1)) for names, piece in layers)
    yield from (Block((name,), "empirical diagonal", (1, size)) for name, size in others)


@dataclass(frozen=True)
class Spectrum:
    """A block's curvature: eigenvalues, and the Kronecker product of orthonormal columns whose vectors they belong to.

    Args:
        values: ``(rows, columns)``.
        basis: ``(rows, rows)`` and ``(columns, columns)``; ``None`` where the curvature is diagonal.
    """

    values: Tensor
    basis: tuple[Tensor, Tensor] | None = None

    def solve(self, matrix: Tensor, damping: float) -> Tensor:
        """(C + λI)⁻¹ applied to a matrix of the block; a direction with neither curvature nor damping is left out."""
        damped = self.values + damping
        matrix = matrix.to(damped)
        turned = matrix if self.basis is None else self.basis[0].mT @ matrix @ self.basis[1]
        solved = torch.where(damped > 0, turned / damped, 0.0)
        return solved if self.basis is None else self.basis[0] @ solved @ self.basis[1].mT

    def quadratic(self, block: Block, found: list[list[Piece]], damping: float, power: int) -> Tensor:
        """gᵢᵀ (C + λI)^−power gᵢ for every sample, ``(B,)``, from the pieces of each of the block's parameters."""
        weights = inverted(self.values + damping, power)
        if self.basis is None:
            return squares(found[0], weights)
        left, right = self.basis
        if block.kind == "kronecker" and not isinstance(found[0][0], Outer):  # a store keeps the gradients of convolutions as they are
            grads = torch.cat([dense(each).view(len(each[0]), block.shape[0], -1) for each in found], 2)
            return (left.mT @ (grads.to(right) @ right)).flatten(1) ** 2 @ weights.flatten()
        piece, joined = block.outer(found[0]), len(block.names) > 1
        if piece.a.shape[1] == 1:
            a, b = _turned_factors(piece, self.basis, joined)
            return ((b[:, 0] ** 2 @ weights) * a[:, 0] ** 2).sum(1)
        return torch.cat([turned.flatten(1) ** 2 @ weights.flatten() for turned in _turned(piece, self.basis, joined)])


class Sums:
    """Running sums over the samples from which a block's spectrum follows.

    Args:
        block: what is summed.
        like: a parameter; the sums have its device, and its type but at least float32.
        tokens: whether positions are tokens. Those without a gradient are then left out: how many a batch has beyond the end of its texts is chance.
    """

    def __init__(self, block: Block, like: Tensor, tokens: bool = False) -> None:
        rows, columns = block.shape
        empty = like.new_empty(0, dtype=torch.promote_types(like.dtype, torch.float32))
        self.block, self.positions, self.tokens = block, 0, tokens
        self.values = empty.new_zeros(block.shape) if "diagonal" in block.kind else None
        self.inputs = empty.new_zeros(columns, columns) if self.values is None else empty
        self.outputs = empty.new_zeros(rows, rows) if self.values is None else empty

    def add(self, pieces: list[Piece]) -> None:
        """Add the gradients of a batch."""
        if self.values is not None:
            self.values += second_moment(pieces)
            return
        piece = self.block.outer(pieces)
        a, b = _positions(piece.a).to(self.inputs), _positions(piece.b).to(self.outputs)
        if self.tokens:
            there = b.any(1)
            a, b = a[there], b[there]
        self.positions += len(a)
        _add_upper(self.inputs, a)
        _add_upper(self.outputs, b)
        if len(self.block.names) > 1:
            self.inputs[:-1, -1] += a.sum(0)
            self.inputs[-1, -1] += len(a)

    def spectrum(self, samples: int) -> Spectrum:
        """The spectrum that K-FAC gives."""
        if self.values is not None:
            return Spectrum(self.values / samples)
        (inputs, right), (outputs, left) = _eigen(self.inputs / samples), _eigen(self.outputs / max(self.positions, 1))
        return Spectrum(outputs[:, None] * inputs, (left, right))


def turned_squares(block: Block, pieces: list[Piece], basis: tuple[Tensor, Tensor]) -> Tensor:
    """Σ_i (leftᵀ G_i right)², squared entry by entry, of the samples' gradients G_i as matrices: ``(rows, columns)``.

    With one position per sample the square of an outer product is the outer product of the squares, and no gradient is formed.
    """
    piece, joined = block.outer(pieces), len(block.names) > 1
    if piece.a.shape[1] == 1:
        a, b = _turned_factors(piece, basis, joined)
        return (b[:, 0] ** 2).mT @ a[:, 0] ** 2
    total = torch.zeros_like(basis[1].new_empty(block.shape))
    for turned in _turned(piece, basis, joined):
        total += (turned**2).sum(0)
    return total


def _turned_factors(piece: Outer, basis: tuple[Tensor, Tensor], joined: bool) -> tuple[Tensor, Tensor]:
    """The factors in the basis, ``(B, T, columns)`` and ``(B, T, rows)``; the input of a ``joined`` bias is 1."""
    left, right = basis
    a = piece.a.to(right) @ right[: piece.a.shape[2]]
    return a + right[-1] if joined else a, piece.b.to(left) @ left


def _turned(piece: Outer, basis: tuple[Tensor, Tensor], joined: bool) -> Iterator[Tensor]:
    """leftᵀ G_i right, ``(b, rows, columns)``, for as many samples at a time as may be formed at once."""
    left, right = basis
    (_, positions, inner), outer = piece.a.shape, piece.b.shape[2]
    form_first = outer * inner * (outer + inner) < positions * (outer**2 + inner**2)
    step = max(1, CHUNK // (len(left) * len(right)))
    for start in range(0, len(piece), step):
        part = piece.take(slice(start, start + step))
        if form_first:
            a, b = part.a.to(right), part.b.to(left)
            grads = torch.bmm(b.mT, a)
            grads = torch.cat([grads, b.sum(1)[:, :, None]], 2) if joined else grads
            yield left.mT @ (grads @ right)
        else:
            a, b = _turned_factors(part, basis, joined)
            yield torch.bmm(b.mT, a)


def _positions(values: Tensor) -> Tensor:
    """All positions of all samples as rows. Patches of images lie in memory position by position, and are copied that way: four times as fast."""
    return values.flatten(0, 1) if values.is_contiguous() else values.permute(2, 0, 1).flatten(1).mT


def _add_upper(total: Tensor, rows: Tensor) -> None:
    """Add rowsᵀ rows to the upper triangle of ``total``, or of its first part where it is larger."""
    columns = rows.shape[1]
    step = max(NARROWEST, -(-columns // STRIPS))
    for start in range(0, columns, step):
        stop = min(start + step, columns)
        total[:stop, start:stop].addmm_(rows[:, :stop].mT, rows[:, start:stop])


def _eigen(upper: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, none negative, and eigenvectors of the symmetric matrix with this upper triangle."""
    values, vectors = torch.linalg.eigh(upper, UPLO="U")
    if not (values.isfinite().all() and vectors.isfinite().all()):  # LAPACK's divide and conquer can fail in single precision, without an error
        values, vectors = (each.to(upper) for each in torch.linalg.eigh(upper.double(), UPLO="U"))
    return values.clamp(min=0), vectors
