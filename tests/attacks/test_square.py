"""attacks/evasion/square.py: a random search without gradients, the same for every sample in any batch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from cases import case, relative
from robust_if import Task
from robust_if.attacks.evasion import OneHot, Square, Threat, WholeNumbers, margin
from robust_if.attacks.evasion.ball import Ball
from robust_if.attacks.evasion.square import _proposals, _share
from unchanged import untouched
from victims import breakable, broken, digits, linear, one_and_two_logits, seeded


class Steps(nn.Module):
    """A model without gradients: it counts the features above 0."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(5, 2).double() * torch.tensor([1.0, -1.0]))

    def forward(self, x: Tensor) -> Tensor:
        return (x > 0).to(self.weight).detach() @ self.weight


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_on_a_linear_model_the_best_corner_is_found(classes: int) -> None:
    task, (x, y) = linear(30, 6, classes)
    x = x.clamp(-1.5, 1.5)
    eps = torch.tensor([0.0, 0.1, 0.2, 0.3, 0.4, 0.1]).double()
    mutable = torch.tensor([True, True, True, False, True, True])
    moving = torch.where(mutable, eps, 0)
    low, high = (x - moving).clamp(min=-1.5), (x + moving).clamp(max=1.5)
    got = Square(Threat(eps, bounds=(-1.5, 1.5), mutable=mutable), queries=200)(task, task.params(), (x, y))
    expected, clean = breakable(task, (x, y), low, high), broken(task, x, y)
    assert (expected & ~clean).any() and not expected.all()
    assert torch.equal(broken(task, got, y), expected)
    assert (got >= low - 1e-12).all() and (got <= high + 1e-12).all() and torch.equal(got[:, [0, 3]], x[:, [0, 3]])
    assert torch.equal(got[clean], x[clean])


@given(size=st.integers(1, 9), seed=st.integers(0, 9), name=st.sampled_from(["cnn", "mlp"]))
def test_a_sample_is_attacked_the_same_in_every_batch_and_order(size: int, seed: int, name: str) -> None:
    c = case(name)
    x = c.valid.batch(slice(None))[0]
    y = c.task.outputs(c.task.params(), (x,)).argmax(1)
    attack = Square(Threat(0.4, bounds=(x.min().item(), x.max().item())), queries=40, seed=seed)
    whole = attack(c.task, c.task.params(), (x, y))
    order = torch.randperm(len(x), generator=seeded(seed))
    parts = torch.cat([attack(c.task, c.task.params(), (x[rows], y[rows])) for rows in order.split(size)])
    assert (whole != x).any() and relative(parts, whole[order]) <= 1e-9


def test_the_margin_never_falls_and_more_queries_never_hurt() -> None:
    task, (x, y) = digits()
    rates, before = [], margin(task.outputs(task.params(), (x, y)), (x, y))
    for queries in (1, 30, 300):
        attack = Square(Threat(0.15, bounds=(0.0, 1.0)), queries=queries)
        with untouched(task.model), torch.no_grad():
            got = attack(task, task.params(), (x, y))
            assert torch.equal(got, attack(task, task.params(), (x, y)))
        after = margin(task.outputs(task.params(), (got, y)), (got, y))
        assert (after >= before).all() and (got - x).abs().max() <= 0.15 + 1e-6 and got.min() >= 0 and got.max() <= 1
        rates.append(float((after > 0).float().mean()))
    assert rates[0] < rates[1] < rates[2] and rates[2] > 0.5
    assert not torch.equal(got, replace(attack, seed=1)(task, task.params(), (x, y)))


def test_only_samples_that_are_right_are_asked_about() -> None:
    task, _, (x, y) = one_and_two_logits(12)
    seen: list[int] = []

    def forward(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        seen.append(len(batch[0]))
        return model(batch[0])

    watched = replace(task, forward=forward)
    y = torch.where(torch.arange(12) < 4, 1 - y, y)
    got = Square(Threat(0.5), queries=60)(watched, task.params(), (x, y.double()))
    assert seen[0] == 12 and seen[1] == 8 and seen == sorted(seen, reverse=True) and torch.equal(got[:4], x[:4])
    assert seen[-1] >= 12 - int(broken(task, got, y).sum())
    seen.clear()
    Square(Threat(0.5), queries=60)(watched, task.params(), (x[:4], y[:4]))
    assert seen == [4]


def test_a_model_without_gradients_is_attacked() -> None:
    task = Task(Steps().eval())
    x = torch.tensor([[0.2, -0.5, 0.3, 0.4, 0.9], [0.9, 0.9, 0.9, 0.9, 0.9]]).double()
    got = Square(Threat(0.5), queries=100)(task, task.params(), (x, torch.tensor([0, 0])))
    assert (got[0] <= 0).sum() >= 4  # one feature cannot be brought below 0 and the margin of the others cannot become positive
    assert torch.equal(got[1], x[1])


def test_projections_come_before_the_model() -> None:
    task, (x, y) = linear(30, 6, 3)
    x = torch.cat([torch.eye(3).double()[torch.arange(30) % 3], x[:, 3:].round()], 1)
    y = task.outputs(task.params(), (x,)).argmax(1)
    eps = torch.tensor([1, 1, 1, 2, 1.4, 0]).double()
    limits = (torch.tensor([0, 0, 0, -3, -3, -3]), torch.tensor([1, 1, 1, 3, 3, 3]))
    threat = Threat(eps, bounds=limits, project=(OneHot([(0, 1, 2)]), WholeNumbers([3, 4])))
    got = Square(threat, queries=300)(task, task.params(), (x, y))
    assert torch.equal(got[:, :3].sort(1).values, torch.tensor([0.0, 0, 1]).double().expand(30, 3)) and torch.equal(got, got.round())
    reach, step = (got - x).abs().amax(0), broken(task, got, y)
    assert reach[3] == 2 and reach[4] == 1 and reach[5] == 0 and (got[:, :3] != x[:, :3]).any() and step.any()
    kinds = torch.eye(3).double()[:, None].expand(3, 30, 3)
    every = [torch.cat([kind, x[:, 3:4] + a, x[:, 4:5] + b, x[:, 5:]], 1) for kind in kinds for a in (-2, 2) for b in (-1, 1)]
    best = torch.stack([broken(task, p.clamp(-3, 3), y) for p in every]).any(0)
    assert torch.equal(step, best)


def test_what_a_query_changes() -> None:
    x = torch.zeros(2, 3, 10, 8)
    free = torch.zeros(10, 8, dtype=torch.bool)
    free[2:9, 1:8] = True
    ball = Ball.around(x, Threat(1.0, mutable=free))
    parts = [part for part, _ in _proposals(ball, 1000, seeded())]
    assert (parts[0] != 0).all() and torch.equal(parts[0], parts[0][:, :1].expand(3, 10, 8)) and len(parts[0].unique()) == 2
    sides = []
    for part in parts[1:]:
        rows, columns = ((part != 0).any(0).any(axis).nonzero()[:, 0] for axis in (1, 0))
        assert rows.min() >= 2 and rows.max() < 9 and columns.min() >= 1 and columns.max() < 8
        window = part[:, rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        assert torch.equal(window, window[:, :1, :1].expand_as(window)) and window.shape[1] == window.shape[2] and (window != 0).all()
        sides.append(window.shape[1])
    assert sides[0] == 6 and sides == sorted(sides, reverse=True) and sides[-1] == 1
    assert [_share(query, 10_000) for query in (0, 10, 11, 51, 201, 1001, 2001, 4001, 6001, 8001)] == [0.8, 0.8, *(0.8 / 2**k for k in range(1, 9))]
    flat = Ball.around(torch.zeros(2, 20), Threat(1.0, mutable=torch.arange(20) > 9))
    parts = [part for part, _ in _proposals(flat, 1000, seeded())]
    assert all((part[:10] == 0).all() for part in parts) and (parts[0] != 0).sum() == 8 and (parts[-1] != 0).sum() == 1


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="queries: expected at least 1, got 0"):
        Square(Threat(1.0), queries=0)
    with pytest.raises(ValueError, match="norm: Square searches the box of norm='linf', got norm='l2'"):
        Square(Threat(1.0, "l2"))
    task, batch = linear(6, 3, 2)
    with pytest.raises(ValueError, match="batch: the loss needs labels"):
        Square(Threat(1.0))(task, task.params(), (batch[0],))
    with pytest.raises(ValueError, match="eps: expected numbers of at least 0"):
        Square(Threat(-1.0))(task, task.params(), batch)


def test_torchattacks_finds_no_more_errors() -> None:
    theirs = pytest.importorskip("torchattacks")
    task, (x, y) = digits()
    ours = broken(task, Square(Threat(0.1, bounds=(0.0, 1.0)), queries=300)(task, task.params(), (x, y)), y)
    found = broken(task, theirs.Square(task.model, eps=0.1, n_queries=300, seed=0)(x[:20], y[:20]), y[:20])
    assert 0.1 < found.float().mean() <= ours[:20].float().mean() + 0.05
