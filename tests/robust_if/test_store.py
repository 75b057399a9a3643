"""store.py and layout.py: gradients kept on disk or in memory are the gradients, and a damaged or foreign store is refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import robust_if as rif
from cases import NAMES, TARGETS, Rows, case, features, relative, squared_error
from oracles import sample_gradients
from robust_if import layers, pieces, store
from robust_if.layers import Live
from robust_if.pieces import dense
from robust_if.store import Store, factors_of

SWEEP = rif.Sweep(batch_size=5, rows_per_part=5)


def stored(factors: layers.Factors) -> dict[str, np.ndarray]:
    """All gradients that blocks() gives, by name."""
    found: dict[str, list[torch.Tensor]] = {}
    stop = 0
    for rows, each in factors.blocks():
        assert rows.start == stop
        stop = rows.stop
        for name, parts in each:
            found.setdefault(name, []).append(pieces.dense(parts))
            assert len(found[name][-1]) == rows.stop - rows.start
    return {name: torch.cat(parts).numpy() for name, parts in found.items()}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_store_holds_the_gradients_of_single_backward_passes(
    name: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    c = case(name, dtype)
    monkeypatch.setattr(store, "BLOCK", 4 * Store.size(c.task, c.train) // len(c.train))
    built = Store.build(c.task, c.train, tmp_path, sweep=SWEEP)
    exact = sample_gradients(c.task, c.train)
    for factors in (built, Store.open(tmp_path), factors_of(c.task, c.task.params(), c.train, SWEEP)):
        assert isinstance(factors, Store)
        got = stored(factors)
        assert list(got) == list(exact)
        for key, value in exact.items():
            assert relative(got[key], value.flatten(1)) <= (1e-10 if dtype == torch.float64 else 1e-5), key
    assert built.bytes == Store.size(c.task, c.train) <= sum(value.numel() * value.element_size() for value in exact.values())
    assert len(built) == len(c.train)


SCORED: dict[str, rif.Estimator] = {
    "ip": rif.InnerProduct(),
    "cosine": rif.InnerProduct(normalise="cosine"),
    "layer": rif.InnerProduct(normalise="layer"),
    "self-influence": rif.SelfInfluence(),
    "grad-norm": rif.GradNorm(),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_scores_from_a_store_are_the_direct_scores(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    c = case(name, dtype)
    index = Store.build(c.task, c.train, tmp_path)
    for key, estimator in SCORED.items():
        for target in (TARGETS["gap"](c.valid, 4), [TARGETS["gap"](c.valid, 4), rif.Utility(c.valid)]):
            direct = estimator.score(c.task, c.train, target=target)
            indexed = estimator.score(c.task, c.train, target=target, index=index)
            for one, other in zip(*([each] if isinstance(each, rif.Scores) else each for each in (indexed, direct)), strict=True):
                assert relative(one.values, other.values) <= (1e-10 if dtype == torch.float64 else 1e-5), key


@given(st.integers(1, 20), st.integers(1, 20), st.permutations(range(13)))
def test_batches_blocks_and_order_leave_the_gradients(tmp_path_factory: Any, batch: int, block: int, order: list[int]) -> None:
    c = case("attention")
    whole = stored(factors_of(c.task, c.task.params(), c.train, rif.Sweep(13)))
    folder = tmp_path_factory.mktemp("store")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "BLOCK", block * Store.size(c.task, c.train) // len(c.train))
        mixed = Store.build(c.task, c.train.take(order), folder, sweep=rif.Sweep(batch))
        got = stored(mixed)
    assert mixed.ids.tolist() == order
    for key, value in whole.items():
        assert relative(got[key], value[order]) <= 1e-10, key


def test_linear_layers_are_kept_as_factors_and_tables_as_rows(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Embedding(1000, 6), nn.Flatten(), nn.Linear(24, 30), nn.Tanh(), nn.Linear(30, 5)).eval()
    task, samples = rif.Task(model), rif.Samples((torch.randint(1000, (9, 4)), torch.randint(5, (9,))))
    size = Store.size(task, samples)
    biases = 30 + 5  # which share memory with their weights' factors where the layer rule lets them
    assert 9 * 4 * (4 + 24 + (24 + 30) + (30 + 5)) <= size <= 9 * 4 * (4 + 24 + (24 + 30) + (30 + 5) + biases)
    kinds = [entry.kind for entry in Store.build(task, samples, tmp_path).layout.entries]
    assert kinds == ["rows", "outer", "dense", "outer", "dense"]
    assert sum(path.stat().st_size for path in tmp_path.glob("column-*.npy")) <= size + 8 * 128


def test_half_precision_is_kept_as_it_is(tmp_path: Path) -> None:
    c = case("mlp", torch.bfloat16)
    live, kept = layers.Live.of(c.task, c.task.params(), c.train, 5), Store.build(c.task, c.train, tmp_path, sweep=SWEEP)
    for (_, one), (_, other) in zip(next(live.blocks())[1], kept.pieces(slice(0, 5)), strict=True):
        assert torch.equal(pieces.dense(one), pieces.dense(other))
        assert pieces.dense(other).dtype == torch.bfloat16


def test_what_no_rule_covers_is_named_with_its_share(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    c = case("bare")
    Store.build(c.task, c.train, tmp_path)
    assert "no layer rule for scale, inner.weight, kept as they are" in caplog.text
    assert f"x {len(c.train)} samples = " in caplog.text


def test_gradients_that_do_not_fit_in_memory_are_computed_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    c = case("mlp")
    size = Store.size(c.task, c.train)
    for sweep, kind in (
        (rif.Sweep(max_memory=2 * size), Store),
        (rif.Sweep(max_memory=2 * size - 2), layers.Live),
        (rif.Sweep(), Store),
    ):
        assert isinstance(factors_of(c.task, c.task.params(), c.train, sweep), kind)
    monkeypatch.setattr(store, "MEMORY", size - 1)
    assert isinstance(factors_of(c.task, c.task.params(), c.train, rif.Sweep()), layers.Live)


def other_model() -> rif.Task:
    task = case("mlp").task
    state = {key: value.clone() for key, value in task.model.state_dict().items()}
    next(iter(state.values()))[0, 0] += 1e-9
    return task.at(state)


def mean_loss(outputs: torch.Tensor, batch: Any) -> torch.Tensor:
    return outputs.mean(1)


@pytest.mark.parametrize(
    ("what", "task", "change"),
    [
        ("model", other_model, lambda train: train),
        ("model", lambda: replace(case("mlp").task, loss=mean_loss), lambda train: train),
        ("model", lambda: replace(case("mlp").task, parameters="1.*"), lambda train: train),
        ("data", lambda: case("mlp").task, lambda train: train.with_labels(1 - train.labels.clamp(max=1))),
        ("data", lambda: case("mlp").task, lambda train: train.take(range(12))),
        ("data", lambda: case("mlp").task, lambda train: train.take(range(12, -1, -1))),
    ],
)
def test_another_model_or_other_data_are_refused(what: str, task: Any, change: Any, tmp_path: Path) -> None:
    c = case("mlp")
    index = Store.build(c.task, c.train, tmp_path)
    index.check(c.task, c.train)
    with pytest.raises(ValueError, match=f"index: it was built for another {what}"):
        rif.InnerProduct().score(task(), change(c.train), target=rif.Utility(c.valid), index=index)
    with pytest.raises(ValueError, match="holds the store of another model or other data"):
        Store.build(task(), change(c.train), tmp_path)


def test_a_store_is_not_read_for_other_samples_or_checkpoints(tmp_path: Path) -> None:
    c = case("mlp")
    index = Store.build(c.task, c.train, tmp_path)
    with pytest.raises(ValueError, match="index: it holds"):
        rif.SelfInfluence().score(c.task, c.train, samples=c.valid, index=index)


def test_a_disk_that_is_too_small_is_noticed_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    c = case("mlp")
    monkeypatch.setattr(store.shutil, "disk_usage", lambda _: type("Usage", (), {"free": Store.size(c.task, c.train) - 1}))
    with pytest.raises(OSError, match=r"directory: .* are needed, the disk of"):
        Store.build(c.task, c.train, tmp_path / "new")
    assert not list((tmp_path / "new").iterdir())


@pytest.mark.parametrize("lengths", [(3, 2), (2, 3)])
def test_shorter_samples_are_filled_up_and_longer_ones_refused(lengths: tuple[int, int]) -> None:
    model = nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 1)).double().eval()
    x, goal = torch.randn(6, 3, 40).double(), torch.randn(6).double()

    class Mixed(Rows):
        def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
            return {"features": self.x[i][: lengths[i >= 4]], "goal": self.y[i]}

    task = rif.Task(model, lambda outputs, batch: squared_error(outputs.mean(1), batch), features)
    samples = rif.Samples(Mixed(x, goal))
    if lengths == (2, 3):
        with pytest.raises(ValueError, match=r"train: from sample 4 on the gradients of \['0.weight'"):
            factors_of(task, task.params(), samples, rif.Sweep(2))
        return
    kept = factors_of(task, task.params(), samples, rif.Sweep(2))
    assert isinstance(kept, Store) and {each.name: each.kind for each in kept.layout.entries}["0.weight"] == "outer"
    live = Live.of(task, task.params(), samples, 2)
    expected = [{name: dense(each) for name, each in pieces} for _, pieces in live.blocks()]
    for name, each in kept.pieces(slice(None)):
        assert torch.allclose(dense(each), torch.cat([part[name] for part in expected]), rtol=1e-12, atol=0)


KILLED = """
import os, signal, sys
sys.path[:0] = {path!r}
import torch
torch.set_num_threads(1)
from cases import case
from robust_if import Sweep, layers
from robust_if.store import Store
calls, pieces = [0], layers.LayerGradients.pieces

def dying(self, batch):
    calls[0] += 1
    if calls[0] == {calls}:
        os.kill(os.getpid(), signal.SIGKILL)
    return pieces(self, batch)

layers.LayerGradients.pieces = dying
c = case("cnn")
Store.build(c.task, c.train, {folder!r}, sweep=Sweep(batch_size=2, rows_per_part=4))
"""


def test_a_killed_build_goes_on_and_ends_in_the_same_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    c, sweep = case("cnn"), rif.Sweep(batch_size=2, rows_per_part=4)
    folder, path = tmp_path / "killed", [entry for entry in sys.path if entry]
    script = KILLED.format(path=[*path, os.getcwd()], folder=str(folder), calls=7)  # one call is the probe: it dies in the sixth batch
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -signal.SIGKILL
    with pytest.raises(ValueError, match=r"is not finished, 8 of 13 samples are there; call Store\.build"):
        Store.open(folder)
    read: list[int] = []
    batch = rif.Samples.batch
    monkeypatch.setattr(rif.Samples, "batch", lambda self, rows: read.append(rows.start) or batch(self, rows))
    Store.build(c.task, c.train, folder, sweep=sweep)
    assert read[-3:] == [8, 10, 12] and 4 not in read  # besides the probes at 0
    read.clear()
    Store.build(c.task, c.train, folder, sweep=sweep)
    assert not any(read)  # of a finished store nothing is computed again
    whole = tmp_path / "whole"
    Store.build(c.task, c.train, whole, sweep=sweep)
    names = sorted(each.name for each in whole.iterdir())
    assert names == sorted(each.name for each in folder.iterdir())
    for name in names:
        assert (folder / name).read_bytes() == (whole / name).read_bytes(), name


def edit(**changes: Any) -> Any:
    def change(folder: Path) -> None:
        manifest = json.loads((folder / "manifest.json").read_text())
        for key, value in changes.items():
            manifest[key] = value(manifest[key]) if callable(value) else value
        (folder / "manifest.json").write_text(json.dumps(manifest))

    return change


def pickled(folder: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(folder / "executed"),)

    np.save(folder / "column-0000.npy", np.array([Evil()], dtype=object), allow_pickle=True)


def truncated(folder: Path) -> None:
    path = folder / "column-0001.npy"
    path.write_bytes(path.read_bytes()[:-1])


DAMAGES: dict[str, Any] = {
    "not JSON": lambda folder: (folder / "manifest.json").write_text("{"),
    "a list": lambda folder: (folder / "manifest.json").write_text("[]"),
    "too deep": lambda folder: (folder / "manifest.json").write_text("[" * 100_000),
    "no progress": lambda folder: (folder / "progress.json").unlink(),
    "another format": edit(format=99),
    "a negative number": edit(samples=-1),
    "more samples": edit(samples=14),
    "a width": edit(columns=lambda columns: [["float64", 10**12], *columns[1:]]),
    "a type": edit(columns=lambda columns: [["object", columns[0][1]], *columns[1:]]),
    "a smaller type": edit(columns=lambda columns: [["float32", columns[0][1]], *columns[1:]]),
    "no columns": edit(columns=[], entries=[]),
    "a column that is not there": edit(entries=lambda entries: [{**entries[0], "columns": [99, 99]}, *entries[1:]]),
    "a path as a column": edit(entries=lambda entries: [{**entries[0], "columns": ["../a", "/b"]}, *entries[1:]]),
    "a kind": edit(entries=lambda entries: [{**entries[0], "kind": "pickle"}, *entries[1:]]),
    "a shape": edit(entries=lambda entries: [{**entries[0], "shape": [2, 2, 2]}, *entries[1:]]),
    "a missing file": lambda folder: (folder / "column-0001.npy").unlink(),
    "a short file": truncated,
    "a pickle": pickled,
    "other ids": lambda folder: np.save(folder / "ids.npy", np.arange(3)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_store_is_refused(damage: str, tmp_path: Path) -> None:
    c = case("mlp")
    Store.build(c.task, c.train, tmp_path)
    DAMAGES[damage](tmp_path)
    if damage == "more samples":
        (tmp_path / "progress.json").write_text('{"rows": 14}')
    with pytest.raises(ValueError, match="index: the store in .* is damaged"):
        Store.open(tmp_path)
    assert not (tmp_path / "executed").exists()


def test_a_forged_list_of_parameters_is_refused(tmp_path: Path) -> None:
    c = case("mlp")
    Store.build(c.task, c.train, tmp_path)
    edit(entries=lambda entries: [{**entries[0], "name": "../../other"}, *entries[1:]])(tmp_path)
    with pytest.raises(ValueError, match="index: it was built for another"):
        Store.open(tmp_path).check(c.task, c.train)


def test_no_store_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="index: no store in"):
        Store.open(tmp_path)
