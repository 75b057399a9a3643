"""What an attack raises: losses on logits by name, a function, a target, or the task's own loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the name that every reader of torch code expects
from torch.utils._pytree import tree_map

from robust_if.attacks.evasion.ball import check_input
from robust_if.predictions import class_logits
from robust_if.targets import Functional
from robust_if.task import Batch, Params, Task, cross_entropy

Loss = Literal["ce", "dlr", "margin"] | Callable[[Any, Batch], Tensor] | Functional


def margin(outputs: Tensor, batch: Batch) -> Tensor:
    """The largest logit of the other classes minus that of the label, ``(B,)``; positive exactly where the model errs.

    Args:
        outputs: logits ``(B, K)`` of K ≥ 2 classes, or one logit, ``(B,)`` or ``(B, 1)``; one logit z stands for the two logits (0, z).
        batch: ``(x, y)`` with labels from 0 to K − 1, ``(B,)`` or ``(B, 1)``, of any type.

    Raises:
        ValueError: if the shapes or labels are others.

    Source: Carlini and Wagner 2017 (arXiv 1608.04644), section V, function f₆ for the class of the label, without its floor.
    """
    logits, labels = _logits(outputs, batch)
    own = labels[:, None]
    return logits.scatter(1, own, -torch.inf).amax(1) - logits.gather(1, own)[:, 0]


def dlr(outputs: Tensor, batch: Batch) -> Tensor:
    """The margin relative to the distance of the largest and the third largest logit, ``(B,)``; logits may be shifted and scaled without changing it.

    Arguments and errors as in :func:`margin`, with K ≥ 3.

    Source: the difference of logits ratio of Croce and Hein 2020 (arXiv 2003.01690), section 4.
    """
    logits, _ = _logits(outputs, batch)
    if logits.shape[1] < 3:
        raise ValueError(f"loss: 'dlr' needs at least 3 classes, the model tells {logits.shape[1]} apart; use loss='margin'")
    top = logits.topk(3, dim=1).values
    return margin(outputs, batch) / (top[:, 0] - top[:, 2] + 1e-12)


def check_labels(batch: Batch) -> None:
    """Raise a ``ValueError`` unless the batch is ``(input, labels, …)`` with a label for every sample."""
    check_input(batch)
    labels = batch[1] if len(batch) > 1 else None
    if not isinstance(labels, Tensor) or labels.numel() != len(batch[0]):
        got = f"shape {tuple(labels.shape)}" if isinstance(labels, Tensor) else type(labels).__name__
        raise ValueError(f"batch: the loss needs labels as its second tensor, one for each of {len(batch[0])} samples, got {got}")


def margins(task: Task, params: Params, batch: Batch) -> Tensor:
    """The margins ``(B,)`` of a batch ``(x, y)``, see :func:`margin`, without gradients.

    Raises:
        ValueError: as :func:`margin` does, or if one is NaN.
    """
    with torch.no_grad():
        found = margin(task.outputs(params, batch), batch)
    if found.isnan().any():
        first = int(found.isnan().nonzero()[0])
        raise ValueError(f"model: its outputs are NaN near sample {first} of the batch; are the bounds of valid inputs declared?")
    return found


def take(batch: Batch, rows: Tensor) -> Batch:
    """The samples of a batch at the positions ``rows``."""
    return tree_map(lambda leaf: leaf[rows] if isinstance(leaf, Tensor) else leaf, batch)


def objective(
    task: Task, params: Params, batch: Batch, loss: Loss | None, *, targeted: bool, first_error: bool = False
) -> Callable[[Tensor, Tensor | None], Tensor]:
    """What rises, ``(B,)``, as a function of the inputs and of their positions in the batch (``None`` for all of it).

    Args:
        first_error: an error counts as an infinite loss.

    Raises:
        ValueError: if the loss is unknown, no loss per sample, or no targeted one, its labels are missing, or the model is in training mode.
    """
    if isinstance(loss, str) and loss not in _BY_NAME:
        raise ValueError(f"loss: expected one of {', '.join(_BY_NAME)}, a function or a target, got {loss!r}")
    if loss == "dlr" and targeted:  # it can fall by a larger denominator, away from the goal
        raise ValueError("loss: 'dlr' leads to no class in particular; use loss='margin' or 'ce' with targeted=True")
    if first_error and (targeted or isinstance(loss, Functional)):
        raise ValueError("first_error: errors are told from outputs and labels; expected a loss by name or a function of the outputs, not targeted")
    if isinstance(loss, Functional) and not loss.is_mean:
        raise ValueError(f"loss: expected a target that is the mean of a loss per sample, got {loss.name!r}, in which samples depend on each other")
    if first_error or isinstance(loss, str) or (loss is None and task.loss is cross_entropy):
        check_labels(batch)
    fixed, sign = {name: value.detach() for name, value in params.items()}, -1 if targeted else 1
    function = task.loss if loss is None or isinstance(loss, Functional) else _BY_NAME[loss] if isinstance(loss, str) else loss
    if first_error:
        finite, function = function, lambda outputs, batch: torch.where(margin(outputs, batch) > 0, torch.inf, finite(outputs, batch))
    task = replace(task, loss=function)  # which checks once more that the model is in evaluation mode

    def losses(x: Tensor, rows: Tensor | None) -> Tensor:
        moved = (x, *(batch[1:] if rows is None else take(batch[1:], rows)))
        return sign * (loss.moments(task, fixed, moved)[:, 0] if isinstance(loss, Functional) else task.losses(fixed, moved))

    return losses


def _logits(outputs: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits ``(B, K)`` with K ≥ 2, and labels ``(B,)``."""
    if not isinstance(outputs, Tensor) or outputs.ndim not in (1, 2):
        got = f"shape {tuple(outputs.shape)}" if isinstance(outputs, Tensor) else type(outputs).__name__
        raise ValueError(f"loss: those by name take logits (B, K), or one logit (B,) or (B, 1), got {got}; give a function (outputs, batch) -> (B,)")
    logits, given = class_logits(outputs), batch[1].reshape(-1)
    labels = given.long()
    if not ((labels == given) & (labels >= 0) & (labels < logits.shape[1])).all():
        raise ValueError(f"batch: expected labels from 0 to {logits.shape[1] - 1}, got some from {float(given.min()):g} to {float(given.max()):g}")
    return logits, labels


def _cross_entropy(outputs: Tensor, batch: Batch) -> Tensor:
    return F.cross_entropy(*_logits(outputs, batch), reduction="none")


_BY_NAME: dict[str, Callable[[Any, Batch], Tensor]] = {"ce": _cross_entropy, "dlr": dlr, "margin": margin}
