"""An estimator over several models: perturbed copies of one, checkpoints, or independently trained ones."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import mode, rankdata
from torch import Tensor, nn

from robust_if.checkpoints import Checkpoint
from robust_if.estimators.base import Estimator, Job, Result
from robust_if.estimators.inner_product import InnerProduct
from robust_if.task import Task

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Ensemble(Estimator):
    """IP Ensemble and its like: a base estimator's scores over the members of an ensemble, and their spread.

    Perturbed copies need no retraining; the first member is the model itself. A dropout member has one fixed mask, the same for all targets and every
    training sample: each layer after the first gets its input channels scaled by 0 or 1/(1 − r), with one rate r ~ U(0, ``rate``) per member. A
    Gaussian member has parameters θ + N(0, ``std``²).

    Args:
        base: any estimator.
        members: how many perturbed copies, the unperturbed one included (the published code adds 5 perturbed ones to it for linear models); or the
            states of the members themselves, such as checkpoints or independently trained models, which then count the same, whatever their weights.
        perturbation: ``"dropout"`` for networks, ``"gaussian"`` for linear models; ``"auto"`` chooses by whether there is a second layer to mask.
        rate: the largest dropout rate.
        std: of the Gaussian noise.
        seed: draws rates, masks and noise.
        aggregate: ``"mean"`` of the scores, as published; ``"rank"``, mean of the ranks scaled to [0, 1] with 1 the most harmful, for members whose
            scores differ in scale; ``"vote"``, the share of members in which the sample is among the ``top`` most harmful, for heavy tails. Samples
            with equal shares of votes are ordered by their mean rank, which adds less than a thousandth of a vote.
        top: share of the samples for which a member votes; samples that tie with the last of them get the vote too.

    Source: Yang et al. 2026 (arXiv 2405.17490), IP Ensemble: M = 5, rates from U(0, 0.01), noise 0.01. There the masks sit after residual blocks;
    here at the input of every layer, so that any model will do.
    """

    base: Estimator = InnerProduct()  # noqa: RUF009 - frozen
    members: int | tuple[Checkpoint, ...] = 5
    perturbation: Literal["auto", "dropout", "gaussian"] = "auto"
    rate: float = 0.01
    std: float = 0.01
    seed: int = 0
    aggregate: Literal["mean", "rank", "vote"] = field(default="mean", kw_only=True)
    top: float = field(default=0.1, kw_only=True)

    def __post_init__(self) -> None:
        if isinstance(self.members, list):
            object.__setattr__(self, "members", tuple(self.members))
        if not isinstance(self.members, int) and not (isinstance(self.members, tuple) and all(isinstance(each, Checkpoint) for each in self.members)):
            raise TypeError(f"members: expected a number, or checkpoints such as Checkpoint.of(model), got {self.members!r}")
        if self._size < 1:
            raise ValueError(f"members: expected at least 1, got {self._size}")
        if self.perturbation not in ("auto", "dropout", "gaussian"):
            raise ValueError(f"perturbation: expected 'auto', 'dropout' or 'gaussian', got {self.perturbation!r}")
        if not 0 <= self.rate < 1:
            raise ValueError(f"rate: expected a number in [0, 1), got {self.rate}")
        if not self.std >= 0:
            raise ValueError(f"std: expected at least 0, got {self.std}")
        if self.aggregate not in ("mean", "rank", "vote"):
            raise ValueError(f"aggregate: expected 'mean', 'rank' or 'vote', got {self.aggregate!r}")
        if not 0 < self.top < 1:
            raise ValueError(f"top: expected a share between 0 and 1, got {self.top}")

    @property
    def name(self) -> str:
        return f"{self.base.name}-ensemble" if self.aggregate == "mean" else f"{self.base.name}-ensemble-{self.aggregate}"

    @property
    def units(self) -> Any:  # type: ignore[override]
        return self.base.units if self.aggregate == "mean" else "rank"

    @property
    def needs_target(self) -> bool:  # type: ignore[override]
        return self.base.needs_target

    @property
    def _size(self) -> int:
        return self.members if isinstance(self.members, int) else len(self.members)

    def check(self, task: Task) -> None:
        self.base.check(task)

    def estimate(self, job: Job) -> Result:
        return self.estimates(job)[0]

    def estimates(self, job: Job) -> list[Result]:
        if job.index is not None and self.members != 1:
            raise ValueError("index: it holds the gradients of one model, which cannot serve the members of an ensemble; score without it")
        if job.checkpoint is not None and not isinstance(self.members, int):
            raise ValueError("checkpoints: the members of this ensemble are states of their own; pass checkpoints to perturb each of them only")
        found = [self.base.estimates(member) for member in self._jobs(job)]
        return [self._combined(list(results)) for results in zip(*found, strict=True)]

    def _jobs(self, job: Job) -> Iterator[Job]:
        """The job at every member, one copy of the model at a time."""
        if not isinstance(self.members, int):
            for m, state in enumerate(self.members):
                yield replace(job, task=job.task.at(state.state), checkpoint=state, name=f"{job.name}-{m}")
            return
        generator = torch.Generator().manual_seed(self.seed)
        by_noise = self.perturbation == "gaussian" or (self.perturbation == "auto" and len(_layers(job.task.model)) < 2)
        if self.members > 1 and not by_noise and (hidden := _unreachable(job.task.model)):
            logger.warning("%s: the masks do not reach %s, whose weights their attention uses by itself", self.name, ", ".join(hidden))
        for m in range(self.members):
            task = job.task if m == 0 else self._noisy(job.task, generator) if by_noise else self._thinned(job.task, generator)
            yield replace(job, task=task, name=f"{job.name}-{m}")

    def _noisy(self, task: Task, generator: torch.Generator) -> Task:
        noise = {name: value + self.std * torch.randn(value.shape, generator=generator).to(value) for name, value in task.params().items()}
        return task.at(noise)

    def _thinned(self, task: Task, generator: torch.Generator) -> Task:
        rate = self.rate * float(torch.rand((), generator=generator))
        return masked(task, rate, generator)

    def _combined(self, results: list[Result]) -> Result:
        """One result from those of the members."""
        members = np.stack([result.values for result in results])
        if self.aggregate != "mean":
            ranks = scaled_ranks(members)
            members = ranks if self.aggregate == "rank" else _votes(members, self.top) + ranks / (1001 * len(ranks))
        labels = [result.suggestions for result in results if result.suggestions is not None]
        notes = {key: _common([result.notes.get(key) for result in results]) for key in results[0].notes}
        return Result(
            members.mean(0), members=members, suggestions=mode(np.stack(labels)).mode if labels else None, notes={**notes, "members": len(members)}
        )


def scaled_ranks(members: NDArray[np.float64]) -> NDArray[np.float64]:
    """Ranks ``(k, n)`` in [0, 1], 1 for the largest; equal values share the mean of their ranks."""
    n = members.shape[1]
    ranks: NDArray[np.float64] = (rankdata(members, axis=1) - 1) / (n - 1) if n > 1 else np.full_like(members, 0.5)
    return ranks


def _votes(members: NDArray[np.float64], top: float) -> NDArray[np.float64]:
    """1 where a value is among the ``top`` share of its row, else 0; ``(k, n)``."""
    n = members.shape[1]
    count = max(1, round(top * n))
    return (members >= np.sort(members, axis=1)[:, [n - count]]).astype(np.float64)


def _common(values: list[Any]) -> Any:
    """What all members note, or the list of what each does."""
    return values[0] if all(value == values[0] for value in values) else values


def masked(task: Task, rate: float, generator: torch.Generator) -> Task:
    """The task with a copy of the model in which each layer after the first has a fixed share ``rate`` of its input channels set to zero.

    Raises:
        ValueError: if the model has no second linear or convolutional layer.
    """
    model = copy.deepcopy(task.model)
    layers = _layers(model)[1:]
    if not layers:
        raise ValueError("perturbation: dropout needs a model with at least two linear or convolutional layers; use 'gaussian'")
    for layer in layers:
        channels = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
        kept = (torch.rand(channels, generator=generator) >= rate).float() / (1 - rate)
        axis = -1 if isinstance(layer, nn.Linear) else 1 - layer.weight.ndim
        layer.register_forward_pre_hook(_Mask(kept, axis))
    return replace(task, model=model)


@dataclass(frozen=True)
class _Mask:
    """Scales the channels of a layer's input."""

    kept: Tensor
    axis: int

    def __call__(self, _: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = args[0]
        shape = [1] * x.ndim
        shape[self.axis] = len(self.kept)
        return (x * self.kept.to(x).view(shape), *args[1:])


def _layers(model: nn.Module) -> list[Any]:
    """The layers that can be masked, in the order of the model's modules."""
    hidden = _unreachable(model)
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return [module for name, module in model.named_modules() if isinstance(module, kinds) and name not in hidden]


def _unreachable(model: nn.Module) -> list[str]:
    """Names of the layers that torch's attention never calls: it reads their weights, so that no mask at their input has an effect."""
    return [f"{name}.out_proj".lstrip(".") for name, module in model.named_modules() if isinstance(module, nn.MultiheadAttention)]
