"""How far scores of a data set can be trusted: compared with what retraining does to each target."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from robust_if.estimators import LESS, Estimator
from robust_if.evaluations.attribution import Correlation, brittleness, lds, leave_one_out, loo_correlation
from robust_if.evaluations.folder import claim
from robust_if.evaluations.question import Asked
from robust_if.evaluations.retraining import FromScratch, half_subsets, retrain
from robust_if.sweep import Sweep, fingerprint
from robust_if.targets import Target
from robust_if.training import Recipe
from robust_if.writing import write_json


def validate(
    asked: Asked,
    directory: Path,
    estimators: Sequence[Estimator],
    targets: Sequence[Target],
    *,
    recipe: Recipe,
    subsets: int = 40,
    seeds: int = 2,
    left_out: int = 0,
    removed: Sequence[float] = (),
    sweep: Sweep = Sweep(),  # noqa: B008 - frozen
    overwrite: bool = False,
) -> dict[str, Any]:
    """Retrain on random halves of the data (and without single samples, and without the worst), and compare with every estimator's scores.

    Every finished training is kept under ``directory/work``, so that the same call resumes after an interruption.

    Args:
        recipe: of every training; the starting parameters are drawn with the seed of the run.
        subsets: random halves, for the LDS.
        seeds: trainings per subset; scores are the mean over models trained on all data with the same seeds.
        left_out: samples, drawn at random, that are left out one at a time, for the leave-one-out correlation; 0 for none.
        removed: shares of the data that are removed, the worst by each estimator against as many at random; none by default.

    Returns:
        The content of ``result.json``: ``rows``, one per estimator and target with ``lds`` and, where asked for, ``leave_one_out`` (Spearman), and
        ``brittleness``.
    """
    for name, value, least in (("subsets", subsets, 3), ("seeds", seeds, 1), ("left_out", left_out, 0)):
        if value < least:
            raise ValueError(f"{name}: expected at least {least}, got {value}")
    for estimator in estimators:
        estimator.check(asked.problem.task())
        if isinstance(estimator, LESS):
            raise ValueError("estimator: less needs the checkpoints of a training run, which validate does not keep")
    problem, n = asked.problem, len(asked.problem.train)
    data = [fingerprint({}, part) for target in targets for part in target.held_out]
    settings = (targets, repr(estimators), recipe, subsets, seeds, left_out, tuple(removed), problem.model, problem.seed)
    finished = claim(directory, fingerprint({}, problem.train, data, settings), overwrite)
    if finished is not None:
        return finished
    start, fit, numbers = problem.task(), FromScratch(recipe), tuple(range(seeds))
    shared: dict[str, Any] = {"seeds": numbers, "directory": directory / "work" / "retraining", "progress": sweep.progress}
    halves = half_subsets(n, subsets, seed=problem.seed)
    values = retrain(start, problem.train, targets, fit, halves, **shared).mean(1)
    which = np.random.default_rng([problem.seed, n]).permutation(n)[:left_out]
    effects = leave_one_out(start, problem.train, targets, fit, which=which, **shared) if left_out else None
    models = [fit(start, problem.train, np.ones(n), seed) for seed in numbers]
    rows: list[dict[str, Any]] = []
    for estimator in estimators:
        runs = [estimator.score(task, problem.train, target=list(targets), sweep=replace(sweep, directory=None)) for task in models]
        for t, target in enumerate(targets):
            each = [run[t if estimator.needs_target else 0] for run in runs]
            scores = replace(each[0], values=np.mean([one.values for one in each], axis=0), members=None)
            row: dict[str, Any] = {"estimator": estimator.name, "target": target.name, "lds": _said(lds(scores, halves, values[:, t]))}
            if effects is not None:
                row["leave_one_out"] = _said(loo_correlation(scores.values[which], effects[:, t])[1])
            if removed:
                frame = brittleness(start, problem.train, targets, fit, scores, removed=tuple(removed), **shared)
                own = frame[frame["target"] == target.name]
                row["brittleness"] = own.groupby(["k", "removed_by"])[["before", "after"]].mean().reset_index().to_dict("records")
            rows.append(row)
    result = {"rows": rows, "n": n, "subsets": subsets, "seeds": seeds, "left_out": left_out, "warnings": list(asked.warnings)}
    write_json(directory / "result.json", result)
    shutil.rmtree(directory / "work", ignore_errors=True)
    return result


def _said(found: Correlation) -> dict[str, float | None]:
    """For JSON, which has no NaN."""
    return {key: None if np.isnan(value) else value for key, value in asdict(found).items()}
