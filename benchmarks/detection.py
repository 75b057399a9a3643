"""Which detector finds mislabelled samples: AUROC over seeds, noise types, and two regimes.

    python benchmarks/detection.py fashion-pair40            one row of the table, five seeds, both regimes
    python benchmarks/detection.py --table                   the table of all rows that have been run

Each (row, regime, seed, estimator) is appended to ``benchmarks/results/<row>.jsonl`` as soon as it is known; finished ones are not run again.
Fashion-MNIST, CIFAR-10 and CIFAR-10N are read from the folder that ROBUST_IF_DATA names.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch

import robust_if as rif
from robust_if import models
from robust_if.attacks import labels as noise
from robust_if.attacks.poisoned import Poisoned
from robust_if.estimators import Estimator
from robust_if.evaluations.baselines import ConfidentLearning, NearestNeighbours, accuracy
from robust_if.evaluations.detection import detection
from robust_if.loading import read

DATA = Path(os.environ.get("ROBUST_IF_DATA", "../shared/data"))
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Row:
    """One row of the table: data, noise, model, and how it is trained in each regime."""

    load: Callable[[int], tuple[rif.Samples, rif.Samples, rif.Samples]]
    poison: Callable[[rif.Samples, int], Poisoned[rif.Samples]]
    model: Callable[[], torch.nn.Module]
    early: rif.Recipe
    memorised: rif.Recipe


def split(x: np.ndarray, y: np.ndarray, sizes: tuple[int, int, int], seed: int) -> tuple[rif.Samples, rif.Samples, rif.Samples]:
    """Training, validation and test samples, drawn at random."""
    order = np.random.default_rng(seed).permutation(len(x))[: sum(sizes)]
    whole = rif.Samples((torch.from_numpy(x), torch.from_numpy(y).long()), np.arange(len(x))).take(order)
    a, b = sizes[0], sizes[0] + sizes[1]
    return whole.take(np.arange(a)), whole.take(np.arange(a, b)), whole.take(np.arange(b, sum(sizes)))


def digits(seed: int) -> tuple[rif.Samples, rif.Samples, rif.Samples]:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    return split((x / 16).astype(np.float32), y, (1200, 200, 397), seed)


def fashion(seed: int) -> tuple[rif.Samples, rif.Samples, rif.Samples]:
    folder = DATA / "fashion_mnist"
    whole = read(folder / "train-images-idx3-ubyte.gz")
    x, y = whole.features, whole.labels
    order = np.random.default_rng(seed).permutation(len(x))[:8500]
    return split(((x[order] - 0.286) / 0.353).astype(np.float32), y[order], (6000, 500, 2000), seed)


def cifar(seed: int) -> tuple[rif.Samples, rif.Samples, rif.Samples]:
    """The first images of CIFAR-10, without the few that are no exact copies; ids are torchvision's indices."""
    file = np.load(DATA / "cifar10" / "train_00000_09999.npz")
    x = np.cumsum(np.cumsum(file["residual"], axis=2, dtype=np.uint8), axis=3, dtype=np.uint8)
    x[:, 0] += x[:, 1]
    x[:, 2] += x[:, 1]
    x = ((x / 255 - 0.473) / 0.251).astype(np.float32)
    whole = rif.Samples((torch.from_numpy(x), torch.from_numpy(file["labels"]).long()), file["index"])
    order = np.random.default_rng(seed).permutation(np.flatnonzero(file["lossless"]))
    a, b, c = CIFAR_SIZES
    return whole.take(order[:a]), whole.take(order[a : a + b]), whole.take(order[a + b : a + b + c])


CIFAR_SIZES = (4000, 500, 1500)


def human(data: rif.Samples, _: int) -> Poisoned[rif.Samples]:
    return noise.given(data, noise.read_labels(DATA / "cifar10n" / "cifar10n_labels.npz", "worse_label")[data.ids])


def _rows() -> dict[str, Row]:
    small = (
        digits, lambda: models.build("mlp", (64,), 10), rif.Recipe(epochs=15),
        rif.Recipe(epochs=400, optimizer="adamw", lr=2e-3, schedule="constant", weight_decay=0, accuracy=0.995),
    )  # fmt: skip
    fmnist = (
        fashion, lambda: models.cnn((1, 28, 28), 10, width=8).eval(), rif.Recipe(epochs=6),
        rif.Recipe(epochs=150, optimizer="adamw", lr=2e-3, weight_decay=0, accuracy=0.995),
    )  # fmt: skip
    colour = (
        cifar, lambda: models.resnet18((3, 32, 32), 10, width=16).eval(), rif.Recipe(epochs=10),
        rif.Recipe(epochs=60, optimizer="adamw", lr=2e-3, weight_decay=0, accuracy=0.995),
    )  # fmt: skip
    kinds: dict[str, Callable[[rif.Samples, int], Poisoned[rif.Samples]]] = {
        "sym20": lambda data, seed: noise.uniform(data, 0.2, seed=seed),
        "sym40": lambda data, seed: noise.uniform(data, 0.4, seed=seed),
        "pair40": lambda data, seed: noise.pair(data, 0.4, seed=seed),
        "worst": human,
    }
    rows = [
        ("digits", small, "sym20"), ("digits", small, "sym40"), ("digits", small, "pair40"),
        ("fashion", fmnist, "sym20"), ("fashion", fmnist, "sym40"), ("fashion", fmnist, "pair40"),
        ("cifar10n", colour, "worst"),
    ]  # fmt: skip
    return {f"{name}-{kind}": Row(load, kinds[kind], model, early, late) for name, (load, model, early, late), kind in rows}


ROWS = _rows()
#: These look at the data and at fresh models only, so both regimes share their result.
REGIME_FREE = ("random", "knn", "confident-learning", "valid-only", "label-odds")


def estimators(row: Row, seed: int) -> list[Estimator]:
    """The detectors of the table, in its order. VM, FVM and tuned loss start at parameters that were tuned once for each."""
    zero = rif.Tuning(steps=0)
    return [
        rif.Random(seed), rif.Loss(), rif.InnerProduct(), rif.Ensemble(seed=seed), rif.InnerProduct(normalise="cosine"), rif.GradNorm(),
        rif.FlatMinima(replace(zero, flatness=rif.Plain())), rif.FlatMinima(zero), rif.TunedLoss(zero), rif.ValidationLoss(seed=seed),
        ConfidentLearning(replace(row.early, seed=seed), seed=seed), NearestNeighbours(), rif.LabelOdds(seed=seed),
    ]  # fmt: skip


def run(name: str, seeds: range, regimes: tuple[str, ...], only: tuple[str, ...]) -> None:
    row, path = ROWS[name], RESULTS / f"{name}.jsonl"
    RESULTS.mkdir(exist_ok=True)
    known = {(r["regime"], r["seed"], r["estimator"]) for r in map(json.loads, path.read_text().splitlines())} if path.is_file() else set()
    for seed in seeds:
        train, valid, test = row.load(seed)
        poisoned = row.poison(train, seed)
        for regime in regimes:
            todo = [e for e in estimators(row, seed) if (regime, seed, e.name) not in known and (not only or e.name in only)]
            if not todo:
                continue
            start = rif.Task(row.model()).reset(seed)
            recipe = replace(getattr(row, regime), seed=seed)
            state = rif.train(start, poisoned.data, recipe)[-1].state if any(e.name not in REGIME_FREE for e in todo) else {}
            trained, target = start.at(state), rif.Utility(valid)
            fit = {"train_accuracy": accuracy(trained, poisoned.data), "test_accuracy": accuracy(trained, test)} if state else {}
            tuned: dict[str, tuple[rif.Task, float]] = {}
            for estimator in todo:
                task, extra = trained, 0.0
                if estimator.name in ("vm", "fvm", "tuned-loss"):
                    flatness = rif.Plain() if estimator.name == "vm" else rif.LowPass()
                    key = repr(flatness)
                    if key not in tuned:
                        begin = time.perf_counter()
                        tuned[key] = (trained.at(rif.Tuning(flatness=flatness, seed=seed).run(trained, target)), time.perf_counter() - begin)
                    task, extra = tuned[key]
                scores = estimator.score(task, poisoned.data, target=target)
                found = detection(scores, poisoned.mask, replicates=0)
                record = {
                    "row": name, "regime": regime, "seed": seed, "estimator": estimator.name, "auroc": found.auroc,
                    "average_precision": found.average_precision, "tpr_at_1_fpr": found.tpr_at_1_fpr,
                    "seconds": scores.provenance["seconds"] + extra, "noise": float(poisoned.mask.mean()), "n": len(train), **fit,
                }  # fmt: skip
                for each in regimes if estimator.name in REGIME_FREE else (regime,):
                    with path.open("a") as file:
                        file.write(json.dumps({**record, "regime": each}) + "\n")
                    known.add((each, seed, estimator.name))
                print(f"{name} {regime} seed {seed} {estimator.name:20s} AUROC {found.auroc:.4f}  {record['seconds']:.1f} s", flush=True)


def table(data: str) -> str:
    """Mean ± standard deviation of the AUROC over seeds on one data set, estimators down, noise and regimes across; the best in bold."""
    records = pd.DataFrame([json.loads(line) for path in sorted(RESULTS.glob(f"{data}-*.jsonl")) for line in path.read_text().splitlines()])
    records["column"] = records["row"] + " " + records["regime"]
    order = [estimator.name for estimator in estimators(next(iter(ROWS.values())), 0)]
    columns = [f"{row} {regime}" for row in ROWS for regime in ("early", "memorised") if f"{row} {regime}" in set(records["column"])]
    groups = records.groupby(["estimator", "column"])["auroc"]
    mean, std, seeds = groups.mean().unstack(), groups.std().unstack(), groups.count().unstack()
    lines = ["| detector | " + " | ".join(column.removeprefix(f"{data}-") for column in columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name in order:
        cells = []
        for column in columns:
            if name not in mean.index or np.isnan(mean.loc[name, column]):
                cells.append("")
                continue
            best = mean.loc[name, column] == mean[column].max()
            text = f"{mean.loc[name, column]:.3f} ± {std.loc[name, column]:.3f}" if seeds.loc[name, column] > 1 else f"{mean.loc[name, column]:.3f}"
            cells.append(f"**{text}**" if best else text)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    fits = records[~records["estimator"].isin(REGIME_FREE)].groupby("column")[["train_accuracy", "test_accuracy"]].mean().reindex(columns)
    lines.append("| *training accuracy* | " + " | ".join(f"{fits.loc[c, 'train_accuracy']:.3f}" for c in columns) + " |")
    lines.append("| *test accuracy* | " + " | ".join(f"{fits.loc[c, 'test_accuracy']:.3f}" for c in columns) + " |")
    lines.append("| *seeds* | " + " | ".join(str(int(seeds[c].max())) for c in columns) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("row", nargs="*", choices=[*ROWS, []], help="rows to run")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--regimes", nargs="+", default=["early", "memorised"], choices=["early", "memorised"])
    parser.add_argument("--only", nargs="*", default=[], help="only these estimators")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--table", action="store_true", help="print the table of all results")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for each in args.row:
        run(each, range(args.seeds), tuple(args.regimes), tuple(args.only))
    if args.table or not args.row:
        for data in dict.fromkeys(name.split("-")[0] for name in ROWS):
            if any(RESULTS.glob(f"{data}-*.jsonl")):
                print(table(data), end="\n\n")
