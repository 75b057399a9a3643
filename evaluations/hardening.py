"""Training for robustness from end to end, as ``robust-if harden`` does it: an undefended model, a hardened one, and how both hold under attack.

Three splits always: which training samples are used is decided on validation data, and test data are attacked once, when all is decided.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from robust_if.attacks.evasion import FGSM, PGD, Norm, Threat
from robust_if.attacks.rescoring import Rescoring, attacked
from robust_if.attacks.robust_training import MART, TRADES, FastTraining, PGDTraining
from robust_if.attacks.targets import AdversarialLoss
from robust_if.checkpoints import Checkpoint
from robust_if.data import Samples
from robust_if.decisions import relabel, remove_top
from robust_if.estimators import Estimator, InnerProduct
from robust_if.evaluations.baselines import predict
from robust_if.evaluations.folder import check_holds_none, claim
from robust_if.evaluations.problem import Problem
from robust_if.evaluations.robustness import Preset, RobustAccuracy, check, robust_accuracy
from robust_if.evaluations.threats import threat_of
from robust_if.loading import Dataset
from robust_if.scores import Scores
from robust_if.sweep import Progress, fingerprint, silent
from robust_if.task import Task
from robust_if.training import Objective, Recipe, fit, last_weights
from robust_if.writing import plain, write_json

Action = Literal["remove", "reweigh", "relabel"]

#: Objectives by name: what a training step lowers, from the threat and the steps of the attack.
METHODS: Mapping[str, Callable[[Threat, int], Objective | None]] = {
    "plain": lambda _, __: None,
    "pgd": lambda threat, steps: PGDTraining(threat, steps=steps),
    "trades": lambda threat, steps: TRADES(threat, steps=steps),
    "mart": lambda threat, steps: MART(threat, steps=steps),
    "fast": lambda threat, _: FastTraining(threat),
}
#: Test samples that are attacked at a time: few, so that little is lost by an interruption.
BATCH = 64


@dataclass(frozen=True)
class HardeningPlan:
    """What is hardened and how.

    Args:
        train: what is learnt, and chosen from.
        valid: decides which samples are used.
        test: attacked once, at the end.
        eps: of images a share of the pixel range, of tables in standard deviations; see :func:`robust_if.evaluations.threats.threat_of`.
        norm: of the attack, ``"linf"`` or ``"l2"``.
        immutable: columns of a table that the attacker cannot change.
        categories: whether the attacker may change categories.
        method: one of :data:`METHODS`.
        steps: of the attack in training, and of that on the validation samples.
        rho: radius of sharpness-aware minimisation, 0 for none.
        action: what happens to the samples that harm robustness most: ``"remove"``, ``"reweigh"`` (all are weighted, see :func:`softened`) or
            ``"relabel"`` (as the estimator suggests or the first model predicts).
        share: of the training samples that the action is about; 0 uses all as they are.
        rescore_every: epochs after which the samples are chosen anew, by the model of that moment; by default they are chosen once, by a first model.
        estimator: scores the samples.
        model: name of a ready model, or ``module:function``.
        recipe: how every model is trained; the objective and ``rho`` are those of the plan.
        preset: attacks of the evaluation.
        samples: test samples that are attacked; all by default.
        seed: of everything random.
        title, command: what the run is called, and what repeats it.
        warnings: what the reader should know.
    """

    train: Dataset
    valid: Dataset
    test: Dataset
    eps: float
    norm: Norm = "linf"
    immutable: tuple[str, ...] = ()
    categories: bool = False
    method: str = "pgd"
    steps: int = 7
    rho: float = 0.0
    action: Action = "remove"
    share: float = 0.0
    rescore_every: int | None = None
    estimator: Estimator = InnerProduct()  # noqa: RUF009 - frozen
    model: str = "mlp"
    recipe: Recipe = field(default_factory=Recipe)
    preset: Preset = "standard"
    samples: int | None = None
    seed: int = 0
    title: str = "Hardening"
    command: str = ""
    warnings: tuple[str, ...] = ()

    def check(self) -> None:
        """Raise a ``ValueError`` for settings that make no sense, whatever the data."""
        if self.method not in METHODS:
            raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {self.method!r}")
        if self.action not in get_args(Action):
            raise ValueError(f"action: expected one of {', '.join(get_args(Action))}, got {self.action!r}")
        if not 0 <= self.share < 1:
            raise ValueError(f"remove: expected a share of at least 0 and below 1, got {self.share}")
        if self.rescore_every is not None and (self.action != "remove" or not self.share):
            raise ValueError("rescore-every: while a model is trained samples can only be removed; give a share with --remove, and --action remove")
        for name, number in (("rescore-every", self.rescore_every), ("samples", self.samples)):
            if number is not None and number < 1:
                raise ValueError(f"{name}: expected at least 1, got {number}")
        if self.method == "plain" and not self.rho and not self.share:
            raise ValueError("method: plain training without --rho and --remove is the undefended model itself; choose another method")


def softened(scores: Scores, share: float) -> NDArray[np.float64]:
    """Weights ``(n,)`` that fall in proportion to the score, 1 at a score of 0: the ``share`` of highest scores gets 0, the most helpful at most 2.

    Where fewer samples than that are harmful, the most harmful one alone gets 0.
    """
    limit = float(np.sort(scores.values)[-max(int(share * len(scores) + 1e-9), 1)])
    limit = limit if limit > 0 else max(float(scores.values.max()), np.finfo(np.float64).tiny)
    return np.asarray(np.clip(1 - scores.values / limit, 0, 2))


def run(plan: HardeningPlan, directory: Path, *, progress: Progress = silent, overwrite: bool = False) -> dict[str, Any]:
    """Carry a plan out, and write model.safetensors, weights.csv and result.json into ``directory``; the same plan resumes there.

    Returns:
        The content of ``result.json``.

    Raises:
        ValueError: if the data or the plan are not fit to run; before any training.
    """
    prepared = Prepared.of(plan)
    check_holds_none(directory, (plan.train.path, plan.valid.path, plan.test.path))
    finished = claim(directory, prepared.mark, overwrite)
    if finished is not None:
        return finished
    work = directory / "work"
    models = {"undefended": prepared.trained(work / "undefended", progress, recipe=plan.recipe)}
    chosen = Chosen(np.ones(len(plan.train)), prepared.problem.train.labels.numpy())
    if plan.share and plan.rescore_every is None:
        first = "undefended" if plan.method == "plain" and not plan.rho else f"{plan.method}, all samples"
        if first not in models:
            models[first] = prepared.trained(work / "first", progress)
        chosen = prepared.chosen(models[first])
    models["hardened"] = prepared.trained(work / "hardened", progress, chosen)
    if plan.rescore_every is not None:
        chosen = replace(chosen, weights=last_weights(work / "hardened"))
    judged = {name: prepared.judged(task, work / f"attacks-{k}", progress) for k, (name, task) in enumerate(models.items())}
    Checkpoint.of(models["hardened"].model).save(directory / "model.safetensors")
    prepared.table(chosen).to_csv(directory / "weights.csv", index=False)
    removed, relabelled = chosen.weights == 0, chosen.labels != prepared.problem.train.labels.numpy()
    changed = {"removed": removed, "relabelled": relabelled, "reweighed": ~removed & (chosen.weights != 1)}
    result = {
        **prepared.facts(), "models": {name: each.record() for name, each in judged.items()},
        "gain": {what: gain(getattr(judged["undefended"], what), getattr(judged["hardened"], what)) for what in ("right", "robust")},
        "changed": {what: int(which.sum()) for what, which in changed.items()},
        "files": {name: str(directory / file) for name, file in (("model", "model.safetensors"), ("weights", "weights.csv"))},
    }  # fmt: skip
    write_json(directory / "result.json", result, plain)
    shutil.rmtree(work, ignore_errors=True)
    return result


@dataclass(frozen=True)
class Chosen:
    """Which samples a model is trained on.

    Args:
        weights: ``(n,)``.
        labels: ``(n,)`` encoded.
        scores: that decided; ``None`` where nothing was scored, or anew again and again.
    """

    weights: NDArray[np.float64]
    labels: NDArray[np.int64]
    scores: Scores | None = None


@dataclass(frozen=True, eq=False)
class Prepared:
    """A plan whose data are encoded: every check that needs no long work has passed.

    Args:
        threat: in the units of the encoded inputs.
        test: the samples that are attacked.
        mark: what the run is known by.
    """

    plan: HardeningPlan
    problem: Problem
    threat: Threat
    test: Samples
    mark: str

    @classmethod
    def of(cls, plan: HardeningPlan) -> Prepared:
        """Read, encode and check everything.

        Raises:
            ValueError: if something does not fit.
        """
        plan.check()
        problem = Problem.of(plan.train, plan.valid, plan.test, model=plan.model, seed=plan.seed)
        assert problem.test is not None
        allowed: dict[str, Any] = {"norm": plan.norm, "immutable": plan.immutable, "categories": plan.categories}
        threat = threat_of(problem.encoder, plan.train, plan.valid, plan.test, eps=plan.eps, **allowed)
        rows = np.arange(len(plan.test))
        if plan.samples is not None and plan.samples < len(rows):
            rows = np.sort(np.random.default_rng(plan.seed).choice(rows, plan.samples, replace=False))
        test, task = problem.test.take(rows), problem.task()
        check(task, test, threat, plan.preset)
        plan.estimator.check(task)
        recipe = replace(plan.recipe, objective=METHODS[plan.method](threat, plan.steps), rho=plan.rho)
        settings = (recipe, plan.action, plan.share, plan.rescore_every, plan.estimator, plan.model, plan.preset, plan.seed, threat)
        mark = fingerprint({}, problem.train, fingerprint({}, problem.valid), fingerprint({}, test), *settings)
        return cls(replace(plan, recipe=replace(plan.recipe, seed=plan.seed)), problem, threat, test, mark)

    @property
    def target(self) -> AdversarialLoss:
        """What the samples are chosen for."""
        return AdversarialLoss(self.problem.valid, PGD(self.threat, steps=self.plan.steps))

    def trained(self, work: Path, progress: Progress, chosen: Chosen | None = None, *, recipe: Recipe | None = None) -> Task:
        """The model after training; by the plan's method, on all samples as they are, by default."""
        plan, data = self.plan, self.problem.train
        reweigh = None
        if chosen is not None:
            data = data.with_labels(chosen.labels)
            if plan.rescore_every is not None:
                reweigh = Rescoring(
                    data, self.target, plan.estimator, attack=None if plan.method == "plain" else FGSM(self.threat), keep=1 - plan.share,
                    start=plan.rescore_every, every=plan.rescore_every, seed=plan.seed,
                )  # fmt: skip
        hardening = replace(plan.recipe, objective=METHODS[plan.method](self.threat, plan.steps), rho=plan.rho)
        weights = None if chosen is None else chosen.weights
        return fit(self.problem.task(), data, recipe or hardening, weights=weights, reweigh=reweigh, directory=work, progress=progress)

    def chosen(self, first: Task) -> Chosen:
        """What the plan's action makes of the influence of every sample on the loss of attacked validation samples.

        Where training is adversarial the gradients of samples are those under attack; estimators without products of gradients see clean samples.
        """
        plan, data = self.plan, self.problem.train
        moved = plan.method != "plain" and isinstance(plan.estimator, InnerProduct)
        seen = attacked(first, data, PGD(self.threat, steps=plan.steps)) if moved else data
        scores = plan.estimator.score(first, seen, target=self.target)
        labels, weights = data.labels.numpy(), remove_top(scores, fraction=plan.share)
        if plan.action == "reweigh":
            return Chosen(softened(scores, plan.share), labels, scores)
        if plan.action == "relabel":
            suggested = predict(first, data).argmax(1) if scores.suggestions is None else scores.suggestions
            return Chosen(np.ones(len(data)), relabel(labels, suggested, weights), scores)
        return Chosen(weights, labels, scores)

    def judged(self, task: Task, work: Path, progress: Progress) -> RobustAccuracy:
        """The model under attack."""
        unit = "of the pixel range" if self.plan.test.kind == "image" else "standard deviations"
        return robust_accuracy(
            task, self.test, self.threat, preset=self.plan.preset, batch_size=BATCH, radius=f"{self.plan.eps:g} {unit}", progress=progress,
            directory=work,
        )  # fmt: skip

    def table(self, chosen: Chosen) -> pd.DataFrame:
        """One row per training sample."""
        decode = self.problem.encoder.decode
        columns = {"id": self.problem.train.ids, "label": decode(self.problem.train.labels), "weight": chosen.weights}
        more = {"new_label": decode(chosen.labels)} if self.plan.action == "relabel" and self.plan.share else {}
        return pd.DataFrame({**columns, **more, **({} if chosen.scores is None else {"score": chosen.scores.values})})

    def facts(self) -> dict[str, Any]:
        """What was asked, for ``result.json``."""
        plan = self.plan
        notes = list(plan.warnings)
        if len(self.test) < len(plan.test):
            notes.append(f"{len(self.test)} of {len(plan.test)} test samples were drawn; the intervals say how far others may move the numbers.")
        return {
            "hardening": True, "title": plan.title, "data": str(plan.train.path), "kind": plan.train.kind, "model": plan.model, "method": plan.method,
            "steps": plan.steps, "eps": plan.eps, "norm": plan.norm, "immutable": list(plan.immutable), "categories": plan.categories,
            "rho": plan.rho, "action": plan.action if plan.share else None, "share": plan.share, "rescore_every": plan.rescore_every,
            "estimator": plan.estimator.name if plan.share else None, "recipe": repr(plan.recipe), "preset": plan.preset, "seed": plan.seed,
            "n_train": len(plan.train), "n_valid": len(plan.valid), "n_test": len(self.test), "warnings": notes, "command": plan.command,
        }  # fmt: skip


def gain(before: NDArray[np.bool_], after: NDArray[np.bool_]) -> dict[str, float]:
    """The difference of two accuracies on the same samples with its 95 % interval, which is narrower than those of the two show.

    Source: the normal approximation, method 1 of Newcombe 1998 on differences of paired proportions (Statistics in Medicine 17).
    """
    change = after.astype(float) - before.astype(float)
    half = 1.96 * float(change.std()) / np.sqrt(len(change))
    return {"value": float(change.mean()), "low": float(change.mean()) - half, "high": float(change.mean()) + half}
