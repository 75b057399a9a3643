"""The walk of FAB along a decision boundary, in coordinates in which the clean input is 0 and the ball has radius 1."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from robust_if.attacks.evasion.ball import Norm

_OVERSHOOT, _MOST_BACK, _KEPT, _FINAL_STEPS, _SLACK, _CLOSE = 1.05, 0.1, 0.9, 3, 0.01, 1 + 1e-4


def nearest_error(
    plane: Callable[[Tensor], tuple[Tensor, Tensor]], margin: Callable[[Tensor], Tensor], low: Tensor, high: Tensor, norm: Norm, steps: int
) -> Tensor:
    """The nearest point to 0 of positive margin that is met, ``(B, D)``; 0 where none is.

    Args:
        plane: points ``(B, D)`` to what is linearised there: its value ``(B,)`` and gradient ``(B, D)``; it is positive beyond the boundary.
        margin: points to ``(B,)``, positive at errors.
        low: the smallest valid coordinates ``(B, D)``, at most 0.
        high: the largest, at least 0.
        steps: at least 1.

    Source: Croce and Hein 2020 (arXiv 1907.02044), algorithm 1 with η = 1.05, α_max = 0.1, β = 0.9, and the final search of section 3. That it
    aims beyond the root by a hundredth of the way, so that rounding does not decide, and that the point of the last plane nearest to 0 is tried,
    is ours.
    """
    origin = torch.zeros_like(low)
    u, best, distance = origin, origin, low.new_full((len(low),), torch.inf)
    for _ in range(steps):
        value, normal = plane(u)
        offset = (normal * u).sum(1) - value
        here, back = (onto_plane(start, normal, offset, low, high, norm) for start in (u, origin))
        way, way_back = length(here - u, norm), length(back, norm)
        share = (way / (way + way_back).clamp(min=torch.finfo(u.dtype).tiny)).clamp(max=_MOST_BACK)[:, None]
        u = ((1 - share) * (u + _OVERSHOOT * (here - u)) + share * _OVERSHOOT * back).clamp(low, high)
        wrong, far = margin(u) > 0, length(u, norm)
        nearer = wrong & (far < distance)
        best, distance = torch.where(nearer[:, None], u, best), torch.where(nearer, far, distance)
        u = torch.where(wrong[:, None], _KEPT * u, u)
    best = _first_wrong(best, margin)
    value, normal = plane(best)
    direct = (_CLOSE * onto_plane(origin, normal, (normal * best).sum(1) - value, low, high, norm)).clamp(low, high)
    nearer = (margin(direct) > 0) & (length(direct, norm) < length(best, norm))
    return _first_wrong(torch.where(nearer[:, None], direct, best), margin)


def _first_wrong(points: Tensor, margin: Callable[[Tensor], Tensor]) -> Tensor:
    """The first errors on the way from 0 to the points, which are errors themselves, by the method of false position."""
    right, wrong = points.new_zeros(len(points)), points.new_ones(len(points))
    under, over = margin(torch.zeros_like(points)), margin(points)
    for _ in range(_FINAL_STEPS):
        part = (-under / (over - under)).nan_to_num(nan=1.0).clamp(0, 1)
        share = right + (wrong - right) * (part + _SLACK * (1 - part))
        found = margin(share[:, None] * points)
        right, under = torch.where(found > 0, right, share), torch.where(found > 0, under, found)
        wrong, over = torch.where(found > 0, share, wrong), torch.where(found > 0, found, over)
    return wrong[:, None] * points


def onto_plane(u: Tensor, normal: Tensor, offset: Tensor, low: Tensor, high: Tensor, norm: Norm) -> Tensor:
    """The nearest point to u with ⟨normal, point⟩ = offset and low ≤ point ≤ high; the one that comes closest to the plane where there is none.

    All are ``(B, D)``, but ``offset`` is ``(B,)``. Every entry moves at a speed of 1 (L∞), or of its |normal| (L2), until it meets its limit; the
    time at which the plane is reached lies between two of the times at which limits are met.
    """
    missing = offset - (normal * u).sum(1)
    towards = normal.sign() * missing.sign()[:, None]
    weight = normal.abs()
    room = torch.where(towards > 0, high - u, torch.where(towards < 0, u - low, 0))
    speed = torch.ones_like(weight) if norm == "linf" else weight
    met, order = torch.where(towards != 0, room / speed, 0).sort(dim=1)
    gained = (weight * room).nan_to_num(nan=0.0, posinf=torch.inf).gather(1, order).cumsum(1)
    before = torch.cat([torch.zeros_like(gained[:, :1]), gained[:, :-1]], 1)
    rate = (weight * speed).gather(1, order).flip(1).cumsum(1).flip(1)
    times = (missing.abs()[:, None] - before) / rate
    early = (times <= met) & (rate > 0)
    time = torch.where(early.any(1), times.gather(1, early.int().argmax(1, keepdim=True))[:, 0], torch.inf).clamp(min=0)
    move = torch.where(towards != 0, (time[:, None] * speed).minimum(room), 0)
    return (u + towards * move).clamp(low, high)


def length(u: Tensor, norm: Norm) -> Tensor:
    """The norm of every row, ``(B,)``."""
    size: Tensor = torch.linalg.vector_norm(u, torch.inf if norm == "linf" else 2, dim=1)
    return size
