"""Logistic regression in closed form: its optimum, its curvature, and what every training sample does to a target.

The classical influence function needs one solve with the Hessian per target; the scores of all n samples are then one product with the data. Nothing
here is approximated but the first order itself, and a test compares it with the exact estimator of the core.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.linalg import cho_factor, cho_solve
from scipy.special import expit
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from robust_if.data import Samples
from robust_if.estimators import Estimator
from robust_if.fairness.learners import Fitted
from robust_if.sweep import Sweep
from robust_if.targets import Functional, Target
from robust_if.task import Batch, Task

Array = NDArray[np.float64]

#: Of the gradient of the mean loss at an optimum.
TOLERANCE = 1e-8
#: Up to so many features Newton's method is the fastest; beyond, its Hessians cost more than many cheap steps.
FEW = 256


@dataclass(frozen=True, eq=False)
class Logistic:
    """Binary logistic regression, Σ wᵢ ℓᵢ + (l2 / 2) ‖θ‖² with an intercept that is not penalised; a learner of repairs.

    Args:
        x: ``(n, d)`` features.
        y: ``(n,)`` labels, 0 or 1.
        l2: penalty, the inverse of scikit-learn's ``C``.
        intercept: whether there is one.
        estimator: what scores the samples; the closed form with the exact inverse Hessian by default.

    Raises:
        ValueError: if a label is neither 0 nor 1, the lengths differ, or ``l2`` is not positive.
    """

    x: Array
    y: NDArray[np.int64]
    l2: float = 1.0
    intercept: bool = True
    estimator: Estimator | None = None

    def __post_init__(self) -> None:
        x, y = np.asarray(self.x, dtype=np.float64), np.asarray(self.y)
        if x.ndim != 2 or y.shape != (len(x),):
            raise ValueError(f"x, y: expected shapes (n, d) and (n,), got {x.shape} and {y.shape}")
        if not np.isin(y, (0, 1)).all():
            raise ValueError(f"y: expected labels 0 and 1, got {np.unique(y)[:5].tolist()}")
        if not self.l2 > 0:
            raise ValueError(f"l2: expected a positive number, got {self.l2}")
        object.__setattr__(self, "x", x)
        object.__setattr__(self, "y", y.astype(np.int64))

    @cached_property
    def train(self) -> Samples:
        """The training samples."""
        return Samples((torch.from_numpy(self.x), torch.from_numpy(self.y)))

    @cached_property
    def design(self) -> Array:
        """The features ``(n, p)``, with a column of ones for the intercept as the last one."""
        return np.column_stack([self.x, np.ones(len(self.x))]) if self.intercept else self.x

    def fit(self, weights: ArrayLike | None = None, labels: ArrayLike | None = None, start: Fitted | None = None) -> FittedLogistic:
        """The optimum for weights ``(n,)`` and labels ``(n,)``, from that of ``start`` if given.

        Raises:
            ValueError: if the weights are negative, not one per sample, or leave only one class.
        """
        w = np.ones(len(self.y)) if weights is None else np.asarray(weights, dtype=np.float64)
        y = self.y if labels is None else np.asarray(labels, dtype=np.int64)
        if w.shape != self.y.shape or not (w >= 0).all():
            raise ValueError(f"weights: expected {len(self.y)} numbers from 0 on, got shape {w.shape} with the least {w.min() if w.size else None}")
        if len(np.unique(y[w > 0])) < 2:
            raise ValueError(f"weights: expected samples of both classes to keep a weight, but all {np.count_nonzero(w)} left are of one")
        solver = "newton-cholesky" if self.x.shape[1] <= FEW else "lbfgs"
        settings: dict[str, Any] = {"solver": solver, "tol": TOLERANCE, "max_iter": 1000, "warm_start": True}
        model = LogisticRegression(C=1 / self.l2, fit_intercept=self.intercept, **settings)
        if isinstance(start, FittedLogistic):
            model.coef_, model.intercept_ = start.coef[None], np.array([start.intercept])
        model.fit(self.x, y, sample_weight=w)
        return FittedLogistic(self, w, y, model.coef_[0], float(model.intercept_[0]))


@dataclass(frozen=True, eq=False)
class FittedLogistic:
    """The optimum of :class:`Logistic` for weights ``(n,)`` and labels ``(n,)``.

    Args:
        coef: ``(d,)``.
        intercept: 0 where there is none.
    """

    learner: Logistic = field(repr=False)
    weights: Array = field(repr=False)
    labels: NDArray[np.int64] = field(repr=False)
    coef: Array
    intercept: float

    @cached_property
    def task(self) -> Task:
        """A linear module in float64 with one logit."""
        module = nn.Linear(len(self.coef), 1, bias=self.learner.intercept, dtype=torch.float64)
        with torch.no_grad():
            module.weight.copy_(torch.from_numpy(self.coef)[None])
            if self.learner.intercept:
                module.bias.fill_(self.intercept)
        return Task(module.eval(), loss=logistic_loss)

    @property
    def calibrated(self) -> bool:
        """Whether scores are in units of the target: those of the exact inverse Hessian are."""
        return self.learner.estimator is None or self.learner.estimator.units == "target"

    @cached_property
    def probabilities(self) -> Array:
        """P(y = 1) of the training samples, ``(n,)``."""
        return self.predict_proba(self.learner.x)

    @cached_property
    def curvature(self) -> Array:
        """H = Σ wᵢ pᵢ (1 − pᵢ) xᵢ xᵢᵀ + l2 without the intercept, ``(p, p)``."""
        return self._hessian(self.probabilities * (1 - self.probabilities))

    def _hessian(self, bends: Array) -> Array:
        """Σ wᵢ bᵢ xᵢ xᵢᵀ + l2 without the intercept, for second derivatives bᵢ of the losses in the logits, ``(n,)``."""
        x = self.learner.design
        hessian = (x * (self.weights * bends)[:, None]).T @ x
        hessian[np.diag_indices(len(self.coef))] += self.learner.l2
        return np.asarray(hessian)

    @cached_property
    def _factor(self) -> Any:
        return cho_factor(self.curvature)

    def solve(self, vectors: Array) -> Array:
        """H⁻¹ v for vectors ``(p,)`` or ``(p, k)``."""
        return np.asarray(cho_solve(self._factor, vectors))

    def values(self, targets: Sequence[Target]) -> list[float]:
        """See :meth:`Fitted.values`."""
        with torch.no_grad():
            return [float(_in_one_batch(target).value(self.task, self.task.params())) for target in targets]

    def gradients(self, targets: Sequence[Target]) -> Array:
        """∇T of each target, ``(p, k)``, the intercept last."""
        task = self.task
        params = task.params()
        found = [_in_one_batch(target).gradient(task, params) for target in targets]
        return np.stack([torch.cat([each[name].reshape(-1) for name in params]).numpy() for each in found], 1)

    def scores(self, targets: Sequence[Target]) -> Array:
        """See :meth:`Fitted.scores`: −gᵢᵀ H⁻¹ ∇T with gᵢ = (pᵢ − yᵢ) xᵢ (Koh and Liang 2017, arXiv 1703.04730, equation 2)."""
        estimator, train = self.learner.estimator, self.learner.train
        if estimator is not None:
            return self._estimated(estimator, targets, Samples((train.batch(slice(None))[0], torch.from_numpy(self.labels))))
        slopes = self.learner.design @ self.solve(self.gradients(targets))
        return np.asarray((self.labels - self.probabilities)[:, None] * slopes)

    def flips(self, targets: Sequence[Target], labels: NDArray[np.int64]) -> Array:
        """See :meth:`Fitted.flips`: wᵢ (y − y') xᵢᵀ H⁻¹ ∇T, with the curvature of a flip in H.

        Where the model is sure of a label, p (1 − p) is far below the curvature that the loss has on the way to the other label. Flips of whole kinds
        of samples are therefore predicted with the mean of the curvature between the logit s of every sample and −s, tanh(|s| / 2) / (2 |s|): on
        Adult the exact H promises a hundred times the change that flips of rare kinds bring.
        """
        estimator, train = self.learner.estimator, self.learner.train
        if estimator is not None:
            x = train.batch(slice(None))[0]
            own, others = (self._estimated(estimator, targets, Samples((x, torch.from_numpy(each)))) for each in (self.labels, labels))
            return np.asarray(self.weights[:, None] * (own - others))
        logits = np.abs(self.learner.x @ self.coef + self.intercept) + 1e-6
        hessian = self._hessian(np.tanh(logits / 2) / (2 * logits))
        slopes = self.learner.design @ cho_solve(cho_factor(hessian), self.gradients(targets))
        return np.asarray((self.weights * (self.labels - labels))[:, None] * slopes)

    def predict_proba(self, x: ArrayLike) -> Array:
        """P(y = 1) of features ``(m, d)``, ``(m,)``."""
        return np.asarray(expit(np.asarray(x, dtype=np.float64) @ self.coef + self.intercept))

    def predict(self, x: ArrayLike) -> NDArray[np.int64]:
        """Classes of features ``(m, d)``, ``(m,)``."""
        return (np.asarray(x, dtype=np.float64) @ self.coef + self.intercept > 0).astype(np.int64)

    def _estimated(self, estimator: Estimator, targets: Sequence[Target], samples: Samples) -> Array:
        kept = self.learner.train.take(np.flatnonzero(self.weights))
        named = {str(at): target for at, target in enumerate(targets)}
        found = estimator.score(self.task, kept, target=named, samples=samples, sweep=Sweep(batch_size=len(samples)))
        return np.stack([each.values for each in found], 1)


def logistic_loss(outputs: Tensor, batch: Batch) -> Tensor:
    """Cross-entropy of one logit per sample, ``(B,)``."""
    logits = outputs.reshape(len(outputs))
    return nn.functional.binary_cross_entropy_with_logits(logits, batch[1].to(logits), reduction="none")


def _in_one_batch(target: Target) -> Target:
    """The same target evaluated at once, which for a linear model costs less than going through it in parts; what it has cached stays."""
    if isinstance(target, Functional):
        target = copy.copy(target)
        object.__setattr__(target, "batch_size", len(target.data))
    return target
