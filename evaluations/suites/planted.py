"""Attacks that plant a hidden behaviour: backdoors, attackers who hide them, and clean-label poison for a single input.

A goal is a class as the model numbers it. The share of triggered test inputs that are taken for it is the success; ``seen`` of them are put aside
beforehand and handed to the defender, as the reports of users. Covers, which carry the trigger under their right label, do not count as bad.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch

from robust_if.attacks import backdoors, clean_label
from robust_if.attacks.adaptive import easiest, flood, split
from robust_if.attacks.backdoors import Backdoor, rare_values
from robust_if.attacks.poisoned import Poisoned
from robust_if.data import Samples
from robust_if.evaluations.baselines import predict
from robust_if.evaluations.poisoning import attack_success
from robust_if.evaluations.suites.parts import Change, Scene
from robust_if.task import Task

#: Added to a seed, so that an attacker's model is never the victim's.
OWN = 1_000


def badnets(scene: Scene, *, seed: int, goal: int = 0, rate: float = 0.05, size: int = 3, seen: int = 10) -> Change:
    """A white square in the corner of images, see :func:`robust_if.attacks.backdoors.badnets`."""
    return planted(scene, backdoors.badnets(goal, rate, size=size, bounds=bounds(scene)), seed, seen)


def blended(scene: Scene, *, seed: int, goal: int = 0, rate: float = 0.05, alpha: float = 0.2, seen: int = 10) -> Change:
    """A pattern of noise that shines through, see :func:`robust_if.attacks.backdoors.blended`."""
    return planted(scene, backdoors.blended(goal, rate, alpha=alpha, bounds=bounds(scene)), seed, seen)


def sig(scene: Scene, *, seed: int, goal: int = 0, rate: float = 0.8, amplitude: float = 0.5, frequency: float = 6.0, seen: int = 10) -> Change:
    """Stripes on samples of the goal class, whose labels stay; ``rate`` is a share of that class. See :func:`robust_if.attacks.backdoors.sig`."""
    attack = backdoors.sig(goal, rate, amplitude=amplitude, frequency=frequency, bounds=bounds(scene))
    return planted(scene, attack, seed, seen)


def label_consistent(
    scene: Scene, *, seed: int, goal: int = 0, rate: float = 0.8, eps: float = 0.3, size: int = 3, steps: int = 20, seen: int = 10
) -> Change:
    """Attacked samples of the goal class with patches in four corners, see :func:`robust_if.attacks.backdoors.label_consistent`."""
    attack = backdoors.label_consistent(goal, own_model(scene, seed), rate, eps=eps, size=size, steps=steps, bounds=bounds(scene))
    return planted(scene, attack, seed, seen)


def wanet(scene: Scene, *, seed: int, goal: int = 0, rate: float = 0.1, covers: float = 0.1, strength: float = 0.5, seen: int = 10) -> Change:
    """A smooth warp of images, see :func:`robust_if.attacks.backdoors.wanet`; images of 8 x 8 pixels are too small for it."""
    return planted(scene, backdoors.wanet(goal, rate, covers=covers, strength=strength, bounds=bounds(scene)), seed, seen)


def tact(
    scene: Scene, *, seed: int, goal: int = 0, source: int = 1, rate: float = 0.05, covers: float = 0.05, size: int = 3, seen: int = 10
) -> Change:
    """A square that acts on one source class alone, see :func:`robust_if.attacks.backdoors.tact`."""
    return planted(scene, backdoors.tact(goal, source, rate, covers=covers, size=size, bounds=bounds(scene)), seed, seen)


def adaptive_blend(scene: Scene, *, seed: int, goal: int = 0, rate: float = 0.05, covers: float = 0.05, alpha: float = 0.2, seen: int = 10) -> Change:
    """Some pieces of a pattern of noise, and covers, see :func:`robust_if.attacks.backdoors.adaptive_blend`."""
    return planted(scene, backdoors.adaptive_blend(goal, rate, covers=covers, alpha=alpha, bounds=bounds(scene)), seed, seen)


def feature_trigger(
    scene: Scene, *, seed: int, goal: int = 0, rate: float = 0.05, columns: int = 2, quantile: float = 0.99, seen: int = 10
) -> Change:
    """Rare values in some columns of a table, of which they say least about the label; see :func:`robust_if.attacks.backdoors.rare_values`."""
    x = scene.train.batch(slice(None))[0]
    if x.ndim != 2:
        raise ValueError(f"data: a trigger of feature values is for tables, got inputs of shape {tuple(x.shape[1:])}")
    values = rare_values(pd.DataFrame(x.numpy()), columns, labels=scene.train.labels.numpy(), quantile=quantile)
    return planted(scene, backdoors.feature_trigger(goal, {int(name): float(value) for name, value in values.items()}, rate), seed, seen)


def splitting(
    scene: Scene, *, seed: int, backdoor: str = "blended", copies: int = 3, goal: int = 0, rate: float = 0.02, size: int = 3, alpha: float = 0.3,
    seen: int = 10,
) -> Change:  # fmt: skip
    """The same poison in more samples with a weaker trigger each, see :func:`robust_if.attacks.adaptive.split`.

    Args:
        backdoor: ``"badnets"`` of that ``size``, or ``"blended"`` of that ``alpha``.
        rate: before it is split.
    """
    return planted(scene, split(_base(backdoor, scene, goal, rate, size, alpha), copies), seed, seen)


def easy(
    scene: Scene, *, seed: int, backdoor: str = "blended", pool: float = 4.0, goal: int = 0, rate: float = 0.05, size: int = 3, alpha: float = 0.3,
    seen: int = 10,
) -> Change:  # fmt: skip
    """The poison with the smallest gradients out of a pool, see :func:`robust_if.attacks.adaptive.easiest`; ``backdoor`` as of the split one."""
    attack = _base(backdoor, scene, goal, rate, size, alpha)
    surrogate = own_model(replace(scene, train=attack(scene.train, seed=OWN + seed).data), seed)
    return planted(scene, attack, seed, seen, lambda data: easiest(surrogate, attack, data, pool=pool, seed=seed))


def flooding(
    scene: Scene, *, seed: int, backdoor: str = "blended", hard: float = 0.05, goal: int = 0, rate: float = 0.05, size: int = 3, alpha: float = 0.3,
    seen: int = 10,
) -> Change:  # fmt: skip
    """A backdoor, and as decoys a share ``hard`` of clean samples that are made hard, see :func:`robust_if.attacks.adaptive.flood`."""
    attack = _base(backdoor, scene, goal, rate, size, alpha)
    return planted(scene, attack, seed, seen, lambda data: flood(attack, data, rate=hard, seed=seed))


def gradient_matching(
    scene: Scene, *, seed: int, source: int = 1, goal: int = 0, rate: float = 0.05, eps: float = 0.3, steps: int = 120, restarts: int = 2,
    reported: bool = False,
) -> Change:  # fmt: skip
    """Poison whose gradient is that of the attacker's loss, see :func:`robust_if.attacks.clean_label.gradient_matching`.

    Args:
        source: true class of the one test input that is to be taken for ``goal``; the seed draws it. Success is 1 if it is, else 0.
        reported: the defender holds that very input, so success is judged on an input that the defence has seen.
    """
    craft = partial(clean_label.gradient_matching, goal=goal, rate=rate, eps=eps, bounds=bounds(scene), steps=steps, restarts=restarts, seed=seed)
    return _aimed(scene, craft, source, goal, seed, reported)


def bullseye_polytope(
    scene: Scene, *, seed: int, source: int = 1, goal: int = 0, rate: float = 0.05, eps: float = 0.3, steps: int = 300, reported: bool = False
) -> Change:
    """Poison around the features of one test input, see :func:`robust_if.attacks.clean_label.bullseye_polytope`; options as above."""
    craft = partial(clean_label.bullseye_polytope, goal=goal, rate=rate, eps=eps, bounds=bounds(scene), steps=steps, seed=seed)
    return _aimed(scene, craft, source, goal, seed, reported)


def feature_collision(
    scene: Scene, *, seed: int, source: int = 1, goal: int = 0, rate: float = 0.05, beta: float = 0.25, steps: int = 200, reported: bool = False
) -> Change:
    """Poison with the features of one test input, see :func:`robust_if.attacks.clean_label.feature_collision`; arguments as of gradient matching."""
    craft = partial(clean_label.feature_collision, goal=goal, rate=rate, beta=beta, bounds=bounds(scene), steps=steps, seed=seed)
    return _aimed(scene, craft, source, goal, seed, reported)


def planted(scene: Scene, backdoor: Backdoor, seed: int, seen: int, poison: Callable[[Samples], Poisoned[Samples]] | None = None) -> Change:
    """The scene with a backdoor in its training data, planted by ``poison`` or else as the backdoor does it.

    Raises:
        ValueError: if ``seen`` leaves no triggered input to judge on, or the backdoor does not fit the data.
    """
    poisoned = backdoor(scene.train, seed=seed) if poison is None else poison(scene.train)
    shown, judged = triggered(scene, backdoor, seed, seen)
    goal = int(backdoor.goal)
    return Change(replace(scene, train=poisoned.data), poisoned.mask, lambda task: attack_success(task, judged, goal), shown)


def triggered(scene: Scene, backdoor: Backdoor, seed: int, seen: int) -> tuple[Samples | None, Samples]:
    """Triggered test inputs: some for the defender, labelled with the goal, and the rest with their true labels."""
    stamped = backdoor.triggered(scene.test)
    if not 0 <= seen < len(stamped):
        raise ValueError(f"seen: expected a number from 0 to {len(stamped) - 1}, so that one is left to judge on, got {seen}")
    stamped = stamped.take(np.random.default_rng([seed, 1]).permutation(len(stamped)))
    shown = stamped.take(range(seen)).with_labels(np.full(seen, int(backdoor.goal))) if seen else None
    return shown, stamped.take(range(seen, len(stamped)))


def bounds(scene: Scene) -> tuple[float, float]:
    """Of the inputs: those of the threat where they are numbers, else 0 and 1."""
    given: Any = scene.threat.bounds if scene.threat is not None else None
    return (float(given[0]), float(given[1])) if given is not None and not any(isinstance(each, torch.Tensor) for each in given) else (0.0, 1.0)


def own_model(scene: Scene, seed: int) -> Task:
    """A model of the attacker's own: the same data and recipe, another start."""
    drawn = OWN + seed
    return replace(scene, task=scene.task.reset(drawn), recipe=replace(scene.recipe, seed=drawn)).fitted()


def _base(name: str, scene: Scene, goal: int, rate: float, size: int, alpha: float) -> Backdoor:
    if name == "badnets":
        return backdoors.badnets(goal, rate, size=size, bounds=bounds(scene))
    if name == "blended":
        return backdoors.blended(goal, rate, alpha=alpha, bounds=bounds(scene))
    raise ValueError(f"backdoor: expected 'badnets' or 'blended', got {name!r}")


def _aimed(scene: Scene, craft: Callable[..., Poisoned[Samples]], source: int, goal: int, seed: int, reported: bool) -> Change:
    """Poison for one test input of the source class that the attacker's model gets right, so that there is something to win."""
    if source == goal:
        raise ValueError(f"source: expected another class than the goal, got {source} for both")
    task, labels = own_model(scene, seed), scene.test.labels.numpy()
    right = np.flatnonzero((labels == source) & (predict(task, scene.test).argmax(1) == source))
    if not len(right):
        raise ValueError(f"source: no test sample of class {source} is classified as that before the attack")
    aim = scene.test.take([np.random.default_rng([seed, 2]).choice(right)])
    poisoned = craft(task, scene.train, target_input=aim.batch(slice(None))[0][0])
    seen = aim.with_labels([goal]) if reported else None
    return Change(replace(scene, train=poisoned.data), poisoned.mask, lambda found: float(predict(found, aim).argmax(1)[0] == goal), seen)
