"""Search for conjunctions of predicates whose samples have a large effect: level by level, from single predicates on.

The rules are those of Gopher (Pradhan, Zhu, Glavic and Salimi 2022, "Interpretable Data-Based Explanations for Fairness Debugging", arXiv
2112.09745): a conjunction lives if enough samples fulfil it and its effect per sample exceeds that of the conjunctions it was joined from; one that
too many samples fulfil lives to be narrowed down. A predicate that removes no sample adds nothing and is left away.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]

logger = logging.getLogger(__name__)

#: Numbers held at once, conjunctions times samples.
BLOCK = 8_000_000


@dataclass(frozen=True, eq=False)
class Level:
    """The living conjunctions of one length.

    Args:
        members: ``(m, length)`` positions of their predicates, ascending.
        masks: ``(m, n)`` their samples.
        effects: ``(m,)``.
    """

    members: NDArray[np.int64]
    masks: Mask
    effects: Array

    @property
    def interest(self) -> Array:
        """Effect per sample, ``(m,)``."""
        return np.asarray(self.effects / self.masks.sum(1))


def search(masks: Mask, effects: Callable[[Mask], Array], *, smallest: int, largest: int, depth: int, beam: int, prune: bool = True) -> list[Level]:
    """All living conjunctions of up to ``depth`` predicates.

    Args:
        masks: ``(k, n)`` the samples of each predicate.
        effects: from masks ``(m, n)`` to effects ``(m,)``.
        smallest: number of samples that a conjunction has at least.
        largest: number of samples up to which it can be reported; beyond, it lives without beating those it was joined from.
        depth: predicates in a conjunction.
        beam: conjunctions of a level that are extended; the best by effect per sample are, and it is logged if others are left.
        prune: whether a conjunction has to beat those it was joined from; without, more is found and the search takes longer.
    """
    members = np.arange(len(masks))[:, None]
    first = Level(members, masks, effects(masks))
    levels = [first]
    while len(levels) < depth and len(levels[-1].members) > 1:
        parents = levels[-1]
        if len(parents.members) > beam:
            logger.warning("patterns: %d conjunctions of %d predicates, the best %d are extended", len(parents.members), len(levels), beam)
            best = np.sort(np.argsort(-parents.interest, kind="stable")[:beam])
            parents = Level(parents.members[best], parents.masks[best], parents.effects[best])
        levels.append(_next(parents, first, effects, smallest, largest if prune else 0))
    return levels


def _next(parents: Level, single: Level, effects: Callable[[Mask], Array], smallest: int, largest: int) -> Level:
    """The conjunctions with one predicate more that live: joined from at least two living ones."""
    n = single.masks.shape[1]
    counts = parents.masks.astype(np.float32) @ single.masks.astype(np.float32).T
    narrower = counts < np.minimum(parents.masks.sum(1)[:, None], single.masks.sum(1))
    parent, predicate = np.nonzero((counts >= smallest) & narrower)
    joined = np.sort(np.column_stack([parents.members[parent], single.members[predicate, 0]]), axis=1)
    members, where, ways = np.unique(joined, axis=0, return_inverse=True, return_counts=True)
    where = where.reshape(-1)
    bar = np.full(len(members), -np.inf)
    np.maximum.at(bar, where, parents.interest[parent])
    join = np.zeros(len(members), dtype=np.int64)
    join[where] = np.arange(len(where))  # any of the ways that lead there
    joinable = ways >= 2
    members, bar, join = members[joinable], bar[joinable], join[joinable]
    found = [Level(members[:0], np.zeros((0, n), dtype=bool), np.zeros(0))]
    rows = max(1, BLOCK // n)
    for at in range(0, len(members), rows):
        part = slice(at, at + rows)
        masks = parents.masks[parent[join[part]]] & single.masks[predicate[join[part]]]
        new = Level(members[part], masks, effects(masks))
        alive = (masks.sum(1) > largest) | (new.interest > bar[part])
        found.append(Level(new.members[alive], new.masks[alive], new.effects[alive]))
    return Level(*(np.concatenate([getattr(each, name) for each in found]) for name in ("members", "masks", "effects")))
