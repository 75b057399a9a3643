"""The defence against adaptive evasion as it is published, and what an honest protocol says of the same defences.

Published: logistic regression is trained on clean data, then N test points, 5 to 25 % of all, are moved across its decision boundary. The defender is
given that test set with its true labels, scores the training samples by their influence on the loss there, and removes, relabels or reweighs. The
retrained model is judged on the same stored points, those of a model that nobody uses any more.

Beside that number stand two that the protocol lacks: the accuracy on the untouched test set, and the accuracy when the same test points are attacked
again, at the retrained model. With ``honest`` the defender sees validation points that were attacked on their own.

Source: Chhabra et al. 2024 (What data benefits my classifier?), section 5.3; Yang et al. 2026 (arXiv 2405.17490), section 7. The models, penalties
and divisions of the data are those of their code: no intercept, features standardised on the first three quarters of the training samples.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from scipy.special import softmax
from sklearn.model_selection import train_test_split

from robust_if.attacks.linear import LinearAttack
from robust_if.data import Samples
from robust_if.estimators import Ensemble, Estimator, InnerProduct, SelfInfluence
from robust_if.evaluations.suites.files import folder
from robust_if.evaluations.suites.parts import Attacked, Change, Defended, Scene
from robust_if.evaluations.suites.tables import adult_rows
from robust_if.fairness.logistic import FittedLogistic, Logistic
from robust_if.scores import Scores
from robust_if.targets import Utility
from robust_if.task import Task
from robust_if.training import Recipe

Array = NDArray[np.float64]
Labels = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Linear(Scene):
    """A scene that is learnt by logistic regression to its optimum.

    Args:
        learner: of the training samples.
        untouched: the test samples before any attack, in the same order.
        moved: positions of the test samples that were attacked.
    """

    learner: Logistic = field(kw_only=True)
    untouched: Samples = field(kw_only=True)
    moved: Labels = field(kw_only=True)


def adult(*, seed: int, intercept: bool = False, logarithm: bool = False) -> Linear:
    """Adult: complete rows of adult.data to train on, those of adult.test halved for validation and test.

    Args:
        intercept: the published model has none.
        logarithm: of capital gain and loss, log(1 + x), which are published as they are; one of them then carries 98.7 % of ‖w‖².
    """
    frame, given = adult_rows()
    if logarithm:
        frame = frame.assign(**{name: np.log1p(frame[name]) for name in ("capital-gain", "capital-loss")})
    y: Labels = np.asarray(frame["income"].str.startswith(">50K"), dtype=np.int64)
    return _scene(_numbers(frame.drop(columns=["fnlwgt", "income"])), y, given, 2.2622, intercept)


def bank(*, seed: int, intercept: bool = False) -> Linear:
    """Bank marketing without rows that hold "unknown", 60 : 20 : 20."""
    frame = pd.read_csv(folder("bank_marketing") / "bank-additional-full.csv.gz", sep=";", na_values="unknown").dropna()
    y: Labels = np.asarray(frame["y"] == "yes", dtype=np.int64)
    return _shuffled(_numbers(frame.drop(columns="y")), y, 1.1622, intercept)


def celeba(*, seed: int, intercept: bool = False, rows: int = 104_163) -> Linear:
    """CelebA: whether a face is called attractive, from the other 39 attributes; 60 : 20 : 20 of the first ``rows``."""
    with zipfile.ZipFile(folder("celeba_attributes") / "list_attr_celeba.txt.zip") as file:
        frame = pd.read_csv(file.open("list_attr_celeba.txt"), sep=r"\s+", skiprows=1).iloc[:rows]
    y: Labels = np.asarray(frame["Attractive"] > 0, dtype=np.int64)
    return _shuffled(frame.drop(columns="Attractive").to_numpy(np.float64), y, 15.1622, intercept)


def across_the_boundary(
    scene: Scene, *, seed: int, honest: bool = False, least: float = 0.05, most: float = 0.25, overshoot: float = 1.3
) -> Change:
    """Some test points are moved across the decision boundary of the model that is trained on the clean data.

    Args:
        honest: the defender sees validation points of which as large a share was moved, else the attacked test set itself.
        least: the smallest share of points that are moved; the share is drawn uniformly.
        most: the largest share.
        overshoot: how far a point goes, relative to its distance from the boundary.
    """
    linear = _linear(scene)
    rng, model = np.random.default_rng(seed), linear.learner.fit().task
    share = rng.uniform(least, most)

    def attacked(clean: Samples) -> tuple[Samples, Labels]:
        moved = rng.choice(len(clean), int(share * len(clean)), replace=False)
        return _attacked(clean, moved, model, overshoot), moved

    test, moved = attacked(linear.test)
    valid = attacked(linear.valid)[0] if honest else test
    return Change(replace(linear, test=test, valid=valid, untouched=linear.test, moved=moved))


def influence(
    attacked: Attacked, *, seed: int, estimator: Literal["if", "ip", "ip-ensemble", "self-ip", "random"] = "ip",
    action: Literal["remove", "relabel", "reweigh"] = "remove", fraction: float = 0.05,
) -> Defended:  # fmt: skip
    """Remove, relabel or reweigh training samples by their influence on the loss of the points that the defender is given.

    Args:
        estimator: ``"if"`` has the exact inverse Hessian; ``"ip-ensemble"`` sums the model and five copies with noise N(0, 0.01²).
        action: ``"reweigh"`` takes the published weights, 4 n softmax(z) cut to [0, 2], z being the standardised benefit.
        fraction: of the samples that are removed or relabelled, the most harmful ones.
    """
    linear = _linear(attacked.scene)
    n = len(linear.train)
    values = _scores(linear, estimator, seed)
    worst = np.argsort(-values, kind="stable")[: int(fraction * n)]
    weights, labels = np.ones(n), None
    if action == "remove":
        weights[worst] = 0
    elif action == "relabel":
        labels = linear.learner.y.copy()
        labels[worst] = 1 - labels[worst]
    elif action == "reweigh":
        benefit = -(values - values.mean()) / values.std()
        weights = np.clip(4 * n * softmax(benefit), 0, 2)
    else:
        raise ValueError(f"action: expected remove, relabel or reweigh, got {action!r}")
    about = {"effective_share": float(weights.sum() ** 2 / (weights**2).sum() / n), "positive_among_worst": float(linear.learner.y[worst].mean())}
    task = linear.learner.fit(weights, labels).task
    return Defended(task, weights, Scores(values, linear.train.ids, f"published-{estimator}"), labels, about)


def accuracies(attacked: Attacked, defended: Defended, *, seed: int, overshoot: float = 1.3) -> Mapping[str, float]:
    """Accuracy on the stored points, on the untouched test set, and with the same points attacked again at the defended model.

    Nothing of scenes that are not attacked by this protocol.
    """
    if not isinstance(attacked.scene, Linear):
        return {}
    linear = attacked.scene
    again = _attacked(linear.untouched, linear.moved, defended.task, overshoot)
    return {
        "accuracy_stored": _accuracy(defended.task, linear.test),
        "accuracy_untouched": _accuracy(defended.task, linear.untouched),
        "accuracy_attacked_again": _accuracy(defended.task, again),
    }


def _scores(linear: Linear, estimator: str, seed: int) -> Array:
    if estimator == "random":
        return np.random.default_rng(seed + 1).random(len(linear.train))
    known: dict[str, Estimator | None] = {
        "if": None, "ip": InnerProduct(), "self-ip": SelfInfluence(),
        "ip-ensemble": Ensemble(members=6, perturbation="gaussian", std=0.01, seed=seed),
    }  # fmt: skip
    if estimator not in known:
        raise ValueError(f"estimator: expected random or one of {', '.join(known)}, got {estimator!r}")
    learner = replace(linear.learner, estimator=known[estimator])
    return learner.fit().scores([Utility(linear.valid)])[:, 0]


def _attacked(clean: Samples, rows: Labels, task: Task, overshoot: float) -> Samples:
    x, y = clean.batch(slice(None))
    at = torch.from_numpy(rows)
    x = x.clone()
    x[at] = LinearAttack(overshoot=overshoot)(task, task.params(), (x[at], y[at]))
    return Samples((x, y), clean.ids)


def _accuracy(task: Task, data: Samples) -> float:
    x, y = data.batch(slice(None))
    with torch.no_grad():
        return float(((task.outputs(task.params(), (x, y)).reshape(-1) > 0) == (y == 1)).double().mean())


def _numbers(frame: pd.DataFrame) -> Array:
    """Numbers as they are, and a column per level, but one where there are two."""
    coded: Any = pd.get_dummies(frame, dtype=float)
    two = [f"{name}_{min(frame[name])}" for name in frame.select_dtypes(exclude="number") if frame[name].nunique() == 2]
    return np.asarray(coded.drop(columns=two).to_numpy(np.float64))


def _shuffled(x: Array, y: Labels, l2: float, intercept: bool) -> Linear:
    order = np.random.default_rng(42_000).permutation(len(y))
    return _scene(x[order], y[order], round(0.6 * len(y)), l2, intercept)


def _scene(x: Array, y: Labels, given: int, l2: float, intercept: bool) -> Linear:
    """The first ``given`` rows to train on, the others halved."""
    first = x[: given - round(0.25 * given)]
    scale = first.std(0)
    x = (x - first.mean(0)) / np.where(scale > 0, scale, 1)
    test, valid = train_test_split(np.arange(given, len(y)), test_size=0.5, random_state=42_000)
    learner = Logistic(x[:given], y[:given], l2, intercept=intercept)
    held_out, tested = (Samples((torch.from_numpy(x[rows]), torch.from_numpy(y[rows])), rows) for rows in (valid, test))

    def fit(data: Samples, weights: Array | None) -> Task:
        return replace(learner, y=data.labels.numpy()).fit(weights).task

    task = FittedLogistic(learner, np.ones(given), learner.y, np.zeros(x.shape[1]), 0.0).task
    nothing = np.zeros(0, dtype=np.int64)
    return Linear(task, Recipe(), learner.train, held_out, tested, fit=fit, learner=learner, untouched=tested, moved=nothing)


def _linear(scene: Scene) -> Linear:
    if not isinstance(scene, Linear):
        raise ValueError("data: this attack and its defences take the data of this suite, which are learnt by logistic regression")
    return scene


DATA: dict[str, Callable[..., Scene]] = {"published-adult": adult, "published-bank": bank, "published-celeba": celeba}
ATTACKS: dict[str, Callable[..., Change]] = {"across-the-boundary": across_the_boundary}
DEFENCES: dict[str, Callable[..., Defended]] = {"published-influence": influence}
METRICS: dict[str, Callable[..., Mapping[str, float]]] = {"published-accuracies": accuracies}
