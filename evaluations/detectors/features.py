"""What a model makes of every sample: its features, logits and class; and the base of the detectors that look at features alone."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from robust_if import predictions
from robust_if.data import Samples, to
from robust_if.estimators.base import Estimator, Job, Result
from robust_if.features import penultimate
from robust_if.sweep import Sweep
from robust_if.task import Batch, Params, Task, batch_length


def features(task: Task, samples: Samples, batch_size: int = 256, layer: str | None = None) -> NDArray[np.float64]:
    """Features of every sample, ``(n, d)``, as :func:`robust_if.features.penultimate` defines them.

    Args:
        task: the model, in evaluation mode.
        samples: what is passed through it.
        batch_size: samples at a time; it changes nothing beyond rounding.
        layer: the name of a module whose output is taken instead of the input of the last linear layer.

    Raises:
        ValueError: if there is no such module, its value is no tensor with the sample as first axis, or the model calls no linear layer.
    """
    function, like = activations(task, samples, layer), next(task.model.parameters())
    return Sweep(batch_size=batch_size).map(function, samples, like, name="features").numpy()


def activations(task: Task, samples: Samples, layer: str | None = None) -> Callable[[Batch], Tensor]:
    """The features of a batch, ``batch -> (B, d)``, without a graph; tried on the first few samples."""
    params = task.params()

    def function(batch: Batch) -> Tensor:
        with torch.no_grad():
            return penultimate(task, params, batch, layer=layer)

    for count in (2, 3):  # two lengths: an axis of positions that comes first may be as long as one of them
        function(to(samples.batch(slice(0, count)), next(task.model.parameters())))
    return function


def class_labels(samples: Samples) -> NDArray[np.int64]:
    """The class of every sample, ``(n,)``.

    Raises:
        ValueError: if the samples are not ``(x, y)`` with one whole number ``y`` for each.
    """
    try:
        labels = samples.labels
    except (KeyError, IndexError) as error:
        raise ValueError("data: this detector compares classes; expected samples (x, y) with one class per sample") from error
    if labels.ndim != 1 or (labels.is_floating_point() and bool((labels != labels.round()).any())):
        raise ValueError(f"data: this detector compares classes; expected one whole number per sample, got {labels.dtype} of {tuple(labels.shape)}")
    return labels.cpu().numpy().astype(np.int64)


def class_logits(task: Task, params: Params, batch: Batch) -> Tensor:
    """Logits ``(B, K)`` of a classifier; a single logit z stands for the two logits (0, z).

    Raises:
        ValueError: if the model's outputs are not one row per sample.
    """
    outputs = task.outputs(params, batch)
    if not isinstance(outputs, Tensor) or outputs.ndim not in (1, 2) or len(outputs) != batch_length(batch):
        shape = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        raise ValueError(f"model: this detector needs a classifier's logits, shape ({batch_length(batch)}, K), got {shape}")
    return predictions.class_logits(outputs)


@dataclass(frozen=True)
class FeatureDetector(Estimator):
    """A detector that looks at features and labels alone. Subclasses give ``name`` and ``scores``.

    Args:
        layer: whose features, as in :func:`features`; the penultimate ones by default.
    """

    layer: str | None = field(default=None, kw_only=True)
    needs_target: ClassVar[bool] = False

    def check(self, task: Task) -> None:
        names = [name for name, _ in task.model.named_modules() if name]
        if self.layer is not None and self.layer not in names:
            raise ValueError(f"layer: the model has no module {self.layer!r}; it has {', '.join(names)}")

    def estimate(self, job: Job) -> Result:
        labels = class_labels(job.samples)
        return Result(self.scores(self._features(job), labels))

    def _features(self, job: Job) -> NDArray[np.float64]:
        return job.map(activations(job.task, job.samples, self.layer))

    @abstractmethod
    def scores(self, features: NDArray[np.float64], labels: NDArray[np.int64]) -> NDArray[np.float64]:
        """One score per row of ``features (n, d)``, high = suspicious."""


def by_class(
    function: Callable[[NDArray[np.float64]], NDArray[np.float64]], features: NDArray[np.float64], labels: NDArray[np.int64]
) -> NDArray[np.float64]:
    """``function: rows of one class (m, d) -> (m,)`` for each class, put together in the order of ``labels (n,)``."""
    values = np.zeros(len(labels))
    for label in np.unique(labels):
        values[labels == label] = function(features[labels == label])
    return values


def principal(rows: NDArray[np.float64], size: int, whiten: bool = False) -> NDArray[np.float64]:
    """The rows ``(m, d)`` about their mean in their first ``size`` principal components; fewer where there is no more variance than rounding.

    Signs are fixed by the components alone, so that the order of the rows does not matter.

    Args:
        whiten: scale every component to a variance of 1.
    """
    rounding = 1e-20 * (rows**2).sum()
    rows = rows - rows.mean(0)
    few = len(rows) < rows.shape[1]
    # eigenvectors, since LAPACK's singular value decomposition now and then fails to converge on such rows
    values, vectors = np.linalg.eigh(rows @ rows.T if few else rows.T @ rows)
    kept = vectors[:, values > max(1e-10 * values[-1], rounding)][:, ::-1][:, :size]
    axes = (rows.T @ kept / np.linalg.norm(rows.T @ kept, axis=0)).T if few else kept.T
    axes = axes * np.sign(axes[np.arange(len(axes)), np.abs(axes).argmax(1)])[:, None]
    projected: NDArray[np.float64] = rows @ axes.T
    return projected / projected.std(0) if whiten else projected
