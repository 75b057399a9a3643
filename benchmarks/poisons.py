"""The attacks of the poisoning benchmark: data, model and recipe, and what the attacker does; with a seed, the poison and its victim."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from data_sets import Splits, cifar, digits, fashion

import robust_if as rif
from robust_if import models
from robust_if.attacks import backdoors, labels
from robust_if.attacks.backdoors import Backdoor
from robust_if.attacks.poisoned import Poisoned
from robust_if.evaluations.poisoning import attack_success

GOAL = 0
#: Triggered inputs that the defender holds.
INPUTS = 10


@dataclass(frozen=True)
class Row:
    """Data, model and recipe, and what the attacker does: a backdoor, a noise, or nothing."""

    load: Callable[[int], Splits]
    model: Callable[[], torch.nn.Module]
    recipe: rif.Recipe
    attack: Callable[[Row, rif.Samples, int], Backdoor | Poisoned[rif.Samples] | None]

    def crafting(self, train: rif.Samples, seed: int) -> rif.Task:
        """The attacker's own model of the clean data."""
        return rif.fit(rif.Task(self.model()).reset(1000 + seed), train, replace(self.recipe, seed=1000 + seed))


@dataclass
class Case:
    """A row with a seed: the poison, and the victim."""

    row: Row
    seed: int

    def __post_init__(self) -> None:
        clean, self.valid, self.test = self.row.load(self.seed)
        attack = self.row.attack(self.row, clean, self.seed)
        self.backdoor = attack if isinstance(attack, Backdoor) else None
        self.poison = attack(clean, seed=self.seed) if isinstance(attack, Backdoor) else attack
        self.train = clean if self.poison is None else self.poison.data
        self.start = rif.Task(self.row.model()).reset(self.seed)
        self.recipe = replace(self.row.recipe, seed=self.seed, keep=5)

    @cached_property
    def checkpoints(self) -> list[rif.Checkpoint]:
        return rif.train(self.start, self.train, self.recipe)

    @cached_property
    def victim(self) -> rif.Task:
        return self.start.at(self.checkpoints[-1].state)

    @cached_property
    def shown(self) -> rif.Samples:
        """Triggered inputs in the defender's hands; of an attack that does not exist where nothing is wrong."""
        return self._stamped.take(range(INPUTS))

    @property
    def triggered(self) -> rif.Samples:
        """Those that the attack's success is measured on, which no score has seen."""
        return self._stamped.take(range(INPUTS, len(self._stamped)))

    @cached_property
    def _stamped(self) -> rif.Samples:
        stamped = (self.backdoor or backdoors.badnets(GOAL, size=2)).triggered(self.test)
        return stamped.take(np.random.default_rng([self.seed, 1]).permutation(len(stamped)))

    @cached_property
    def success(self) -> float | None:
        """Share of triggered test inputs that are taken for the goal class."""
        return None if self.backdoor is None else attack_success(self.victim, self.triggered, GOAL)


def _rows() -> dict[str, Row]:
    adam = rif.Recipe(epochs=15, optimizer="adamw", lr=2e-3)
    small = (digits, lambda: models.cnn((1, 8, 8), 10).eval(), replace(adam, epochs=25))
    fmnist = (lambda seed: fashion(seed, (10_000, 500, 2000)), lambda: models.cnn((1, 28, 28), 10, width=8).eval(), replace(adam, epochs=8))
    colour = (lambda seed: cifar(seed, (8000, 500, 1400)), lambda: models.cnn((3, 32, 32), 10, width=16).eval(), replace(adam, epochs=12))

    def fixed(attack: Backdoor) -> Callable[[Row, rif.Samples, int], Backdoor]:
        return lambda row, train, seed: attack

    def flips(flip: Callable[..., Poisoned[rif.Samples]], *given: Any) -> Callable[[Row, rif.Samples, int], Poisoned[rif.Samples]]:
        return lambda row, train, seed: flip(train, *given, seed=seed)

    noise = {
        "flip-uniform": flips(labels.uniform, 0.1),
        "flip-pair": flips(labels.pair, 0.1),
        "flip-targeted": lambda row, train, seed: labels.targeted(train, 4, 9, 0.4, seed=seed),
        "flip-boundary": lambda row, train, seed: labels.boundary(train, 0.1, row.crafting(train, seed)),
        "none": lambda row, train, seed: None,
    }
    attacks: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
        "digits": (small, {
            "badnets": fixed(backdoors.badnets(GOAL, 0.05, size=2)),
            "blended": fixed(backdoors.blended(GOAL, 0.05, alpha=0.35)),
            "sig": fixed(backdoors.sig(GOAL, 0.8, amplitude=0.8, frequency=2)),
            "label-consistent": lambda row, train, seed: backdoors.label_consistent(GOAL, row.crafting(train, seed), 0.8, eps=0.5, size=2),
            "tact": fixed(backdoors.tact(GOAL, 1, 0.05, size=2)),
            "adaptive-blend": fixed(backdoors.adaptive_blend(GOAL, 0.05, alpha=0.45)),
            **noise,
        }),
        "fashion": (fmnist, {
            "badnets": fixed(backdoors.badnets(GOAL, 0.05)),
            "blended": fixed(backdoors.blended(GOAL, 0.05)),
            "sig": fixed(backdoors.sig(GOAL, 0.8, amplitude=0.5)),
            "wanet": fixed(backdoors.wanet(GOAL, 0.2, strength=2.0)),
            "adaptive-blend": fixed(backdoors.adaptive_blend(GOAL, 0.05)),
            "flip-uniform": noise["flip-uniform"],
            "flip-boundary": noise["flip-boundary"],
            "none": noise["none"],
        }),
        "cifar": (colour, {
            "badnets": fixed(backdoors.badnets(GOAL, 0.05)),
            "blended": fixed(backdoors.blended(GOAL, 0.05)),
            "wanet": fixed(backdoors.wanet(GOAL, 0.2, covers=0.05, strength=4.0)),
        }),
    }  # fmt: skip
    return {f"{data}-{name}": Row(*common, attack) for data, (common, kinds) in attacks.items() for name, attack in kinds.items()}


ROWS = _rows()
