"""The closed-form attack on linear models: along the model's own direction, across its nearest boundary."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from robust_if.attacks.evasion import Attack, Threat
from robust_if.attacks.evasion.ball import check_input
from robust_if.data import to
from robust_if.predictions import class_logits
from robust_if.task import Batch, Params, Task


@dataclass(frozen=True)
class LinearAttack(Attack):
    """Inputs moved to the nearest decision boundary and beyond: x − γ f(x) / ‖w‖² · w.

    For two classes f is the difference of the logits and w its gradient in the input. For more, f is the logit of the predicted class minus that of
    the class whose boundary is nearest. Exact for models with linear logits; for others one linearised step, the first of DeepFool. Labels are not
    looked at, and there is no budget: an input moves as far as its boundary is, ‖δ‖₂ = γ |f| / ‖w‖, one on the boundary not at all.

    What it cannot show: with γ > 1 every input of a linear model of two classes changes sides, those that were wrong become right, and so the
    accuracy under attack is one minus the clean accuracy for every such model. Points stored for one model and shown to a retrained one measure how
    well they transfer, not robustness. For that take a threat with a budget.

    Args:
        threat: which features may move, ``Threat(math.inf, mutable=…)``; all by default. It holds no radius, no bounds and no projection.
        overshoot: γ; above 1 the boundary is crossed, at 1 reached.

    Raises:
        ValueError: if the threat limits how far inputs move, or ``overshoot`` is not a positive number.

    Source: the attack of Chhabra et al. 2024 ("What data benefits my classifier?") and of arXiv 2405.17490, with γ = 1.3; Moosavi-Dezfooli et al.
    2016 (DeepFool, arXiv 1511.04599), sections 2 (two classes) and 3 (more).
    """

    threat: Threat = Threat(math.inf, norm="l2")  # noqa: RUF009 - frozen
    overshoot: float = field(default=1.3, kw_only=True)

    def __post_init__(self) -> None:
        if not 0 < self.overshoot < math.inf:
            raise ValueError(f"overshoot: expected a positive number, got {self.overshoot}")
        if not torch.as_tensor(self.threat.eps).isposinf().all() or self.threat.bounds is not None or self.threat.project:
            raise ValueError(
                f"threat: the linear attack has no budget, bounds or projections; expected Threat(math.inf, mutable=…), got {self.threat}"
            )

    @property
    def name(self) -> str:
        return "linear"

    def __call__(self, task: Task, params: Params, batch: Batch) -> Tensor:
        check_input(batch)
        params = {name: value.detach() for name, value in params.items()}
        batch = to(batch, next(iter(params.values())))
        clean: Tensor = batch[0].detach()
        self.threat.check(clean)
        moves = torch.ones_like(clean[0]) if self.threat.mutable is None else self.threat.mutable.to(clean).expand(clean.shape[1:])
        nearest, change = clean.new_full((len(clean),), math.inf), torch.zeros_like(clean)
        with torch.enable_grad():
            leaf = clean.clone().requires_grad_()
            logits = class_logits(task.outputs(params, (leaf, *batch[1:])))
            if logits.isnan().any():
                raise ValueError(f"model: its outputs are NaN at sample {int(logits.isnan().any(1).nonzero()[0])} of the batch")
            ranked = logits.sort(1, descending=True).values
            for rival in range(1, ranked.shape[1]):
                gap = ranked[:, rival] - ranked[:, 0]
                slope = (_gradient(gap.sum(), leaf) * moves).flatten(1)
                steepness = slope.norm(dim=1)
                distance = torch.where(steepness > 0, gap.detach().abs() / steepness, math.inf)
                closer = distance < nearest
                step = self.overshoot * distance[:, None] * slope / steepness[:, None]
                change = torch.where(closer.view(-1, *[1] * (clean.ndim - 1)), step.view_as(clean), change)
                nearest = torch.where(closer, distance, nearest)
        return clean + change


def _gradient(value: Tensor, leaf: Tensor) -> Tensor:
    slope: Tensor | None
    (slope,) = torch.autograd.grad(value, leaf, retain_graph=True, allow_unused=True) if value.requires_grad else (None,)
    if slope is None:
        raise ValueError("model: its outputs do not depend on the inputs in a differentiable way, so an attack has no direction")
    return slope
