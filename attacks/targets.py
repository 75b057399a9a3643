"""The loss under attack as a target."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from robust_if.attacks.evasion import Bounds, Limit, box, pgd, step_length
from robust_if.targets import Functional
from robust_if.task import Batch, Params, Task


@dataclass(frozen=True, eq=False)
class AdversarialLoss(Functional):
    """Mean loss on held-out samples that are attacked at the parameters at hand, in the unit of the task's loss.

    T(θ) = (1/n) Σ max over |δ| ≤ ``eps`` of ℓ(x_i + δ, y_i; θ), the maximum being that of :func:`robust_if.attacks.evasion.pgd` in L∞ from the clean
    input: for every sample the point of largest loss that was met, so T is never below the clean loss. No random start, so T repeats, and no batch
    size changes it beyond rounding. The gradient in θ takes the attacked points as fixed (Danskin's theorem).

    Args:
        data: held-out samples whose first tensor is the input, floating point and of any shape, usually ``(x, y)``.
        eps: radius of the attack, in the unit of the inputs as the model gets them: a number, or a tensor that broadcasts to one sample, 0 where a
            feature does not move.
        steps: of the ascent; one costs a forward and a backward pass.
        alpha: length of a step, given like ``eps``; 2.5 ``eps`` / ``steps`` by default.
        bounds: smallest and largest valid input, given like ``eps``, in which the attack stays; none by default.
        mutable: boolean tensor that broadcasts to one sample, false where a feature does not move; all do by default.

    Raises:
        ValueError: if a number is out of range, a shape does not fit, no feature may move, the input is not floating point, or inputs lie outside
            ``bounds``.

    Source: Madry et al. 2018 (arXiv 1706.06083), equation 2.1, the attack and the length of a step; Danskin's theorem in their appendix A.
    """

    eps: Limit = field(kw_only=True)
    steps: int = field(default=10, kw_only=True)
    alpha: Limit | None = field(default=None, kw_only=True)
    bounds: Bounds | None = field(default=None, kw_only=True)
    mutable: Tensor | None = field(default=None, kw_only=True)

    is_mean = True

    def __post_init__(self) -> None:
        super().__post_init__()
        radius = torch.as_tensor(self.eps)
        if not ((radius >= 0) & radius.isfinite()).all() or not radius.any():
            raise ValueError(f"eps: expected a positive number, in the unit of the inputs, got {self.eps}")
        if self.mutable is not None and not self.mutable.any():
            raise ValueError("mutable: expected at least one feature that may move, got none")
        step_length(self.alpha, self.eps, self.steps)
        # a map-style data set is not read whole for this; its other samples are checked as they come
        batch = self.data.batch(slice(None) if isinstance(self.data.tensors, tuple) else slice(0, 1))
        if not isinstance(batch, (tuple, list)) or not isinstance(batch[0], Tensor):
            raise ValueError(f"data: an attack expects batches (input, …) with the input as first tensor, got {type(batch).__name__}")
        box(batch[0], self.eps, self.bounds, "data", mutable=self.mutable)

    @property
    def name(self) -> str:
        return "adversarial"

    def moments(self, task: Task, params: Params, batch: Batch) -> Tensor:
        return task.losses(params, (self.attack(task, params, batch), *batch[1:]))[:, None]

    def reduce(self, means: Tensor) -> Tensor:
        return means[0]

    def attack(self, task: Task, params: Params, batch: Batch) -> Tensor:
        """The attacked inputs of a batch, with its inputs' shape, detached."""
        return pgd(task, params, batch, eps=self.eps, steps=self.steps, alpha=self.alpha, bounds=self.bounds, mutable=self.mutable)
