"""Targets under attack: the loss that an attack reaches, and how much of it the attack adds."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from robust_if.attacks.evasion import Attack
from robust_if.attacks.evasion.ball import check_input
from robust_if.data import Samples, to
from robust_if.targets import Functional
from robust_if.task import Batch, Params, Task


@dataclass(frozen=True, eq=False)
class AdversarialLoss(Functional):
    """Mean loss on held-out samples that are attacked at the parameters at hand, in the unit of the task's loss.

    T(θ) = (1/n) Σ ℓ(a(x_i; θ), y_i; θ), where the attack a runs anew at every θ that T is asked at. The gradient takes the attacked points as fixed;
    where they are the maxima of the loss over the threat, it is that of T (Danskin's theorem). An attack that raises the task's own loss, as
    :class:`~robust_if.attacks.evasion.PGD` does, never ends below the clean loss; one that raises something else may.

    Args:
        data: held-out samples whose first tensor is the input, floating point and of any shape, usually ``(x, y)``.
        attack: what an attacker may do, in the unit of the inputs as the model gets them, and how it searches.

    Raises:
        TypeError: if ``attack`` is no attack.
        ValueError: if its threat does not fit the data, no feature may move, the input is not floating point, or inputs lie outside the bounds.

    Source: Madry et al. 2018 (arXiv 1706.06083), equation 2.1; Danskin's theorem in their appendix A.
    """

    attack: Attack

    is_mean = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.attack, Attack):
            raise TypeError(f"attack: expected an attack, such as PGD(Threat(eps=0.1)), got {type(self.attack).__name__}")
        # a map-style data set is not read whole for this; its other samples are checked as they come
        batch = self.data.batch(slice(None) if isinstance(self.data.tensors, tuple) else slice(0, 1))
        check_input(batch, "data")
        threat = self.attack.threat
        radius = torch.as_tensor(threat.eps)
        if not (radius >= 0).all() or not radius.any():
            raise ValueError(f"eps: expected a positive number, in the unit of the inputs, got {threat.eps}")
        threat.check(batch[0], "data")
        if threat.mutable is not None and not (threat.mutable & (radius > 0).to(threat.mutable.device)).any():
            raise ValueError("mutable: expected at least one feature that may move, got none")

    @property
    def name(self) -> str:
        return "adversarial"

    def moments(self, task: Task, params: Params, batch: Batch) -> Tensor:
        return self.losses(task, params, batch, self.attack(task, params, batch))[:, None]

    def reduce(self, means: Tensor) -> Tensor:
        return means[0]

    def losses(self, task: Task, params: Params, batch: Batch, points: Tensor) -> Tensor:
        """What T is the mean of, ``(B,)``, for a clean ``batch`` whose inputs are moved to ``points``."""
        return task.losses(params, (points, *batch[1:]))

    def fixed(self, task: Task, params: Params | None = None) -> FixedPoints:
        """The same target with attacked points that are made now and stay, whatever the parameters are that it is asked at later.

        An estimator that evaluates a target at many parameters, such as flat minima or a change of loss, then sees one smooth function and pays for
        one attack. At ``params`` value and gradient are those of the target itself; the further the parameters are from there, the more the fixed
        points flatter the model, so a model that was retrained has to be attacked anew.

        Args:
            params: where the attack runs; the task's own parameters by default.

        Raises:
            ValueError: if the attack fails, or a batch of a map-style data set holds anything but tensors.
        """
        at = task.params() if params is None else params
        parts = []
        for start in range(0, len(self.data), self.batch_size):
            batch = self.data.batch(slice(start, start + self.batch_size))
            strangers = [type(each).__name__ for each in batch if not isinstance(each, Tensor)]
            if strangers:
                raise ValueError(f"data: to hold attacked points, batches have to be tensors alone, got {', '.join(strangers)}")
            points = self.attack(task, at, to(batch, next(iter(at.values()))))
            parts.append((*batch, points.to(batch[0].device)))
        together = tuple(torch.cat(tensors) for tensors in zip(*parts, strict=True))
        return FixedPoints(Samples(together, self.data.ids), self, batch_size=self.batch_size)


@dataclass(frozen=True, eq=False)
class RobustGap(AdversarialLoss):
    """How much an attack adds to the mean loss of held-out samples: that under attack minus that on clean inputs, in the unit of the task's loss.

    T(θ) = (1/n) Σ [ℓ(a(x_i; θ), y_i; θ) − ℓ(x_i, y_i; θ)]; arguments, errors and gradient as for :class:`AdversarialLoss`. A model that is wrong with
    and without an attack has a small gap too, so look at the clean loss beside it.
    """

    @property
    def name(self) -> str:
        return "robust_gap"

    def losses(self, task: Task, params: Params, batch: Batch, points: Tensor) -> Tensor:
        return super().losses(task, params, batch, points) - task.losses(params, batch)


@dataclass(frozen=True, eq=False)
class FixedPoints(Functional):
    """A target under attack whose attacked points stay as they are; made by :meth:`AdversarialLoss.fixed`.

    Args:
        data: ``(input, …, attacked input)``.
        of: the target whose points these are.
    """

    of: AdversarialLoss

    is_mean = True

    @property
    def name(self) -> str:
        return self.of.name

    def moments(self, task: Task, params: Params, batch: Batch) -> Tensor:
        *clean, points = batch
        return self.of.losses(task, params, tuple(clean), points)[:, None]

    def reduce(self, means: Tensor) -> Tensor:
        return means[0]

    def fixed(self, task: Task, params: Params | None = None) -> FixedPoints:
        """The same with points made anew, see :meth:`AdversarialLoss.fixed`."""
        return self.of.fixed(task, params)
