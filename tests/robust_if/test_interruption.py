"""sweep.py and parts.py: work that is killed at any moment resumes, and only its own parts are taken up."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from robust_if import Samples, Sweep
from robust_if.parts import Parts

LIKE = torch.zeros(1, dtype=torch.float64)
NUMBERS = Samples((torch.linspace(-1, 1, 22, dtype=torch.float64),), ids=np.array([f"row {i}" for i in range(22)]))
SWEEP = Sweep(batch_size=3, rows_per_part=4)


def sine(batch: Any) -> Tensor:
    return torch.sin(batch[0])


def table(batch: Any) -> Tensor:
    return torch.stack([torch.sin(batch[0]), -0.0 * batch[0], torch.full_like(batch[0], torch.nan)], 1)[:, None]


def kept(folder: Path, function: Any = sine, **options: Any) -> Tensor:
    return replace(SWEEP, directory=folder, **options).map(function, NUMBERS, LIKE, name="sine", fingerprint="a")


def same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.numpy().tobytes() == other.numpy().tobytes()


SLOW = """
import sys, time, torch
from robust_if import Samples, Sweep

def slow(batch):
    time.sleep(0.004)
    return torch.sin(batch[0] * torch.arange(1, 4)).sum(1)

samples = Samples((torch.linspace(-1, 1, 600, dtype=torch.float64)[:, None],))
print("started", flush=True)
Sweep(batch_size=7, rows_per_part=20, directory=sys.argv[1]).map(slow, samples, torch.zeros(1, dtype=torch.float64), name="slow", fingerprint="a")
print("done", flush=True)
"""


def test_killed_work_resumes_with_the_loss_of_one_part_and_the_same_bytes(tmp_path: Path) -> None:
    folder, draw, kills, done = tmp_path / "slow", random.Random(0), 0, 0
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    while kills < 3:
        with subprocess.Popen([sys.executable, "-c", SLOW, str(tmp_path)], stdout=subprocess.PIPE, text=True, env=environment) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "started\n"
            goal = done + draw.randint(1, 4)
            while process.poll() is None and len(list(folder.glob("part-*.parquet"))) < goal:
                time.sleep(0.0005)
            time.sleep(draw.uniform(0, 0.015))  # anywhere in a part, or while it is written
            assert process.poll() is None, "the work ended before it was killed"
            process.kill()
        kills, before, done = kills + 1, done, len(list(folder.glob("part-*.parquet")))
        assert done > before
    calls = []

    def function(batch: Any) -> Tensor:
        calls.append(len(batch[0]))
        return torch.sin(batch[0] * torch.arange(1, 4)).sum(1)

    samples = Samples((torch.linspace(-1, 1, 600, dtype=torch.float64)[:, None],))
    options = {"like": LIKE, "name": "slow", "fingerprint": "a"}
    resumed = Sweep(batch_size=7, rows_per_part=20, directory=tmp_path).map(function, samples, **options)
    assert sum(calls) == 600 - 20 * done  # no finished part is computed again, and none is left out
    assert same(resumed, Sweep(batch_size=7, rows_per_part=20).map(function, samples, **options))
    assert sorted(path.name for path in folder.iterdir()) == ["manifest.json", *(f"part-{start:012d}.parquet" for start in range(0, 600, 20))]


@pytest.mark.parametrize("function", [sine, table], ids=["one value", "a table"])
def test_parts_are_bit_for_bit_what_was_computed_and_any_reader_of_parquet_can_read_them(function: Any, tmp_path: Path) -> None:
    expected = SWEEP.map(function, NUMBERS, LIKE, name="sine")
    assert same(kept(tmp_path, function), expected)
    assert same(kept(tmp_path, pytest.fail), expected)
    frame = pd.concat(map(pd.read_parquet, sorted(tmp_path.glob("sine/part-*.parquet"))))
    columns = ["value"] if function is sine else ["value_0", "value_1", "value_2"]
    assert list(frame) == json.loads((tmp_path / "sine" / "manifest.json").read_text())["columns"] == ["id", *columns]
    assert frame["id"].tolist() == NUMBERS.ids.tolist()
    assert np.array_equal(frame[columns].to_numpy(), expected.reshape(22, -1).numpy(), equal_nan=True)


def test_the_manifest_is_there_before_the_first_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    renamed: list[str] = []
    rename = os.replace
    monkeypatch.setattr(os, "replace", lambda one, other: (renamed.append(Path(other).name), rename(one, other)))
    kept(tmp_path)
    assert renamed[:2] == ["manifest.json", "part-000000000000.parquet"] and len(renamed) == 7


def damaged(content: bytes, how: str) -> bytes:
    middle = len(content) // 2
    return {"truncated": content[:middle], "empty": b"", "flipped": content[:60] + bytes([content[60] ^ 1]) + content[61:], "text": b"no parquet"}[
        how
    ]


@pytest.mark.parametrize("how", ["truncated", "empty", "flipped", "text"])
def test_a_damaged_part_is_computed_again_and_the_log_says_so(how: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    expected = kept(tmp_path)
    path = tmp_path / "sine" / "part-000000000008.parquet"
    whole = path.read_bytes()
    path.write_bytes(damaged(whole, how))
    seen: list[float] = []

    def function(batch: Any) -> Tensor:
        seen.extend(batch[0].tolist())
        return sine(batch)

    assert same(kept(tmp_path, function), expected)
    assert seen == NUMBERS.tensors[0][8:12].tolist()
    assert f"{path} is damaged or belongs to another computation: it is computed again" in caplog.text
    assert path.read_bytes() == whole


def test_no_flipped_bit_of_a_part_changes_a_value(tmp_path: Path) -> None:
    parts = Parts(tmp_path, NUMBERS.ids, "a", 4)
    value = torch.rand(4, dtype=torch.float64)
    parts.write(0, value)
    path = next(tmp_path.glob("part-*"))
    whole, found = path.read_bytes(), 0
    for position in range(0, len(whole), 7):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 4]) + whole[position + 1 :])
        got = parts.read(0)
        assert got is None or same(got, value), position
        found += got is None
    assert found > len(whole) // 70


@pytest.mark.parametrize(
    "change", [{"fingerprint": "b"}, {"ids": np.arange(22)}, {"rows_per_part": 5}, {"precision": "bf16"}], ids=lambda one: next(iter(one))
)
def test_parts_of_another_computation_are_not_taken_up(change: dict[str, Any], tmp_path: Path) -> None:
    settings = {"ids": NUMBERS.ids, "fingerprint": "a", "rows_per_part": 4, "precision": "full"}
    ours = Parts(tmp_path / "ours", **settings)
    ours.write(0, torch.zeros(4, dtype=torch.float64))
    theirs = Parts(tmp_path / "theirs", **{**settings, **change})
    theirs.write(0, torch.ones(len(theirs.ids[: theirs.rows_per_part]), dtype=torch.float64))
    shutil.copy(next((tmp_path / "theirs").glob("part-*")), tmp_path / "ours")
    assert ours.read(0) is None
    if "ids" not in change:  # their fingerprint holds the ids
        with pytest.raises(
            ValueError, match=f"holds parts of another computation .*{next(iter(change)) if 'fingerprint' not in change else 'model'}"
        ):
            Parts(tmp_path / "theirs", **settings)


def test_a_part_in_the_place_of_another_is_not_taken_up(tmp_path: Path) -> None:
    expected = kept(tmp_path)
    shutil.copy(tmp_path / "sine" / "part-000000000004.parquet", tmp_path / "sine" / "part-000000000000.parquet")
    assert same(kept(tmp_path), expected)


@pytest.mark.parametrize("content", ["", "{", "[1, 2]", "3", "\0"])
def test_a_damaged_manifest_is_refused(content: str, tmp_path: Path) -> None:
    kept(tmp_path)
    (tmp_path / "sine" / "manifest.json").write_text(content)
    with pytest.raises(ValueError, match=r"manifest.json is damaged .* delete this one to start afresh"):
        kept(tmp_path, pytest.fail)


def test_parts_without_a_manifest_are_refused(tmp_path: Path) -> None:
    kept(tmp_path)
    (tmp_path / "sine" / "manifest.json").unlink()
    with pytest.raises(ValueError, match="holds parts but no manifest.json"):
        kept(tmp_path, pytest.fail)


def test_a_half_written_file_is_ignored(tmp_path: Path) -> None:
    (tmp_path / "sine").mkdir()
    (tmp_path / "sine" / "manifest.json.tmp").write_text('{"finger')
    expected = kept(tmp_path)
    (tmp_path / "sine" / "part-000000000004.parquet").rename(tmp_path / "sine" / "part-000000000004.parquet.tmp")
    (tmp_path / "sine" / "part-000000000008.parquet").unlink()
    (tmp_path / "sine" / "part-000000000008.parquet.tmp").write_bytes(b"PAR1")
    assert same(kept(tmp_path), expected)
    assert not list(tmp_path.glob("sine/*.tmp"))


def test_memory_does_not_grow_with_the_parts(tmp_path: Path) -> None:
    import tracemalloc

    samples = Samples((torch.zeros(40_000, dtype=torch.float64),))
    peaks = []
    for rows in (40_000, 1_000):
        tracemalloc.start()
        for _ in range(2):  # computed, then read
            Sweep(batch_size=500, rows_per_part=rows, directory=tmp_path / str(rows)).map(sine, samples, LIKE, name="sine")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] / 4
