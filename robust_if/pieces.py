"""Per-sample gradients of one parameter, kept as the factors that a backward pass gives.

The gradient of sample i of a linear layer is Σ_t b_it ⊗ a_it over its positions t, with a the layer's input and b the gradient at its output.
Products, norms and sums of such gradients follow from the factors; whether the outer product is ever formed is decided here, by the number of
operations.

A parameter that enters the loss several times has several pieces, and its gradient is their sum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the name that every reader of torch code expects

#: Numbers (not bytes) that one chunk of per-sample gradients of one parameter may hold.
CHUNK = 2**25

#: Numbers in the patches that are made at a time.
CACHE = 2**20

#: Directions up to which a convolution's products are convolutions themselves.
FEW = 3


@dataclass(frozen=True)
class Outer:
    """Gradients Σ_t b_t ⊗ a_t, from ``a`` of shape (B, T, in) and ``b`` of shape (B, T, out)."""

    a: Tensor
    b: Tensor

    def __len__(self) -> int:
        return len(self.b)

    @property
    def size(self) -> int:
        """Numbers in one sample's gradient."""
        return self.a.shape[2] * self.b.shape[2]

    def dense(self) -> Tensor:
        """The gradients, ``(B, out · in)``."""
        inner, outer = self.a.shape[2], self.b.shape[2]
        if inner == 1:
            return (self.a * self.b).sum(1)
        # CPUs multiply faster with the narrow factor first
        return torch.bmm(self.a.mT, self.b).mT.flatten(1) if inner < outer else torch.bmm(self.b.mT, self.a).flatten(1)

    def take(self, rows: slice) -> Outer:
        """The samples in ``rows``."""
        return Outer(self.a[rows], self.b[rows])

    def products(self, directions: Tensor) -> Tensor:
        """⟨g_i, v⟩ for every row v of ``directions (k, out · in)``: ``(B, k)``."""
        k, (samples, positions, inner), outer = len(directions), self.a.shape, self.b.shape[2]
        if positions > 1 and (k > 1 or inner * outer < positions * outer):
            return _in_chunks([self], lambda grads: grads @ directions.T)
        maps = directions.view(k, outer, inner)
        if inner < outer:  # the smaller of the two factors is what is left to multiply
            mapped = (self.b.flatten(0, 1) @ maps.transpose(0, 1).flatten(1)).view(samples, positions, k, inner)
            return torch.einsum("btki,bti->bk", mapped, self.a)
        mapped = (self.a.flatten(0, 1) @ maps.flatten(0, 1).T).view(samples, positions, k, outer)
        return torch.einsum("btko,bto->bk", mapped, self.b)

    def squares(self, metric: Tensor | None) -> Tensor:
        """Σ_j g²_ij M_j for every sample, ``(B,)``; M = 1 without ``metric (out · in,)``."""
        positions, inner, outer = self.a.shape[1], self.a.shape[2], self.b.shape[2]
        if positions == 1:
            a2, b2 = self.a[:, 0] ** 2, self.b[:, 0] ** 2
            return a2.sum(1) * b2.sum(1) if metric is None else ((b2 @ metric.view(outer, inner)) * a2).sum(1)
        if metric is None and positions * (inner + outer) < inner * outer:
            return ((self.a @ self.a.mT) * (self.b @ self.b.mT)).sum((1, 2))
        return _in_chunks([self], lambda grads: _dense_squares(grads, metric))

    def second_moment(self) -> Tensor:
        """Σ_i g²_i, ``(out · in,)``."""
        if self.a.shape[1] == 1:
            return ((self.b[:, 0] ** 2).mT @ self.a[:, 0] ** 2).flatten()
        return _in_chunks([self], lambda grads: (grads**2).sum(0, keepdim=True)).sum(0)

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """Σ_i w_i g_i, ``(out · in,)``, for ``weights (B,)``."""
        return ((self.b * weights[:, None, None]).flatten(0, 1).mT @ self.a.flatten(0, 1)).flatten()


class Convolved(Outer):
    """Gradients of a convolution's weight, whose positions' inputs (the patches of the image) are copied out only where they are asked for.

    Args:
        image: input of the convolution, ``(B, in, height, width)``.
        grads: gradient at its output, ``(B, out, h, w)``.
        kernel, stride, padding, dilation: of the convolution, by axis.
    """

    def __init__(
        self, image: Tensor, grads: Tensor, kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int], dilation: tuple[int, int]
    ) -> None:
        self.__dict__.update(image=image, grads=grads, kernel=kernel, stride=stride, padding=padding, dilation=dilation)

    image: Tensor
    grads: Tensor
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    @cached_property
    def a(self) -> Tensor:
        """The patches, ``(B, T, in · kh · kw)``: ``F.unfold`` by strides, which is several times faster on a CPU."""
        (tall, wide), (high, across) = self.padding, self.dilation
        padded = F.pad(self.image, (wide, wide, tall, tall)).contiguous()
        sample, channel, row, column = padded.stride()
        strides = (sample, channel, row * high, column * across, row * self.stride[0], column * self.stride[1])
        patches = padded.as_strided((*self.image.shape[:2], *self.kernel, *self.grads.shape[2:]), strides)
        return patches.reshape(len(self.image), -1, self.grads.shape[2:].numel()).mT

    @cached_property
    def b(self) -> Tensor:
        """The gradients at the positions, ``(B, T, out)``."""
        return self.grads.permute(0, 2, 3, 1).flatten(1, 2)

    @property
    def size(self) -> int:
        """Numbers in one sample's gradient."""
        return self.grads.shape[1] * self._inner

    @property
    def _inner(self) -> int:
        return self.image.shape[1] * self.kernel[0] * self.kernel[1]

    @property
    def _positions(self) -> int:
        return self.grads.shape[2:].numel()

    def __len__(self) -> int:
        return len(self.image)

    def dense(self) -> Tensor:
        """The gradients, ``(B, size)``, with the patches of as few samples at a time as fit in a cache."""
        step = max(1, CACHE // (self._inner * self._positions))
        grads = self.grads.new_empty(len(self), self.size)
        for start in range(0, len(self), step):
            rows = slice(start, start + step)
            grads[rows] = Outer(self.take(rows).a, self.b[rows]).dense()
        return grads

    def take(self, rows: slice) -> Convolved:
        """The samples in ``rows``."""
        return Convolved(self.image[rows], self.grads[rows], self.kernel, self.stride, self.padding, self.dilation)

    def products(self, directions: Tensor) -> Tensor:
        """⟨g_i, v⟩ for every row v of ``directions (k, size)``: ``(B, k)``; for few of them, each as a kernel of its own."""
        k = len(directions)
        if k > FEW:
            return super().products(directions)
        kernels = directions.reshape(-1, self.image.shape[1], *self.kernel).contiguous(memory_format=torch.channels_last)
        mapped = F.conv2d(self.image, kernels, None, self.stride, self.padding, self.dilation)
        return torch.stack([(part * self.grads).sum((1, 2, 3)) for part in mapped.chunk(k, 1)], 1)


@dataclass(frozen=True)
class Rows:
    """Gradients of a table of ``count`` rows of which position t reads row ``index_t``: ``index (B, T)``, ``b (B, T, dim)``."""

    index: Tensor
    b: Tensor
    count: int

    def __len__(self) -> int:
        return len(self.index)

    @property
    def size(self) -> int:
        """Numbers in one sample's gradient."""
        return self.count * self.b.shape[2]

    def dense(self) -> Tensor:
        """The gradients, ``(B, count · dim)``."""
        grads = self.b.new_zeros(len(self), self.count, self.b.shape[2])
        return grads.scatter_add_(1, self.index[:, :, None].expand_as(self.b), self.b).flatten(1)

    def take(self, rows: slice) -> Rows:
        """The samples in ``rows``."""
        return Rows(self.index[rows], self.b[rows], self.count)

    def products(self, directions: Tensor) -> Tensor:
        """⟨g_i, v⟩ for every row v of ``directions (k, count · dim)``: ``(B, k)``."""
        tables = directions.view(len(directions), self.count, -1)
        return torch.stack([(table[self.index] * self.b).sum((1, 2)) for table in tables], 1)

    def squares(self, metric: Tensor | None) -> Tensor:
        """Σ_j g²_ij M_j for every sample, ``(B,)``; M = 1 without ``metric (count · dim,)``."""
        terms = self.b * self._merged()
        return (terms if metric is None else terms * metric.view(self.count, -1)[self.index]).sum((1, 2))

    def second_moment(self) -> Tensor:
        """Σ_i g²_i, ``(count · dim,)``."""
        return self._add(self.b * self._merged())

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """Σ_i w_i g_i, ``(count · dim,)``, for ``weights (B,)``."""
        return self._add(self.b * weights[:, None, None])

    def _merged(self) -> Tensor:
        """At every position the sum of b over the sample's positions that read the same row."""
        return (self.index[:, :, None] == self.index[:, None, :]).to(self.b) @ self.b

    def _add(self, values: Tensor) -> Tensor:
        table = values.new_zeros(self.count, values.shape[2])
        return table.index_add_(0, self.index.flatten(), values.flatten(0, 1)).flatten()


@dataclass(frozen=True)
class Dense:
    """Gradients as they are, ``(B, size)``."""

    grads: Tensor

    def __len__(self) -> int:
        return len(self.grads)

    @property
    def size(self) -> int:
        """Numbers in one sample's gradient."""
        return self.grads.shape[1]

    def dense(self) -> Tensor:
        """The gradients, ``(B, size)``."""
        return self.grads

    def take(self, rows: slice) -> Dense:
        """The samples in ``rows``."""
        return Dense(self.grads[rows])

    def products(self, directions: Tensor) -> Tensor:
        """⟨g_i, v⟩ for every row v of ``directions (k, size)``: ``(B, k)``."""
        return self.grads @ directions.T

    def squares(self, metric: Tensor | None) -> Tensor:
        """Σ_j g²_ij M_j for every sample, ``(B,)``; M = 1 without ``metric (size,)``."""
        return _dense_squares(self.grads, metric)

    def second_moment(self) -> Tensor:
        """Σ_i g²_i, ``(size,)``."""
        return (self.grads**2).sum(0)

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """Σ_i w_i g_i, ``(size,)``, for ``weights (B,)``."""
        return weights @ self.grads


Piece = Outer | Rows | Dense

#: The gradients of a batch: for every parameter, in their order, its name and its pieces.
Pieces = Iterable[tuple[str, list[Piece]]]


def dense(pieces: Sequence[Piece]) -> Tensor:
    """The per-sample gradients, ``(B, size)``."""
    total = pieces[0].dense()
    for piece in pieces[1:]:
        total = total + piece.dense()
    return total


def products(pieces: list[Piece], directions: Tensor) -> Tensor:
    """⟨g_i, v⟩ for every sample and every direction, ``(B, k)``.

    Args:
        directions: ``(k, *shape)`` in the shape of the parameter.
    """
    rows = directions.flatten(1)
    return torch.stack([piece.products(rows) for piece in pieces]).sum(0)


def squares(pieces: list[Piece], metric: Tensor | None = None) -> Tensor:
    """Σ_j g²_ij M_j for every sample, ``(B,)``; M = 1 without ``metric``, which has the shape of the parameter."""
    flat = None if metric is None else metric.flatten()
    if len(pieces) == 1:
        return pieces[0].squares(flat)
    return _in_chunks(pieces, lambda grads: _dense_squares(grads, flat))


def second_moment(pieces: list[Piece]) -> Tensor:
    """Σ_i g²_i, ``(size,)``."""
    if len(pieces) == 1:
        return pieces[0].second_moment()
    return _in_chunks(pieces, lambda grads: (grads**2).sum(0, keepdim=True)).sum(0)


def weighted_sum(pieces: list[Piece], weights: Tensor) -> Tensor:
    """Σ_i w_i g_i, ``(size,)``, for ``weights (B,)``."""
    return torch.stack([piece.weighted_sum(weights) for piece in pieces]).sum(0)


def weighted_sums(pieces: list[Piece], weights: Tensor) -> Tensor:
    """Σ_i w_ik g_i for every column k of ``weights (B, k)``, ``(k, size)``."""
    if weights.shape[1] == 1:
        return weighted_sum(pieces, weights[:, 0])[None]
    step = max(1, CHUNK // max(pieces[0].size, 1))
    starts = range(0, len(pieces[0]), step)
    parts = (weights[start : start + step].mT @ dense([piece.take(slice(start, start + step)) for piece in pieces]) for start in starts)
    return torch.stack(list(parts)).sum(0) if len(starts) > 1 else next(parts)


def gram(pieces: list[Piece], queries: list[Piece]) -> Tensor:
    """⟨g_i, g_q⟩ for every sample and every query, ``(B, Q)``, from the factors wherever that takes fewer operations."""
    return torch.stack([_gram(piece, query) for piece in pieces for query in queries]).sum(0)


def compact(pieces: list[Piece]) -> list[Piece]:
    """The same gradients in the fewest numbers: factors where they are smaller than what they multiply to."""
    piece = pieces[0]
    if len(pieces) == 1 and (isinstance(piece, Dense) or _numbers(piece) < piece.size):
        return pieces
    return [Dense(dense(pieces))]


def _numbers(piece: Outer | Rows) -> int:
    """Numbers that the factors of one sample hold."""
    if isinstance(piece, Convolved):
        return piece._positions * (piece._inner + piece.grads.shape[1])
    inner = piece.a.shape[2] if isinstance(piece, Outer) else 1
    return int(piece.b.shape[1] * (inner + piece.b.shape[2]))


def _gram(piece: Piece, query: Piece) -> Tensor:
    if isinstance(piece, Outer) and isinstance(query, Outer):
        t, s = piece.a.shape[1], query.a.shape[1]
        if t == s == 1:
            return _times(piece.a[:, 0], query.a[:, 0]) * _times(piece.b[:, 0], query.b[:, 0])
        if t * s * (piece.a.shape[2] + piece.b.shape[2]) < piece.size:
            return (torch.einsum("bti,qsi->bqts", piece.a, query.a) * torch.einsum("bto,qso->bqts", piece.b, query.b)).sum((2, 3))
    if isinstance(piece, Rows) and isinstance(query, Rows):
        same = piece.index[:, None, :, None] == query.index[None, :, None, :]
        return (torch.einsum("bto,qso->bqts", piece.b, query.b) * same).sum((2, 3))
    rows = query.dense()
    return _in_chunks([piece], lambda grads: _times(grads, rows))


def _times(a: Tensor, b: Tensor) -> Tensor:
    """The product a bᵀ; large float32 products on a CPU by oneDNN, which is twice as fast as MKL on processors that are not Intel's."""
    if a.dtype == torch.float32 and a.device.type == "cpu" and len(b) >= 16 and torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        product: Tensor = F.linear(a.to_mkldnn(), b.to_mkldnn()).to_dense()
        return product
    return a @ b.mT


def _dense_squares(grads: Tensor, metric: Tensor | None) -> Tensor:
    return (grads**2).sum(1) if metric is None else grads**2 @ metric


def _in_chunks(pieces: Sequence[Piece], function: Callable[[Tensor], Tensor]) -> Tensor:
    """``function`` of the gradients, formed for as many samples at a time as fit in memory; the results one after another."""
    step = max(1, CHUNK // max(pieces[0].size, 1))
    starts = range(0, len(pieces[0]), step)
    parts = [function(dense([piece.take(slice(start, start + step)) for piece in pieces])) for start in starts]
    return parts[0] if len(parts) == 1 else torch.cat(parts)
