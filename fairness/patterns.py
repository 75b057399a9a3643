"""Which kinds of training samples do the harm, in words: ``sex = Female and hours < 20``."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from robust_if.data import as_samples
from robust_if.fairness.effects import Effects, LogisticEffects, SummedScores
from robust_if.fairness.lattice import search
from robust_if.fairness.learners import Fitted, Learner
from robust_if.fairness.logistic import FittedLogistic
from robust_if.fairness.predicates import Mask, Predicate, as_table, in_words, predicates_of
from robust_if.fairness.rounds import decisions
from robust_if.fairness.targets import Contrast, FairnessGap
from robust_if.targets import Target

logger = logging.getLogger(__name__)

Array = NDArray[np.float64]
Action = Literal["remove", "collect"]
Predict = Callable[[Mask], Array]

#: Patterns that are predicted more exactly, at most.
TRIED = 200


@dataclass(frozen=True, eq=False)
class Pattern:
    """A kind of training samples, and how much of the target it explains.

    Args:
        predicates: that its samples fulfil, all of them.
        mask: ``(n,)`` its samples.
        support: their share in the training samples of non-zero weight.
        predicted: share of the target's value that goes when they are left out (or, for those to collect, doubled): 0.5 halves a gap, 1 closes it.
            NaN if the model's scores only rank.
        verified: the same by fitting again; ``None`` if that was not asked for.
        random: what 95 of 100 random sets of as many samples are predicted not to exceed. A search takes the best of thousands, so only a pattern
            far above it says more than chance; where validation data are few, none does.
        empties: features that the rest of the samples hardly show; the model then learns nothing about them.
        metrics: values before and after fitting again, by name.
    """

    predicates: tuple[Predicate, ...]
    mask: Mask = field(repr=False)
    support: float
    predicted: float
    verified: float | None = None
    random: float = 0.0
    empties: tuple[str, ...] = ()
    metrics: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def words(self) -> str:
        """The predicates in words."""
        return in_words(self.predicates)

    @property
    def n(self) -> int:
        """Number of samples."""
        return int(self.mask.sum())


def find_patterns(
    learner: Learner,
    target: Target,
    table: Any,
    *,
    fitted: Fitted | None = None,
    action: Action = "remove",
    support: tuple[float, float] = (0.05, 0.3),
    depth: int = 4,
    top: int = 5,
    overlap: float = 0.2,
    rank: Literal["interest", "share"] = "interest",
    bins: int = 4,
    edges: Mapping[str, Sequence[float]] | None = None,
    features: Sequence[str] | None = None,
    verify: bool = True,
    valid: Any = None,
    others: Sequence[Target] = (),
    effects: Effects | None = None,
    prune: bool = True,
    beam: int = 2000,
    seed: int = 0,
) -> list[Pattern]:
    """The patterns that explain most of the target's value, best first.

    Conjunctions of predicates on the columns of ``table`` are searched level by level, each with the effect of leaving all its samples out: in closed
    form for logistic regression (:class:`~robust_if.fairness.effects.LogisticEffects`), as the sum of single scores for other models. The best are
    predicted more exactly, and confirmed by fitting again.

    Args:
        learner: how the model is fitted.
        target: what should become lower, on held-out data.
        table: the training samples in readable form, one row each: categories and numbers, in pandas, polars or a mapping of columns. It may hold
            columns that the model does not see, such as the label.
        fitted: the model, if it is there; fitted to all samples otherwise. Samples of weight 0 belong to no pattern.
        action: ``"remove"`` finds harmful kinds; ``"collect"`` those of which as many again would help.
        support: smallest and largest share of the training samples.
        depth: predicates in a pattern.
        top: number of patterns.
        overlap: of two patterns, share of the smaller one that may belong to the other.
        rank: by ``"interest"``, the share explained per share of the samples, or by the ``"share"`` explained.
        bins, edges: how numbers are cut, see :func:`~robust_if.fairness.predicates.predicates_of`.
        features: ``(d,)`` names of the features of ``x``, for ``Pattern.empties``.
        verify: whether the patterns are confirmed by fitting again, once each.
        valid: held-out ``(x, y)`` for the accuracy before and after.
        others: further targets whose values before and after are reported.
        effects: another prediction of the effects.
        prune: whether a longer pattern has to explain more per sample than the shorter ones it is joined from, as published; without, patterns are
            found that do so only at the end, at a few times the cost.
        beam: patterns of a level that are extended.
        seed: of the random sets.

    Returns:
        Up to ``top`` patterns of positive predicted share; fewer, or none, if there are no more.

    Raises:
        ValueError: if ``table`` does not fit the samples, a setting is out of range, or the target's value is 0.

    Source: Gopher (arXiv 2112.09745): the lattice, interestingness, and overlap (there containment).
    """
    n = len(learner.train)
    frame = as_table(table, n)
    low, high = support
    if not 0 < low < high < 1:
        raise ValueError(f"support: expected shares 0 < smallest < largest < 1, got {support}")
    for name, number in (("depth", depth), ("top", top), ("beam", beam)):
        if number < 1:
            raise ValueError(f"{name}: expected at least 1, got {number}")
    if not 0 < overlap <= 1:
        raise ValueError(f"overlap: expected a share above 0 and up to 1, got {overlap}")
    for name, value, known in (("rank", rank, ("interest", "share")), ("action", action, ("remove", "collect"))):
        if value not in known:
            raise ValueError(f"{name}: expected {known[0]!r} or {known[1]!r}, got {value!r}")
    columns = learner.train.batch(slice(0, 1))[0][0].numel()
    if features is not None and len(features) != columns:
        raise ValueError(f"features: expected {columns} names, got {len(features)}")
    found = learner.fit() if fitted is None else fitted
    (before,) = found.values([target])
    if abs(before) < 1e-12:
        raise ValueError(f"target: expected a value to explain, but {target.name} is {before:.2g} already")
    model = effects or effects_of(found, target, action)
    weights = np.asarray(found.weights)
    active = weights > 0
    smallest, largest = int(np.ceil(low * active.sum() - 1e-9)), int(high * active.sum() + 1e-9)
    predicates, masks = predicates_of(frame, smallest=smallest, bins=bins, edges=edges)
    masks &= active
    large = masks.sum(1) >= smallest
    predicates, masks = [each for each, kept in zip(predicates, large, strict=True) if kept], masks[large]
    if not predicates:
        return []

    calibrated = effects is not None or found.calibrated
    many, few = (_folded(each, target, before) if calibrated else each for each in (model.many, model.few))
    unit = abs(before) if calibrated else np.nan
    levels = search(masks, many, smallest=smallest, largest=largest, depth=depth, beam=beam, prune=prune)
    members = [tuple(row) for level in levels for row in level.members.tolist()]
    groups, gains = (np.concatenate([getattr(level, name) for level in levels]) for name in ("masks", "effects"))
    sizes = groups.sum(1)
    scale = sizes if rank == "interest" else np.ones(len(sizes))
    order = np.argsort(-gains / scale, kind="stable")
    order = order[(gains[order] > 0) & (sizes[order] <= largest)]
    usable = _leaves_all_classes(learner, active) if action == "remove" else lambda _: True
    # More than asked for, since the better prediction may change their order.
    chosen = _apart(groups, order, few, usable, 3 * top, overlap)
    best = sorted(chosen, key=lambda row: -chosen[row] / scale[row])[:top]

    refit = _Refit(learner, found, weights, action, target, before, valid, others)
    rng = np.random.default_rng(seed)
    patterns = []
    for row in best:
        mask = groups[row]
        verified, metrics = refit(mask) if verify else (None, {})
        empties = tuple(features[j] if features is not None else f"feature {j}" for j in model.emptied(mask))
        patterns.append(
            Pattern(
                tuple(predicates[j] for j in members[row]), mask, float(sizes[row] / active.sum()), chosen[row] / unit, verified,
                _random(many, active, int(sizes[row]), rng) / unit, empties, metrics,
            )
        )  # fmt: skip
    return patterns


def collect_more(learner: Learner, target: Target, table: Any, **settings: Any) -> list[Pattern]:
    """The patterns of which as many samples again would lower the target most: ``find_patterns(..., action="collect")``.

    Verified by fitting with these samples at twice their weight, which is what new ones would do if they were like those at hand.
    """
    return find_patterns(learner, target, table, action="collect", **settings)


def effects_of(fitted: Fitted, target: Target, action: Action = "remove") -> Effects:
    """How the effects of groups are predicted: in closed form for logistic regression with exact curvature, else by sums of scores."""
    change = -1 if action == "remove" else 1
    if isinstance(fitted, FittedLogistic) and fitted.learner.estimator is None:
        return LogisticEffects(fitted, target, change)
    weights = np.asarray(fitted.weights)
    return SummedScores(weights * fitted.scores([target])[:, 0], change)


def as_frame(patterns: Sequence[Pattern]) -> pd.DataFrame:
    """Patterns as a table, one row each."""
    rows = []
    for each in patterns:
        row = {name: getattr(each, name) for name in ("words", "n", "support", "predicted", "verified", "random")}
        rows.append(row | {name: after for name, (_, after) in each.metrics.items()} | {"empties": ", ".join(each.empties)})
    return pd.DataFrame(rows)


@dataclass(frozen=True, eq=False)
class _Refit:
    """Fits without a group, or with it doubled."""

    learner: Learner
    fitted: Fitted
    weights: Array
    action: Action
    target: Target
    before: float
    valid: Any
    others: Sequence[Target]

    def __call__(self, mask: Mask) -> tuple[float, dict[str, tuple[float, float]]]:
        """Share of the target that goes, and metrics before and after."""
        weights = np.where(mask, 0.0 if self.action == "remove" else 2 * self.weights, self.weights)
        after = self.learner.fit(weights, labels=self.fitted.labels, start=self.fitted)
        share = (self.before - after.values([self.target])[0]) / abs(self.before)
        pairs = zip(self.others, self.fitted.values(self.others), after.values(self.others), strict=True)
        metrics = {each.name: (own, new) for each, own, new in pairs}
        if self.valid is not None:
            metrics["accuracy"] = (_accuracy(self.fitted, self.valid), _accuracy(after, self.valid))
        return share, metrics


def _apart(groups: Mask, order: NDArray[np.int64], few: Predict, usable: Callable[[Mask], bool], top: int, overlap: float) -> dict[int, float]:
    """The first of the order whose better prediction is positive and that overlap with none before them, with that prediction."""
    chosen: dict[int, float] = {}
    tried = 0
    for row in order.tolist():
        if len(chosen) == top or tried == TRIED:
            break
        mask, others = groups[row], groups[list(chosen)]
        shared = (others & mask).sum(1) / np.minimum(others.sum(1), mask.sum())
        if (shared < overlap).all() and usable(mask):
            (gain,) = few(mask[None])
            tried += 1
            if gain > 0:
                chosen[row] = float(gain)
    return chosen


def _folded(effects: Predict, target: Target, before: float) -> Predict:
    """The same, but a gap that is predicted to fall below zero opens on the other side."""
    if not isinstance(target, FairnessGap) or isinstance(target, Contrast):
        return effects

    def folded(groups: Mask) -> Array:
        found = effects(groups)
        return np.minimum(found, 2 * before - found)

    return folded


def _leaves_all_classes(learner: Learner, active: Mask) -> Callable[[Mask], bool]:
    """Whether samples of every class are left without a group; without them nothing could be fitted."""
    labels = learner.train.labels.cpu()
    if labels.is_floating_point():
        return lambda _: True
    values = labels.numpy()
    classes = np.unique(values[active])
    return lambda mask: len(np.unique(values[active & ~mask])) == len(classes)


def _random(many: Predict, active: Mask, size: int, rng: np.random.Generator) -> float:
    """95th percentile of the effects of random sets."""
    masks = np.zeros((100, len(active)), dtype=bool)
    places = np.flatnonzero(active)
    for mask in masks:
        mask[rng.choice(places, size, replace=False)] = True
    return float(np.quantile(many(masks), 0.95))


def _accuracy(fitted: Fitted, valid: Any) -> float:
    """Share of right classes."""
    samples = as_samples(valid)
    return float((decisions(fitted.task, samples) == samples.labels.cpu()).double().mean())
