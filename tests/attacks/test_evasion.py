"""attacks/evasion: FGSM, PGD and APGD on inputs of any shape, within a ball, bounds, and what is valid."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from cases import CLASSES, Gap, case, relative
from robust_if import Recipe, Samples, Task, Utility, fit
from robust_if.attacks import evasion
from robust_if.attacks.evasion import OneHot, Threat, WholeNumbers, box, dlr, margin
from robust_if.attacks.evasion.ascent import _checkpoints
from robust_if.attacks.evasion.ball import Ball
from robust_if.models import cnn, logistic_regression, mlp
from robust_if.task import Batch
from unchanged import untouched


def flat(attack: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The attack with what a `Threat` says written among its options."""

    def call(task: Task, params: Any, batch: Batch, *, eps: Any, norm: Any = "linf", bounds: Any = None, **options: Any) -> Tensor:
        project = options.pop("project", ())
        threat = Threat(eps, norm, bounds, options.pop("mutable", None), tuple(project) if isinstance(project, tuple | list) else (project,))
        return attack(task, params, batch, threat, **options)

    return call


fgsm, pgd, apgd = (flat(attack) for attack in (evasion.fgsm, evasion.pgd, evasion.apgd))
ATTACKS: dict[str, Callable[..., Tensor]] = {"fgsm": fgsm, "pgd": pgd, "apgd": apgd}
LINF = ("fgsm", "pgd", "apgd")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def linear(n: int = 12, features: int = 6) -> tuple[Task, Batch, Tensor]:
    """A binary linear model, a batch, and the slope (n, features) of the margin loss in the inputs."""
    task = Task(logistic_regression((features,), 2).double().eval())
    x, y = torch.randn(n, features, generator=seeded()).double(), torch.arange(n) % 2
    weight = task.params()["1.weight"]
    return task, (x, y), torch.where(y[:, None] == 1, weight[0] - weight[1], weight[1] - weight[0])


@cache
def digits(name: str) -> tuple[Task, Batch]:
    """A model trained on 600 digits with pixels from 0 to 1, and 200 others."""
    images, labels = load_digits(return_X_y=True)
    x, y = torch.from_numpy(images / 16).float().reshape(-1, 1, 8, 8), torch.from_numpy(labels)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = (cnn((1, 8, 8), 10, width=8) if name == "cnn" else mlp((1, 8, 8), 10, width=32)).eval()
    return fit(Task(model), Samples((x[:600], y[:600])), Recipe(epochs=12, lr=0.01, optimizer="adamw")), (x[600:800], y[600:800])


def accuracy(task: Task, x: Tensor, y: Tensor) -> float:
    return float((task.outputs(task.params(), (x, y)).argmax(1) == y).float().mean())


def hide(batch: Batch, columns: list[int]) -> Tensor:
    return torch.tensor([j not in columns for j in range(batch[0].shape[1])])


# The optimum is known


@pytest.mark.parametrize("name", LINF)
@pytest.mark.parametrize("loss", ["margin", "ce", None])
def test_a_linear_model_is_attacked_at_the_corner_of_its_box(name: str, loss: str | None) -> None:
    task, batch, slope = linear()
    x = batch[0]
    eps, low, high = torch.tensor([0.0, 0.1, 0.5, 1.0, 2.0, 3.0]).double(), x.amin(0), x.amax(0) + 0.1
    got = ATTACKS[name](task, task.params(), batch, eps=eps, bounds=(low, high), loss=loss, mutable=hide(batch, [3]))
    expected = (x + torch.where(hide(batch, [3]), eps, 0) * slope.sign()).maximum(low).minimum(high)
    assert relative(got, expected) <= 1e-12
    assert torch.equal(got[:, [0, 3]], x[:, [0, 3]]) and (got == low).any() and (got == high).any()


@pytest.mark.parametrize("name", LINF)
def test_without_bounds_the_l2_optimum_is_one_step_away(name: str) -> None:
    task, batch, slope = linear()
    got = ATTACKS[name](task, task.params(), batch, eps=0.7, norm="l2")
    assert relative(got, batch[0] + 0.7 * slope / slope.norm(dim=1, keepdim=True)) <= 1e-9
    eps = torch.tensor([0.0, 0.1, 0.5, 1.0, 2.0, 3.0]).double()
    got = ATTACKS[name](task, task.params(), batch, eps=eps, norm="l2")
    assert relative(got, batch[0] + eps * eps * slope / (eps * slope).norm(dim=1, keepdim=True)) <= 1e-9
    got, moving = ATTACKS[name](task, task.params(), batch, eps=0.7, norm="l2", mutable=hide(batch, [1, 2])), slope * hide(batch, [1, 2])
    assert relative(got, batch[0] + 0.7 * moving / moving.norm(dim=1, keepdim=True)) <= 1e-9


def test_gradients_whose_squares_vanish_still_have_a_direction() -> None:
    task, batch, slope = linear()
    got = pgd(task, task.params(), batch, eps=0.7, steps=1, alpha=0.1, norm="l2", loss=lambda z, batch: 1e-200 * margin(z, batch))
    assert relative(got, batch[0] + 0.1 * slope / slope.norm(dim=1, keepdim=True)) <= 1e-9


@pytest.mark.parametrize(("attack", "more"), [(pgd, {"alpha": 2.0}), (apgd, {})])
def test_the_l2_optimum_within_bounds_is_reached(attack: Callable[..., Tensor], more: dict[str, Any]) -> None:
    task, batch, slope = linear()
    x, low, high = batch[0], -1.5, 1.2
    x = x.clamp(low, high)
    got = attack(task, task.params(), (x, batch[1]), eps=2.0, steps=60, norm="l2", bounds=(low, high), **more)
    for i in range(len(x)):
        small, large = 0.0, 1e4  # the optimum is x + t·slope cut to the box, at the t of length 2
        for _ in range(200):
            t = (small + large) / 2
            best = (x[i] + t * slope[i]).clamp(low, high)
            small, large = (t, large) if (best - x[i]).norm() < 2 else (small, t)
        assert float(slope[i] @ (got[i] - x[i])) == pytest.approx(float(slope[i] @ (best - x[i])), rel=1e-6)
        assert (got[i] - x[i]).norm() <= 2 + 1e-9


def test_whole_numbers_go_as_far_as_ball_and_bounds_allow() -> None:
    task, batch, slope = linear()
    x = batch[0].mul(3).round()
    eps = torch.tensor([0.0, 1.0, 2.5, 0.9, 7.0, 0.3], dtype=torch.float64)
    for name in LINF:
        project = WholeNumbers(range(5))
        got = ATTACKS[name](task, task.params(), (x, batch[1]), eps=eps, bounds=(-9.5, 9.5), project=project)
        far = torch.tensor([0.0, 1.0, 2.0, 0.0, 7.0]).double()
        assert torch.equal(got[:, :5], (x[:, :5] + far * slope[:, :5].sign()).clamp(-9, 9)), name
        assert relative(got[:, 5:], x[:, 5:] + 0.3 * slope[:, 5:].sign()) <= 1e-12


def test_whole_numbers_may_have_a_unit_and_an_origin() -> None:
    task, batch, slope = linear()
    whole, unit, origin = batch[0].mul(20).round(), 0.05, 0.013
    x = (origin + unit * whole).float()
    single = Task(task.model.float())
    project = WholeNumbers(unit=unit, origin=origin)
    for eps in (0.1, 0.12):  # two units, the first up to rounding
        got = pgd(single, single.params(), (x, batch[1]), eps=eps, project=project)
        assert relative((got - origin) / unit, whole + 2 * slope.sign()) <= 1e-5 and (got - x).abs().max() <= eps * (1 + 1e-5)
    stays = pgd(single, single.params(), (x,), eps=0.1, project=project, loss=lambda _, batch: -(batch[0] - x).abs().sum(1))
    assert torch.equal(stays, x)  # rounded to whole numbers it would have moved by rounding


@pytest.mark.parametrize("attack", [pgd, apgd])
def test_the_best_categories_are_found(attack: Callable[..., Tensor]) -> None:
    task, (_, y), slope = linear(40, 8)
    groups, draw = [(0, 1, 2), (4, 5, 6, 7)], seeded(3)
    x = torch.zeros(40, 8).double()
    x[:, 3] = torch.randn(40, generator=draw)
    for group in groups:
        x[torch.arange(40), torch.tensor(group)[torch.randint(len(group), (40,), generator=draw)]] = 1
    eps = torch.tensor([1, 1, 1, 0.5, 1, 1, 1, 1]).double()
    got = attack(task, task.params(), (x, y), eps=eps, bounds=(torch.tensor([0, 0, 0, -9, 0, 0, 0, 0]), 9.0), project=OneHot(groups))
    for group in groups:
        expected = F.one_hot(slope[:, list(group)].argmax(1), len(group)).double()
        assert torch.equal(got[:, list(group)], expected)
    assert relative(got[:, 3], x[:, 3] + 0.5 * slope[:, 3].sign()) <= 1e-12
    fixed = torch.tensor([0, 0, 0, 0.5, 1, 1, 1, 1]).double()
    got = attack(task, task.params(), (x, y), eps=fixed, project=[OneHot(groups), WholeNumbers([0, 1])])
    assert torch.equal(got[:, :3], x[:, :3]) and (got[:, 4:] != x[:, 4:]).any()


# The algorithm


def plain_apgd(task: Task, x0: Tensor, y: Tensor, eps: float, steps: int, norm: str) -> tuple[Tensor, int]:
    """Algorithm 1 of arXiv 2003.01690 for one sample ``(1, …)``, line by line; and how often the step was halved."""

    def f(x: Tensor) -> tuple[float, Tensor]:
        leaf = x.clone().requires_grad_()
        loss = F.cross_entropy(task.model(leaf), y)
        return loss.item(), torch.autograd.grad(loss, leaf)[0]

    def project(x: Tensor) -> Tensor:
        change = x - x0
        return x0 + (change.clamp(-eps, eps) if norm == "linf" else change * min(1, eps / max(float(change.norm()), 1e-300)))

    def direction(gradient: Tensor) -> Tensor:
        return gradient.sign() if norm == "linf" else gradient / gradient.norm()

    p = [0.0, 0.22]
    while p[-1] < 1:
        p.append(p[-1] + max(p[-1] - p[-2] - 0.03, 0.06))
    w = [int(np.ceil(each * steps - 1e-9)) for each in p]
    eta, x_before, x = 2 * eps, x0, project(x0 + 2 * eps * direction(f(x0)[1]))
    values = [f(x0)[0], f(x)[0]]
    f_max, x_max = max(zip(values, (x0, x), strict=True), key=lambda pair: pair[0])
    at_checkpoint, cuts = (eta, values[0]), 0
    for k in range(1, steps + 1):
        if k in w:
            last = w[w.index(k) - 1]
            rises = sum(b > a for a, b in itertools.pairwise(values[last : k + 1]))
            halve = rises < 0.75 * (k - last) or at_checkpoint == (eta, f_max)
            at_checkpoint = (eta, f_max)
            if halve:
                eta, x, cuts = eta / 2, x_max, cuts + 1
                values[k] = f_max
        if k == steps:
            break
        z = project(x + eta * direction(f(x)[1]))
        # the point before is the one that the step left, also after going back to the best
        x_before, x = x, project(x + 0.75 * (z - x) + 0.25 * (x - x_before))
        values.append(f(x)[0])
        if values[-1] > f_max:
            f_max, x_max = values[-1], x
    return x_max, cuts


@pytest.mark.parametrize(("norm", "eps", "waves"), [("linf", 0.3, 2), ("linf", 1.0, 2), ("l2", 1.0, 6)])  # both reasons to halve a step occur
def test_apgd_is_the_algorithm_of_the_paper(norm: str, eps: float, waves: float) -> None:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 20), nn.Tanh(), nn.Linear(20, 3)).double().eval()
    model[0].weight.data.mul_(waves)
    task, x, y = Task(model), 0.3 * torch.randn(20, 4, generator=seeded(1)).double(), torch.arange(20) % 3
    got = apgd(task, task.params(), (x, y), eps=eps, steps=40, norm=norm)
    found = [plain_apgd(task, x[i : i + 1], y[i : i + 1], eps, 40, norm) for i in range(20)]
    assert relative(got, torch.cat([point for point, _ in found])) <= 1e-6  # many steps magnify rounding
    assert len({cuts for _, cuts in found}) > 1  # samples halve their steps on their own


def test_the_steps_of_pgd_cross_the_ball_and_the_best_point_met_counts() -> None:
    task = Task(nn.Linear(1, 1, bias=False).double().eval(), lambda outputs, batch: -((outputs[:, 0] - batch[1]) ** 2))
    task = task.at({"weight": torch.ones(1, 1).double()})
    batch = (torch.zeros(4, 1).double(), torch.tensor([0.0, 0.25, 0.6, 5.0]).double())
    got = pgd(task, task.params(), batch, eps=1.0, steps=10)  # in steps of 0.25
    assert relative(got, [[0], [0.25], [0.5], [1]]) <= 1e-12
    for attack in (pgd, apgd):
        rules: dict[str, Any] = {"eps": 1.0, "loss": None, "random_start": True, "generator": seeded()}
        assert attack(task, task.params(), batch, steps=1, **rules)[0] == 0  # no point beats the clean one


def test_the_checkpoints_are_those_of_the_paper() -> None:
    assert [k for k in _checkpoints(100) if k <= 100] == [22, 41, 57, 70, 80, 87, 93, 99]


@pytest.mark.parametrize(("name", "eps"), [("mlp", 0.05), ("mlp", 0.1), ("cnn", 0.05), ("cnn", 0.1)])
def test_at_equal_steps_apgd_is_as_strong_as_pgd_and_pgd_stronger_than_fgsm(name: str, eps: float) -> None:
    task, (x, y) = digits(name)
    clean = accuracy(task, x, y)
    assert clean > 0.8
    robust = {
        key: accuracy(task, attack(task, task.params(), (x, y), eps=eps, bounds=(0.0, 1.0), loss="ce", **steps), y)
        for key, attack, steps in (("fgsm", fgsm, {}), ("pgd", pgd, {"steps": 20}), ("apgd", apgd, {"steps": 20}))
    }
    assert robust["apgd"] <= robust["pgd"] <= robust["fgsm"] < clean
    losses = [
        margin(task.outputs(task.params(), (found, y)), (found, y)).mean()
        for found in (attack(task, task.params(), (x, y), eps=eps, bounds=(0.0, 1.0), loss="margin", steps=20) for attack in (pgd, apgd))
    ]
    assert losses[1] >= losses[0]


@pytest.mark.parametrize("attack", [pgd, apgd])
@pytest.mark.parametrize("loss", ["ce", "dlr", "margin"])
def test_every_loss_breaks_a_network(attack: Callable[..., Tensor], loss: str) -> None:
    task, (x, y) = digits("cnn")
    got = attack(task, task.params(), (x, y), eps=0.15, steps=20, bounds=(0.0, 1.0), loss=loss)
    assert accuracy(task, got, y) < 0.35 < 0.8 < accuracy(task, x, y)


def test_a_targeted_attack_leads_to_the_class_that_was_asked_for() -> None:
    task, (x, y) = digits("cnn")
    goal = (y + 1) % 10
    for attack, loss in itertools.product((pgd, apgd), ("ce", "margin")):
        got = attack(task, task.params(), (x, goal), eps=0.3, steps=20, bounds=(0.0, 1.0), loss=loss, targeted=True)
        assert accuracy(task, got, goal) > 0.9 > 0.1 > accuracy(task, x, goal)


def test_a_random_start_is_drawn_from_the_ball_by_its_generator_alone() -> None:
    task, (x, y) = digits("cnn")
    for norm in ("linf", "l2"):
        rules: dict[str, Any] = {"eps": 0.3, "bounds": (0.0, 1.0), "norm": norm, "random_start": True, "steps": 2}
        for attack in (pgd, apgd):
            with untouched(task.model):
                one, same, other = (attack(task, task.params(), (x, y), generator=seeded(s), **rules) for s in (1, 1, 2))
            assert torch.equal(one, same) and not torch.equal(one, other)
    ball = Ball.around(torch.zeros(20_000, 3).double(), Threat(torch.tensor([2.0, 0.0, 1.0]), "l2"))
    drawn = ball.random(seeded()) / torch.tensor([2.0, 1.0, 1.0])
    assert (drawn[:, 1] == 0).all() and drawn.norm(dim=1).max() <= 1 + 1e-12
    # uniform on a disc of radius 1: E r² = 1/2, and the quarters are alike
    assert float(drawn.square().sum(1).mean()) == pytest.approx(0.5, abs=0.01)
    assert float(((drawn[:, 0] > 0) & (drawn[:, 2] > 0)).double().mean()) == pytest.approx(0.25, abs=0.01)


# What holds for every attack


@given(name=st.sampled_from(LINF), model=st.sampled_from(["mlp", "cnn", "bare"]), norm=st.sampled_from(["linf", "l2"]), start=st.booleans())
def test_points_stay_in_ball_and_bounds_and_no_loss_falls(name: str, model: str, norm: str, start: bool) -> None:
    c = case(model)
    batch, params = c.valid.batch(slice(None)), c.task.params()
    x = batch[0]
    eps = torch.rand(x.shape[1:], generator=seeded()).double()
    mutable = torch.rand(x.shape[-1], generator=seeded(1)) < 0.7
    low, high = x.amin(0) - 0.05, x.amax(0) + 0.05
    more = {} if name == "fgsm" else {"random_start": start, "generator": seeded(2)}
    got = ATTACKS[name](c.task, params, batch, eps=eps, bounds=(low, high), mutable=mutable, norm=norm, **more)
    change = (got - x).where(mutable, torch.zeros(()).double())
    assert torch.equal(got[..., ~mutable], x[..., ~mutable]) and got.shape == x.shape and not got.requires_grad
    assert (got >= low).all() and (got <= high).all()
    length = (change / eps).flatten(1).norm(dim=1, p=2 if norm == "l2" else torch.inf)
    assert length.max() <= 1 + 1e-12 and length.max() > 0.1
    attacked, clean = c.task.losses(params, (got, batch[1])), c.task.losses(params, batch)
    assert (attacked >= clean).all() and attacked.mean() > clean.mean()


@given(
    size=st.integers(1, 9), name=st.sampled_from(["pgd", "apgd"]), norm=st.sampled_from(["linf", "l2"]), start=st.booleans(), seed=st.integers(0, 9)
)
def test_a_sample_is_attacked_the_same_in_every_batch_and_order(size: int, name: str, norm: str, start: bool, seed: int) -> None:
    c = case("mlp")
    x, y = c.valid.batch(slice(None))

    def attacked(rows: list[Tensor], generator: torch.Generator, start: bool) -> Tensor:
        rules: dict[str, Any] = {"eps": 0.8, "steps": 9, "bounds": (-3.0, 3.0), "norm": norm, "random_start": start, "generator": generator}
        return torch.cat([ATTACKS[name](c.task, c.task.params(), (x[part], y[part]), **rules) for part in rows])

    everything = torch.arange(len(x))
    whole = attacked([everything], seeded(seed), start)
    assert relative(attacked(list(everything.split(size)), seeded(seed), start), whole) <= 1e-9
    order = torch.randperm(len(x), generator=seeded(seed))
    assert relative(attacked([order], seeded(), False), attacked([everything], seeded(), False)[order]) <= 1e-9


@given(seed=st.integers(0, 99), radii=st.booleans())
def test_clipping_finds_the_nearest_point(seed: int, radii: bool) -> None:
    draw = seeded(seed)
    x = torch.rand(6, 2, 4, generator=draw).double()
    eps = 0.1 + torch.rand(4, generator=draw).double() if radii else torch.full((4,), 0.6).double()
    ball = Ball.around(x, Threat(eps, "l2", (0.0, 1.0)))
    point = x + 3 * torch.randn(x.shape, generator=draw).double()
    nearest = ball.clip(point)
    assert ((nearest - x) / eps).flatten(1).norm(dim=1).max() <= 1 + 1e-12 and nearest.min() >= 0 and nearest.max() <= 1
    assert relative(ball.clip(nearest), nearest) <= 1e-12
    for _ in range(20):  # a projection onto a convex set is the point from which no allowed point lies in the direction of what was cut off
        other = ball.clip(x + torch.randn(x.shape, generator=draw).double() * torch.rand((), generator=draw))
        assert (((point - nearest) / eps**2) * (other - nearest)).flatten(1).sum(1).max() <= 1e-9


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_inputs_of_any_rank_are_attacked(norm: str) -> None:
    class Flat(nn.Module):
        def __init__(self, features: int) -> None:
            super().__init__()
            self.out = nn.Linear(features, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(x.reshape(len(x), -1))

    for shape in [(), (4,), (3, 4), (2, 3, 4), (2, 2, 3, 2)]:
        x, y = torch.randn(5, *shape), torch.arange(5) % 3
        task = Task(Flat(max(1, x[0].numel())).eval())
        for attack in ATTACKS.values():
            got = attack(task, task.params(), (x, y), eps=0.5, norm=norm, loss="margin")
            assert got.shape == x.shape and got.dtype == torch.float32 and (got != x).any()
            assert (got - x).reshape(5, -1).norm(dim=1, p=2 if norm == "l2" else torch.inf).max() <= 0.5 * (1 + 1e-5)


def test_no_attack_moves_anything_at_radius_zero() -> None:
    task, batch, _ = linear()
    for attack, norm in itertools.product(ATTACKS.values(), ["linf", "l2"]):
        assert torch.equal(attack(task, task.params(), batch, eps=0.0, norm=norm), batch[0])
        assert torch.equal(attack(task, task.params(), batch, eps=1.0, norm=norm, mutable=torch.tensor(False)), batch[0])


def test_inputs_outside_by_rounding_stay_where_they_are() -> None:
    task, (x, y), _ = linear()
    x = x.clamp(0.1, 0.9) + 1e-7
    for attack in ATTACKS.values():
        got = attack(task, task.params(), (x, y), eps=torch.tensor([0.0, 1, 1, 1, 1, 1]), bounds=(0.1, 0.9))
        assert torch.equal(got[:, 0], x[:, 0]) and got.max() <= x.max() and got.min() >= 0.1


def test_model_and_random_state_stay_as_they_were_also_after_an_error() -> None:
    c = case("cnn")
    x, y = c.valid.batch(slice(None))
    frozen = c.task.model.first.weight.requires_grad_(False)
    seen = 0

    def failing(outputs: Tensor, batch: Batch) -> Tensor:
        nonlocal seen
        seen += 1
        if seen == 3:
            raise KeyError("at the third step")
        return F.cross_entropy(outputs, batch[1], reduction="none")

    with untouched(c.task.model):
        for attack in ATTACKS.values():
            attack(c.task, c.task.params(), (x, y), eps=0.1)
        with pytest.raises(KeyError):
            pgd(c.task, c.task.params(), (x, y), eps=0.1, loss=failing)
    assert not frozen.requires_grad and not x.requires_grad


def test_gradients_are_taken_under_no_grad_and_kept_from_nobody() -> None:
    c = case("mlp")
    batch = c.valid.batch(slice(None))
    leaves = {name: value.clone().requires_grad_() for name, value in c.task.params().items()}
    for attack in ATTACKS.values():
        expected = attack(c.task, c.task.params(), batch, eps=0.3)
        with torch.no_grad():
            assert torch.equal(attack(c.task, leaves, batch, eps=0.3), expected) and not torch.is_grad_enabled()
        assert all(value.grad is None for value in leaves.values())


def test_the_attack_happens_at_the_parameters_given_and_in_their_type() -> None:
    task, batch, slope = linear()
    turned = {name: -value.float() for name, value in task.params().items()}
    got = apgd(task, turned, batch, eps=0.5)
    assert got.dtype == torch.float32 and relative(got, batch[0] - 0.5 * slope.sign()) <= 1e-6


# Losses


@pytest.mark.parametrize("loss", ["ce", "margin"])
@pytest.mark.parametrize("shape", [(-1,), (-1, 1)])
@pytest.mark.parametrize("name", LINF)
def test_one_logit_is_two_logits_of_which_the_first_is_zero(name: str, shape: tuple[int, ...], loss: str) -> None:
    body = nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, 1)).double().eval()

    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = body

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x).reshape(shape)

    class Two(One):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([torch.zeros(len(x), 1).to(x), self.body(x)], 1)

    x, y = torch.randn(9, 5).double(), torch.arange(9) % 2
    one, two = Task(One().eval()), Task(Two().eval())
    got = ATTACKS[name](one, one.params(), (x, y.double().reshape(shape)), eps=0.4, loss=loss)
    assert relative(got, ATTACKS[name](two, two.params(), (x, y), eps=0.4, loss=loss)) <= 1e-12 and (got != x).any()


def test_what_the_losses_are() -> None:
    z, y = torch.randn(50, 5, generator=seeded()).double(), torch.arange(50) % 5
    z[0] = 0
    assert torch.equal(margin(z, (None, y)) > 0, z.argmax(1) != y)
    for i in range(1, 50):
        others = sorted((float(z[i, k]) for k in range(5) if k != y[i]), reverse=True)
        every = sorted(map(float, z[i]), reverse=True)
        assert margin(z, (None, y))[i] == pytest.approx(others[0] - float(z[i, y[i]]))
        assert dlr(z, (None, y))[i] == pytest.approx(-(float(z[i, y[i]]) - others[0]) / (every[0] - every[2]))
    assert relative(dlr(3 * z + 7, (None, y)), dlr(z, (None, y))) <= 1e-9 and dlr(z, (None, y))[0] == 0


@pytest.mark.parametrize("name", LINF)
def test_a_function_and_a_target_rise_as_the_loss_of_the_task_does(name: str) -> None:
    c = case("mlp")
    batch, attack = c.valid.batch(slice(None)), ATTACKS[name]
    expected = attack(c.task, c.task.params(), batch, eps=0.3, loss=None)
    for loss in (Utility(c.train), "ce", lambda outputs, batch: F.cross_entropy(outputs, batch[1], reduction="none")):
        assert relative(attack(c.task, c.task.params(), batch, eps=0.3, loss=loss), expected) <= 1e-12
    without_labels = attack(c.task, c.task.params(), batch[:1], eps=0.3, loss=lambda outputs, _: outputs[:, 0])
    assert (c.task.outputs(c.task.params(), (without_labels,))[:, 0] >= c.task.outputs(c.task.params(), batch)[:, 0]).all()


# What is refused


def never(outputs: Tensor, batch: Batch) -> Tensor:
    raise AssertionError("the model was asked before the arguments were checked")


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"eps": -0.1}, "eps: expected numbers of at least 0, .* got -0.1"),
        ({"eps": torch.tensor([1, 1, 1, 1, -2.0])}, "eps: expected numbers of at least 0, .* got -2"),
        ({"eps": float("nan")}, "eps: expected numbers of at least 0"),
        ({"eps": float("inf")}, "eps: expected finite numbers"),
        ({"eps": torch.ones(4)}, r"eps: expected a number, or a tensor that broadcasts to the shape of one sample, \(5,\), got \(4,\)"),
        ({"steps": 0}, "steps: expected at least 1, got 0"),
        ({"bounds": (0.0, 1.0)}, r"bounds: expected inputs within \(0.0, 1.0\), got -.* in sample 0, feature \(1,\)"),
        ({"bounds": (1.0, 0.0)}, r"bounds: expected \(low, high\) with low <= high"),
        ({"bounds": 1.0}, r"bounds: expected \(low, high\), got 1.0"),
        ({"bounds": (-9.0, torch.ones(3))}, r"bounds: expected a number, or a tensor .* \(5,\), got \(3,\)"),
        ({"mutable": torch.ones(3, dtype=torch.bool)}, r"mutable: expected a number, or a tensor .* \(5,\), got \(3,\)"),
        ({"mutable": torch.ones(5)}, "mutable: expected a boolean tensor, got torch.float32"),
        ({"norm": "l1"}, "norm: expected 'linf' or 'l2', got 'l1'"),
        ({"random_start": True}, "generator: a random start needs a torch.Generator"),
        ({"loss": "hinge"}, "loss: expected one of ce, dlr, margin, a function or a target, got 'hinge'"),
        ({"loss": "dlr", "targeted": True}, "loss: 'dlr' leads to no class in particular; use loss='margin' or 'ce'"),
        ({"project": WholeNumbers()}, r"project: the clean input is not valid itself, in sample 0 feature \(0,\)"),
        ({"project": OneHot([(0, 1)]), "eps": 0.5}, r"project: expected the one-hot group \(0, 1\) to be free from 0 to 1 in all"),
        ({"project": OneHot([(0, 1)]), "norm": "l2"}, "project: projections need the box of norm='linf'"),
        ({"project": lambda point, slope, low, high: point + 9}, "project: .* left the ball or the bounds"),
    ],
)
@pytest.mark.parametrize("attack", [pgd, apgd])
def test_bad_arguments_are_refused_before_the_model_is_asked(attack: Callable[..., Tensor], rules: dict[str, Any], message: str) -> None:
    c = case("mlp")
    with pytest.raises(ValueError, match=message):
        attack(c.task, c.task.params(), c.valid.batch(slice(None)), **{"eps": 0.1, "loss": never} | rules)


@pytest.mark.parametrize("name", LINF)
def test_bad_batches_are_refused(name: str) -> None:
    c, attack = case("mlp"), ATTACKS[name]
    (x, y), params = c.valid.batch(slice(None)), c.task.params()
    for batch, message in [
        ((torch.randint(9, (9, 5)), y), "inputs: an attack expects inputs of floating point, got torch.int64"),
        ((x.log(), y), "inputs: expected finite numbers, got NaN or infinity in sample 0"),
        ({"features": x}, r"batch: an attack expects batches \(input, …\) .* got dict"),
        ((x,), "batch: the loss needs labels as its second tensor, one for each of 9 samples, got NoneType"),
        ((x, y[:4]), r"batch: the loss needs labels .* got shape \(4,\)"),
        ((x, y + 1), "batch: expected labels from 0 to 2, got some from 1 to 3"),
    ]:
        with pytest.raises(ValueError, match=message):
            attack(c.task, params, batch, eps=0.1, **({} if name == "apgd" else {"loss": "ce"}))


def test_losses_that_cannot_be_raised_are_refused() -> None:
    c = case("mlp")
    batch, params = c.valid.batch(slice(None)), c.task.params()
    two, (x, y), _ = linear()
    with pytest.raises(ValueError, match="loss: 'dlr' needs at least 3 classes, the model tells 2 apart; use loss='margin'"):
        apgd(two, two.params(), (x, y), eps=0.1, loss="dlr")
    with pytest.raises(ValueError, match=r"loss: those by name take logits \(B, K\), .* got shape \(9, 1, 3\)"):
        apgd(Task(c.task.model, forward=lambda model, batch: model(batch[0])[:, None]), params, batch, eps=0.1)
    with pytest.raises(ValueError, match="loss: expected a target that is the mean of a loss per sample, got 'gap'"):
        pgd(c.task, params, batch, eps=0.1, loss=Gap(c.valid))
    with pytest.raises(ValueError, match="loss: it does not depend on the inputs in a differentiable way"):
        pgd(c.task, params, batch, eps=0.1, loss=lambda outputs, batch: outputs.argmax(1).double())
    with pytest.raises(ValueError, match="loss: it is NaN near sample 0"):
        pgd(c.task, params, batch, eps=0.1, loss=lambda outputs, batch: outputs[:, 0] * float("nan"))
    with pytest.raises(ValueError, match=r"loss: expected one loss per sample, shape \(9,\), got shape \(\)"):
        pgd(c.task, params, batch, eps=0.1, loss=lambda outputs, batch: outputs.mean())
    with pytest.raises(ValueError, match="alpha: expected a positive number"):
        pgd(c.task, params, batch, eps=0.1, alpha=0.0)
    task = Task(nn.Sequential(nn.Linear(5, CLASSES), nn.Dropout()).double().eval())
    task.model.train()
    with pytest.raises(ValueError, match="model: expected a module in evaluation mode"):
        pgd(task, task.params(), batch, eps=0.1)


def test_the_box_that_other_attacks_use() -> None:
    x = torch.tensor([[0.0, 0.5, 1.0]]).double()
    low, high = box(x, torch.tensor([0.1, torch.inf, 0.2]), (0.0, 1.0), mutable=torch.tensor([True, True, False]))
    assert relative(low, [[0, 0, 1]]) <= 1e-12 and relative(high, [[0.1, 1, 1]]) <= 1e-7
    with pytest.raises(ValueError, match=r"bounds: expected patterns within \(0.0, 0.9\), got 1 in sample 0, feature \(2,\)"):
        box(x, 0.1, (0.0, 0.9), "patterns")


# Against another implementation


def test_torchattacks_finds_no_more_errors() -> None:
    theirs = pytest.importorskip("torchattacks")
    task, (x, y) = digits("cnn")
    for eps in (0.05, 0.1):
        rules: dict[str, Any] = {"eps": eps, "bounds": (0.0, 1.0)}
        ours = fgsm(task, task.params(), (x, y), **rules)
        same = theirs.FGSM(task.model, eps=eps)(x, y)
        raised = (ours != x).flatten(1).any(1)
        assert raised.float().mean() > 0.9 and relative(ours[raised], same[raised]) <= 1e-6
        pgd_theirs = accuracy(task, theirs.PGD(task.model, eps=eps, alpha=eps / 4, steps=20, random_start=False)(x, y), y)
        assert accuracy(task, pgd(task, task.params(), (x, y), steps=20, alpha=eps / 4, **rules), y) <= pgd_theirs + 0.01
        apgd_theirs = accuracy(task, theirs.APGD(task.model, eps=eps, steps=20, seed=0)(x, y), y)
        assert accuracy(task, apgd(task, task.params(), (x, y), steps=20, **rules), y) <= apgd_theirs + 0.01
