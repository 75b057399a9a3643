"""FAB: the nearest input that the model gets wrong."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from robust_if.attacks.evasion.ascent import step_length
from robust_if.attacks.evasion.attack import Attack
from robust_if.attacks.evasion.ball import Ball, Bounds, box
from robust_if.attacks.evasion.boundary import length, nearest_error
from robust_if.attacks.evasion.losses import check_labels, margins
from robust_if.attacks.evasion.targeted import check_classes, try_classes
from robust_if.data import to
from robust_if.predictions import class_logits
from robust_if.task import Batch, Params, Task


@dataclass(frozen=True)
class FAB(Attack):
    """FAB-T, the fast adaptive boundary attack towards one wrong class after another: it seeks the nearest error, not the largest loss.

    Every step linearises the logit of the goal minus that of the label, goes a little beyond the plane where this vanishes, and is drawn towards the
    clean input; after an error, of whatever class, it goes back part of the way. The search goes beyond the radius of the ball, but distances are
    relative to it, so that radii may differ by feature. The result is the nearest error if that lies within the ball, otherwise the clean input.

    Args:
        steps: for every class.
        classes: how many wrong classes are tried, those of the largest logits at the clean input; all others if there are fewer.

    Raises:
        ValueError: if a number is out of range, or the threat has projections.

    Source: Croce and Hein 2020 (arXiv 1907.02044), algorithm 1 with η = 1.05, α_max = 0.1, β = 0.9 and a final search of three steps, towards given
    classes as in arXiv 2003.01690, section 5; from the clean input, without restarts.
    """

    steps: int = field(default=100, kw_only=True)
    classes: int = field(default=9, kw_only=True)

    def __post_init__(self) -> None:
        step_length(None, self.threat.eps, self.steps)
        check_classes(self.classes)
        if self.threat.project:
            raise ValueError(f"project: FAB walks along a boundary, where hardly a point is valid; expected no projection, got {self.threat.project}")

    @property
    def name(self) -> str:
        return "fab-t"

    def __call__(self, task: Task, params: Params, batch: Batch) -> Tensor:
        return self.nearest(task, params, batch)[0]

    def first_error(self, task: Task, params: Params, batch: Batch) -> Tensor:
        return self._nearest(task, params, batch, enough=-1.0)[0]

    def nearest(self, task: Task, params: Params, batch: Batch) -> tuple[Tensor, Tensor]:
        """The nearest errors in the ball, and their distances ``(B,)`` relative to its radius: 0 where the clean input is wrong, ``inf`` for none.

        Arguments and errors are those of a call.
        """
        return self._nearest(task, params, batch, enough=1.0)

    def _nearest(self, task: Task, params: Params, batch: Batch, enough: float) -> tuple[Tensor, Tensor]:
        """The same; a sample is done when minus its distance exceeds ``enough``."""
        check_labels(batch)
        batch = to(batch, next(iter(params.values())))
        fixed = {name: value.detach() for name, value in params.items()}
        Ball.around(batch[0].detach(), self.threat)  # which checks the threat

        def towards(part: Batch, goals: Tensor) -> tuple[Tensor, Tensor]:
            points, distances = _chase(task, fixed, part, goals, Ball.around(part[0], self.threat), self.threat.bounds, self.steps)
            return points, -distances

        start = torch.where(margins(task, fixed, batch) > 0, torch.inf, -torch.inf).to(batch[0])
        points, scores = try_classes(task, fixed, batch, self.classes, towards, start, enough)
        return points, (-scores).clamp(min=0)


def _chase(task: Task, params: Params, batch: Batch, goals: Tensor, ball: Ball, bounds: Bounds | None, steps: int) -> tuple[Tensor, Tensor]:
    """The nearest errors met on the way to the goals ``(B,)``, and their distances ``(B,)``; ``inf`` where there is none in the ball."""
    clean, labels = ball.clean, batch[1].reshape(-1, 1).long()
    limits = box(clean, torch.inf, bounds, mutable=ball.radius > 0)
    low, high = (torch.where(ball.radius > 0, (limit - clean) / ball.radius, 0).reshape(len(clean), -1) for limit in limits)

    def inputs(u: Tensor) -> Tensor:
        return clean + ball.radius * u.view_as(clean)

    def lead(u: Tensor) -> Tensor:
        return margins(task, params, (inputs(u), *batch[1:]))

    def plane(u: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            leaf = u.clone().requires_grad_()
            logits = class_logits(task.outputs(params, (inputs(leaf), *batch[1:])))
            difference = (logits.gather(1, goals[:, None]) - logits.gather(1, labels))[:, 0]
            if not difference.requires_grad:
                raise ValueError("model: its outputs do not depend on the inputs in a differentiable way, so FAB has no direction; use Square")
            (slope,) = torch.autograd.grad(difference.sum(), leaf)
        return difference.detach(), slope

    u = nearest_error(plane, lead, low, high, ball.norm, steps)
    points, distance = ball.clip(inputs(u)), length(u, ball.norm)
    inside = (distance <= 1) & (margins(task, params, (points, *batch[1:])) > 0)
    return points, torch.where(inside, distance, torch.inf)
