"""What a detection run is asked, and what comes out of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robust_if.loading import Dataset
from robust_if.scores import Scores
from robust_if.training import Recipe


@dataclass(frozen=True, eq=False)
class Suspicion:
    """What a user holds who suspects an attack: inputs on which it works, and the class that it makes the model say.

    Args:
        inputs: triggered inputs; their labels are used to measure success, and never to score.
        goal_class: the label as it stands in the data, as text.
        false_positives: share of clean samples that the automatic threshold may flag; 1 % by default, or the smallest share that the validation
            samples can promise.
    """

    inputs: Dataset
    goal_class: str
    false_positives: float | None = None


@dataclass(frozen=True)
class Plan:
    """One detection run.

    Args:
        train: what is searched; its ``mislabelled`` mask, where known, is used to judge and never to score.
        valid: clean samples that the target looks at.
        test: samples for the accuracy before and after.
        estimators: by name, see :func:`robust_if.evaluations.scenario.detectors`; the first one decides.
        remove: ``"auto"`` for the automatic threshold, a share such as ``"0.1"``, or a number of samples such as ``"100"``.
        model: name of a ready model, or ``module:function``.
        recipe: how it is trained.
        checkpoint: a trained model to score with, instead of training one.
        repeats: retrainings with different seeds for every accuracy.
        seed: of everything random.
        title: what the report is called.
        command: what repeats the run.
        warnings: what the reader of the report should know.
        whole: the data that ``train`` was split from, if it was; the cleaned copy keeps the samples that were split off.
        suspicion: of an attack; what is removed is then decided by the verdict "poisoned", and ``remove="auto"`` is the threshold that promises the
            suspicion's share of false positives. The estimators give a second verdict, "harms utility", by which nothing is removed.
        sensitive: column of a table by whose groups wrong removals are counted.
    """

    train: Dataset
    valid: Dataset
    test: Dataset
    estimators: tuple[str, ...]
    remove: str = "auto"
    model: str = "mlp"
    recipe: Recipe = field(default_factory=Recipe)
    checkpoint: Path | None = None
    batch_size: int = 128
    repeats: int = 3
    seed: int = 0
    title: str = "Samples that hurt"
    command: str = ""
    warnings: tuple[str, ...] = ()
    whole: Dataset | None = None
    suspicion: Suspicion | None = None
    sensitive: str | None = None


@dataclass(frozen=True, eq=False)
class Verdicts:
    """The two verdicts of a run with a suspicion, which are never mixed.

    Args:
        poisoned: ``(n,)``, true where the sample is what makes the attack work, by the first scores.
        harms_utility: ``(n,)``, true where the sample raises the loss on the validation samples, by the second scores.
        successes: share of triggered inputs classified as the goal class, by what the model was trained on, one per seed; ``"scored"`` is the model
            that was scored.
        seen: how many triggered inputs the target saw.
        measured: how many the success was measured on; none of them is among the former unless ``shared``.
        shared: whether they are the same inputs, since there were too few to split.
    """

    poisoned: NDArray[np.bool_]
    harms_utility: NDArray[np.bool_]
    successes: Mapping[str, Sequence[float]]
    seen: int
    measured: int
    shared: bool


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a run found.

    Args:
        scores: one per estimator; the first one decided.
        weights: ``(n,)``, 0 for the samples that were removed.
        threshold: above which samples were removed, where the decision has one.
        decision: the rule in words.
        suggested: ``(n,)`` labels as in the file.
        accuracies: test accuracies of the retrained models by what they were trained on, one per seed.
        verdicts: where the plan has a suspicion.
        warnings: what turned up during the run.
    """

    scores: Sequence[Scores]
    weights: NDArray[np.float64]
    threshold: float | None
    decision: str
    suggested: NDArray[Any]
    accuracies: Mapping[str, Sequence[float]]
    verdicts: Verdicts | None = None
    warnings: tuple[str, ...] = ()
