"""attacks/evasion/ensemble.py and targeted.py: every attack on what is still right, and towards every class."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from cases import case, relative
from robust_if import Task, Utility
from robust_if.attacks.evasion import APGD, FAB, FGSM, PGD, Attack, Ensemble, Square, TargetedAPGD, Threat, WholeNumbers, apgd, lite, margin, standard
from robust_if.attacks.evasion.targeted import _towards_goal
from robust_if.task import Batch, Params
from unchanged import untouched
from victims import breakable, broken, digits, linear, one_and_two_logits, seeded


def small(threat: Threat) -> Ensemble:
    """The standard ensemble with few steps."""
    members = (APGD(threat, steps=8), TargetedAPGD(threat, steps=8, classes=3), FAB(threat, steps=6, classes=2))
    return Ensemble(threat, (*members, Square(threat, queries=60)) if threat.norm == "linf" else members)


@dataclass(frozen=True)
class Shift(Attack):
    """Adds a constant and remembers nothing; it need not stay in the ball."""

    by: float

    @property
    def name(self) -> str:
        return "shift"

    def __call__(self, task: Task, params: Params, batch: Batch) -> Tensor:
        return batch[0] + self.by


class Switch(nn.Module):
    """Class 0 below 0.5, class 1 from there on, whose gradient says nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()).double())

    def forward(self, x: Tensor) -> Tensor:
        up = (x[:, 0] >= 0.5).to(x)
        return torch.stack([1 - up, up], 1) * self.weight + 0 * x.sum(1, keepdim=True)


# On linear models the robust accuracy is known


@pytest.mark.parametrize("classes", [2, 3, 4, 6])
def test_the_robust_accuracy_of_a_linear_model_is_reached(classes: int) -> None:
    task, (x, y) = linear(60, 7, classes)
    x = x.clamp(-1.5, 1.5)
    eps, mutable = torch.tensor([0.0, 0.1, 0.2, 0.3, 0.1, 0.2, 0.1]).double(), torch.tensor([True] * 6 + [False])
    moving = torch.where(mutable, eps, 0)
    low, high = (x - moving).clamp(min=-1.5), (x + moving).clamp(max=1.5)
    threat, expected, clean = Threat(eps, bounds=(-1.5, 1.5), mutable=mutable), breakable(task, (x, y), low, high), broken(task, x, y)
    assert (expected & ~clean).sum() > 3 and (~expected).sum() > 3
    targeted = TargetedAPGD(threat, steps=5)(task, task.params(), (x, y))
    result = Ensemble(threat, (FGSM(threat), TargetedAPGD(threat, steps=5), FAB(threat, steps=20))).run(task, task.params(), (x, y))
    assert torch.equal(broken(task, targeted, y), expected) and torch.equal(broken(task, result.points, y), expected)
    assert torch.equal(result.by == -2, clean) and torch.equal(result.by >= 0, expected & ~clean)
    for points in (targeted, result.points):
        assert (points >= low).all() and (points <= high).all() and torch.equal(points[clean], x[clean])


def test_in_l2_too() -> None:
    task, (x, y) = linear(60, 7, 5)
    weight, logits = task.params()["1.weight"], task.outputs(task.params(), (x,))
    gap, reach = logits - logits.gather(1, y[:, None]), (weight - weight[y][:, None]).norm(dim=2)
    expected = ((gap + 0.3 * reach).scatter(1, y[:, None], -torch.inf) > 0).any(1)
    threat = Threat(0.3, "l2")
    attacks = TargetedAPGD(threat, steps=10), FAB(threat, steps=20), small(threat)
    found = [broken(task, attack(task, task.params(), (x, y)), y) for attack in attacks]
    assert all(torch.equal(each, expected) for each in found) and not torch.equal(expected, broken(task, x, y)) and not expected.all()


# Targeted APGD


def test_the_targeted_loss() -> None:
    logits = torch.tensor([[4.0, 1.0, 3.0, 2.0, -5.0]]).double()
    assert float(_towards_goal(logits, (None, torch.tensor([0]), torch.tensor([4])))) == pytest.approx(-9 / (4 - 1.5))
    assert float(_towards_goal(3 * logits + 7, (None, torch.tensor([2]), torch.tensor([0])))) == pytest.approx(1 / (4 - 1.5))
    assert float(_towards_goal(logits[:, :3], (None, torch.tensor([0]), torch.tensor([1])))) == -3
    assert float(_towards_goal(logits[:, :2], (None, torch.tensor([0]), torch.tensor([1])))) == -3
    assert float(_towards_goal(logits[:, :1], (None, torch.tensor([0.0]), torch.tensor([1])))) == 4


def test_more_classes_break_no_less_and_the_margin_never_falls() -> None:
    task, (x, y) = digits()
    threat, before = Threat(0.08, bounds=(0.0, 1.0)), margin(task.outputs(task.params(), (x, y)), (x, y))
    rates = []
    for classes in (1, 3, 20):
        got = TargetedAPGD(threat, steps=10, classes=classes)(task, task.params(), (x, y))
        assert (margin(task.outputs(task.params(), (got, y)), (got, y)) >= before).all() and (got - x).abs().max() <= 0.08 + 1e-6
        rates.append(float(broken(task, got, y).float().mean()))
    assert rates[0] <= rates[1] <= rates[2] and 0.1 < rates[2] < 1 and rates[0] < rates[2]


def test_the_first_error_ends_the_search_for_a_sample_and_for_no_other() -> None:
    task, (x, y) = digits()
    sizes: list[int] = []

    def forward(model: nn.Module, batch: Batch) -> Tensor:
        sizes.append(len(batch[0]))
        return model(batch[0])

    threat = Threat(0.1, bounds=(0.0, 1.0))
    plain, first = (apgd(replace(task, forward=forward), task.params(), (x, y), threat, steps=15, first_error=flag) for flag in (False, True))
    assert len(sizes) == 32 and set(sizes[:16]) == {60} and sizes[16] == 60 and sizes[-1] < 50 and sizes[16:] == sorted(sizes[16:], reverse=True)
    wrong = broken(task, first, y)
    assert (wrong | ~broken(task, plain, y)).all() and relative(first[~wrong], plain[~wrong]) <= 1e-4
    with pytest.raises(ValueError, match="first_error: errors are told from outputs and labels"):
        apgd(task, task.params(), (x, y), Threat(0.1), first_error=True, targeted=True)


# The ensemble


def test_every_attack_sees_what_is_still_right() -> None:
    task, (x, y) = digits()
    threat, seen = Threat(0.1, bounds=(0.0, 1.0)), []

    @dataclass(frozen=True)
    class Watched(Attack):
        inner: Attack

        @property
        def name(self) -> str:
            return "watched"

        def __call__(self, task: Task, params: Params, batch: Batch) -> Tensor:
            seen.append(len(batch[0]))
            return self.inner(task, params, batch)

    members = (FGSM(threat), PGD(threat, steps=5), APGD(threat, steps=10))
    result = Ensemble(threat, tuple(Watched(threat, each) for each in members)).run(task, task.params(), (x, y))
    left = [int((~broken(task, x, y)).sum())]
    for place in range(3):
        assert seen[place] == left[-1]
        left.append(left[-1] - int((result.by == place).sum()))
    assert left[0] < 60 and left[1] < left[0] and torch.equal(broken(task, result.points, y), result.by != -1)
    survivors = result.by == -1
    best = torch.stack([margin(task.outputs(task.params(), (p, y)), (p, y)) for p in (a(task, task.params(), (x, y)) for a in members)]).amax(0)
    got = margin(task.outputs(task.params(), (result.points, y)), (result.points, y))
    assert relative(got[survivors].detach(), best[survivors].detach()) <= 1e-5


@given(size=st.integers(1, 10), seed=st.integers(0, 9))
def test_a_sample_is_attacked_the_same_in_every_batch_and_order(size: int, seed: int) -> None:
    task, _, (x, y) = one_and_two_logits(10)
    threat = Threat(0.6, bounds=(-3.0, 3.0))
    order = torch.randperm(len(x), generator=seeded(seed))
    for attack in (small(threat), TargetedAPGD(threat, steps=8)):
        whole = attack(task, task.params(), (x, y))
        parts = torch.cat([attack(task, task.params(), (x[rows], y[rows])) for rows in order.split(size)])
        assert (whole != x).any() and relative(parts, whole[order]) <= 1e-6


def test_classes_that_are_tried_together_are_tried_as_one_by_one() -> None:
    task, (x, y) = digits()
    attack = TargetedAPGD(Threat(0.07, bounds=(0.0, 1.0)), steps=6, classes=5)
    rows = torch.arange(60)[~broken(task, x, y)][:24]
    whole = attack(task, task.params(), (x[rows], y[rows]))
    single = torch.cat([attack(task, task.params(), (x[i : i + 1], y[i : i + 1])) for i in rows])
    assert torch.equal(broken(task, whole, y[rows]), broken(task, single, y[rows])) and relative(whole, single) <= 1e-3  # in single precision


def test_nothing_of_the_model_or_the_random_state_changes() -> None:
    c = case("cnn")
    x = c.valid.batch(slice(None))[0]
    y = c.task.outputs(c.task.params(), (x,)).argmax(1)
    attack = small(Threat(2.0))
    with untouched(c.task.model), torch.no_grad():
        one, same = (attack.run(c.task, c.task.params(), (x, y)) for _ in range(2))
    assert torch.equal(one.points, same.points) and torch.equal(one.by, same.by) and (one.by >= 0).any()


def test_one_logit_is_two_logits() -> None:
    one, two, (x, y) = one_and_two_logits()
    attack = small(Threat(0.4))
    got, expected = attack.run(one, one.params(), (x, y.double())), attack.run(two, two.params(), (x, y))
    assert torch.equal(got.by, expected.by) and relative(got.points, expected.points) <= 1e-9 and {-1, 0} <= set(got.by.tolist())


def test_what_hides_its_gradients_is_broken_without_them() -> None:
    task, x = Task(Switch().eval()), torch.tensor([[0.3, 0.0], [0.1, 0.0]]).double()
    attack = lite(Threat(0.25))
    result = attack.run(task, task.params(), (x, torch.tensor([0, 0])))
    assert attack.attacks[2].name == "square" and result.by.tolist() == [2, -1]


def test_the_presets_say_what_they_hold() -> None:
    threat = Threat(0.1)
    full, quick = standard(threat, seed=3), lite(threat)
    assert full.name == "standard" and [each.name for each in full.attacks] == ["apgd-ce", "apgd-t", "fab-t", "square"]
    assert full.attacks[3] == Square(threat, queries=5000, seed=3) and full.attacks[2] == FAB(threat, steps=100, classes=9)
    assert quick.name == "lite" and [each.name for each in quick.attacks] == ["apgd-ce", "apgd-t", "square"]
    assert standard(Threat(0.1, "l2")).name == "standard without square" and lite(Threat(0.1, "l2")).name == "lite without square"
    whole = standard(replace(threat, project=(WholeNumbers(),)))
    assert whole.name == "standard without fab-t" and [each.name for each in whole.attacks] == ["apgd-ce", "apgd-t", "square"]
    assert small(threat).name == "apgd-ce+apgd-t+fab-t+square"


def test_whole_numbers_stay_whole() -> None:
    task, (x, _) = linear(30, 4, 3)
    x = x.mul(3).round()
    y = task.outputs(task.params(), (x,)).argmax(1)
    threat = Threat(2.0, project=(WholeNumbers(),))
    result = lite(threat).run(task, task.params(), (x, y))
    assert torch.equal(result.points, result.points.round()) and torch.equal(result.by >= 0, breakable(task, (x, y), x - 2, x + 2))


def test_bad_input_is_named() -> None:
    threat = Threat(0.5)
    with pytest.raises(ValueError, match="attacks: expected a tuple of at least one Attack"):
        Ensemble(threat, ())
    with pytest.raises(ValueError, match="classes: expected at least 1, got 0"):
        TargetedAPGD(threat, classes=0)
    with pytest.raises(ValueError, match="steps: expected at least 1, got 0"):
        TargetedAPGD(threat, steps=0)
    task, (x, y) = linear(6, 3, 3)
    with pytest.raises(ValueError, match="attacks: shift left the ball or the bounds of the ensemble's threat"):
        Ensemble(threat, (Shift(threat, 0.6),))(task, task.params(), (x, y))
    assert (Ensemble(threat, (Shift(threat, 0.5),)).run(task, task.params(), (x, y)).points - x).abs().max() <= 0.5
    for attack in (TargetedAPGD(threat), standard(threat)):
        with pytest.raises(ValueError, match="batch: the loss needs labels"):
            attack(task, task.params(), (x,))
        with pytest.raises(ValueError, match="labels from 0 to 2"):
            attack(task, task.params(), (x, y + 3))
        with pytest.raises(ValueError, match="logits"):
            attack(replace(task, forward=lambda model, batch: model(batch[0])[:, :, None]), task.params(), (x, y))
    utility = APGD(threat, steps=3, loss=Utility(case("mlp").valid))  # a target has no outputs to tell errors from
    assert utility.first_error(task, task.params(), (x, y)).shape == x.shape


def test_torchattacks_finds_no_more_errors() -> None:
    theirs = pytest.importorskip("torchattacks")
    task, (x, y) = digits()
    for eps in (0.05, 0.08):
        threat = Threat(eps, bounds=(0.0, 1.0))
        ours = broken(task, TargetedAPGD(threat, steps=10)(task, task.params(), (x, y)), y)
        found = broken(task, theirs.APGDT(task.model, eps=eps, steps=10, seed=0, n_classes=10)(x, y), y)
        assert 0.05 < found.float().mean() <= ours.float().mean() + 0.01
