"""Anybody's own files as a scene, and where the real data of shipped suites lie."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from robust_if.attacks.evasion import Threat
from robust_if.data import Samples
from robust_if.evaluations.problem import Problem
from robust_if.evaluations.splits import split_off
from robust_if.evaluations.suites.parts import Scene
from robust_if.evaluations.suites.truth import Known
from robust_if.evaluations.threats import threat_of
from robust_if.fairness.groups import Groups, at_least_two
from robust_if.loading import Dataset, read
from robust_if.models import usual
from robust_if.training import Recipe

#: The environment variable that names the folder of real data.
VARIABLE = "ROBUST_IF_DATA"


def folder(name: str) -> Path:
    """The folder of a real data set.

    Args:
        name: of the folder, such as ``"adult"``.

    Raises:
        FileNotFoundError: if the variable is not set, or there is no such folder; the message says what to do.
    """
    root = os.environ.get(VARIABLE, "")
    if not root:
        raise FileNotFoundError(f"data: set the environment variable {VARIABLE} to a folder that holds {name}/; it is not set")
    path = Path(root) / name
    if not path.is_dir():
        raise FileNotFoundError(f"data: {VARIABLE} is {root}, which holds no folder {name}")
    return path


def files(
    *, seed: int, train: str, valid: str = "", test: str = "", label: str = "", id: str = "", truth: str = "", sensitive: str = "",  # noqa: A002
    model: str = "", valid_fraction: float = 0.15, test_fraction: float = 0.25, epochs: int = 20, lr: float = 2e-3, batch_size: int = 64,
    eps: float = 0.0,
) -> Scene:  # fmt: skip
    """Samples in a file or folder that :func:`robust_if.loading.read` knows.

    Tables and text are encoded as :class:`~robust_if.encoding.Encoder` does it; images keep their pixels from 0 to 1.

    Args:
        train: path of the training samples.
        valid: path of checked samples; else ``valid_fraction`` of the training samples, by class and drawn by the seed.
        test: path of samples to judge on; else ``test_fraction``, likewise.
        label: column or array of the labels; ``id`` and ``truth`` are as there.
        sensitive: column of a table that says who belongs to which group.
        model: name of a model or ``module:function``; ``"cnn"`` for images and ``"mlp"`` for all else by default.
        epochs: of the training by AdamW at the rate ``lr``.
        eps: L∞ radius of an attacker at test time, in pixels from 0 to 1 or in standard deviations of a table's numbers, whose range and whole
            numbers it respects (:func:`robust_if.evaluations.threats.threat_of`); 0 for none.
    """
    if eps < 0:
        raise ValueError(f"eps: expected a number of at least 0, got {eps}")
    whole = read(train, label=label or None, id=id or None, truth=truth or None)
    rest, tested = (whole, _read(test, label, id)) if test else split_off(whole, test_fraction, seed, "test")[:2]
    rest, held = (rest, _read(valid, label, id)) if valid else split_off(rest, valid_fraction, seed, "validation")[:2]
    problem = Problem.of(rest, held, tested, model=model or usual(whole.kind), seed=seed)
    assert problem.test is not None
    parts = (rest, held, tested)
    training, validation, judged = (_pixels(data, part) for data, part in zip(parts, (problem.train, problem.valid, problem.test), strict=True))
    groups = _groups(sensitive, parts) if sensitive else {}
    recipe = Recipe(epochs=epochs, optimizer="adamw", lr=lr, batch_size=batch_size, seed=seed)
    threat = None
    if eps:  # images are pixels here, and not encoded
        threat = Threat(eps, bounds=(0.0, 1.0)) if whole.kind == "image" else threat_of(problem.encoder, rest, held, tested, eps=eps)
    scene = Scene(problem.task(), recipe, training, validation, judged, threat=threat, groups=groups, mislabelled=rest.mislabelled)
    if rest.truth is None or rest.truth.dtype == bool or not np.isin(rest.truth, problem.encoder.classes).all():
        return scene
    return Known(**vars(scene), right=np.searchsorted(problem.encoder.classes, rest.truth))


def _read(path: str, label: str, id: str) -> Dataset:  # noqa: A002
    return read(path, label=label or None, id=id or None)


def _pixels(data: Dataset, encoded: Samples) -> Samples:
    """Images as they are, and all else as encoded."""
    if isinstance(data.features, pd.DataFrame):
        return encoded
    return Samples((torch.from_numpy(data.features), encoded.labels), encoded.ids)


def _groups(column: str, parts: tuple[Dataset, Dataset, Dataset]) -> dict[str, Groups]:
    for data in parts:
        if not isinstance(data.features, pd.DataFrame) or column not in data.features:
            columns = list(data.features)[:20] if isinstance(data.features, pd.DataFrame) else "images"
            raise ValueError(f"sensitive: there is no column {column!r}; {data.path.name} has {columns}")
    first, *others = (data.features[[column]] for data in parts)  # type: ignore[index]
    known = at_least_two(Groups.of(first, name="sensitive"), "sensitive")
    valid, test = (known.of_others(each, name="sensitive") for each in others)
    return {"train": known, "valid": valid, "test": test}
