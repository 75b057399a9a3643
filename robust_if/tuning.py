"""Moving a copy of the parameters to a (flat) minimum of a target.

Flat minima make influence scores reliable: lower risk and lower sharpness of the target both tighten the bound on the share of wrong signs
(Ye et al. 2025, "Towards Robust Influence Functions with Flat Validation Minima", Theorem 3.2).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from robust_if.sweep import Progress, silent
from robust_if.targets import Target
from robust_if.task import Params, Task


class Flatness(Protocol):
    """Where the gradient of a step is taken, so that flat minima are preferred."""

    def start(self) -> Slope:
        """The rule for one tuning run, with its memory."""
        ...


class Slope(Protocol):
    """The gradient that one step follows."""

    def __call__(self, task: Task, params: Params, target: Target, generator: torch.Generator) -> Params: ...


@dataclass(frozen=True)
class LowPass:
    """LPF-SGD with one draw per step (Bisla et al. 2022, arXiv 2201.08025): the gradient at θ + ε.

    For a tensor with two or more axes each output row r has noise N(0, (std · ‖w_r‖)²); a vector p has noise N(0, (std · ‖p‖)²).

    Args:
        std: noise relative to the row's norm; 0.002 is the published value for ResNets on CIFAR.
    """

    std: float = 0.002

    def start(self) -> Slope:
        def slope(task: Task, params: Params, target: Target, generator: torch.Generator) -> Params:
            return target.gradient(task, {name: value + self._noise(value, generator) for name, value in params.items()})

        return slope

    def _noise(self, value: Tensor, generator: torch.Generator) -> Tensor:
        norms = value.flatten(1).norm(dim=1).view(-1, *[1] * (value.ndim - 1)) if value.ndim > 1 else value.norm()
        noise: Tensor = self.std * norms * torch.randn(value.shape, generator=generator).to(value)
        return noise


@dataclass(frozen=True)
class SAM:
    """Sharpness-aware minimisation (Foret et al. 2021, arXiv 2010.01412): the gradient at θ + ρ g/‖g‖."""

    rho: float = 0.05

    def start(self) -> Slope:
        def slope(task: Task, params: Params, target: Target, generator: torch.Generator) -> Params:
            return target.gradient(task, _uphill(params, target.gradient(task, params), self.rho))

        return slope


@dataclass(frozen=True)
class FriendlySAM:
    """Friendly SAM (Li et al. 2024, arXiv 2403.12350): climbs along the batch's own part of the gradient, g − σ m, m an average of past gradients."""

    rho: float = 0.1
    sigma: float = 1.0
    decay: float = 0.95

    def start(self) -> Slope:
        mean: Params = {}

        def slope(task: Task, params: Params, target: Target, generator: torch.Generator) -> Params:
            grad = target.gradient(task, params)
            uphill = {name: grad[name] - self.sigma * mean[name] for name in grad} if mean else grad
            mean.update({name: self.decay * mean.get(name, torch.zeros_like(g)) + (1 - self.decay) * g for name, g in grad.items()})
            return target.gradient(task, _uphill(params, uphill, self.rho))

        return slope


@dataclass(frozen=True)
class Plain:
    """Empirical risk minimisation: the gradient at θ."""

    def start(self) -> Slope:
        def slope(task: Task, params: Params, target: Target, generator: torch.Generator) -> Params:
            return target.gradient(task, params)

        return slope


@dataclass(frozen=True)
class Tuning:
    """SGD on a target from the trained parameters.

    The defaults are those of the authors' later work with the same estimator (steps, learning rate, batch size; papers by Wu et al., arXiv 2512.12932
    and 2606.25488), with LPF-SGD as the flat optimiser of the ICML 2025 paper.

    Args:
        steps: number of SGD steps.
        lr: learning rate, constant.
        batch_size: held-out samples per step.
        momentum: of SGD.
        weight_decay: adds ``weight_decay`` · θ to the gradient, an L2 penalty of half of it.
        flatness: :class:`LowPass`, :class:`SAM`, :class:`FriendlySAM`, or :class:`Plain` for empirical risk minimisation.
        seed: draws batches and noise.
    """

    steps: int = 1000
    lr: float = 0.01
    batch_size: int = 128
    momentum: float = 0.9
    weight_decay: float = 0.0
    flatness: LowPass | SAM | FriendlySAM | Plain = LowPass()
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise ValueError(f"steps: expected at least 0, got {self.steps}")
        if not self.lr > 0:
            raise ValueError(f"lr: expected a positive number, got {self.lr}")

    def run(self, task: Task, target: Target, progress: Progress = silent) -> Params:
        """Parameters near a (flat) minimum of the target, found from the task's present ones, which stay as they are.

        Buffers (batch statistics) stay fixed too. Target and gradient are evaluated in evaluation mode.

        Raises:
            ValueError: if the parameters stop being finite.
        """
        generator = torch.Generator().manual_seed(self.seed)
        params = {name: value.clone() for name, value in task.params().items()}
        optimizer = torch.optim.SGD(list(params.values()), lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay)
        slope = self.flatness.start()
        for _ in progress(range(self.steps), "tune"):
            grads = slope(task, params, target.minibatch(self.batch_size, generator), generator)
            for name, value in params.items():
                value.grad = grads[name]
            optimizer.step()
        for name, value in params.items():
            value.grad = None
            if not torch.isfinite(value).all():
                raise ValueError(
                    f"tuning on {target.name} diverged: {name} is not finite after {self.steps} steps; lower the learning rate ({self.lr})"
                )
        return params


def _uphill(params: Params, direction: Params, rho: float) -> Params:
    norm = torch.stack([value.norm() for value in direction.values()]).norm() + 1e-12
    return {name: value + rho / norm * direction[name] for name, value in params.items()}
