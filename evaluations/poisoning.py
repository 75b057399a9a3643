"""How far an attack got, how far a defence brought it back, and whom the defence hit by mistake."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from robust_if.data import Samples
from robust_if.evaluations.baselines import accuracy, predict
from robust_if.sweep import Progress, silent
from robust_if.task import Task
from robust_if.training import Recipe, fit

#: The success below which an attack is reported as failed, so that nothing is claimed for a defence against it.
WORKS = 0.8


def attack_success(task: Task, triggered: Samples, goal: int, batch_size: int = 256) -> float:
    """Share of triggered inputs that are classified as ``goal``, among those whose true class is another one.

    Args:
        task: the attacked classifier.
        triggered: inputs with the trigger and their true labels.
        goal: the class that the attacker wants, as the model numbers it.

    Raises:
        ValueError: if no input is of another class than the goal.
    """
    found = _predicted(task, triggered, goal, batch_size)[0]
    return float((found == goal).mean())


def recovered_accuracy(task: Task, triggered: Samples, goal: int, batch_size: int = 256) -> float:
    """Share of triggered inputs that are classified as what they are, among those whose true class is not ``goal``.

    Low attack success alone may mean that the inputs are classified as something else that is wrong.

    Raises:
        ValueError: if no input is of another class than the goal.
    """
    found, true = _predicted(task, triggered, goal, batch_size)
    return float((found == true).mean())


def _predicted(task: Task, triggered: Samples, goal: int, batch_size: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    true = triggered.labels.cpu().numpy()
    if not (true != goal).any():
        raise ValueError(f"triggered: expected an input whose true class is not the goal class {goal}, but all {len(true)} are of it")
    others = triggered.take(true != goal)
    return predict(task, others, batch_size).argmax(1), others.labels.cpu().numpy()


def clean_model(task: Task, clean: Samples, recipe: Recipe, n: int, *, directory: Path | None = None, progress: Progress = silent) -> Task:
    """A model of clean held-out samples alone, trained for as many steps as one of ``n`` samples: what it says of an input is said without poison."""
    longer = replace(recipe, epochs=recipe.epochs * math.ceil(n / len(clean)), keep=1)
    return fit(task, clean, longer, directory=directory, progress=progress)


def filter_bias(
    mask: ArrayLike | None, removed: ArrayLike, labels: ArrayLike, groups: ArrayLike | None = None, *, name: str = "group"
) -> pd.DataFrame:
    """Whom a filter removed, in all, by class and by group: who pays for its mistakes.

    Args:
        mask: ``(n,)``, true where the sample is poison; ``None`` if that is not known.
        removed: ``(n,)``, true where the filter removed the sample.
        labels: ``(n,)`` the labels as the filter saw them.
        groups: ``(n,)`` values of a sensitive feature.
        name: of that feature.

    Returns:
        A row for ``by="all"``, one per class (``by="class"``) and one per group (``by=name``) with the columns ``by``, ``value``, ``n``,
        ``poisoned``, ``removed``, ``precision`` (share of the removed that is poison), ``recall`` (share of the poison that was removed) and
        ``false_positive_rate`` (share of the clean that was removed). What cannot be computed is NaN, such as the recall where there is no poison.

    Raises:
        ValueError: if the lengths differ.
    """
    gone, classes = np.asarray(removed, dtype=bool), np.asarray(labels)
    bad = None if mask is None else np.asarray(mask, dtype=bool)
    given = {"mask": bad, "labels": classes, "groups": None if groups is None else np.asarray(groups)}
    for what, values in given.items():
        if values is not None and values.shape != gone.shape:
            raise ValueError(f"{what}: expected one value per sample, shape {gone.shape}, got {values.shape}")
    parts: list[tuple[str, Any, NDArray[np.bool_]]] = [("all", "", np.ones(len(gone), dtype=bool))]
    parts += [("class", value, classes == value) for value in np.unique(classes)]
    if given["groups"] is not None:
        parts += [(name, value, given["groups"] == value) for value in np.unique(given["groups"])]
    return pd.DataFrame([{"by": by, "value": str(value), **_counts(bad, gone, members)} for by, value, members in parts])


def _counts(bad: NDArray[np.bool_] | None, gone: NDArray[np.bool_], members: NDArray[np.bool_]) -> dict[str, float]:
    n, removed = int(members.sum()), int((gone & members).sum())
    if bad is None:
        unknown = dict.fromkeys(("poisoned", "precision", "recall", "false_positive_rate"), np.nan)
        return {"n": n, "removed": removed, **unknown}
    poisoned, hits = int((bad & members).sum()), int((bad & gone & members).sum())
    return {
        "n": n, "removed": removed, "poisoned": poisoned, "precision": _share(hits, removed), "recall": _share(hits, poisoned),
        "false_positive_rate": _share(removed - hits, n - poisoned),
    }  # fmt: skip


def _share(part: int, whole: int) -> float:
    return part / whole if whole else float("nan")


@dataclass(frozen=True)
class Defence:
    """A model trained without what one filter removed.

    Args:
        name: of the filter.
        removed: how many samples it removed.
        precision: share of those that is poison; NaN where nothing was removed.
        recall: share of the poison that was removed.
        attack_success: see :func:`attack_success`.
        clean_accuracy: on the clean test samples.
        recovered_accuracy: see :func:`recovered_accuracy`.
    """

    name: str
    removed: int
    precision: float
    recall: float
    attack_success: float
    clean_accuracy: float
    recovered_accuracy: float


@dataclass(frozen=True)
class Defended:
    """Every defence against one attack: ``"undefended"``, ``"random filter"``, ``"perfect filter"``, and the decisions.

    Args:
        defences: in that order.
    """

    defences: Sequence[Defence]

    @property
    def failed(self) -> bool:
        """Whether the attack never worked: its success on the undefended model is below :data:`WORKS`."""
        return self.defences[0].attack_success < WORKS


def defended(
    task: Task,
    poisoned: Samples,
    mask: ArrayLike,
    decisions: Mapping[str, ArrayLike],
    *,
    test: Samples,
    triggered: Samples,
    goal: int,
    recipe: Recipe,
    seed: int = 0,
    progress: Progress = silent,
) -> Defended:
    """Remove by each decision, retrain from scratch, and measure; beside no defence, a random filter and a perfect one.

    Args:
        task: the untrained model.
        poisoned: what the victim trains on.
        mask: ``(n,)``, true where the sample is poison. It judges, and makes the perfect filter; the random filter removes as many samples.
        decisions: by name, weights ``(n,)`` as :mod:`robust_if.decisions` gives them, 0 for the samples that are removed.
        test: clean samples that nothing was tuned on.
        triggered: inputs with the trigger and their true labels, which no score has seen.
        goal: the class that the attacker wants, as the model numbers it.
        recipe: how every model is trained, all with its seed.
        seed: draws the random filter.

    Raises:
        ValueError: if lengths differ, a decision removes everything, or the mask holds no poison or nothing else.
    """
    bad = np.asarray(mask, dtype=bool)
    if bad.shape != (len(poisoned),) or not 0 < bad.sum() < len(bad):
        raise ValueError(f"mask: expected {len(poisoned)} truth values, some but not all of them true, got {bad.sum()} true of shape {bad.shape}")
    rng = np.random.default_rng([seed, len(bad)])  # a stream of its own, since the bare seed may have drawn the poison
    at_random = np.zeros(len(bad), dtype=bool)
    at_random[rng.permutation(len(bad))[: bad.sum()]] = True
    removals = {"undefended": np.zeros(len(bad), dtype=bool), "random filter": at_random, "perfect filter": bad}
    for name, weights in decisions.items():
        removed = np.asarray(weights) == 0
        if removed.shape != bad.shape or removed.all() or name in removals:
            raise ValueError(f"decisions: {name!r} needs a name of its own, {len(bad)} weights and a sample that stays, got shape {removed.shape}")
        removals[name] = removed

    def judged(name: str, removed: NDArray[np.bool_]) -> Defence:
        fitted = fit(task, poisoned, recipe, weights=(~removed).astype(np.float64), progress=progress)
        hits = int((removed & bad).sum())
        return Defence(
            name, int(removed.sum()), _share(hits, int(removed.sum())), hits / int(bad.sum()), attack_success(fitted, triggered, goal),
            accuracy(fitted, test), recovered_accuracy(fitted, triggered, goal),
        )  # fmt: skip

    return Defended([judged(name, removed) for name, removed in removals.items()])
