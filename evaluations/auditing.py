"""The audit of a column of predictions, or of a model trained on the spot, as ``robust-if audit`` does it."""

from __future__ import annotations

import math
import operator
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from robust_if.checkpoints import load_checkpoint
from robust_if.data import Samples
from robust_if.evaluations.baselines import predict
from robust_if.evaluations.folder import GROUPS, check_holds_none, claim
from robust_if.evaluations.problem import Problem
from robust_if.evaluations.report.audit import render_audit
from robust_if.fairness.audit import Audit, audit
from robust_if.fairness.confusion import labels
from robust_if.fairness.groups import CODES, Groups, at_least_two
from robust_if.loading import Dataset
from robust_if.sweep import Progress, fingerprint, silent
from robust_if.training import Recipe, fit
from robust_if.writing import plain, write_json

_CUT = re.compile(r"(.+?)\s*(<=|>=|<|>)\s*([-+]?[0-9.]+)")
_COMPARE = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}


@dataclass(frozen=True)
class AuditPlan:
    """What is audited and how.

    Args:
        sensitive: columns of a table, or ``column<number`` (also ``<=``, ``>``, ``>=``), which has the values yes and no.
        control: the same for strata that are audited apart.
        positive: the label whose prediction is the benefit, as text; by default the last of two labels, and each of more.
        without_sensitive: whether the sensitive columns are kept from the model.
        smallest: groups with fewer samples are warned of.
        replicates: of the bootstrap.
        seed: of the bootstrap.
    """

    sensitive: tuple[str, ...]
    control: tuple[str, ...] = ()
    positive: str | None = None
    without_sensitive: bool = False
    smallest: int = 30
    replicates: int = 1000
    seed: int = 0


def columns(data: Dataset, names: Sequence[str], option: str) -> tuple[pd.DataFrame, list[str]]:
    """The features called so, one column each, and the columns of the file that they are made of.

    Raises:
        ValueError: if there is no such column, it has a missing value or too many values for groups, or one is named twice.
    """
    if not isinstance(data.features, pd.DataFrame):
        raise ValueError(f"{option}: expected a table, {data.path.name} holds images")
    if not names or len(set(names)) < len(names):
        raise ValueError(f"{option}: expected columns, each once, got {', '.join(names) or 'none'}")
    found: dict[str, Any] = {}
    sources = []
    for name in names:
        cut = None if name in data.features else _CUT.fullmatch(name)
        source = cut[1] if cut else name
        if source not in data.features:
            raise ValueError(f"{option}: there is no column {source!r} in {data.path.name}; the columns are {list(data.features.columns)[:20]}")
        found[name] = _cut(data.features[source], cut[2], cut[3], option) if cut else _groups(data.features[source], option)
        sources.append(source)
    return pd.DataFrame(found), sources


def _cut(column: pd.Series[Any], sign: str, number: str, option: str) -> NDArray[Any]:
    try:
        bound = float(number)
    except ValueError:
        raise ValueError(f"{option}: expected a number after {column.name}{sign}, got {number!r}") from None
    if not pd.api.types.is_numeric_dtype(column) or column.isna().any():
        what = f"{column.isna().sum()} missing values" if pd.api.types.is_numeric_dtype(column) else "values that are no numbers"
        raise ValueError(f"{option}: {column.name}{sign}{number} needs numbers in every row, {column.name!r} has {what}")
    return np.where(_COMPARE[sign](column.to_numpy(dtype=np.float64), bound), "yes", "no")


def _groups(column: pd.Series[Any], option: str) -> pd.Series[Any]:
    values, numbers = column.nunique(), pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column)
    most = CODES if numbers else GROUPS
    if values > most:
        hint = f"cut it, for example '{column.name}<{column.median():g}'" if numbers else "join them first"
        raise ValueError(f"{option}: expected at most {most} groups, {column.name!r} has {values} values; {hint}")
    return column


def without(data: Dataset, names: Sequence[str]) -> Dataset:
    """The same samples without some columns.

    Raises:
        ValueError: if no column is left.
    """
    assert isinstance(data.features, pd.DataFrame)
    kept = [column not in names for column in data.features]
    if not any(kept):
        raise ValueError(f"without-sensitive: {data.path.name} has no column besides {', '.join(names)}")
    return replace(data, features=data.features.loc[:, kept], changed=data.changed[:, kept])


def audit_column(data: Dataset, column: str, plan: AuditPlan, directory: Path, *, command: str = "", overwrite: bool = False) -> dict[str, Any]:
    """Audit the predictions that stand in a column beside the labels, in every row; arguments, result and errors as in :func:`audit_model`."""
    if not isinstance(data.features, pd.DataFrame) or column not in data.features:
        known = list(data.features.columns)[:20] if isinstance(data.features, pd.DataFrame) else "none, it holds images"
        raise ValueError(f"prediction: there is no column {column!r} in {data.path.name}; the columns are {known}")
    if plan.without_sensitive:
        raise ValueError("without-sensitive: it is about a model that is trained; a column of predictions has none")
    predicted, y = (_stripped(labels(values, name)) for values, name in ((data.features[column], "prediction"), (data.labels, "label")))
    unknown = np.setdiff1d(predicted, y) if predicted.dtype.kind == y.dtype.kind else np.unique(predicted)
    if len(unknown):
        raise ValueError(f"prediction: {unknown[:5].tolist()} in {column!r} are not among the labels {np.unique(y)[:20].tolist()}")
    found = _audited(data, predicted, plan, np.unique(y))
    _claim(directory, [data], fingerprint({}, Samples((torch.arange(len(data)),), data.ids), data.path.resolve(), column, plan), overwrite)
    return _write(data, predicted, found, plan, directory, {"prediction": column, "model": None, "n_train": None}, (), command)


def audit_model(
    train: Dataset,
    valid: Dataset,
    test: Dataset,
    plan: AuditPlan,
    directory: Path,
    *,
    name: str,
    model: Recipe | Path,
    seed: int = 0,
    progress: Progress = silent,
    warnings: Sequence[str] = (),
    command: str = "",
    overwrite: bool = False,
) -> dict[str, Any]:
    """Train a ready model and audit what it says of held-out test rows; writes audit.csv, gaps.csv, audit.json and audit.html.

    Args:
        train: training samples.
        valid: kept apart, so that the model is the one that ``detect`` trains from the same options.
        test: the rows that are audited.
        plan: what is audited.
        directory: where everything is written.
        name: of the model.
        model: how it is trained, or a trained one as a safetensors file.
        seed: of its initial parameters.
        progress: of the training.
        warnings: what a reader should know.
        command: what repeats this.
        overwrite: whether an earlier audit in ``directory`` is replaced.

    Returns:
        The content of ``audit.json``.

    Raises:
        ValueError: before any training, if a column or label is not there, a column makes no groups, or the folder holds something else.
    """
    features, sources = columns(test, plan.sensitive, "sensitive")
    at_least_two(Groups.of(features, name="sensitive"))
    if plan.control:
        columns(test, plan.control, "control")
    _positive(np.unique(np.concatenate([_stripped(each.labels) for each in (train, test)])), plan.positive)
    parts = [without(part, sources) for part in (train, valid, test)] if plan.without_sensitive else [train, valid, test]
    problem = Problem.of(*parts, model=name, seed=seed)
    assert problem.test is not None
    task = problem.task()
    state = load_checkpoint(model, task.model).state if isinstance(model, Path) else {}
    _claim(directory, [train, test], fingerprint(state, problem.test, fingerprint({}, problem.train), model, name, seed, plan), overwrite)
    trained = task.at(state) if isinstance(model, Path) else fit(task, problem.train, model, directory=directory / "work", progress=progress)
    predicted = _stripped(problem.encoder.decode(predict(trained, problem.test).argmax(1)))
    found = _audited(test, predicted, plan, _stripped(problem.encoder.classes))
    facts: dict[str, Any] = {"prediction": None, "model": name, "n_train": len(train)}
    if isinstance(model, Path):
        facts |= {"model": f"{name}, {model}", "n_train": None}
        warnings = [*warnings, f"{model.name} was trained elsewhere; whether the audited rows were among its training samples is not known."]
    said = _write(test, predicted, found, plan, directory, facts, warnings, command)
    shutil.rmtree(directory / "work", ignore_errors=True)
    return said


def _claim(directory: Path, data: Sequence[Dataset], mark: str, overwrite: bool) -> None:
    check_holds_none(directory, [part.path for part in data])
    if (directory / "audit.json").exists() and not overwrite:
        raise ValueError(f"out: {directory} holds an earlier audit; choose another folder, or pass --overwrite")
    claim(directory, mark, overwrite)


def _stripped(values: NDArray[Any]) -> NDArray[Any]:
    """Labels without the blanks that some files put before strings."""
    return np.char.strip(values) if values.dtype.kind == "U" else values


def _positive(classes: NDArray[Any], name: str | None) -> Any:
    """The class called so; the last of two where none is named, and ``None``, each, of more."""
    if name is None:
        return classes[-1].item() if len(classes) == 2 else None
    found = [label for label in classes.tolist() if str(label) == name.strip()]
    if not found:
        raise ValueError(f"positive: expected one of the labels {classes[:20].tolist()}, got {name!r}")
    return found[0]


def _audited(data: Dataset, predicted: NDArray[Any], plan: AuditPlan, classes: NDArray[Any]) -> Audit:
    return audit(
        _stripped(data.labels), predicted, columns(data, plan.sensitive, "sensitive")[0],
        control_features=columns(data, plan.control, "control")[0] if plan.control else None,
        positive=_positive(labels(classes, "label"), plan.positive), classes=classes.tolist(), replicates=plan.replicates, smallest=plan.smallest,
        seed=plan.seed,
    )  # fmt: skip


def _write(
    data: Dataset,
    predicted: NDArray[Any],
    found: Audit,
    plan: AuditPlan,
    directory: Path,
    facts: Mapping[str, Any],
    warnings: Sequence[str],
    command: str,
) -> dict[str, Any]:
    found.rates.to_csv(directory / "audit.csv", index=False)
    found.gaps.to_csv(directory / "gaps.csv", index=False)
    positives = found.rates["positive"].unique().tolist()
    files = {name: str(directory / file) for name, file in (("rates", "audit.csv"), ("gaps", "gaps.csv"), ("report", "audit.html"))}
    result = {
        "data": str(data.path), "n": len(data), **facts, "positive": positives[0] if len(positives) == 1 else None, "positives": positives,
        "accuracy": float((_stripped(data.labels) == predicted).mean()), "level": found.level, "settings": asdict(plan),
        "rates": _records(found.rates), "gaps": _records(found.gaps), "warnings": [*warnings, *found.warnings], "command": command, "files": files,
    }  # fmt: skip
    write_json(directory / "audit.json", result)
    render_audit(directory)
    return result


def _records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows as JSON can hold them, with ``None`` for NaN."""
    return [
        {str(key): None if isinstance(value, float) and math.isnan(value) else plain(value) for key, value in row.items()}
        for row in frame.to_dict("records")
    ]  # fmt: skip
