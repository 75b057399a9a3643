"""The cells of a fairness gap: which samples each compared mean is taken over."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from robust_if.data import Samples
from robust_if.fairness.notions import Notion, Rate

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Cell:
    """The samples of one mean: a rate of the class ``positive``, in a group of a stratum.

    Args:
        n: number of samples.
        who: the group in words.
        where: what else sets the cell apart, in words.
    """

    rate: Rate
    positive: int
    stratum: int
    group: int
    n: int = 0
    who: str = ""
    where: str = ""

    def holds(self, y: Tensor, s: Tensor, c: Tensor | None = None) -> Tensor:
        """Which of the samples with labels y, groups s and strata c are in the cell, ``(B,)``."""
        inside = (s == self.group) & self.rate.counted(y, self.positive)
        return inside if c is None else inside & (c == self.stratum)


def columns_of(data: Samples, notion: Notion) -> tuple[Tensor, ...]:
    """Labels, groups and perhaps strata of all samples, ``(n,)`` each; inputs are not held.

    Raises:
        ValueError: if the data are not ``(x, y, s)`` or ``(x, y, s, c)`` with whole numbers s and c, or the labels are not of the kind that the
            notion needs.
    """
    batches = (data.batch(slice(start, start + 1024)) for start in range(0, len(data), 1024))
    parts = [tuple(batch[1:]) if isinstance(batch, (tuple, list)) else () for batch in batches]
    y, *codes = (torch.cat(column) for column in zip(*parts, strict=True)) if parts[0] else (torch.zeros(1),)
    if len(codes) not in (1, 2) or any(each.ndim != 1 or (each.is_floating_point() and not torch.equal(each, each.round())) for each in codes):
        raise ValueError("data: expected (x, y, s) or (x, y, s, c) with whole numbers (n,) for the group s and the stratum c; see fairness_gap")
    if y.ndim != 1:
        raise ValueError(f"data: expected labels of shape (n,), got {tuple(y.shape)}")
    if y.is_floating_point() and any(rate.needs_classes for rate in notion.rates):
        raise ValueError(f"data: a gap in the {notion.words} expects classes as labels, whole numbers, got {y.dtype}")
    return y, *codes


def cells_of(
    columns: tuple[Tensor, ...], notion: Notion, positive: int | None, *, smallest: int, shrink: float, groups: Sequence[str], strata: Sequence[str]
) -> tuple[Cell, ...]:
    """The cells that hold samples, those that are compared with each other next to each other; arguments as of ``FairnessGap``.

    Raises:
        ValueError: if there are fewer than two groups, a cell is too small, or ``positive`` is not among the labels that the notion looks at.
    """
    y, s = columns[0], columns[1]
    every = positive is None and notion.rates[0].is_of_one_class and not y.is_floating_point()
    classes = _distinct(y) if every else [positive or 0]
    if any(rate.among != "all" for rate in notion.rates) and not set(classes) <= set(_distinct(y)):
        raise ValueError(f"positive: expected one of the labels of the validation data, {_distinct(y)[:20]}, got {positive}")
    present = _distinct(s)
    if len(present) < 2:
        raise ValueError(f"data: expected at least two groups to compare, got {[_called('group', groups, group) for group in present]}")
    found = []
    for rate, label, stratum, group in product(notion.rates, classes, _distinct(columns[2]) if len(columns) > 2 else [0], present):
        where = f", {rate.among} samples" if rate.among != "all" else ""
        where += f", class {label}" if every else ""
        where += f", {_called('stratum', strata, stratum)}" if len(columns) > 2 else ""
        n = int(Cell(rate, label, stratum, group).holds(*columns).sum())
        found.append(Cell(rate, label, stratum, group, n, _called("group", groups, group), where))
    small = [cell for cell in found if cell.n < smallest]
    if small and not shrink:
        words = "; ".join(f"{cell.who}{cell.where} ({cell.n})" for cell in small[:5])
        raise ValueError(
            f"data: expected at least {smallest} validation samples in every cell, but {len(small)} of {len(found)} have fewer: {words}; "
            "join groups, give more validation data, or draw small cells to the mean with shrink=10"
        )
    if any(not cell.n for cell in found):
        empty = "; ".join(cell.who + cell.where for cell in found if not cell.n)
        logger.warning("%s: cells without a sample are left out: %s", notion.words, empty)
    return tuple(cell for cell in found if cell.n)


def _distinct(column: Tensor) -> list[int]:
    return sorted({int(value) for value in column.tolist()})


def _called(kind: str, names: Sequence[str], at: int) -> str:
    return names[at] if 0 <= at < len(names) else f"{kind} {at}"
