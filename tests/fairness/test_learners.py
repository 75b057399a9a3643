"""fairness/learners.py: networks as learners of a repair."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from robust_if import EKFAC, InnerProduct, Recipe, Samples, Task, Utility
from robust_if.fairness.learners import Fitted, Learner, Network
from robust_if.fairness.logistic import Logistic
from robust_if.fairness.targets import FairnessGap, fairness_gap
from robust_if.models import mlp
from robust_if.training import fit

N, CLASSES = 60, 3
RECIPE = Recipe(epochs=6, lr=0.1, batch_size=16)


def draw(seed: int, n: int = N) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    random = np.random.default_rng(seed)
    s = np.arange(n) % 2
    x = random.normal(size=(n, 4)) + s[:, None]
    y = (x[:, 0] > 0).astype(np.int64) + (x[:, 1] > 0.5)
    return torch.from_numpy(x), torch.from_numpy(y), s


def network(**settings: object) -> Network:
    torch.manual_seed(0)
    return Network(Task(mlp((4,), CLASSES, width=6).double().eval()), Samples(draw(0)[:2]), RECIPE, **settings)


def targets() -> list[FairnessGap | Utility]:
    x, y, s = draw(1)
    return [fairness_gap("demographic_parity", (x, y), s), Utility(Samples((x, y)))]


def parameters(fitted: Fitted) -> torch.Tensor:
    return torch.cat([each.flatten() for each in fitted.task.params().values()])


def test_both_learners_serve_where_the_protocols_are_asked_for() -> None:
    x, y, _ = draw(0)
    learners: list[Learner] = [network(), Logistic(x.numpy(), (y > 0).numpy().astype(int))]
    for learner in learners:
        fitted: Fitted = learner.fit()
        labels = learner.train.batch(slice(None))[1].numpy()
        found = fitted.scores(targets()[:1]), fitted.flips(targets()[:1], 1 - labels.clip(max=1))
        assert isinstance(fitted.calibrated, bool) and isinstance(fitted.task, Task)
        assert all(each.shape == (N, 1) and each.dtype == np.float64 and np.isfinite(each).all() for each in found)
        assert len(fitted.values(targets()[:1])) == 1


def test_a_fit_is_the_training_of_the_recipe() -> None:
    model = network()
    np.testing.assert_array_equal(parameters(model.fit()), parameters(model.fit(np.ones(N))))
    direct = fit(model.task, model.train, RECIPE, weights=np.ones(N))
    assert torch.equal(parameters(model.fit()), torch.cat([each.flatten() for each in direct.params().values()]))


def test_a_warm_start_goes_on_from_the_parameters_of_the_start() -> None:
    model = network(again=Recipe(epochs=1, lr=1e-9, batch_size=16))
    cold = model.fit()
    warm = model.fit(start=cold)
    torch.testing.assert_close(parameters(warm), parameters(cold), atol=1e-6, rtol=0)
    assert not torch.equal(parameters(warm), parameters(cold))
    assert torch.equal(parameters(cold), parameters(model.fit()))  # the start itself is as it was
    shorter = replace(RECIPE, epochs=2, lr=RECIPE.lr / 3)
    assert torch.equal(parameters(network(again=shorter).fit(start=cold)), parameters(network().fit(start=cold)))


def test_a_weight_of_0_removes_the_sample() -> None:
    model, gone = network(), np.arange(N) < 11
    without = replace(model, train=model.train.take(np.flatnonzero(~gone)))
    assert torch.equal(parameters(model.fit(np.where(gone, 0.0, 1.0))), parameters(without.fit()))
    fitted = model.fit(np.where(gone, 0.0, 1.0))
    assert fitted.scores(targets()).shape == (N, 2)
    np.testing.assert_allclose(fitted.scores(targets())[~gone], without.fit().scores(targets()), atol=1e-12)
    assert not fitted.flips(targets(), np.zeros(N, dtype=np.int64))[gone].any()


def test_labels_of_the_fit_are_those_that_are_trained_and_scored() -> None:
    model, others = network(), (draw(0)[1].numpy() + (np.arange(N) < 9)) % CLASSES
    relabelled = model.fit(labels=others)
    direct = replace(model, train=Samples((draw(0)[0], torch.from_numpy(others)))).fit()
    assert torch.equal(parameters(relabelled), parameters(direct))
    np.testing.assert_array_equal(relabelled.scores(targets()), direct.scores(targets()))
    np.testing.assert_array_equal(model.train.batch(slice(None))[1], draw(0)[1])


def test_scores_are_those_of_the_estimator_and_positive_where_a_step_against_the_sample_helps() -> None:
    fitted = network().fit()
    found, params = fitted.scores(targets()), {name: value.clone() for name, value in fitted.task.params().items()}
    for at, target in enumerate(targets()):
        named = InnerProduct().score(fitted.task, fitted.samples, target=target).values
        np.testing.assert_allclose(found[:, at], named, atol=1e-12)
        i = int(found[:, at].argmax())
        batch = tuple(each[i : i + 1] for each in draw(0)[:2])
        slope = torch.func.grad(lambda p, batch=batch: fitted.task.losses(p, batch).mean())(params)
        moved = {name: params[name] + 1e-4 * slope[name] for name in params}
        assert found[i, at] > 0 and target.value(fitted.task, moved) < target.value(fitted.task, params)


def test_flips_are_differences_of_scores_times_the_weight() -> None:
    w = np.random.default_rng(0).uniform(0.5, 2, N)
    fitted, others = network().fit(w), (draw(0)[1].numpy() + 1) % CLASSES
    found = fitted.flips(targets(), others)
    relabelled = Samples((draw(0)[0], torch.from_numpy(others)))
    other = [InnerProduct().score(fitted.task, fitted.samples, target=each, samples=relabelled).values for each in targets()]
    np.testing.assert_allclose(found, w[:, None] * (fitted.scores(targets()) - np.stack(other, 1)), atol=1e-12)
    assert not fitted.flips(targets(), draw(0)[1].numpy()).any()


def test_values_are_those_of_the_targets() -> None:
    fitted = network().fit()
    expected = [float(each.value(fitted.task, fitted.task.params())) for each in targets()]
    np.testing.assert_allclose(fitted.values(targets()), expected, atol=1e-12)


def test_calibration_is_that_of_the_estimator() -> None:
    assert not network().fit().calibrated and network(estimator=InnerProduct(EKFAC())).fit().calibrated


@pytest.mark.parametrize("weights", [np.ones(N - 1), -np.ones(N), np.zeros(N)])
def test_bad_weights_are_refused(weights: np.ndarray) -> None:
    with pytest.raises(ValueError, match="weights"):
        network().fit(weights)
