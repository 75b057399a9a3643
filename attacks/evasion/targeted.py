"""APGD towards one wrong class after another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from robust_if.attacks.evasion.ascent import apgd, step_length
from robust_if.attacks.evasion.attack import Attack
from robust_if.attacks.evasion.ball import per_sample
from robust_if.attacks.evasion.losses import check_labels, margin, margins, take
from robust_if.data import to
from robust_if.predictions import class_logits
from robust_if.task import Batch, Params, Task

#: ``(batch, goals) -> (points, scores)``: attacks a batch, every sample towards its class among ``goals`` ``(B,)``; scores ``(B,)``, more is better.
Towards = Callable[[Batch, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class TargetedAPGD(Attack):
    """APGD-T: :func:`robust_if.attacks.evasion.apgd` on the targeted DLR loss, towards one wrong class after another.

    For every sample the wrong classes are tried in the order of their logits at the clean input, until one attempt meets an error, of whatever class;
    that point is the result. Otherwise it is the end point of largest margin, or the clean input. Samples that are wrong to begin with stay.

    The loss is (z_t − z_y) / (z₍₁₎ − (z₍₃₎ + z₍₄₎) / 2) for the label y, the goal t and the sorted logits z₍ₖ₎. With three classes it is z_t − z_y,
    with two classes that is the margin.

    Args:
        steps: of APGD for every class.
        classes: how many wrong classes are tried; all others if there are fewer.

    Raises:
        ValueError: if a number is out of range.

    Source: Croce and Hein 2020 (arXiv 2003.01690), section 4.1, the loss, and section 5, the attack; from the clean input, without restarts.
    """

    steps: int = field(default=100, kw_only=True)
    classes: int = field(default=9, kw_only=True)

    def __post_init__(self) -> None:
        step_length(None, self.threat.eps, self.steps)
        check_classes(self.classes)

    @property
    def name(self) -> str:
        return "apgd-t"

    def __call__(self, task: Task, params: Params, batch: Batch) -> Tensor:
        check_labels(batch)
        batch = to(batch, next(iter(params.values())))
        chased = replace(task, forward=lambda model, batch: task.forward(model, batch[:-1]))

        def towards(part: Batch, goals: Tensor) -> tuple[Tensor, Tensor]:
            points = apgd(chased, params, (*part, goals), self.threat, steps=self.steps, loss=_towards_goal, first_error=True)
            return points, margins(task, params, (points, *part[1:]))

        self.threat.check(batch[0])
        points, _ = try_classes(task, params, batch, self.classes, towards, margins(task, params, batch), enough=0.0)
        return points


def try_classes(task: Task, params: Params, batch: Batch, classes: int, towards: Towards, scores: Tensor, enough: float) -> tuple[Tensor, Tensor]:
    """For every sample the point of largest score, and that score, of attacks towards its wrong classes, the likeliest at the clean input first.

    A sample whose score exceeds ``enough`` is not attacked further. Where few are left, they are attacked towards several classes at once, so that no
    batch is larger than the one that came; results do not depend on it.

    Args:
        scores: of the clean inputs, ``(B,)``.
    """
    x, labels = batch[0].detach(), batch[1].reshape(-1).long()
    with torch.no_grad():
        logits = class_logits(task.outputs(params, batch))
    order = logits.scatter(1, labels[:, None], -torch.inf).sort(dim=1, descending=True, stable=True).indices
    others = order[:, : min(classes, logits.shape[1] - 1)]
    best, scores, tried = x.clone(), scores.clone(), 0
    while tried < others.shape[1] and len(rows := (scores <= enough).nonzero()[:, 0]):
        goals = others[rows, tried : tried + max(1, len(x) // len(rows))].T
        points, reached = towards(take(batch, rows.repeat(len(goals))), goals.reshape(-1))
        for point, score in zip(points.chunk(len(goals)), reached.chunk(len(goals)), strict=True):
            better = (scores[rows] <= enough) & (score > scores[rows])  # in order, as if they had been tried one after another
            best[rows], scores[rows] = torch.where(per_sample(better, point), point, best[rows]), torch.where(better, score, scores[rows])
        tried += len(goals)
    return best, scores


def check_classes(classes: int) -> None:
    """Raise a ``ValueError`` if the number of wrong classes to try is less than 1."""
    if classes < 1:
        raise ValueError(f"classes: expected at least 1, got {classes}")


def _towards_goal(outputs: Any, batch: Batch) -> Tensor:
    """The targeted DLR loss ``(B,)`` towards the classes in the last tensor of the batch."""
    logits = class_logits(outputs)
    if logits.shape[1] < 3:
        return margin(outputs, batch)
    own, goal = (logits.gather(1, labels.reshape(-1, 1).long())[:, 0] for labels in (batch[1], batch[-1]))
    if logits.shape[1] == 3:
        return goal - own
    top = logits.topk(4, dim=1).values
    return (goal - own) / (top[:, 0] - (top[:, 2] + top[:, 3]) / 2 + 1e-12)
