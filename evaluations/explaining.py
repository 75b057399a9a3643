"""Which training samples made the model say it: influence on the margin of one prediction."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from robust_if.checkpoints import Checkpoint, load_checkpoint
from robust_if.data import Samples
from robust_if.estimators import Estimator
from robust_if.evaluations.baselines import predict
from robust_if.evaluations.folder import claim
from robust_if.evaluations.previews import preview
from robust_if.evaluations.problem import Problem
from robust_if.evaluations.report.explanation import render_explanation
from robust_if.loading import Dataset
from robust_if.predictions import PredictionMargin
from robust_if.scores import table
from robust_if.sweep import Sweep, fingerprint
from robust_if.task import Task
from robust_if.training import Recipe, train
from robust_if.writing import plain, write_json

#: The estimator where none is named: gradients compared layer by layer, so that no layer drowns the others.
ESTIMATOR = "ip-layer"
#: Of the training, over which scores are summed.
CHECKPOINTS = 5
#: Samples on either side that the result and the report show.
SHOWN = 24


def find(name: str, parts: dict[str, Dataset], train: Dataset) -> tuple[str, Dataset]:
    """The part that holds the sample called ``name``, and that sample alone.

    Args:
        name: an id as text.
        parts: the data that are searched, by name.
        train: for the message, where the id is that of a training sample.

    Raises:
        ValueError: if no part or more than one holds the id.
    """
    found = [(where, data, rows) for where, data in parts.items() if len(rows := np.flatnonzero(data.ids.astype(str) == name))]
    if len(found) > 1:
        raise ValueError(f"id: {name!r} is in {' and in '.join(where for where, _, _ in found)}; say which with --among")
    if not found:
        here = f"id: there is no {name!r} in {' or '.join(parts)}"
        first = [str(data.ids[0]) for data in parts.values()]
        trained = "; it is a training sample, and a prediction on one is explained by itself" if name in train.ids.astype(str) else ""
        raise ValueError(f"{here}{trained}; the first ids there are {', '.join(first)}")
    where, data, rows = found[0]
    return where, data.take(rows)


def _finished(run: Path) -> dict[str, Any]:
    try:
        result: dict[str, Any] = json.loads((run / "result.json").read_text(encoding="utf-8"))
        for name, kind in (("data", str), ("n_train", int), ("model", str), ("settings", dict)):
            if not isinstance(result[name], kind):
                raise TypeError(name)
        int(result["settings"]["seed"])
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"run: {run} holds no finished run of `robust-if detect`; result.json is missing or broken") from None
    return result


def seed_of(run: Path) -> int:
    """The seed of an earlier ``robust-if detect``, which drew its splits.

    Raises:
        ValueError: if the folder holds no finished run.
    """
    return int(_finished(run)["settings"]["seed"])


def used_by(run: Path, data: Dataset, train: Dataset) -> tuple[Path, str]:
    """Model file and name of the model of an earlier ``robust-if detect``.

    Raises:
        ValueError: if the folder holds no finished run, or one on other data.
    """
    result = _finished(run)
    if Path(result["data"]).resolve() != data.path.resolve() or result["n_train"] != len(train):
        raise ValueError(
            f"run: {run} was trained on {result['n_train']} samples of {result['data']}, these options give {len(train)} of {data.path}; pass the "
            "same --data, --truth, --valid, --test and shares as then"
        )
    return run / "model.safetensors", result["model"]


@dataclass(frozen=True, eq=False)
class Prediction:
    """A sample to explain.

    Args:
        sample: that one sample, as in its file.
        among: where it was found, such as ``"test"``.
        x: ``(1, …)`` encoded.
    """

    sample: Dataset
    among: str
    x: torch.Tensor

    @classmethod
    def of(cls, sample: Dataset, among: str, problem: Problem) -> Prediction:
        """The sample encoded; its label may be missing, or no class of the training data.

        Raises:
            ValueError: if it has other columns or another size than the training data.
        """
        try:
            encoded = problem.encoder.samples(replace(sample, labels=problem.encoder.classes[:1]))
        except ValueError as error:
            raise ValueError(f"{among}: {error}") from None
        return cls(sample, among, encoded.batch(slice(None))[0])


def explain(
    prediction: Prediction,
    problem: Problem,
    data: Dataset,
    directory: Path,
    estimator: Estimator,
    *,
    model: Recipe | Path,
    sweep: Sweep = Sweep(),  # noqa: B008 - frozen
    command: str = "",
    warnings: Sequence[str] = (),
    overwrite: bool = False,
) -> dict[str, Any]:
    """Score every training sample for the margin of one prediction, and write ``scores.parquet``, ``result.json`` and ``report.html``.

    A positive score says that leaving the sample out is predicted to make the model less sure of the class that it says.

    Args:
        prediction: what is explained.
        problem: the encoded training data and the untrained model.
        data: the training data as in their file.
        directory: where everything is written; unfinished work in it is resumed.
        estimator: of the influence.
        model: how the model is trained (``keep`` > 1 sums over checkpoints), or a trained one as a safetensors file.
        sweep: batch size and progress.
        command: what repeats this.
        warnings: what a reader should know.
        overwrite: whether an earlier run in ``directory`` is replaced.

    Returns:
        The content of ``result.json``: ``predicted``, ``true``, ``probability``, and the strongest training samples ``for`` and ``against``.

    Raises:
        ValueError: if the folder holds something else, or the estimator cannot serve the model.
    """
    for given in (data.path, prediction.sample.path, *([model] if isinstance(model, Path) else [])):
        if directory.resolve() in given.resolve().parents:  # --overwrite would delete it
            raise ValueError(f"out: {directory} holds {given}; choose another folder")
    estimator.check(problem.task())
    loaded = load_checkpoint(model, problem.task().model).state if isinstance(model, Path) else {}
    asked = Samples((prediction.x, torch.zeros(1, dtype=torch.int64)))
    mark = fingerprint(
        loaded, problem.train, fingerprint({}, asked), repr(estimator), model, problem.model, problem.seed, str(prediction.sample.ids[0])
    )
    finished = claim(directory, mark, overwrite)
    if finished is not None:
        return finished
    task, along = _model(problem, model, directory / "work", sweep)
    probabilities = predict(task, asked)[0]
    said = int(probabilities.argmax())
    target = PredictionMargin(asked.with_labels([said]))
    scores = estimator.score(
        task, problem.train, target=target, checkpoints=along, sweep=replace(sweep, directory=directory / "work" / "parts")
    )  # fmt: skip
    table([scores]).to_parquet(directory / "scores.parquet", index=False)
    Checkpoint.of(task.model).save(directory / "model.safetensors")

    def shown(i: int) -> dict[str, Any]:
        return {"id": plain(data.ids[i]), "label": plain(data.labels[i]), "score": float(scores.values[i]), **preview(data, i)}

    order = [int(i) for i in scores.order()]
    result = {
        "explanation": True,
        "id": plain(prediction.sample.ids[0]),
        "among": prediction.among,
        "true": plain(prediction.sample.labels[0]),
        "predicted": plain(problem.encoder.decode([said])[0]),
        "probability": float(probabilities[said]),
        "sample": preview(prediction.sample, 0),
        "for": [shown(i) for i in order[:SHOWN] if scores.values[i] > 0],
        "against": [shown(i) for i in order[::-1][:SHOWN] if scores.values[i] < 0],
        "data": str(data.path),
        "kind": data.kind,
        "model": problem.model,
        "n_train": len(data),
        "estimator": scores.estimator,
        "target": scores.target,
        "settings": {"estimator": scores.provenance["estimator"], "model": str(model), "seed": problem.seed},
        "seconds": scores.provenance["seconds"],
        "warnings": list(warnings),
        "command": command,
        "files": {name: str(directory / file) for name, file in (("scores", "scores.parquet"), ("report", "report.html"))},
    }
    write_json(directory / "result.json", result)
    render_explanation(directory)
    shutil.rmtree(directory / "work", ignore_errors=True)
    return result


def _model(problem: Problem, model: Recipe | Path, directory: Path, sweep: Sweep) -> tuple[Task, list[Checkpoint]]:
    """The trained model and the checkpoints on its way; none of a model that was given."""
    start = problem.task()
    if isinstance(model, Path):
        return start.at(load_checkpoint(model, start.model).state), []
    along = train(start, problem.train, model, directory=directory / "model", progress=sweep.progress)
    return start.at(along[-1].state), along if model.keep > 1 else []
