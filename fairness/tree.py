"""Scores explained by a shallow tree on readable columns: which kinds of samples are harmful, and which helpful."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from sklearn.tree import DecisionTreeRegressor

from robust_if.fairness.predicates import Mask, Predicate, as_table, in_words, predicates_of


@dataclass(frozen=True)
class Leaf:
    """A kind of samples.

    Args:
        predicates: that they fulfil, all of them.
        n: number of samples.
        mean: of their scores.
        total: sum of their scores.
        harm: their share of all harm, the sum of the positive scores.
    """

    predicates: tuple[Predicate, ...]
    n: int
    mean: float
    total: float
    harm: float

    @property
    def words(self) -> str:
        """The predicates in words."""
        return in_words(self.predicates)


@dataclass(frozen=True)
class TreeSummary:
    """The leaves, most harmful on average first; ``r2`` is the share of the scores' variance that the tree explains."""

    leaves: tuple[Leaf, ...]
    r2: float

    def as_frame(self) -> pd.DataFrame:
        """One row per leaf."""
        return pd.DataFrame([{"samples": each.words, "n": each.n, "mean": each.mean, "total": each.total, "harm": each.harm} for each in self.leaves])

    def __str__(self) -> str:
        lines = [f"{each.harm:6.1%} of the harm, mean {each.mean:+.2e}, n = {each.n}: {each.words}" for each in self.leaves]
        return "\n".join([*lines, f"explains {self.r2:.1%} of the variance of the scores"])


def tree_summary(scores: ArrayLike, table: Any, *, depth: int = 3, smallest: float = 0.01, bins: int = 16) -> TreeSummary:
    """A regression tree from the readable columns to the scores.

    Numbers are cut at one of ``bins`` quantiles, where a missing value counts as below; categories one against the others.

    Args:
        scores: ``(n,)`` positive = harmful.
        table: the samples in readable form, one row each.
        depth: of the tree.
        smallest: share of the samples in a leaf, at least.
        bins: of numbers.

    Raises:
        ValueError: if the table does not fit the scores, a score is not finite, or a setting is out of range.

    Source: trees from features to influence as in Chhabra et al. 2024, "What Data Benefits My Classifier?" (ICLR 2024).
    """
    values = np.asarray(scores, dtype=np.float64)
    if values.ndim != 1 or not np.isfinite(values).all():
        raise ValueError(f"scores: expected (n,) finite numbers, got shape {values.shape} with {np.count_nonzero(~np.isfinite(values))} that are not")
    frame = as_table(table, len(values))
    if depth < 1 or not 0 < smallest < 0.5:
        raise ValueError(f"depth, smallest: expected at least 1 and a share between 0 and 0.5, got {depth} and {smallest}")
    least = max(1, round(smallest * len(values)))
    predicates, masks = predicates_of(frame, smallest=least, bins=bins)
    asked = [at for at, each in enumerate(predicates) if each.relation != "<"]  # the other side of ≥
    columns = masks[asked].T if asked else np.zeros((len(values), 1), dtype=bool)
    tree = DecisionTreeRegressor(max_depth=depth, min_samples_leaf=least, random_state=0).fit(columns, values)
    nodes = tree.tree_
    harm = values.clip(min=0).sum()
    leaves: list[Leaf] = []

    def visit(node: int, path: tuple[Predicate, ...], inside: Mask) -> None:
        at = int(nodes.feature[node])
        if at < 0:
            own = values[inside]
            share = float(own.clip(min=0).sum() / harm) if harm > 0 else 0.0
            leaves.append(Leaf(path, len(own), float(own.mean()), float(own.sum()), share))
            return
        predicate, holds = predicates[asked[at]], columns[:, at]
        visit(int(nodes.children_left[node]), (*path, _opposite(predicate, frame)), inside & ~holds)
        visit(int(nodes.children_right[node]), (*path, predicate), inside & holds)

    visit(0, (), np.ones(len(values), dtype=bool))
    leaves.sort(key=lambda leaf: -leaf.mean)
    return TreeSummary(tuple(leaves), float(tree.score(columns, values)) if values.var() > 0 else 0.0)


def _opposite(predicate: Predicate, frame: pd.DataFrame) -> Predicate:
    """What the samples on the other side fulfil: of two categories the other one."""
    column = frame[predicate.column]
    if predicate.relation == "=" and not column.isna().any():
        others = [value for value in column.astype(str).unique() if value != predicate.value]
        if len(others) == 1:
            return Predicate(predicate.column, "=", others[0])
    return predicate.negated
