"""The main job from end to end: train, score, decide, retrain, and prove that it helped.

Three splits always: the estimators see training and validation data, and the accuracy is measured on test data that nothing was tuned on. Every
retraining uses the same recipe and the same seeds, so that a difference comes from the data; removing as many samples at random, and removing exactly
the bad ones (where the truth is known), stand beside it. Who holds triggered inputs gets two verdicts, "poisoned" and "harms utility", each by scores
of its own; only the first one removes.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robust_if.checkpoints import Checkpoint, load_checkpoint
from robust_if.decisions import automatic_threshold, relabel, remove_above, remove_top
from robust_if.estimators import LESS, Estimator, FlatMinima, Unlearning
from robust_if.estimators.named import named
from robust_if.evaluations.baselines import ConfidentLearning, NearestNeighbours, accuracy, predict
from robust_if.evaluations.calibration import remove_until_ended
from robust_if.evaluations.detectors import poison_detectors
from robust_if.evaluations.folder import check_holds_none, claim, groups, write
from robust_if.evaluations.plan import Outcome, Plan, Verdicts
from robust_if.evaluations.poisoning import WORKS, attack_success, clean_model
from robust_if.evaluations.problem import Problem
from robust_if.evaluations.suspicion import ESTIMATOR, Suspected, blind_scores, promising
from robust_if.scores import Scores
from robust_if.sweep import Progress, Sweep, fingerprint, silent
from robust_if.targets import Target, Utility
from robust_if.task import Task
from robust_if.training import Recipe, fit
from robust_if.tuning import Tuning

#: Estimators that draw the model's parameters anew.
STARTS_AFRESH = frozenset({"label-odds", "valid-only", "valid-only-joined", "unlearning", "confident-learning", "aum", "early-loss"})


def detectors(recipe: Recipe, seed: int = 0) -> dict[str, Estimator]:
    """Every estimator that a name on the command line stands for, with its published defaults."""
    core = [each for each in named(seed).values() if not isinstance(each, LESS)]  # which needs an optimiser's checkpoints
    found = [*core, ConfidentLearning(recipe, seed=seed), NearestNeighbours(), *poison_detectors(recipe, seed)]
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
    given += [plan.suspicion.inputs.path] if plan.suspicion else []
    check_holds_none(directory, given)
    prepared = _Prepared.of(plan)
    finished = claim(directory, prepared.mark, overwrite)
    if finished is not None:
        return finished
    work = directory / "work"
    task = prepared.task if plan.checkpoint else prepared.trained(np.ones(len(plan.train)), plan.seed, work / "model", progress)
    Checkpoint.of(task.model).save(directory / "model.safetensors")
    target = Utility(prepared.problem.valid)
    scores = [_scored(each, task, prepared, work, progress, target) for each in prepared.estimators]
    harmed = None
    if prepared.suspected is None:
        weights, threshold, decision = decide(scores[0], plan.remove)
        suggested = scores[0].suggestions if scores[0].suggestions is not None else _suggest(prepared, task, work, progress)
    else:
        harmed = decide(scores[0], "auto")[0] == 0
        accused = _accused(prepared, prepared.suspected, task, work, progress)
        if plan.remove == "auto" and plan.suspicion is not None and plan.suspicion.false_positives is None:
            usual = _works_by_itself(prepared, work, progress)
            still = partial(_still_works, prepared, work, progress)
            removed = remove_until_ended(accused, accused.provenance["thresholds"], still, usual=usual)
            accused = promising(accused, removed.false_positives, removed.threshold)
        weights, threshold, decision = decide(accused, plan.remove)
        scores = [accused, *scores]
        # a model that learnt the attack calls its poison right; one that never saw what was called poisoned does not
        suggested = predict(prepared.trained(weights, plan.seed, work / "after-0", progress), prepared.problem.train, plan.batch_size).argmax(1)
    accuracies, successes = _retrained(prepared, weights, suggested, work, progress)
    verdicts, warnings = None, []
    if prepared.suspected is not None and harmed is not None:
        held = prepared.suspected
        successes["scored"] = [attack_success(task, held.held_out, held.goal, plan.batch_size)]
        verdicts = Verdicts(weights == 0, harmed, successes, len(held.seen), len(held.held_out), held.shared)
        warnings = [*held.warnings, *_unsuccessful(successes["scored"][0])]
    labels = prepared.problem.encoder.decode(suggested)
    return write(directory, plan, Outcome(scores, weights, threshold, decision, labels, accuracies, verdicts, tuple(warnings)))


def decide(scores: Scores, remove: str) -> tuple[NDArray[np.float64], float | None, str]:
    """Weights, threshold (where there is one) and a description, from ``"auto"``, a share, or a whole number without a point.

    ``"auto"`` is the threshold that promises a share of false positives among clean samples where the scores come with one, else the one between two
    groups of scores.

    Raises:
        ValueError: if ``remove`` is none of these, or out of range.
    """
    if remove == "auto":
        if "threshold" in scores.provenance:
            threshold, share = scores.provenance["threshold"], scores.provenance["false_positives"]
            return remove_above(scores, threshold), threshold, f"threshold that at most {100 * share:.2g} % of clean samples exceed"
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


def _unsuccessful(success: float) -> list[str]:
    if success >= WORKS:
        return []
    text = (
        f"THE ATTACK DOES NOT WORK ON THIS MODEL: {success:.1%} of the held-out attack inputs are classified as the goal class; below {WORKS:.0%} "
        "an attack counts as failed. The verdict “poisoned” is given, but nothing that the model learnt supports it."
    )
    return [text]


@dataclass(frozen=True)
class _Prepared:
    """A plan whose data are encoded and whose model is built: every check that needs no long work has passed."""

    plan: Plan
    problem: Problem
    task: Task
    estimators: tuple[Estimator, ...]
    suspected: Suspected | None
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
        settings = [plan.model, plan.estimators, plan.remove, plan.recipe, plan.repeats, plan.seed, plan.sensitive]
        groups(plan)
        suspected = None
        if plan.suspicion is not None:
            suspected = Suspected.of(plan.suspicion, problem.encoder, problem.train, plan.seed)
            ESTIMATOR.check(task)
            suspected.promised(problem.valid)
            data += [fingerprint({}, suspected.seen), fingerprint({}, suspected.held_out)]
            settings += [suspected.goal, plan.suspicion.false_positives, ESTIMATOR]
        mark = fingerprint(task.model.state_dict(), problem.train, data, *settings)
        return cls(plan, problem, task, tuple(known[name] for name in plan.estimators), suspected, mark)

    def trained(self, weights: NDArray[np.float64], seed: int, directory: Path, progress: Progress, labels: NDArray[np.int64] | None = None) -> Task:
        """A fresh model trained by the plan's recipe."""
        train = self.problem.train
        data = train if labels is None else train.with_labels(labels)
        return fit(self.problem.task(seed), data, replace(self.plan.recipe, seed=seed), weights=weights, directory=directory, progress=progress)


def _digest(mask: NDArray[np.bool_] | None) -> str:
    return "" if mask is None else hashlib.sha256(mask.tobytes()).hexdigest()


def _scored(estimator: Estimator, task: Task, prepared: _Prepared, work: Path, progress: Progress, target: Target) -> Scores:
    """The scores of one estimator, from disk if they are there already."""
    sweep = Sweep(prepared.plan.batch_size, progress, work / "parts")
    train, path = prepared.problem.train, work / f"scores-{estimator.name}.npz"
    threshold_asked = prepared.plan.remove == "auto" or prepared.suspected is not None
    if isinstance(estimator, Unlearning) and threshold_asked:  # ranks have no gap between two groups
        return _kept(path, train.ids, lambda: blind_scores(estimator, task, train, prepared.problem.valid, sweep))
    return _kept(path, train.ids, lambda: estimator.score(task, train, target=target, sweep=sweep))


def _accused(prepared: _Prepared, suspected: Suspected, task: Task, work: Path, progress: Progress) -> Scores:
    """The scores of the verdict "poisoned", with their threshold in the provenance."""
    sweep = Sweep(prepared.plan.batch_size, progress, work / "parts-poisoned")
    problem = prepared.problem
    return _kept(work / "poisoned.npz", problem.train.ids, lambda: suspected.scores(task, problem.train, problem.valid, sweep))


def _still_works(prepared: _Prepared, work: Path, progress: Progress, weights: NDArray[np.float64]) -> float:
    """Mean probability of the goal class on the attack inputs that the scores saw, by a model trained with the weights."""
    name = f"until-{int((weights == 0).sum())}"
    return _certain(prepared, prepared.trained(weights, prepared.plan.seed, work / name, progress))


def _works_by_itself(prepared: _Prepared, work: Path, progress: Progress) -> float:
    """The same by a model of the clean validation samples alone, trained for as many steps as the others."""
    problem, plan = prepared.problem, prepared.plan
    recipe = replace(plan.recipe, seed=plan.seed)
    task = clean_model(problem.task(plan.seed), problem.valid, recipe, len(problem.train), directory=work / "clean", progress=progress)
    return _certain(prepared, task)


def _certain(prepared: _Prepared, task: Task) -> float:
    assert prepared.suspected is not None
    return float(predict(task, prepared.suspected.seen, prepared.plan.batch_size)[:, prepared.suspected.goal].mean())


def _kept(path: Path, ids: NDArray[Any], score: Callable[[], Scores]) -> Scores:
    """Scores from disk, or made and written there."""
    if path.is_file():
        with np.load(path, allow_pickle=False) as file:
            suggestions = file.get("suggestions")
            return Scores(file["values"], ids, suggestions=suggestions, **json.loads(str(file["about"])))
    scores = score()
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


def _retrained(
    prepared: _Prepared, weights: NDArray[np.float64], suggested: NDArray[np.int64], work: Path, progress: Progress
) -> tuple[dict[str, list[float]], dict[str, Sequence[float]]]:
    """Test accuracies, and successes of the attack if there is one, of retrained models by what they were trained on; one per seed."""
    plan, n, test, suspected = prepared.plan, len(prepared.problem.train), prepared.problem.test, prepared.suspected
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
    accuracies: dict[str, list[float]] = {}
    successes: dict[str, Sequence[float]] = {}
    for name, (w, labels) in variants.items():
        tasks = [prepared.trained(w, plan.seed + repeat, work / f"{name}-{repeat}", progress, labels) for repeat in range(plan.repeats)]
        accuracies[name] = [accuracy(task, test, plan.batch_size) for task in tasks]
        if suspected is not None:
            successes[name] = [attack_success(task, suspected.held_out, suspected.goal, plan.batch_size) for task in tasks]
    return accuracies, successes
