"""evaluations/robustness.py and checks.py: robust accuracy that is known exactly, and models whose number must not be believed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from robust_if.attacks.evasion import APGD, FGSM, PGD, Ensemble, OneHot, Square, TargetedAPGD, Threat, lite
from robust_if.data import Samples
from robust_if.evaluations import checks
from robust_if.evaluations.robustness import CLEAN, RobustAccuracy, robust_accuracy
from robust_if.models import logistic_regression, mlp
from robust_if.task import Task
from robust_if.training import Recipe, fit

CHECKS = {
    "inside the ball", "logits", "deterministic", "gradients", "saturation", "classes", "more steps", "converged", "larger radius", "whole range",
    "black box",
}  # fmt: skip


def linear(classes: int = 2, features: int = 5, n: int = 80) -> tuple[Task, Samples]:
    """A linear model, and samples of which it gets most right, at all distances from its boundary."""
    task = Task(logistic_regression((features,), classes).double().eval())
    x = torch.randn(n, features, generator=torch.Generator().manual_seed(1)).double()
    y = task.outputs(task.params(), (x,)).argmax(1)
    y[::10] = (y[::10] + 1) % classes
    return task, Samples((x, y), np.array([f"s{i}" for i in range(n)]))


def gaps(task: Task) -> Tensor:
    """(K, K, d): weights of class k minus those of class j."""
    weight = task.params()["1.weight"]
    return weight[:, None] - weight[None]


def survives(task: Task, samples: Samples, reach: Tensor) -> np.ndarray:
    """Which samples no change breaks that lowers z_y − z_j by at most ``reach`` (n, K)."""
    x, y = samples.tensors
    logits = task.outputs(task.params(), (x, y))
    left = logits.gather(1, y[:, None]) - logits - reach
    return (left > 0).scatter(1, y[:, None], True).all(1).numpy()


@cache
def digits() -> tuple[nn.Module, Samples]:
    """A small network that is trained on 600 digits, with 80 others."""
    images, labels = load_digits(return_X_y=True)
    x, y = torch.from_numpy(images / 16).float().reshape(-1, 1, 8, 8), torch.from_numpy(labels)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        task = Task(mlp((1, 8, 8), 10, width=32).eval())
    return fit(task, Samples((x[:600], y[:600])), Recipe(epochs=12, lr=0.01, optimizer="adamw")).model, Samples((x[600:680], y[600:680]))


THREAT = Threat(0.1, bounds=(0.0, 1.0))


class Planted(nn.Module):
    """A trained network behind something that hides its gradients, or falsifies its outputs."""

    def __init__(self, model: nn.Module, kind: str) -> None:
        super().__init__()
        self.model, self.kind = model, kind

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "rounded inputs":
            return self.model((8 * x).round() / 8)
        if self.kind == "batch":
            return self.model(x - 0.2 * x.mean(0))
        z = self.model(x)
        if self.kind == "random":
            return z + 0.3 * torch.randn(z.shape)
        return {"saturated": z * 1e6, "probabilities": z.softmax(1), "rounded outputs": z + (z.round() - z).detach() - 0.999 * (z - z.detach())}[
            self.kind
        ]


def planted(kind: str, **given: Any) -> RobustAccuracy:
    model, samples = digits()
    return robust_accuracy(Task(Planted(model, kind).eval()), samples, THREAT, **{"preset": lite(THREAT), **given})


def found(result: RobustAccuracy) -> dict[str, bool | None]:
    return {each.name: each.passed for each in result.checks}


# The number is known


@pytest.mark.parametrize("classes", [2, 3, 5])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_robust_accuracy_of_a_linear_model_is_exact(classes: int, norm: str) -> None:
    task, samples = linear(classes)
    eps = 0.3
    reach = eps * torch.linalg.vector_norm(gaps(task), ord=1 if norm == "linf" else 2, dim=2)[samples.labels]
    result = robust_accuracy(task, samples, Threat(eps, norm=norm), preset="lite", checks=False)  # type: ignore[arg-type]
    expected = survives(task, samples, reach)
    assert np.array_equal(result.robust, expected) and 0 < expected.sum() < result.right.sum()
    assert result.accuracy == expected.mean() and result.clean_accuracy == 0.9 and result.n == 80


def test_bounds_and_features_that_do_not_move_are_kept() -> None:
    task, samples = linear(3)
    x, y = samples.tensors
    eps, mutable = torch.tensor([0.2, 0.4, 0.6, 0.2, 0.4]).double(), torch.tensor([True, True, False, True, True])
    bounds = (x.amin(0), x.amax(0))
    low, high = ((x - eps).maximum(bounds[0]) - x, (x + eps).minimum(bounds[1]) - x)
    slope = gaps(task)[y]  # (n, K, d): of z_y − z_j
    reach = -(torch.where(slope > 0, low[:, None], high[:, None]) * slope * mutable).sum(2)
    result = robust_accuracy(task, samples, Threat(eps, bounds=bounds, mutable=mutable), preset="lite", points=True)
    assert np.array_equal(result.robust, survives(task, samples, reach)) and result.believable
    assert "0.2 to 0.4 by feature" in result.threat and "4 of 5 features may move" in result.threat
    assert result.points is not None and torch.equal(result.points[:, 2], x[:, 2])


def test_the_points_are_those_that_break_the_samples() -> None:
    task, samples = linear(3)
    result = robust_accuracy(task, samples, Threat(0.3), preset="lite", points=True, checks=False)
    x, y = samples.tensors
    assert result.points is not None and result.points.dtype == x.dtype
    wrong = (task.outputs(task.params(), (result.points,)).argmax(1) != y).numpy()
    assert np.array_equal(wrong, ~result.robust)
    untouched = np.isin(result.broken_by, ["", CLEAN])
    assert torch.equal(result.points[untouched], x[untouched]) and (result.points - x).abs().max() <= 0.3 + 1e-12


def test_every_sample_is_broken_by_the_first_attack_that_can() -> None:
    model, samples = digits()
    task = Task(model)
    result = robust_accuracy(
        task, samples, THREAT, preset=Ensemble(THREAT, (FGSM(THREAT, loss="ce"), APGD(THREAT, steps=50), Square(THREAT, queries=50)))
    )
    alone = robust_accuracy(task, samples, THREAT, preset=FGSM(THREAT, loss="ce"), checks=False)
    assert np.array_equal(result.broken_by == "fgsm", alone.broken_by == "fgsm") and np.array_equal(
        alone.robust, ~np.isin(alone.broken_by, ["fgsm", CLEAN])
    )
    assert [each.name for each in result.members] == ["fgsm", "apgd-ce", "square"]
    left = int(result.right.sum())
    for member in result.members:
        left -= member.broke
        assert member.broke == (result.broken_by == member.name).sum() and member.accuracy == left / 80
        assert member.interval[0] < member.accuracy < member.interval[1]
    assert result.members[1].broke > 5 and result.accuracy == left / 80 and np.array_equal(result.right, result.broken_by != CLEAN)
    assert result.members[1].budget == "50 steps" and result.members[2].budget == "50 queries"


def test_a_radius_of_zero_is_the_clean_accuracy() -> None:
    task, samples = linear(3)
    result = robust_accuracy(task, samples, Threat(0.0), preset="lite")
    assert np.array_equal(result.right, result.robust) and result.believable
    assert found(result)["gradients"] is None and "more steps" not in found(result)


# It is the same whatever the batches


@pytest.mark.parametrize("size", [1, 7, 80])
def test_the_batch_size_changes_nothing(size: int) -> None:
    (task, samples), threat = linear(4, n=40), Threat(0.3)
    attacks = Ensemble(threat, (APGD(threat, steps=5), Square(threat, queries=20)))
    results = [robust_accuracy(task, samples, threat, preset=attacks, batch_size=each, checks=False) for each in (size, 33)]
    assert set(results[0].broken_by) == {"", CLEAN, "apgd-ce", "square"}
    assert np.array_equal(results[0].broken_by, results[1].broken_by)


def test_an_interrupted_evaluation_goes_on_where_it_was(tmp_path: Path) -> None:
    model, samples = digits()
    calls: list[int] = []
    seen: list[str] = []

    class Counted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            calls.append(len(x))
            return self.model(x)

    def stopping(items: Iterable[Any], name: str) -> Iterable[Any]:
        for item in items:
            if len(seen) == 7:
                raise KeyboardInterrupt
            seen.append(name)
            yield item

    task = Task(Counted().eval())
    attacks = Ensemble(THREAT, (APGD(THREAT, steps=20), TargetedAPGD(THREAT, steps=20, classes=2)))
    options: dict[str, Any] = {"preset": attacks, "batch_size": 20, "points": True, "checks": False}
    whole = robust_accuracy(task, samples, THREAT, **options)
    in_full = sum(calls)
    with pytest.raises(KeyboardInterrupt):
        robust_accuracy(task, samples, THREAT, directory=tmp_path, progress=stopping, **options)
    assert seen == ["clean"] * 4 + ["0-apgd-ce"] * 3
    calls.clear()
    resumed = robust_accuracy(task, samples, THREAT, directory=tmp_path, **options)
    assert sum(calls) < in_full
    for name in ("right", "robust", "broken_by", "points"):
        assert np.array_equal(getattr(whole, name), getattr(resumed, name)), name
    with pytest.raises(ValueError, match="directory"):
        robust_accuracy(task, samples, Threat(0.2, bounds=(0.0, 1.0)), preset="lite", batch_size=20, directory=tmp_path)


# What is said


def test_the_number_is_never_told_without_its_interval_and_its_budget() -> None:
    model, samples = digits()
    text = str(robust_accuracy(Task(model), samples.take(range(3)), THREAT, preset="standard", checks=False, radius="0.1 of the pixel range"))
    for part in ("of 3 samples", "clean", " to ", "L∞ radius 0.1 of the pixel range", "inputs from 0 to 1", "standard: apgd-ce (100 steps)"):
        assert part in text, part
    assert "5000 queries" in text and "Unchecked" in text


def test_the_record_is_plain() -> None:
    import json

    task, samples = linear()
    result = robust_accuracy(task, samples, Threat(0.2), preset="lite")
    record = json.loads(json.dumps(result.record(), allow_nan=False))
    assert record["accuracy"] == result.accuracy and record["interval"] == list(result.interval) and record["verdict"] == result.verdict
    assert [each["name"] for each in record["checks"]] == [each.name for each in result.checks]


def test_the_interval_is_wilsons() -> None:
    task, samples = linear(n=10)
    result = robust_accuracy(task, samples, Threat(100.0), preset="lite", checks=False)
    assert result.accuracy == 0 and result.interval == pytest.approx((0, 0.2775), abs=1e-4)  # 1.96² / (10 + 1.96²)


# Checks


@pytest.mark.parametrize("preset", [lite(THREAT), Ensemble(THREAT, (APGD(THREAT), TargetedAPGD(THREAT, steps=50)))])
def test_an_honest_model_passes_every_check(preset: Any) -> None:
    model, samples = digits()
    result = robust_accuracy(Task(model), samples, THREAT, preset=preset)
    assert set(found(result)) == CHECKS and result.believable and not result.failed
    assert {name for name, passed in found(result).items() if passed is None} == {"classes"}
    assert "No check speaks against it" in str(result) and result.checked == 64


@pytest.mark.parametrize(
    ("kind", "caught"),
    [
        ("saturated", {"saturation"}),
        ("rounded inputs", {"gradients", "saturation", "whole range"}),
        ("random", {"deterministic"}),
        ("batch", {"deterministic"}),
        ("probabilities", {"logits"}),
    ],
)
def test_a_number_that_must_not_be_believed_is_recognised(kind: str, caught: set[str]) -> None:
    result = planted(kind)
    failed = {each.name for each in result.failed}
    assert caught <= failed, (kind, failed)
    assert not result.believable and "DO NOT BELIEVE" in str(result) and all(each.said in str(result) for each in result.failed)


def test_masked_gradients_lose_to_a_search_without_gradients() -> None:
    for preset in (APGD(THREAT), Ensemble(THREAT, (APGD(THREAT), Square(THREAT, queries=1000)))):
        result = planted("rounded inputs", preset=preset)
        (check,) = [each for each in result.checks if each.name == "black box"]
        assert check.passed is False and check.numbers["broken"] > 10


def test_saturated_logits_hide_nothing_from_the_right_loss() -> None:
    model, samples = digits()
    honest = robust_accuracy(Task(model), samples, THREAT, preset="lite", checks=False)
    saturated = planted("saturated")
    blind = planted("saturated", preset=PGD(THREAT, steps=20, loss="ce"))
    assert abs(saturated.accuracy - honest.accuracy) <= 2 / 80 < 0.3 < blind.accuracy - honest.accuracy
    (check,) = [each for each in blind.checks if each.name == "saturation"]
    assert check.passed is False and check.numbers["logits x 1"] > 0.5 and check.numbers["logits x 1e-06"] == 0 and "smaller logits" in check.said


def test_an_attack_that_is_too_weak_is_recognised() -> None:
    model, samples = digits()
    result = robust_accuracy(Task(model), samples, THREAT, preset=FGSM(THREAT, loss="ce"))
    assert "converged" in {each.name for each in result.failed} and "too weak" in str(result)


def test_an_attack_that_leaves_the_ball_is_recognised() -> None:
    task, samples = linear()

    class Cheat(APGD):
        def first_error(self, task: Task, params: Any, batch: Any) -> Tensor:
            return super().first_error(task, params, batch) + 0.01

    result = robust_accuracy(task, samples, threat := Threat(0.1), preset=Cheat(threat))
    (check,) = [each for each in result.failed if each.name == "inside the ball"]
    assert check.numbers["furthest"] == pytest.approx(0.01) and check.numbers["outside"] > 30


def test_a_model_that_nothing_right_is_said_of_is_still_looked_at() -> None:
    task, samples = linear()
    wrong = samples.with_labels(1 - task.outputs(task.params(), samples.tensors).argmax(1))
    result = robust_accuracy(task, wrong, Threat(0.1), preset="lite")
    assert result.accuracy == result.clean_accuracy == 0 and set(result.broken_by) == {CLEAN} and set(found(result)) < CHECKS
    assert [each.broke for each in result.members] == [0, 0, 0]


def test_one_logit_of_class_one_is_enough() -> None:
    task, samples = linear()
    weight, bias = (task.params()[name] for name in ("1.weight", "1.bias"))
    one = logistic_regression((5,), 1).double()
    with torch.no_grad():
        one[1].weight.copy_(weight[1:] - weight[:1])
        one[1].bias.copy_(bias[1:] - bias[:1])
    both = [robust_accuracy(each, samples, Threat(0.3), preset="lite") for each in (task, Task(one.eval()))]
    assert np.array_equal(both[0].robust, both[1].robust) and both[1].believable
    sigmoid = robust_accuracy(Task(nn.Sequential(one, nn.Sigmoid()).eval()), samples, Threat(0.3), preset="lite")
    assert found(sigmoid)["logits"] is False


def test_what_may_change_decides_whether_nothing_may_be_left() -> None:
    task, samples = linear()
    with torch.no_grad():
        task.model[1].weight[:, 0] = 0  # type: ignore[index]
    held = replace(THREAT, bounds=None, mutable=torch.tensor([True, False, False, False, False]))
    result = robust_accuracy(task, samples, held, preset="lite")
    assert found(result)["whole range"] is None and found(result)["gradients"] is False


def test_categories_are_attacked_and_checked_too() -> None:
    task, samples = linear(3)
    x, y = samples.tensors
    x = torch.cat([x[:, :2], torch.eye(3).double()[y]], 1)
    threat = Threat(torch.tensor([0.1, 0.1, 1, 1, 1]).double(), project=(OneHot(((2, 3, 4),)),))
    result = robust_accuracy(task, Samples((x, y)), threat, preset="lite", points=True)
    assert result.points is not None and torch.equal(result.points[:, 2:].sum(1), torch.ones(80).double())
    assert set(found(result)) == CHECKS and "valid values only" in result.threat


# Errors


def test_errors_come_before_any_attack(tmp_path: Path) -> None:
    task, samples = linear(3)
    x, y = samples.tensors
    cases: list[tuple[str, dict[str, Any]]] = [
        ("preset: expected 'standard' or 'lite'", {"preset": "strong"}),
        ("preset: expected attacks with the threat", {"preset": PGD(Threat(0.1))}),
        ("bounds: expected data within", {"threat": Threat(0.1, bounds=(0.0, 0.5))}),
        ("labels from 0 to 2", {"data": (x, y + 1)}),
        (r"data: expected \(x, y\)", {"data": (x,)}),
        ("batch_size", {"batch_size": 0}),
        ("directory", {"directory": Path(__file__)}),
        ("an attack expects inputs of floating point", {"data": (x.long(), y)}),
    ]
    for message, wrong in cases:
        given = {"data": samples, "threat": Threat(0.1), "preset": "lite", **wrong}
        with pytest.raises(ValueError, match=message):
            robust_accuracy(task, given.pop("data"), given.pop("threat"), **given)


def test_a_model_without_logits_is_refused() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1).double())

        def forward(self, x: Tensor) -> Tensor:
            return self.scale * x.log()

    _, samples = linear(5)
    with pytest.raises(ValueError, match="NaN"):
        robust_accuracy(Task(Broken().eval()), samples, Threat(0.1), preset="lite")


def test_black_box_is_judged_by_a_share_and_always_forgives_one() -> None:
    assert checks.black_box(1, 3, "Square").passed and not checks.black_box(2, 64, "Square").passed
    assert checks.black_box(3, 150, "Square").passed and not checks.black_box(4, 150, "Square").passed
