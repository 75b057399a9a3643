"""robust_if/overlap.py: gradients compared without their signs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import robust_if as rif
from cases import relative
from oracles import sample_gradients
from robust_if.overlap import Overlap, _overlap
from unchanged import untouched


def setting() -> tuple[rif.Task, rif.Samples, rif.Samples]:
    """A model of a narrow layer between wide ones, as an adapter is, on sequences."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(12, 3, bias=False), nn.Tanh(), nn.Linear(3, 9, bias=False)).double().eval()
        data = [rif.Samples((torch.randn(n, 4, 12).double(), torch.randint(9, (n,)))) for n in (30, 7)]
    return rif.Task(model, lambda outputs, batch: nn.functional.cross_entropy(outputs.mean(1), batch[1], reduction="none")), data[0], data[1]


def reference(task: rif.Task, train: rif.Samples, queries: rif.Samples, damping: float) -> np.ndarray:
    """Pair by pair from single backward passes, with W itself."""
    found = [sample_gradients(task, each) for each in (train, queries)]
    matrix = np.zeros((len(train), len(queries)))
    for name in task.params():
        rows, columns = ([g if g.shape[0] <= g.shape[1] else g.T for g in each[name].numpy()] for each in found)
        c = np.mean([g.T @ g / (g**2).sum() for g in rows], 0)
        w = np.linalg.inv(c + damping * np.trace(c) / len(c) * np.eye(len(c)))

        def norm(a: np.ndarray, b: np.ndarray, w: np.ndarray = w) -> float:
            return float(np.linalg.norm(a @ w @ b.T))

        matrix += [[norm(a, b) ** 2 / (norm(a, a) * norm(b, b)) for b in columns] for a in rows]
    return matrix


@pytest.mark.parametrize("damping", [0.1, 2.0])
def test_the_overlap_is_that_of_the_definition(damping: float) -> None:
    task, train, queries = setting()
    with untouched(task.model):
        got = Overlap(damping).pairs(task, train, queries)
    expected = reference(task, train, queries, damping)
    assert np.abs(got - expected).max() <= 1e-9 and (got >= 0).all() and (got <= 2 + 1e-9).all()


def test_a_sample_overlaps_with_itself_most_and_signs_do_not_count() -> None:
    task, train, _ = setting()
    own = Overlap().pairs(task, train, train)
    assert np.allclose(np.diag(own), 2) and (own.argmax(1) == np.arange(30)).all() and np.allclose(own, own.T)
    rows, columns = torch.randn(4, 2, 5).double(), torch.randn(3, 2, 5).double()
    assert torch.allclose(_overlap(rows, columns), _overlap(-3 * rows, columns))
    assert torch.equal(_overlap(torch.zeros_like(rows), columns), torch.zeros(4, 3).double())


@given(batch_size=st.integers(1, 31), seed=st.integers(0, 3))
def test_neither_batches_nor_order_matter(batch_size: int, seed: int) -> None:
    task, train, queries = setting()
    order = np.random.default_rng(seed).permutation(len(train))
    expected = torch.from_numpy(Overlap().pairs(task, train, queries)[order])
    assert relative(torch.from_numpy(Overlap().pairs(task, train.take(order), queries, sweep=rif.Sweep(batch_size))), expected) <= 1e-9


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="damping: expected a positive number, got 0"):
        Overlap(0)
    model = nn.Sequential(nn.Linear(100, 90)).eval()
    with pytest.raises(ValueError, match=r"parameters: the overlap compares matrices with a side of up to 64.*0.weight has shape \(90, 100\)"):
        Overlap().pairs(rif.Task(model), (torch.randn(3, 100), torch.zeros(3)), (torch.randn(2, 100), torch.zeros(2)))
