"""The search that all attacks share: it evaluates points and keeps the best."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from robust_if.attacks.evasion.ball import Ball, Projection, Threat, check_input, per_sample
from robust_if.attacks.evasion.losses import Loss, objective
from robust_if.data import to
from robust_if.task import Batch, Params, Task


class Search:
    """For every sample the best of the points visited, its loss and its gradient.

    Args:
        losses: what rises, inputs ``(B, …)`` and their positions in the batch to ``(B,)``; see :func:`robust_if.attacks.evasion.losses.objective`.
        ball: where the points lie.
        projections: onto valid inputs, applied one after another to a point before it is evaluated.
    """

    def __init__(self, losses: Callable[[Tensor, Tensor | None], Tensor], ball: Ball, projections: Sequence[Projection]) -> None:
        self.losses, self.ball, self.projections = losses, ball, projections
        self.best, self.slope = ball.clean, torch.zeros_like(ball.clean)
        self.largest = ball.clean.new_full((len(ball.clean),), -torch.inf)
        self._rows: Tensor | None = None
        self._found = ball.clean

    @classmethod
    def begin(
        cls, task: Task, params: Params, batch: Batch, threat: Threat, loss: Loss | None, *, targeted: bool = False, random_start: bool = False,
        generator: torch.Generator | None = None, first_error: bool = False,
    ) -> tuple[Search, Tensor]:  # fmt: skip
        """The search and its first point; everything that can be checked before the model runs is checked. Arguments are those of :func:`pgd`."""
        check_input(batch)
        if random_start and generator is None:
            raise ValueError("generator: a random start needs a torch.Generator, got none; the global random state is not used")
        if threat.project and threat.norm != "linf":
            raise ValueError(f"project: projections need the box of norm='linf', got norm={threat.norm!r}")
        batch = to(batch, next(iter(params.values())))
        clean = batch[0].detach()
        ball = Ball.around(clean, threat)
        search = cls(objective(task, params, batch, loss, targeted=targeted, first_error=first_error), ball, threat.project)
        search._check_clean()
        if generator is None or not random_start:
            return search, clean
        search.visit(clean, search.slope, last=True)
        return search, ball.random(generator)

    def visit(self, point: Tensor, slope: Tensor, *, last: bool = False) -> tuple[Tensor, Tensor]:
        """The losses ``(B,)`` and their gradient at the valid inputs that ``point`` projects to.

        Args:
            slope: the last gradient, for the projections.
            last: no gradient is needed any more; ``slope`` comes back.

        Raises:
            ValueError: if a loss is NaN or does not depend on the inputs, or a projection leaves the ball.
        """
        if point is not self.ball.clean:  # which is valid up to rounding, and stays exactly as it is
            point = self._valid(point, slope)
        with torch.set_grad_enabled(not last):
            leaf = point.clone().requires_grad_(not last)
            losses = self.losses(leaf, self._rows)
            if not last:
                if not losses.requires_grad:
                    raise ValueError("loss: it does not depend on the inputs in a differentiable way, so an attack by gradients has no direction")
                (slope,) = torch.autograd.grad(losses.sum(), leaf)
        losses = losses.detach()
        if losses.isnan().any():
            raise ValueError(f"loss: it is NaN near sample {int(losses.isnan().nonzero()[0])} of the batch; are the bounds of valid inputs declared?")
        better = losses > self.largest
        self.largest = torch.where(better, losses, self.largest)
        better = per_sample(better, point)
        self.best, self.slope = torch.where(better, point, self.best), torch.where(better, slope, self.slope)
        return losses, slope

    def leave(self) -> Tensor | None:
        """Go on without the samples whose loss is infinite; the positions of the others among those that were left, or ``None`` if it is all.

        What happens to a sample depends on no other, so leaving some out changes nothing for the rest beyond rounding.
        """
        going = self.largest < torch.inf
        if going.all():
            return None
        self._found, rows = self.result(), going.nonzero()[:, 0]
        self._rows = rows if self._rows is None else self._rows[rows]
        self.ball, self.best, self.slope, self.largest = self.ball.take(rows), self.best[rows], self.slope[rows], self.largest[rows]
        return rows

    def result(self) -> Tensor:
        """The best points of all samples, ``(B, …)``."""
        return self.best if self._rows is None else self._found.index_copy(0, self._rows, self.best)

    def _valid(self, point: Tensor, slope: Tensor) -> Tensor:
        for projection in self.projections:
            point = projection(point, slope, self.ball.low, self.ball.high)
            if not ((point >= self.ball.low) & (point <= self.ball.high)).all():
                raise ValueError(f"project: {projection} left the ball or the bounds; expected a point from low to high")
        return point

    def _check_clean(self) -> None:
        clean = self.ball.clean
        moved = (self._valid(clean, self.slope) - clean).abs() > 1e-5 * clean.abs().clamp(min=1)
        if moved.any():
            sample, *feature = moved.nonzero()[0].tolist()
            value = float(clean[(sample, *feature)])
            raise ValueError(f"project: the clean input is not valid itself, in sample {sample} feature {tuple(feature)} is {value:g}")
