"""Label odds: how much more likely another label is than the given one, from models that never saw it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import log_softmax, logsumexp, softmax
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the name that every reader of torch code expects

from robust_if.data import Samples, batches, concatenate
from robust_if.estimators.base import Estimator, Job, Result
from robust_if.neighbours import nearest, word_weights
from robust_if.scores import Units
from robust_if.task import Batch, Task
from robust_if.token_losses import Reading
from robust_if.training import Recipe, fit

Array = NDArray[np.float64]

#: Candidate exponents of the network's and the neighbours' probabilities in the pool; the likelihood of the given labels chooses.
NETWORK = (0.25, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0)
NEIGHBOURS = (0.0, 0.15, 0.3, 0.5, 0.7, 1.0)


@dataclass(frozen=True)
class LabelOdds(Estimator):
    """log P(label wrong) / P(label right), from cross-fitted models that are trained through the estimated label noise.

    The label y of a sample is a noisy copy of its true class c, P(y | c) = T_cy.

    1. Models trained on the clean held-out data alone predict p(c | x) for the training samples; T is estimated from these predictions and the
       given labels by maximum likelihood (expectation–maximisation), together with a temperature of p.
    2. In every round the training data are split into folds. For each fold a fresh model is trained on the other folds with the noise-corrected
       loss −log Σ_c p(c | x) T_cy, and on the held-out data with the plain loss; it predicts the fold that it has not seen.
    3. The prediction is pooled with that of the nearest neighbours, a vote of their own posteriors: p ∝ p_network^a p_neighbours^b. T, a and b are
       those of the largest likelihood of the given labels; where neighbours tell nothing, b is 0.
    4. After the last round the score is log Σ_{c≠y} p(c | x) T_cy − log p(y | x) T_yy.

    A score above 0 means that the label is more probably wrong than right, so 0 is the automatic threshold. The most probable true class is the
    suggested label; with three or more classes that can be the given one even above 0. No sample is judged by a model that was trained on its label,
    so memorised labels do no harm, and the model to be examined is used for its architecture only.

    Args:
        rounds: of cross-fitting, after the start from held-out data alone.
        folds: per round.
        neighbours: how many nearest neighbours vote, by Euclidean distance of the inputs, of texts of their TF-IDF weights; 0 for none.
        starts: models trained on the held-out data alone, whose probabilities are averaged.
        recipe: how each fold's model is trained.
        start_recipe: how the models on the held-out data alone are trained.
        seed: draws folds and initial parameters.

    Source: this project. The noise-corrected loss is the forward correction of Patrini et al. 2017 (arXiv 1609.03683); judging samples by models
    that did not see them is cross-fitting, as in confident learning (Northcutt et al. 2021, arXiv 1911.00068).
    """

    rounds: int = 2
    folds: int = 5
    neighbours: int = 10
    starts: int = 3
    recipe: Recipe = field(default_factory=lambda: Recipe(epochs=15, lr=2e-3, optimizer="adamw", weight_decay=0.0))
    start_recipe: Recipe = field(default_factory=lambda: Recipe(epochs=100, lr=2e-3, optimizer="adamw", weight_decay=0.0))
    seed: int = 0
    units: ClassVar[Units] = "log-odds"

    def __post_init__(self) -> None:
        if self.folds < 2:
            raise ValueError(f"folds: expected at least 2, since a sample is judged by models that did not see it, got {self.folds}")
        for name, least in (("starts", 1), ("rounds", 0), ("neighbours", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: expected at least {least}, got {getattr(self, name)}")

    @property
    def name(self) -> str:
        return "label-odds"

    def estimate(self, job: Job) -> Result:
        labels, clean = job.samples.labels.numpy(), concatenate(job.target.held_out)
        starts = [self._fit(job, f"start-{m}", self.start_recipe, m, clean, None) for m in range(self.starts)]
        log_p = logsumexp([_log_probabilities(task, job.samples, job.sweep.batch_size) for task in starts], axis=0) - np.log(self.starts)
        joint, noise = estimate_noise(log_p, labels)
        vote = _Neighbours(job.samples, clean, self.neighbours, isinstance(job.task.forward, Reading)) if self.neighbours else None
        for r in range(self.rounds):
            log_p = self._cross_fitted(job, clean, noise, r, log_p.shape)
            joint, noise = estimate_noise(log_p, labels, None if vote is None else vote(softmax(joint, axis=1)))
        given = np.take_along_axis(joint, labels[:, None], 1)[:, 0]
        others = joint.copy()
        np.put_along_axis(others, labels[:, None], -np.inf, 1)
        return Result(logsumexp(others, axis=1) - given, suggestions=joint.argmax(1), notes={"noise": np.round(noise, 4).tolist()})

    def _cross_fitted(self, job: Job, clean: Samples, noise: Array, r: int, shape: tuple[int, ...]) -> Array:
        """Log p(c | x), each fold predicted by a model trained on the others through the noise."""
        fold = np.random.default_rng([self.seed, r]).permutation(shape[0]) % self.folds
        log_p = np.empty(shape)
        for k in job.sweep.progress(range(self.folds), f"{self.name} round {r + 1}"):
            seen = _marked(job.samples.take(fold != k), clean)
            task = self._fit(job, f"round-{r}-{k}", self.recipe, 1000 * (r + 1) + k, seen, noise)
            log_p[fold == k] = _log_probabilities(task, job.samples.take(fold == k), job.sweep.batch_size)
        return log_p

    def _fit(self, job: Job, name: str, recipe: Recipe, offset: int, data: Samples, noise: Array | None) -> Task:
        seed = self.seed + offset
        start = job.task.reset(seed)
        if noise is not None:
            start = replace(start, loss=_NoiseCorrected(torch.from_numpy(np.log(np.maximum(noise, 1e-8)))))
        folder = None if job.sweep.directory is None else job.sweep.directory / job.name / name
        return fit(start, data, replace(recipe, seed=seed), directory=folder)


@dataclass(frozen=True, eq=False)
class _NoiseCorrected:
    """−log Σ_c p(c | x) T_cy where the label may be wrong, cross-entropy where it is known to be clean; batches are (x, y, is_clean)."""

    log_noise: Tensor

    def __call__(self, outputs: Tensor, batch: Batch) -> Tensor:
        _, y, is_clean = batch
        log_p = torch.log_softmax(outputs, 1)
        noisy = -(log_p + self.log_noise.to(log_p)[:, y].T).logsumexp(1)
        return torch.where(is_clean, F.nll_loss(log_p, y, reduction="none"), noisy)


class _Neighbours:
    """The vote of every sample's nearest neighbours among the other samples and the clean ones."""

    def __init__(self, samples: Samples, clean: Samples, k: int, texts: bool = False) -> None:
        everything = concatenate([Samples(part.batch(slice(None))[:1]) for part in (samples, clean)]).batch(slice(None))[0].cpu()
        rows = word_weights(everything.numpy()) if texts else everything.flatten(1).float().numpy()
        self.index = nearest(rows, len(samples), k)[1]
        self.clean = clean.labels.numpy()

    def __call__(self, posterior: Array) -> Array:
        """Log of the neighbours' mean posterior, ``(n, K)``; a tenth of a vote for every class keeps it finite."""
        votes = np.concatenate([posterior, np.eye(posterior.shape[1])[self.clean]])[self.index].sum(1) + 0.1
        return np.asarray(np.log(votes / votes.sum(1, keepdims=True)))


def estimate_noise(log_p: Array, labels: NDArray[np.int64], log_neighbours: Array | None = None, iterations: int = 30) -> tuple[Array, Array]:
    """The joint log p(c | x) T_cy of every sample and class, ``(n, K)``, and the noise matrix T, ``(K, K)`` with rows that sum to 1.

    T and the exponents of the pool p ∝ exp(a ``log_p`` + b ``log_neighbours``) maximise the likelihood of the given labels under
    P(y | x) = Σ_c p(c | x) T_cy; one count is added to each entry of T, so that no transition is impossible.
    """
    classes = log_p.shape[1]
    one_hot = np.eye(classes)[labels]

    def fitted(a: float, b: float) -> tuple[float, Array, Array]:
        log_q = log_softmax(a * log_p if log_neighbours is None else a * log_p + b * log_neighbours, axis=1)
        noise = np.full((classes, classes), 0.3 / (classes - 1))
        np.fill_diagonal(noise, 0.7)
        for _ in range(iterations):
            joint = np.exp(log_q) * noise[:, labels].T
            posterior = joint / joint.sum(1, keepdims=True)
            noise = posterior.T @ one_hot + 1
            noise /= noise.sum(1, keepdims=True)
        scores: Array = log_q + np.log(noise[:, labels].T)
        return float(logsumexp(scores, axis=1).sum()), scores, noise

    exponents = product(NETWORK, NEIGHBOURS if log_neighbours is not None else (0.0,))
    _, joint, noise = max((fitted(a, b) for a, b in exponents), key=lambda found: found[0])
    return joint, noise


def _marked(noisy: Samples, clean: Samples) -> Samples:
    """Both data sets as (x, y, is_clean)."""
    parts: Sequence[Samples] = [
        Samples((*part.batch(slice(None))[:2], torch.full((len(part),), mark))) for part, mark in ((noisy, False), (clean, True))
    ]
    return concatenate(parts)


def _log_probabilities(task: Task, samples: Samples, batch_size: int) -> Array:
    params = task.params()
    like = next(iter(params.values()))
    with torch.no_grad():
        parts = [torch.log_softmax(task.outputs(params, batch), 1).double().cpu() for batch in batches(samples, batch_size, like)]
    return torch.cat(parts).numpy()
