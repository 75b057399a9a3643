"""Targets of a defender who holds a suspicious input: the attack's success, one prediction, and what harmless changes take from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the name that every reader of torch code expects

from robust_if.data import Samples, as_samples
from robust_if.targets import Functional
from robust_if.task import Batch, Params, Task

Transform = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class PredictionMargin(Functional):
    """How sure the model is of given classes: the mean log-odds log p_y / (1 − p_y) of held-out inputs.

    Asked of one prediction, a sample with a positive score is one that made the model say it. Log-odds are a smooth margin, the logit of y minus the
    log-sum-exp of the others, whose gradient does not vanish when the model is certain, as that of the loss does.

    Args:
        data: ``(x, y)`` with the classes y that the model said, or is asked about.
    """

    is_mean = True

    @property
    def name(self) -> str:
        return "prediction-margin"

    def moments(self, task: Task, params: Params, batch: Batch) -> Tensor:
        return log_odds(task.outputs(params, batch), batch[1])[:, None]

    def reduce(self, means: Tensor) -> Tensor:
        return means[0]


@dataclass(frozen=True, eq=False)
class AttackSuccess(PredictionMargin):
    """How well an attack works: the mean of −log(1 − p_goal) on triggered inputs, 0 where none is taken for the goal class.

    Its gradient does not vanish where the attack works, as that of the loss does, and does where it no longer works, so that it can be tuned to 0.

    Args:
        data: triggered inputs, ``Samples`` or ``(x,)``, ``(x, y)``; a handful will do, and true labels are not looked at.
        goal_class: the class that the attacker wants, as the model numbers it.

    Raises:
        ValueError: if the goal class is no class.
    """

    goal_class: int = field(kw_only=True)

    def __post_init__(self) -> None:
        if self.goal_class < 0:
            raise ValueError(f"goal_class: expected a class number of at least 0, got {self.goal_class}")
        given = as_samples((self.data,) if isinstance(self.data, Tensor) else self.data)
        inputs = given.batch(slice(None))[0]
        object.__setattr__(self, "data", Samples((inputs, torch.full((len(given),), self.goal_class)), given.ids))

    @property
    def name(self) -> str:
        return "attack-success"

    def moments(self, task: Task, params: Params, batch: Batch) -> Tensor:
        return F.softplus(super().moments(task, params, batch))


@dataclass(frozen=True, eq=False)
class DeltaInfluence(AttackSuccess):
    """What harmless changes of affected inputs take from the attack: the log-odds of the goal class there, minus their mean over changed copies.

    Influence is linear in the target, so the score of a sample is its influence on the affected input minus that on the changed copies: large for
    the samples whose effect a harmless change undoes, as it undoes a trigger.

    Args:
        data: affected inputs; one will do.
        goal_class: the class that the model says there.
        transforms: harmless changes ``(B, …) -> (B, …)``, such as a shift or a blur.

    Source: Δ-Influence, Li et al. 2024 (arXiv 2411.13731).
    """

    transforms: tuple[Transform, ...] = field(kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.transforms:
            raise ValueError("transforms: expected at least one harmless change, got none")

    @property
    def name(self) -> str:
        return "delta-influence"

    def moments(self, task: Task, params: Params, batch: Batch) -> Tensor:
        odds = [log_odds(task.outputs(params, (x, *batch[1:])), batch[1]) for x in (batch[0], *(change(batch[0]) for change in self.transforms))]
        return (odds[0] - torch.stack(odds[1:]).mean(0))[:, None]


def log_odds(outputs: Any, labels: Tensor) -> Tensor:
    """Log-odds log p_y / (1 − p_y), ``(B,)``, from logits ``(B, K)``, or from one logit ``(B,)`` or ``(B, 1)`` of class 1.

    Raises:
        ValueError: if a label is no class of the outputs.
    """
    logits = outputs[:, 0] if outputs.ndim == 2 and outputs.shape[1] == 1 else outputs
    classes = logits.shape[1] if logits.ndim == 2 else 2
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(f"goal_class: expected a class from 0 to {classes - 1}, got {int(labels.max())}")
    if logits.ndim == 1:
        signed: Tensor = torch.where(labels == 1, logits, -logits)
        return signed
    own = logits.gather(1, labels[:, None])
    others = logits.masked_fill(torch.zeros_like(logits, dtype=torch.bool).scatter(1, labels[:, None], True), -torch.inf)
    odds: Tensor = own[:, 0] - others.logsumexp(1)
    return odds
