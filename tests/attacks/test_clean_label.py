"""attacks/clean_label.py and attacks/crafting.py: each attack minimises the objective it states, within the limits it is given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import lsq_linear
from torch import Tensor, nn
from torch.utils.data import Dataset

from cases import relative
from oracles import matrix, sample_gradients
from robust_if import Samples, Task
from robust_if.attacks import clean_label
from robust_if.attacks.clean_label import bullseye_polytope, feature_collision, gradient_matching
from robust_if.attacks.crafting import Region, adam, descend, of_sum
from robust_if.attacks.evasion import box
from robust_if.attacks.poisoned import Poisoned
from robust_if.models import build
from unchanged import untouched

N, CLASSES, GOAL, EPS = 30, 3, 1, 0.15
SHAPES = {"mlp": (5,), "cnn": (1, 5, 6)}


def problem(name: str = "mlp") -> tuple[Task, Samples, Tensor]:
    """A model, inputs in [0, 1] with ids of their own, and a target."""
    draw, shape = torch.Generator().manual_seed(0), SHAPES[name]
    x = torch.rand(N, *shape, generator=draw, dtype=torch.float64)
    model = build(name, shape, CLASSES, 3).double()
    return Task(model), Samples((x, torch.arange(N) % CLASSES), np.arange(N) + 100), torch.rand(shape, generator=draw, dtype=torch.float64)


def inputs(data: Samples) -> Tensor:
    return data.batch(slice(None))[0]


def matching(task: Task, data: Samples, target: Tensor, **kwargs: Any) -> Poisoned[Samples]:
    options = {"goal": GOAL, "rate": 0.2, "eps": EPS, "steps": 12, "restarts": 2, "seed": 0, **kwargs}
    return gradient_matching(task, data, target_input=target, **options)


def collision(task: Task, data: Samples, target: Tensor, **kwargs: Any) -> Poisoned[Samples]:
    options = {"goal": GOAL, "rate": 0.2, "eps": EPS, "beta": 1e-4, "steps": 12, "seed": 0, **kwargs}
    return feature_collision(task, data, target_input=target, **options)


def polytope(task: Task, data: Samples, target: Tensor, **kwargs: Any) -> Poisoned[Samples]:
    options = {"goal": GOAL, "rate": 0.2, "eps": EPS, "steps": 12, "lr": 0.5, "seed": 0, **kwargs}
    return bullseye_polytope(task, data, target_input=target, **options)


ATTACKS: dict[str, Callable[..., Poisoned[Samples]]] = {"matching": matching, "collision": collision, "polytope": polytope}
EVERY = pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)


def misalignment(task: Task, poisons: Samples, target: Tensor) -> float:
    """1 − cos of the summed gradients of single samples and the target's, each by a backward pass of its own."""
    poison = matrix(sample_gradients(task, poisons)).sum(0)
    wanted = matrix(sample_gradients(task, Samples((target[None], torch.tensor([GOAL])))))[0]
    return 1 - float(poison @ wanted / np.linalg.norm(poison) / np.linalg.norm(wanted))


def features(task: Task, x: Tensor) -> Tensor:
    return nn.Sequential(*list(task.model.children())[:-1])(x).detach()


def off_centre(task: Task, x: Tensor, target: Tensor) -> float:
    wanted = features(task, target[None])[0]
    return float((wanted - features(task, x).mean(0)).square().sum() / wanted.square().sum() / 2)


def apart(task: Task, x: Tensor, target: Tensor) -> Tensor:
    return (features(task, x) - features(task, target[None])).square().sum(1)


@pytest.fixture
def objectives(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The objectives that an attack hands to the descent, with the start and what came out."""
    seen: list[Any] = []

    def spy(objective: Any, start: Tensor, rule: Any, steps: int) -> Any:
        seen.append((objective, start, descend(objective, start, rule, steps)))
        return seen[-1][-1]

    monkeypatch.setattr(clean_label, "descend", spy)
    return seen


def assert_slope(function: Callable[[Tensor], float], x: Tensor, slope: Tensor, h: float = 1e-6) -> None:
    """Central differences along random directions."""
    for seed in range(3):
        step = h * torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=x.dtype)
        assert float((slope * step).sum()) == pytest.approx((function(x + step) - function(x - step)) / 2, rel=1e-4)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("size", [1, 4, 256])
def test_gradient_matching_minimises_one_minus_the_cosine(objectives: list[Any], name: str, size: int) -> None:
    task, data, target = problem(name)
    poisoned = matching(task, data, target, batch_size=size, rate=0.1)
    (objective, start, _), _ = objectives

    def dense(x: Tensor) -> float:
        return misalignment(task, Samples((x, torch.full((len(x),), GOAL))), target)

    value, slope = objective(start)
    assert float(value) == pytest.approx(dense(start), rel=1e-9)
    assert_slope(dense, start, slope)
    reached = misalignment(task, poisoned.data.take(poisoned.mask), target)
    assert reached == pytest.approx(min(float(least) for _, _, (_, least) in objectives), rel=1e-9)
    assert reached < 0.8 * misalignment(task, data.take(poisoned.mask), target)


def test_more_restarts_and_steps_never_match_worse() -> None:
    task, data, target = problem()
    values = []
    for options in ({"restarts": 1}, {"restarts": 3}):
        poisoned = matching(task, data, target, **options)
        values.append(misalignment(task, poisoned.data.take(poisoned.mask), target))
    assert values[1] <= values[0]


def test_only_the_parameters_that_count_are_matched(objectives: list[Any]) -> None:
    task, data, target = problem()
    head = replace(task, parameters="5.*")
    matching(head, data, target)
    objective, start, _ = objectives[0]
    poisons = Samples((start, torch.full((len(start),), GOAL)))
    assert float(objective(start)[0]) == pytest.approx(misalignment(head, poisons, target), rel=1e-9)
    assert misalignment(head, poisons, target) != pytest.approx(misalignment(task, poisons, target), rel=1e-3)


@pytest.mark.parametrize("bounds", [None, (0.2, 0.8)])
def test_feature_collision_has_its_closed_form_on_a_linear_map(bounds: tuple[float, float] | None) -> None:
    _, data, target = problem()
    data = Samples((0.3 + 0.4 * inputs(data), data.labels))
    target = 0.3 + 0.4 * target
    model = nn.Sequential(nn.Linear(5, 4, bias=False), nn.Linear(4, CLASSES)).double().eval()
    poisoned = collision(Task(model), data, target, eps=None, bounds=bounds, beta=0.4, steps=400)
    linear, weight = model[0].weight.detach().numpy(), 0.4 * (4 / 5) ** 2
    for i in np.flatnonzero(poisoned.mask):
        left = np.vstack([linear, np.sqrt(weight) * np.eye(5)])
        right = np.concatenate([linear @ target.numpy(), np.sqrt(weight) * inputs(data)[i].numpy()])
        expected = lsq_linear(left, right, bounds or (-np.inf, np.inf), tol=1e-14).x
        assert relative(inputs(poisoned.data)[i], expected) <= 1e-6
        assert bounds is None or expected.min() >= bounds[0]


@pytest.mark.parametrize("name", SHAPES)
def test_feature_collision_brings_every_poison_nearer_and_takes_no_notice_of_batches(name: str) -> None:
    task, data, target = problem(name)
    poisoned, singly = (collision(task, data, target, eps=0.5, steps=30, batch_size=size) for size in (256, 1))
    rows = poisoned.mask
    assert relative(inputs(singly.data), inputs(poisoned.data)) <= 1e-9
    assert (apart(task, inputs(poisoned.data)[rows], target) < 0.8 * apart(task, inputs(data)[rows], target)).all()
    near = collision(task, data, target, eps=0.5, steps=30, beta=1e4)
    assert (inputs(near.data) - inputs(data)).norm() < 0.1 * (inputs(poisoned.data) - inputs(data)).norm()


@pytest.mark.parametrize("size", [1, 4, 256])
def test_bullseye_polytope_minimises_the_distance_of_the_mean_over_models(objectives: list[Any], size: int) -> None:
    task, data, target = problem()
    tasks = [task, Task(build("mlp", (5,), CLASSES, 7).double())]
    poisoned = bullseye_polytope(tasks, data, target_input=target, goal=GOAL, rate=0.1, eps=EPS, steps=12, lr=0.5, seed=0, batch_size=size)
    ((objective, start, (_, least)),) = objectives

    def dense(x: Tensor) -> float:
        return float(np.mean([off_centre(each, x, target) for each in tasks]))

    value, slope = objective(start)
    assert torch.equal(start, inputs(data)[poisoned.mask])
    assert float(value) == pytest.approx(dense(start), rel=1e-9)
    assert_slope(dense, start, slope)
    assert float(least) == pytest.approx(dense(inputs(poisoned.data)[poisoned.mask]), rel=1e-9)
    assert least < 0.8 * value


@EVERY
@pytest.mark.parametrize("name", SHAPES)
def test_only_inputs_of_the_goal_class_change_and_stay_in_the_ball_and_the_bounds(attack: Any, name: str) -> None:
    task, data, target = problem(name)
    before = inputs(data).clone()
    with untouched(task.model):
        poisoned = attack(task, data, target)
    mask, after = torch.from_numpy(poisoned.mask), inputs(poisoned.data)
    low, high = box(before, EPS, (0.0, 1.0))
    assert mask.sum() == round(0.2 * N) and (data.labels[mask] == GOAL).all() and not poisoned.covers.any()
    assert torch.equal(after[~mask], before[~mask]) and (after != before)[mask].flatten(1).any(1).all()
    assert (after >= low).all() and (after <= high).all() and (after - before).abs().max() > 0.9 * EPS
    assert torch.equal(poisoned.data.labels, data.labels) and np.array_equal(poisoned.data.ids, data.ids)
    assert torch.equal(inputs(data), before)


@EVERY
def test_limits_may_differ_by_feature(attack: Any) -> None:
    task, data, target = problem()
    eps, low, high = torch.tensor([0.0, 0.1, 0.2, 0.3, 0.0]), torch.tensor([0.0, 0.0, -1.0, 0.0, 0.0]), torch.tensor([1.0, 1.0, 2.0, 1.0, 5.0])
    poisoned = attack(task, data, target, eps=eps, bounds=(low, high))
    moved = (inputs(poisoned.data) - inputs(data)).abs()
    least, most = box(inputs(data), eps, (low, high))
    assert (moved[:, [0, 4]] == 0).all() and (moved.amax(0)[1:4] > 0).all()
    assert (inputs(poisoned.data) >= least).all() and (inputs(poisoned.data) <= most).all()


@EVERY
def test_a_seed_repeats_and_another_one_differs(attack: Any) -> None:
    task, data, target = problem()
    one, same, other = (attack(task, data, target, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(inputs(one.data), inputs(same.data)) and np.array_equal(one.mask, same.mask)
    assert not np.array_equal(one.mask, other.mask)


@EVERY
def test_data_keep_their_type_and_may_be_a_map_style_data_set(attack: Any) -> None:
    class Items(Dataset[Any]):
        def __len__(self) -> int:
            return N

        def __getitem__(self, i: int) -> Any:
            return inputs(single)[i], single.labels[i]

    task, data, target = problem()
    single = Samples((inputs(data).float(), data.labels))
    found = attack(task, single, target.float())
    for poisoned, clean in ((found, single), (attack(Task(build("mlp", (5,), CLASSES, 3)), data, target), data)):
        low, high = box(inputs(clean), EPS, (0.0, 1.0))
        after = inputs(poisoned.data)
        assert after.dtype == inputs(clean).dtype and (after >= low).all() and (after <= high).all()
    assert torch.equal(inputs(attack(task, Samples(Items()), target.float()).data), inputs(found.data))


def test_an_augmentation_is_part_of_what_is_matched() -> None:
    task, data, target = problem()

    def blank(batch: tuple[Tensor, Tensor], generator: torch.Generator) -> tuple[Tensor, Tensor]:
        kept = torch.rand(len(batch[0]), 1, generator=generator) > 0.3
        return batch[0] * torch.cat([torch.zeros(len(kept), 1), kept.repeat(1, 4)], 1), batch[1]

    one, same, plain = (matching(task, data, target, augment=augment) for augment in (blank, blank, None))
    changed = (inputs(one.data) != inputs(data))[one.mask].any(0)
    assert torch.equal(inputs(one.data), inputs(same.data)) and not torch.equal(inputs(one.data), inputs(plain.data)) and changed[1:].all()


@given(size=st.integers(1, 9))
def test_both_passes_over_a_sum_see_the_same_draws(size: int) -> None:
    generator, x = torch.Generator().manual_seed(0), torch.randn(7, 3, dtype=torch.float64)

    def noisy(part: Tensor) -> Tensor:
        return (part * torch.rand(part.shape, generator=generator, dtype=part.dtype)).sum(0)

    value, slope = of_sum(noisy, lambda total: total.pow(3).sum(), size, generator)(x)
    replay = torch.Generator().manual_seed(0)
    draws = torch.cat([torch.rand(part.shape, generator=replay, dtype=x.dtype) for part in torch.split(x, size)])
    total = (x * draws).sum(0)
    assert relative(value, total.pow(3).sum()) <= 1e-12 and relative(slope, draws * 3 * total.square()) <= 1e-12


def test_adam_steps_by_a_share_of_eps_that_falls_three_times() -> None:
    x, eps = torch.zeros(2, 3, dtype=torch.float64), torch.tensor([1.0, 2.0, 0.0])
    region = Region.around(x, 100.0, None)
    rule, points = adam(region, eps, 16, 0.5, signed=True), [x]
    for k in range(16):
        slope = torch.tensor([[-3.0, 1.0, 1.0]] * 2, dtype=x.dtype) / (k + 1)  # only signs count
        points.append(rule(points[-1], torch.zeros(()), slope, torch.tensor(True)))
    steps = torch.stack(points).diff(dim=0)[:, 0]
    expected = 0.5 * torch.tensor([1.0] * 6 + [0.1] * 4 + [0.01] * 4 + [0.001] * 2, dtype=x.dtype)
    assert relative(steps[:, 0], expected) <= 1e-6 and relative(steps[:, 1], -2 * expected) <= 1e-6


def test_the_best_point_counts_for_every_sample_by_itself() -> None:
    def rule(x: Tensor, *_: Tensor) -> Tensor:
        return x + 1

    goals = torch.tensor([[1.0], [3.0], [-2.0]])
    best, least = descend(lambda x: ((x - goals).square()[:, 0], x), torch.zeros(3, 1), rule, 5)
    assert best[:, 0].tolist() == [1, 3, 0] and least.tolist() == [0, 0, 4]
    with pytest.raises(ValueError, match="task: the objective is not finite"):
        descend(lambda x: (x.sum() * torch.nan, x), torch.zeros(3, 1), rule, 2)


@EVERY
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"goal": 7}, "goal: the class 7 is not in the data"),
        ({"rate": 0.0}, "rate: expected a share strictly between 0 and 1"),
        ({"rate": 1.0}, "rate: expected a share strictly between 0 and 1"),
        ({"rate": 0.5}, "rate: 0.5 of 30 samples are 15, but only 10 are of class 1; lower the rate"),
        ({"eps": 0.0}, "eps: expected finite numbers, some of them above 0"),
        ({"eps": -0.1}, "eps: expected numbers of at least 0"),
        ({"eps": float("inf")}, "eps: expected finite numbers"),
        ({"eps": torch.ones(4)}, "eps: expected a number, or a tensor that broadcasts"),
        ({"bounds": (0.5, 1.0)}, "bounds: expected (target_input|data) within"),
        ({"bounds": (1.0, 0.0)}, "bounds: expected"),
        ({"steps": 0}, "steps: expected a positive number"),
        ({"batch_size": 0}, "batch_size: expected a positive number"),
    ],
)
def test_bad_arguments_are_named(attack: Any, changed: dict[str, Any], message: str) -> None:
    task, data, target = problem()
    with pytest.raises(ValueError, match=message):
        attack(task, data, target, **changed)


@EVERY
def test_bad_inputs_are_named(attack: Any) -> None:
    task, data, target = problem()
    with pytest.raises(ValueError, match=r"target_input: expected the shape of one input, \(5,\), got \(4,\)"):
        attack(task, data, target[:4])
    with pytest.raises(ValueError, match="bounds: expected target_input within"):
        attack(task, data, target + 3)
    with pytest.raises(ValueError, match="floating point, got torch.int64"):
        attack(task, Samples((torch.ones(N, 5, dtype=torch.long), data.labels)), torch.ones(5, dtype=torch.long))


def test_what_cannot_be_matched_is_said() -> None:
    task, data, target = problem()
    certain = task.at({"5.bias": torch.tensor([0.0, 1e4, 0.0], dtype=torch.float64)})
    with pytest.raises(ValueError, match="target_input: the gradient of its loss is zero"):
        matching(certain, data, target)
    dead = task.at({"3.bias": torch.full((128,), -1e4, dtype=torch.float64)})
    with pytest.raises(ValueError, match="target_input: all its features are zero"):
        polytope(dead, data, target)
    with pytest.raises(ValueError, match="tasks: expected at least one"):
        bullseye_polytope([], data, target_input=target, goal=GOAL, rate=0.2, eps=EPS, seed=0)
