"""One case of one peer in this process: ``python -P -m peers.measure PEER CASE WORK_FOLDER THREADS LIMIT RESULT_FILE``."""

from __future__ import annotations

import importlib
import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from peers.workload import Run, Workload

LONG = 20.0  # CPU seconds: cases above are not repeated


def cpu() -> float:
    """CPU seconds of this process with its threads and of the processes that it has waited for."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def seconds(function: Callable[[], object], repeats: int = 5) -> tuple[float, int, object]:
    """Least CPU seconds, number of runs, and what the last run returned."""
    times: list[float] = []
    while len(times) < repeats and (not times or min(times) < LONG):
        begin = cpu()
        result = function()
        times.append(cpu() - begin)
    return min(times), len(times), result


def peak() -> float:
    """Peak resident memory of this process in MB."""
    scale = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale


def agreement(scores: object, folder: Path, case: str) -> dict[str, float | None]:
    """Pearson r with the float64 reference: of the scores for the whole held-out set, and pair by pair where there are pairs."""
    values = np.asarray(scores.detach() if isinstance(scores, torch.Tensor) else scores, dtype=np.float64)
    if not np.isfinite(values).all():
        return {"r": None, "finite": float(np.isfinite(values).mean())}
    with np.load(folder / "reference.npz") as reference:
        if values.ndim == 1:
            return {"r": correlation(values, reference["self" if case.endswith("self_influence") else "aggregate"])}
        return {"r": correlation(values.mean(1), reference["aggregate"]), "r_pairs": correlation(values.ravel(), reference["pairs"].ravel())}


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.corrcoef(a, b)[0, 1])


def main(peer: str, case: str, folder: Path, threads: int, limit: int, result: Path) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as scratch:
        work = Workload(folder, Path(scratch))
        before, _, _ = seconds(work.forward)
        loaded = peak()
        # a limit on CPU seconds, not on the clock: a busy machine must not decide which peers get done; the kernel ends the process by SIGXCPU
        resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time()) + limit, resource.RLIM_INFINITY))
        run: Run = getattr(importlib.import_module(f"peers.{peer}"), case)(work)
        spent, repeats, scores = seconds(run)
        record = {"cpu": spent, "repeats": repeats, "peak_mb": peak(), "loaded_mb": loaded}
        resource.setrlimit(resource.RLIMIT_CPU, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        after, _, _ = seconds(work.forward)
        record |= {"floor": min(before, after), "ratio": spent / min(before, after)}
        if scores is not None:
            record |= agreement(scores, folder, case)
    result.write_text(json.dumps(record))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5]), Path(sys.argv[6]))
