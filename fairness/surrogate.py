"""The logistic regression that stands in for a scikit-learn model, and the targets that it is asked about."""

# ruff: noqa: N803, N806 - X is scikit-learn's name
from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from sklearn.utils import check_array, check_random_state
from sklearn.utils.validation import validate_data

from robust_if.estimators import Estimator
from robust_if.fairness.holdout import Array, Binary, Codes, Holdout, as_table, notions, sample_weights
from robust_if.fairness.leaks import same_samples
from robust_if.fairness.logistic import Logistic
from robust_if.fairness.tables import TableEncoder
from robust_if.fairness.weighting import Weighted, seeded
from robust_if.targets import Functional


@dataclass(frozen=True, eq=False)
class Surrogate:
    """A logistic regression of the rows of a table.

    Args:
        binary: the classes.
        codes: ``(n,)`` labels of all given rows.
        held: its training and validation rows.
        base: ``(m,)`` weights of the training rows.
        encoder: fitted; makes the features of the logistic regression.
        logistic: of the training rows.
        targets: on the validation rows.
        seed: for what is random in other models of the same rows.
    """

    binary: Binary
    codes: Codes = field(repr=False)
    held: Holdout
    base: Array = field(repr=False)
    encoder: Any
    logistic: Logistic
    targets: tuple[Functional, ...]
    seed: int

    @classmethod
    def of(
        cls, settings: Any, X: Any, y: Any, sensitive: Any, sample_weight: Any, control: Any, validation: Any, estimator: Estimator | None = None
    ) -> Surrogate:
        """From the hyper-parameters of a scikit-learn estimator, ``settings``, and what its ``fit`` was given; features are noted in ``settings``.

        Raises:
            ValueError: see :meth:`robust_if.fairness.sklearn.InfluenceReweigh.fit`.
        """
        if not settings.C > 0:
            raise ValueError(f"C: expected a number above 0, got {settings.C}")
        names, X = notions(settings.target), as_table(X)
        validate_data(settings, X, y, skip_check_array=True)
        weights = sample_weights(sample_weight, X)
        binary, codes = Binary.of(y, settings.positive)
        if len(codes) != len(weights):
            raise ValueError(f"y: expected one label for each of the {len(weights)} rows, got {len(codes)}")
        rng = check_random_state(settings.random_state)
        seed = int(rng.randint(2**31 - 1))
        if validation is None:
            held = Holdout.drawn(X, codes, weights, sensitive, control, settings.validation_fraction, rng)
        else:
            held = Holdout.given(X, codes, weights, sensitive, control, validation, binary)
            validate_data(settings, held.valid_x, reset=False, skip_check_array=True)
        encoder = TableEncoder() if settings.surrogate is None else seeded(settings.surrogate, seed)
        x, valid_x = _dense(encoder.fit_transform(held.x, held.y)), _dense(encoder.transform(held.valid_x))
        targets = held.targets(names, valid_x, smallest=settings.smallest, shrink=settings.shrink)
        logistic = Logistic(x, held.y, 1 / settings.C, estimator=estimator)
        if same_samples(targets[0].data, logistic.train):
            raise ValueError("validation: the rows are those of the training data; judge by rows that nothing is trained on")
        return cls(binary, codes, held, weights[held.rows], encoder, logistic, targets, seed)

    @property
    def learner(self) -> Weighted:
        """The logistic regression with the weights of the rows."""
        return Weighted(self.logistic, self.base)


def _dense(z: Any) -> Array:
    return np.asarray(check_array(z.toarray() if hasattr(z, "toarray") else z, dtype=np.float64, input_name="surrogate"))
