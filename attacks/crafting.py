"""One projected descent over inputs, for every attack that optimises what it plants: an objective, a rule for the next point, a box to stay in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor, nn

from robust_if.attacks.evasion import Bounds, Limit, box

#: Inputs ``(n, …)`` to a value, a scalar or one per input ``(n,)``, and its gradient in the inputs, with their shape.
Objective = Callable[[Tensor], tuple[Tensor, Tensor]]

#: The point, the value there, the gradient there, and whether that value is the least so far, to the next point.
Rule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Region:
    """The inputs allowed around ``base``: from ``low`` to ``high``, all of shape ``(n, …)``."""

    base: Tensor
    low: Tensor
    high: Tensor

    @classmethod
    def around(cls, x: Tensor, eps: Limit, bounds: Bounds | None, name: str = "inputs") -> Region:
        """Within ``eps`` of ``x`` in every feature and within ``bounds``; arguments and errors are those of :func:`robust_if.attacks.evasion.box`."""
        return cls(x, *box(x, eps, bounds, name))

    def random(self, generator: torch.Generator) -> Tensor:
        """Inputs drawn uniformly from those allowed."""
        share = torch.rand(self.base.shape, generator=generator, dtype=self.base.dtype).to(self.base)
        return self.project(self.low + (self.high - self.low) * share)

    def project(self, x: Tensor) -> Tensor:
        """The nearest inputs allowed."""
        return x.clamp(self.low, self.high)


def descend(objective: Objective, start: Tensor, rule: Rule, steps: int) -> tuple[Tensor, Tensor]:
    """The point of least value that is met, and the value there; input by input where the objective gives one value for each.

    Raises:
        ValueError: if no value that is met is finite.
    """
    x = best = start
    least = torch.tensor(inf)
    for step in range(steps + 1):
        value, slope = objective(x)
        least = least.to(value)
        better = value < least
        least, best = torch.where(better, value, least), torch.where(_over(better, x), x, best)
        if step < steps:
            x = rule(x, value, slope, better)
    if not least.isfinite().all():
        raise ValueError("task: the objective is not finite anywhere on the way; the crafting model's loss or features overflow on such inputs")
    return best, least


def of_sum(statistic: Callable[[Tensor], Tensor], reduce: Callable[[Tensor], Tensor], batch_size: int, generator: torch.Generator) -> Objective:
    """The objective reduce(Σ statistic(batch)) over all batches, in two passes: the sum, then one backward pass with the weights ∇reduce.

    Exact for any batch size, with the graph of one batch at a time.

    Args:
        statistic: inputs to a vector, summed over them.
        generator: what the statistic draws from; both passes see the same draws.
    """

    def objective(x: Tensor) -> tuple[Tensor, Tensor]:
        state = generator.get_state()
        parts = torch.split(x, batch_size)
        with torch.no_grad():
            total = torch.stack([statistic(part) for part in parts]).sum(0).requires_grad_()
        generator.set_state(state)
        with torch.enable_grad():
            value = reduce(total)
            (weights,) = torch.autograd.grad(value, total)
            leaves = [part.clone().requires_grad_() for part in parts]
            slopes = [torch.autograd.grad(statistic(leaf) @ weights, leaf)[0] for leaf in leaves]
        return value.detach(), torch.cat(slopes)

    return objective


def adam(region: Region, eps: Limit, steps: int, lr: float, *, signed: bool) -> Rule:
    """Adam in units of ``eps``, its rate times 0.1 after 3/8, 5/8 and 7/8 of the steps.

    Args:
        lr: the rate at the start, as a share of ``eps``.
        signed: whether Adam gets the sign of the gradient.
    """
    radius = torch.as_tensor(eps, dtype=torch.float64).to(region.base)
    unit = radius.where(radius > 0, 1.0)
    change = nn.Parameter(torch.zeros_like(region.base))
    optimizer = torch.optim.Adam([change], lr=lr)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [int(steps * share) for share in (3 / 8, 5 / 8, 7 / 8)], gamma=0.1)

    def rule(x: Tensor, _: Tensor, slope: Tensor, __: Tensor) -> Tensor:
        change.data, change.grad = (x - region.base) / unit, slope.sign() if signed else slope * unit
        optimizer.step()
        schedule.step()
        return region.project(region.base + unit * change.detach())

    return rule


def forward_backward(region: Region, weight: float) -> Rule:
    """For f(x) + ``weight`` ‖x − base‖²: a gradient step on f, then the proximal map of the rest, both from the best point so far.

    Every input has its own step length: at first f / ‖∇f‖² (Polyak's), halved where the value did not fall, a fifth longer where it did.
    """
    point, gradient = region.base, torch.zeros_like(region.base)
    length: Tensor | None = None

    def rule(x: Tensor, value: Tensor, slope: Tensor, better: Tensor) -> Tensor:
        nonlocal point, gradient, length
        if length is None:
            norm = slope.flatten(1).square().sum(1)
            length = torch.where(norm > 0, value / norm, 1.0)
        else:
            length = torch.where(better, 1.2 * length, length / 2)
        point, gradient = torch.where(_over(better, x), x, point), torch.where(_over(better, x), slope, gradient)
        each = _over(length, x)
        return region.project((point - each * gradient + 2 * each * weight * region.base) / (1 + 2 * each * weight))

    return rule


def _over(values: Tensor, x: Tensor) -> Tensor:
    """One value, or one per sample, so that it broadcasts to inputs."""
    return values.view(-1, *[1] * (x.ndim - 1))
