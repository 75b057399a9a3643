"""Repairs in the shape of scikit-learn: meta-estimators that change the training data of a classifier.

The rows are scored at a logistic regression of the same table, in which the effect of a row is known in closed form. Without an estimator that is the
model itself. Any other one is refitted after every round, and its decisions on validation rows say whether the round helped and when to stop.
"""

# ruff: noqa: N803 - X and C are scikit-learn's names
from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline
from sklearn.utils import _safe_indexing, get_tags
from sklearn.utils.metaestimators import available_if
from sklearn.utils.validation import check_is_fitted, validate_data

from robust_if.fairness.holdout import Array, Codes, as_table
from robust_if.fairness.repair import repair
from robust_if.fairness.scorer import InfluenceScorer
from robust_if.fairness.steps import Action
from robust_if.fairness.surrogate import Surrogate
from robust_if.fairness.targets import FairnessGap
from robust_if.fairness.weighting import refit, takes_weights

__all__ = ["InfluenceRelabel", "InfluenceReweigh", "InfluenceScorer", "InfluenceTrim"]


def _inner_has(name: str) -> Callable[[Any], bool]:
    """Whether the model has a method: the fitted one once there is one."""

    def check(self: Any) -> bool:
        model = getattr(self, "estimator_", self.estimator)
        getattr(LogisticRegression() if model is None else model, name)  # its own AttributeError says what is missing
        return True

    return check


class _InfluenceRepair(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    _action: Action

    def __init__(
        self,
        estimator: Any = None,
        *,
        target: Any = "demographic_parity",
        bound: float = 0.005,
        max_accuracy_loss: float | None = None,
        positive: Any = None,
        rounds: int = 10,
        budget: float = 0.05,
        cost: float = 0.05,
        validation_fraction: float = 0.5,
        surrogate: Any = None,
        C: float = 1.0,
        smallest: int = 10,
        shrink: float = 0.0,
        random_state: Any = 0,
    ) -> None:
        self.estimator = estimator
        self.target = target
        self.bound = bound
        self.max_accuracy_loss = max_accuracy_loss
        self.positive = positive
        self.rounds = rounds
        self.budget = budget
        self.cost = cost
        self.validation_fraction = validation_fraction
        self.surrogate = surrogate
        self.C = C
        self.smallest = smallest
        self.shrink = shrink
        self.random_state = random_state

    def fit(
        self,
        X: Any,
        y: Any,
        *,
        sensitive_features: Any = None,
        sample_weight: Any = None,
        control_features: Any = None,
        validation: Any = None,
    ) -> Self:
        """Repair the training data and fit the estimator to them.

        Args:
            X: ``(n, d)`` table: data frame (pandas, polars) or array.
            y: ``(n,)`` labels of two classes, of any type.
            sensitive_features: ``(n,)`` or ``(n, k)`` categories; several columns mean their intersections. Not needed for ``target="utility"``.
            sample_weight: ``(n,)`` weights from 0 on; those of the repair multiply them. Rows of weight 0 are left out. Validation rows count alike.
            control_features: the same as sensitive features for strata within which groups are compared.
            validation: ``(X, y)``, ``(X, y, sensitive_features)`` or ``(X, y, sensitive_features, control_features)`` to judge by; all rows are then
                trained on, and their sensitive features are not needed. By default some of the rows are held out.

        Raises:
            TypeError: if the estimator takes no ``sample_weight`` and needs them.
            ValueError: if a setting is out of range; there are not two classes; a sensitive feature is missing, constant, or a measurement; a group
                is too small on validation data; weights are negative or all zero; or the validation rows are the training rows.

        Warns:
            UserWarning: if a gap cannot be brought within its bound; says which one and how far it came.
        """
        self._check_estimator(sample_weight)
        stand_in = Surrogate.of(self, X, y, sensitive_features, sample_weight, control_features, validation)
        held, binary, base = stand_in.held, stand_in.binary, stand_in.base

        def fitted(factors: Array, labels: Codes) -> Any:
            weights, given = factors * base, binary.decode(labels)
            kept = np.flatnonzero(weights)
            if self.estimator is not None:
                return refit(self.estimator, _safe_indexing(held.x, kept), given[kept], weights[kept], stand_in.seed)
            logistic = LogisticRegression(C=self.C, solver="newton-cholesky", tol=1e-8, max_iter=1000)
            return Pipeline([("encode", stand_in.encoder), ("logistic", logistic.fit(stand_in.logistic.x, given, sample_weight=weights))])

        def judge(factors: Array, labels: Codes) -> Codes:
            return binary.encode(fitted(factors, labels).predict(held.valid_x))

        gaps = [target for target in stand_in.targets if isinstance(target, FairnessGap)]
        found = repair(
            stand_in.learner,
            gaps,
            self._action,
            bound=self.bound,
            max_accuracy_loss=self.max_accuracy_loss,
            utility=None if gaps else stand_in.targets[0],
            rounds=self.rounds,
            cost=self.cost,
            budget=self.budget,
            judge=None if self.estimator is None else judge,
        )
        if found.unmet:
            warnings.warn(found.unmet, UserWarning, stacklevel=2)
        # Without their models: those hold the training data, which should not be wherever a fitted estimator is copied to.
        self.repair_ = replace(found, rounds=tuple(replace(each, fitted=None) for each in found.rounds))  # type: ignore[arg-type]
        self.estimator_ = fitted(found.weights, found.labels)
        self.sample_weight_, labels = np.zeros(len(held.mask)), stand_in.codes.copy()
        self.sample_weight_[held.rows], labels[held.rows] = base * found.weights, found.labels
        self.labels_ = binary.decode(labels)
        self.kept_ = self.sample_weight_ > 0
        self.validation_ = held.mask
        self.classes_ = binary.classes
        return self

    def predict(self, X: Any) -> NDArray[Any]:
        """Labels ``(n,)``; no sensitive feature plays a role."""
        return self._of("predict", X)

    @available_if(_inner_has("predict_proba"))  # type: ignore[untyped-decorator]
    def predict_proba(self, X: Any) -> Array:
        """Probabilities ``(n, 2)`` in the order of ``classes_``."""
        return self._of("predict_proba", X)

    @available_if(_inner_has("decision_function"))  # type: ignore[untyped-decorator]
    def decision_function(self, X: Any) -> Array:
        """Decision values ``(n,)``, above 0 for the second of ``classes_``."""
        return self._of("decision_function", X)

    def _of(self, method: str, X: Any) -> NDArray[Any]:
        check_is_fitted(self)
        table = as_table(X, two_d=hasattr(self, "n_features_in_"))  # texts have none
        validate_data(self, table, reset=False, skip_check_array=True)
        return np.asarray(getattr(self.estimator_, method)(table))

    def _check_estimator(self, sample_weight: Any) -> None:
        model = self.estimator
        if model is None:
            return
        if not hasattr(model, "fit") or not hasattr(model, "predict"):
            raise TypeError(f"estimator: expected a scikit-learn classifier, got {type(model).__name__}")
        if not takes_weights(model) and (self._action == "reweigh" or sample_weight is not None):
            why = "InfluenceReweigh gives it weights, InfluenceTrim does without" if self._action == "reweigh" else "sample_weight is given"
            raise TypeError(f"estimator: {type(model).__name__} takes no sample_weight in fit, but {why}")

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_class = False
        if self.estimator is None:
            tags.input_tags.allow_nan = tags.input_tags.string = self.surrogate is None
        elif isinstance(self.estimator, BaseEstimator):
            inner = get_tags(self.estimator).input_tags
            tags.input_tags.allow_nan, tags.input_tags.string = inner.allow_nan, inner.string
        return tags


class InfluenceReweigh(_InfluenceRepair):
    """A classifier whose training rows are reweighed, by influence, until it is fair on validation rows.

    Args:
        estimator: any classifier or pipeline that takes ``sample_weight``; by default a logistic regression of the encoded table. Where its
            ``random_state`` is ``None``, that of this object is used.
        target: a notion of fairness by fairlearn's name, such as ``"equalized_odds"``, or several; or ``"utility"``, the loss on validation rows.
        bound: of the absolute value of every gap.
        max_accuracy_loss: on validation rows, from 0 to 1; no limit by default.
        positive: the label whose prediction is the benefit; the last one by default.
        rounds: at most so many refits.
        budget: trust region of the first rounds, as a share of all training rows.
        cost: price of changing every weight by one, in units of accuracy: the higher, the fewer rows are changed.
        validation_fraction: share of the rows that is held out, the same of every label and group. Half by default: a gap is known only as well as
            the validation rows tell it, while a logistic regression loses little by having fewer rows. Models that need rows want less held out.
        surrogate: a transformer that makes the numbers that the logistic regression sees; by default
            :class:`~robust_if.fairness.tables.TableEncoder`.
        C: inverse penalty of the logistic regression.
        smallest: fewest validation rows of a compared cell.
        shrink: draws the rates of small cells to that of all, instead of refusing them; see :class:`~robust_if.fairness.targets.FairnessGap`.
        random_state: of the held-out rows and of the estimator.

    Attributes:
        estimator_: fitted to the repaired rows; predicts labels of y.
        sample_weight_: ``(n,)`` of the given rows, with the weights given; 0 for validation rows that were held out, on which nothing is trained.
        labels_: ``(n,)`` of the given rows, of their type.
        kept_: ``(n,)`` where the weight is above 0; held-out validation rows are not kept.
        validation_: ``(n,)`` the rows that were held out; none where validation data were given.
        repair_: the rounds with predicted, verified and hard gaps, and what could not be met; weights are factors of those given, in the order of the
            training rows, and models are left out.
        classes_: the two labels, sorted.
        n_features_in_: d.
        feature_names_in_: names of the columns, if they are strings.

    Source: Li and Liu 2022 (arXiv 2202.00787), two-sided and in rounds; see :func:`~robust_if.fairness.repair.repair`.
    """

    _action = "reweigh"


class InfluenceTrim(_InfluenceRepair):
    """A classifier whose most harmful training rows are removed. Arguments and attributes as of :class:`InfluenceReweigh`.

    The estimator need not take ``sample_weight``: it is fitted to the rows that are kept.
    """

    _action = "remove"


class InfluenceRelabel(_InfluenceRepair):
    """A classifier whose most harmful training rows get the other label. Arguments and attributes as of :class:`InfluenceReweigh`.

    The estimator need not take ``sample_weight``.
    """

    _action = "relabel"
