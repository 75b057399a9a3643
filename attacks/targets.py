"""The loss under attack as a target."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from robust_if.targets import Functional
from robust_if.task import Batch, Params, Task


@dataclass(frozen=True, eq=False)
class AdversarialLoss(Functional):
    """Mean loss on held-out samples that are attacked at the parameters at hand, in the unit of the task's loss.

    T(θ) = (1/n) Σ max over ‖δ‖∞ ≤ ``eps`` of ℓ(x_i + δ, y_i; θ), the maximum being that of projected gradient ascent: steps along the sign of the
    gradient from the clean input, and for every sample the point of largest loss that was met, so T is never below the clean loss. No random start,
    so T repeats, and no batch size changes it beyond rounding. The gradient in θ takes the attacked points as fixed (Danskin's theorem).

    Args:
        data: held-out samples whose first tensor is the input, floating point and of any shape, usually ``(x, y)``.
        eps: radius of the attack, in the unit of the inputs as the model gets them.
        steps: of the ascent; one costs a forward and a backward pass.
        alpha: length of a step, in the unit of the inputs; 2.5 ``eps`` / ``steps`` by default.
        bounds: smallest and largest valid input, in which the attack stays; none by default.

    Raises:
        ValueError: if a number is out of range, the input is not floating point, or inputs lie outside ``bounds``.

    Source: Madry et al. 2018 (arXiv 1706.06083), equation 2.1, the attack and the length of a step; Danskin's theorem in their appendix A.
    """

    eps: float = field(kw_only=True)
    steps: int = field(default=10, kw_only=True)
    alpha: float | None = field(default=None, kw_only=True)
    bounds: tuple[float, float] | None = field(default=None, kw_only=True)

    is_mean = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in (("eps", self.eps), ("alpha", self.alpha)):
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"{name}: expected a positive number, in the unit of the inputs, got {value}")
        if self.steps < 1:
            raise ValueError(f"steps: expected at least 1, got {self.steps}")
        if self.bounds is not None and not self.bounds[0] < self.bounds[1]:
            raise ValueError(f"bounds: expected (low, high) with low < high, got {self.bounds}")
        # a map-style data set is not read whole for this; its other samples are checked as they come
        self._input(self.data.batch(slice(None) if isinstance(self.data.tensors, tuple) else slice(0, 1)))

    @property
    def name(self) -> str:
        return "adversarial"

    def moments(self, task: Task, params: Params, batch: Batch) -> Tensor:
        return task.losses(params, (self.attack(task, params, batch), *batch[1:]))[:, None]

    def reduce(self, means: Tensor) -> Tensor:
        return means[0]

    def attack(self, task: Task, params: Params, batch: Batch) -> Tensor:
        """The attacked inputs of a batch, with its inputs' shape, detached."""
        clean = self._input(batch)
        fixed = {name: value.detach() for name, value in params.items()}
        low, high = clean - self.eps, clean + self.eps
        if self.bounds is not None:  # a clean input just outside, by rounding, may stay where it is
            low, high = low.clamp(min=self.bounds[0]).minimum(clean), high.clamp(max=self.bounds[1]).maximum(clean)
        alpha = 2.5 * self.eps / self.steps if self.alpha is None else self.alpha
        point = worst = clean
        largest = None
        for _ in range(self.steps):
            losses, slope = _ascent(task, fixed, point, batch)
            worst, largest = _worse(point, losses, worst, largest)
            point = (point + alpha * slope.sign()).clamp(low, high)
        with torch.no_grad():
            return _worse(point, task.losses(fixed, (point, *batch[1:])), worst, largest)[0]

    def _input(self, batch: Batch) -> Tensor:
        if not isinstance(batch, (tuple, list)) or not isinstance(batch[0], Tensor):
            raise ValueError(f"data: an attack expects batches (input, …) with the input as first tensor, got {type(batch).__name__}")
        x = batch[0].detach()
        if not x.is_floating_point():
            raise ValueError(f"data: an attack within eps expects inputs of floating point, got {x.dtype}; tokens have no such neighbourhood")
        if self.bounds is not None:
            slack = 1e-5 * (self.bounds[1] - self.bounds[0])
            if x.min() < self.bounds[0] - slack or x.max() > self.bounds[1] + slack:
                raise ValueError(f"bounds: expected inputs within {self.bounds}, got some from {float(x.min()):g} to {float(x.max()):g}")
        return x


def _ascent(task: Task, params: Params, x: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Every sample's loss at the inputs ``x``, ``(B,)``, and its gradient in the input, with the shape of ``x``."""
    with torch.enable_grad():
        leaf = x.clone().requires_grad_()
        losses = task.losses(params, (leaf, *batch[1:]))
        (slope,) = torch.autograd.grad(losses.sum(), leaf)
    return losses.detach(), slope


def _worse(point: Tensor, losses: Tensor, worst: Tensor, largest: Tensor | None) -> tuple[Tensor, Tensor]:
    """For every sample the point of larger loss, and that loss."""
    if largest is None:
        return point, losses
    larger = losses > largest
    return torch.where(larger.view(-1, *[1] * (point.ndim - 1)), point, worst), torch.where(larger, losses, largest)
