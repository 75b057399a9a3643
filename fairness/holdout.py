"""Rows of a table to train on and others to judge by, with binary labels of any type and the groups of both."""

# ruff: noqa: N803 - X is scikit-learn's name
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from sklearn.utils import _safe_indexing, check_array, check_consistent_length, column_or_1d
from sklearn.utils.multiclass import check_classification_targets, type_of_target
from sklearn.utils.validation import _num_samples, assert_all_finite

from robust_if.data import Samples
from robust_if.fairness.groups import Groups, at_least_two
from robust_if.fairness.notions import NOTIONS
from robust_if.fairness.targets import fairness_gap
from robust_if.targets import Functional, Utility

Array = NDArray[np.float64]
Codes = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Binary:
    """Two classes of any type; code 1 is the one whose prediction is the benefit.

    Args:
        classes: ``(2,)`` sorted.
        positive: position of the beneficial one.
    """

    classes: NDArray[Any]
    positive: int

    @classmethod
    def of(cls, y: Any, positive: Any = None) -> tuple[Binary, Codes]:
        """The classes of labels ``(n,)``, and the labels as codes; the last class is the beneficial one by default.

        Raises:
            ValueError: if there are not two classes, a label is missing, or ``positive`` is none of them.
        """
        labels = _column(y)
        classes = np.unique(labels)
        if len(classes) < 2:
            raise ValueError(f"y: expected two classes, got {len(classes)} class: {classes.tolist()}")
        if len(classes) > 2:
            kind = type_of_target(labels, input_name="y")
            raise ValueError(f"y: Only binary classification is supported. The type of the target is {kind}, with {len(classes)} classes.")
        if positive is not None and positive not in classes.tolist():
            raise ValueError(f"positive: expected one of the labels {classes.tolist()}, got {positive!r}")
        binary = cls(classes, 1 if positive is None else classes.tolist().index(positive))
        return binary, binary.encode(labels)

    def encode(self, y: Any) -> Codes:
        """Labels as codes 0 and 1.

        Raises:
            ValueError: if a label is neither of the classes.
        """
        labels = _column(y)
        unknown = sorted(set(labels.tolist()) - set(self.classes.tolist()), key=str)
        if unknown:
            raise ValueError(f"y: expected the labels {self.classes.tolist()}, got {unknown[:5]} as well")
        return np.asarray(labels == self.classes[self.positive], dtype=np.int64)

    def decode(self, codes: Codes) -> NDArray[Any]:
        """Codes as labels."""
        return np.asarray(self.classes[np.where(codes == 1, self.positive, 1 - self.positive)])


@dataclass(frozen=True, eq=False)
class Holdout:
    """Training and validation rows of binary labels.

    Args:
        rows: ``(m,)`` positions of the training rows among the given ones.
        mask: ``(n,)`` the given rows that are held out for validation.
        x: training features.
        y: ``(m,)`` codes.
        valid_x: validation features.
        valid_y: codes.
        sensitive: sensitive features of the validation rows, or ``None``.
        control: control features of the validation rows, or ``None``.
    """

    rows: Codes
    mask: NDArray[np.bool_] = field(repr=False)
    x: Any = field(repr=False)
    y: Codes = field(repr=False)
    valid_x: Any = field(repr=False)
    valid_y: Codes = field(repr=False)
    sensitive: Any = field(repr=False)
    control: Any = field(repr=False)

    @classmethod
    def drawn(cls, X: Any, y: Codes, weights: Array, sensitive: Any, control: Any, fraction: float, rng: np.random.RandomState) -> Holdout:
        """A share of the rows with positive weight is held out, the same share of every combination of label, group and stratum.

        Raises:
            ValueError: if the fraction is out of range, a group or stratum is too small for one row to be held out, or a class for one to remain.
        """
        if not 0 < fraction < 1:
            raise ValueError(f"validation_fraction: expected a share between 0 and 1, got {fraction}")
        columns = {name: _checked(each, len(y), name) for name, each in (("sensitive_features", sensitive), ("control_features", control))}
        rows = np.flatnonzero(weights)
        order = rows[np.lexsort((rng.permutation(len(rows)), *(each.codes[rows] for each in columns.values() if each), y[rows]))]
        mask = np.zeros(len(y), dtype=np.bool_)
        mask[order] = np.diff(np.floor(np.arange(len(order) + 1) * fraction + 1e-9)) > 0
        train, valid = rows[~mask[rows]], np.flatnonzero(mask)
        for name, each in columns.items():
            lost = np.setdiff1d(each.codes[rows], each.codes[valid]) if each else np.array([])
            if len(lost):
                names = [each.names[code] for code in lost[:5]] if each else []
                raise ValueError(f"{name}: none of the rows of {names} was held out for validation; join groups, or give validation data")
        _both_classes(y[train], len(y[valid]))
        parts = (_taken(each, valid) for each in columns.values())
        return cls(train, mask, _safe_indexing(X, train), y[train], _safe_indexing(X, valid), y[valid], *parts)

    @classmethod
    def given(cls, X: Any, y: Codes, weights: Array, sensitive: Any, control: Any, validation: Sequence[Any], classes: Binary) -> Holdout:
        """Rows with positive weight are trained on; ``validation`` is ``(X, y)``, then perhaps sensitive and control features.

        Raises:
            ValueError: if ``validation`` is something else, or a class has no training row.
        """
        if not isinstance(validation, (tuple, list)) or not 2 <= len(validation) <= 4:
            raise ValueError("validation: expected (X, y), (X, y, sensitive_features) or (X, y, sensitive_features, control_features)")
        for name, each in (("sensitive_features", sensitive), ("control_features", control)):
            _checked(each, len(y), name)
        valid_x, valid_y, *columns = validation
        valid_x = as_table(valid_x, "validation")
        check_consistent_length(valid_x, valid_y)
        train = np.flatnonzero(weights)
        _both_classes(y[train], 0)
        columns += [None] * (2 - len(columns))
        return cls(train, np.zeros(len(y), dtype=np.bool_), _safe_indexing(X, train), y[train], valid_x, classes.encode(valid_y), *columns)

    def targets(self, names: Sequence[str], z: Array, *, smallest: int, shrink: float) -> tuple[Functional, ...]:
        """The gaps of these notions, or the loss for ``"utility"``, on the validation rows with the features ``z`` ``(v, p)`` of the model.

        Raises:
            ValueError: if a gap is asked for without sensitive features of the validation rows, or these do not allow it.
        """
        valid = Samples((torch.from_numpy(z), torch.from_numpy(self.valid_y)))
        if list(names) == ["utility"]:
            return (Utility(valid, batch_size=len(valid)),)
        if self.sensitive is None:
            where = "" if self.mask.any() else ", as third part of validation=(X, y, sensitive_features)"
            raise ValueError(f"sensitive_features: expected one value per row{where}, since the target is {', '.join(names)}; got None")
        settings: dict[str, Any] = {"control_features": self.control, "smallest": smallest, "shrink": shrink, "batch_size": len(valid)}
        return tuple(fairness_gap(name, valid, self.sensitive, **settings) for name in names)


def notions(target: Any) -> list[str]:
    """The names that a target consists of.

    Raises:
        ValueError: if one is no notion of a classifier, or ``"utility"`` comes with others.
    """
    names = [target] if isinstance(target, str) else list(target)
    known = [name for name, notion in NOTIONS.items() if all(rate.statistic != "prediction" for rate in notion.rates)]
    if names != ["utility"] and (not names or not set(names) <= set(known)):
        raise ValueError(f"target: expected 'utility', or one or several of {', '.join(known)}; got {target!r}")
    return names


def as_table(X: Any, name: str = "X", *, two_d: bool = False) -> Any:
    """Data frames as they are, anything else as an array; its values, and unless ``two_d`` its shape, are left for the model to judge."""
    if hasattr(X, "columns") or hasattr(X, "column_names"):
        return X
    return check_array(X, accept_sparse="csr", dtype=None, ensure_all_finite=False, ensure_2d=two_d, allow_nd=True, input_name=name)


def sample_weights(sample_weight: Any, X: Any) -> Array:
    """Weights ``(n,)`` from 0 on, 1 where none are given.

    Raises:
        ValueError: if there is not one per row, or they are negative, not finite, or all zero.
    """
    n = _num_samples(X)
    if sample_weight is None:
        return np.ones(n)
    weights = np.asarray(check_array(sample_weight, ensure_2d=False, dtype=np.float64, input_name="sample_weight"))
    if weights.shape != (n,) or not (weights >= 0).all():
        raise ValueError(f"sample_weight: expected {n} numbers from 0 on, got shape {weights.shape} with the least {weights.min()}")
    if not weights.any():
        raise ValueError("sample_weight: expected at least one above 0, but all are zero")
    return weights


def _column(y: Any) -> NDArray[Any]:
    labels = np.asarray(column_or_1d(y, warn=True))
    assert_all_finite(labels, input_name="y")
    missing = int(pd.isna(labels).sum())
    if missing:
        raise ValueError(f"y: {missing} of {len(labels)} labels are missing")
    check_classification_targets(labels)
    return labels


def _checked(features: Any, n: int, name: str) -> Groups | None:
    """The groups of all given rows; of sensitive features at least two."""
    if features is None:
        return None
    groups = Groups.of(features, name=name)
    if len(groups) != n:
        raise ValueError(f"{name}: expected one value for each of the {n} rows, got {len(groups)}")
    return at_least_two(groups) if name == "sensitive_features" else groups


def _taken(groups: Groups | None, rows: Codes) -> pd.DataFrame | None:
    if groups is None:
        return None
    return pd.DataFrame([groups.values[code] for code in groups.codes[rows]], columns=list(groups.features))


def _both_classes(y: Codes, held_out: int) -> None:
    if len(np.unique(y)) < 2:
        rest = f", {held_out} are held out" if held_out else ""
        raise ValueError(f"y: expected rows of both classes to train on, but all {len(y)} with a weight above zero are of one class{rest}")
