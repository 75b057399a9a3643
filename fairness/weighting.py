"""Sample weights as users give them: learners whose samples have weights already, and scikit-learn models that take weights or do not."""

# ruff: noqa: N803 - X is scikit-learn's name
from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn import config_context
from sklearn.base import clone
from sklearn.pipeline import Pipeline
from sklearn.utils.validation import has_fit_parameter

from robust_if.data import Samples
from robust_if.fairness.learners import Fitted, Learner
from robust_if.targets import Target
from robust_if.task import Task

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Weighted:
    """A learner whose samples have weights before a repair; the weights of the repair multiply them.

    Args:
        learner: of unweighted samples.
        base: ``(n,)`` weights from 0 on.
    """

    learner: Learner
    base: Array = field(repr=False)

    @property
    def train(self) -> Samples:
        """The training samples."""
        return self.learner.train

    def fit(self, weights: ArrayLike | None = None, labels: ArrayLike | None = None, start: Fitted | None = None) -> FittedWeighted:
        """See :meth:`~robust_if.fairness.learners.Learner.fit`; ``weights`` are factors of the weights that the samples have."""
        product = self.base if weights is None else self.base * np.asarray(weights, dtype=np.float64)
        return FittedWeighted(self.learner.fit(product, labels, start.fitted if isinstance(start, FittedWeighted) else start), self.base)


@dataclass(frozen=True, eq=False)
class FittedWeighted:
    """The fitted model of :class:`Weighted`."""

    fitted: Fitted
    base: Array = field(repr=False)

    @property
    def task(self) -> Task:
        """The model with its loss."""
        return self.fitted.task

    @property
    def weights(self) -> Array:
        """``(n,)`` weights of the training samples, with those that they had."""
        return self.fitted.weights

    @property
    def labels(self) -> NDArray[np.int64]:
        """``(n,)`` labels that it was trained with."""
        return self.fitted.labels

    @property
    def calibrated(self) -> bool:
        """Whether predicted decreases are in units of the target."""
        return self.fitted.calibrated

    def values(self, targets: Sequence[Target]) -> list[float]:
        """The targets at the parameters of the model."""
        return self.fitted.values(targets)

    def scores(self, targets: Sequence[Target]) -> Array:
        """``(n, k)``: predicted decrease of each target when the factor of a sample falls by one."""
        return np.asarray(self.base[:, None] * self.fitted.scores(targets))

    def flips(self, targets: Sequence[Target], labels: NDArray[np.int64]) -> Array:
        """``(n, k)``: predicted decrease of each target when a sample, with the weight that it has, gets another label."""
        return self.fitted.flips(targets, labels)


def takes_weights(model: Any) -> bool:
    """Whether ``fit`` of a scikit-learn model takes ``sample_weight``; of a pipeline, that of its last step."""
    return takes_weights(model.steps[-1][1]) if isinstance(model, Pipeline) else has_fit_parameter(model, "sample_weight")


def refit(model: Any, X: Any, y: NDArray[Any], weights: Array, seed: int) -> Any:
    """A clone of a scikit-learn model, fitted to samples with positive weights ``(n,)``, which are handed over unless all of them are 1.

    Args:
        seed: for every ``random_state`` of the model that is ``None``, so that refits differ by their data alone.

    Raises:
        TypeError: if the weights differ from 1 and the model takes none.
    """
    copy = seeded(model, seed)
    if (weights == 1).all():
        return copy.fit(X, y)
    if not takes_weights(copy):
        raise TypeError(f"estimator: {type(copy).__name__} takes no sample_weight in fit, which it needs here")
    # A pipeline takes step__sample_weight only without metadata routing, whatever its steps have asked for.
    with config_context(enable_metadata_routing=False) if isinstance(copy, Pipeline) else nullcontext():
        return copy.fit(X, y, **{_argument(copy): weights})


def seeded(model: Any, seed: int) -> Any:
    """A clone whose ``random_state`` are set where they are ``None``."""
    copy = clone(model)
    unset = [name for name, value in copy.get_params(deep=True).items() if name.split("__")[-1] == "random_state" and value is None]
    return copy.set_params(**dict.fromkeys(unset, seed)) if unset else copy


def _argument(model: Any) -> str:
    if not isinstance(model, Pipeline):
        return "sample_weight"
    name, last = model.steps[-1]
    return f"{name}__{_argument(last)}"
