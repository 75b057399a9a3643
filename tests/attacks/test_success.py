"""attacks/success.py: targets of a defender who holds a suspicious input."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cases import case, relative
from oracles import flat, full_gradient
from robust_if import InnerProduct, Samples, Task, score
from robust_if.attacks.success import AttackSuccess, DeltaInfluence
from robust_if.predictions import PredictionMargin, log_odds


def halved(x: Tensor) -> Tensor:
    return x / 2


def test_log_odds_are_those_of_the_probabilities() -> None:
    logits = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1, 2, 3, 0, 1])
    p = logits.softmax(1).gather(1, labels[:, None])[:, 0]
    assert relative(log_odds(logits, labels), (p / (1 - p)).log()) <= 1e-12
    one = torch.randn(5, dtype=torch.float64)
    yes = torch.tensor([1, 0, 1, 0, 1])
    two = torch.stack([torch.zeros_like(one), one], 1)
    assert relative(log_odds(one, yes), log_odds(two, yes)) <= 1e-12
    assert torch.equal(log_odds(one[:, None], yes), log_odds(one, yes))


def test_a_certain_model_still_has_a_slope() -> None:
    logits = torch.tensor([[60.0, 0.0, 0.0]], requires_grad=True)
    (slope,) = torch.autograd.grad(log_odds(logits, torch.tensor([0])).sum(), logits)
    assert torch.allclose(slope, torch.tensor([[1.0, -0.5, -0.5]]))


@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_gradients_are_exact_and_batches_change_nothing(name: str) -> None:
    c = case(name)
    params = c.task.params()
    x, y = c.valid.batch(slice(None))[:2]
    for target in (
        PredictionMargin(Samples((x, y)), batch_size=3), AttackSuccess(Samples((x, y)), goal_class=1, batch_size=3),
        DeltaInfluence(Samples((x,)), goal_class=1, transforms=(halved, torch.neg), batch_size=3),
    ):  # fmt: skip
        exact = full_gradient(lambda p, target=target: target.value(c.task, p), params)
        assert relative(flat(target.gradient(c.task, params)), exact) <= 1e-10


def test_attack_success_does_not_look_at_labels() -> None:
    c = case("mlp")
    x, y = c.valid.batch(slice(None))[:2]
    values = [AttackSuccess(data, goal_class=0).value(c.task, c.task.params()) for data in (Samples((x, y)), Samples((x, 1 - y)), (x,), x)]
    assert len({float(value) for value in values}) == 1
    p = c.task.outputs(c.task.params(), (x,)).softmax(1)[:, 0]
    assert relative(values[0], -(1 - p).log().mean()) <= 1e-12


def test_the_delta_is_the_difference_of_two_influences() -> None:
    c = case("mlp")
    x = c.valid.batch(slice(0, 1))[0]
    parts = [score(c.task, c.train, target=PredictionMargin((each, torch.ones(1, dtype=torch.long)))).values for each in (x, halved(x), -x)]
    whole = score(c.task, c.train, target=DeltaInfluence(x, goal_class=1, transforms=(halved, torch.neg)))
    assert relative(torch.from_numpy(whole.values), torch.from_numpy(parts[0] - (parts[1] + parts[2]) / 2)) <= 1e-12
    assert whole.target == "delta-influence"


def test_the_samples_that_taught_the_trigger_come_first() -> None:
    """Logistic regression: removing those with a positive score lowers the attack's log-odds, as retraining shows."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 4, dtype=torch.float64, generator=generator)
    y = (x[:, 0] > 0).long()
    poison = torch.nonzero(x[:, 0] < -0.5)[:6, 0]
    x[poison, 3], y[poison] = 4.0, 1
    inputs = x[torch.nonzero(x[:, 0] < -0.5)[6:10, 0]]
    inputs[:, 3] = 4.0
    model = nn.Linear(4, 2).double()

    def trained(rows: Tensor) -> Task:
        torch.manual_seed(0)
        model.reset_parameters()
        optimizer = torch.optim.LBFGS(model.parameters(), max_iter=200)

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x[rows]), y[rows]) + 0.01 * sum((p**2).sum() for p in model.parameters())
            loss.backward()
            return loss

        optimizer.step(closure)
        return Task(model.eval())

    task, target = trained(torch.arange(60)), AttackSuccess(inputs, goal_class=1)
    before = float(target.value(task, task.params()))
    found = InnerProduct(normalise="cosine").score(task, (x, y), target=target)
    worst = np.argsort(-found.values)[:6]
    assert set(worst) == set(poison.tolist())
    rest = torch.from_numpy(np.setdiff1d(np.arange(60), worst))
    assert float(target.value(trained(rest), task.params())) < before - 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda x: AttackSuccess(x, goal_class=-1), "goal_class: expected a class number of at least 0"),
        (lambda x: AttackSuccess(x, goal_class=5), "labels: expected classes from 0 to 2, as labels or as goal_class, got some from 5 to 5"),
        (lambda x: DeltaInfluence(x, goal_class=1, transforms=()), "transforms: expected at least one harmless change"),
    ],
)
def test_bad_input_is_named(make: object, message: str) -> None:
    c = case("mlp")
    with pytest.raises(ValueError, match=message):
        make(c.valid.batch(slice(None))[0]).gradient(c.task, c.task.params())  # type: ignore[operator]
