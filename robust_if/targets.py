"""What the user cares about, as a differentiable scalar of the parameters; lower is better.

A target owns its held-out data. A fairness gap is a function of averages, and the mean of a function over mini-batches is not the function
of the means; so a :class:`Functional` is T(θ) = reduce(mean over samples of moments(θ)), and its gradient takes two streamed passes: the
means, then one backward pass with the weights ∇reduce. This is exact for any batch size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from robust_if.data import Samples, as_samples, batches
from robust_if.gradients import gradient
from robust_if.task import Batch, Params, Task


class Target(ABC):
    """A differentiable scalar functional of the parameters, lower is better. Targets add, and scale by a number."""

    @property
    @abstractmethod
    def name(self) -> str:
        """Short name for tables, such as ``"utility"``."""

    @property
    @abstractmethod
    def held_out(self) -> tuple[Samples, ...]:
        """The held-out data that the target looks at."""

    @abstractmethod
    def value(self, task: Task, params: Params) -> Tensor:
        """T at ``params``, a scalar; differentiable in ``params``, with all of the held-out data in one graph."""

    @abstractmethod
    def gradient(self, task: Task, params: Params) -> Params:
        """∇T at ``params``, with the shapes of ``params``."""

    @abstractmethod
    def minibatch(self, size: int, generator: torch.Generator) -> Target:
        """The same target on at most ``size`` held-out samples drawn at random, for stochastic tuning."""

    def check(self, train: Samples) -> None:
        """Raise a ``ValueError`` if the target cannot be asked of a model trained on ``train``; called before any work."""
        return

    def __add__(self, other: Target) -> Target:
        return Combination((1.0, 1.0), (self, other))

    def __mul__(self, factor: float) -> Target:
        return Combination((float(factor),), (self,))

    __rmul__ = __mul__


@dataclass(frozen=True, eq=False)
class Functional(Target):
    """T(θ) = reduce(mean of the per-sample moments over ``data``). Subclasses give ``moments``, and ``reduce`` unless T is a plain mean.

    Args:
        data: held-out samples, anything that :func:`robust_if.as_samples` takes.
        batch_size: how many samples are evaluated at a time; it never changes the value.

    Raises:
        ValueError: if ``data`` is empty.
    """

    data: Samples = field(repr=False)
    batch_size: int = field(default=256, repr=False, kw_only=True)

    #: Whether T is the mean of its single moment; then the first of the two passes is not needed for the gradient.
    is_mean = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "data", as_samples(self.data))

    @abstractmethod
    def moments(self, task: Task, params: Params, batch: Batch) -> Tensor:
        """Per-sample moments, shape ``(B, m)``, differentiable in ``params``."""

    @abstractmethod
    def reduce(self, means: Tensor) -> Tensor:
        """The target as a function of the ``(m,)`` means of the moments, a scalar."""

    @property
    def held_out(self) -> tuple[Samples, ...]:
        return (self.data,)

    def value(self, task: Task, params: Params) -> Tensor:
        return self.reduce(self._means(task, params))

    def gradient(self, task: Task, params: Params) -> Params:
        if self.is_mean:
            slopes = torch.ones(1).to(_any(params))
        else:
            with torch.no_grad():
                means = self._means(task, params)
            means.requires_grad_()
            with torch.enable_grad():
                (slopes,) = torch.autograd.grad(self.reduce(means), means)
        total: Params = {}
        for batch in batches(self.data, self.batch_size, _any(params)):

            def weighted(p: Params, batch: Batch = batch) -> Tensor:
                return (self.moments(task, p, batch) @ slopes).sum() / len(self.data)

            part = gradient(weighted, params)
            total = {name: total[name] + part[name] for name in part} if total else part
        return total

    def _means(self, task: Task, params: Params) -> Tensor:
        sums = [self.moments(task, params, batch).sum(0) for batch in batches(self.data, self.batch_size, _any(params))]
        return torch.stack(sums).sum(0) / len(self.data)

    def minibatch(self, size: int, generator: torch.Generator) -> Functional:
        if size >= len(self.data):
            return self
        return replace(self, data=self.data.take(torch.randperm(len(self.data), generator=generator)[:size].numpy()))


@dataclass(frozen=True, eq=False)
class Utility(Functional):
    """Mean loss on held-out samples, in the unit of the task's loss.

    Args:
        data: clean held-out samples, usually ``(x, y)``.
    """

    is_mean = True

    @property
    def name(self) -> str:
        return "utility"

    def moments(self, task: Task, params: Params, batch: Batch) -> Tensor:
        return task.losses(params, batch)[:, None]

    def reduce(self, means: Tensor) -> Tensor:
        return means[0]


@dataclass(frozen=True, eq=False)
class Combination(Target):
    """Σ factor · target, made by ``+`` and ``*``."""

    factors: tuple[float, ...]
    targets: tuple[Target, ...]

    @property
    def name(self) -> str:
        terms = zip(self.factors, self.targets, strict=True)
        return "+".join(target.name if factor == 1 else f"{factor:g}*{target.name}" for factor, target in terms)

    @property
    def held_out(self) -> tuple[Samples, ...]:
        return tuple(samples for target in self.targets for samples in target.held_out)

    def value(self, task: Task, params: Params) -> Tensor:
        values = [factor * target.value(task, params) for factor, target in zip(self.factors, self.targets, strict=True)]
        return torch.stack(values).sum()

    def gradient(self, task: Task, params: Params) -> Params:
        parts = [target.gradient(task, params) for target in self.targets]
        return {name: torch.stack([f * part[name] for f, part in zip(self.factors, parts, strict=True)]).sum(0) for name in params}

    def check(self, train: Samples) -> None:
        for target in self.targets:
            target.check(train)

    def minibatch(self, size: int, generator: torch.Generator) -> Target:
        return replace(self, targets=tuple(target.minibatch(size, generator) for target in self.targets))


def _any(params: Params) -> Tensor:
    return next(iter(params.values()))
