"""attacks/evasion/wrapped.py: the attacks of torchattacks, kept to a ball, to the bounds of the inputs, and off everything that is the user's."""

from __future__ import annotations

import sys
from functools import cache
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from robust_if import Recipe, Samples, Task, fit
from robust_if.attacks.evasion import APGD, Threat, WholeNumbers, margin
from robust_if.attacks.evasion.ball import Ball
from robust_if.attacks.evasion.wrapped import LEFT_OUT, WRAPPED, TorchAttacks, wrapped_names
from robust_if.models import cnn, logistic_regression, mlp
from robust_if.task import Batch
from unchanged import untouched

#: Every attack in every norm, on images and, where it takes them, on tables.
CASES = [(name, norm, "images") for name, known in WRAPPED.items() for norm in known.norms]
CASES += [
    (name, norm, "table")
    for name, norm, _ in CASES
    if WRAPPED[name].inputs == "any" and not (norm == "l2" and name in ("AutoAttack", "Square"))
]  # fmt: skip
#: Fewer steps than by default, so that the tests are quick.
OPTIONS: dict[str, dict[str, Any]] = {
    "AutoAttack": {"steps": 5, "n_queries": 10}, "APGD": {"steps": 5}, "APGDT": {"steps": 5}, "CW": {"lr": 0.3, "steps": 15}, "FAB": {"steps": 5},
    "SPSA": {"nb_iter": 5, "nb_sample": 16}, "Square": {"n_queries": 20},
}  # fmt: skip


@pytest.fixture(autouse=True)
def _installed(request: pytest.FixtureRequest) -> None:
    if request.function is not test_where_torchattacks_is_missing_the_message_says_how_to_get_it:
        pytest.importorskip("torchattacks")


@cache
def scene(kind: str) -> tuple[Task, Batch]:
    """A model whose last layer alone counts, and a batch on which it is right but for the last sample."""
    generator = torch.Generator().manual_seed(3)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = (cnn((3, 8, 8), 10, width=4) if kind == "images" else mlp((12,), 5, width=16)).double().eval()
    if kind == "images":
        x = torch.rand(6, 3, 8, 8, generator=generator).double() * 2 - 1
    else:  # standardised, of different ranges
        x = torch.randn(6, 12, generator=generator).double() * torch.linspace(0.1, 2, 12) - 1
    last = [name for name, _ in model.named_parameters()][-1].rpartition(".")[0]
    task = Task(model, parameters=f"{last}.*")
    y = task.outputs(task.params(), (x,)).argmax(1)
    y[-1] = (y[-1] + 1) % 5
    return task, (x, y)


def threat(kind: str, norm: str, share: float | None = None) -> Threat:
    low, high = (-1.0, 1.0) if kind == "images" else (scene(kind)[1][0].amin(0) - 0.1, scene(kind)[1][0].amax(0) + 0.1)
    share = share if share is not None else 0.15 if norm == "linf" else 0.6
    return Threat(share * (high - low), norm, (low, high))  # type: ignore[arg-type]


def build(name: str, norm: str, kind: str, **more: Any) -> TorchAttacks:
    return TorchAttacks(threat(kind, norm), name, options=OPTIONS.get(name, {}), **more)


def linear() -> tuple[Task, Batch, Tensor]:
    """A binary linear model, a batch of standardised rows, and the slope (12, 6) of the margin in the inputs."""
    task = Task(logistic_regression((6,), 2).double().eval())
    x, y = torch.randn(12, 6, generator=torch.Generator().manual_seed(0)).double(), torch.arange(12) % 2
    weight = task.params()["1.weight"]
    return task, (x, y), torch.where(y[:, None] == 1, weight[0] - weight[1], weight[1] - weight[0])


def margins(task: Task, x: Tensor, batch: Batch) -> Tensor:
    return margin(task.outputs(task.params(), (x, *batch[1:])), batch)


# Every attack keeps what the protocol promises


@pytest.mark.parametrize(("name", "norm", "kind"), CASES)
def test_it_keeps_to_the_ball_raises_the_margin_and_leaves_everything_else(
    name: str, norm: str, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    task, (x, y) = scene(kind)
    attack, t = build(name, norm, kind), threat(kind, norm)
    with untouched(task.model), torch.no_grad():
        got = attack(task, task.params(), (x, y))
    assert got.shape == x.shape and got.dtype == x.dtype and not got.requires_grad and capsys.readouterr() == ("", "")
    change, low, high = got - x, *t.bounds  # type: ignore[misc]
    size = (change / t.eps).abs().flatten(1).amax(1) if norm == "linf" else (change / t.eps).flatten(1).norm(dim=1)
    assert (size <= 1 + 1e-9).all() and (got >= low).all() and (got <= high).all()
    before, after = margins(task, x, (x, y)), margins(task, got, (x, y))
    assert (after >= before).all() and (after > before + 1e-6).any()
    with untouched(task.model):
        assert torch.equal(attack(task, task.params(), (x, y)), got)
    order = [4, 0, 5, 2]
    parts = [attack(task, task.params(), (x[rows], y[rows])) for rows in (order[:1], order[1:])]
    assert torch.allclose(torch.cat(parts), got[order], rtol=0, atol=1e-6)


class RefusalError(Exception):
    pass


@pytest.mark.parametrize(("name", "norm", "kind"), [each for each in CASES if each[2] == "images"])
def test_an_exception_on_the_way_leaves_everything_as_it_was(name: str, norm: str, kind: str) -> None:
    task, batch = scene(kind)
    calls = 0

    def forward(model: Any, batch: Batch) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:  # within the attack: after the clean margins and the number of classes
            raise RefusalError
        return model(batch[0])

    failing = Task(task.model, forward=forward, parameters=task.parameters)
    with untouched(task.model), pytest.raises(RefusalError):
        build(name, norm, kind)(failing, task.params(), batch)


@pytest.mark.parametrize("name", [name for name, norm, kind in CASES if (norm, kind) == ("linf", "table")])
def test_standardised_tables_stay_as_they_are_where_nothing_may_move(name: str) -> None:
    task, batch = scene("table")
    for share in (0.0, 1e-7):
        t = threat("table", "linf", share)
        got = TorchAttacks(t, name, options=OPTIONS.get(name, {}))(task, task.params(), batch)
        assert ((got - batch[0]).abs() <= t.eps * (1 + 1e-6)).all()  # rounding of x + ε − x


def test_the_table_names_everything_that_torchattacks_has() -> None:
    import torchattacks

    assert set(WRAPPED) | set(LEFT_OUT) == set(torchattacks.__all__) and not set(WRAPPED) & set(LEFT_OUT)
    assert "torchvision" not in sys.modules
    assert set(wrapped_names("linf")) | set(wrapped_names("l2")) == set(wrapped_names()) and "CW" not in wrapped_names("linf")


# What is found


@pytest.mark.parametrize("name", ["FGSM", "BIM", "PGD", "MIFGSM", "VNIFGSM"])
def test_a_linear_model_is_attacked_at_the_corner_of_its_box(name: str) -> None:
    task, (x, y), slope = linear()
    low, high = x.amin(0) - torch.linspace(0.1, 1, 6).double(), x.amax(0)
    share = torch.tensor([0.2, 0.2, 0.0, 0.2, 0.2, 0.2]).double()
    mutable = torch.arange(6) != 4
    attack = TorchAttacks(Threat(share * (high - low), "linf", (low, high), mutable), name)
    corner = x + share * (high - low) * slope.sign() * mutable
    got = attack(task, task.params(), (x, y))
    assert torch.allclose(got, corner.maximum(low).minimum(high), atol=1e-6) and (got == high).any()
    assert torch.equal(got[:, [2, 4]], x[:, [2, 4]])
    other = {key: -value for key, value in task.params().items()}  # the parameters that are given count, not the model's own
    corner = x - share * (high - low) * slope.sign() * mutable
    assert torch.allclose(attack(task, other, (x, y)), corner.maximum(low).minimum(high), atol=1e-6)


def test_the_step_of_ffgsm_is_longer_than_the_radius() -> None:
    task, (x, y), slope = linear()
    got = TorchAttacks(Threat(1.0, "linf", (-5.0, 5.0)), "FFGSM")(task, task.params(), (x, y))
    assert ((got - x) * slope.sign() >= 0.25 - 1e-6).all() and ((got - x) * slope.sign() < 0.5).any()  # 1.25 from anywhere in the ball


@pytest.mark.parametrize("name", ["FAB", "Square"])
def test_the_search_counts_on_nothing_that_may_not_move(name: str) -> None:
    task, (x, _), _ = linear()
    y = task.outputs(task.params(), (x,)).argmax(1)
    mutable = torch.arange(6) < 3
    attack = TorchAttacks(Threat(4.0, "linf", (-6.0, 6.0), mutable), name, options={"n_queries": 100} if name == "Square" else {"steps": 20})
    got = attack(task, task.params(), (x, y))
    assert torch.equal(got[:, 3:], x[:, 3:]) and (margins(task, got, (x, y)) > 0).all()


@pytest.mark.parametrize("name", ["FGSM", "PGD", "SPSA"])
def test_what_else_a_batch_holds_reaches_the_model_with_its_own_sample(name: str) -> None:
    task, (x, y), slope = linear()
    task = Task(task.model, forward=lambda model, batch: model(batch[0]) * batch[2]["sign"][:, None])
    sign = torch.tensor([1.0, -1.0, -1.0]).repeat(4).double()
    attack = TorchAttacks(Threat(1.0, "linf", (-4.0, 4.0)), name)
    got = attack(task, task.params(), (x, y, {"sign": sign}))
    rise = (slope * (got - x)).sum(1) * sign / slope.abs().sum(1)  # 1 at the corner of the box, which SPSA only comes near to
    assert (rise > (0.8 if name == "SPSA" else 1 - 1e-6)).all()


@pytest.mark.parametrize("name", ["PGD", "APGD", "FAB", "Square"])
def test_one_logit_stands_for_two(name: str) -> None:
    task, (x, y), _ = linear()
    one = nn.Linear(6, 1).double()
    with torch.no_grad():
        one.weight.copy_(task.params()["1.weight"].diff(dim=0))
        one.bias.copy_(task.params()["1.bias"].diff())
    attack = TorchAttacks(Threat(0.5, "linf", (-4.0, 4.0)), name, options=OPTIONS.get(name, {}))
    single = Task(one.eval(), loss=lambda z, batch: F.binary_cross_entropy_with_logits(z, batch[1], reduction="none").flatten())
    expected, got = attack(task, task.params(), (x, y)), attack(single, single.params(), (x, y[:, None].double()))
    assert not torch.equal(got, x) and torch.allclose(got, expected, atol=1e-5)


def test_random_numbers_come_from_the_seed_and_are_the_same_for_every_sample() -> None:
    task, (x, y) = scene("images")
    twice = (x[:1].repeat(3, 1, 1, 1), y[:1].repeat(3))
    got = build("PGD", "linf", "images")(task, task.params(), twice)
    assert torch.equal(got[0], got[1]) and torch.equal(got[0], got[2])
    assert not torch.equal(build("PGD", "linf", "images", seed=1)(task, task.params(), twice), got)
    start = TorchAttacks(threat("images", "linf"), "UPGD", options={"random_start": True})  # without it, run on whole batches
    got = start(task, task.params(), twice)
    assert torch.equal(got[0], got[1]) and torch.equal(got[0], got[2])


@pytest.mark.parametrize(("name", "norm"), [("MIFGSM", "linf"), ("UPGD", "linf"), ("DeepFool", "l2")])
def test_a_sample_without_a_gradient_stays_clean(name: str, norm: Any) -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)).eval()
    with torch.no_grad():
        model[0].weight.fill_(1.0)
        model[0].bias.zero_()
    x = torch.tensor([[-3.0, -3.0], [1.0, 1.0]])  # ReLU is flat at the first
    task = Task(model)
    y = task.outputs(task.params(), (x,)).argmax(1)
    got = TorchAttacks(Threat(0.5, norm, (-4.0, 4.0)), name)(task, task.params(), (x, y))
    assert torch.equal(got[0], x[0]) and not torch.equal(got[1], x[1])


def test_the_parts_of_autoattack_have_the_budgets_of_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    import torchattacks

    built: list[Any] = []

    def chain(attacks: list[Any]) -> Any:
        built.extend(attacks)
        return lambda images, labels: images

    monkeypatch.setattr(torchattacks, "MultiAttack", chain)
    task, (x, y) = scene("images")
    TorchAttacks(threat("images", "linf"), "AutoAttack", seed=7)(task, task.params(), (x[:1], y[:1]))
    assert [type(each).__name__ for each in built] == ["APGD", "APGDT", "FAB", "Square"]
    assert [each.steps for each in built[:3]] == [100] * 3 and built[3].n_queries == 5000
    assert [each.n_target_classes for each in built[1:3]] == [9, 9] and built[2].multi_targeted
    assert [(each.seed, each.eps, each.norm) for each in built] == [(7, pytest.approx(0.15), "Linf")] * 4


def test_our_apgd_finds_as_much() -> None:
    images, labels = load_digits(return_X_y=True)
    x, y = torch.from_numpy(images / 16).float().reshape(-1, 1, 8, 8), torch.from_numpy(labels)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = cnn((1, 8, 8), 10, width=4).eval()
    task = fit(Task(model), Samples((x[:600], y[:600])), Recipe(epochs=8, lr=0.02, optimizer="adamw"))
    t, batch = Threat(0.08, "linf", (0.0, 1.0)), (x[600:750], y[600:750])
    theirs, ours = TorchAttacks(t, "APGD", options={"steps": 20}), APGD(t, steps=20)
    right = [float((margins(task, attack(task, task.params(), batch), batch) <= 0).float().mean()) for attack in (ours, theirs)]
    clean = float((margins(task, batch[0], batch) <= 0).float().mean())
    assert right[0] <= right[1] + 0.01 and 0.1 < right[1] < clean - 0.2


# What cannot be served is refused


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("name", ["AutoAttack", "APGDT"])
def test_targeted_apgd_needs_four_classes(name: str, norm: str) -> None:
    x, y = torch.rand(2, 1, 8, 8), torch.tensor([0, 1])
    task = Task(logistic_regression((1, 8, 8), 3).eval())
    with pytest.raises(ValueError, match="needs at least 4 classes, the model tells 3 apart"):
        TorchAttacks(Threat(0.1, norm, (0.0, 1.0)), name)(task, task.params(), (x, y))  # type: ignore[arg-type]


@pytest.mark.parametrize("classes", [2, 3])
def test_targeted_fab_does_not(classes: int) -> None:
    task = Task(logistic_regression((6,), classes).double().eval())
    x = linear()[1][0]
    y = task.outputs(task.params(), (x,)).argmax(1)
    attack = TorchAttacks(Threat(3.0, "linf", (-4.0, 4.0)), "FAB", options={"multi_targeted": True, "steps": 5})
    assert (margins(task, attack(task, task.params(), (x, y)), (x, y)) > 0).all()


def test_dlr_needs_three_classes() -> None:
    task, batch, _ = linear()
    with pytest.raises(ValueError, match="needs at least 3 classes, the model tells 2 apart"):
        TorchAttacks(Threat(0.1, "linf", (-4.0, 4.0)), "APGD", options={"loss": "dlr"})(task, task.params(), batch)


def test_square_in_l2_is_refused_exactly_where_it_crashes() -> None:
    import torchattacks

    for side in range(2, 36):
        task = Task(logistic_regression((1, side, side), 3).eval())
        x = torch.rand(1, 1, side, side)
        batch = (x, task.outputs(task.params(), (x,)).argmax(1))
        try:
            torchattacks.Square(task.model, norm="L2", eps=1e-3, n_queries=2)(*batch)
            crashes = False
        except (RuntimeError, ZeroDivisionError):
            crashes = True
        try:
            TorchAttacks(Threat(1e-3, "l2", (0.0, 1.0)), "Square", options={"n_queries": 2})(task, task.params(), batch)
            refused = False
        except ValueError as error:
            refused = "whose side its tiles fill" in str(error)
        assert refused == crashes, side


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("DIFGSM", (12,), "square images"),
        ("DIFGSM", (1, 8, 6), "square images"),
        ("TIFGSM", (1, 8, 8), "three channels"),
        ("PIFGSM", (1, 8, 8), "three channels"),
        ("PIFGSMPP", (12,), "three channels"),
    ],
)
def test_images_have_to_suit_the_attack(name: str, shape: tuple[int, ...], message: str) -> None:
    task = Task(logistic_regression(shape, 3).eval())
    with pytest.raises(ValueError, match=message):
        TorchAttacks(Threat(0.1, "linf", (0.0, 1.0)), name)(task, task.params(), (torch.rand(2, *shape), torch.tensor([0, 1])))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"attack": "PDG"}, "attack: expected one of APGD, .* got 'PDG'"),
        ({"attack": "OnePixel"}, "left out: it changes few features"),
        ({"attack": "CW"}, "CW of torchattacks searches no linf ball, those that do are APGD"),
        ({"attack": "PGD", "norm": "l2"}, "searches no l2 ball"),
        ({"project": (WholeNumbers(),)}, "project: torchattacks cannot keep"),
        ({"bounds": None}, "bounds: torchattacks searches between finite bounds"),
        ({"bounds": (0.0, torch.inf)}, "bounds: torchattacks searches between finite bounds"),
        ({"bounds": (torch.tensor([0.0, -torch.inf]), 1.0)}, "bounds: torchattacks searches between finite bounds"),
        ({"options": {"step": 3}}, "options: PGD takes alpha, random_start, steps, got step"),
        ({"options": {"eps": 0.1}}, "options: PGD takes .* got eps"),
        ({"attack": "AutoAttack", "options": {"seed": 1}}, "options: AutoAttack takes n_queries, steps, got seed"),
        ({"options": {"steps": 0}}, "steps: expected at least 1, got 0"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, Any], message: str) -> None:
    limits = {"eps": 0.1, "bounds": (0.0, 1.0)} | {key: value for key, value in settings.items() if key in ("norm", "project", "bounds")}
    with pytest.raises(ValueError, match=message):
        TorchAttacks(Threat(**limits), **{key: value for key, value in settings.items() if key in ("attack", "options")})


def test_the_radius_is_one_share_of_the_range() -> None:
    task, (x, y), _ = linear()
    bounds = (x.amin(0), x.amax(0))
    with pytest.raises(ValueError, match="eps: expected the same fraction of the range of the bounds in every feature"):
        TorchAttacks(Threat(0.1, "linf", bounds))(task, task.params(), (x, y))
    with pytest.raises(ValueError, match="bounds: expected inputs within"):
        TorchAttacks(Threat(0.1, "linf", (0.0, 1.0)))(task, task.params(), (x, y))
    with pytest.raises(ValueError, match="batch: the loss needs labels"):
        TorchAttacks(Threat(0.1, "linf", (-4.0, 4.0)))(task, task.params(), (x,))


def test_a_feature_that_is_always_the_same_stays() -> None:
    task, (x, y), _ = linear()
    x[:, 1] = 0.7
    low, high = x.amin(0), x.amax(0)
    got = TorchAttacks(Threat(0.1 * (high - low), "linf", (low, high)))(task, task.params(), (x, y))
    assert torch.equal(got[:, 1], x[:, 1]) and not torch.equal(got, x)
    assert torch.equal(Ball.around(x, Threat(0.1 * (high - low), bounds=(low, high))).clip(got), got)


def test_where_torchattacks_is_missing_the_message_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchattacks", None)
    with pytest.raises(
        ImportError, match=r"needs torchattacks, which is not installed: pip install --no-deps torchattacks .*robust-if\[torchattacks\]"
    ):
        TorchAttacks(Threat(0.1, "linf", (0.0, 1.0)))
