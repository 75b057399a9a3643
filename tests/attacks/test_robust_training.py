"""attacks/robust_training.py: adversarial training against closed forms on linear models, and what it is for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the name that every reader of torch code expects

from cases import case
from robust_if import Recipe, Samples, Task, fit
from robust_if.attacks.evasion import PGD, OneHot, Threat
from robust_if.attacks.robust_training import MART, TRADES, FastTraining, PGDTraining, evaluating
from robust_if.models import build
from robust_if.training import Objective
from unchanged import untouched

EPS = 0.3
THREAT = Threat(EPS)
OBJECTIVES: dict[str, Objective] = {
    "pgd": PGDTraining(THREAT, steps=3),
    "fast": FastTraining(THREAT),
    "trades": TRADES(THREAT, steps=3),
    "mart": MART(THREAT, steps=3),
}
EVERY = pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)


def draws(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def logit_loss(outputs: Tensor, batch: Any) -> Tensor:
    return F.binary_cross_entropy_with_logits(outputs[:, 0], batch[1].double(), reduction="none")


def linear(outputs: int = 1) -> tuple[Task, nn.Linear, tuple[Tensor, Tensor]]:
    """A linear model, one logit or two, with 8 samples of 5 features."""
    torch.manual_seed(3)
    model = nn.Linear(5, outputs).double().eval()
    batch = (torch.randn(8, 5, dtype=torch.float64), torch.arange(8) % 2)
    return Task(model, logit_loss) if outputs == 1 else Task(model), model, batch


def worst(model: nn.Linear, batch: tuple[Tensor, Tensor]) -> Tensor:
    """The inputs of largest loss in the L∞ ball: every feature moves by ε against the sign that speaks for the label."""
    x, y = batch
    slope = model.weight[0] if len(model.weight) == 1 else model.weight[1] - model.weight[0]
    return (x - EPS * (2.0 * y.double()[:, None] - 1) * slope.sign()).detach()


def shares(model: nn.Linear, x: Tensor) -> Tensor:
    """Probabilities of both classes, ``(B, 2)``, written out."""
    z = model(x)
    z = torch.cat([torch.zeros_like(z), z], 1) if z.shape[1] == 1 else z
    return torch.exp(z) / torch.exp(z).sum(1, keepdim=True)


@pytest.mark.parametrize("outputs", [1, 2])
@pytest.mark.parametrize("name", ["pgd", "fast"])
def test_adversarial_training_is_the_loss_at_the_worst_corner_of_the_ball(name: str, outputs: int) -> None:
    task, model, batch = linear(outputs)
    objective = {"pgd": PGDTraining(THREAT, steps=3, alpha=EPS), "fast": FastTraining(THREAT, alpha=2 * EPS)}[name]
    own = shares(model, worst(model, batch)).gather(1, batch[1][:, None])[:, 0]
    assert torch.allclose(objective(task, model, batch, draws()), -own.log(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("outputs", [1, 2])
def test_mart_is_its_formula_at_the_worst_corner(outputs: int) -> None:
    task, model, batch = linear(outputs)
    y = batch[1][:, None]
    clean, bad = shares(model, batch[0]), shares(model, worst(model, batch))
    own = bad.gather(1, y)[:, 0]
    rival = bad.gather(1, 1 - y)[:, 0]  # the only other class
    kl = (clean * (clean / bad).log()).sum(1)
    expected = -own.log() - (1 - rival).log() + 2.5 * kl * (1 - clean.gather(1, y)[:, 0])
    assert torch.allclose(MART(THREAT, weight=2.5, steps=4)(task, model, batch, draws()), expected, rtol=0, atol=1e-12)


def test_mart_takes_the_strongest_of_the_other_classes() -> None:
    c = case("logistic")
    batch = c.train.batch(slice(None))
    bad = torch.softmax(c.task.model(batch[0]), 1)  # with a radius so small that nothing moves
    others = bad.scatter(1, batch[1][:, None], 0).amax(1)
    own = bad.gather(1, batch[1][:, None])[:, 0]
    expected = -own.log() - (1 - others).log()
    assert torch.allclose(MART(Threat(1e-12), weight=0, steps=1)(c.task, c.task.model, batch, draws()), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("outputs", [1, 2])
def test_trades_is_its_formula_at_an_end_of_the_ball(outputs: int) -> None:
    """Along the only direction in which a linear model of two classes changes, the divergence is largest at one of the two ends."""
    task, model, batch = linear(outputs)
    clean, y = shares(model, batch[0]), batch[1][:, None]
    ends = []
    for labels in (batch[1], 1 - batch[1]):
        bad = shares(model, worst(model, (batch[0], labels)))
        ends.append((clean * (clean / bad).log()).sum(1))
    got = TRADES(THREAT, beta=4.0, steps=20)(task, model, batch, draws())
    loss = -clean.gather(1, y)[:, 0].log()
    kl = ((got - loss) / 4.0)[:, None].detach()
    assert ((kl - torch.stack(ends, 1)).abs().amin(1) < 1e-12).all()
    assert (kl[:, 0] > 1e-3).all()
    assert torch.allclose(TRADES(THREAT, beta=0.0, steps=1)(task, model, batch, draws()), loss, rtol=0, atol=1e-12)


def test_the_gradient_of_trades_flows_through_both_distributions() -> None:
    task, model, batch = linear(2)
    objective = TRADES(THREAT, beta=4.0, steps=5)
    (got,) = torch.autograd.grad(objective(task, model, batch, draws()).sum(), model.weight)
    with torch.no_grad():
        x = crafted_point(objective, task, model, batch)
    clean, bad = shares(model, batch[0]), shares(model, x)
    explicit = (-clean.gather(1, batch[1][:, None])[:, 0].log() + 4 * (clean * (clean / bad).log()).sum(1)).sum()
    assert torch.allclose(got, torch.autograd.grad(explicit, model.weight)[0], rtol=0, atol=1e-11)


def crafted_point(objective: Objective, task: Task, model: nn.Module, batch: Any) -> Tensor:
    """The inputs on which the objective evaluates the model, other than the clean ones, seen from outside."""
    seen: list[Tensor] = []
    with torch.enable_grad():
        handle = model.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].detach()))
        objective(task, model, batch, draws())
        handle.remove()
    return seen[-1]


@EVERY
def test_points_stay_in_the_ball_the_bounds_and_the_features_that_may_move(objective: Any) -> None:
    task, model, _ = linear(2)
    x = torch.rand(8, 5, generator=draws(1), dtype=torch.float64)
    threat = Threat(EPS, bounds=(0.0, 1.0), mutable=torch.tensor([True, True, False, True, True]))
    point = crafted_point(replace(objective, threat=threat), task, model, (x, torch.arange(8) % 2))
    assert ((point - x).abs() <= EPS + 1e-12).all() and ((point >= 0) & (point <= 1)).all()
    assert torch.equal(point[:, 2], x[:, 2]) and not torch.equal(point, x)
    round_ball = crafted_point(replace(objective, threat=Threat(EPS, norm="l2")), task, model, (x, torch.arange(8) % 2))
    assert ((round_ball - x).norm(dim=1) <= EPS + 1e-12).all() and not torch.equal(round_ball, x)


@EVERY
def test_categories_stay_categories(objective: Any) -> None:
    task, model, _ = linear(2)
    x = F.one_hot(torch.arange(8) % 5, 5).double()
    threat = Threat(1.0, bounds=(0.0, 1.0), project=(OneHot([tuple(range(5))]),))
    point = crafted_point(replace(objective, threat=threat), task, model, (x, torch.arange(8) % 2))
    assert torch.equal(point.sum(1), torch.ones(8).double()) and set(point.flatten().tolist()) == {0.0, 1.0}


@EVERY
def test_the_loss_of_a_sample_depends_on_no_other(objective: Objective) -> None:
    c = case("mlp")
    x, y = c.train.batch(slice(None))
    losses = objective(c.task, c.task.model, (x, y), draws())
    others = objective(c.task, c.task.model, (torch.cat([x[:1], x[1:].flip(0)]), torch.cat([y[:1], y[1:].flip(0)])), draws())
    assert losses.shape == (len(x),) and losses.requires_grad
    assert torch.allclose(losses[:1], others[:1], rtol=0, atol=1e-12) and not torch.allclose(losses[1:], others[1:])


@EVERY
def test_weights_act_on_the_losses_of_samples(objective: Objective) -> None:
    c = case("logistic")
    batch, weights = c.train.batch(slice(None)), np.linspace(0.5, 1.5, len(c.train))
    recipe = Recipe(epochs=1, lr=0.3, batch_size=100, momentum=0.0, weight_decay=0, objective=objective)
    got = fit(c.task, c.train, recipe, weights=weights).params()["1.weight"]
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(c.train), generator=generator)
    model = case("logistic").task.model
    losses = objective(c.task, model, tuple(each[order] for each in batch), generator)
    (torch.from_numpy(weights / weights.mean())[order] * losses).mean().backward()
    start = c.task.params()["1.weight"]
    grad = model.get_parameter("1.weight").grad
    assert grad is not None and torch.allclose(got, start - 0.3 * grad, rtol=0, atol=1e-12)


@EVERY
@pytest.mark.parametrize("fails", [False, True])
def test_modes_come_back(objective: Objective, fails: bool) -> None:
    model = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 3)).double().train()
    model[1].eval()  # frozen on purpose
    modes: list[bool] = []

    def loss(outputs: Tensor, batch: Any) -> Tensor:
        modes.append(model.training)
        if fails:
            raise KeyboardInterrupt
        return F.cross_entropy(outputs, batch[1], reduction="none")

    x, y = case("mlp").train.batch(slice(None))
    task = Task(case("mlp").task.model, loss)
    before = [each.clone() for each in model.state_dict().values()]
    try:
        objective(task, model, (x, y), draws())
    except KeyboardInterrupt:
        assert fails
    assert [each.training for each in model.modules()] == [True, True, False, True, True]
    assert all(torch.equal(a, b) for a, b in zip(before, model.state_dict().values(), strict=True))
    if isinstance(objective, (PGDTraining, FastTraining)) and not fails:
        assert not any(modes[:-1]) and modes[-1]  # crafted in evaluation mode, learnt from in training mode


def test_batch_statistics_do_not_see_the_attack() -> None:
    model = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)).double().train()
    x, y = case("mlp").train.batch(slice(None))
    PGDTraining(THREAT, steps=5)(case("mlp").task, model, (x, y), draws())
    assert int(model[1].num_batches_tracked) == 1


def test_evaluating_restores_after_an_error() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Dropout()).train()
    model[1].eval()
    with pytest.raises(ZeroDivisionError), evaluating(model):
        int(not model[0].training) // 0
    assert [each.training for each in model.modules()] == [True, True, False]


@EVERY
def test_the_generator_alone_decides(objective: Objective) -> None:
    c = case("mlp")
    batch = c.train.batch(slice(None))
    with untouched(c.task.model):
        first = objective(c.task, c.task.model, batch, draws(0))
        torch.rand(5, generator=torch.Generator())
        assert torch.equal(first, objective(c.task, c.task.model, batch, draws(0)))
    if not isinstance(objective, FastTraining):
        return
    assert not torch.equal(first, objective(c.task, c.task.model, batch, draws(1)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PGDTraining(THREAT, steps=0), "steps: expected at least 1, got 0"),
        (lambda: PGDTraining(THREAT, alpha=-1.0), "alpha: expected a positive number"),
        (lambda: FastTraining(THREAT, alpha=0.0), "alpha: expected a positive number"),
        (lambda: TRADES(THREAT, beta=-1.0), "beta: expected a number of at least 0, got -1.0"),
        (lambda: TRADES(THREAT, steps=0), "steps: expected at least 1, got 0"),
        (lambda: MART(THREAT, weight=float("nan")), "weight: expected a number of at least 0, got nan"),
    ],
)
def test_a_setting_out_of_range_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@EVERY
def test_inputs_that_cannot_be_attacked_are_refused(objective: Objective) -> None:
    c = case("attention")
    with pytest.raises(ValueError, match="expects inputs of floating point"):
        objective(c.task, c.task.model, c.train.batch(slice(None)), draws())
    regression = case("regression")
    if isinstance(objective, (PGDTraining, FastTraining)):
        with pytest.raises(ValueError, match="expects batches \\(input, …\\)"):
            objective(regression.task, regression.task.model, regression.train.batch(slice(None)), draws())


def test_a_loss_without_a_slope_is_refused() -> None:
    c = case("logistic")
    task = Task(c.task.model, lambda outputs, batch: torch.ones(len(batch[0])))
    with pytest.raises(ValueError, match="loss: it does not depend on the inputs"):
        PGDTraining(THREAT)(task, c.task.model, c.train.batch(slice(None)), draws())


@pytest.fixture(scope="module")
def digits() -> tuple[Samples, Samples]:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    whole = Samples((torch.from_numpy(x / 16).float(), torch.from_numpy(y).long()))
    return whole.take(np.arange(900)), whole.take(np.arange(1400, 1600))


@pytest.mark.parametrize("name", ["pgd", "trades", "mart", "fast"])
def test_adversarial_training_holds_under_attack(name: str, digits: tuple[Samples, Samples]) -> None:
    threat = Threat(0.15, bounds=(0.0, 1.0))
    train, test = digits
    task = Task(build("mlp", (64,), 10))
    found = {}
    for objective in (None, replace(OBJECTIVES[name], threat=threat)):  # type: ignore[type-var]
        trained = fit(task, train, Recipe(epochs=15, lr=0.1, objective=objective))
        x, y = test.batch(slice(None))
        moved = PGD(threat, steps=10, loss="margin")(trained, trained.params(), (x, y))
        found[objective is None] = [float((trained.model(each).argmax(1) == y).float().mean()) for each in (x, moved)]
    assert found[False][1] >= found[True][1] + 0.15, found
    assert found[False][0] >= found[True][0] - 0.1, found
