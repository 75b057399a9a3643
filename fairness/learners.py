"""What a repair needs of a model: fit it to weighted samples, and say what each sample does to a target."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from robust_if.data import Samples, as_samples
from robust_if.estimators import Estimator, InnerProduct
from robust_if.sweep import Sweep
from robust_if.targets import Target
from robust_if.task import Task
from robust_if.training import Recipe, fit


class Fitted(Protocol):
    """A model fitted to weighted samples."""

    @property
    def task(self) -> Task:
        """The model with its loss, as targets take it."""

    @property
    def weights(self) -> NDArray[np.float64]:
        """``(n,)`` weights of the training samples."""

    @property
    def labels(self) -> NDArray[np.int64]:
        """``(n,)`` labels that it was trained with."""

    @property
    def calibrated(self) -> bool:
        """Whether predicted decreases are in units of the target; else they only rank, and a repair finds their scale on the way."""

    def values(self, targets: Sequence[Target]) -> list[float]:
        """The targets at the parameters of the model."""

    def scores(self, targets: Sequence[Target]) -> NDArray[np.float64]:
        """``(n, k)``: predicted decrease of each target when the weight of a training sample falls by one; positive = harmful."""

    def flips(self, targets: Sequence[Target], labels: NDArray[np.int64]) -> NDArray[np.float64]:
        """``(n, k)``: predicted decrease of each target when a training sample changes to its label of ``labels``; 0 at weight 0."""


class Learner(Protocol):
    """How a model is fitted."""

    @property
    def train(self) -> Samples:
        """The training samples ``(x, y)``."""

    def fit(self, weights: ArrayLike | None = None, labels: ArrayLike | None = None, start: Fitted | None = None) -> Fitted:
        """The model fitted to the training samples with weights ``(n,)`` and labels ``(n,)``, from the parameters of ``start`` if given."""


@dataclass(frozen=True, eq=False)
class Network:
    """Any torch model: trained by a recipe, warm-started where a fitted one is given, and scored by any estimator.

    Args:
        task: the model with its initial parameters.
        train: ``(x, y)``.
        recipe: of the training from ``task``.
        estimator: scores the samples; curvature is that of the samples of non-zero weight, each counted once.
        again: the recipe of a warm start; a third of the epochs at a third of the learning rate by default.
        sweep: how the samples are gone through.
    """

    task: Task
    train: Samples
    recipe: Recipe
    estimator: Estimator = field(default_factory=InnerProduct)
    again: Recipe | None = None
    sweep: Sweep = field(default_factory=Sweep)

    def __post_init__(self) -> None:
        object.__setattr__(self, "train", as_samples(self.train))

    def fit(self, weights: ArrayLike | None = None, labels: ArrayLike | None = None, start: Fitted | None = None) -> FittedNetwork:
        """See :meth:`Learner.fit`."""
        x, y = self.train.batch(slice(None))[:2]
        given = y if labels is None else torch.as_tensor(np.asarray(labels), dtype=y.dtype)
        samples = Samples((x, given), self.train.ids)
        w = np.ones(len(samples)) if weights is None else np.asarray(weights, dtype=np.float64)
        recipe, task = (self.recipe, self.task) if start is None else (self.again or _shorter(self.recipe), start.task)
        return FittedNetwork(fit(task, samples, recipe, weights=w), samples, w, self.estimator, self.sweep)


@dataclass(frozen=True, eq=False)
class FittedNetwork:
    """A trained model of :class:`Network`, with the samples and the weights of its training."""

    task: Task
    samples: Samples
    weights: NDArray[np.float64]
    estimator: Estimator
    sweep: Sweep

    @property
    def labels(self) -> NDArray[np.int64]:
        """``(n,)`` labels that it was trained with."""
        return np.asarray(self.samples.batch(slice(None))[1].numpy(), dtype=np.int64)

    @property
    def calibrated(self) -> bool:
        """Whether the estimator's scores are in units of the target."""
        return self.estimator.units == "target"

    def values(self, targets: Sequence[Target]) -> list[float]:
        """See :meth:`Fitted.values`."""
        with torch.no_grad():
            return [float(target.value(self.task, self.task.params())) for target in targets]

    def scores(self, targets: Sequence[Target]) -> NDArray[np.float64]:
        """See :meth:`Fitted.scores`."""
        return self._scored(targets, self.samples)

    def flips(self, targets: Sequence[Target], labels: NDArray[np.int64]) -> NDArray[np.float64]:
        """See :meth:`Fitted.flips`."""
        x, y = self.samples.batch(slice(None))[:2]
        others = Samples((x, torch.as_tensor(labels, dtype=y.dtype)), self.samples.ids)
        return np.asarray(self.weights[:, None] * (self._scored(targets, self.samples) - self._scored(targets, others)))

    def _scored(self, targets: Sequence[Target], samples: Samples) -> NDArray[np.float64]:
        kept = self.samples.take(np.flatnonzero(self.weights))
        named = {str(at): target for at, target in enumerate(targets)}
        scores = self.estimator.score(self.task, kept, target=named, samples=samples, sweep=self.sweep)
        return np.stack([each.values for each in scores], 1)


def _shorter(recipe: Recipe) -> Recipe:
    return replace(recipe, epochs=max(1, recipe.epochs // 3), lr=recipe.lr / 3)
