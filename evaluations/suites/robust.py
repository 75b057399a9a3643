"""Robustness of a model that is judged: always attacked at its own parameters, never on points that were found at another's."""

from __future__ import annotations

import re
from typing import Any

from robust_if.attacks.evasion import PGD, Attack, Threat
from robust_if.data import Samples
from robust_if.evaluations.robustness import RobustAccuracy, robust_accuracy
from robust_if.task import Task


def search(threat: Threat, preset: str) -> Any:
    """What :func:`robust_if.evaluations.robustness.robust_accuracy` takes as its preset.

    Args:
        preset: ``"standard"``, ``"lite"``, or ``"pgd-20"`` for so many steps of projected gradient ascent, which is quicker and flatters a model.

    Raises:
        ValueError: if it is none of these.
    """
    if preset in ("standard", "lite"):
        return preset
    found = re.fullmatch(r"pgd-([1-9]\d*)", preset)
    if found is None:
        raise ValueError(f"preset: expected 'standard', 'lite' or 'pgd-' and a number of steps, got {preset!r}")
    attack: Attack = PGD(threat, steps=int(found[1]))
    return attack


def attacked_again(task: Task, data: Samples, threat: Threat, preset: str, *, points: int = 0, checks: bool = False) -> RobustAccuracy:
    """Robust accuracy on the first ``points`` samples, all for 0."""
    if points < 0:
        raise ValueError(f"points: expected 0, for all, or a number of samples, got {points}")
    some = data.take(range(min(points, len(data)))) if points else data
    return robust_accuracy(task, some, threat, preset=search(threat, preset), checks=checks)
