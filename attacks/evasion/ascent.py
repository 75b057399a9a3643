"""FGSM, PGD and APGD: three ways to choose the next point of one search."""

from __future__ import annotations

import torch
from torch import Tensor

from robust_if.attacks.evasion.ball import Limit, Threat, fit, per_sample
from robust_if.attacks.evasion.losses import Loss
from robust_if.attacks.evasion.search import Search
from robust_if.task import Batch, Params, Task


def fgsm(task: Task, params: Params, batch: Batch, threat: Threat, *, loss: Loss | None = None, targeted: bool = False) -> Tensor:
    """One step of length ``eps`` from the clean input, which stays where the step does not raise the loss.

    Arguments, result and errors are those of :func:`pgd`.

    Source: the fast gradient sign method of Goodfellow et al. 2015 (arXiv 1412.6572), section 4.
    """
    return pgd(task, params, batch, threat, steps=1, alpha=threat.eps, loss=loss, targeted=targeted)


def pgd(
    task: Task, params: Params, batch: Batch, threat: Threat, *, steps: int = 10, alpha: Limit | None = None, loss: Loss | None = None,
    targeted: bool = False, random_start: bool = False, generator: torch.Generator | None = None,
) -> Tensor:  # fmt: skip
    """Projected gradient ascent: steps of one length in the direction of steepest ascent; for every sample the point of largest loss that was met.

    The clean input counts as met, so no loss is lower than before. What happens to a sample depends on no other sample, so the batch size changes
    nothing beyond rounding. The model's modes, buffers, flags and gradients stay as they are; the global random state is neither read nor changed.

    Args:
        params: the parameters at which the model is attacked; inputs are brought to their device and floating-point type.
        batch: ``(input, …)``, the input of shape ``(B, …)`` and floating point; labels come second, where the loss needs them.
        threat: what the attacker may do. In L2 the ball is ‖δ / eps‖ ≤ 1, an ellipsoid where radii differ. An input that is just outside the
            bounds, by rounding, may stay where it is.
        steps: each costs a forward and a backward pass; one more forward pass is made at the end.
        alpha: length of a step, given like ``threat.eps``; 2.5 ``eps`` / ``steps`` by default.
        loss: what rises: ``"ce"``, ``"dlr"``, ``"margin"``, a function ``(outputs, batch) -> (B,)``, or a target that is the mean of a loss per
            sample; the task's own by default. To count errors take ``"margin"``, which is positive exactly on errors.
        targeted: let the loss fall instead; labels then say what the inputs are to be taken for. Not with ``"dlr"``.
        random_start: begin at a point drawn from the ball instead of the clean input.
        generator: draws that point; a generator carries on from one batch to the next, so that no batch size changes the draws.

    Returns:
        The attacked inputs, detached, with the shape of the inputs.

    Raises:
        ValueError: if a number is out of range, a shape does not fit, the inputs are not floating point or lie outside ``bounds``, labels are
            missing, the model is in training mode, the loss cannot take its outputs, does not depend on the inputs or is NaN, or the clean inputs
            are not valid for a projection.

    Source: Madry et al. 2018 (arXiv 1706.06083), section 2.1, the attack; the length of a step is that of their experiments.
    """
    length = step_length(alpha, threat.eps, steps)
    search, point = Search.begin(task, params, batch, threat, loss, targeted=targeted, random_start=random_start, generator=generator)
    ball, slope, length = search.ball, torch.zeros_like(point), fit("alpha", length, point)
    for _ in range(steps):
        _, slope = search.visit(point, slope)
        point = ball.clip(point + ball.step(slope, length))
    search.visit(point, slope, last=True)
    return search.best


def apgd(
    task: Task, params: Params, batch: Batch, threat: Threat, *, steps: int = 100, loss: Loss | None = "ce", targeted: bool = False,
    random_start: bool = False, generator: torch.Generator | None = None, first_error: bool = False,
) -> Tensor:  # fmt: skip
    """Auto-PGD: ascent with momentum in which every sample halves its own step, 2 ``eps`` at first, when its loss stops rising.

    At checkpoints, which come ever closer, a sample halves its step and returns to its best point if less than three quarters of its steps since
    the last checkpoint raised its loss, or if neither its step nor its best loss has changed since. Arguments, result and errors are those of
    :func:`pgd`; one is new:

    Args:
        first_error: end the search for a sample at the first point that the model gets wrong, which is then the result for it. To count errors this
            is both faster and stricter, since a point of lower loss than another may be the one that is wrong. The batch needs labels.

    Source: Croce and Hein 2020 (arXiv 2003.01690), algorithm 1 with the constants of section 3; one run, from the clean input by default.
    """
    _check_steps(steps)
    search, point = Search.begin(
        task, params, batch, threat, loss, targeted=targeted, random_start=random_start, generator=generator, first_error=first_error
    )
    before = point
    losses, slope = search.visit(point, torch.zeros_like(point))
    factor, rises, halved = torch.full_like(losses, 2.0), torch.zeros_like(losses), torch.zeros_like(losses, dtype=torch.bool)
    reached, since, checkpoints = search.largest, 0, _checkpoints(steps)
    for k in range(1, steps + 1):
        if first_error and (rows := search.leave()) is not None:
            if not len(rows):
                break
            state = (point, before, losses, slope, factor, rises, halved, reached)
            point, before, losses, slope, factor, rises, halved, reached = (each[rows] for each in state)
        ball = search.ball
        ahead = ball.clip(point + ball.step(slope, ball.radius * per_sample(factor, point)))
        share = 0.75 if k > 1 else 1.0
        point, before = ball.clip(point + share * (ahead - point) + (1 - share) * (point - before)), point
        risen, slope = search.visit(point, slope, last=k == steps)
        rises, losses = rises + (risen > losses), risen
        if k in checkpoints:
            halved = (rises < 0.75 * (k - since)) | (~halved & (search.largest == reached))
            factor, losses = torch.where(halved, factor / 2, factor), torch.where(halved, search.largest, losses)
            point, slope = (torch.where(per_sample(halved, a), b, a) for a, b in ((point, search.best), (slope, search.slope)))
            rises, reached, since = torch.zeros_like(rises), search.largest, k
    return search.result()


def step_length(alpha: Limit | None, eps: Limit, steps: int) -> Limit:
    """The length of PGD's steps: ``alpha``, or 2.5 ``eps`` / ``steps``.

    Raises:
        ValueError: if ``steps`` is less than 1, or ``alpha`` is negative, not finite, or zero throughout though ``eps`` is not.
    """
    _check_steps(steps)
    if alpha is None:
        return 2.5 * eps / steps
    length = torch.as_tensor(alpha)
    if not ((length >= 0) & length.isfinite()).all() or (torch.as_tensor(eps).any() and not length.any()):
        raise ValueError(f"alpha: expected a positive number, in the unit of the inputs, got {alpha}")
    return alpha


def _check_steps(steps: int) -> None:
    if steps < 1:
        raise ValueError(f"steps: expected at least 1, got {steps}")


def _checkpoints(steps: int) -> list[int]:
    """After which steps APGD looks back: after 22 % of them, then after gaps that shrink by 3 points each, down to 6."""
    shares, gap = [22], 22
    while shares[-1] < 100:
        gap = max(gap - 3, 6)
        shares.append(shares[-1] + gap)
    return [-(-share * steps // 100) for share in shares]
