"""estimators/joined.py: scores summed over near duplicates."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cases import case
from robust_if import InnerProduct, Joined, Loss, Random, Samples, Task, Utility
from robust_if.models import logistic_regression
from robust_if.neighbours import near_duplicates


def dense(rows: np.ndarray, labels: np.ndarray, width: float | None) -> np.ndarray:
    """The kernel by its definition."""
    spread = rows.std(0)
    scaled = rows / np.where(spread > 0, spread, 1)
    d = np.linalg.norm(scaled[:, None] - scaled[None], axis=2)
    kernel = np.zeros_like(d)
    for label in np.unique(labels):
        own = np.flatnonzero(labels == label)
        part = d[np.ix_(own, own)]
        w = max(np.median(np.sort(part, 1)[:, 1]) / 2, 1e-3) if width is None else width
        kernel[np.ix_(own, own)] = np.where(part <= 3 * w, np.exp(-((part / w) ** 2)), 0)
    return kernel


@pytest.mark.parametrize("width", [None, 0.5])
def test_the_kernel_is_its_definition(width: float | None) -> None:
    rng = np.random.default_rng(0)
    rows, labels = rng.normal(size=(40, 3)), rng.integers(0, 3, 40)
    rows[:5] = rows[0]  # exact copies
    rows[:, 2] = 1.0  # a feature that never varies
    assert np.abs(near_duplicates(rows, labels, width).toarray() - dense(rows, labels, width)).max() <= 1e-7


def test_scores_are_summed_with_the_kernel_for_every_target() -> None:
    c = case("mlp")
    x, y = c.train.batch(slice(None))[:2]
    kernel = dense(x.flatten(1).numpy(), y.numpy(), 1.0)
    targets = {"one": Utility(c.valid), "two": Utility(c.valid) * 2.0}
    plain = InnerProduct().score(c.task, c.train, target=targets)
    for got, each in zip(Joined(InnerProduct(), 1.0).score(c.task, c.train, target=targets), plain, strict=True):
        assert np.allclose(got.values, kernel @ each.values, rtol=1e-6, atol=1e-12)
    assert got.name == "ip-joined:two" and got.units == "rank"
    assert not Joined(Loss()).needs_target


@given(st.permutations(range(24)))
def test_the_order_of_the_samples_changes_nothing(order: list[int]) -> None:
    c = case("mlp")
    some = c.train.take(range(len(c.train)))
    order = [i for i in order if i < len(some)] + list(range(24, len(some)))
    whole = Joined(Loss(), 1.0).score(c.task, some).values
    assert np.allclose(Joined(Loss(), 1.0).score(c.task, some.take(order)).values, whole[order], rtol=1e-6)


def test_many_weak_copies_rise_above_a_strong_single_one() -> None:
    """Copies that harm less than any honest sample, each, come first together."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 5))
    x[:20] = x[0] + 0.001 * rng.normal(size=(20, 5))
    data = Samples((torch.from_numpy(x), torch.zeros(200, dtype=torch.long)))
    task = Task(logistic_regression((5,), 2).double().eval())
    scores = Joined(Random(3)).score(task, data)
    assert set(scores.top(20)) == set(range(20)) and set(Random(3).score(task, data).top(20)) != set(range(20))


def test_a_sample_without_a_neighbour_keeps_its_score() -> None:
    x = torch.arange(6, dtype=torch.float64)[:, None] * 100
    data = Samples((x, torch.zeros(6, dtype=torch.long)))
    task = Task(logistic_regression((1,), 2).double().eval())
    assert np.allclose(Joined(Random(0), 0.01).score(task, data).values, Random(0).score(task, data).values)


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="width: expected a positive number, got 0"):
        Joined(width=0.0)
    tokens = Samples((torch.zeros(4, 3, dtype=torch.long), torch.zeros(4, dtype=torch.long)))
    task = Task(logistic_regression((3,), 2).eval())
    with pytest.raises(ValueError, match="near duplicates are found among inputs of floating point, got torch.int64"):
        Joined(Random()).score(task, tokens)
