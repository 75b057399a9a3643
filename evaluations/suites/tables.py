"""Tables with sensitive groups, learnt by logistic regression to its optimum: one drawn at random, and real ones.

The real ones are read from the folder that ROBUST_IF_DATA names. Rows are divided at random by the seed, with as many positive labels in every part;
numbers are standardised on the training rows and categories become one column per level. Label 1 is the favourable one. An attacker at test time
moves numbers within a radius in standard deviations; categories stay, and so does the sensitive feature of the drawn table.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import train_test_split

from robust_if import models
from robust_if.attacks.evasion import Threat
from robust_if.data import Samples
from robust_if.evaluations.suites.files import folder
from robust_if.evaluations.suites.parts import Scene
from robust_if.evaluations.suites.truth import Known
from robust_if.fairness.groups import Groups
from robust_if.fairness.logistic import FittedLogistic, Logistic
from robust_if.task import Task
from robust_if.training import Recipe

Array = NDArray[np.float64]
Labels = NDArray[np.int64]

#: For models that are trained step by step, and for estimators that train models of their own.
RECIPE = Recipe(epochs=10, optimizer="adamw", lr=5e-3, weight_decay=0.0, batch_size=128)


@dataclass(frozen=True)
class Optimum:
    """Trains logistic regression to its optimum, Σ wᵢ ℓᵢ + (l2 / 2) ‖θ‖², as a model of two logits ±θᵀx / 2.

    Args:
        l2: penalty.
    """

    l2: float = 1.0

    def __call__(self, data: Samples, weights: Array | None) -> Task:
        return self.task(self.learner(data).fit(weights))

    def learner(self, data: Samples) -> Logistic:
        """The learner of these samples, for repairs."""
        x, y = data.batch(slice(None))[:2]
        return Logistic(x.double().numpy(), y.numpy(), self.l2)

    @staticmethod
    def task(fitted: FittedLogistic) -> Task:
        """The fitted model with two logits."""
        task = linear(len(fitted.coef))
        half, bias = torch.from_numpy(fitted.coef) / 2, fitted.intercept / 2
        return task.at({"weight": torch.stack([-half, half]), "bias": torch.tensor([-bias, bias], dtype=torch.float64)})


def linear(features: int) -> Task:
    """A linear model of two logits in float64, its parameters 0."""
    module = torch.nn.Linear(features, 2, dtype=torch.float64)
    torch.nn.init.zeros_(module.weight)
    torch.nn.init.zeros_(module.bias)
    return Task(module.eval())


def two_groups(
    *, seed: int, model: str = "logistic", train: int = 1500, valid: int = 500, test: int = 2000, noise: float = 0.27, eps: float = 0.1
) -> Scene:
    """Two groups of equal size that differ in two of eight features; the sensitive feature is the ninth. Drawn at random.

    Args:
        model: ``"logistic"``, or the name of a model that is trained step by step.
        noise: scale of the logistic noise on what decides the label.
        eps: L∞ radius of an attacker at test time, in standard deviations; 0 for none.
    """
    n, rng = train + valid + test, np.random.default_rng(seed)
    s = rng.integers(2, size=n)
    x = rng.normal(size=(n, 8))
    x[:, :2] += 0.55 * (s[:, None] - 0.5)
    y = (x.sum(1) / np.sqrt(2) + noise * rng.logistic(size=n) > 0).astype(np.int64)
    rows = np.split(np.arange(n), [train, train + valid])
    return _scene(np.c_[x, s - 0.5], y, np.where(s == 1, "B", "A"), rows, model, seed, 1.0, eps, moving=np.arange(9) < 8)


def breast_cancer(*, seed: int, model: str = "logistic", eps: float = 0.1) -> Scene:
    """scikit-learn's breast cancer, 569 rows with 30 numbers, 60 : 20 : 20; without groups.

    Args:
        model: as of :func:`two_groups`, and so is ``eps``.
    """
    x, y = load_breast_cancer(return_X_y=True)
    return _scene(x, y, None, _divided(y, seed, 0.2, 0.2), model, seed, 1.0, eps)


def adult(*, seed: int, model: str = "logistic", sensitive: str = "sex", rows: int = 0, eps: float = 0.0) -> Scene:
    """Adult, the 45,222 rows without a missing value, 50 : 17 : 33; income above 50,000.

    Args:
        model: as of :func:`two_groups`.
        sensitive: ``"sex"`` or ``"race"``, whose groups are White and all others.
        rows: so many of them, drawn by the seed; 0 for all.
        eps: as of :func:`two_groups`.
    """
    if sensitive not in ("sex", "race"):
        raise ValueError(f"sensitive: expected 'sex' or 'race', got {sensitive!r}")
    frame, _ = adult_rows()
    s = frame["sex"] if sensitive == "sex" else frame["race"].where(frame["race"] == "White", "other")
    y = frame["income"].str.startswith(">50K").to_numpy().astype(np.int64)
    return _real(frame.drop(columns=["fnlwgt", "income"]), y, s.to_numpy(str), model, seed, (0.33, 0.17), 2.2622, rows, eps)


def bank(*, seed: int, model: str = "logistic", rows: int = 0, eps: float = 0.0) -> Scene:
    """Bank marketing, 40,004 rows, 60 : 20 : 20; who subscribes. Groups are ages from 25 to 60 and others.

    Args:
        model: as of :func:`two_groups`; ``rows`` and ``eps`` as of :func:`adult`.
    """
    frame = pd.read_csv(folder("bank_marketing") / "bank-full-40004-no-divorced.csv.gz")
    within = frame["age"].between(25, 60)
    y = (frame["y"] == "yes").to_numpy().astype(np.int64)
    table = frame.drop(columns="y").assign(within=within.astype(float))
    return _real(table, y, np.where(within, "25-60", "other"), model, seed, (0.2, 0.2), 1.0, rows, eps)


def german(*, seed: int, model: str = "logistic", eps: float = 0.0) -> Scene:
    """German credit, 1,000 rows, 60 : 20 : 20; who pays back. Groups by an age of 30: so few rows that a gap has a standard error of about 0.07.

    Args:
        model: as of :func:`two_groups`, and so is ``eps``.
    """
    frame = pd.read_csv(folder("german_credit") / "german.data", sep=" ", header=None)
    y, s = (frame[20] == 1).to_numpy().astype(np.int64), np.where(frame[12] >= 30, "30 or older", "younger")
    return _real(frame.drop(columns=20).rename(columns=str), y, s, model, seed, (0.2, 0.2), 5.8484, 0, eps)


def _real(
    table: pd.DataFrame, y: Labels, s: NDArray[np.str_], model: str, seed: int, shares: tuple[float, float], l2: float, rows: int, eps: float
) -> Scene:  # fmt: skip
    if rows < 0 or rows > len(y):
        raise ValueError(f"rows: expected 0, for all, or up to {len(y)}, got {rows}")
    if rows:
        drawn = np.sort(np.random.default_rng([seed, 1]).permutation(len(y))[:rows])
        table, y, s = table.iloc[drawn], y[drawn], s[drawn]
    coded = pd.get_dummies(table, dtype=float)
    return _scene(coded.to_numpy(np.float64), y, s, _divided(y, seed, *shares), model, seed, l2, eps, moving=coded.columns.isin(table.columns))


def _divided(y: Labels, seed: int, test: float, valid: float) -> list[Labels]:
    """Training, validation and test rows."""
    rest, tested = train_test_split(np.arange(len(y)), test_size=test, random_state=seed, stratify=y)
    trained, held = train_test_split(rest, test_size=valid / (1 - test), random_state=seed, stratify=y[rest])
    return [trained, held, tested]


def _scene(
    x: Array, y: Labels, s: NDArray[np.str_] | None, rows: list[Labels], model: str, seed: int, l2: float, eps: float,
    moving: NDArray[np.bool_] | None = None,
) -> Known:  # fmt: skip
    """The scene of training, validation and test ``rows``; ``moving`` are the columns that an attacker at test time changes, all by default."""
    mean, scale = x[rows[0]].mean(0), x[rows[0]].std(0)
    kept = np.flatnonzero(scale > 0)
    x = (x[:, kept] - mean[kept]) / scale[kept]
    train, valid, test = (Samples((torch.from_numpy(x[each]), torch.from_numpy(y[each])), each) for each in rows)
    names = ("train", "valid", "test")
    everyone = None if s is None else Groups.of({"group": s})
    groups = {} if everyone is None else {
        name: Groups(everyone.codes[each], everyone.features, everyone.values) for name, each in zip(names, rows, strict=True)
    }  # fmt: skip
    mutable = None if moving is None else torch.from_numpy(moving[kept])
    threat = Threat(eps, mutable=mutable) if eps else None
    fit, task = (Optimum(l2), linear(len(kept))) if model == "logistic" else (None, Task(models.build(model, (len(kept),), 2, seed).double()))
    recipe = replace(RECIPE, seed=seed)
    return Known(task, recipe, train, valid, test, threat=threat, groups=groups, fit=fit, right=y[rows[0]])


@cache
def adult_rows() -> tuple[pd.DataFrame, int]:
    """Adult without rows that miss a value, in the order of its two files, and how many of them are in the first."""
    names = [
        "age", "workclass", "fnlwgt", "education", "education-num", "marital-status", "occupation", "relationship", "race", "sex", "capital-gain",
        "capital-loss", "hours-per-week", "native-country", "income",
    ]  # fmt: skip
    files = [
        pd.read_csv(folder("adult") / file, header=None, names=names, skipinitialspace=True, na_values="?", skiprows=skipped).dropna()
        for file, skipped in (("adult.data.gz", 0), ("adult.test.gz", 1))
    ]
    return pd.concat(files, ignore_index=True), len(files[0])
