"""The mean of an estimator over slightly perturbed copies of one trained model."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from robust_if.estimators.base import Estimator, Job, Result
from robust_if.estimators.inner_product import InnerProduct
from robust_if.task import Task


@dataclass(frozen=True)
class Ensemble(Estimator):
    """IP Ensemble and its like: mean of a base estimator's scores over members, the first of which is the model itself. No retraining.

    A dropout member has one fixed mask, the same for the target and every training sample: each layer after the first gets its input channels
    scaled by 0 or 1/(1 − r), with one rate r ~ U(0, ``rate``) per member. A Gaussian member has parameters θ + N(0, ``std``²).

    Args:
        base: any estimator.
        members: how many, the unperturbed one included (the published code adds 5 perturbed ones to it for linear models).
        perturbation: ``"dropout"`` for networks, ``"gaussian"`` for linear models; ``"auto"`` chooses by whether there is a second layer to mask.
        rate: the largest dropout rate.
        std: of the Gaussian noise.
        seed: draws rates, masks and noise.

    Source: Yang et al. 2026 (arXiv 2405.17490), IP Ensemble: M = 5, rates from U(0, 0.01), noise 0.01. There the masks sit after residual blocks;
    here at the input of every layer, so that any model will do.
    """

    base: Estimator = InnerProduct()  # noqa: RUF009 - frozen
    members: int = 5
    perturbation: Literal["auto", "dropout", "gaussian"] = "auto"
    rate: float = 0.01
    std: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        if self.members < 1:
            raise ValueError(f"members: expected at least 1, got {self.members}")
        if self.perturbation not in ("auto", "dropout", "gaussian"):
            raise ValueError(f"perturbation: expected 'auto', 'dropout' or 'gaussian', got {self.perturbation!r}")
        if not 0 <= self.rate < 1:
            raise ValueError(f"rate: expected a number in [0, 1), got {self.rate}")

    @property
    def name(self) -> str:
        return f"{self.base.name}-ensemble"

    @property
    def units(self) -> Any:  # type: ignore[override]
        return self.base.units

    @property
    def needs_target(self) -> bool:  # type: ignore[override]
        return self.base.needs_target

    def estimate(self, job: Job) -> Result:
        generator = torch.Generator().manual_seed(self.seed)
        members = []
        for m in range(self.members):
            task = job.task if m == 0 else self._perturbed(job.task, generator)
            members.append(self.base.estimate(replace(job, task=task, name=f"{job.name}-{m}")).values)
        stacked = np.stack(members)
        return Result(stacked.mean(0), members=stacked, notes={"members": self.members})

    def _perturbed(self, task: Task, generator: torch.Generator) -> Task:
        if self.perturbation == "gaussian" or (self.perturbation == "auto" and len(_layers(task.model)) < 2):
            noise = {name: value + self.std * torch.randn(value.shape, generator=generator).to(value) for name, value in task.params().items()}
            return task.at(noise)
        rate = self.rate * float(torch.rand((), generator=generator))
        return masked(task, rate, generator)


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
    return [module for module in model.modules() if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d))]
