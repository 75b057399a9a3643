"""Scores of files: train or load a model, then any estimators for any targets, with or without a gradient index."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from robust_if.checkpoints import Checkpoint
from robust_if.diagnostics import predicted_correlation
from robust_if.estimators import LESS, Estimator, InnerProduct
from robust_if.evaluations.folder import claim
from robust_if.evaluations.question import Asked
from robust_if.groups import greedy as remove
from robust_if.pairs import pairwise
from robust_if.preconditioners import Identity
from robust_if.scores import Scores, table
from robust_if.store import Store
from robust_if.sweep import Sweep, fingerprint
from robust_if.targets import Target
from robust_if.task import Task
from robust_if.training import Recipe, train
from robust_if.writing import write_json


def score(
    asked: Asked,
    directory: Path,
    estimators: Sequence[Estimator],
    targets: Sequence[Target],
    *,
    model: Recipe | Path,
    sweep: Sweep = Sweep(),  # noqa: B008 - frozen
    index: Path | None = None,
    pairs: bool = False,
    greedy: int = 0,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Score every training sample, and write ``scores.parquet``, ``result.json`` and the model into ``directory``.

    Finished parts are kept under ``directory/work`` until all is done, so that the same call resumes after an interruption.

    Args:
        model: how the model is trained (``keep`` > 1 sums the scores over checkpoints, TracIn), or a trained one as a safetensors file.
        index: folder that :func:`build_index` wrote; its model and gradients are used, and ``model`` is not.
        pairs: also write ``pairs/matrix.npy``, the influence of every training sample (row) on every validation sample (column).
        greedy: how many samples to remove one after another, scoring the rest again each time: ``removal.csv`` with the predicted target. Both take
            the preconditioner of the first estimator that has one, and ``greedy`` the first target.

    Returns:
        The content of ``result.json``: per score its name, unit, seconds and notes, and the ``files``.
    """
    for estimator in estimators:
        estimator.check(asked.problem.task())
        if isinstance(estimator, LESS) and (index or not isinstance(model, Recipe) or model.optimizer != "adamw"):
            raise ValueError("estimator: less needs a model that is trained here by adamw, since it reads the optimiser's moments")
    if greedy < 0 or greedy >= len(asked.problem.train):
        raise ValueError(f"greedy: expected a number from 0 to {len(asked.problem.train) - 1}, got {greedy}")
    curvature = next((each.preconditioner for each in estimators if isinstance(each, InnerProduct)), Identity())
    if greedy and getattr(curvature, "damping", None) is None:
        raise ValueError("greedy: moving the parameters needs curvature with a damping of your choice, such as --estimator ekfac --damping 0.01")
    source = index / "model.safetensors" if index else model
    settings = (targets, source, sweep.precision, pairs, greedy)
    data = [fingerprint({}, asked.problem.train), *(fingerprint({}, part) for target in targets for part in target.held_out)]
    mark = fingerprint({}, asked.problem.train, repr(estimators), settings, asked.problem.model, asked.problem.seed, data, str(index))
    finished = claim(directory, mark, overwrite)
    if finished is not None:
        return finished
    sweep = replace(sweep, directory=directory / "work" / "parts")
    task, checkpoints = fitted(asked, source, directory / "work" / "model", sweep)
    Checkpoint.of(task.model).save(directory / "model.safetensors")
    store = Store.open(index / "gradients") if index else None
    advice = _advice(task, asked, estimators, targets, sweep)
    found: list[Scores] = []
    for estimator in estimators:
        # LESS needs what the optimiser remembers, which a checkpoint carries
        along = checkpoints if len(checkpoints) > 1 or isinstance(estimator, LESS) else []
        found += estimator.score(task, asked.problem.train, target=list(targets), checkpoints=along, sweep=sweep, index=None if along else store)
    frame = table(found)
    for each in found:
        if each.members is not None:
            frame[f"{each.name}:spread"] = each.spread()
    frame.to_parquet(directory / "scores.parquet", index=False)
    files = {"scores": directory / "scores.parquet", "model": directory / "model.safetensors"}
    if pairs:
        files["pairs"] = directory / "pairs" / "matrix.npy"
        plain = replace(sweep, engine="local", workers=None, precision="full", directory=None)
        pairwise(task, asked.problem.train, asked.problem.valid, preconditioner=curvature, directory=directory / "pairs", sweep=plain, index=store)
    if greedy:
        files["removal"] = directory / "removal.csv"
        removal = remove(task, asked.problem.train, greedy, target=targets[0], preconditioner=curvature, sweep=replace(sweep, directory=None))
        rows = {"id": removal.ids, f"{targets[0].name} predicted": removal.targets[1:]}
        pd.DataFrame(rows).to_csv(files["removal"], index=False)
    about = [{"name": each.name, "estimator": each.estimator, "target": each.target, "units": each.units, **each.provenance} for each in found]
    said = {name: str(path) for name, path in files.items()}
    result = {"scores": about, "n": len(asked.problem.train), "files": said, "warnings": list(asked.warnings), "advice": advice}
    write_json(directory / "result.json", result, default=str)
    shutil.rmtree(directory / "work", ignore_errors=True)
    return result


def _advice(task: Task, asked: Asked, estimators: Sequence[Estimator], targets: Sequence[Target], sweep: Sweep) -> dict[str, str]:
    """By target, how far the inner product is from the influence function, where nothing with curvature was asked for."""
    products = [each for each in estimators if isinstance(each, InnerProduct)]
    if not products or any(not isinstance(each.preconditioner, Identity) for each in products):
        return {}
    try:
        return {target.name: str(predicted_correlation(task, asked.problem.train, target, sweep=sweep)) for target in targets}
    except (ValueError, TypeError) as error:  # a zero gradient, or outputs that are not one tensor: there is nothing to predict
        return {"none": f"no advice on curvature: {error}"}


def build_index(asked: Asked, directory: Path, *, model: Recipe | Path, sweep: Sweep = Sweep()) -> Store:  # noqa: B008 - frozen
    """Train or load a model and write its factored gradients: ``directory`` then serves :func:`score` for any target. Resumes."""
    directory.mkdir(parents=True, exist_ok=True)
    trained, said = directory / "model.safetensors", directory / "question.json"
    if said.is_file() and type(asked.question).load(said) != _absolute(asked):
        raise ValueError(f"out: {directory} is the index of other data or of another model; choose another folder")
    if not said.is_file() and any(directory.iterdir()):
        raise ValueError(f"out: {directory} is not empty; choose another folder")
    asked.question.save(said)
    if not trained.is_file():
        task, _ = fitted(asked, replace(model, keep=1) if isinstance(model, Recipe) else model, directory / "work", sweep)
        Checkpoint.of(task.model).save(trained)
    shutil.rmtree(directory / "work", ignore_errors=True)
    return Store.build(asked.loaded(trained), asked.problem.train, directory / "gradients", sweep=sweep)


def _absolute(asked: Asked) -> Any:
    question = asked.question
    return replace(question, data=str(Path(question.data).resolve()), valid=str(Path(question.valid).resolve()) if question.valid else None)


def fitted(asked: Asked, model: Recipe | Path, directory: Path, sweep: Sweep) -> tuple[Task, list[Checkpoint]]:
    """The trained model, and the checkpoints that were kept on the way; none of a model that was loaded."""
    if isinstance(model, Path):
        return asked.loaded(model), []
    start = asked.problem.task()
    checkpoints = train(start, asked.problem.train, model, directory=directory, progress=sweep.progress)
    return start.at(checkpoints[-1].state), checkpoints
