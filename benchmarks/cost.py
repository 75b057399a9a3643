"""What scoring costs, in forward passes over the training set (F), beside captum and per-sample gradients.

    python benchmarks/cost.py            CPU seconds of the process, best of three, every case in the same run
    python benchmarks/cost.py --memory   peak memory of IP for growing training sets, each in a process of its own

5,000 training and 500 held-out images 1 x 28 x 28 (scikit-learn's digits, enlarged), CNN with 206,922 parameters, float32, batches of 250. Every case
includes the gradient of the target. Captum is an optional peer: `pip install captum`.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from sklearn.datasets import load_digits

import robust_if as rif
from robust_if import models
from robust_if.data import batches
from robust_if.gradients import per_sample

BATCH = 250


def data(n: int, held_out: int) -> tuple[rif.Samples, rif.Samples, np.ndarray]:
    images, labels = load_digits(return_X_y=True)
    rows = np.random.default_rng(0).integers(0, len(labels), size=n + held_out)
    x = torch.nn.functional.interpolate(torch.from_numpy(images / 16).float().view(-1, 1, 8, 8), size=28, mode="bilinear")
    y = torch.from_numpy(labels).long()[rows]
    flipped = np.zeros(n + held_out, dtype=bool)
    flipped[: n // 10] = True
    y[torch.from_numpy(flipped)] = (y[torch.from_numpy(flipped)] + 1) % 10
    whole = rif.Samples((x[rows], y))
    return whole.take(np.arange(n)), whole.take(np.arange(n, n + held_out)), flipped[:n]


def seconds(function: Callable[[], object], repeats: int = 3) -> float:
    """CPU seconds of the process, best of ``repeats``."""
    times = []
    for _ in range(repeats):
        begin = time.process_time()
        function()
        times.append(time.process_time() - begin)
    return min(times)


def captum_scores(task: rif.Task, train: rif.Samples, valid: rif.Samples) -> np.ndarray:
    """Captum's TracInCP with its fast path: aggregated over the held-out data, sample-wise gradients by its summed-loss trick."""
    from captum.influence import TracInCP

    def load(model: torch.nn.Module, path: str) -> float:
        model.load_state_dict(torch.load(path, weights_only=True))
        return 1.0

    with TemporaryDirectory() as folder:
        path = str(Path(folder) / "model.pt")
        torch.save(task.model.state_dict(), path)
        tracin = TracInCP(
            task.model, torch.utils.data.TensorDataset(*train.tensors), [path], load, batch_size=BATCH,
            loss_fn=torch.nn.CrossEntropyLoss(reduction="sum"), sample_wise_grads_per_batch=True,
        )  # fmt: skip
        loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*valid.tensors), BATCH)
        return -tracin.influence(loader, aggregate=True)[0].numpy() / len(valid) / len(train)


def cost() -> None:
    train, valid, _ = data(5000, 500)
    task = rif.Task(models.build("cnn", (1, 28, 28), 10))
    task = task.at(rif.train(task, train, rif.Recipe(epochs=2))[-1].state)
    target, sweep, params = rif.Utility(valid, batch_size=BATCH), rif.Sweep(BATCH), task.params()
    scores: dict[str, np.ndarray] = {}

    def forward() -> None:
        with torch.no_grad():
            for batch in batches(train, BATCH, params["0.weight"]):
                task.losses(params, batch)

    def estimator(each: rif.Estimator) -> Callable[[], None]:
        def go() -> None:
            scores[each.name] = each.score(task, train, target=target, sweep=sweep).values

        return go

    def materialised() -> None:
        slope = target.gradient(task, params)
        parts = []
        for batch in batches(train, BATCH, params["0.weight"]):
            grads = per_sample(task, params, batch)
            parts.append(sum(grads[name].flatten(1) @ slope[name].flatten() for name in params))
        scores["per-sample"] = -torch.cat(parts).numpy() / len(train)

    def captum() -> None:
        scores["captum"] = captum_scores(task, train, valid)

    cases = {
        "forward pass (the floor)": forward,
        "IP": estimator(rif.InnerProduct()),
        "IP, cosine": estimator(rif.InnerProduct(normalise="cosine")),
        "IP Ensemble (5 members)": estimator(rif.Ensemble()),
        "self-influence": estimator(rif.SelfInfluence()),
        "flat-minimum metric (without tuning)": estimator(rif.FlatMinima(rif.Tuning(steps=0))),
        "captum TracInCP, aggregated": captum,
        "per-sample gradients, then products": materialised,
    }
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    print("| case | CPU seconds | forward passes (F) | agreement with IP |\n|---|---|---|---|")
    for name, case in cases.items():
        try:
            case()
        except ImportError as error:
            print(f"| {name} | not installed: {error} | | |")
            continue
        floor, spent = seconds(forward), seconds(case)
        floor = min(floor, seconds(forward))
        same = {"captum TracInCP, aggregated": "captum", "per-sample gradients, then products": "per-sample"}.get(name)
        agreement = "" if same is None else f"r = {np.corrcoef(scores[same], scores['ip'])[0, 1]:.6f}"
        print(f"| {name} | {spent:.2f} | {spent / floor:.2f} | {agreement} |", flush=True)


def peak(n: int, score: bool) -> float:
    """Peak resident memory in MB of a process that makes n samples, and scores them if told so."""
    train, valid, _ = data(n, 500)
    task = rif.Task(models.build("cnn", (1, 28, 28), 10))
    if score:
        rif.InnerProduct().score(task, train, target=rif.Utility(valid, batch_size=BATCH), sweep=rif.Sweep(BATCH))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def memory() -> None:
    print("| samples | peak MB with the data alone | peak MB with IP | difference |\n|---|---|---|---|")
    for n in (2500, 5000, 10000, 20000):
        found = []
        for score in (False, True):
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                found.append(pool.apply(peak, (n, score)))
        print(f"| {n:,} | {found[0]:.0f} | {found[1]:.0f} | {found[1] - found[0]:.0f} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    memory() if args.memory else cost()
