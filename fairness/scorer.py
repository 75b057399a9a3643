"""Scores of the rows of a table in the shape of scikit-learn: which of them harm a target, and by how much."""

# ruff: noqa: N803 - X and C are scikit-learn's names
from __future__ import annotations

from typing import Any, Self

import numpy as np
from sklearn.base import BaseEstimator
from sklearn.utils import ClassifierTags

from robust_if.estimators import Estimator
from robust_if.fairness.surrogate import Surrogate
from robust_if.targets import Target


class InfluenceScorer(BaseEstimator):  # type: ignore[misc]
    """What every training row does to a target, at a logistic regression of the table; several notions add up.

    Args:
        target: see :class:`~robust_if.fairness.sklearn.InfluenceReweigh`.
        estimator: ``"exact"``, the closed form with the inverse Hessian, or any estimator of :mod:`robust_if.estimators`.
        C: inverse penalty of the logistic regression.
        positive: see :class:`~robust_if.fairness.sklearn.InfluenceReweigh`, as the following.
        validation_fraction: share of the rows that is held out.
        surrogate: makes the numbers that the logistic regression sees.
        smallest: fewest validation rows of a compared cell.
        shrink: draws the rates of small cells to that of all.
        random_state: of the held-out rows.

    Attributes:
        scores_: ``(n,)`` predicted decrease of the target if the row is removed, positive = harmful; NaN for validation rows that were held out and
            for rows of weight 0. Other estimators than ``"exact"`` may only rank.
        validation_: ``(n,)`` the rows that were held out.
        n_features_in_: d.
        feature_names_in_: names of the columns, if they are strings.

    Source: Koh and Liang 2017 (arXiv 1703.04730), equation 2, for a gap in place of a loss.
    """

    def __init__(
        self,
        *,
        target: Any = "demographic_parity",
        estimator: Any = "exact",
        C: float = 1.0,
        positive: Any = None,
        validation_fraction: float = 0.25,
        surrogate: Any = None,
        smallest: int = 10,
        shrink: float = 0.0,
        random_state: Any = 0,
    ) -> None:
        self.target = target
        self.estimator = estimator
        self.C = C
        self.positive = positive
        self.validation_fraction = validation_fraction
        self.surrogate = surrogate
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
        """Score the rows; arguments and errors as of ``InfluenceReweigh.fit``."""
        if self.estimator != "exact" and not isinstance(self.estimator, Estimator):
            raise ValueError(f"estimator: expected 'exact' or an estimator of robust_if.estimators, got {self.estimator!r}")
        exact = isinstance(self.estimator, str)
        stand_in = Surrogate.of(
            self, X, y, sensitive_features, sample_weight, control_features, validation, estimator=None if exact else self.estimator
        )
        total: Target = stand_in.targets[0]
        for target in stand_in.targets[1:]:
            total = total + target
        self.scores_ = np.full(len(stand_in.held.mask), np.nan)
        self.scores_[stand_in.held.rows] = stand_in.learner.fit().scores([total])[:, 0]
        self.validation_ = stand_in.held.mask
        return self

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.required = True
        tags.classifier_tags = ClassifierTags(multi_class=False)
        tags.input_tags.allow_nan = tags.input_tags.string = self.surrogate is None
        return tags
