"""Targets on what the model says: how sure it is of given classes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the name that every reader of torch code expects

from robust_if.targets import Functional
from robust_if.task import Batch, Params, Task


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
class Certainty(PredictionMargin):
    """How sure the model is of given classes, bounded below: the mean of −log(1 − p_y), 0 where none of them is believed.

    Args:
        data: ``(x, y)`` with the classes y to be unlearnt.
    """

    @property
    def name(self) -> str:
        return "certainty"

    def moments(self, task: Task, params: Params, batch: Batch) -> Tensor:
        return F.softplus(super().moments(task, params, batch))


def class_logits(outputs: Any) -> Tensor:
    """Logits ``(B, K)`` with K ≥ 2, from those, or from one logit z of class 1, ``(B,)`` or ``(B, 1)``, which stands for the two logits (0, z).

    Raises:
        ValueError: if the outputs have another shape, or are no tensor.
    """
    if not isinstance(outputs, Tensor) or outputs.ndim not in (1, 2):
        got = f"shape {tuple(outputs.shape)}" if isinstance(outputs, Tensor) else type(outputs).__name__
        raise ValueError(f"model: expected a classifier's logits (B, K), or one logit (B,) or (B, 1), got {got}")
    logits = outputs.reshape(len(outputs), -1)
    return logits if logits.shape[1] > 1 else torch.cat([torch.zeros_like(logits), logits], 1)


def log_odds(outputs: Any, labels: Tensor) -> Tensor:
    """Log-odds log p_y / (1 − p_y), ``(B,)``, from logits ``(B, K)``, or from one logit ``(B,)`` or ``(B, 1)`` of class 1.

    Raises:
        ValueError: if a label is no class of the outputs, or these are no logits.
    """
    logits = class_logits(outputs)
    if labels.min() < 0 or labels.max() >= logits.shape[1]:
        span = f"{int(labels.min())} to {int(labels.max())}"
        raise ValueError(f"labels: expected classes from 0 to {logits.shape[1] - 1}, as labels or as goal_class, got some from {span}")
    own = logits.gather(1, labels[:, None])
    others = logits.masked_fill(torch.zeros_like(logits, dtype=torch.bool).scatter(1, labels[:, None], True), -torch.inf)
    odds: Tensor = own[:, 0] - others.logsumexp(1)
    return odds
