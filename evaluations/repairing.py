"""Repairing the training data of a file from end to end, as ``robust-if repair`` does it.

Three splits always: models are fitted to training data, what is changed and when to stop is decided on validation data, and test data are looked at
once, when all is decided. Logistic regression of two classes is fitted in closed form. Any other model is warm-started from round to round; what the
rounds found is then confirmed by training from scratch with several seeds, before and after.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from robust_if.data import Samples
from robust_if.estimators import InnerProduct
from robust_if.evaluations.auditing import columns, without
from robust_if.evaluations.folder import check_holds_none, claim
from robust_if.evaluations.problem import Problem
from robust_if.evaluations.repair_plan import CLOSED_FORM, RepairPlan
from robust_if.evaluations.repaired import Repaired, facts
from robust_if.evaluations.repaired_files import write
from robust_if.fairness.confusion import class_at
from robust_if.fairness.groups import Groups, at_least_two
from robust_if.fairness.leaks import same_samples
from robust_if.fairness.learners import Learner, Network
from robust_if.fairness.logistic import Logistic
from robust_if.fairness.repair import repair
from robust_if.fairness.rounds import decisions
from robust_if.fairness.targets import FairnessGap, fairness_gap
from robust_if.loading import Dataset
from robust_if.sweep import Progress, Sweep, fingerprint, silent
from robust_if.task import Task
from robust_if.training import fit

#: Cells of the validation data with fewer samples are drawn to the mean of all, by as many.
SMALLEST = 10
#: With fewer validation samples what a repair gains there transfers badly to other data.
FEW = 1000


def run(plan: RepairPlan, directory: Path, *, progress: Progress = silent, overwrite: bool = False) -> dict[str, Any]:
    """Carry a plan out, and write weights.csv, the repaired data, result.json and report.html into ``directory``.

    The same plan resumes after an interruption as far as trainings from scratch are concerned; the rounds before them start again.

    Returns:
        The content of ``result.json``.

    Raises:
        ValueError: if the data or the plan are not fit to run; nothing is left in ``directory`` then.
    """
    check_holds_none(directory, (plan.train.path, plan.valid.path, plan.test.path))
    prepared = Prepared.of(plan)
    finished = claim(directory, prepared.mark, overwrite)
    if finished is not None:
        return finished
    try:
        found = repair(
            prepared.learner, prepared.gaps, plan.action, bound=plan.bound, max_accuracy_loss=plan.max_accuracy_loss, rounds=plan.rounds,
            cost=plan.cost, progress=progress,
        )  # fmt: skip
        rounds = [decisions(each.fitted.task, prepared.test).numpy() for each in found.rounds]
        before, after = [rounds[0]], [rounds[found.chosen]]
        if isinstance(prepared.learner, Network):
            before = prepared.confirmed(found.rounds[0].weights, found.rounds[0].labels, directory / "work" / "before", progress)
            after = prepared.confirmed(found.weights, found.labels, directory / "work" / "after", progress) if found.chosen else before
        repaired = Repaired(
            found, prepared.learner, prepared.gaps, prepared.groups, prepared.strata, prepared.classes, prepared.positive, rounds, before, after,
            prepared.test.labels.numpy(), plan.train,
        )  # fmt: skip
        said = {**prepared.facts(), **facts(repaired, smallest=plan.smallest, seed=plan.seed)}
        said["warnings"] = [*prepared.warnings, *([found.unmet] if found.unmet else []), *said["warnings"]]
        return write(directory, said, found, plan.train, plan.train if plan.whole is None else plan.whole, prepared.problem.encoder)
    except ValueError:
        shutil.rmtree(directory)
        raise


@dataclass(frozen=True, eq=False)
class Prepared:
    """A plan whose data are encoded and whose gaps are built: every check that needs no long work has passed.

    Args:
        groups, strata: of ``"train"``, ``"valid"`` and ``"test"``, numbered alike in all of them.
        positive: number of the class whose prediction is the benefit; ``None`` compares each.
        test: encoded, in the precision of the model.
    """

    plan: RepairPlan
    problem: Problem
    learner: Learner
    gaps: tuple[FairnessGap, ...]
    groups: dict[str, Groups]
    strata: dict[str, Groups] | None
    positive: int | None
    test: Samples
    warnings: tuple[str, ...]

    @classmethod
    def of(cls, plan: RepairPlan) -> Prepared:
        """Read, encode and check everything.

        Raises:
            ValueError: if something does not fit.
        """
        plan.check()
        parts = {"train": plan.train, "valid": plan.valid, "test": plan.test}
        groups, sources = _grouped(parts, plan.sensitive, "sensitive")
        for name, each in groups.items():
            at_least_two(each, f"sensitive ({name})")
        strata = _grouped(parts, plan.control, "control")[0] if plan.control else None
        known = [without(part, sources) for part in parts.values()] if plan.without_sensitive else list(parts.values())
        problem = Problem.of(*known, model=plan.model, seed=plan.seed)
        assert problem.test is not None
        for other, name in ((problem.train, "training"), (problem.valid, "validation")):
            if same_samples(problem.test, other):
                raise ValueError(f"test: its samples are the {name} data; give samples that nothing was decided on")
        classes = problem.encoder.classes
        closed = plan.model == CLOSED_FORM and len(classes) == 2
        train, valid, test = (_double(each) if closed else each for each in (problem.train, problem.valid, problem.test))
        positive = _positive(classes, plan.positive)
        gaps = tuple(_gap(name, valid, groups["valid"], None if strata is None else strata["valid"], positive) for name in plan.targets)
        for gap in gaps:
            gap.check(train)
        learner: Learner
        if closed:
            x, y = train.batch(slice(None))
            learner = Logistic(x.numpy(), y.numpy(), plan.penalty, estimator=plan.estimator)
        else:
            learner = Network(
                problem.task(), train, replace(plan.recipe, seed=plan.seed), plan.estimator or InnerProduct(), sweep=Sweep(batch_size=128)
            )
        if plan.estimator is not None:
            plan.estimator.check(problem.task())
        warnings = (*plan.warnings, *_warned(gaps, groups, plan.smallest))
        return cls(plan, problem, learner, gaps, groups, strata, positive, test, warnings)

    @property
    def classes(self) -> NDArray[Any]:
        """The labels as in the file, by number."""
        return self.problem.encoder.classes

    @property
    def mark(self) -> str:
        """What the run is known by."""
        plan, problem = self.plan, self.problem
        assert problem.test is not None
        data = [fingerprint({}, each) for each in (problem.valid, problem.test)] + [each.codes.tolist() for each in self.groups.values()]
        data.append(self.classes.tolist())
        data += [] if self.strata is None else [each.codes.tolist() for each in self.strata.values()]
        said = {"train", "valid", "test", "title", "command", "warnings", "whole"}
        settings = [getattr(plan, each.name) for each in fields(plan) if each.name not in said]
        return fingerprint({}, problem.train, str(plan.train.path.resolve()), data, *settings)

    def confirmed(self, weights: NDArray[np.float64], labels: NDArray[np.int64], work: Path, progress: Progress) -> list[NDArray[np.int64]]:
        """Decisions on test data of models trained from scratch, one per seed; finished trainings are found again."""
        samples, found = self.problem.train.with_labels(labels), []
        for seed in range(self.plan.seed, self.plan.seed + self.plan.repeats):
            start: Task = self.problem.task(seed)
            recipe = replace(self.plan.recipe, seed=seed)
            task = fit(start, samples, recipe, weights=weights, directory=work.with_name(f"{work.name}-{seed}"), progress=progress)
            found.append(decisions(task, self.test).numpy())
        return found

    def facts(self) -> dict[str, Any]:
        """What was asked, for ``result.json``."""
        plan = self.plan
        closed = isinstance(self.learner, Logistic)
        estimator = plan.estimator.name if plan.estimator else "exact inverse Hessian" if closed else InnerProduct().name
        return {
            "repair": True, "title": plan.title, "data": str(plan.train.path), "kind": plan.train.kind, "closed_form": closed,
            "model": "logistic regression in closed form" if closed else plan.model, "estimator": estimator, "action": plan.action,
            "targets": list(plan.targets), "bound": plan.bound, "max_accuracy_loss": plan.max_accuracy_loss, "sensitive": list(plan.sensitive),
            "control": list(plan.control), "positive": None if self.positive is None else str(self.classes[self.positive]).strip(),
            "without_sensitive": plan.without_sensitive, "n_train": len(plan.train), "n_valid": len(plan.valid), "n_test": len(plan.test),
            "command": plan.command, "settings": {
                "penalty": plan.penalty if closed else None, "recipe": None if closed else repr(plan.recipe), "rounds": plan.rounds,
                "cost": plan.cost, "repeats": None if closed else plan.repeats, "smallest": plan.smallest, "seed": plan.seed,
            },
        }  # fmt: skip


def _grouped(parts: dict[str, Dataset], names: Sequence[str], option: str) -> tuple[dict[str, Groups], list[str]]:
    """The groups of every part, numbered alike, and the columns that they are made of."""
    frames, sources = zip(*(columns(part, names, option) for part in parts.values()), strict=True)
    together = Groups.of(pd.concat(frames, ignore_index=True), name=option)
    ends = np.cumsum([len(frame) for frame in frames])[:-1]
    codes = np.split(together.codes, ends)
    return {name: Groups(each, together.features, together.values) for name, each in zip(parts, codes, strict=True)}, sources[0]


def _positive(classes: NDArray[Any], name: str | None) -> int | None:
    """The number of the class called so; of the last of two where none is named, and ``None``, each, of more."""
    words = np.array([str(each).strip() for each in classes])
    if name is None:
        return 1 if len(classes) == 2 else None
    return class_at(words, name.strip())


def _double(samples: Samples) -> Samples:
    x, y = samples.batch(slice(None))
    return Samples((x.to(torch.float64), y), samples.ids)


def _gap(notion: str, valid: Samples, groups: Groups, strata: Groups | None, positive: int | None) -> FairnessGap:
    """The gap on validation data; small cells are drawn to the mean only where there are some."""
    gap = fairness_gap(notion, valid, groups, control_features=strata, positive=positive, shrink=SMALLEST)
    return gap if any(cell.n < SMALLEST for cell in gap.cells) else replace(gap, shrink=0.0)


def _warned(gaps: Sequence[FairnessGap], groups: dict[str, Groups], smallest: int) -> list[str]:
    said, n = [], len(gaps[0].data)
    if n < FEW:
        said.append(
            f"validation: {n:,} samples; with fewer than {FEW:,} a repair transfers badly, so trust the test figures and not those of validation"
        )
    names, seen = groups["train"].names, groups["train"].sizes > 0
    for part in ("validation", "test"):
        unseen = [names[at] for at in np.flatnonzero((groups["valid" if part == "validation" else part].sizes > 0) & ~seen)]
        if unseen:
            said.append(f"{part}: no training sample belongs to {'; '.join(unseen)}, so what the model says of them is a guess")
    for gap in gaps:
        small = [f"{cell.who}{cell.where} ({cell.n})" for cell in gap.cells if cell.n < smallest]
        if small:
            drawn = ", and rates are drawn to the mean of all" if gap.shrink else ""
            more = f" and {len(small) - 5} more" if len(small) > 5 else ""
            said.append(f"validation: {gap.notion} rests on few samples of {'; '.join(small[:5])}{more}{drawn}; the repair can hardly tell for them")
    return said
