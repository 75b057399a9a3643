"""Kinds of training samples in words: those that a repair changed, those that make a gap, and those of which more would close it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from robust_if.evaluations.previews import preview
from robust_if.fairness.learners import Learner
from robust_if.fairness.logistic import Logistic
from robust_if.fairness.patterns import Pattern, find_patterns
from robust_if.fairness.predicates import Mask, is_number
from robust_if.fairness.repair import Repair
from robust_if.fairness.rounds import Round
from robust_if.fairness.targets import FairnessGap
from robust_if.fairness.tree import tree_summary
from robust_if.loading import Dataset

#: Values of a category beyond which a column is free text or an identifier, and no kind is named after it.
VALUES = 60
#: Kinds in every list, conditions in a kind, and samples shown.
KINDS, DEPTH, SHOWN = 5, 2, 6
#: Kinds that explain less of the gap are not worth a line.
EXPLAINED = 0.03
#: A leaf of the tree holds at least this share of the samples, and at least so many.
LEAF, FEWEST = 0.01, 10


def readable(data: Dataset) -> pd.DataFrame:
    """The columns of a table that kinds can be named after, and the label."""
    features = data.features
    assert isinstance(features, pd.DataFrame)
    kept = {str(name): column for name, column in features.items() if is_number(column) or column.astype(str).nunique() <= VALUES}
    label = next(name for name in ("label", "label in the file", "label of the sample") if name not in kept)
    return pd.DataFrame({**kept, label: [str(each).strip() for each in data.labels]})


def changed_kinds(found: Repair, table: pd.DataFrame) -> list[dict[str, Any]]:
    """The leaves of a shallow tree that tells changed samples from others, those with the largest share of changed ones first.

    A list is made for samples that lost weight or their label, and one for those that gained weight.
    """
    old = found.rounds[0].weights
    lists = {
        "lost": (found.weights < old) & found.touched,
        "gained": (found.weights > old) & found.touched,
        "relabelled": found.labels != found.rounds[0].labels,
    }
    return [{"what": what, **leaf} for what, mask in lists.items() if mask.any() and not mask.all() for leaf in _leaves(np.asarray(mask), table)]


def harmful_kinds(learner: Learner, gap: FairnessGap, table: pd.DataFrame, first: Round) -> list[dict[str, Any]]:
    """Kinds without which the gap would be smaller."""
    return _patterns(learner, gap, table, first, "remove")


def collected(learner: Learner, gap: FairnessGap, data: Dataset, table: pd.DataFrame, first: Round) -> dict[str, Any]:
    """Kinds of which more would make the gap smaller, and the single samples that do so most."""
    scores = first.fitted.scores([gap])[:, 0]
    best = np.argsort(scores, kind="stable")[:SHOWN]
    shown = [
        {"id": _plain(data.ids[at]), "label": str(data.labels[at]).strip(), "score": float(scores[at]), **preview(data, int(at))}
        for at in best
        if scores[at] < 0
    ]
    return {"kinds": _patterns(learner, gap, table, first, "collect"), "samples": shown, "calibrated": first.fitted.calibrated}


def _patterns(learner: Learner, gap: FairnessGap, table: pd.DataFrame, first: Round, action: Any) -> list[dict[str, Any]]:
    """Confirmed by fitting again where that is a matter of moments; without shares where scores only rank."""
    if max(abs(first.verified[each.name]) for each in gap.signed()) < 1e-9:
        return []  # there is nothing to explain
    quick, calibrated = isinstance(learner, Logistic), first.fitted.calibrated
    found = find_patterns(learner, gap, table, fitted=first.fitted, action=action, depth=DEPTH, top=KINDS, support=(0.02, 0.3), verify=quick)
    return [_pattern(each, calibrated) for each in found if not calibrated or each.predicted > max(each.random, EXPLAINED)]


def _pattern(found: Pattern, calibrated: bool) -> dict[str, Any]:
    said = {"words": found.words, "n": found.n, "support": found.support, "predicted": found.predicted if calibrated else None}
    return said | {"verified": found.verified, "empties": len(found.empties)}


def _leaves(mask: Mask, table: pd.DataFrame) -> list[dict[str, Any]]:
    n = len(mask)
    smallest = min(max(FEWEST, int(LEAF * n)), n // 4) / n
    leaves = tree_summary(mask, table, depth=DEPTH + 1, smallest=smallest).leaves if smallest else ()
    kinds = sorted((leaf for leaf in leaves if leaf.mean > mask.mean()), key=lambda leaf: -leaf.total)[:KINDS]
    return [{"words": leaf.words, "n": leaf.n, "changed": round(leaf.total), "share": leaf.mean} for leaf in kinds]


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value
