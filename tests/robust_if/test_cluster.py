"""cluster.py: the pass over the data on several processes gives what one process gives."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from robust_if import Samples, Sweep, cluster
from robust_if.cluster import _Arrays, exactly_once

LIKE = torch.zeros(1, dtype=torch.float64)
NUMBERS = Samples((torch.arange(40.0, dtype=torch.float64), torch.arange(40)), ids=np.array([f"row {i}" for i in range(40)]))
RAY = Sweep(batch_size=3, rows_per_part=4)


PATHS = {"env_vars": {"PYTHONPATH": os.pathsep.join(sys.path)}}


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    """Two workers on this machine, for the whole file."""
    ray = pytest.importorskip("ray")
    pytest.importorskip("ray.data")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level="error", log_to_driver=False, runtime_env=PATHS)
    yield ray
    ray.shutdown()


def sweep(**options: Any) -> Sweep:
    return replace(RAY, engine="ray", workers=2, **options)


def test_workers_resume_what_one_process_began_and_the_part_of_a_killed_one_is_computed_again(ray: Any, tmp_path: Path) -> None:
    weights, mark = torch.rand(5, dtype=torch.float64), tmp_path / "killed"

    def function(batch: Any, deadly: bool = False) -> Tensor:  # closures go to the workers by value
        if deadly and 17 in batch[1].tolist() and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.outer(torch.sin(batch[0]), weights)

    def interrupt(items: Any, _: str) -> Iterator[Any]:
        for position, item in enumerate(items):
            if position == 3:
                raise KeyboardInterrupt
            yield item

    def parts() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in tmp_path.glob("sine/part-*.parquet")}

    expected = RAY.map(function, NUMBERS, LIKE, name="sine")
    with pytest.raises(KeyboardInterrupt):
        replace(RAY, directory=tmp_path, progress=interrupt).map(function, NUMBERS, LIKE, name="sine")
    begun = parts()
    assert len(begun) == 3
    assert torch.equal(sweep(directory=tmp_path).map(partial(function, deadly=True), NUMBERS, LIKE, name="sine"), expected)
    assert mark.exists()
    assert len(parts()) == 10 and begun.items() <= parts().items()
    assert torch.equal(replace(RAY, directory=tmp_path).map(pytest.fail, NUMBERS, LIKE, name="sine"), expected)


def test_a_part_that_always_ends_its_worker_is_an_error_in_the_end(ray: Any) -> None:
    def deadly(samples: Samples, rows: slice) -> Tensor:
        if 17 in samples.batch(rows)[1].tolist():
            os.kill(os.getpid(), signal.SIGKILL)
        return samples.batch(rows)[0]

    parts = [slice(0, 10), slice(10, 20), slice(20, 40)]
    with pytest.raises(ray.exceptions.RayTaskError, match="the part of rows 10 to 20 lost its worker 1 times"):
        list(cluster.run(deadly, NUMBERS, parts, workers=1, device=LIKE.device, retries=0))


PARTS = [slice(0, 4), slice(4, 8), slice(8, 9)]


def test_each_part_is_checked_to_arrive_exactly_once() -> None:
    assert list(exactly_once(PARTS, [(rows, 0) for rows in reversed(PARTS)])) == [(rows, 0) for rows in reversed(PARTS)]
    with pytest.raises(RuntimeError, match="rows 4 to 8 arrived twice"):
        list(exactly_once(PARTS, [(PARTS[1], 0), (PARTS[1], 0)]))
    with pytest.raises(RuntimeError, match="rows 8 to 12 arrived twice, or was never asked for"):
        list(exactly_once(PARTS, [(slice(8, 12), 0)]))
    with pytest.raises(RuntimeError, match="1 of 3 parts never arrived, the first from row 0"):
        list(exactly_once(PARTS, [(rows, 0) for rows in PARTS[1:]]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64])
def test_shared_tensors_come_back_as_they_were_and_can_be_written_to(dtype: torch.dtype) -> None:
    value = (3 * torch.randn(6, 2, 3)).to(dtype)
    arrays = _Arrays.of(Samples((value.transpose(1, 2), value[:, 0, 0])))
    for array in arrays.arrays:
        array.setflags(write=False)
    first, second = arrays.take(slice(2, 5)).tensors
    assert torch.equal(first, value.transpose(1, 2)[2:5]) and torch.equal(second, value[2:5, 0, 0])
    first.zero_()
    assert torch.equal(arrays.take(slice(2, 5)).tensors[0], value.transpose(1, 2)[2:5])


def test_a_model_on_a_second_gpu_is_refused_before_work_starts() -> None:
    with pytest.raises(ValueError, match="a worker sees one GPU, as cuda:0, but the model is on cuda:1"):
        next(cluster.run(pytest.fail, NUMBERS, PARTS, workers=None, device=torch.device("cuda:1")))


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "ray" else find(name, *rest))
    with pytest.raises(ImportError, match=re.escape("pip install 'robust-if[ray]'")):
        Sweep(engine="ray")


def script(source: str) -> list[str]:
    environment = {**os.environ, **PATHS["env_vars"]}
    return subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True, env=environment).stdout.splitlines()


BEGIN = "import sys, torch, numpy as np, robust_if as rif\nfrom cases import case\n"


def test_nothing_of_ray_is_imported_unless_it_is_asked_for() -> None:
    run = "c = case('mlp')\nrif.InnerProduct().score(c.task, c.train, target=rif.Utility(c.valid))\n"
    assert script(BEGIN + run + "print('ray' in sys.modules)") == ["False"]


def test_ray_is_started_quietly_and_shut_down_where_nobody_did() -> None:
    """And a model with a data set of items gets the scores that one process gives."""
    pytest.importorskip("ray")
    source = """
from torch.utils.data import TensorDataset
c = case("cnn")
rows = rif.Samples(TensorDataset(*c.train.tensors))
expected, got = (
    rif.InnerProduct().score(c.task, rows, target=rif.Utility(c.valid), sweep=sweep).values
    for sweep in (rif.Sweep(rows_per_part=4), rif.Sweep(engine="ray", workers=1, rows_per_part=4))
)
print(np.allclose(got, expected, rtol=1e-12, atol=0))
import ray
print(ray.is_initialized())
"""
    assert script(BEGIN + source) == ["True", "False"]
