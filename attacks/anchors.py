"""Tables with two groups: whose samples serve as anchors for poison, and how samples are added around them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.spatial import KDTree
from torch import Tensor

from robust_if.attacks.feasible import FeasibleSet
from robust_if.attacks.poisoned import Poisoned
from robust_if.data import Samples
from robust_if.task import Batch

Rows = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Table:
    """What the attacks that add samples share: the clean table, who may be an anchor, and where samples may go."""

    data: Samples
    x: Tensor
    y: Rows
    s: Rows
    favourable: int
    advantaged: int
    free: Tensor
    feasible: FeasibleSet | None

    @classmethod
    def of(cls, data: Samples, favourable: int, advantaged: int, mutable: ArrayLike | None, quantile: float | None) -> Table:
        y, s = labels_and_groups(data, favourable, advantaged)
        x = data.batch(slice(None))[0]
        if not (x.ndim == 2 and x.is_floating_point()):
            raise ValueError(f"data: expected features of floating point, shape (n, d), got {x.dtype} of shape {tuple(x.shape)}")
        if quantile is not None and not 0 < quantile <= 1:
            raise ValueError(f"quantile: expected a share above 0 and up to 1, or None, got {quantile}")
        free = _mutable(x, s, mutable)
        feasible = None if quantile is None else FeasibleSet.of(x[:, free], torch.from_numpy(y), quantile)
        return cls(data, x, y, s, favourable, advantaged, free, feasible)

    @property
    def std(self) -> Tensor:
        """Of every feature, ``(d,)``."""
        return self.x.std(0, correction=0)

    def anchors(self, draw: np.random.Generator, radius: float | None) -> Rows:
        """The rows of the two anchors: advantaged and unfavourable, disadvantaged and favourable."""
        found = []
        for group, label in ((self.advantaged, 1 - self.favourable), (1 - self.advantaged, self.favourable)):
            rows = np.flatnonzero((self.s == group) & (self.y == label))
            if len(rows) == 0:
                raise ValueError(f"data: expected a sample of group {group} with label {label} as anchor, got none")
            if radius is None:
                found.append(int(draw.choice(rows)))
                continue
            points = (self.x[rows] / torch.where(self.std > 0, self.std, 1)).double().cpu().numpy()
            neighbours = KDTree(points).query_ball_point(points, radius, return_length=True)
            if neighbours.max() < 2:
                raise ValueError(f"radius: no sample of group {group} with label {label} has another within {radius} standard deviations; raise it")
            found.append(int(rows[neighbours.argmax()]))
        return np.array(found)

    def move(self, rows: Rows, x: Tensor) -> Tensor:
        """Points ``x`` with the opposite of the labels of ``rows`` inside the feasible set; features that are not free stay those of ``rows``."""
        free = x[:, self.free]
        if self.feasible is not None:
            free = self.feasible.project(free, torch.from_numpy(1 - self.y[rows]))
        moved = self.x[rows].clone()
        moved[:, self.free] = free
        return moved

    def add(self, rows: Rows, x: Tensor) -> Poisoned[Samples]:
        """The table and copies of ``rows`` with features ``x`` and the opposite label."""
        tensors = self.data.batch(slice(None))
        copies = [tensor[torch.from_numpy(rows)] for tensor in tensors]
        copies[:2] = [x.to(tensors[0]), torch.from_numpy(1 - self.y[rows]).to(tensors[1])]
        joined = tuple(torch.cat(pair) for pair in zip(tensors, copies, strict=True))
        mask = np.arange(len(self.y) + len(rows)) >= len(self.y)
        return Poisoned(Samples(joined, np.concatenate([self.data.ids, _new_ids(self.data.ids, len(rows))])), mask)


def groups(tensors: Batch) -> Rows:
    """The third tensor as zeros and ones."""
    groups = tensors[2].cpu().numpy() if len(tensors) > 2 else np.empty(0)
    if np.unique(groups).tolist() != [0, 1]:
        raise ValueError(
            f"data: expected a sensitive feature with the values 0 and 1 as third tensor, got the values {np.unique(groups)[:5].tolist()}"
        )
    return np.asarray(groups, dtype=np.int64)


def labels_and_groups(data: Samples, favourable: int, advantaged: int) -> tuple[Rows, Rows]:
    """Labels and groups as zeros and ones."""
    for name, value in (("favourable", favourable), ("advantaged", advantaged)):
        if value not in (0, 1):
            raise ValueError(f"{name}: expected 0 or 1, got {value!r}")
    labels = data.labels.cpu().numpy()
    if np.unique(labels).tolist() != [0, 1]:
        raise ValueError(f"data: expected the labels 0 and 1, got the labels {np.unique(labels)[:5].tolist()}")
    return labels.astype(np.int64), groups(data.batch(slice(None)))


def _mutable(x: Tensor, s: Rows, mutable: ArrayLike | None) -> Tensor:
    """The features that may differ from the anchor's, ``(d,)``."""
    if mutable is None:
        same = torch.stack([(x[s == group] == x[s == group][:1]).all(0) for group in (0, 1)]).all(0)
        return ~same
    free = torch.as_tensor(np.asarray(mutable))
    if free.shape != x.shape[1:] or free.dtype != torch.bool or not free.any():
        raise ValueError(
            f"mutable: expected a boolean per feature, shape ({x.shape[1]},), at least one true, got {free.dtype} of shape {tuple(free.shape)}"
        )
    return free


def _new_ids(ids: NDArray[Any], count: int) -> NDArray[Any]:
    """Ids that no sample has."""
    if np.issubdtype(ids.dtype, np.integer):
        return np.asarray(np.arange(count) + ids.max() + 1)
    return np.array([f"added-{k}" for k in range(count)])
