"""The main job from end to end: train, score, decide, retrain, and prove that it helped.

Three splits always: the estimators see training and validation data, and the accuracy is measured on test data that nothing was tuned on. Every
retraining uses the same recipe and the same seeds, so that a difference comes from the data; removing as many samples at random, and removing exactly
the bad ones (where the truth is known), stand beside it.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robust_if.checkpoints import Checkpoint, load_checkpoint
from robust_if.decisions import automatic_threshold, relabel, remove_above, remove_top
from robust_if.estimators import LESS, Estimator, FlatMinima
from robust_if.estimators.named import named
from robust_if.evaluations.baselines import ConfidentLearning, NearestNeighbours, accuracy
from robust_if.evaluations.folder import claim, write
from robust_if.evaluations.plan import Outcome, Plan
from robust_if.evaluations.problem import Problem
from robust_if.scores import Scores
from robust_if.sweep import Progress, Sweep, fingerprint, silent
from robust_if.targets import Utility
from robust_if.task import Task
from robust_if.training import Recipe, fit
from robust_if.tuning import Tuning

#: Estimators that draw the model's parameters anew.
STARTS_AFRESH = frozenset({"label-odds", "valid-only", "confident-learning"})


def detectors(recipe: Recipe, seed: int = 0) -> dict[str, Estimator]:
    """Every estimator that a name on the command line stands for, with its published defaults."""
    core = [each for each in named(seed).values() if not isinstance(each, LESS)]  # which needs an optimiser's checkpoints
    found = [*core, ConfidentLearning(recipe, seed=seed), NearestNeighbours()]
    return {estimator.name: estimator for estimator in found}


def run(plan: Plan, directory: Path, *, progress: Progress = silent, overwrite: bool = False) -> dict[str, Any]:
    """Carry a plan out and write scores, a cleaned copy of the data, and the report into ``directory``.

    Finished steps are kept under ``directory/work`` until all is done, so that the same plan resumes after an interruption.

    Returns:
        The content of ``result.json``: ``detection``, ``accuracy``, ``removed``, ``files`` and what the report shows besides.

    Raises:
        ValueError: if the data or the plan are not fit to run; before any long work.
    """
    given = [plan.train.path, plan.valid.path, plan.test.path, *([plan.checkpoint] if plan.checkpoint else [])]
    for path in given:  # --overwrite would delete them
        if directory.resolve() in path.resolve().parents:
            raise ValueError(f"out: {directory} holds the data {path}; choose another folder")
    prepared = _Prepared.of(plan)
    finished = claim(directory, prepared.mark, overwrite)
    if finished is not None:
        return finished
    work = directory / "work"
    task = prepared.task if plan.checkpoint else prepared.trained(np.ones(len(plan.train)), plan.seed, work / "model", progress)
    Checkpoint.of(task.model).save(directory / "model.safetensors")
    scores = [_scored(estimator, task, prepared, work, progress) for estimator in prepared.estimators]
    weights, threshold, decision = decide(scores[0], plan.remove)
    suggested = scores[0].suggestions
    if suggested is None:
        suggested = _suggest(prepared, task, work, progress)
    runs = _accuracies(prepared, weights, suggested, work, progress)
    return write(directory, plan, Outcome(scores, weights, threshold, decision, prepared.problem.encoder.decode(suggested), runs))


def decide(scores: Scores, remove: str) -> tuple[NDArray[np.float64], float | None, str]:
    """Weights, threshold (where there is one) and a description, from ``"auto"``, a share, or a whole number without a point.

    Raises:
        ValueError: if ``remove`` is none of these, or out of range.
    """
    if remove == "auto":
        threshold = automatic_threshold(scores)
        return remove_above(scores, threshold), threshold, "automatic threshold"
    try:
        if remove.isdigit():
            return remove_top(scores, k=int(remove)), None, f"the highest {int(remove)}"
        return remove_top(scores, fraction=float(remove)), None, f"the highest {float(remove):.1%}"
    except ValueError:
        raise ValueError(
            f"remove: expected 'auto', a share from 0.0 to 1.0 such as 0.1, or a number of samples up to {len(scores)} such as 100, got {remove!r}"
        ) from None


@dataclass(frozen=True)
class _Prepared:
    """A plan whose data are encoded and whose model is built: every check that needs no long work has passed."""

    plan: Plan
    problem: Problem
    task: Task
    estimators: tuple[Estimator, ...]
    mark: str

    @classmethod
    def of(cls, plan: Plan) -> _Prepared:
        known = detectors(plan.recipe, plan.seed)
        unknown = [name for name in plan.estimators if name not in known]
        if unknown or not plan.estimators:
            raise ValueError(f"estimator: expected some of {', '.join(known)}, got {', '.join(unknown) or 'none'}")
        if len(set(plan.estimators)) < len(plan.estimators):
            raise ValueError(f"estimator: expected each name once, got {', '.join(plan.estimators)}")
        if plan.repeats < 1:
            raise ValueError(f"repeats: expected at least 1, got {plan.repeats}")
        if plan.remove != "auto" and not decide(Scores(np.zeros(len(plan.train)), plan.train.ids, "check"), plan.remove)[0].any():
            raise ValueError(f"remove: expected some of the {len(plan.train)} samples to stay, but {plan.remove} removes all")
        if "confident-learning" in plan.estimators and find_spec("cleanlab") is None:
            raise ImportError("estimator: confident-learning needs cleanlab, pip install 'robust-if[cleanlab]'")
        problem = Problem.of(plan.train, plan.valid, plan.test, model=plan.model, seed=plan.seed)
        if STARTS_AFRESH.intersection(plan.estimators):
            problem.tried(lambda task: task.reset(plan.seed))
        task = problem.task()
        for name in plan.estimators:
            known[name].check(task)
        if plan.checkpoint is not None:
            task = task.at(load_checkpoint(plan.checkpoint, task.model).state)
        assert problem.test is not None
        data = [fingerprint({}, problem.valid), fingerprint({}, problem.test), str(plan.train.path), _digest(plan.train.mislabelled)]
        settings = (plan.model, plan.estimators, plan.remove, plan.recipe, plan.repeats, plan.seed)
        mark = fingerprint(task.model.state_dict(), problem.train, data, *settings)
        return cls(plan, problem, task, tuple(known[name] for name in plan.estimators), mark)

    def trained(self, weights: NDArray[np.float64], seed: int, directory: Path, progress: Progress, labels: NDArray[np.int64] | None = None) -> Task:
        """A fresh model trained by the plan's recipe."""
        train = self.problem.train
        data = train if labels is None else train.with_labels(labels)
        return fit(self.problem.task(seed), data, replace(self.plan.recipe, seed=seed), weights=weights, directory=directory, progress=progress)


def _digest(mask: NDArray[np.bool_] | None) -> str:
    return "" if mask is None else hashlib.sha256(mask.tobytes()).hexdigest()


def _scored(estimator: Estimator, task: Task, prepared: _Prepared, work: Path, progress: Progress) -> Scores:
    """The scores of one estimator, from disk if they are there already."""
    path = work / f"scores-{estimator.name}.npz"
    if path.is_file():
        with np.load(path, allow_pickle=False) as file:
            suggestions = file.get("suggestions")
            return Scores(file["values"], prepared.problem.train.ids, suggestions=suggestions, **json.loads(str(file["about"])))
    sweep = Sweep(prepared.plan.batch_size, progress, work / "parts")
    scores = estimator.score(task, prepared.problem.train, target=Utility(prepared.problem.valid), sweep=sweep)
    about = {"estimator": scores.estimator, "target": scores.target, "units": scores.units, "provenance": dict(scores.provenance)}
    suggestions = {} if scores.suggestions is None else {"suggestions": scores.suggestions}
    part = path.with_suffix(".part.npz")
    np.savez(part, values=scores.values, about=json.dumps(about), **suggestions)
    os.replace(part, path)
    return scores


def _suggest(prepared: _Prepared, task: Task, work: Path, progress: Progress) -> NDArray[np.int64]:
    """The label of every sample with the smallest flat-minimum influence (Ye et al. 2025, relabelling)."""
    sweep = Sweep(prepared.plan.batch_size, progress, work / "parts")
    estimator, problem = FlatMinima(Tuning(seed=prepared.plan.seed)), prepared.problem
    candidates = estimator.candidates(task, problem.train, target=Utility(problem.valid), sweep=sweep)
    return np.asarray(candidates.argmin(1))


def _accuracies(
    prepared: _Prepared, weights: NDArray[np.float64], suggested: NDArray[np.int64], work: Path, progress: Progress
) -> dict[str, list[float]]:
    """Test accuracies of retrained models: before, after, random and oracle removal, and relabelling; one per seed."""
    plan, n, test = prepared.plan, len(prepared.problem.train), prepared.problem.test
    assert test is not None
    # A stream of its own: the bare seed may have drawn the noise itself, and would then remove exactly the bad samples.
    rng = np.random.default_rng([plan.seed, n])
    at_random = np.ones(n)
    at_random[rng.permutation(n)[: int((weights == 0).sum())]] = 0
    corrected = relabel(prepared.problem.train.labels, suggested, weights)
    variants: dict[str, tuple[NDArray[np.float64], NDArray[np.int64] | None]] = {
        "before": (np.ones(n), None),
        "after": (weights, None),
        "random": (at_random, None),
        "relabelled": (np.ones(n), corrected),
    }
    if plan.train.mislabelled is not None:
        variants["oracle"] = ((~plan.train.mislabelled).astype(np.float64), None)
    return {
        name: [
            accuracy(prepared.trained(w, plan.seed + repeat, work / f"{name}-{repeat}", progress, labels), test, plan.batch_size)
            for repeat in range(plan.repeats)
        ]
        for name, (w, labels) in variants.items()
    }
