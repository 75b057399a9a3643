"""The defences of suites by name: references, filters, robust training, and repairs of fairness."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from robust_if.attacks.evasion import Threat
from robust_if.attacks.robust_training import MART, TRADES, FastTraining, PGDTraining
from robust_if.decisions import remove_top
from robust_if.estimators import InnerProduct, Random
from robust_if.evaluations.suites import published
from robust_if.evaluations.suites.filters import Action, confident_learning, filtered
from robust_if.evaluations.suites.parts import Attacked, Defended, Scene
from robust_if.evaluations.suites.tables import Optimum
from robust_if.evaluations.suites.truth import right_labels, wrong
from robust_if.fairness.baselines import kamiran_calders
from robust_if.fairness.learners import Network
from robust_if.fairness.logistic import FittedLogistic
from robust_if.fairness.repair import repair
from robust_if.fairness.targets import fairness_gap
from robust_if.preconditioners import EKFAC
from robust_if.scores import Scores
from robust_if.training import fit


def none(attacked: Attacked, *, seed: int) -> Defended:
    """The model that is trained on the data as they are."""
    return Defended(attacked.undefended())


def at_random(attacked: Attacked, *, seed: int, remove: float = 0.1) -> Defended:
    """A share of the training samples is removed at random: what removing alone does."""
    n = len(attacked.scene.train)
    # a stream of its own: the bare seed may have drawn the poison
    scores = Random(int(np.random.default_rng([seed, n]).integers(2**31))).score(attacked.scene.task, attacked.scene.train)
    weights = remove_top(scores, fraction=remove)
    if not weights.any():
        raise ValueError(f"remove: expected some of the {n} samples to stay, but {remove} removes all")
    return Defended(attacked.scene.fitted(weights), weights)


def oracle(attacked: Attacked, *, seed: int, action: Literal["remove", "relabel"] = "remove") -> Defended:
    """The perfect filter: the one reference that is told which samples are bad, so that it shows what any filter could reach.

    Args:
        action: ``"remove"``, or ``"relabel"`` with the right labels where they are known.
    """
    bad = wrong(attacked)
    if bad is None:
        raise ValueError("oracle: it needs to know which samples are bad, and neither the data set nor the attack says so")
    if action == "relabel":
        labels = right_labels(attacked)
        if labels is None:
            raise ValueError("action: the right labels are not known; expected 'remove'")
        return Defended(attacked.scene.fitted(labels=labels), labels=labels)
    if action != "remove":
        raise ValueError(f"action: expected 'remove' or 'relabel', got {action!r}")
    weights = (~bad).astype(np.float64)
    scores = Scores(bad.astype(np.float64), attacked.scene.train.ids, "oracle")
    return Defended(attacked.scene.fitted(weights) if bad.any() else attacked.undefended(), weights, scores)


def adversarial_training(
    attacked: Attacked, *, seed: int, method: Literal["pgd", "trades", "mart", "fast"] = "pgd", eps: float = 0.0, steps: int = 7, price: float = 6.0,
    epochs: int = 0, estimator: str = "", target: str = "adversarial", remove: float | int | str = 0.1, action: Action = "remove",
) -> Defended:  # fmt: skip
    """The model is trained on attacked inputs, see :mod:`robust_if.attacks.robust_training`.

    Args:
        method: of the training; TRADES, MART and fast adversarial training by their names.
        eps: radius of the training attack; the scene's by default.
        steps: of that attack; ``"fast"`` takes one.
        price: β of TRADES, λ of MART.
        epochs: of the training; those of the recipe by default.
        estimator: by which the training samples are filtered beforehand, at the undefended model; none by default. ``target``, ``remove`` and
            ``action`` are those of the filter.
    """
    scene = attacked.scene
    if scene.fit is not None:
        raise ValueError("data: adversarial training needs a model that is trained step by step; give the data set a model such as 'mlp'")
    if scene.threat is None:
        raise ValueError("eps: the data set and the attack give no radius, so there is nothing to train against")
    threat = replace(scene.threat, eps=eps) if eps else scene.threat
    methods: dict[str, Callable[[Threat], Any]] = {
        "pgd": lambda t: PGDTraining(t, steps=steps), "trades": lambda t: TRADES(t, beta=price, steps=steps),
        "mart": lambda t: MART(t, weight=price, steps=steps), "fast": FastTraining,
    }  # fmt: skip
    if method not in methods:
        raise ValueError(f"method: expected one of {', '.join(methods)}, got {method!r}")
    recipe = replace(scene.recipe, objective=methods[method](threat), epochs=epochs or scene.recipe.epochs)
    found = Defended(scene.task)
    if estimator:
        found = filtered(attacked, seed=seed, estimator=estimator, remove=remove, action=action, target=target, retrain=False)
    data = scene.train if found.labels is None else scene.train.with_labels(found.labels)
    return replace(found, task=fit(scene.task, data, recipe, weights=found.weights), about={**found.about, "epochs": recipe.epochs})


def sam(attacked: Attacked, *, seed: int, rho: float = 0.05) -> Defended:
    """Sharpness-aware minimisation with that radius in the parameters, see :class:`robust_if.Recipe`."""
    scene = attacked.scene
    if scene.fit is not None:
        raise ValueError("data: this defence needs a model that is trained step by step; give the data set a model such as 'mlp'")
    return Defended(fit(scene.task, scene.train, replace(scene.recipe, rho=rho)))


def reweighing(attacked: Attacked, *, seed: int) -> Defended:
    """Weights under which the label does not depend on the group, see :func:`robust_if.fairness.baselines.kamiran_calders`."""
    scene = attacked.scene
    weights = kamiran_calders(scene.train.labels.numpy(), _groups(scene, "train"))
    return Defended(scene.fitted(weights), weights)


def fair_repair(
    attacked: Attacked, *, seed: int, notion: str = "demographic_parity", action: Action = "reweigh", bound: float = 0.02, rounds: int = 8
) -> Defended:
    """Training samples are removed, reweighed or relabelled until a gap is within a bound on validation data, see :func:`robust_if.repair`.

    A model that is trained to its optimum is repaired in closed form, another one by its influence with EK-FAC and short retrainings.
    """
    scene = attacked.scene
    gap = fairness_gap(notion, scene.valid, _groups(scene, "valid"), smallest=1)
    learner = scene.fit.learner(scene.train) if isinstance(scene.fit, Optimum) else Network(
        scene.task, scene.train, scene.recipe, InnerProduct(EKFAC(seed=seed))
    )  # fmt: skip
    found = repair(learner, gap, action, bound=bound, rounds=rounds)
    task = Optimum.task(found.fitted) if isinstance(found.fitted, FittedLogistic) else found.fitted.task
    labels = found.labels if action == "relabel" else None
    return Defended(task, found.weights, labels=labels, about={"rounds": len(found.rounds) - 1, "unmet": found.unmet})


def _groups(scene: Scene, part: str) -> Any:
    if part not in scene.groups:
        raise ValueError("data: this defence needs sensitive groups, and the data set has none")
    return scene.groups[part]


#: By name: ``(attacked, *, seed, options) -> Defended``.
DEFENCES: Mapping[str, Callable[..., Defended]] = {
    "none": none,
    "random": at_random,
    "oracle": oracle,
    "filter": filtered,
    "confident-learning": confident_learning,
    "adversarial-training": adversarial_training,
    "sam": sam,
    "reweighing": reweighing,
    "fair-repair": fair_repair,
    **published.DEFENCES,
}
