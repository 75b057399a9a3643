"""The Square Attack: a random search that asks the model for its outputs alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor

from robust_if.attacks.evasion.attack import Attack
from robust_if.attacks.evasion.ball import Ball
from robust_if.attacks.evasion.search import Search
from robust_if.task import Batch, Params, Task


@dataclass(frozen=True)
class Square(Attack):
    """Square Attack: one part of the input at a time is set to an end of its box, and stays there if the margin rises.

    No gradient is used, so it attacks where gradients mislead or do not exist. The part is a square window of an image at a random place, with one
    sign per channel, the first time vertical stripes; the image is the last two axes of an input. Of inputs with one axis, such as tables, it is a
    random set of features with a sign each. The part shrinks with the number of queries. All samples are given the same draws; where these would
    leave a sample unchanged, it is given the opposite signs. The search for a sample ends at its first error, otherwise with the point of largest
    margin.

    Args:
        queries: how often the model is asked about a sample, after the clean input.
        seed: of the draws.

    Raises:
        ValueError: if ``queries`` is less than 1, or the norm is not L∞.

    Source: Andriushchenko et al. 2020 (arXiv 1912.00049), algorithms 1 and 2, with p = 0.8 at first and the schedule of section 5; the features of
    tables, the common draws and the opposite signs are ours.
    """

    queries: int = field(default=5000, kw_only=True)
    seed: int = field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        if self.queries < 1:
            raise ValueError(f"queries: expected at least 1, got {self.queries}")
        if self.threat.norm != "linf":
            raise ValueError(f"norm: Square searches the box of norm='linf', got norm={self.threat.norm!r}")

    @property
    def name(self) -> str:
        return "square"

    def __call__(self, task: Task, params: Params, batch: Batch) -> Tensor:
        search, clean = Search.begin(task, params, batch, self.threat, "margin", first_error=True)
        search.visit(clean, search.slope, last=True)
        generator = torch.Generator().manual_seed(self.seed)
        for signs, ties in _proposals(search.ball, self.queries, generator):
            if search.leave() is not None and not len(search.best):
                break
            search.visit(_changed(search, signs), ties.expand_as(search.best), last=True)
        return search.result()


def _changed(search: Search, signs: Tensor) -> Tensor:
    """The best points with the features of nonzero sign at that end of their box; at the other, where that changes nothing."""
    ball, best = search.ball, search.best

    def ends(signs: Tensor) -> Tensor:
        return torch.where(signs > 0, ball.high, torch.where(signs < 0, ball.low, best))

    point = ends(signs)
    same = (point == best).flatten(1).all(1) if point.ndim > 1 else point == best
    return torch.where(same.view(-1, *[1] * (point.ndim - 1)), ends(-signs), point)


def _proposals(ball: Ball, queries: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """What each query changes: signs with the shape of one sample, 0 where nothing does; and random numbers that break ties of projections."""
    shape, device, free = ball.radius.shape, ball.radius.device, (ball.radius > 0).cpu()
    moving = free.reshape(-1).nonzero()[:, 0]
    spans = [_span(free.transpose(axis, -1).reshape(-1, shape[axis]).any(0)) for axis in (-2, -1)] if len(shape) > 1 else []

    def signs(*size: int) -> Tensor:
        return 2.0 * torch.randint(2, size, generator=generator) - 1

    for query in range(queries):
        ties = torch.rand(shape, generator=generator).to(ball.radius)
        part = torch.zeros(shape)
        share = _share(query, queries)
        if len(shape) < 2:
            count = max(1, round(share * len(moving)))
            chosen = moving[torch.randperm(len(moving), generator=generator)[:count]]
            part.view(-1)[chosen] = signs(len(chosen))
        elif query == 0:
            part = signs(*shape[:-2], 1, shape[-1]).expand(shape)
        else:
            side = max(1, round((share * prod(end - start for start, end in spans)) ** 0.5))
            rows, columns = (int(torch.randint(start, max(start, end - side) + 1, (), generator=generator)) for start, end in spans)
            part[..., rows : rows + side, columns : columns + side] = signs(*shape[:-2], 1, 1)
        yield part.to(device), ties


def _span(free: Tensor) -> tuple[int, int]:
    """The positions from the first that is true to the last, as start and end; all where none is."""
    found = free.nonzero()
    return (int(found[0]), int(found[-1]) + 1) if len(found) else (0, len(free))


def _share(query: int, queries: int) -> float:
    """The share of the input that a query changes: 0.8, halved after 0.1 %, 0.5 %, 2 %, 10 %, 20 %, 40 %, 60 % and 80 % of the queries."""
    halvings = sum(query * 1000 > after * queries for after in (1, 5, 20, 100, 200, 400, 600, 800))
    return 0.8 / 2.0**halvings
