"""The robust accuracy of a model trained on the spot, or of a trained one, as ``robust-if robustness`` measures it: from files to files."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from robust_if.attacks.evasion import Norm
from robust_if.checkpoints import Checkpoint, load_checkpoint
from robust_if.data import Samples
from robust_if.evaluations.baselines import predict
from robust_if.evaluations.folder import check_holds_none, claim
from robust_if.evaluations.problem import Problem
from robust_if.evaluations.robustness import Preset, RobustAccuracy, check, robust_accuracy
from robust_if.evaluations.threats import threat_of
from robust_if.loading import Dataset
from robust_if.sweep import Progress, fingerprint, silent
from robust_if.training import Recipe, fit
from robust_if.writing import plain, write_json

#: Samples that are attacked at a time: few, so that progress shows and little is lost by an interruption.
BATCH = 64


def measure(
    train: Dataset,
    valid: Dataset,
    test: Dataset,
    directory: Path,
    *,
    name: str,
    model: Recipe | Path,
    eps: float,
    norm: Norm = "linf",
    preset: Preset = "standard",
    immutable: Collection[str] = (),
    categories: bool = False,
    samples: int | None = None,
    checks: bool = True,
    seed: int = 0,
    progress: Progress = silent,
    warnings: Sequence[str] = (),
    command: str = "",
    overwrite: bool = False,
) -> dict[str, Any]:
    """Train a ready model and attack it on held-out test samples; writes samples.parquet, result.json and model.safetensors.

    Args:
        train: training samples.
        valid: kept apart, so that the model is the one that ``detect`` trains from the same options.
        test: the samples that are attacked.
        directory: where everything is written; the same call resumes there.
        name: of the model.
        model: how it is trained, or a trained one as a safetensors file.
        eps: of images a share of the pixel range, of tables in standard deviations; see :func:`robust_if.evaluations.threats.threat_of`.
        norm: ``"linf"`` or ``"l2"``.
        preset: which attacks.
        immutable: columns of a table that the attacker cannot change.
        categories: whether categories may change.
        samples: how many test samples are drawn; all by default.
        checks: whether to look for signs that the number is too high.
        seed: of the model's initial parameters, and of the samples that are drawn.
        progress: of the training and the attacks.
        warnings: what a reader should know.
        command: what repeats this.
        overwrite: whether an earlier run in ``directory`` is replaced.

    Returns:
        The content of ``result.json``.

    Raises:
        ValueError: before any training, if the data, the model, the threat or the number of samples do not fit, or the folder holds something else.
    """
    if samples is not None and samples < 1:
        raise ValueError(f"samples: expected at least 1, got {samples}")
    problem = Problem.of(train, valid, test, model=name, seed=seed)
    assert problem.test is not None
    threat = threat_of(problem.encoder, train, test, eps=eps, norm=norm, immutable=immutable, categories=categories)
    drawn = np.arange(len(test))
    if samples is not None and samples < len(test):
        drawn = np.sort(np.random.default_rng(seed).choice(len(test), samples, replace=False))
    attacked, task = problem.test.take(drawn), problem.task()
    check(task, attacked, threat, preset)
    state = load_checkpoint(model, task.model).state if isinstance(model, Path) else {}
    settings = (model, name, seed, threat, preset, checks)
    check_holds_none(directory, (train.path, test.path))
    finished = claim(directory, fingerprint(state, attacked, fingerprint({}, problem.train), *settings), overwrite)
    if finished is not None:
        return finished
    work = directory / "work"
    trained = task.at(state) if isinstance(model, Path) else fit(task, problem.train, model, directory=work / "training", progress=progress)
    unit = "of the pixel range" if train.kind == "image" else "standard deviations"
    found = robust_accuracy(
        trained, attacked, threat, preset=preset, batch_size=BATCH, checks=checks, radius=f"{eps:g} {unit}", progress=progress,
        directory=work / "attacks",
    )  # fmt: skip
    notes = list(warnings)
    if isinstance(model, Path):
        notes.append(f"{model.name} was trained elsewhere; whether the test samples were among its training samples is not known.")
    if len(drawn) < len(test):
        notes.append(f"{len(drawn)} of {len(test)} test samples were drawn; the intervals say how far others may move the numbers.")
    if problem.encoder.dropped:
        notes.append(f"Columns not used: {', '.join(problem.encoder.dropped)}.")
    files = {"samples": "samples.parquet", "result": "result.json"} | ({} if isinstance(model, Path) else {"model": "model.safetensors"})
    if not isinstance(model, Path):
        Checkpoint.of(trained.model).save(directory / files["model"])
    _table(problem, trained, attacked, found, test.take(drawn)).to_parquet(directory / files["samples"], index=False)
    result = {
        "data": str(test.path), "kind": train.kind, "model": name if isinstance(model, Recipe) else f"{name}, {model}",
        "n_train": len(train) if isinstance(model, Recipe) else None, "n_test": len(test), "eps": eps, "norm": norm, "seed": seed,
        "immutable": list(immutable), "categories": categories, **found.record(), "warnings": notes, "command": command,
        "files": {what: str(directory / file) for what, file in files.items()},
    }  # fmt: skip
    write_json(directory / "result.json", result, plain)
    shutil.rmtree(work, ignore_errors=True)
    return result


def _table(problem: Problem, task: Any, samples: Samples, found: RobustAccuracy, test: Dataset) -> pd.DataFrame:
    """One row per attacked sample."""
    said = torch.from_numpy(predict(task, samples).argmax(1))
    columns = {"id": found.ids, "label": test.labels, "predicted": problem.encoder.decode(said)}
    return pd.DataFrame({**columns, "right": found.right, "robust": found.robust, "broken_by": found.broken_by})
