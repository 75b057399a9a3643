"""The worst of several attacks, which is what a robust accuracy can be believed by."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from robust_if.attacks.evasion.attack import APGD, Attack
from robust_if.attacks.evasion.ball import Ball, Threat, per_sample
from robust_if.attacks.evasion.fab import FAB
from robust_if.attacks.evasion.losses import check_labels, margins, take
from robust_if.attacks.evasion.square import Square
from robust_if.attacks.evasion.targeted import TargetedAPGD
from robust_if.data import to
from robust_if.task import Batch, Params, Task


@dataclass(frozen=True)
class Broken:
    """What an ensemble found.

    Args:
        points: the attacked inputs, ``(B, …)``: errors where they were found, otherwise the point of largest margin among the results.
        by: which attack found the error, by its place in the ensemble, ``(B,)``; −1 where none did, −2 where the clean input is wrong and stays.
    """

    points: Tensor
    by: Tensor


@dataclass(frozen=True)
class Ensemble(Attack):
    """One attack after another, each on the samples that those before it did not break.

    Robust accuracy is the share of samples that are right at the clean input and that no attack breaks, ``by == -1``.

    Args:
        attacks: at least one. They should have the threat of the ensemble; a result outside it is an error.
        label: name for tables; that of its attacks by default.

    Raises:
        ValueError: if there is no attack.

    Source: Croce and Hein 2020 (arXiv 2003.01690), section 5.
    """

    attacks: tuple[Attack, ...]
    label: str = field(default="", kw_only=True)

    def __post_init__(self) -> None:
        if not self.attacks or not all(isinstance(attack, Attack) for attack in self.attacks):
            raise ValueError(f"attacks: expected a tuple of at least one Attack, got {self.attacks}")

    @property
    def name(self) -> str:
        return self.label or "+".join(attack.name for attack in self.attacks)

    def __call__(self, task: Task, params: Params, batch: Batch) -> Tensor:
        return self.run(task, params, batch).points

    def run(self, task: Task, params: Params, batch: Batch) -> Broken:
        """Attack a batch ``(input, labels, …)``.

        Raises:
            ValueError: as the attacks do, or if one leaves the ball or the bounds.
        """
        check_labels(batch)
        batch = to(batch, next(iter(params.values())))
        ball = Ball.around(batch[0].detach(), self.threat)
        points, most = ball.clean.clone(), margins(task, params, batch)
        by = torch.where(most > 0, -2, -1)
        for place, attack in enumerate(self.attacks):
            rows = (by == -1).nonzero()[:, 0]
            if not len(rows):
                break
            part = take(batch, rows)
            found = _inside(ball.take(rows), attack.first_error(task, params, part), attack)
            reached = margins(task, params, (found, *part[1:]))
            better = reached > most[rows]
            points[rows] = torch.where(per_sample(better, found), found, points[rows])
            most[rows] = most[rows].maximum(reached)
            by[rows[reached > 0]] = place
        return Broken(points, by)


def standard(threat: Threat, *, seed: int = 0) -> Ensemble:
    """The budget of AutoAttack: 100 steps of APGD on cross-entropy, of APGD-T and FAB-T towards 9 classes each, Square with 5,000 queries.

    FAB-T is left out where the threat has projections, and Square where it is not L∞; the name then says ``"standard without …"``. APGD starts once,
    from the clean input; Square draws from ``seed``. A model without gradients is an error; attack it with :class:`Square` alone.

    Source: Croce and Hein 2020 (arXiv 2003.01690), section 5: the set of attacks that they call AutoAttack, and its hyper-parameters.
    """
    return _preset("standard", threat, seed, targeted_steps=100, classes=9, queries=5000, nearest=True)


def lite(threat: Threat, *, seed: int = 0) -> Ensemble:
    """A cheaper ensemble, for many models: 100 steps of APGD on cross-entropy, 50 of APGD-T towards 5 classes each, Square with 1,000 queries.

    Square is left out where the threat is not L∞, and the name says so, as in :func:`standard`.
    """
    return _preset("lite", threat, seed, targeted_steps=50, classes=5, queries=1000, nearest=False)


def _preset(name: str, threat: Threat, seed: int, *, targeted_steps: int, classes: int, queries: int, nearest: bool) -> Ensemble:
    attacks: list[Attack] = [APGD(threat), TargetedAPGD(threat, steps=targeted_steps, classes=classes)]
    missing = []
    if nearest and threat.project:
        missing.append("fab-t")
    elif nearest:
        attacks.append(FAB(threat))
    if threat.norm == "linf":
        attacks.append(Square(threat, queries=queries, seed=seed))
    else:
        missing.append("square")
    return Ensemble(threat, tuple(attacks), label=" ".join([name, *(["without", " and ".join(missing)] if missing else [])]))


def _inside(ball: Ball, points: Tensor, attack: Attack) -> Tensor:
    """The points, with what rounding left outside the ball and the bounds brought back."""
    if points.shape != ball.clean.shape:
        raise ValueError(f"attacks: expected points of shape {tuple(ball.clean.shape)} from {attack.name}, got {tuple(points.shape)}")
    points = points.detach().to(ball.clean)
    inside = ball.clip(points)
    moved = (points - inside).abs() > 1e-5 * (ball.radius + inside.abs())
    if moved.any() or points.isnan().any():
        raise ValueError(f"attacks: {attack.name} left the ball or the bounds of the ensemble's threat in sample {int(moved.nonzero()[0, 0])}")
    return inside
