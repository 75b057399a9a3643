"""What is asked of files: which data, which model, which targets."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path

import pandas as pd

from robust_if.attacks.evasion import PGD
from robust_if.attacks.targets import AdversarialLoss, RobustGap
from robust_if.checkpoints import load_checkpoint
from robust_if.evaluations.problem import Problem
from robust_if.evaluations.splits import split_off
from robust_if.evaluations.threats import threat_of
from robust_if.fairness.groups import Groups, at_least_two
from robust_if.fairness.notions import NOTIONS
from robust_if.fairness.targets import FairnessGap, fairness_gap
from robust_if.loading import Dataset, read
from robust_if.models import usual
from robust_if.targets import Target, Utility
from robust_if.task import Task
from robust_if.writing import write_json

#: The gaps between groups that classifiers have.
GAPS = tuple(name for name in NOTIONS if name != "mean_prediction_gap")
TARGETS = ("utility", "adversarial", "robust_gap", *GAPS)


@dataclass(frozen=True)
class Question:
    """Files and a model, in words that a command line and a JSON file can hold.

    Args:
        data: what is scored.
        label: column or array of the labels.
        id: column or array of the ids.
        truth: column or array with the true labels, for validation data that are split off.
        valid: checked samples in the same format; else ``valid_fraction`` of the data is split off.
        model: name of a ready model or ``module:function``; by the kind of data if it is not given.
        seed: draws the split and the model's initial parameters.
    """

    data: str
    label: str | None = None
    id: str | None = None
    truth: str | None = None
    valid: str | None = None
    valid_fraction: float = 0.1
    model: str | None = None
    seed: int = 0

    def save(self, path: Path) -> None:
        """Write the question as JSON, with absolute paths."""
        said = asdict(self) | {key: str(Path(value).resolve()) for key in ("data", "valid") if (value := getattr(self, key))}
        write_json(path, said)

    @classmethod
    def load(cls, path: Path) -> Question:
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: if the file is not there or is not a question.
        """
        try:
            said = json.loads(path.read_text())
            kinds: dict[str, tuple[type, ...]] = {"valid_fraction": (int, float), "seed": (int,), "data": (str,)}
            right = set(said) == {field.name for field in fields(cls)} and all(
                isinstance(value, kinds.get(key, (str, type(None)))) for key, value in said.items()
            )
        except (OSError, ValueError, TypeError, AttributeError):
            right = False
        if not right:
            raise ValueError(f"index: {path.parent} was not made by `robust-if index`: {path.name} is missing or broken")
        return cls(**said)

    def read(self) -> tuple[Dataset, Dataset, list[str]]:
        """Training and validation data, and warnings."""
        whole = read(self.data, label=self.label, id=self.id, truth=self.truth)
        if self.valid is not None:
            return whole, read(self.valid, label=self.label, id=self.id), []
        train, valid, warning = split_off(whole, self.valid_fraction, self.seed, "validation")
        return train, valid, [warning] if warning else []


@dataclass(frozen=True, eq=False)
class Asked:
    """A question whose data are read and encoded."""

    question: Question
    problem: Problem
    train: Dataset
    valid: Dataset
    warnings: Sequence[str] = ()

    @classmethod
    def of(cls, question: Question) -> Asked:
        """Read, encode and check everything; no long work."""
        train, valid, warnings = question.read()
        model = question.model or usual(train.kind)
        return cls(question, Problem.of(train, valid, model=model, seed=question.seed), train, valid, warnings)

    def loaded(self, path: Path) -> Task:
        """The model with the parameters of a checkpoint."""
        task = self.problem.task()
        return task.at(load_checkpoint(path, task.model).state)

    def targets(
        self, names: Sequence[str], *, sensitive: str | None = None, positive: str | None = None, eps: float = 0.1, steps: int = 10,
        immutable: Sequence[str] = (), categories: bool = False,
    ) -> list[Target]:  # fmt: skip
        """Targets on the validation data by name.

        Args:
            names: of :data:`TARGETS`.
            sensitive: a column, several separated by commas for their intersections, or ``column=value`` to compare one group with all others.
            positive: the label whose prediction is the benefit; the last one by default.
            eps: L∞ radius of the attack: of images a share of the pixel range, of tables in standard deviations.
            steps: of the attack, projected gradient ascent from the clean input.
            immutable: columns that the attack leaves alone, see :func:`robust_if.evaluations.threats.threat_of`.
            categories: whether the attack may change categories.

        Raises:
            ValueError: if a name is unknown or occurs twice, what it needs is missing, or a gap would be measured on the training data.
        """

        def attack() -> PGD:
            return PGD(threat_of(self.problem.encoder, self.train, self.valid, eps=eps, immutable=immutable, categories=categories), steps=steps)

        made: dict[str, Callable[[], Target]] = {
            "utility": lambda: Utility(self.problem.valid),
            "adversarial": lambda: AdversarialLoss(self.problem.valid, attack()),
            "robust_gap": lambda: RobustGap(self.problem.valid, attack()),
            **{name: partial(self._gap, name, sensitive, positive) for name in GAPS},
        }
        for name in names:
            if name not in made:
                raise ValueError(f"target: expected some of {', '.join(TARGETS)}, got {name!r}")
        if len(set(names)) < len(names) or not names:
            raise ValueError(f"target: expected each name once, got {', '.join(names) or 'none'}")
        found = [made[name]() for name in names]
        for target in found:
            target.check(self.problem.train)
        return found

    def _gap(self, notion: str, sensitive: str | None, positive: str | None) -> FairnessGap:
        if sensitive is None:
            raise ValueError(f"sensitive: {notion} needs a column, --sensitive sex, several, sex,race, or one group, race=White")
        classes = [str(each) for each in self.problem.encoder.classes]
        if positive is not None and positive not in classes:
            raise ValueError(f"positive: expected one of the labels {classes[:20]}, got {positive!r}")
        label = len(classes) - 1 if positive is None else classes.index(positive)
        return fairness_gap(notion, self.problem.valid, self._groups(sensitive), positive=label)

    def _groups(self, sensitive: str) -> Groups:
        column, _, group = sensitive.partition("=")
        features = self.valid.features
        known = list(features.columns) if isinstance(features, pd.DataFrame) else []
        names = [column] if group or column in known else [name.strip() for name in column.split(",")]
        unknown = [name for name in names if name not in known]
        if unknown or not isinstance(features, pd.DataFrame):
            raise ValueError(f"sensitive: there is no column {unknown[0]!r} in the validation data; the columns are {known[:20]}")
        groups = at_least_two(Groups.of(features[names], name="sensitive"), "sensitive")
        if not group:
            return groups
        values = [value for (value,) in groups.values]
        if group not in values:
            raise ValueError(f"sensitive: {group!r} is no value of {column!r}, which has {values[:20]}")
        return Groups.of({column: [value if value == group else f"not {group}" for value in (values[code] for code in groups.codes)]})
