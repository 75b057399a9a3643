"""pairs.py: every training sample's influence on every query is the product of their gradients."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import robust_if as rif
from cases import CLASSIFIERS, NAMES, Case, case, relative
from oracles import flat, matrix, sample_gradients, unflat
from robust_if import pairs as module
from robust_if import store
from robust_if.data import Samples
from robust_if.pairs import pairwise
from robust_if.preconditioners import Inverse, Preconditioner, Solution
from robust_if.preconditioners.exact import Exact
from robust_if.store import Store
from robust_if.sweep import Sweep
from robust_if.task import Params, Task


@dataclass(frozen=True)
class Fixed(Preconditioner):
    """A fixed positive definite matrix as the inverse, which mixes all parameters."""

    rank: int = 2

    @property
    def name(self) -> str:
        return "fixed"

    def dense(self, size: int) -> torch.Tensor:
        factor = torch.randn(size, self.rank, generator=torch.Generator().manual_seed(3)).double()
        return factor @ factor.T + torch.diag(torch.linspace(0.5, 2, size, dtype=torch.float64))

    def build(self, task: Task, params: Params, data: Samples, sweep: Sweep, factors: Any = None) -> Inverse:
        return lambda vector: Solution(
            unflat((self.dense(len(flat(vector))) @ flat(vector).double()).to(flat(vector)), vector), {"converged": self.rank != 3}
        )


def exact(c: Case, preconditioner: Fixed | None = None) -> np.ndarray:
    one, other = matrix(sample_gradients(c.task, c.train)), matrix(sample_gradients(c.task, c.valid))
    if preconditioner is not None:
        other = other @ preconditioner.dense(other.shape[1]).numpy().astype(other.dtype)
    return -one @ other.T / len(c.train)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("chunk", [module.CHUNK, 1])
def test_it_is_the_matrix_of_products_of_single_gradients(name: str, chunk: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module, "CHUNK", chunk)
    c = case(name)
    plain, fixed = exact(c), exact(c, Fixed())
    size = Store.size(c.task, c.valid) // len(c.valid)
    index = Store.build(c.task, c.train, tmp_path)
    for sweep, memory in ((Sweep(5), store.MEMORY), (Sweep(4), 3 * size)):  # the second holds three queries at a time, or one
        monkeypatch.setattr(store, "MEMORY", memory)
        for stored in (None, index):
            assert relative(pairwise(c.task, c.train, c.valid, sweep=sweep, index=stored), plain) <= 1e-10
            assert relative(pairwise(c.task, c.train, c.valid, sweep=sweep, index=stored, preconditioner=Fixed()), fixed) <= 1e-10


@pytest.mark.parametrize("name", NAMES)
def test_float32_stays_float32_and_close(name: str) -> None:
    c = case(name, torch.float32)
    got = pairwise(c.task, c.train, c.valid)
    assert got.dtype == np.float32
    assert relative(got, exact(c)) <= 1e-5


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_the_mean_over_queries_is_the_inner_product_with_their_utility(name: str) -> None:
    c = case(name)
    for preconditioner in (rif.InnerProduct().preconditioner, Fixed(rank=0)):  # forward mode moves rows of padding, which are never trained
        scores = rif.InnerProduct(preconditioner).score(c.task, c.train, target=rif.Utility(c.valid))
        got = pairwise(c.task, c.train, c.valid, preconditioner=preconditioner)
        assert relative(got.mean(1), scores.values) <= 1e-10


def test_a_preconditioner_of_the_library_serves() -> None:
    c = case("logistic")
    got = pairwise(c.task, c.train, c.valid, preconditioner=Exact(damping=0.1))
    scores = rif.InnerProduct(Exact(damping=0.1)).score(c.task, c.train, target=rif.Utility(c.valid))
    assert relative(got.mean(1), scores.values) <= 1e-10


def test_of_the_training_samples_with_themselves_it_is_symmetric_and_the_diagonal_is_self_influence() -> None:
    c = case("attention")
    got = pairwise(c.task, c.train, c.train)
    assert relative(got, got.T) <= 1e-12
    own = rif.SelfInfluence().score(c.task, c.train).values
    assert relative(np.diag(got), -own / len(c.train)) <= 1e-10


def test_a_sample_that_pulls_against_the_query_is_harmful() -> None:
    model = nn.Linear(1, 2).double().eval()
    x = torch.ones(3, 1).double()
    got = pairwise(Task(model), (x, torch.tensor([0, 1, 0])), (x[:1], torch.tensor([0])))
    assert got[1, 0] > 0 > got[0, 0]


@given(st.integers(1, 20), st.permutations(range(13)), st.permutations(range(9)))
def test_batches_and_order_leave_the_matrix(batch: int, rows: list[int], columns: list[int]) -> None:
    c = case("cnn")
    whole = pairwise(c.task, c.train, c.valid, sweep=Sweep(13))
    got = pairwise(c.task, c.train.take(rows), c.valid.take(columns), sweep=Sweep(batch))
    assert relative(got, whole[rows][:, columns]) <= 1e-10


def test_on_disk_it_is_the_same_and_read_only(tmp_path: Path) -> None:
    c = case("mlp")
    got = pairwise(c.task, c.train, c.valid, directory=tmp_path, sweep=Sweep(4, rows_per_part=4))
    assert isinstance(got, np.memmap) and not got.flags.writeable
    assert np.array_equal(got, pairwise(c.task, c.train, c.valid, sweep=Sweep(4)))


def test_a_finished_matrix_is_only_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    c = case("mlp")
    first = np.array(pairwise(c.task, c.train, c.valid, directory=tmp_path))
    monkeypatch.setattr(module, "_fill", None)
    assert np.array_equal(first, pairwise(c.task, c.train, c.valid, directory=tmp_path))


@pytest.mark.parametrize(
    ("what", "train", "queries", "preconditioner"),
    [
        ("data", lambda c: c.valid, lambda c: c.valid, Fixed()),
        ("queries", lambda c: c.train, lambda c: c.train, Fixed()),
        ("preconditioner", lambda c: c.train, lambda c: c.valid, Fixed(1)),
    ],
)
def test_another_computation_is_refused(what: str, train: Any, queries: Any, preconditioner: Preconditioner, tmp_path: Path) -> None:
    c = case("mlp")
    pairwise(c.task, c.train, c.valid, preconditioner=Fixed(), directory=tmp_path)
    with pytest.raises(ValueError, match=f"directory: .* made with another {what};"):
        pairwise(c.task, train(c), queries(c), preconditioner=preconditioner, directory=tmp_path)


def test_a_damaged_matrix_and_a_store_are_refused(tmp_path: Path) -> None:
    c = case("mlp")
    pairwise(c.task, c.train, c.valid, directory=tmp_path / "matrix")
    Store.build(c.task, c.train, tmp_path / "store")
    with pytest.raises(ValueError, match="directory: .* holds something made with another queries, another preconditioner"):
        pairwise(c.task, c.train, c.valid, directory=tmp_path / "store")
    np.save(tmp_path / "matrix" / "matrix.npy", np.zeros((3, 3)))
    with pytest.raises(ValueError, match=r"directory: the matrix in .* is damaged"):
        pairwise(c.task, c.train, c.valid, directory=tmp_path / "matrix")
    (tmp_path / "matrix" / "manifest.json").write_text("[]")
    with pytest.raises(ValueError, match="directory"):
        pairwise(c.task, c.train, c.valid, directory=tmp_path / "matrix")


def test_bad_arguments_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    c = case("mlp")
    with pytest.raises(TypeError, match="preconditioner: expected"):
        pairwise(c.task, c.train, c.valid, preconditioner="ekfac")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="index: it was built for another data"):
        pairwise(c.task, c.train, c.valid, index=Store.build(c.task, c.valid, tmp_path / "index"))
    monkeypatch.setattr("robust_if.store.shutil.disk_usage", lambda _: type("Usage", (), {"free": 8 * 13 * 9 - 1}))
    with pytest.raises(OSError, match="directory: 936 B are needed"):
        pairwise(c.task, c.train, c.valid, directory=tmp_path / "matrix")


def test_a_solver_that_does_not_converge_is_said(caplog: pytest.LogCaptureFixture) -> None:
    c = case("mlp")
    pairwise(c.task, c.train, c.valid, preconditioner=Fixed(3))
    assert "did not converge for 9 of 9 queries" in caplog.text


KILLED = """
import os, signal, sys
sys.path[:0] = {path!r}
import torch
torch.set_num_threads(1)
from cases import case
from robust_if import Sweep
from robust_if import pairs as module
from robust_if import store
from robust_if.pairs import _Matrix, pairwise
store.MEMORY = {memory}
calls, write = [0], _Matrix.write

def dying(self, *args):
    calls[0] += 1
    if calls[0] == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    write(self, *args)

_Matrix.write = dying
c = case("mlp")
pairwise(c.task, c.train, c.valid, directory={folder!r}, sweep=Sweep(4, rows_per_part=4))
"""


def test_a_killed_run_goes_on_and_ends_in_the_same_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    c = case("mlp")
    memory = 4 * Store.size(c.task, c.valid) // len(c.valid)  # four queries at a time: of 13 rows in batches of 4, the second block's third
    folder = tmp_path / "killed"
    script = KILLED.format(path=[*filter(None, sys.path), os.getcwd()], folder=str(folder), memory=memory)
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -signal.SIGKILL
    assert json.loads((folder / "progress.json").read_text()) == {"start": 4, "stop": 8, "rows": 8}
    written: list[tuple[int, int]] = []
    write = module._Matrix.write
    monkeypatch.setattr(module._Matrix, "write", lambda self, *args: written.append((args[0].start, args[1].start)) or write(self, *args))
    monkeypatch.setattr(store, "MEMORY", memory)
    sweep = Sweep(4, rows_per_part=4)
    got = pairwise(c.task, c.train, c.valid, directory=folder, sweep=sweep)
    assert written == [(8, 4), (12, 4), (0, 8), (4, 8), (8, 8), (12, 8)]
    whole = pairwise(c.task, c.train, c.valid, directory=tmp_path / "whole", sweep=sweep)
    assert np.array_equal(got, whole)
    assert relative(got, exact(c)) <= 1e-10


def test_it_runs_within_a_limit_of_memory_and_says_what_it_does_not_do() -> None:
    c = case("mlp")
    assert relative(pairwise(c.task, c.train, c.valid, sweep=Sweep(max_memory="1MB")), exact(c)) <= 1e-10
    with pytest.raises(ValueError, match="max_memory: one sample needs"):
        pairwise(c.task, c.train, c.valid, sweep=Sweep(max_memory=10))
    with pytest.raises(ValueError, match="sweep: expected engine='local' and precision='full' here"):
        pairwise(c.task, c.train, c.valid, sweep=Sweep(precision="bf16"))
