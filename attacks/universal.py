"""Triggers that a defender finds without having seen one: a small change of all clean inputs that the model takes for one class."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robust_if.attacks.success import AttackSuccess
from robust_if.data import Samples, as_samples, to
from robust_if.predictions import log_odds
from robust_if.task import Params, Task


@dataclass(frozen=True, eq=False)
class UniversalTrigger:
    """A change that sends clean inputs to one class.

    Args:
        goal_class: the class.
        change: what is added, with the shape of one input.
        inputs: clean held-out inputs of the other classes with the change added, ``(m, …)``.
        success: share of them that the model takes for the class.
        anomaly: how far this success lies above the median of all classes, in units of their median absolute deviation times 1.4826 (a standard
            deviation of normal values). A backdoor's class tends to be far above; above 2 is the customary alarm.
    """

    goal_class: int
    change: Tensor = field(repr=False)
    inputs: Tensor = field(repr=False)
    success: float
    anomaly: float

    @property
    def target(self) -> AttackSuccess:
        """How well the found trigger works, to be asked of the training samples."""
        return AttackSuccess(Samples((self.inputs,)), goal_class=self.goal_class)


def universal_triggers(
    task: Task,
    valid: Any,
    *,
    radius: float = 0.2,
    steps: int = 30,
    bounds: tuple[float, float] | None = (0.0, 1.0),
    samples: int = 256,
    seed: int = 0,
) -> list[UniversalTrigger]:
    """For every class one change δ of clean inputs that makes the model answer it, the most successful class first.

    δ maximises the mean over inputs of the other classes of log p_goal(x + δ), with x + δ clamped to ``bounds`` and the root mean square of δ at most
    ``radius``, by ``steps`` projected gradient steps of length 2.5 ``radius`` / ``steps`` from 0. A class for which a backdoor was planted needs less
    change than others, since the trigger is there to be found; a clean-label backdoor may hide behind natural changes of other classes.

    Args:
        task: the suspected model, a classifier of floating-point inputs with one output per class.
        valid: clean held-out ``(x, y)``.
        radius: in the unit of the inputs.
        steps: of the search.
        bounds: smallest and largest valid input; ``None`` for inputs without.
        samples: held-out inputs that are drawn; all where there are fewer.
        seed: draws them.

    Raises:
        ValueError: if a number is out of range, inputs are no floating-point tensor or lie outside ``bounds``, or the model has not one output per
            class.

    Source: universal perturbations, Moosavi-Dezfooli et al. 2017 (arXiv 1610.08401), with a goal class; the search for a class's trigger and the
    anomaly index, there of the size of a mask: Neural Cleanse, Wang et al. 2019.
    """
    for name, value in (("radius", radius), ("steps", steps), ("samples", samples)):
        if not value > 0:
            raise ValueError(f"{name}: expected a positive number, got {value}")
    data, params = as_samples(valid), task.params()
    drawn = np.sort(np.random.default_rng(seed).permutation(len(data))[:samples])
    x, y = to(data.take(drawn).batch(slice(None)), next(iter(params.values())))[:2]
    if not x.is_floating_point():
        raise ValueError(f"valid: a universal change expects inputs of floating point, got {x.dtype}")
    if bounds is not None and (x.min() < bounds[0] - 1e-5 or x.max() > bounds[1] + 1e-5):
        raise ValueError(f"bounds: expected inputs within {bounds}, got some from {float(x.min()):g} to {float(x.max()):g}")
    with torch.no_grad():
        shape = task.outputs(params, (x[:1],)).shape
    if len(shape) != 2 or shape[1] < 2:
        raise ValueError(f"task: expected one output per class, shape (n, classes), got {tuple(shape)}")
    found = []
    for goal in range(shape[1]):
        others = x[y != goal]
        if len(others) == 0:
            raise ValueError(f"valid: all {len(x)} held-out inputs are of class {goal}; expected at least 2 classes")
        change = _search(task, params, others, goal, radius, steps, bounds)
        moved = _moved(others, change, bounds)
        with torch.no_grad():
            success = float((task.outputs(params, (moved,)).argmax(1) == goal).double().mean())
        found.append((goal, change, moved, success))
    rates = np.array([success for *_, success in found])
    spread = 1.4826 * float(np.median(np.abs(rates - np.median(rates))))
    anomalies = (rates - np.median(rates)) / max(spread, 1 / samples)
    triggers = [UniversalTrigger(*each, anomaly=float(anomaly)) for each, anomaly in zip(found, anomalies, strict=True)]
    return sorted(triggers, key=lambda each: -each.success)


def _moved(x: Tensor, change: Tensor, bounds: tuple[float, float] | None) -> Tensor:
    return x + change if bounds is None else (x + change).clamp(*bounds)


def _search(task: Task, params: Params, x: Tensor, goal: int, radius: float, steps: int, bounds: tuple[float, float] | None) -> Tensor:
    """The change of one class, by projected gradient ascent on the mean log-probability."""
    change, longest = torch.zeros_like(x[0]), radius * float(np.sqrt(x[0].numel()))
    labels = torch.full((len(x),), goal, device=x.device)
    for _ in range(steps):
        change.requires_grad_()
        with torch.enable_grad():
            odds = log_odds(task.outputs(params, (_moved(x, change, bounds),)), labels)
            (slope,) = torch.autograd.grad(torch.nn.functional.logsigmoid(odds).mean(), change)
        with torch.no_grad():
            change = change.detach() + 2.5 * longest / steps * slope / (slope.norm() + 1e-12)
            change *= min(1.0, longest / (float(change.norm()) + 1e-12))
    return change.detach()
