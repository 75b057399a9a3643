"""Adversarial training: what a training step lowers so that a model holds under attack.

Each class is an objective of :class:`robust_if.Recipe`. Points are crafted anew for every batch, at the parameters of that moment and with the model
in evaluation mode, so that neither batch statistics nor dropout change under the attack; the losses at these points are then taken in training mode.
What is random comes from the recipe's generator, a draw of its own for every sample.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the name that every reader of torch code expects

from robust_if.attacks.evasion import Limit, Threat, step_length
from robust_if.attacks.evasion.ball import Ball, check_input, fit
from robust_if.predictions import class_logits, log_odds
from robust_if.task import Batch, Task

#: Standard deviation of the start of TRADES and MART relative to the radius; 0.001 at the radius of 0.031 that both were published with.
SPREAD = 0.032

Start = Callable[[Ball, torch.Generator], Tensor]


@dataclass(frozen=True)
class PGDTraining:
    """The task's loss at inputs that projected gradient ascent on that loss has found: adversarial training.

    The ascent starts at a point drawn from the ball, and its last point is taken. Any loss per sample will do.

    Args:
        threat: what the attacker may do.
        steps: of the ascent; each costs a forward and a backward pass, and the training step itself one more.
        alpha: length of a step, given like ``threat.eps``; 2.5 ``eps`` / ``steps`` by default.

    Raises:
        ValueError: if ``steps`` or ``alpha`` is out of range; on call, if the threat does not fit the inputs.

    Source: Madry et al. 2018 (arXiv 1706.06083), equation 2.1 and section 2.1.
    """

    threat: Threat
    steps: int = field(default=10, kw_only=True)
    alpha: Limit | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        step_length(self.alpha, self.threat.eps, self.steps)

    def __call__(self, task: Task, model: nn.Module, batch: Batch, generator: torch.Generator) -> Tensor:
        found = crafted(task, model, batch, self.threat, task.loss, Ball.random, self.steps, self.alpha, generator)
        return task.loss(task.forward(model, found), found)


@dataclass(frozen=True)
class FastTraining:
    """The task's loss at inputs after one signed step from a random point: adversarial training at twice the cost of plain training.

    Args:
        threat: what the attacker may do.
        alpha: length of the step, given like ``threat.eps``; 1.25 ``eps`` by default. Longer steps fail suddenly (catastrophic overfitting).

    Raises:
        ValueError: as :class:`PGDTraining`.

    Source: Wong, Rice and Kolter 2020 (arXiv 2001.03994), algorithm 3.
    """

    threat: Threat
    alpha: Limit | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        step_length(self.alpha, self.threat.eps, 1)

    def __call__(self, task: Task, model: nn.Module, batch: Batch, generator: torch.Generator) -> Tensor:
        length = 1.25 * self.threat.eps if self.alpha is None else self.alpha
        found = crafted(task, model, batch, self.threat, task.loss, Ball.random, 1, length, generator)
        return task.loss(task.forward(model, found), found)


@dataclass(frozen=True)
class TRADES:
    """The task's loss at the clean input plus ``beta`` · KL(p(x) ‖ p(x')), where x' is what raises that divergence.

    The ascent starts at a small Gaussian step from the clean input, where the divergence has no slope. The gradient flows through both distributions.

    Args:
        threat: what the attacker may do.
        beta: price of a prediction that changes; the higher, the more clean accuracy is given up for robustness.
        steps: of the ascent, each a forward and a backward pass.

    Raises:
        ValueError: if a number is out of range; on call, if the threat does not fit the inputs or the outputs are no logits.

    Source: Zhang et al. 2019 (arXiv 1901.08573), equation 5 and algorithm 1; ``beta`` is their 1/λ.
    """

    threat: Threat
    beta: float = field(default=6.0, kw_only=True)
    steps: int = field(default=10, kw_only=True)

    def __post_init__(self) -> None:
        step_length(None, self.threat.eps, self.steps)
        if not self.beta >= 0:
            raise ValueError(f"beta: expected a number of at least 0, got {self.beta}")

    def __call__(self, task: Task, model: nn.Module, batch: Batch, generator: torch.Generator) -> Tensor:
        with evaluating(model), torch.no_grad():
            before = _log_shares(task.forward(model, batch))

        def moved(outputs: Any, _: Batch) -> Tensor:
            return _divergence(before, _log_shares(outputs))

        found = crafted(task, model, batch, self.threat, moved, _near, self.steps, None, generator)
        outputs = task.forward(model, batch)
        return task.loss(outputs, batch) + self.beta * _divergence(_log_shares(outputs), _log_shares(task.forward(model, found)))


@dataclass(frozen=True)
class MART:
    """Adversarial training that attends to samples which the model gets wrong already without an attack.

    −log p_y(x') − log(1 − max over k ≠ y of p_k(x')) + ``weight`` · KL(p(x) ‖ p(x')) · (1 − p_y(x)), where x' raises the task's loss.

    Args:
        threat: what the attacker may do.
        weight: λ of the divergence.
        steps: of the ascent, each a forward and a backward pass.

    Raises:
        ValueError: if a number is out of range; on call, if the threat does not fit the inputs or the outputs are no logits.

    Source: Wang et al. 2020, "Improving adversarial robustness requires revisiting misclassified examples" (ICLR), equations 8 to 11.
    """

    threat: Threat
    weight: float = field(default=5.0, kw_only=True)
    steps: int = field(default=10, kw_only=True)

    def __post_init__(self) -> None:
        step_length(None, self.threat.eps, self.steps)
        if not self.weight >= 0:
            raise ValueError(f"weight: expected a number of at least 0, got {self.weight}")

    def __call__(self, task: Task, model: nn.Module, batch: Batch, generator: torch.Generator) -> Tensor:
        found = crafted(task, model, batch, self.threat, task.loss, _near, self.steps, None, generator)
        clean, attacked = class_logits(task.forward(model, batch)), class_logits(task.forward(model, found))
        labels = batch[1].reshape(-1).long()
        rival = attacked.detach().scatter(1, labels[:, None], -torch.inf).argmax(1)
        # −log p = softplus(−log-odds) and −log(1 − p) = softplus(log-odds), both finite however sure the model is
        boosted = F.softplus(-log_odds(attacked, labels)) + F.softplus(log_odds(attacked, rival))
        wrong = torch.sigmoid(-log_odds(clean, labels))
        return boosted + self.weight * wrong * _divergence(_log_shares(clean), _log_shares(attacked))


def crafted(
    task: Task, model: nn.Module, batch: Batch, threat: Threat, loss: Callable[[Any, Batch], Tensor], start: Start, steps: int, alpha: Limit | None,
    generator: torch.Generator,
) -> Batch:  # fmt: skip
    """``batch`` with the inputs that gradient ascent on ``loss`` ends at; the model is attacked in evaluation mode and its modes come back.

    This is the search of :func:`robust_if.attacks.evasion.pgd` without its bookkeeping: the last point is taken and not the best, as is usual in
    training, which saves two forward passes.

    Raises:
        ValueError: if the threat does not fit the inputs, or the loss does not depend on them.
    """
    check_input(batch)
    ball = Ball.around(batch[0].detach(), threat)
    length, slope = fit("alpha", step_length(alpha, threat.eps, steps), ball.clean), torch.zeros_like(ball.clean)

    def valid(point: Tensor) -> Tensor:
        for project in threat.project:
            point = project(point, slope, ball.low, ball.high)
        return point.detach()

    point = start(ball, generator)
    with evaluating(model), torch.enable_grad():
        for _ in range(steps):
            leaf = valid(point).requires_grad_()
            losses = loss(task.forward(model, (leaf, *batch[1:])), (leaf, *batch[1:]))
            if not losses.requires_grad:
                raise ValueError("loss: it does not depend on the inputs in a differentiable way, so there is nothing to train against")
            (slope,) = torch.autograd.grad(losses.sum(), leaf)
            point = ball.clip(point + ball.step(slope, length))
    return (valid(point), *batch[1:])


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, every module of the model is in evaluation mode; afterwards each is in the mode that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _near(ball: Ball, generator: torch.Generator) -> Tensor:
    """A small Gaussian step from the clean inputs."""
    drawn = torch.randn(ball.clean.shape, generator=generator, device=generator.device)
    return ball.clip(ball.clean + SPREAD * ball.radius * drawn.to(ball.clean))


def _log_shares(outputs: Any) -> Tensor:
    """Logarithms of the class probabilities, ``(B, K)``."""
    return class_logits(outputs).log_softmax(1)


def _divergence(before: Tensor, after: Tensor) -> Tensor:
    """KL(before ‖ after) of every sample, ``(B,)``, from logarithms of probabilities."""
    return F.kl_div(after, before, reduction="none", log_target=True).sum(1)
