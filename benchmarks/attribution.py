"""How well scores predict what retraining does to a target: LDS on random halves of the data, and leave-one-out where the minimum is exact.

    python benchmarks/attribution.py digits-logistic              one row
    python benchmarks/attribution.py digits-logistic --quick      the same on a few subsets, printed only
    python benchmarks/attribution.py --table                      the tables of all results

One JSON line per (row, target, estimator) is appended to ``benchmarks/results/attribution.jsonl`` as soon as it is known; finished ones are not run
again. Retrained models' targets are kept under ``runs/attribution``, so that further estimators cost no retraining and a run that was stopped
goes on. Adult is read from the folder that ROBUST_IF_DATA names.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd
import torch
from scipy.stats import spearmanr

import robust_if as rif
from robust_if import models
from robust_if.attacks.evasion import PGD, Threat
from robust_if.attacks.targets import AdversarialLoss
from robust_if.estimators import Estimator
from robust_if.evaluations.attribution import lds, leave_one_out, loo_correlation
from robust_if.evaluations.retraining import Converged, FromScratch, half_subsets, retrain
from robust_if.fairness.targets import FairnessGap
from robust_if.targets import Target

DATA = Path(os.environ.get("ROBUST_IF_DATA", "../shared/data"))
RESULTS = Path(__file__).parent / "results" / "attribution.jsonl"
CACHE = Path("runs") / "attribution"


@dataclass(frozen=True)
class Row:
    """One row: data, model, how it is trained, and how much is retrained. Leave-one-out only where the minimum is exact."""

    load: Callable[[], tuple[rif.Samples, rif.Samples]]
    targets: Callable[[rif.Samples], list[Target]]
    model: Callable[[], torch.nn.Module]
    fit: Converged | FromScratch
    subsets: int = 100
    seeds: tuple[int, ...] = (0,)
    left_out: int = 0

    @property
    def l2(self) -> float:
        """The penalty l2/2 ‖θ‖² of the training objective, which belongs to its Hessian."""
        return self.fit.l2 if isinstance(self.fit, Converged) else self.fit.recipe.weight_decay


def estimators(row: Row) -> dict[str, Estimator]:
    """What is compared, in the order of the table."""
    return {
        "random": rif.Random(),
        "loss": rif.Loss(),
        "self-influence": rif.SelfInfluence(),
        "ip": rif.InnerProduct(),
        "ip-cosine": rif.InnerProduct(normalise="cosine"),
        "ip-ensemble": rif.Ensemble(),
        "loss-change": rif.LossChange(),
        "fvm": rif.FlatMinima(),
        **preconditioned(row),
    }


def preconditioned(row: Row) -> dict[str, Estimator]:
    """Influence with curvature: the penalty of a convex row is its damping; networks get the automatic one, and two larger ones."""
    if isinstance(row.fit, Converged):
        solvers = [rif.Exact("hessian", damping=row.l2), *curvatures(row.l2)]
        return {each.name: rif.InnerProduct(each) for each in solvers}
    automatic = {each.name: rif.InnerProduct(each) for each in curvatures(None)}
    return automatic | {f"{each.name}, λ = {damping:g}": rif.InnerProduct(each) for damping in (0.01, 0.1) for each in curvatures(damping)}


def curvatures(damping: float | None) -> list[rif.Preconditioner]:
    return [
        rif.DiagonalFisher(damping=damping), rif.RandomProjection(damping=damping), rif.DataInf(damping=damping), rif.KFAC(damping=damping),
        rif.EKFAC(damping=damping), rif.Arnoldi(damping=damping), rif.LiSSA(damping=damping), rif.ConjugateGradient(damping=damping),
        rif.ConjugateGradient(damping=damping, iterations=10, preconditioner=rif.EKFAC(damping=damping)),
    ]  # fmt: skip


def adult() -> tuple[rif.Samples, rif.Samples]:
    """2,000 training and 1,000 validation rows of Adult, ``(x, income above 50K, male)``: numbers standardised, categories one-hot."""
    names = "age workclass fnlwgt education education-num marital-status occupation relationship race sex capital-gain capital-loss hours-per-week"
    columns = [*names.split(), "native-country", "income"]
    frame = pd.read_csv(DATA / "adult" / "adult.data.gz", header=None, names=columns, skipinitialspace=True, na_values="?")
    categories = pd.get_dummies(frame[["workclass", "marital-status", "occupation", "relationship", "race", "sex"]]).astype(float)
    frame = frame.iloc[np.random.default_rng(0).permutation(len(frame))[:3000]]
    numbers = frame[["age", "education-num", "capital-gain", "capital-loss", "hours-per-week"]].astype(float)
    numbers = (numbers - numbers[:2000].mean()) / numbers[:2000].std()
    x = torch.from_numpy(pd.concat([numbers, categories.loc[frame.index]], axis=1).to_numpy(np.float32))
    y, s = (torch.from_numpy((frame[name] == value).to_numpy(np.int64)) for name, value in (("income", ">50K"), ("sex", "Male")))
    return halves(rif.Samples((x, y, s), frame.index.to_numpy()), 2000)


def digits(shape: tuple[int, ...] = (64,)) -> tuple[rif.Samples, rif.Samples]:
    """1,000 training and 500 validation images of scikit-learn's digits."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))[:1500]
    images = torch.from_numpy((x[order] / 16).astype(np.float32)).view(-1, *shape)
    return halves(rif.Samples((images, torch.from_numpy(y[order]).long()), order), 1000)


def halves(whole: rif.Samples, n: int) -> tuple[rif.Samples, rif.Samples]:
    return whole.take(np.arange(n)), whole.take(np.arange(n, len(whole)))


def adult_targets(valid: rif.Samples) -> list[Target]:
    parity = FairnessGap(valid, notion="demographic_parity", temperature=1.0, smallest=1)
    return [rif.Utility(valid), parity, AdversarialLoss(valid, PGD(Threat(0.1)))]


def digits_targets(valid: rif.Samples) -> list[Target]:
    return [rif.Utility(valid), AdversarialLoss(valid, PGD(Threat(0.1, bounds=(0.0, 1.0))))]


NET = FromScratch(rif.Recipe(epochs=20, weight_decay=1e-3))
ROWS = {
    "adult-logistic": Row(adult, adult_targets, lambda: models.build("logistic-regression", (47,), 2), Converged(1e-3), left_out=100),
    "digits-logistic": Row(digits, digits_targets, lambda: models.build("logistic-regression", (64,), 10), Converged(1e-2), left_out=100),
    "adult-mlp": Row(adult, adult_targets, lambda: models.mlp((47,), 2, width=32).eval(), NET, 64, (0, 1, 2, 3)),
    "digits-mlp": Row(digits, digits_targets, lambda: models.mlp((64,), 10, width=64).eval(), NET, 64, tuple(range(12))),
    "digits-cnn": Row(lambda: digits((1, 8, 8)), digits_targets, lambda: models.cnn((1, 8, 8), 10, width=8).eval(), NET, 64, tuple(range(12))),
}


@dataclass(frozen=True)
class Truth:
    """What retraining says: values ``(m, s, t)`` on subsets ``(m, n)``, effects ``(k, t)`` of leaving ``which`` ``(k,)`` out, and models on all."""

    subsets: np.ndarray
    values: np.ndarray
    which: np.ndarray
    effects: np.ndarray
    trained: list[rif.Task]

    def record(self, scores: np.ndarray, t: int) -> dict[str, object]:
        """LDS with its interval, leave-one-out correlations where there are some, and how well the seeds agree on the target."""
        found = lds(scores, self.subsets, self.values[:, :, t].mean(1))
        pairs = [spearmanr(self.values[:, a, t], self.values[:, b, t]).statistic for a, b in combinations(range(self.values.shape[1]), 2)]
        record: dict[str, object] = {"lds": asdict(found), "agreement": float(np.mean(pairs)) if pairs else None, "pearson": None, "spearman": None}
        if len(self.which):
            correlations = loo_correlation(scores[self.which], self.effects[:, t])
            record |= {name: asdict(each) for name, each in zip(("pearson", "spearman"), correlations, strict=True)}
        return record


def truth(row: Row, train: rif.Samples, targets: list[Target], directory: Path) -> Truth:
    n, task = len(train), rif.Task(row.model()).reset(0)
    subsets = half_subsets(n, row.subsets, seed=0)
    which = np.random.default_rng(1).permutation(n)[: row.left_out]
    values = retrain(task, train, targets, row.fit, subsets, seeds=row.seeds, directory=directory)
    effects = leave_one_out(task, train, targets, row.fit, which=which, seeds=row.seeds, directory=directory) if len(which) else np.zeros(0)
    return Truth(subsets, values, which, effects, [row.fit(task, train, np.ones(n), seed) for seed in row.seeds])


def run(name: str, row: Row, directory: Path, results: Path, only: tuple[str, ...]) -> None:
    results.parent.mkdir(parents=True, exist_ok=True)
    known = {(r["row"], r["target"], r["estimator"]) for r in map(json.loads, results.read_text().splitlines())} if results.is_file() else set()
    train, valid = row.load()
    targets = row.targets(valid)
    todo = [
        (t, label, estimator) for t, target in enumerate(targets) for label, estimator in estimators(row).items()
        if (name, target.name, label) not in known and (not only or label in only)
    ]  # fmt: skip
    if not todo:
        return
    begin = time.perf_counter()
    true = truth(row, train, targets, directory)
    print(f"{name}: retraining took {time.perf_counter() - begin:.0f} s", flush=True)
    for t, label, estimator in todo:
        scores = [estimator.score(task, train, target=targets[t]) for task in true.trained]
        record = {
            "row": name, "target": targets[t].name, "estimator": label, **true.record(np.mean([each.values for each in scores], axis=0), t),
            "seconds": sum(each.provenance["seconds"] for each in scores), "n": len(train), "subsets": len(true.subsets), "seeds": len(row.seeds),
            "left_out": len(true.which),
        }  # fmt: skip
        with results.open("a") as file:
            file.write(json.dumps(record) + "\n")
        print(f"{name} {targets[t].name:20s} {label:20s} {cell(record)}  {record['seconds']:.1f} s", flush=True)


def cell(record: dict[str, object]) -> str:
    """LDS with its interval, then the leave-one-out Pearson correlation where it was measured."""
    found, loo = record["lds"], record["pearson"]
    text = f"{found['value']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"  # type: ignore[index]
    return text + (f", {loo['value']:.3f}" if isinstance(loo, dict) else "")


def table(results: Path) -> str:
    """One table per target: LDS [95 % interval], leave-one-out Pearson correlation; estimators down, rows across."""
    records = [json.loads(line) for line in results.read_text().splitlines()]
    blocks = []
    for target in dict.fromkeys(record["target"] for record in records):
        own = {(record["row"], record["estimator"]): record for record in records if record["target"] == target}
        rows = [name for name in ROWS if any(row == name for row, _ in own)]
        labels = list(dict.fromkeys(label for _, label in own))
        lines = [f"{target}: LDS [95 % interval], leave-one-out r", ""]
        lines += ["| estimator | " + " | ".join(rows) + " |", "|---" * (len(rows) + 1) + "|"]
        for label in labels:
            lines.append(f"| {label} | " + " | ".join(cell(own[row, label]) if (row, label) in own else "" for row in rows) + " |")
        agreement = [next(record["agreement"] for (name, _), record in own.items() if name == row) for row in rows]
        lines.append("| *agreement of two seeds* | " + " | ".join("exact" if each is None else f"{each:.3f}" for each in agreement) + " |")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def quick(name: str, only: tuple[str, ...]) -> None:
    """A row on 5 subsets, 2 seeds at most and 4 samples left out; nothing is kept."""
    row = ROWS[name]
    small = Row(row.load, row.targets, row.model, row.fit, 5, row.seeds[:2], min(row.left_out, 4))
    with TemporaryDirectory() as folder:
        run(name, small, Path(folder) / "cache", Path(folder) / "results.jsonl", only)
        print(table(Path(folder) / "results.jsonl"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("row", nargs="*", choices=[*ROWS, []], help="rows to run")
    parser.add_argument("--only", nargs="*", default=[], help="only these estimators")
    parser.add_argument("--threads", type=int, default=1, help="one by default: another number may change the last digits, and so what is kept")
    parser.add_argument("--quick", action="store_true", help="only a few subsets, printed and not kept")
    parser.add_argument("--table", action="store_true", help="print the tables of all results")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for each in args.row:
        if args.quick:
            quick(each, tuple(args.only))
        else:
            run(each, ROWS[each], CACHE / each, RESULTS, tuple(args.only))
    if (args.table or not args.row) and RESULTS.is_file():
        print(table(RESULTS))
