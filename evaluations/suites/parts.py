"""What the parts of a suite are: a data set makes a scene, an attack changes it, a defence answers with a model, metrics judge that.

Every part is a function with keyword options of plain values (numbers, strings, booleans), so that a TOML file can name it. A shipped part has a
name, and anybody's own is ``module:function``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from robust_if.attacks.evasion import Threat
from robust_if.data import Samples
from robust_if.fairness.groups import Groups
from robust_if.scores import Scores
from robust_if.task import Task
from robust_if.training import Recipe, fit


@dataclass(frozen=True, eq=False)
class Scene:
    """A data set that is ready to be learnt.

    Args:
        task: the untrained model.
        recipe: how it is trained; its seed is the row's.
        train: the training samples that a defence gets.
        valid: clean held-out samples that a defence may look at.
        test: samples that only metrics look at.
        threat: what an attacker at test time may do to an input, in the unit of the encoded inputs; ``None`` where that is not defined.
        groups: sensitive groups of ``valid`` and ``test`` by these names, and of ``train``; empty where there are none.
        mislabelled: training samples whose label is known to be wrong before any attack, ``(n,)``; ``None`` where that is unknown.
        fit: ``(samples, weights (n,) or None) -> task``, trains in another way than by the recipe, such as logistic regression to its optimum.
    """

    task: Task
    recipe: Recipe
    train: Samples
    valid: Samples
    test: Samples
    threat: Threat | None = None
    groups: Mapping[str, Groups] = field(default_factory=dict)
    mislabelled: NDArray[np.bool_] | None = None
    fit: Callable[[Samples, NDArray[np.float64] | None], Task] | None = None

    def fitted(self, weights: NDArray[np.float64] | None = None, labels: NDArray[np.int64] | None = None) -> Task:
        """A model trained on the training samples as the scene says, with weights or labels ``(n,)`` of one's own."""
        train = self.train if labels is None else self.train.with_labels(labels)
        return fit(self.task, train, self.recipe, weights=weights) if self.fit is None else self.fit(train, weights)


@dataclass(frozen=True, eq=False)
class Attacked:
    """A scene after the attack.

    Args:
        scene: with the training samples that the attacker left behind.
        bad: which of them the attacker changed or put in, ``(n,)``; all false where it leaves the training data alone, ``None`` where it is unknown.
        success: what the attacker gains from a model, from 0 to 1, on inputs that no defence sees; ``None`` where that has no meaning.
        seen: inputs of the attack that the defender holds, under the labels that the attacker wants (a user's report, say); ``None`` if none.
        undefended: the model that is trained on the data as they are, made on the first call and kept.
    """

    scene: Scene
    bad: NDArray[np.bool_] | None
    success: Callable[[Task], float] | None
    seen: Samples | None
    undefended: Callable[[], Task]


@dataclass(frozen=True, eq=False)
class Defended:
    """What a defence answers with.

    Args:
        task: the model that it would use.
        weights: of the training samples, ``(n,)``, 0 where one was removed; ``None`` if it did not choose among them.
        scores: by which it chose, where it did.
        labels: that it trained on, ``(n,)``, where it changed some.
        about: facts for the row, such as epochs or a threshold; plain values.
    """

    task: Task
    weights: NDArray[np.float64] | None = None
    scores: Scores | None = None
    labels: NDArray[np.int64] | None = None
    about: Mapping[str, Any] = field(default_factory=dict)


class Data(Protocol):
    """Makes a scene; ``seed`` draws splits, noise of its own, and the model's initial parameters."""

    def __call__(self, *, seed: int) -> Scene: ...


class Attack(Protocol):
    """Changes training data, or says how models are attacked at test time."""

    def __call__(self, scene: Scene, *, seed: int) -> Change: ...


class Defence(Protocol):
    """Answers an attack; it looks at ``scene.train``, ``scene.valid`` and ``seen``, never at ``scene.test``, ``bad`` or ``success``."""

    def __call__(self, attacked: Attacked, *, seed: int) -> Defended: ...


class Metric(Protocol):
    """Numbers by name, such as ``{"accuracy": .93}``; empty where the metric has no meaning for the row."""

    def __call__(self, attacked: Attacked, defended: Defended, *, seed: int) -> Mapping[str, float]: ...


@dataclass(frozen=True, eq=False)
class Change:
    """What an attack returns; the fields are those of :class:`Attacked`, which the engine makes of it."""

    scene: Scene
    bad: NDArray[np.bool_] | None = None
    success: Callable[[Task], float] | None = None
    seen: Samples | None = None
