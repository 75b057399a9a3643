"""Defences that score the training samples, decide which are bad, and train on what is left, on other labels, or with other weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from robust_if.attacks.evasion import PGD
from robust_if.attacks.targets import AdversarialLoss
from robust_if.checkpoints import Checkpoint
from robust_if.decisions import relabel
from robust_if.estimators import Estimator, FlatMinima, InnerProduct, Unlearning
from robust_if.evaluations.baselines import predict
from robust_if.evaluations.calibration import remove_until_ended
from robust_if.evaluations.detectors import STRIP
from robust_if.evaluations.poisoning import clean_model
from robust_if.evaluations.scenario import decide, detectors
from robust_if.evaluations.suites.parts import Attacked, Defended, Scene
from robust_if.evaluations.suites.planted import bounds
from robust_if.evaluations.suspicion import Suspected, blind_scores, promising
from robust_if.fairness.targets import fairness_gap
from robust_if.scores import Scores
from robust_if.sweep import Sweep
from robust_if.targets import Target, Utility
from robust_if.task import Task
from robust_if.training import train

Weights = NDArray[np.float64]
Labels = NDArray[np.int64]

Action = Literal["remove", "relabel", "reweigh"]
#: The estimator that looks at the reported attack inputs.
POISONED = "poisoned"


def filtered(
    attacked: Attacked, *, seed: int, estimator: str = "label-odds", remove: float | int | str = "auto", action: Action = "remove",
    target: str = "utility", checkpoints: int = 1, retrain: bool = True,
) -> Defended:  # fmt: skip
    """Score the training samples of the undefended model, and act on those with the highest scores.

    Args:
        estimator: one of those that ``robust-if score`` knows, influence and detectors alike; or ``"poisoned"``, what the model forgets when it
            unlearns the reported attack inputs, which leaves everything as it is where nothing was reported.
        remove: which samples are acted on: a share, a number, or ``"auto"``, the estimator's own threshold.
        action: ``"remove"``; ``"reweigh"``, the weight rises from 0 at the highest score to 1 at the threshold, by rank; or ``"relabel"``, by the
            estimator's own suggestions or its lowest score among all labels where it has them, else as a model says that was trained without.
        target: what is to become lower: ``"utility"``, ``"adversarial"``, both on the validation samples, or a notion of fairness.
        checkpoints: states of the training along which influence is summed; the last one alone by default.
        retrain: false where only the scores are of interest; the undefended model is then the answer.
    """
    scene = attacked.scene
    judge = _Judge.of(scene, estimator, action, str(remove), target, checkpoints, seed)
    if estimator == POISONED:
        return judge.of_reports(attacked, retrain)
    task, states = attacked.undefended(), list[Checkpoint]()
    if checkpoints > 1:
        states = train(scene.task, scene.train, replace(scene.recipe, keep=checkpoints))
    scores = judge.scores(task, states)
    weights, threshold, said = decide(scores, str(remove))
    return _acted(judge, attacked, scores, weights, {"threshold": threshold, "decision": said}, retrain)


def confident_learning(attacked: Attacked, *, seed: int, remove: float | int | str = "auto", action: Action = "remove") -> Defended:
    """Label quality by cleanlab, from cross-validated probabilities; needs the extra ``cleanlab``. Arguments as of the filter."""
    return filtered(attacked, seed=seed, estimator="confident-learning", remove=remove, action=action)


@dataclass(frozen=True, eq=False)
class _Judge:
    """A filter whose options make sense."""

    scene: Scene
    estimator: Estimator | None
    action: Action
    remove: str
    target: Target
    seed: int

    @classmethod
    def of(cls, scene: Scene, name: str, action: Action, remove: str, target: str, checkpoints: int, seed: int) -> _Judge:
        known: Mapping[str, Estimator] = {**detectors(scene.recipe, seed), "strip": STRIP(bounds=_bounds(scene), seed=seed)}
        if name not in (*known, POISONED):
            raise ValueError(f"estimator: expected one of {', '.join((*known, POISONED))}, got {name!r}")
        if name == "confident-learning" and find_spec("cleanlab") is None:
            raise ImportError("estimator: confident-learning needs cleanlab, pip install 'robust-if[cleanlab]'")
        if action not in get_args(Action):
            raise ValueError(f"action: expected one of {', '.join(get_args(Action))}, got {action!r}")
        if remove != "auto":
            kept = decide(Scores(np.zeros(len(scene.train)), scene.train.ids, "check"), remove)[0]
            if action == "remove" and not kept.any():
                raise ValueError(f"remove: expected some of the {len(scene.train)} samples to stay, but {remove} removes all")
        if checkpoints < 1 or (checkpoints > 1 and scene.fit is not None):
            raise ValueError(f"checkpoints: expected a number from 1 on, and 1 for a model that is not trained step by step, got {checkpoints}")
        if known.get(name) is not None:
            known[name].check(scene.task)
        return cls(scene, known.get(name), action, remove, _target(scene, target), seed)

    def scores(self, task: Task, states: Sequence[Checkpoint]) -> Scores:
        assert self.estimator is not None
        if isinstance(self.estimator, Unlearning) and self.remove == "auto":  # ranks have no gap between two groups
            return blind_scores(self.estimator, task, self.scene.train, self.scene.valid, Sweep())
        return self.estimator.score(task, self.scene.train, target=self.target, checkpoints=states)

    def of_reports(self, attacked: Attacked, retrain: bool) -> Defended:
        """The answer of who holds attack inputs; ``"auto"`` is the smallest promised rate of false positives that ends the attack on them."""
        scene, task = self.scene, attacked.undefended()
        if attacked.seen is None:
            return Defended(task, np.ones(len(scene.train)), about={"decision": "no attack input was reported, so nothing was done"})
        goals = np.unique(attacked.seen.labels.numpy())
        if len(goals) != 1:
            raise ValueError(f"seen: expected attack inputs under one label, the attacker's, got the labels {goals.tolist()}")
        goal = int(goals[0])
        found = Suspected(attacked.seen, attacked.seen, goal, None, True, ()).scores(task, scene.train, scene.valid, Sweep())
        if self.remove == "auto":

            def said(model: Task) -> float:
                assert attacked.seen is not None
                return float(predict(model, attacked.seen)[:, goal].mean())

            def success(weights: Weights) -> float:
                return said(scene.fitted(weights))

            usual = said(clean_model(scene.task, scene.valid, scene.recipe, len(scene.train)))
            ended = remove_until_ended(found, found.provenance["thresholds"], success, usual=usual)
            found = promising(found, ended.false_positives, ended.threshold)
        weights, threshold, text = decide(found, self.remove)
        return _acted(self, attacked, found, weights, {"threshold": threshold, "decision": text}, retrain)

    def suggested(self, task: Task, scores: Scores, weights: Weights) -> Labels:
        """A label for every sample."""
        scene, estimator = self.scene, self.estimator
        if scores.suggestions is not None:
            return scores.suggestions
        if isinstance(estimator, FlatMinima):
            return np.asarray(estimator.candidates(task, scene.train, target=self.target).argmin(1))
        if isinstance(estimator, InnerProduct):
            classes = predict(task, scene.valid.take([0])).shape[1]
            others = (scene.train.with_labels(np.full(len(scene.train), label)) for label in range(classes))
            return np.asarray(np.stack([estimator.score(task, scene.train, target=self.target, samples=each).values for each in others], 1).argmin(1))
        if not weights.any():
            raise ValueError(f"remove: {scores.estimator} suggests no labels of its own, so some samples must stay to train a model that does")
        return np.asarray(predict(scene.fitted(weights), scene.train).argmax(1))


def _acted(judge: _Judge, attacked: Attacked, scores: Scores, weights: Weights, about: Mapping[str, Any], retrain: bool) -> Defended:
    """What follows from a decision, whose weights are 0 for the samples that are acted on."""
    scene, labels = judge.scene, None
    answer = partial(Defended, scores=scores, about={"acted_on": int((weights == 0).sum()), **about})
    if judge.action == "relabel":
        labels = relabel(scene.train.labels.numpy(), judge.suggested(attacked.undefended(), scores, weights), weights).astype(np.int64)
        return answer(scene.fitted(labels=labels) if retrain else attacked.undefended(), labels=labels)
    if judge.action == "reweigh":
        order = scores.order()[: int((weights == 0).sum())]
        weights = np.ones(len(weights))
        weights[order] = np.arange(len(order)) / max(len(order), 1)
    if not weights.any():
        raise ValueError(f"remove: {scores.estimator} would remove all {len(weights)} samples")
    return answer(scene.fitted(weights) if retrain else attacked.undefended(), weights)


def _bounds(scene: Scene) -> tuple[float, float] | None:
    """For mixtures of inputs: those of images; tables have none."""
    return bounds(scene) if scene.train.batch(slice(0, 1))[0].ndim > 2 else None


def _target(scene: Scene, name: str) -> Target:
    if name == "utility":
        return Utility(scene.valid)
    if name == "adversarial":
        if scene.threat is None:
            raise ValueError("target: 'adversarial' needs a radius, and the data set and the attack give none")
        return AdversarialLoss(scene.valid, PGD(scene.threat))
    if "valid" not in scene.groups:
        raise ValueError(f"target: expected 'utility', 'adversarial' or, for data with groups, a notion of fairness, got {name!r}")
    return fairness_gap(name, scene.valid, scene.groups["valid"], smallest=1)
