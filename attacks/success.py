"""Targets of a defender who holds suspicious inputs: the attack's success there, and what harmless changes take from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from robust_if.data import Samples, as_samples
from robust_if.predictions import Certainty, log_odds
from robust_if.task import Batch, Params, Task

Transform = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class AttackSuccess(Certainty):
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
