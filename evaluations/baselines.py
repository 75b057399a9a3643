"""Detectors that look at labels and predictions but at no gradient: what influence has to beat."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.model_selection import StratifiedKFold

from robust_if.data import Samples, batches
from robust_if.estimators.base import Estimator, Job, Result
from robust_if.neighbours import nearest
from robust_if.task import Task
from robust_if.training import Recipe, fit


@dataclass(frozen=True)
class ConfidentLearning(Estimator):
    """1 − cleanlab's label quality from out-of-sample probabilities of ``folds`` models trained on the noisy data.

    Needs the extra ``cleanlab``. Source: Northcutt et al. 2021 (arXiv 1911.00068).
    """

    recipe: Recipe = field(default_factory=Recipe)
    folds: int = 5
    seed: int = 0
    needs_target: ClassVar[bool] = False

    @property
    def name(self) -> str:
        return "confident-learning"

    def estimate(self, job: Job) -> Result:
        from cleanlab.rank import get_label_quality_scores

        labels = job.samples.labels.numpy()
        rarest = np.bincount(labels)[np.unique(labels)].min()
        if rarest < self.folds:
            raise ValueError(f"folds: expected at most the size of the rarest class, {rarest}, got {self.folds}")
        probabilities = np.zeros((len(labels), 0))
        splits = StratifiedKFold(self.folds, shuffle=True, random_state=self.seed).split(labels, labels)
        for fold, (rest, held) in enumerate(splits):
            fitted = fit(job.task.reset(self.seed + fold), job.samples.take(rest), self.recipe, progress=job.sweep.progress)
            predicted = predict(fitted, job.samples.take(held), job.sweep.batch_size)
            if probabilities.shape[1] == 0:
                probabilities = np.zeros((len(labels), predicted.shape[1]))
            probabilities[held] = predicted
        return Result(1 - get_label_quality_scores(labels, probabilities))


@dataclass(frozen=True)
class NearestNeighbours(Estimator):
    """Share of the k nearest samples that carry another label, a near neighbour counting more than a far one."""

    k: int = 10
    needs_target: ClassVar[bool] = False

    @property
    def name(self) -> str:
        return "knn"

    def estimate(self, job: Job) -> Result:
        x = job.samples.batch(slice(None))[0].flatten(1).double().numpy()
        x = (x - x.mean(0)) / (x.std() + 1e-12)
        labels = job.samples.labels.numpy()
        distances, found = nearest(x, len(x), self.k)
        weights = 1 / (distances + 1e-12 + distances.mean())
        return Result((weights * (labels[found] != labels[:, None])).sum(1) / weights.sum(1))


def predict(task: Task, samples: Samples, batch_size: int = 256) -> NDArray[np.float64]:
    """Class probabilities ``(n, K)`` of a classifier."""
    params = task.params()
    with torch.no_grad():
        parts = [torch.softmax(task.outputs(params, batch), 1) for batch in batches(samples, batch_size, next(iter(params.values())))]
    return torch.cat(parts).double().cpu().numpy()


def accuracy(task: Task, samples: Samples, batch_size: int = 256) -> float:
    """Share of samples whose most probable class is their label."""
    return float((predict(task, samples, batch_size).argmax(1) == samples.labels.numpy()).mean())
