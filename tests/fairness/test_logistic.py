"""fairness/logistic.py: the closed form against scikit-learn, the exact estimator of the core, and refits."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.special import expit
from sklearn.linear_model import LogisticRegression

from robust_if import Exact, InnerProduct, Samples, Target, Utility, score
from robust_if.fairness.logistic import FittedLogistic, Logistic
from robust_if.fairness.targets import FairnessGap, fairness_gap

N, D, L2 = 80, 4, 1.7
NOTIONS = ["demographic_parity", "equal_opportunity", "equalized_odds", "error_rate_parity", "covariance", "loss_gap", "worst_group_loss"]


def draw(seed: int, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features, labels that depend on them and on the group, and groups."""
    random = np.random.default_rng(seed)
    s = (np.arange(n) % 3 > 0).astype(np.int64)
    x = random.normal(size=(n, D)) + 0.8 * s[:, None]
    y = (random.random(n) < expit(x @ np.array([1.0, -0.7, 0.4, 0.0]) + s - 0.5)).astype(np.int64)
    return x, y, s


def learner(**settings: object) -> Logistic:
    x, y, _ = draw(1, N)
    return Logistic(x, y, **{"l2": L2, **settings})


def gap(notion: str = "demographic_parity") -> FairnessGap:
    x, y, s = draw(2, 90)
    return fairness_gap(notion, (torch.from_numpy(x), torch.from_numpy(y)), s, temperature=1.0)


def utility() -> Utility:
    return Utility(Samples(gap().data.batch(slice(None))[:2]))


def value(fitted: FittedLogistic, target: Target) -> float:
    return float(target.value(fitted.task, fitted.task.params()))


def weights(seed: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).uniform(0.2, 2, N)


@pytest.mark.parametrize("intercept", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_fit_has_no_gradient_left_and_is_that_of_scikit_learn(intercept: bool, weighted: bool) -> None:
    model, w = learner(intercept=intercept), weights() if weighted else np.ones(N)
    fitted = model.fit(w)
    left = model.design.T @ (w * (fitted.probabilities - model.y))
    left[:D] += L2 * fitted.coef
    assert np.abs(left).max() <= 1e-6
    other = LogisticRegression(C=1 / L2, fit_intercept=intercept, tol=1e-12, max_iter=10_000).fit(model.x, model.y, sample_weight=w)
    np.testing.assert_allclose(fitted.coef, other.coef_[0], atol=1e-5)
    assert abs(fitted.intercept - other.intercept_[0]) <= 1e-5 and (intercept or fitted.intercept == 0)
    x = draw(2, 90)[0]
    np.testing.assert_array_equal(fitted.predict(x), other.predict(x))
    np.testing.assert_allclose(fitted.predict_proba(x), other.predict_proba(x)[:, 1], atol=1e-5)
    np.testing.assert_array_equal(fitted.predict(x), fitted.predict_proba(x) > 0.5)


def test_the_weights_weigh_as_often_as_a_sample_is_there() -> None:
    model, w = learner(), np.arange(N) % 3
    repeated = Logistic(np.repeat(model.x, w, 0), np.repeat(model.y, w), L2).fit()
    np.testing.assert_allclose(model.fit(w).coef, repeated.coef, atol=1e-8)


def test_the_task_is_the_same_model_with_one_logit_in_float64() -> None:
    fitted = learner().fit()
    outputs = fitted.task.model(torch.from_numpy(fitted.learner.x))
    assert outputs.shape == (N, 1) and outputs.dtype == torch.float64
    np.testing.assert_allclose(torch.sigmoid(outputs[:, 0]).detach(), fitted.probabilities, atol=1e-14)
    losses = fitted.task.losses(fitted.task.params(), fitted.learner.train.batch(slice(None))).detach()
    p, y = fitted.probabilities, fitted.labels
    np.testing.assert_allclose(losses, -np.log(np.where(y == 1, p, 1 - p)), atol=1e-12)


@pytest.mark.parametrize("intercept", [False, True])
def test_values_and_gradients_are_those_of_the_targets(intercept: bool) -> None:
    fitted = learner(intercept=intercept).fit(weights())
    targets = [*map(gap, NOTIONS), utility(), utility() + 2 * gap()]
    np.testing.assert_allclose(fitted.values(targets), [value(fitted, each) for each in targets], atol=1e-12)
    found, params = fitted.gradients(targets), fitted.task.params()
    for at, target in enumerate(targets):
        slope = target.gradient(fitted.task, params)
        np.testing.assert_allclose(found[:, at], torch.cat([each.flatten() for each in slope.values()]), atol=1e-12)


@pytest.mark.parametrize("notion", NOTIONS)
def test_scores_without_intercept_are_those_of_the_exact_estimator(notion: str) -> None:
    fitted = learner(intercept=False).fit()
    targets: list[Target] = [gap(notion), *gap(notion).signed(), utility(), utility() + 3 * gap(notion)]
    found = fitted.scores(targets)
    estimator = InnerProduct(Exact(curvature="hessian", damping=L2 / N))
    for at, target in enumerate(targets):
        exact = score(fitted.task, fitted.learner.train, target=target, estimator=estimator).values
        assert np.abs(exact).max() > 1e-5
        np.testing.assert_allclose(found[:, at], exact, atol=1e-8 * np.abs(exact).max() + 1e-12)


@pytest.mark.parametrize("intercept", [False, True])
def test_scores_with_weights_are_dense_algebra(intercept: bool) -> None:
    model, w = learner(intercept=intercept), weights()
    fitted, targets = model.fit(w), [gap(), utility()]
    x = np.column_stack([model.x, np.ones(N)]) if intercept else model.x
    p = expit(x @ (np.append(fitted.coef, fitted.intercept) if intercept else fitted.coef))
    hessian = sum(w[i] * p[i] * (1 - p[i]) * np.outer(x[i], x[i]) for i in range(N)) + L2 * np.diag([1.0] * D + [0.0] * intercept)
    np.testing.assert_allclose(fitted.curvature, hessian, rtol=1e-10)
    np.testing.assert_allclose(hessian @ fitted.solve(x[:3].T), x[:3].T, atol=1e-10)
    expected = -((p - model.y)[:, None] * x) @ np.linalg.inv(hessian) @ fitted.gradients(targets)
    np.testing.assert_allclose(fitted.scores(targets), expected, rtol=1e-8)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("intercept", [False, True])
def test_scores_are_the_slope_of_refits(intercept: bool, weighted: bool) -> None:
    model, w, h = learner(intercept=intercept), weights() if weighted else np.ones(N), 1e-3
    targets: list[Target] = [gap("covariance"), gap().signed()[0], gap("equal_opportunity"), utility()]
    found = model.fit(w).scores(targets)
    for i in range(0, N, 9):
        up, down = (np.array(exact(model, w + sign * h * (np.arange(N) == i)).values(targets)) for sign in (1, -1))
        np.testing.assert_allclose(found[i], (up - down) / (2 * h), atol=1e-5, rtol=1e-4)
        assert np.abs(found[i]).max() > 1e-4


def test_leaving_one_out_is_as_predicted() -> None:
    (x, y, _), targets, rows = draw(1, 400), [gap(), utility()], np.arange(0, 400, 8)
    model = Logistic(x, y, L2)
    fitted = model.fit()
    found, now = fitted.scores(targets)[rows], np.array(fitted.values(targets))
    came = np.stack([now - model.fit(1.0 - (np.arange(400) == i), start=fitted).values(targets) for i in rows])
    for at in range(len(targets)):
        assert np.corrcoef(found[:, at], came[:, at])[0, 1] > 0.999
        assert 0.95 < (found[:, at] @ came[:, at]) / (came[:, at] @ came[:, at]) < 1.05


def test_a_flip_is_predicted_with_its_sign_and_about_its_size() -> None:
    (x, y, _), targets, rows = draw(1, 400), [gap(), utility()], np.arange(0, 400, 8)
    model = Logistic(x, y, L2)
    fitted = model.fit()
    found, now = fitted.flips(targets, 1 - y)[rows], np.array(fitted.values(targets))
    came = np.stack([now - model.fit(None, np.where(np.arange(400) == i, 1 - y, y), fitted).values(targets) for i in rows])
    for at in range(len(targets)):
        assert np.corrcoef(found[:, at], came[:, at])[0, 1] > 0.98
        assert 0.7 < (found[:, at] @ came[:, at]) / (came[:, at] @ came[:, at]) < 1.05


def test_a_flip_of_samples_on_the_boundary_is_exact_to_first_order() -> None:
    """With a penalty that keeps all logits near 0 there is one curvature, 1/4; the slope is that of mass moved from one label to the other."""
    x, y, _ = draw(1, N)
    model, h = Logistic(x, y, l2=1e4, intercept=False), 1e-3
    w, targets = weights(), [gap(), utility()]
    found = model.fit(w).flips(targets, 1 - y)
    twice = Logistic(np.tile(x, (2, 1)), np.append(y, 1 - y), 1e4, intercept=False)
    for i in range(0, N, 9):
        one = np.arange(N) == i
        up, down = (np.array(exact(twice, np.append(w - each * one, each * one)).values(targets)) for each in (h, -0.0))
        np.testing.assert_allclose(w[i] * (down - up) / h, found[i], rtol=2e-3)


def test_flips_of_half_a_kind_are_predicted() -> None:
    """Kinds of samples with a coefficient each; the model is sure of the label of the first one, where the curvature at the optimum is small."""
    kinds = np.arange(200) % 4
    x, y = np.eye(4)[kinds], (np.random.default_rng(0).random(200) < np.array([0.02, 0.4, 0.5, 0.6])[kinds]).astype(np.int64)
    model = Logistic(x, y, 0.01, intercept=False)
    target = fairness_gap("covariance", (torch.from_numpy(x), torch.from_numpy(y)), kinds == 0).signed()[0]
    fitted, half = model.fit(), (kinds == 0) & (np.arange(200) % 8 == 0)
    predicted = fitted.flips([target], 1 - y)[half].sum()
    (before,), (after,) = fitted.values([target]), model.fit(None, np.where(half, 1 - y, y)).values([target])
    at_the_optimum = (2 * y - 1)[half] @ x[half] @ fitted.solve(fitted.gradients([target])[:, 0])
    assert 0.8 < predicted / (before - after) < 1.25
    assert at_the_optimum / (before - after) > 3


def test_scores_follow_the_labels_of_the_fit() -> None:
    model, others = learner(), np.where(np.arange(N) < 9, 1 - learner().y, learner().y)
    relabelled, direct = model.fit(None, others), Logistic(model.x, others, L2).fit()
    np.testing.assert_allclose(relabelled.scores([gap()]), direct.scores([gap()]), atol=1e-9)
    np.testing.assert_array_equal(relabelled.labels, others)
    np.testing.assert_array_equal(model.y, draw(1, N)[1])


def test_a_sample_of_weight_0_has_a_score_but_no_flip() -> None:
    w = np.where(np.arange(N) < 5, 0.0, 1.0)
    fitted = learner().fit(w)
    assert (fitted.scores([gap()])[:5] != 0).all() and not fitted.flips([gap()], 1 - fitted.labels)[:5].any()


def test_another_estimator_scores_in_the_place_of_the_closed_form() -> None:
    fitted, targets = learner(estimator=InnerProduct()).fit(), [gap(), utility()]
    gradients = (fitted.probabilities - fitted.labels)[:, None] * fitted.learner.design
    np.testing.assert_allclose(fitted.scores(targets), -gradients @ fitted.gradients(targets) / N, atol=1e-12)
    moved = -fitted.learner.design * (fitted.labels - 0.5)[:, None] * 2
    np.testing.assert_allclose(fitted.flips(targets, 1 - fitted.labels), moved @ -fitted.gradients(targets) / N, atol=1e-12)
    assert not fitted.calibrated and learner().fit().calibrated
    exact_one = learner(estimator=InnerProduct(Exact(curvature="hessian", damping=L2 / N)), intercept=False).fit()
    assert exact_one.calibrated
    np.testing.assert_allclose(exact_one.scores(targets), replace(exact_one, learner=learner(intercept=False)).scores(targets), atol=1e-10)


def test_a_start_does_not_change_the_optimum() -> None:
    model = learner()
    np.testing.assert_allclose(model.fit(weights(), start=model.fit()).coef, model.fit(weights()).coef, atol=1e-7)


def test_the_order_of_samples_does_not_matter() -> None:
    model, order = learner(), np.random.default_rng(0).permutation(N)
    found = Logistic(model.x[order], model.y[order], L2).fit(weights()[order]).scores([gap()])
    np.testing.assert_allclose(found, model.fit(weights()).scores([gap()])[order], atol=1e-9)


@pytest.mark.parametrize(
    ("x", "y", "l2", "message"),
    [
        (np.zeros((3, 2)), [0, 1, 2], 1.0, "y: expected labels 0 and 1, got"),
        (np.zeros((3, 2)), [0, 0.5, 1], 1.0, "y: expected labels 0 and 1, got"),
        (np.zeros((3, 2)), [0, 1], 1.0, "x, y: expected shapes"),
        (np.zeros(3), [0, 1, 1], 1.0, "x, y: expected shapes"),
        (np.zeros((3, 2)), [0, 1, 1], 0.0, "l2: expected a positive number, got 0"),
        (np.zeros((3, 2)), [0, 1, 1], float("nan"), "l2: expected a positive number, got nan"),
    ],
)
def test_bad_data_are_refused(x: np.ndarray, y: list[float], l2: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Logistic(x, np.array(y), l2)


@pytest.mark.parametrize("given", [np.ones(N - 1), -np.ones(N), np.full(N, np.nan), np.zeros(N), draw(1, N)[1]])
def test_bad_weights_are_refused(given: np.ndarray) -> None:
    with pytest.raises(ValueError, match="weights: expected"):
        learner().fit(given)


def exact(model: Logistic, w: np.ndarray) -> FittedLogistic:
    """The optimum to machine precision: differences of refits divide by a small number."""
    x, y = model.design, model.y
    penalty = np.append(np.full(model.x.shape[1], model.l2), [0.0] * model.intercept)

    def loss(t: np.ndarray) -> tuple[float, np.ndarray]:
        s = x @ t
        return float(w @ (np.logaddexp(0, s) - y * s) + penalty @ t**2 / 2), x.T @ (w * (expit(s) - y)) + penalty * t

    t = minimize(loss, np.zeros(x.shape[1]), jac=True).x
    for _ in range(3):
        p = expit(x @ t)
        t = t - np.linalg.solve((x * (w * p * (1 - p))[:, None]).T @ x + np.diag(penalty), loss(t)[1])
    return FittedLogistic(model, w, y, t[: model.x.shape[1]], float(t[-1]) if model.intercept else 0.0)
