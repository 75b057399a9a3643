"""Gaps of hard predictions between groups, by fairlearn's names; no gap is made of a rate that a group does not have."""

from __future__ import annotations

import logging
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike

from robust_if.fairness.confusion import RATES, Array, Confusion, quotient, weights
from robust_if.fairness.groups import Groups
from robust_if.fairness.notions import NOTIONS, Method, Rate

__all__ = ["COMPARED", "RATES", "Confusion", "as_groups", "gap", "regression", "signed_gaps", "spread"]

logger = logging.getLogger(__name__)

_HARD = {
    Rate("selection"): "selection_rate",
    Rate("selection", "positive"): "true_positive_rate",
    Rate("selection", "negative"): "false_positive_rate",
    Rate("error"): "error_rate",
}
#: The rates compared by each notion that hard predictions have; those about losses and scores have none.
COMPARED = {
    name: tuple(_HARD[rate] for rate in notion.rates)
    for name, notion in NOTIONS.items()
    if notion.compare == "difference" and all(rate in _HARD for rate in notion.rates)
}


def spread(rates: Array, overall: Array | None = None, *, ratio: bool = False) -> Array:
    """How far rates ``(..., G)`` lie apart, ``(...)``, without those that are NaN; NaN if fewer than two are left.

    Args:
        overall: ``(...)`` rate of all, to compare every group with (fairlearn's ``to_overall``); otherwise groups are compared with each other.
        ratio: the smallest quotient, from 0 to 1, instead of the largest difference.
    """
    there = ~np.isnan(rates)
    high, low = np.where(there, rates, -np.inf).max(-1), np.where(there, rates, np.inf).min(-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        if overall is None:
            apart = low / high if ratio else high - low
        elif ratio:
            apart = np.fmin(low / overall, overall / high)
        else:
            apart = np.maximum(high - overall, overall - low)
    return np.where(there.sum(-1) < 2, np.nan, apart)


def gap(
    notion: str,
    y_true: ArrayLike,
    y_pred: ArrayLike,
    sensitive_features: Any,
    *,
    control_features: Any = None,
    positive: Any = 1,
    method: Method = "between_groups",
    agg: Literal["worst_case", "mean"] = "worst_case",
    ratio: bool = False,
    sample_weight: ArrayLike | None = None,
) -> float:
    """The difference of a notion as fairlearn has it, from 0, equal, to 1; or its ratio. Unlike there, groups without such a rate do not count as 0.

    Args:
        notion: one of :data:`COMPARED`, such as ``"equalized_odds"``.
        y_true: ``(n,)`` labels.
        y_pred: ``(n,)`` predicted labels, not scores.
        sensitive_features: ``(n,)`` or ``(n, k)`` categories, or :class:`~robust_if.fairness.groups.Groups`; columns mean their intersections.
        control_features: the same for strata within which groups are compared.
        positive: the class whose prediction is the benefit; ``None`` compares every class with the rest.
        method: groups are compared with each other, or with the rate of all.
        agg: of several rates, classes and strata the largest gap or the mean.
        ratio: the smallest ratio in place of the largest difference.
        sample_weight: ``(n,)``.

    Returns:
        The gap, NaN if there is a rate that fewer than two groups have; a warning names groups that are left out.

    Raises:
        ValueError: if an argument is unknown or does not fit the others, or predictions are scores.
    """
    names = _compared(notion, method)
    if agg not in ("worst_case", "mean"):
        raise ValueError(f"agg: expected 'worst_case' or 'mean', got {agg!r}")
    groups, strata = as_groups(sensitive_features), None if control_features is None else as_groups(control_features, "control_features")
    cells = Confusion.of(y_true, y_pred, groups, strata=strata, sample_weight=sample_weight)
    if strata is None:
        cells = Confusion(cells.counts[None], cells.classes)
    found: list[Array] = []
    for name in names:
        for label in _labels(cells, notion, positive):
            rates = cells.rate(name, label)
            lacking = [groups.names[g] for g in np.flatnonzero(np.isnan(rates).any(axis=0))]
            if lacking:
                logger.warning("%s: left out where there is no %s: %s", notion, name.replace("_", " "), "; ".join(lacking))
            overall = cells.overall().rate(name, label)[..., 0] if method == "to_overall" else None
            found.append(spread(rates, overall, ratio=ratio))
    comparable = [each[~np.isnan(each)] for each in found]
    if not all(map(len, comparable)):
        return float("nan")
    every = np.concatenate(comparable)
    return float(every.mean() if agg == "mean" else every.min() if ratio else every.max())


def signed_gaps(
    notion: str,
    y_true: ArrayLike,
    y_pred: ArrayLike,
    groups: Groups,
    *,
    strata: Groups | None = None,
    positive: Any = 1,
    method: Method = "between_groups",
    shrink: float = 0.0,
    sample_weight: ArrayLike | None = None,
) -> Array:
    """The signed comparisons of a notion, ``(m,)``, as :attr:`~robust_if.fairness.targets.FairnessGap.contrast_names` orders and signs them.

    They are what these contrasts tend to as the temperature goes to 0. Arguments and errors as in :func:`gap`, ``shrink`` as there.
    """
    names = _compared(notion, method)
    cells = Confusion.of(y_true, y_pred, groups, strata=strata, sample_weight=sample_weight)
    counts = cells.counts if strata is not None else cells.counts[None]
    cells = Confusion(counts, cells.classes)
    occurring = counts.sum((0, 1, 3)) > 0
    classes = [label for label in _labels(cells, notion, positive) if positive is not None or occurring[cells.classes == label].all()]
    found = [np.zeros(0)]
    for name in names:
        for label in classes:
            for share, among in zip(*cells.counted(name, label), strict=True):
                there = among > 0
                found.append(NOTIONS[notion].comparisons(among[there], method, shrink)[1] @ quotient(share, among)[there])
    return np.concatenate(found)


def regression(y_true: ArrayLike, y_pred: ArrayLike, groups: Groups, *, sample_weight: ArrayLike | None = None) -> dict[str, Array]:
    """Mean outcome, mean prediction, mean absolute and root mean squared error of every group, ``(G,)`` each; NaN for groups without samples.

    Raises:
        ValueError: if lengths differ or a value is not finite.
    """
    y, predicted = (np.asarray(values, dtype=np.float64) for values in (y_true, y_pred))
    for values, name in ((y, "y_true"), (predicted, "y_pred")):
        if values.shape != (len(groups),) or not np.isfinite(values).all():
            raise ValueError(f"{name}: expected {len(groups)} finite numbers, one for each sample, got shape {values.shape}")
    weight = weights(sample_weight, len(groups))
    weight = np.ones(len(groups)) if weight is None else weight

    def mean(values: Array) -> Array:
        total, among = (np.bincount(groups.codes, each, minlength=len(groups.values)).astype(np.float64) for each in (weight * values, weight))
        return quotient(total, among)

    error = predicted - y
    return {"mean_outcome": mean(y), "mean_prediction": mean(predicted), "mae": mean(np.abs(error)), "rmse": np.sqrt(mean(error**2))}


def as_groups(features: Any, name: str = "sensitive_features") -> Groups:
    """Groups from columns, or as they are."""
    return features if isinstance(features, Groups) else Groups.of(features, name=name)


def _compared(notion: str, method: str) -> tuple[str, ...]:
    if notion not in COMPARED:
        why = "compares losses or scores, which hard predictions do not have" if notion in NOTIONS else "is not known"
        raise ValueError(f"notion: expected one of {', '.join(COMPARED)}; {notion!r} {why}")
    if method not in ("between_groups", "to_overall"):
        raise ValueError(f"method: expected 'between_groups' or 'to_overall', got {method!r}")
    return COMPARED[notion]


def _labels(cells: Confusion, notion: str, positive: Any) -> list[Any]:
    """The classes that are compared with the rest; any one where it makes no difference."""
    if not NOTIONS[notion].rates[0].is_of_one_class:
        return [cells.classes[0].item()]
    return list(cells.classes.tolist()) if positive is None else [positive]
