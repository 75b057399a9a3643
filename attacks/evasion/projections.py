"""Inputs that are not valid everywhere: whole numbers, and categories as indicators."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the name that every reader of torch code expects

from robust_if.attacks.evasion.ball import Limit


@dataclass(frozen=True)
class WholeNumbers:
    """Features that are ``origin`` + ``unit`` · k with k whole: the nearest such number that the ball and the bounds allow.

    Args:
        columns: positions on the last axis of the inputs; all by default.
        unit: what one is in the unit of the inputs, such as 1/255 for pixels, or 1 over its standard deviation for a standardised column.
        origin: what zero is.

    ``unit`` and ``origin`` are numbers, or tensors with a number per column.
    """

    columns: Sequence[int] | None = None
    unit: Limit = 1.0
    origin: Limit = 0.0

    def __call__(self, point: Tensor, slope: Tensor, low: Tensor, high: Tensor) -> Tensor:
        columns = list(range(point.shape[-1])) if self.columns is None else list(self.columns)
        unit, origin = (torch.as_tensor(value).to(point) for value in (self.unit, self.origin))
        count, least, most = ((part[..., columns] - origin) / unit for part in (point, low, high))
        slack = 1e-3  # of a unit, since the limits are rounded
        count = count.round().maximum((least - slack).ceil()).minimum((most + slack).floor())
        found = point.clone()
        found[..., columns] = (origin + unit * count).clamp(low[..., columns], high[..., columns])
        return found


@dataclass(frozen=True)
class OneHot:
    """Groups of indicators, one of which is 1: that with the largest entry, and of those that tie, the one with the largest gradient.

    A category can change or not, nothing in between: ``eps`` has to be at least 1 in all features of a group, or 0 in all.

    Args:
        groups: positions on the last axis of the inputs, a tuple per category.
    """

    groups: Sequence[tuple[int, ...]]

    def __call__(self, point: Tensor, slope: Tensor, low: Tensor, high: Tensor) -> Tensor:
        found, slack = point.clone(), 1e-6
        for group in self.groups:
            columns = list(group)
            least, most, value = low[..., columns], high[..., columns], point[..., columns].clamp(0, 1)
            fixed, free = (least == most).all(-1), ((least <= slack) & (most >= 1 - slack)).all(-1)
            if not (fixed | free).all():
                raise ValueError(f"project: expected the one-hot group {group} to be free from 0 to 1 in all its features, or fixed in all")
            # steps by the sign of the gradient move entries alike, so ties are the rule
            winner = slope[..., columns].masked_fill(value < value.amax(-1, keepdim=True), -torch.inf).argmax(-1)
            found[..., columns] = F.one_hot(winner, len(columns)).to(point).clamp(least, most)
        return found
