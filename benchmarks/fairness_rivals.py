"""What the repairs are compared with: fairlearn's methods, Kamiran-Calders reweighing, FairBatch-like sampling, and no mitigation at all.

Each is a function of a problem and a notion that yields predictors, one per point of its accuracy-gap curve, with the seconds that it took to get
there. The first point is the published default. All are fitted to the training samples alone; validation samples only choose among the points.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from fairlearn.postprocessing import ThresholdOptimizer
from fairlearn.preprocessing import CorrelationRemover
from fairlearn.reductions import DemographicParity, EqualizedOdds, ExponentiatedGradient, GridSearch, TruePositiveRateParity
from fairness_data import Part, Split
from numpy.typing import NDArray
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.neural_network import MLPClassifier

from robust_if.fairness.baselines import fair_batch, kamiran_calders

NOTIONS = ("equal_opportunity", "demographic_parity", "equalized_odds")
MODELS = ("logistic", "mlp", "boosting")
CONSTRAINTS = {"demographic_parity": DemographicParity, "equal_opportunity": TruePositiveRateParity, "equalized_odds": EqualizedOdds}
Labels = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Problem:
    """A split, and the model that is to be fair on it."""

    split: Split
    model: str
    intercept: bool = True

    def estimator(self) -> Any:
        """A fresh scikit-learn estimator that takes sample weights and trains the same way every time.

        Logistic regression stops at scikit-learn's own tolerance: the reductions train it some twenty times, and no decision here depends on more.
        """
        if self.model == "mlp":
            return MLPClassifier((50,), alpha=1e-3, batch_size=256, max_iter=20, random_state=self.split.seed)
        if self.model == "boosting":
            return HistGradientBoostingClassifier(early_stopping=False, random_state=self.split.seed)
        return LogisticRegression(C=1 / self.split.l2, fit_intercept=self.intercept, max_iter=1000)

    def fit(self, weights: NDArray[np.float64] | None = None, labels: Labels | None = None) -> Any:
        train = self.split.train
        w = np.ones(len(train)) if weights is None else weights
        kept = np.flatnonzero(w)  # a sample of weight 0 is none, also where an estimator draws minibatches
        return self.estimator().fit(train.x[kept], (train.y if labels is None else labels)[kept], sample_weight=w[kept])


@dataclass(frozen=True, eq=False)
class Predictor:
    """One point of a method's curve.

    Args:
        point: the setting that gives it, in words.
        predict: 0 or 1 for the samples of a part.
        cpu: seconds of this process.
        wall: seconds on the clock.
        touched: training samples with another weight or label than given, where these say it all.
        deterministic: whether two calls of ``predict`` agree without a fixed seed.
        needs_group: whether ``predict`` looks at the sensitive features.
    """

    point: str
    predict: Callable[[Part], Labels]
    cpu: float
    wall: float
    touched: int | None = None
    deterministic: bool = True
    needs_group: bool = False


Method = Callable[[Problem, str], Iterator[Predictor]]


@dataclass
class Clock:
    """Seconds of this process and on the clock since it was started, of single steps by :meth:`lap`; fairlearn's warnings are kept quiet."""

    cpu: float = 0.0
    wall: float = 0.0

    def lap(self, work: Callable[[], Any]) -> Any:
        began = time.process_time(), time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = work()
        self.cpu += time.process_time() - began[0]
        self.wall += time.perf_counter() - began[1]
        return found

    def seconds(self) -> dict[str, float]:
        return {"cpu": self.cpu, "wall": self.wall}


def plain(model: Any) -> Callable[[Part], Labels]:
    return lambda part: np.asarray(model.predict(part.x), dtype=np.int64)


def unconstrained(problem: Problem, notion: str) -> Iterator[Predictor]:
    clock = Clock()
    model = clock.lap(problem.fit)
    yield Predictor("", plain(model), touched=0, **clock.seconds())


def reweighed(problem: Problem, notion: str) -> Iterator[Predictor]:
    """Kamiran-Calders, and a share of the way there."""
    train = problem.split.train
    for share in (1.0, 0.75, 0.5, 0.25):
        clock = Clock()
        weights = clock.lap(lambda: kamiran_calders(train.y, train.s))
        model = clock.lap(partial(problem.fit, 1 + share * (weights - 1)))
        yield Predictor(f"{share:g} of the way", plain(model), touched=int((weights != 1).sum()), **clock.seconds())


def sampled(problem: Problem, notion: str) -> Iterator[Predictor]:
    """FairBatch-like; the curve are the models on the way."""
    train, clock = problem.split.train, Clock()
    steps, rate, every = (60, 0.01, 10) if problem.model == "logistic" else (20, 0.03, 5)
    found: list[tuple[int, Any, int, dict[str, float]]] = []

    def fit(weights: NDArray[np.float64]) -> Labels:
        model = clock.lap(lambda: problem.fit(weights))
        decided: Labels = clock.lap(lambda: model.predict(train.x))
        found.append((len(found), model, int((weights != 1).sum()), clock.seconds()))
        return decided

    fair_batch(fit, train.y, train.s, notion, steps=steps + 1, rate=rate)  # type: ignore[arg-type]
    for step, model, touched, seconds in [found[-1], *found[every:-1:every]]:
        yield Predictor(f"{step} steps", plain(model), touched=touched, **seconds)


def exponentiated_gradient(problem: Problem, notion: str, *, valid_too: bool = False) -> Iterator[Predictor]:
    """The reduction of Agarwal et al. 2018; with ``valid_too`` it trains on validation samples as well, with nothing left to choose by."""
    train, valid, seed = problem.split.train, problem.split.valid, problem.split.seed
    x, y, s = (np.concatenate([getattr(part, name) for part in ((train, valid) if valid_too else (train,))]) for name in "xys")
    bounds = (0.01, 0.002, 0.03, 0.06, 0.1) if problem.model == "logistic" and not valid_too else (0.01,)
    for bound in bounds:
        clock = Clock()
        model = ExponentiatedGradient(problem.estimator(), CONSTRAINTS[notion](difference_bound=bound))
        clock.lap(partial(model.fit, x, y, sensitive_features=s))

        def predict(part: Part, model: Any = model) -> Labels:
            return np.asarray(model.predict(part.x, random_state=seed), dtype=np.int64)

        yield Predictor(f"bound {bound:g}", predict, deterministic=False, **clock.seconds())


def grid_search(problem: Problem, notion: str) -> Iterator[Predictor]:
    train, clock = problem.split.train, Clock()
    size = {"demographic_parity": 20, "equal_opportunity": 20, "equalized_odds": 49}[notion] if problem.model == "logistic" else 9
    model = GridSearch(problem.estimator(), CONSTRAINTS[notion](), grid_size=size)
    clock.lap(lambda: model.fit(train.x, train.y, sensitive_features=train.s))
    order = [model.best_idx_, *(at for at in range(len(model.predictors_)) if at != model.best_idx_)]
    for at in order:
        yield Predictor(f"point {at} of the grid", plain(model.predictors_[at]), **clock.seconds())


def threshold_optimizer(problem: Problem, notion: str) -> Iterator[Predictor]:
    """Thresholds by group, fitted to the training samples; it must know the group of whom it decides about."""
    train, seed = problem.split.train, problem.split.seed
    constraint = "true_positive_rate_parity" if notion == "equal_opportunity" else notion
    tolerances = (0.0,) if notion == "equalized_odds" else (0.0, 0.02, 0.05, 0.1)  # fairlearn relaxes no equalized odds
    for tolerance in tolerances:
        clock = Clock()
        model = ThresholdOptimizer(
            estimator=problem.estimator(), constraints=constraint, predict_method="predict_proba", tol=tolerance or None
        )  # fmt: skip
        clock.lap(partial(model.fit, train.x, train.y, sensitive_features=train.s))

        def predict(part: Part, model: Any = model) -> Labels:
            return np.asarray(model.predict(part.x, sensitive_features=part.s, random_state=seed), dtype=np.int64)

        yield Predictor(f"tolerance {tolerance:g}", predict, deterministic=False, needs_group=True, **clock.seconds())


def correlation_remover(problem: Problem, notion: str) -> Iterator[Predictor]:
    """Features without their linear correlation with the groups, which it must know to take it out."""
    train = problem.split.train
    groups = np.unique(train.s)

    def with_groups(part: Part) -> NDArray[np.float64]:
        return np.column_stack([part.s[:, None] == groups[1:], part.x]).astype(np.float64)

    for alpha in (1.0, 0.75, 0.5, 0.25):
        clock = Clock()
        remover = CorrelationRemover(sensitive_feature_ids=list(range(len(groups) - 1)), alpha=alpha)
        x = clock.lap(partial(remover.fit_transform, with_groups(train)))
        model = clock.lap(partial(problem.estimator().fit, x, train.y))

        def predict(part: Part, remover: Any = remover, model: Any = model) -> Labels:
            return np.asarray(model.predict(remover.transform(with_groups(part))), dtype=np.int64)

        yield Predictor(f"alpha {alpha:g}", predict, needs_group=True, **clock.seconds())


#: Methods by name.
RIVALS: dict[str, Method] = {
    "unconstrained": unconstrained,
    "Kamiran-Calders": reweighed,
    "FairBatch-like": sampled,
    "ExponentiatedGradient": exponentiated_gradient,
    "ExponentiatedGradient, train + valid": partial(exponentiated_gradient, valid_too=True),
    "GridSearch": grid_search,
    "ThresholdOptimizer": threshold_optimizer,
    "CorrelationRemover": correlation_remover,
}
#: Those that know no notion, and are run once for all of them.
ANY_NOTION = ("unconstrained", "Kamiran-Calders", "CorrelationRemover")
