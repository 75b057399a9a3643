"""Triggered inputs at hand: read from a file, encoded, and split into those the target sees and those the attack's success is measured on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from robust_if.attacks.success import AttackSuccess
from robust_if.data import Samples
from robust_if.decisions import threshold_at
from robust_if.encoding import Encoder
from robust_if.estimators import Estimator, LossChange
from robust_if.evaluations.calibration import calibrated
from robust_if.evaluations.plan import Suspicion
from robust_if.formats.images import from_array
from robust_if.formats.npz import FEATURES
from robust_if.formats.parts import Kind
from robust_if.loading import Dataset, read
from robust_if.scores import Scores
from robust_if.sweep import Sweep
from robust_if.targets import Utility
from robust_if.task import Task

#: Gives the scores of the verdict "poisoned": what the model forgets when it unlearns the attack.
ESTIMATOR: Estimator = LossChange()
#: Share of clean samples that the threshold may flag, where the validation samples are enough to promise it.
FALSE_POSITIVES = 0.01
#: So many triggered inputs are split into two halves; fewer serve for both.
ENOUGH = 10


@dataclass(frozen=True, eq=False)
class Suspected:
    """Encoded triggered inputs and the goal class.

    Args:
        seen: what the target looks at.
        held_out: what success is measured on, with true labels.
        goal: the goal class, as the model numbers it.
        false_positives: share of clean samples that may be flagged; as small as can be promised from 1 % on by default.
        shared: whether both are the same inputs.
        warnings: what a reader should know of them.
    """

    seen: Samples
    held_out: Samples
    goal: int
    false_positives: float | None
    shared: bool
    warnings: tuple[str, ...]

    def scores(self, task: Task, train: Samples, valid: Samples, sweep: Sweep) -> Scores:
        """Of every training sample, how much its loss rises when the model unlearns the attack and keeps what it says of validation samples.

        Samples that carry the goal class stand above all others. One half of the validation samples holds the model, the other one calibrates the
        threshold, which the provenance keeps with the share of false positives that it promises.
        """
        held, clean = _halves(valid)
        share = self.promised(valid)
        target = AttackSuccess(self.seen, goal_class=self.goal) + Utility(held)
        found, threshold = calibrated(
            ESTIMATOR, task, train, target=target, clean=clean, false_positives=share, goal_class=self.goal, sweep=sweep
        )  # fmt: skip
        return replace(found, target="attack-success", provenance={**found.provenance, "threshold": threshold, "false_positives": share})

    def promised(self, valid: Samples) -> float:
        """The share of false positives that the threshold promises: the one asked for, or as close to 1 % as the validation samples allow.

        Raises:
            ValueError: if these are too few for what was asked.
        """
        _, clean = _halves(valid)
        if self.false_positives is None:
            return max(FALSE_POSITIVES, 1 / (len(clean) + 1))
        try:
            threshold_at(Scores(np.zeros(len(clean)), clean.ids, "check"), self.false_positives)
        except ValueError as error:
            hint = "" if "strictly" in str(error) else "; half of the validation samples calibrate: give more, or allow a larger share"
            raise ValueError(f"max-false-positives: {str(error).partition(': ')[2]}{hint}") from None
        return self.false_positives

    @classmethod
    def of(cls, suspicion: Suspicion, encoder: Encoder, train: Samples, seed: int) -> Suspected:
        """The triggered inputs of a suspicion.

        Args:
            encoder: the one learnt from the training data.
            train: the encoded training data, none of which may be among the inputs.
            seed: draws the two halves.

        Raises:
            ValueError: if the goal class is no class of the data, the inputs have other columns or another size, or they are training samples.
        """
        classes = [str(each) for each in encoder.classes.tolist()]
        if suspicion.goal_class not in classes:
            raise ValueError(f"goal-class: expected a class of the training data, {', '.join(classes[:20])}, got {suspicion.goal_class!r}")
        goal, given = classes.index(suspicion.goal_class), suspicion.inputs
        try:
            x = encoder.samples(replace(given, labels=np.full(len(given), encoder.classes[goal]))).batch(slice(None))[0]
        except ValueError as error:
            raise ValueError(f"attack-inputs: {error}") from None
        true = np.array([classes.index(str(label)) if str(label) in classes else -1 for label in given.labels.tolist()])
        warnings = []
        if (true == goal).all():
            warnings.append("All attack inputs are labelled with the goal class; that is taken for the attacker's label and not for the true one.")
            true = np.full(len(true), -1)
        elif (true == goal).any():
            warnings.append(f"{(true == goal).sum()} attack inputs are truly of the goal class, so they cannot show an attack and were left out.")
        inputs = Samples((x, torch.from_numpy(true)), given.ids)
        known = _known(inputs, train, given.kind)
        if known.any():
            warnings.append(f"{known.sum()} attack inputs are alike with a training sample in all columns, and were left out.")
        useful = (true != goal) & ~known
        if not useful.any():
            raise ValueError("attack-inputs: expected one that is not of the goal class and not in the training data, got none")
        return cls._split(inputs.take(useful), goal, suspicion.false_positives, seed, warnings)

    @classmethod
    def _split(cls, inputs: Samples, goal: int, false_positives: float | None, seed: int, warnings: list[str]) -> Suspected:
        n = len(inputs)
        if n < ENOUGH:
            warnings.append(
                f"Only {n} attack inputs were given, too few to split: attack success was measured on the very inputs that the scores had seen, "
                f"so it may fall more than it would on others. Give {ENOUGH} or more."
            )
            return cls(inputs, inputs, goal, false_positives, True, tuple(warnings))
        order = np.random.default_rng([seed, n]).permutation(n)
        return cls(inputs.take(np.sort(order[: n // 2])), inputs.take(np.sort(order[n // 2 :])), goal, false_positives, False, tuple(warnings))


def _halves(valid: Samples) -> tuple[Samples, Samples]:
    """What the target holds fast, and what calibrates; drawn, since a file may be sorted by class."""
    order = np.random.default_rng(len(valid)).permutation(len(valid))
    return valid.take(np.sort(order[: len(valid) // 2])), valid.take(np.sort(order[len(valid) // 2 :]))


def _known(inputs: Samples, train: Samples, kind: Kind) -> NDArray[np.bool_]:
    """Which inputs have the content of a training sample, ``(n,)``: it would be found by being itself, and its success says nothing of the attack.

    Raises:
        ValueError: if there are any; among the rows of a table, where some may be alike by chance, if they are half or more.
    """
    contents = {row.tobytes(): name for row, name in zip(train.batch(slice(None))[0].numpy(), train.ids.tolist(), strict=True)}
    twins = [contents.get(row.tobytes()) for row in inputs.batch(slice(None))[0].numpy()]
    known = np.array([twin is not None for twin in twins])
    if known.any() and (kind != "table" or known.mean() >= 0.5):
        first = int(known.argmax())
        raise ValueError(
            f"attack-inputs: {known.sum()} of {len(inputs)} have the content of a training sample, first id {inputs.ids[first]} that of "
            f"{twins[first]}; give inputs that are not in the training data"
        )
    return known


def read_inputs(
    path: Path,
    like: Dataset,
    *,
    label: str | None = None,
    id: str | None = None,  # noqa: A002
    name: str = "attack-inputs",
) -> Dataset:
    """Inputs in the format of the data ``like``; tables and archives may lack the labels, which are then empty.

    Args:
        name: of the option that gave the path, for messages.

    Raises:
        FileNotFoundError: if there is nothing at ``path``.
        ValueError: if it cannot be read.
    """
    try:
        return read(path, label=label, id=id)
    except ValueError as error:
        if not str(error).startswith("label: "):
            raise ValueError(f"{name}: {error}") from None
        features = _features(path, like, name)
        if features is None:
            raise ValueError(f"{name}: {error}") from None
    n = len(features)
    if n == 0:
        raise ValueError(f"{name}: {path} holds no sample")
    named = id or "id"
    ids = features[named].to_numpy() if isinstance(features, pd.DataFrame) and named in features and named not in like.features else np.arange(n)
    rows = like.take(np.zeros(n, dtype=np.int64))  # for what else a data set has; none of it is used
    return replace(rows, features=features, labels=np.full(n, ""), ids=ids, path=path, truth=None, rows=np.arange(n))


def _features(path: Path, like: Dataset, option: str) -> Any:
    """The features in a file without labels; ``None`` in a format that always has them."""
    name = path.name.lower()
    if name.endswith((".csv", ".csv.gz")):
        return pd.read_csv(path, encoding="utf-8-sig", low_memory=False)
    if name.endswith(".parquet"):
        return pd.read_parquet(path)
    if not name.endswith(".npz"):
        return None
    with np.load(path, allow_pickle=False) as archive:
        found = next((archive[each] for each in archive.files if each.lower() in FEATURES), None)
    if found is None or not isinstance(like.features, pd.DataFrame):
        return None if found is None else from_array(found, option)
    table = found.reshape(len(found), -1)
    if table.shape[1] != like.features.shape[1]:
        raise ValueError(f"{option}: expected {like.features.shape[1]} features as in training, got {table.shape[1]}")
    return pd.DataFrame(table, columns=like.features.columns)


def with_truth(data: Dataset, path: Path) -> Dataset:
    """The data with a truth that stands in a table of its own, as ``robust-if attack`` writes it: the columns ``id`` and ``poisoned``.

    Raises:
        ValueError: if a column is missing, ``poisoned`` is not boolean, or its ids are not those of the data, each once.
    """
    truth = pd.read_parquet(path) if path.name.lower().endswith(".parquet") else pd.read_csv(path)
    lacking = [name for name in ("id", "poisoned") if name not in truth]
    if lacking or truth["poisoned"].dtype != bool:
        raise ValueError(f"truth: {path} needs a column id and a boolean column poisoned, it has {dict(truth.dtypes.astype(str))}")
    marked = dict(zip(truth["id"].astype(str), truth["poisoned"], strict=True))
    names = data.ids.astype(str).tolist()
    if len(marked) < len(truth) or set(marked) != set(names):
        raise ValueError(f"truth: {path} holds {len(truth)} ids, expected the {len(names)} of {data.path}, each once")
    return replace(data, truth=np.array([marked[name] for name in names], dtype=bool))
