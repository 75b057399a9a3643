"""attacks/targets.py: targets under attack."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.data import Dataset

from cases import blobs, case, relative
from oracles import flat, full_gradient, minimise, unflat
from robust_if import Exact, FlatMinima, InnerProduct, LossChange, Plain, Samples, Target, Task, Tuning, Utility
from robust_if.attacks.evasion import APGD, PGD, Attack, OneHot, Threat, WholeNumbers
from robust_if.attacks.linear import LinearAttack
from robust_if.attacks.targets import AdversarialLoss, RobustGap
from robust_if.models import logistic_regression
from robust_if.sweep import fingerprint
from robust_if.task import Params

EPS = 0.1
KINDS = pytest.mark.parametrize("kind", [AdversarialLoss, RobustGap])


def under(data: Samples, eps: Any = EPS, *, kind: type[AdversarialLoss] = AdversarialLoss, size: int = 256, **settings: Any) -> AdversarialLoss:
    """The target under ten steps of projected gradient ascent, or as the settings of the attack and of the threat say."""
    search = {name: settings.pop(name) for name in ("steps", "alpha") if name in settings}
    return kind(data, PGD(Threat(eps, **settings), **search), batch_size=size)


def linear(n: int = 20) -> tuple[Task, Samples, Tensor]:
    """A binary logistic model, data, and for every sample the direction (n, 2) in which its loss falls: its class's weights minus the other's."""
    task, (data, _) = Task(logistic_regression((2,), 2).double().eval()), blobs(n, 0)
    weight = task.params()["1.weight"]
    return task, data, torch.where(data.labels[:, None] == 1, weight[1] - weight[0], weight[0] - weight[1])


def inputs(data: Samples) -> Tensor:
    return data.batch(slice(None))[0]


@pytest.mark.parametrize("steps", [1, 3, 10])
def test_a_linear_model_under_attack_has_its_closed_form(steps: int) -> None:
    task, data, falls = linear()
    bias = task.params()["1.bias"]
    margin = (falls * inputs(data)).sum(1) + torch.where(data.labels == 1, bias[1] - bias[0], bias[0] - bias[1])
    expected = F.softplus(-(margin - EPS * falls.abs().sum(1))).mean()
    target, gap = under(data, steps=steps), under(data, steps=steps, kind=RobustGap)
    assert relative(target.value(task, task.params()), expected) <= 1e-12
    assert relative(gap.value(task, task.params()), expected - F.softplus(-margin).mean()) <= 1e-12
    worst = target.attack(task, task.params(), data.batch(slice(None)))
    assert relative(worst, inputs(data) - EPS * falls.sign()) <= 1e-12
    assert (target.name, gap.name) == ("adversarial", "robust_gap")


def test_bounds_cut_the_worst_point_off() -> None:
    task, data, falls = linear()
    low, high = float(inputs(data).min()), float(inputs(data).max())
    got = under(data, 2.0, bounds=(low, high)).attack(task, task.params(), data.batch(slice(None)))
    expected = (inputs(data) - 2.0 * falls.sign()).clamp(low, high)
    assert relative(got, expected) <= 1e-12 and (expected == low).any() and (expected == high).any()


def test_features_may_have_their_own_radius_and_bounds_or_stay() -> None:
    task, data, falls = linear()
    eps, low, high = torch.tensor([0.2, 1.5]).double(), inputs(data).amin(0), inputs(data).amax(0)
    batch, params = data.batch(slice(None)), task.params()
    got = under(data, eps, bounds=(low, high)).attack(task, params, batch)
    assert relative(got, (inputs(data) - eps * falls.sign()).maximum(low).minimum(high)) <= 1e-12
    fixed = under(data, 1.5, mutable=torch.tensor([False, True])).attack(task, params, batch)
    assert torch.equal(fixed[:, 0], inputs(data)[:, 0]) and relative(fixed[:, 1], (inputs(data) - 1.5 * falls.sign())[:, 1]) <= 1e-12
    assert torch.equal(fixed, under(data, torch.tensor([0, 1.5])).attack(task, params, batch))


@pytest.mark.parametrize("name", ["mlp", "cnn", "bare"])
def test_the_attack_stays_in_the_ball_and_never_lowers_a_loss(name: str) -> None:
    c = case(name)
    batch, params = c.valid.batch(slice(None)), c.task.params()
    low, high = float(batch[0].min()), float(batch[0].max())
    target = under(c.valid, bounds=(low, high))
    point = target.attack(c.task, params, batch)
    assert (point - batch[0]).abs().max() <= EPS * (1 + 1e-12) and point.min() >= low and point.max() <= high
    attacked, clean = c.task.losses(params, (point, batch[1])), c.task.losses(params, batch)
    assert (attacked >= clean).all() and attacked.mean() > clean.mean() + 1e-3
    assert relative(target.value(c.task, params), attacked.mean().detach()) <= 1e-12


def test_of_all_points_met_the_worst_counts() -> None:
    def peak(outputs: Tensor, batch: Any) -> Tensor:
        return torch.exp(-((outputs[:, 0] - batch[1]) ** 2))

    task = Task(nn.Linear(1, 1, bias=False).double().eval(), peak).at({"weight": torch.ones(1, 1).double()})
    data = Samples((torch.zeros(3, 1).double(), torch.tensor([0.1, 0.45, 5.0]).double()))
    # with steps of 0.3 the points met are 0 0.3 0 …, 0 0.3 0.6 0.3 …, 0 0.3 0.6 0.9 1.0
    points = under(data, 1.0, steps=6, alpha=0.3).attack(task, task.params(), data.batch(slice(None)))
    assert points[0, 0] == 0 and points[1, 0].item() in (pytest.approx(0.3), pytest.approx(0.6)) and points[2, 0] == 1


@KINDS
@given(size=st.integers(1, 12), seed=st.integers(0, 99), name=st.sampled_from(["mlp", "cnn"]))
def test_value_and_gradient_take_no_notice_of_batch_size_and_order(kind: type[AdversarialLoss], size: int, seed: int, name: str) -> None:
    c = case(name)
    params, order = c.task.params(), torch.randperm(len(c.valid), generator=torch.Generator().manual_seed(seed))
    one, other = under(c.valid, kind=kind, size=size), under(c.valid.take(order.numpy()), kind=kind, size=100)
    assert relative(one.value(c.task, params), other.value(c.task, params)) <= 1e-12
    assert relative(flat(one.gradient(c.task, params)), flat(other.gradient(c.task, params))) <= 1e-11
    assert relative(flat(one.fixed(c.task).gradient(c.task, params)), flat(one.gradient(c.task, params))) <= 1e-11


@KINDS
@pytest.mark.parametrize("name", ["logistic", "mlp", "cnn"])
def test_the_gradient_takes_the_attacked_points_as_fixed(name: str, kind: type[AdversarialLoss]) -> None:
    c = case(name)
    target, params = under(c.valid, kind=kind, size=4), c.task.params()
    x, y = c.valid.batch(slice(None))
    points = target.attack(c.task, params, (x, y))
    without = kind is RobustGap

    def loss(p: Params) -> Tensor:
        return c.task.losses(p, (points, y)).mean() - without * c.task.losses(p, (x, y)).mean()

    expected = full_gradient(loss, params)
    assert relative(flat(target.gradient(c.task, params)), expected) <= 1e-11
    assert relative(full_gradient(lambda p: target.value(c.task, p), params), expected) <= 1e-11
    assert relative(flat(Utility(c.valid).gradient(c.task, params)), expected) > 1e-3


@KINDS
def test_where_the_attack_reaches_the_maximum_the_gradient_is_that_of_the_attacked_loss(kind: type[AdversarialLoss]) -> None:
    task, data, _ = linear()
    target, params = under(data, kind=kind), task.params()
    slope, vector, h = flat(target.gradient(task, params)), flat(params), 1e-5
    for direction in torch.eye(len(vector)).double():
        ahead, behind = (target.value(task, unflat(vector + sign * h * direction, params)) for sign in (1, -1))
        assert abs((ahead - behind) / (2 * h) - slope @ direction) <= 1e-8


@KINDS
def test_influence_on_an_attacked_target_is_what_leaving_out_and_attacking_again_shows(kind: type[AdversarialLoss]) -> None:
    task, data, _ = linear(160)
    train, valid, penalty, eps = data.take(range(120)), data.take(range(120, 160)), 0.05, 0.3
    losses = train.batch(slice(None))

    def fitted(keep: Tensor) -> Params:
        def objective(p: Params) -> Tensor:
            return (keep * task.losses(p, losses)).mean() + penalty / 2 * sum(value.square().sum() for value in p.values())

        return minimise(objective, task.params())

    target, everything = under(valid, eps, kind=kind), torch.ones(120).double()
    best = fitted(everything)
    scores = InnerProduct(Exact("hessian", damping=penalty)).score(task.at(best), train, target=target)
    without = [target.value(task, fitted(everything - row)) for row in torch.eye(120).double()[:25]]
    drops = target.value(task, best) - torch.stack(without)
    assert scores.target == target.name and scores.units == "target"
    assert spearmanr(scores.values[:25], drops).statistic > 0.99 and relative(scores.values[:25], drops) < 0.1


@dataclass(frozen=True)
class Counting(Attack):
    """Another attack, which counts the samples that it is given."""

    of: Attack
    seen: list[int]

    @property
    def name(self) -> str:
        return self.of.name

    def __call__(self, task: Task, params: Params, batch: Any) -> Tensor:
        self.seen.append(len(batch[0]))
        return self.of(task, params, batch)


@KINDS
def test_fixed_points_are_made_once_and_stay(kind: type[AdversarialLoss]) -> None:
    c, seen = case("mlp"), list[int]()
    search = PGD(Threat(EPS))
    target = kind(c.valid, Counting(search.threat, search, seen), batch_size=4)
    params, moved = c.task.params(), {name: value + 0.3 for name, value in c.task.params().items()}
    fixed, later = target.fixed(c.task), target.fixed(c.task, moved)
    assert seen == [4, 4, 1] * 2 and fixed.name == target.name and fixed.held_out[0].ids.tolist() == c.valid.ids.tolist()
    x, y, points = fixed.data.batch(slice(None))
    assert torch.equal(x, c.valid.batch(slice(None))[0]) and relative(points, search(c.task, params, (x, y))) <= 1e-12
    clean = kind is RobustGap
    for at in (params, moved):
        expected = c.task.losses(at, (points, y)).mean() - clean * c.task.losses(at, (x, y)).mean()
        assert relative(fixed.value(c.task, at), expected) <= 1e-12
    for one, at in ((fixed, params), (later, moved), (fixed.fixed(c.task, moved), moved)):
        assert relative(one.value(c.task, at), target.value(c.task, at)) <= 1e-12
        assert relative(flat(one.gradient(c.task, at)), flat(target.gradient(c.task, at))) <= 1e-11
    assert fixed.value(c.task, moved) < target.value(c.task, moved)
    seen.clear()
    short = Tuning(steps=3, lr=0.05, batch_size=5)
    for estimator in (FlatMinima(short, damping=1e-2), LossChange(short), InnerProduct()):
        assert np.ptp(estimator.score(c.task, c.train, target=fixed).values) > 0
    assert not seen


def test_fixed_points_of_any_data_set() -> None:
    c = case("mlp")
    whole = under(c.valid).fixed(c.task)
    mapped = under(Samples(Pairs(c.valid)).take([3, 1, 2]), size=2).fixed(c.task)
    for got, expected in zip(mapped.data.batch(slice(None)), whole.data.take([3, 1, 2]).batch(slice(None)), strict=True):
        assert relative(got, expected) <= 1e-12
    assert mapped.data.ids.tolist() == [3, 1, 2]
    weights = torch.rand(len(c.valid)).double()
    weighed = Task(c.task.model, lambda outputs, batch: batch[2] * F.cross_entropy(outputs, batch[1], reduction="none"))
    target = under(Samples((*c.valid.batch(slice(None)), weights)), kind=RobustGap)
    assert relative(target.fixed(weighed).value(weighed, c.task.params()), target.value(weighed, c.task.params())) <= 1e-12
    named = Samples([(x, y, "name") for x, y in zip(*c.valid.batch(slice(None)), strict=True)])
    with pytest.raises(ValueError, match="data: to hold attacked points, batches have to be tensors alone, got tuple"):
        under(named).fixed(c.task)


def test_fixed_points_of_a_single_precision_model_on_double_precision_data() -> None:
    single, double = case("mlp", torch.float32), case("mlp")
    fixed = under(double.valid).fixed(single.task)
    x, _, points = fixed.data.batch(slice(None))
    assert (x.dtype, points.dtype) == (torch.float64, torch.float32)
    value = fixed.value(single.task, single.task.params())
    assert value.dtype == torch.float32 and relative(value, under(double.valid).value(double.task, double.task.params())) <= 1e-5


def test_different_points_are_different_settings() -> None:
    c = case("mlp")
    targets: list[Target] = [under(c.valid), under(c.valid, kind=RobustGap), under(c.valid, steps=3), under(c.valid, torch.full((5,), EPS))]
    targets += [under(c.valid).fixed(c.task), AdversarialLoss(c.valid, APGD(Threat(EPS)))]
    assert len({fingerprint({}, c.train, target) for target in targets}) == len(targets)
    assert fingerprint({}, c.train, under(c.valid)) == fingerprint({}, c.train, under(c.valid))


def test_inputs_that_have_to_be_valid_stay_so() -> None:
    c = case("mlp")
    x = torch.zeros(9, 5).double()
    x[:, 0], x[torch.arange(9), 2 + torch.arange(9) % 3] = torch.arange(9).double(), 1
    threat = Threat(torch.tensor([2.5, 0, 1, 1, 1]), bounds=(0.0, 8.0), project=(WholeNumbers([0]), OneHot([(2, 3, 4)])))
    target = AdversarialLoss(Samples((x, c.valid.labels)), PGD(threat))
    points = target.fixed(c.task).data.batch(slice(None))[2]
    assert (points[:, 0] % 1 == 0).all() and (points[:, 1] == 0).all() and (points[:, 2:].sort(1).values == torch.tensor([0, 0, 1])).all()
    assert (points != x).any(0).tolist() == [True, False, True, True, True]


def test_the_attack_happens_at_the_parameters_given() -> None:
    task, data, falls = linear()
    turned = {name: -value for name, value in task.params().items()}
    points = under(data).attack(task, turned, data.batch(slice(None)))
    assert relative(points, inputs(data) + EPS * falls.sign()) <= 1e-12


def test_model_and_data_stay_as_they_were() -> None:
    c = case("cnn")
    state = {name: value.clone() for name, value in c.task.model.state_dict().items()}
    x = inputs(c.valid).clone()
    under(c.valid).gradient(c.task, c.task.params())
    assert all(torch.equal(value, state[name]) for name, value in c.task.model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in c.task.model.parameters()) and torch.equal(inputs(c.valid), x)


def test_single_precision_models_take_double_precision_data() -> None:
    single, double = case("mlp", torch.float32), case("mlp")
    low, high = 0.1, 0.9  # not numbers of single precision: the edges may differ by rounding
    x = torch.rand(9, 5).double().clamp(low, high).index_fill(0, torch.tensor([0]), low)
    data = Samples((x, double.valid.labels))
    values = [under(data, bounds=(low, high)).value(c.task, c.task.params()) for c in (single, double)]
    assert values[0].dtype == torch.float32 and relative(values[0].detach(), values[1].detach()) <= 1e-5


def test_under_no_grad_the_attack_is_the_same() -> None:
    c = case("mlp")
    target = under(c.valid)
    with torch.no_grad():
        value = target.value(c.task, c.task.params())
    assert not value.requires_grad and value == target.value(c.task, c.task.params())


class Pairs(Dataset[tuple[Tensor, Tensor]]):
    def __init__(self, data: Samples) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        x, y = self.data.batch(torch.tensor([i]))
        return x[0], y[0]


def test_a_map_style_data_set_gives_the_same() -> None:
    c = case("mlp")
    values = [under(data).value(c.task, c.task.params()) for data in (c.valid, Samples(Pairs(c.valid)))]
    assert values[0] == values[1]


def test_other_inputs_of_a_batch_reach_the_loss_untouched() -> None:
    c = case("mlp")
    weights = torch.rand(len(c.valid)).double()
    task = Task(c.task.model, lambda outputs, batch: batch[2] * F.cross_entropy(outputs, batch[1], reduction="none"))
    x, y = c.valid.batch(slice(None))
    target = under(Samples((x, y, weights)))
    points = under(c.valid).attack(c.task, c.task.params(), (x, y))
    assert relative(target.value(task, task.params()).detach(), (weights * c.task.losses(c.task.params(), (points, y))).mean().detach()) <= 1e-12


def test_a_minibatch_is_attacked_in_the_same_way_and_tuning_lowers_the_target() -> None:
    task, data, _ = linear(60)
    target = under(data, steps=3, alpha=0.05, bounds=(-9.0, 9.0))
    part = target.minibatch(7, torch.Generator().manual_seed(0))
    assert len(part.data) == 7 and part.attack is target.attack
    both = Utility(data) + 0.5 * target
    tuned = Tuning(steps=30, lr=0.1, batch_size=20, flatness=Plain()).run(task, both)
    assert both.value(task, tuned) < both.value(task, task.params()) and both.name == "utility+0.5*adversarial"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eps": 0.0}, "eps: expected a positive number, .* got 0"),
        ({"eps": -1.0}, "eps: expected a positive number"),
        ({"eps": float("nan")}, "eps: expected a positive number"),
        ({"eps": 1.0, "alpha": 0.0}, "alpha: expected a positive number"),
        ({"eps": 1.0, "steps": 0}, "steps: expected at least 1, got 0"),
        ({"eps": 1.0, "bounds": (1.0, 0.0)}, r"bounds: expected \(low, high\)"),
        ({"eps": 1.0, "bounds": (0.0, 1.0)}, r"bounds: expected data within \(0.0, 1.0\), got 1.0687 in sample 0, feature \(0,\)"),
        ({"eps": torch.tensor([0.1, -0.1])}, "eps: expected a positive number"),
        ({"eps": torch.zeros(2)}, "eps: expected a positive number"),
        ({"eps": torch.ones(3)}, r"eps: .* broadcasts to the shape of one sample, \(2,\), got \(3,\)"),
        ({"eps": 1.0, "mutable": torch.tensor([True] * 3)}, r"mutable: .* broadcasts to the shape of one sample, \(2,\), got \(3,\)"),
        ({"eps": 1.0, "mutable": torch.tensor([False, False])}, "mutable: expected at least one feature that may move, got none"),
        ({"eps": torch.tensor([0.0, 1.0]), "mutable": torch.tensor([True, False])}, "mutable: expected at least one feature that may move, got none"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        under(blobs(10, 0)[0], **settings)


def test_something_else_than_an_attack_is_refused() -> None:
    with pytest.raises(TypeError, match=r"attack: expected an attack, such as PGD\(Threat\(eps=0.1\)\), got float"):
        AdversarialLoss(blobs(10, 0)[0], 0.1)  # type: ignore[arg-type]


def test_the_attack_of_the_papers_is_a_target_too() -> None:
    """Section 5.3 of Chhabra et al. 2024: the loss at x − 1.3 f(x) / ‖w‖² w."""
    task, data, _ = linear()
    params = task.params()
    w, b = params["1.weight"][1] - params["1.weight"][0], params["1.bias"][1] - params["1.bias"][0]
    score = inputs(data) @ w + b
    signs = 2.0 * data.labels.double() - 1
    expected = F.softplus(0.3 * signs * score).mean()  # every score f has become −0.3 f
    assert relative(AdversarialLoss(data, LinearAttack()).value(task, params), expected) <= 1e-12


def test_inputs_that_cannot_be_moved_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expects inputs of floating point, got torch.int64"):
        under(case("attention").valid)
    with pytest.raises(ValueError, match=r"expects batches \(input, …\) .* got dict"):
        under(case("regression").valid)


def test_the_outlier_of_a_map_style_data_set_is_found_when_it_comes() -> None:
    c = case("mlp")
    x = torch.zeros(9, 5).double()
    x[8, 0] = 2
    target = under(Samples(Pairs(Samples((x, c.valid.labels), np.arange(9)))), bounds=(0.0, 1.0))
    with pytest.raises(ValueError, match="bounds: expected inputs within"):
        target.value(c.task, c.task.params())
