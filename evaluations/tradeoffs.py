"""Several objectives at once, from a file to a page: one sweep scores all targets, removals that trade them off are tried, and each is verified.

Targets are measured on validation data to score and to choose, and anew on test data to verify: every choice is retrained from scratch with the same
recipe and seeds, and the retrained model is attacked again. Beside them stand no removal, and as many samples removed at random.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robust_if.checkpoints import Checkpoint
from robust_if.decisions import remove_top
from robust_if.estimators import Estimator
from robust_if.evaluations.folder import check_holds_none, claim
from robust_if.evaluations.problem import Problem
from robust_if.evaluations.question import TARGETS, Asked, Question
from robust_if.evaluations.traded import Measured, Objective, Verified, write
from robust_if.fairness.leaks import same_samples
from robust_if.loading import Dataset
from robust_if.objectives import Choice, conflicts, harmless, pareto
from robust_if.scores import Scores
from robust_if.sweep import Sweep, fingerprint
from robust_if.task import Task
from robust_if.training import Recipe, fit
from robust_if.writing import write_json

#: Targets that one run may have at most: a page of more pairs is not read.
MOST = 4


@dataclass(frozen=True, eq=False)
class TradeoffPlan:
    """What is traded off, and how that is verified.

    Args:
        train, valid, test: scored, what targets are measured on to choose, and what they are measured on to verify.
        targets: names of at least two and at most four of :data:`~robust_if.evaluations.question.TARGETS`.
        asks: what the targets need besides, as :meth:`~robust_if.evaluations.question.Asked.targets` takes it, such as ``sensitive`` and ``eps``.
        estimator: of the scores.
        remove: the share that every choice removes, or a number of samples, as text: ``"0.05"`` or ``"200"``.
        model: name of a ready model or ``module:function``.
        recipe: of every training.
        repeats: trainings with different seeds behind every verified number.
        seed: the first of them, and that of random removal.
        title, command, warnings: for the page.
    """

    train: Dataset
    valid: Dataset
    test: Dataset
    targets: tuple[str, ...]
    asks: Mapping[str, Any]
    estimator: Estimator
    remove: str = "0.05"
    model: str = "mlp"
    recipe: Recipe = field(default_factory=Recipe)
    repeats: int = 5
    seed: int = 0
    title: str = ""
    command: str = ""
    warnings: Sequence[str] = ()


def run(plan: TradeoffPlan, directory: Path, *, sweep: Sweep = Sweep(), overwrite: bool = False) -> dict[str, Any]:  # noqa: B008 - frozen
    """Carry a plan out, and write scores.parquet, choices.csv, result.json and report.html into ``directory``.

    Finished trainings and parts of the sweep are kept under ``directory/work`` until all is done, so that the same plan resumes.

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
    work = directory / "work"
    task = prepared.trained(np.ones(len(plan.train)), plan.seed, work, sweep)
    scores = plan.estimator.score(
        task, prepared.problem.train, target=[each.valid for each in prepared.objectives], sweep=replace(sweep, directory=work / "parts")
    )
    choices = candidates(scores, prepared.size)
    verified = prepared.verified(choices, work, sweep)
    settings = {
        "recipe": repr(plan.recipe), "repeats": plan.repeats, "seed": plan.seed, "remove": plan.remove,
        **{key: value for key, value in plan.asks.items() if value is not None and value != []},
        "estimator": scores[0].provenance.get("estimator", plan.estimator.name),
    }  # fmt: skip
    asked = {
        "title": plan.title, "data": str(plan.train.path), "model": plan.model, "estimator": plan.estimator.name, "units": scores[0].units,
        "n_valid": len(plan.valid), "n_test": len(plan.test), "command": plan.command, "warnings": list(plan.warnings), "settings": settings,
    }  # fmt: skip
    front = pareto(scores, k=prepared.size)
    Checkpoint.of(task.model).save(directory / "model.safetensors")
    result = write(directory, asked, plan.train, prepared.objectives, task, scores, conflicts(scores), front, verified, prepared.size)
    shutil.rmtree(work, ignore_errors=True)
    return result


def candidates(scores: Sequence[Scores], k: int) -> dict[str, Choice]:
    """The choices that are verified, by name: each target alone, the even mix, and each target as far as it harms no other.

    Those with the same weights are one choice that has all their names.
    """
    names = [each.target for each in scores]
    wanted = {f"{name} alone": pareto(scores, k=k, weightings=[[name == each for each in names]])[0] for name in names}
    wanted["even mix"] = pareto(scores, k=k, weightings=[[1] * len(names)])[0]
    wanted |= {f"{name} at no harm": harmless(scores, name, k=k) for name in names}
    merged: dict[bytes, tuple[str, Choice]] = {}
    for name, choice in wanted.items():
        key = choice.weights.tobytes()
        merged[key] = (f"{merged[key][0]}, {name}", merged[key][1]) if key in merged else (name, choice)
    return {name: choice for name, choice in merged.values() if choice.removed > 0}


@dataclass(frozen=True, eq=False)
class Prepared:
    """A plan whose data are encoded and whose targets are built: every check that needs no long work has passed."""

    plan: TradeoffPlan
    problem: Problem
    objectives: tuple[Objective, ...]
    size: int

    @classmethod
    def of(cls, plan: TradeoffPlan) -> Prepared:
        """Read, encode and check everything.

        Raises:
            ValueError: if something does not fit.
        """
        if not 2 <= len(plan.targets) <= MOST:
            raise ValueError(f"target: expected 2 to {MOST} of {', '.join(TARGETS)}, got {', '.join(plan.targets) or 'none'}")
        if plan.repeats < 1:
            raise ValueError(f"repeats: expected at least 1, got {plan.repeats}")
        if not plan.estimator.needs_target:
            raise ValueError(f"estimator: {plan.estimator.name} looks at no target, so it cannot tell one from another; take ip or ekfac")
        problem = Problem.of(plan.train, plan.valid, plan.test, model=plan.model, seed=plan.seed)
        assert problem.test is not None
        size = _size(plan.remove, len(plan.train), plan.train.ids)
        for other, name in ((problem.train, "training"), (problem.valid, "validation")):
            if same_samples(problem.test, other):
                raise ValueError(f"test: its samples are the {name} data; give samples that nothing was decided on")
        plan.estimator.check(problem.task())
        question = Question(str(plan.train.path), model=plan.model, seed=plan.seed)
        made = Asked(question, problem, plan.train, plan.valid).targets(plan.targets, **plan.asks)
        try:
            anew = Asked(question, replace(problem, valid=problem.test), plan.train, plan.test).targets(plan.targets, **plan.asks)
        except ValueError as error:
            raise ValueError(f"test: {error}") from None
        return cls(plan, problem, tuple(Objective(*each) for each in zip(made, anew, strict=True)), size)

    @property
    def mark(self) -> str:
        """What the run is known by."""
        plan = self.plan
        held = [fingerprint({}, part) for each in self.objectives for target in (each.valid, each.test) for part in target.held_out]
        said = {"train", "valid", "test", "title", "command", "warnings", "estimator", "asks"}
        settings = [getattr(plan, each.name) for each in fields(plan) if each.name not in said]
        return fingerprint({}, self.problem.train, str(plan.train.path.resolve()), repr(plan.estimator), sorted(plan.asks.items()), held, *settings)

    def trained(self, weights: NDArray[np.float64], seed: int, work: Path, sweep: Sweep) -> Task:
        """A model trained from scratch; the same weights and seed are trained once."""
        place = work / _name(weights, seed)
        recipe = replace(self.plan.recipe, seed=seed, keep=1)
        return fit(self.problem.task(seed), self.problem.train, recipe, weights=weights, directory=place, progress=sweep.progress)

    def verified(self, choices: Mapping[str, Choice], work: Path, sweep: Sweep) -> Verified:
        """Every target at models retrained on every choice, on no and on random removal."""
        n, seeds = len(self.problem.train), range(self.plan.seed, self.plan.seed + self.plan.repeats)
        weights = {"none": [np.ones(n)] * len(seeds)} | {name: [choice.weights] * len(seeds) for name, choice in choices.items()}
        # a stream of its own: the bare seed draws the split
        draws = [np.random.default_rng([seed, 6]).permutation(n) < self.size for seed in seeds]
        weights["random"] = [1 - drawn.astype(np.float64) for drawn in draws]
        jobs = [(name, seed, each) for name, every in weights.items() for seed, each in zip(seeds, every, strict=True)]
        measured: dict[str, list[Measured]] = {name: [] for name in weights}
        for name, seed, each in sweep.progress(jobs, "retrain and measure"):
            measured[name].append(self._measured(each, seed, work, replace(sweep, progress=lambda items, _: items)))
        return Verified(dict(choices), measured)

    def _measured(self, weights: NDArray[np.float64], seed: int, work: Path, sweep: Sweep) -> Measured:
        """Every objective on test data at a model trained from scratch; what was measured before is read."""
        path = work / f"{_name(weights, seed)}.json"
        if path.is_file():
            known: Measured = json.loads(path.read_text())
            return known
        task = self.trained(weights, seed, work, sweep)
        found = {each.name: each.measured(task) for each in self.objectives}
        write_json(path, found)
        if (weights != 1).any():  # the model of all samples is scored, and an interruption may need it again
            shutil.rmtree(work / _name(weights, seed))
        return found


def _name(weights: NDArray[np.float64], seed: int) -> str:
    return f"{hashlib.sha256(weights.tobytes()).hexdigest()[:24]}-{seed}"


def _size(remove: str, n: int, ids: NDArray[Any]) -> int:
    """How many samples to remove, from a share or a whole number.

    Raises:
        ValueError: if it is none of them, or nothing or everything is removed.
    """
    blank = Scores(np.zeros(n), ids, "check")
    try:
        weights = remove_top(blank, k=int(remove)) if remove.isdigit() else remove_top(blank, fraction=float(remove))
    except ValueError:
        weights = np.zeros(0)
    size = int(np.count_nonzero(weights == 0))
    if not 0 < size < n:
        raise ValueError(
            f"remove: expected a share between 0 and 1 such as 0.05, or a number of samples such as 200, that takes some and leaves some of {n}, "
            f"got {remove!r}"
        )
    return size
