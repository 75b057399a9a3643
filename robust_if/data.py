"""Samples in a fixed order, each with an id that survives every step.

Scores, weights and labels are aligned with the samples by position and carry the ids, so nothing is ever shuffled here: a data set is
indexed, not iterated.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.data import Dataset, TensorDataset, default_collate

from robust_if.task import Batch
from robust_if.token_losses import NO_TOKEN, NOT_LEARNT, is_tokens


@dataclass(frozen=True, eq=False)
class Samples:
    """n samples: tensors whose first axis is the sample, or a map-style data set whose items are collated on access.

    Args:
        tensors: tensors of shape ``(n, ...)``, usually ``(x, y)``; or a ``torch.utils.data.Dataset`` with ``__len__`` and ``__getitem__``.
        ids: ``(n,)`` unique ids, integers or strings; the position by default.

    Raises:
        ValueError: if there is no sample, the lengths differ, an id occurs twice, or a feature is not finite (its sample is named).
    """

    tensors: tuple[Tensor, ...] | Dataset[Any] = field(repr=False)
    ids: NDArray[Any] = field(default=None, repr=False)  # type: ignore[arg-type]
    index: Tensor | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.ids is None:
            object.__setattr__(self, "ids", np.arange(self._stored()))
        ids = np.asarray(self.ids)
        object.__setattr__(self, "ids", ids)
        if len(ids) == 0:
            raise ValueError("data: expected at least one sample, got none")
        if self.index is None and len(ids) != self._stored():
            raise ValueError(f"ids: expected one per sample ({self._stored()}), got {len(ids)}")
        if len(np.unique(ids)) != len(ids):
            values, counts = np.unique(ids, return_counts=True)
            raise ValueError(f"ids: expected unique ids, but {values[counts.argmax()]!r} occurs {counts.max()} times")
        if isinstance(self.tensors, tuple):
            self._check_tensors(self.tensors)

    def _stored(self) -> int:
        return len(self.tensors[0]) if isinstance(self.tensors, tuple) else len(self.tensors)  # type: ignore[arg-type]

    def _check_tensors(self, tensors: tuple[Tensor, ...]) -> None:
        lengths = [len(tensor) for tensor in tensors]
        if len(set(lengths)) > 1:
            raise ValueError(f"data: expected tensors of one length, got {lengths}")
        for position, tensor in enumerate(tensors):
            if tensor.is_floating_point():
                bad = ~torch.isfinite(tensor).flatten(1).all(1) if tensor.ndim > 1 else ~torch.isfinite(tensor)
                if bad.any():
                    where = [str(i) for i in self.ids[bad.cpu().numpy()][:5]]
                    raise ValueError(
                        f"data: tensor {position} holds values that are not finite (NaN or infinity) in {int(bad.sum())} of {len(bad)} samples, "
                        f"ids {', '.join(where)}; fill or drop them first"
                    )

    def __len__(self) -> int:
        return len(self.ids)

    def batch(self, index: slice | Tensor) -> Batch:
        """The samples at ``index`` (positions in this object) as one batch."""
        if isinstance(self.tensors, tuple):
            return tuple(tensor[index] for tensor in self.tensors)
        rows = torch.arange(len(self))[index] if self.index is None else self.index[index]
        return default_collate([self.tensors[int(row)] for row in rows])

    def take(self, index: ArrayLike) -> Samples:
        """The samples at ``index`` (positions, or a boolean mask), in that order, with their ids."""
        rows = np.asarray(index)
        rows = np.flatnonzero(rows) if rows.dtype == bool else rows.astype(np.int64)
        positions = torch.from_numpy(rows)
        if isinstance(self.tensors, tuple):
            return Samples(tuple(tensor[positions] for tensor in self.tensors), self.ids[rows])
        return replace(self, ids=self.ids[rows], index=positions if self.index is None else self.index[positions])

    @property
    def labels(self) -> Tensor:
        """The second tensor, ``(n,)``: the labels of an ``(x, y)`` data set."""
        if isinstance(self.tensors, tuple):
            if len(self.tensors) < 2:
                raise ValueError("data: expected (x, y), got samples without labels")
            return self.tensors[1]
        return torch.cat([self.batch(slice(start, start + 1024))[1] for start in range(0, len(self), 1024)])

    def with_labels(self, labels: ArrayLike | Tensor) -> Samples:
        """The same samples with other labels, ``(n,)``."""
        new = torch.as_tensor(labels, dtype=self.labels.dtype)
        if new.shape != self.labels.shape:
            raise ValueError(f"labels: expected shape {tuple(self.labels.shape)}, got {tuple(new.shape)}")
        if isinstance(self.tensors, tuple):
            return replace(self, tensors=(self.tensors[0], new, *self.tensors[2:]))
        return replace(self, tensors=_Relabelled(self.tensors, self.index, new), index=None)


class _Relabelled(Dataset[Any]):
    """A map-style data set of (x, y, …) whose labels are replaced."""

    def __init__(self, base: Dataset[Any], index: Tensor | None, labels: Tensor) -> None:
        self.base, self.labels = base, labels
        self.index = torch.arange(len(labels)) if index is None else index

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> Any:
        x, _, *rest = self.base[int(self.index[i])]
        return (x, self.labels[i], *rest)


def concatenate(parts: Sequence[Samples]) -> Samples:
    """The samples of all parts, one after another; a single part keeps its ids, several are numbered afresh. Texts may differ in width."""
    if len(parts) == 1:
        return parts[0]
    whole = [part.batch(slice(None)) for part in parts]
    fills = (NO_TOKEN, NOT_LEARNT) if is_tokens(whole[0][0]) else ()
    columns = enumerate(zip(*whole, strict=True))
    return Samples(tuple(_stacked(tensors, fills[k] if k < len(fills) else None) for k, tensors in columns))


def _stacked(tensors: Sequence[Tensor], fill: int | None) -> Tensor:
    if fill is None or tensors[0].ndim < 2:
        return torch.cat(list(tensors))
    width = max(each.shape[1] for each in tensors)
    return torch.cat([nn.functional.pad(each, (0, width - each.shape[1]), value=fill) for each in tensors])


def as_samples(data: Any) -> Samples:
    """``data`` as :class:`Samples`: those themselves, a ``TensorDataset``, a map-style data set, or a tuple of arrays such as ``(X, y)``.

    Raises:
        TypeError: if it is none of these.
    """
    if isinstance(data, Samples):
        return data
    if isinstance(data, TensorDataset):
        return Samples(tuple(data.tensors))
    if isinstance(data, (tuple, list)):
        return Samples(tuple(_tensor(array) for array in data))
    if hasattr(data, "__len__") and hasattr(data, "__getitem__") and not isinstance(data, (str, bytes, dict, np.ndarray, Tensor)):
        return Samples(data)
    raise TypeError(f"data: expected Samples, (X, y) or a map-style torch data set, got {type(data).__name__}")


def _tensor(array: Any) -> Tensor:
    if isinstance(array, Tensor):
        return array
    values = np.asarray(array)
    if values.dtype == object:
        raise TypeError("data: expected numeric arrays, got one of Python objects; encode text and categories first")
    tensor = torch.as_tensor(values)
    return tensor.long() if tensor.ndim == 1 and not tensor.is_floating_point() else tensor


def batches(samples: Samples, batch_size: int, like: Tensor) -> Iterator[Batch]:
    """The samples in their order, ``batch_size`` at a time, on the device and in the floating-point type of ``like``."""
    for start in range(0, len(samples), batch_size):
        yield to(samples.batch(slice(start, start + batch_size)), like)


def to(batch: Batch, like: Tensor) -> Batch:
    """``batch`` on the device of ``like``; floating-point tensors also in its type."""

    def move(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return leaf.to(like) if leaf.is_floating_point() else leaf.to(like.device)

    return tree_map(move, batch)
