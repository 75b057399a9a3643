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
    """

    scores: Sequence[Scores]
    weights: NDArray[np.float64]
    threshold: float | None
    decision: str
    suggested: NDArray[Any]
    accuracies: Mapping[str, Sequence[float]]
