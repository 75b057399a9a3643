"""Confusion matrices of groups, from checked labels: what every metric of hard predictions is a quotient of.

A quotient of nothing is NaN, never 0: a group without positive samples has no true positive rate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from robust_if.fairness.groups import Groups

Array = NDArray[np.float64]

#: Classes that a confusion matrix may have at most.
CLASSES = 100
#: Rates by name: which samples are counted, and among which.
RATES = {
    "base_rate": ("positives", "samples"),
    "selection_rate": ("selected", "samples"),
    "accuracy": ("right", "samples"),
    "error_rate": ("wrong", "samples"),
    "true_positive_rate": ("true_positives", "positives"),
    "false_negative_rate": ("false_negatives", "positives"),
    "false_positive_rate": ("false_positives", "negatives"),
    "true_negative_rate": ("true_negatives", "negatives"),
    "precision": ("true_positives", "selected"),
    "negative_predictive_value": ("true_negatives", "rejected"),
}


@dataclass(frozen=True, eq=False)
class Confusion:
    """Confusion matrices of groups; made by :meth:`of`.

    Args:
        counts: ``(..., G, K, K)`` samples, or their weight, by group, label and prediction; all methods keep the leading axes.
        classes: ``(K,)`` the labels, sorted.
    """

    counts: Array
    classes: NDArray[Any]

    @classmethod
    def of(
        cls,
        y_true: ArrayLike,
        y_pred: ArrayLike,
        groups: Groups,
        *,
        strata: Groups | None = None,
        classes: Sequence[Any] | None = None,
        sample_weight: ArrayLike | None = None,
    ) -> Confusion:
        """The confusion matrices of predictions.

        Args:
            y_true: ``(n,)`` labels: strings, booleans or whole numbers.
            y_pred: ``(n,)`` predicted labels, not scores.
            groups: of the samples.
            strata: makes one table for each, ``counts (S, G, K, K)``.
            classes: all labels there may be; those of ``y_true`` by default.
            sample_weight: ``(n,)`` weights from 0 on.

        Raises:
            ValueError: if lengths differ, there are scores among the predictions or labels that are not known, or a weight is negative.
        """
        place, known = coded(y_true, y_pred, groups, strata=strata, classes=classes)
        weight = weights(sample_weight, len(groups))
        shape = (() if strata is None else (len(strata.values),)) + (len(groups.values), len(known), len(known))
        return cls(np.bincount(place, weight, minlength=int(np.prod(shape))).astype(np.float64).reshape(shape), known)

    def counted(self, rate: str, positive: Any = 1) -> tuple[Array, Array]:
        """Numerator and denominator of a rate, ``(..., G)`` each; ``positive`` is one of the classes, and all others count as negative."""
        if rate not in RATES:
            raise ValueError(f"rate: expected one of {', '.join(RATES)}, got {rate!r}")
        share, among = RATES[rate]
        k = class_at(self.classes, positive)
        return self._sum(share, k), self._sum(among, k)

    def rate(self, name: str, positive: Any = 1) -> Array:
        """A rate of every group by its name in :data:`RATES`, ``(..., G)``; NaN where there is nothing to divide by."""
        return quotient(*self.counted(name, positive))

    def overall(self) -> Confusion:
        """All groups as one, ``counts (..., 1, K, K)``."""
        return Confusion(self.counts.sum(-3, keepdims=True), self.classes)

    def _sum(self, what: str, k: int) -> Array:
        if what in ("right", "wrong"):  # of all classes, not of one against the rest
            right = np.eye(len(self.classes))
            total: Array = (self.counts * (right if what == "right" else 1 - right)).sum((-2, -1))
            return total
        own = np.arange(len(self.classes)) == k
        every = np.ones(len(self.classes), dtype=bool)
        label, prediction = {
            "samples": (every, every), "positives": (own, every), "negatives": (~own, every), "selected": (every, own), "rejected": (every, ~own),
            "true_positives": (own, own), "false_negatives": (own, ~own), "false_positives": (~own, own), "true_negatives": (~own, ~own),
        }[what]  # fmt: skip
        block: Array = self.counts[..., label, :][..., prediction].sum((-2, -1))
        return block


def quotient(share: Array, among: Array) -> Array:
    """Their quotient, NaN where nothing is divided by."""
    found: Array = np.divide(share, among, out=np.full(np.shape(share), np.nan), where=np.asarray(among) > 0)
    return found


def coded(
    y_true: ArrayLike, y_pred: ArrayLike, groups: Groups, *, strata: Groups | None = None, classes: Sequence[Any] | None = None
) -> tuple[NDArray[np.int64], NDArray[Any]]:
    """Position of every sample in the flat table of :class:`Confusion`, ``(n,)``, and the classes; arguments and errors as there."""
    y, predicted = labels(y_true, "y_true"), labels(y_pred, "y_pred")
    for values, name in ((predicted, "y_pred"), (groups, "sensitive_features"), (strata, "control_features")):
        if values is not None and len(values) != len(y):
            raise ValueError(f"{name}: expected one value for each of the {len(y)} samples of y_true, got {len(values)}")
    if y.dtype.kind != predicted.dtype.kind:
        raise ValueError(f"y_pred: expected labels as in y_true, such as {y[0].item()!r}, got {predicted[0].item()!r}")
    known = np.unique(y if classes is None else labels(classes, "classes"))
    if classes is None and known.dtype.kind == "i" and {*known.tolist(), *predicted.tolist()} <= {0, 1}:
        known = np.array([0, 1])  # of which the labels may happen to show one
    if len(known) > CLASSES:
        raise ValueError(f"y_true: expected at most {CLASSES} classes, got {len(known)}; for numbers see regression()")
    for values, name in ((y, "y_true"), (predicted, "y_pred")):
        unknown = np.setdiff1d(values, known)
        if len(unknown):
            raise ValueError(f"{name}: {unknown[:5].tolist()} are not among the labels {known[:20].tolist()}; name all classes if they may occur")
    group = groups.codes if strata is None else strata.codes * len(groups.values) + groups.codes
    place: NDArray[np.int64] = (group * len(known) + np.searchsorted(known, y)) * len(known) + np.searchsorted(known, predicted)
    return place, known


def class_at(classes: NDArray[Any], positive: Any) -> int:
    """Position of a class among the sorted classes.

    Raises:
        ValueError: if it is none of them.
    """
    found = np.flatnonzero(classes == positive) if isinstance(positive, str) == (classes.dtype.kind == "U") else np.array([], dtype=np.int64)
    if not len(found):
        raise ValueError(f"positive: expected one of the labels {classes[:20].tolist()}, or None for each against the rest; got {positive!r}")
    return int(found[0])


def labels(values: Any, name: str) -> NDArray[Any]:
    """Labels ``(n,)`` as int64 or strings.

    Raises:
        ValueError: if there is none, one is missing, they are of two kinds, or they are scores.
    """
    array = np.asarray(values)
    array = array[:, 0] if array.ndim == 2 and array.shape[1] == 1 else array
    if array.ndim != 1 or not len(array):
        raise ValueError(f"{name}: expected labels of shape (n,), got {array.shape}; of class probabilities take the argmax")
    missing = np.asarray(pd.isna(array))
    if missing.any():
        raise ValueError(f"{name}: {missing.sum()} of {len(array)} are missing; drop these samples")
    if array.dtype.kind not in "biufU":
        strings = sum(isinstance(value, str) for value in array.tolist())
        if strings not in (0, len(array)):
            raise ValueError(f"{name}: expected labels of one kind, got {strings} strings among {len(array)}")
        try:
            array = array.astype(str if strings else np.float64)
        except (TypeError, ValueError):
            raise ValueError(f"{name}: expected strings, booleans or whole numbers, got {type(array[0]).__name__}") from None
    if array.dtype.kind == "U":
        return array
    if array.dtype.kind == "f":
        soft = array[~np.isfinite(array) | (array != np.round(array))]
        if len(soft):
            raise ValueError(f"{name}: expected labels, got numbers such as {soft[0]:.4g}; decide first, for example by score >= 0.5")
    return array.astype(np.int64)


def weights(sample_weight: ArrayLike | None, n: int) -> Array | None:
    """The weights ``(n,)`` of samples, checked; ``None`` for all alike.

    Raises:
        ValueError: if their number is another, one is negative or not finite, or all are 0.
    """
    if sample_weight is None:
        return None
    w = np.asarray(sample_weight, dtype=np.float64)
    if w.shape != (n,):
        raise ValueError(f"sample_weight: expected shape ({n},), got {w.shape}")
    if not np.isfinite(w).all() or (w < 0).any() or not w.any():
        raise ValueError("sample_weight: expected finite numbers from 0 on, not all of them 0")
    return w
