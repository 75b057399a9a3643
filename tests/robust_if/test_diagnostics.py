"""diagnostics.py: the predicted correlation against dense algebra, and against the correlation that then is measured."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from cases import Case, blobs, case
from oracles import flat, minimise
from robust_if import InnerProduct, Samples, Sweep, Target, Task, Utility
from robust_if.curvature import Curvature
from robust_if.diagnostics import Prediction, _advice, predicted_correlation
from robust_if.models import logistic_regression
from robust_if.preconditioners.exact import Exact
from robust_if.task import Params
from unchanged import untouched


def dense(c: Case, damping: float) -> tuple[float, float]:
    """The correlation and the angle by dense algebra."""
    v = flat(Utility(c.valid).gradient(c.task, c.task.params())).numpy()
    h = Curvature(c.task, c.task.params(), c.train).dense().numpy()
    h += damping * np.eye(len(h))
    u = np.linalg.solve(h, v)
    cosine = v @ u / np.linalg.norm(v) / np.linalg.norm(u)
    return v @ v / math.sqrt((v @ u) * (v @ h @ v)), math.degrees(math.acos(cosine))


@pytest.mark.parametrize("name", ["logistic", "mlp", "regression"])
def test_it_is_the_formula(name: str) -> None:
    c = case(name)
    got = predicted_correlation(c.task, c.train, Utility(c.valid), damping=0.05, iterations=200)
    correlation, angle = dense(c, 0.05)
    assert got.correlation == pytest.approx(correlation, rel=1e-4) and got.angle == pytest.approx(angle, rel=1e-2)
    assert got.damping == 0.05 and got.residual <= 1e-3


def test_a_solution_cut_short_gives_an_upper_bound_and_says_so() -> None:
    c = case("mlp")
    got = predicted_correlation(c.task, c.train, Utility(c.valid), damping=1e-4, iterations=2)
    assert got.residual > 0.1 and got.correlation > dense(c, 1e-4)[0]
    assert f"at most (the solver stopped at a residual of {got.residual:.2g})" in str(got)


def test_a_large_damping_makes_curvature_pointless() -> None:
    c = case("mlp")
    got = predicted_correlation(c.task, c.train, Utility(c.valid), damping=1e3)
    assert got.correlation == pytest.approx(1, abs=1e-4) and got.angle < 1
    assert "curvature is not worth its cost" in str(got) and "1.000, angle 0°, damping 1e+03" in str(got)


@pytest.mark.parametrize("stretch", [1.0, 3.0, 10.0])
def test_it_predicts_the_correlation_that_is_measured(stretch: float) -> None:
    """Logistic regression at its minimum, with one feature scaled so that the two scores part."""

    def stretched(n: int, seed: int) -> Samples:
        x, y = blobs(n, seed)[0].batch(slice(None))
        return Samples((x * torch.tensor([1.0, stretch]).double(), y))

    train, valid = stretched(400, 0), stretched(200, 1)
    start = Task(logistic_regression((2,), 2).double().eval())
    start = start.at({name: torch.zeros_like(value) for name, value in start.params().items()})
    whole = train.batch(slice(None))

    def risk(params: Params) -> Tensor:
        return start.losses(params, whole).mean() + 1e-3 / 2 * sum((value**2).sum() for value in params.values())

    task = start.at(minimise(risk, start.params()))
    got = predicted_correlation(task, train, Utility(valid), damping=1e-3)
    plain, influence = (
        InnerProduct(preconditioner=each).score(task, train, target=Utility(valid)).values
        for each in (InnerProduct().preconditioner, Exact(damping=1e-3))
    )
    assert got.correlation == pytest.approx(np.corrcoef(plain, influence)[0, 1], abs=0.1)


class Counted(Task):
    """Counts the samples that went through the model."""

    seen = 0

    def outputs(self, params: Params, batch: object) -> object:
        Counted.seen += len(batch[0])  # type: ignore[index]
        return super().outputs(params, batch)


def test_it_costs_at_most_twenty_products_of_the_subsample() -> None:
    train, _ = blobs(900, 0)
    task = Counted(logistic_regression((2,), 2).double().eval())
    Counted.seen = 0
    predicted_correlation(task, train, Utility(train.take(range(30))), damping=None)
    assert Counted.seen <= 20 * 500 + 30


def test_it_repeats_and_leaves_model_and_random_state_as_they_were() -> None:
    c = case("cnn")
    with untouched(c.task.model):
        first = predicted_correlation(c.task, c.train, Utility(c.valid), samples=7)
    again = predicted_correlation(c.task, c.train, Utility(c.valid), samples=7, sweep=Sweep(batch_size=3))
    assert first.correlation == pytest.approx(again.correlation, rel=1e-6)


class Flat(Utility):
    def gradient(self, task: Task, params: Params) -> Params:
        return {name: torch.zeros_like(value) for name, value in params.items()}


def test_a_target_without_gradient_is_refused() -> None:
    c = case("mlp")
    target: Target = Flat(c.valid)
    with pytest.raises(ValueError, match="target: the gradient of utility is zero, so no sample has an influence"):
        predicted_correlation(c.task, c.train, target)


@pytest.mark.parametrize(("correlation", "advice"), [(0.99, "not worth its cost"), (0.8, "part of the order"), (0.3, "changes the order")])
def test_the_advice_follows_the_correlation(correlation: float, advice: str) -> None:
    assert advice in str(Prediction(correlation, 10.0, 0.1, 0.0, _advice(correlation, 20_000)))
    assert ("exact-ggn" in _advice(0.3, 100)) and "ekfac-cg" in _advice(0.3, 20_000)
