"""Poison against fairness: which score finds it, and whether its removal brings the gap between groups back to the clean model's.

    python benchmarks/fairness_poisoning.py                  all rows, ten seeds, then the tables
    python benchmarks/fairness_poisoning.py raa --seeds 3    one row
    python benchmarks/fairness_poisoning.py --markdown       the tables of all rows that have been run

The victim is logistic regression at its optimum. Rows without a data set's name are synthetic, 1,500 samples with 10 % poison; the others are the
attacks that their authors ran on COMPAS, Drug Consumption and German Credit, read from the folder that ROBUST_IF_DATA names, with half of the test
split, drawn by the seed, as the defender's validation data. The attacker has held-out data of their own. The gap is P(ŷ = 1 | s = 1) −
P(ŷ = 1 | s = 0) of decisions on test data. Label odds are trained for fewer epochs, folds and rounds than by default, since the model is linear. Each
(row, seed, score) is appended to ``benchmarks/results/fairness_poisoning.jsonl``; seeds that are there are not run again.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np
import pandas as pd
import torch
from scipy.stats import rankdata
from sklearn.linear_model import LogisticRegression

import robust_if as rif
from robust_if.attacks import fairness, labels
from robust_if.attacks.evasion import FGSM, Threat
from robust_if.attacks.poisoned import Poisoned
from robust_if.attacks.targets import AdversarialLoss
from robust_if.estimators import Estimator
from robust_if.estimators.base import Job, Result
from robust_if.estimators.label_odds import estimate_noise
from robust_if.evaluations.detection import detection
from robust_if.fairness.targets import FairnessGap

DATA = Path(os.environ.get("ROBUST_IF_DATA", "../shared/data"))
PATH = Path(__file__).parent / "results" / "fairness_poisoning.jsonl"
#: The L2 penalty λ/2 ‖θ‖² of the victim, which is also the damping of the exact inverse.
PENALTY = 1e-3
RATE = 0.1


def draw(n: int, rng: np.random.Generator) -> rif.Samples:
    """Two groups that differ in two of eight features; the sensitive feature is the ninth."""
    s = rng.integers(2, size=n)
    x = rng.normal(size=(n, 8))
    x[:, :2] += 0.55 * (s[:, None] - 0.5)
    y = x.sum(1) / np.sqrt(2) + 0.27 * rng.logistic(size=n) > 0
    return rif.Samples((torch.from_numpy(np.c_[x, s - 0.5]), torch.from_numpy(y.astype(np.int64)), torch.from_numpy(s)))


def parity(data: rif.Samples) -> FairnessGap:
    """The gap between the groups' mean probabilities."""
    return FairnessGap(data, notion="demographic_parity", temperature=1.0, smallest=1)


def fit(data: rif.Samples, penalty: float = PENALTY) -> rif.Task:
    """Logistic regression with two outputs at the optimum of mean loss + ``penalty``/2 ‖θ‖²."""
    x, y = (tensor.numpy() for tensor in data.batch(slice(None))[:2])
    strength = 2 / (penalty * len(y))  # the two outputs share the weights, ±w/2
    found = LogisticRegression(C=strength, fit_intercept=False, solver="newton-cholesky", tol=1e-8, max_iter=200).fit(np.c_[x, np.ones(len(x))], y)
    w = torch.from_numpy(found.coef_[0]) / 2
    model = torch.nn.Linear(x.shape[1], 2).double()
    model.load_state_dict({"weight": torch.stack([-w[:-1], w[:-1]]), "bias": torch.stack([-w[-1], w[-1]])})
    return rif.Task(model.eval())


def measure(task: rif.Task, test: rif.Samples) -> dict[str, float]:
    """Accuracy, gap in decisions, and gap in decisions among the favourable."""
    x, y, s = test.batch(slice(None))
    with torch.no_grad():
        p = task.model(x).argmax(1)
    gap, opportunity = (float(p[(s == 1) & rows].double().mean() - p[(s == 0) & rows].double().mean()) for rows in (y >= 0, y == 1))
    found = {"accuracy": float((p == y).double().mean()), "gap": gap, "opportunity": opportunity}
    return {name: round(value, 5) for name, value in found.items()}


@dataclass(frozen=True)
class GroupOdds(Estimator):
    """Label odds with a noise matrix per group: log P(label wrong) / P(label right) from a model trained on validation data alone."""

    units: ClassVar = "log-odds"
    name: ClassVar = "group-odds"

    def estimate(self, job: Job) -> Result:
        (valid,) = job.target.held_out
        x, y, s = (tensor.numpy() for tensor in job.samples.batch(slice(None)))
        with torch.no_grad():
            log_p = torch.log_softmax(fit(valid, 5 / len(valid)).model(torch.from_numpy(x)), 1).numpy()
        odds = np.empty(len(y))
        for group in (0, 1):
            rows = np.flatnonzero(s == group)
            joint, _ = estimate_noise(log_p[rows], y[rows])
            odds[rows] = joint[np.arange(len(rows)), 1 - y[rows]] - joint[np.arange(len(rows)), y[rows]]
        return Result(odds)


@dataclass(frozen=True)
class Known(Estimator):
    """Scores that are there already."""

    scores: rif.Scores
    needs_target: ClassVar[bool] = False

    @property
    def units(self) -> rif.scores.Units:  # type: ignore[override]
        return self.scores.units

    @property
    def name(self) -> str:
        return self.scores.estimator

    def estimate(self, job: Job) -> Result:
        return Result(self.scores.values)


def scores(task: rif.Task, data: rif.Samples, valid: rif.Samples, seed: int) -> dict[str, rif.Scores]:
    """Every score of the table by name."""
    targets = {"utility": rif.Utility(valid), "parity": parity(valid), "adversarial": AdversarialLoss(valid, FGSM(Threat(0.1)))}
    exact, utility = rif.Exact("hessian", PENALTY), targets["utility"]
    influence = dict(zip(targets, rif.InnerProduct(exact).score(task, data, target=targets), strict=True))
    cosines = dict(zip(targets, rif.InnerProduct(exact, normalise="cosine").score(task, data, target=targets), strict=True))
    short = rif.Recipe(epochs=10, lr=0.05, optimizer="adamw", weight_decay=0.0, batch_size=256)
    start = rif.Recipe(epochs=60, lr=0.05, optimizer="adamw", weight_decay=0.0, batch_size=128)
    others: list[Estimator] = [
        rif.SelfInfluence(), rif.Loss(), rif.Random(seed), rif.LabelOdds(1, 3, starts=1, recipe=short, start_recipe=start, seed=seed), GroupOdds(),
    ]  # fmt: skip
    found = {f"influence, {name}": each for name, each in influence.items()} | {f"cosine, {name}": cosines[name] for name in ("utility", "parity")}
    found |= {each.name: each.score(task, data, target=utility) for each in others}
    found["valid-only"] = rif.Loss().score(fit(valid, 5 / len(valid)), data)
    ranks = {name: rankdata(each.values) for name, each in found.items()}
    for one, other in (("influence, utility", "influence, parity"), ("influence, utility", "valid-only")):
        both = f"ranks of {one} + {other.removeprefix('influence, ')}"
        found[both] = rif.Scores(ranks[one] + ranks[other], data.ids, both)
    for name in ("influence, utility", "valid-only", "group-odds"):
        found[f"{name}, joined"] = rif.Joined(Known(found[name])).score(task, data)
    return found


def automatic(found: dict[str, rif.Scores], name: str) -> np.ndarray:
    """Weights of the automatic rule; joined group odds remove what either the odds or their sums over near duplicates tell apart."""
    if name == "perfect":
        return 1 - found[name].values
    weights = rif.remove_automatic(found[name])
    return np.minimum(weights, rif.remove_automatic(found["group-odds"])) if name == "group-odds, joined" else weights


@dataclass(frozen=True)
class Problem:
    """One poisoned training set with what the defender and the judge have; ``poisoned`` is ``None`` where nothing is wrong."""

    clean: rif.Samples
    poisoned: Poisoned[rif.Samples] | None
    valid: rif.Samples
    test: rif.Samples


def synthetic(poison: Callable[[rif.Samples, rif.Samples, int], Poisoned[rif.Samples]] | None, seed: int) -> Problem:
    rng = np.random.default_rng(seed)
    clean, valid, test, own = (draw(n, rng) for n in (1500, 500, 5000, 500))
    return Problem(clean, poison(clean, own, seed) if poison else None, valid, test)


def published(attack: str, data: str, seed: int) -> Problem:
    folder = DATA / "fair_poison_anchoring"
    file, masks = np.load(folder / f"{attack}_{data}.npz"), np.load(folder / "poison_masks.npz")
    clean, poisoned, test = (rif.as_samples(tuple(file[f"{part}_{split}"] for part in "Xys")) for split in ("train_clean", "train_adv", "test"))
    order = np.random.default_rng(seed).permutation(len(test))
    half = len(order) // 2
    return Problem(clean, Poisoned(poisoned, masks[f"{attack}_{data}"]), test.take(order[:half]), test.take(order[half:]))


ATTACKS: dict[str, Callable[[rif.Samples, rif.Samples, int], Poisoned[rif.Samples]]] = {
    "random-flips": lambda data, _, seed: labels.uniform(data, RATE, seed=seed),
    "boundary-flips": lambda data, _, seed: labels.boundary(data, RATE, fit(data)),
    "group-flips": lambda data, _, seed: fairness.group_flips(data, RATE, seed=seed),
    "influence-flips": lambda data, own, seed: labels.influence_chosen(data, RATE, fit(data), parity(own)),
    "raa": lambda data, _, seed: fairness.anchoring(data, RATE, seed=seed, quantile=None),
    "nraa": lambda data, _, seed: fairness.anchoring(data, RATE, seed=seed, radius=1.5, quantile=None),
    "raa-feasible": lambda data, _, seed: fairness.anchoring(data, RATE, seed=seed),
    "nraa-feasible": lambda data, _, seed: fairness.anchoring(data, RATE, seed=seed, radius=1.5),
    "influence-attack": lambda data, own, seed: fairness.influence_attack(
        data, RATE, rif.Utility(own) + fairness.GroupCovariance(own), fit, seed=seed, steps=20
    ),
}
ROWS: dict[str, Callable[[int], Problem]] = {
    "no-poison": partial(synthetic, None),
    **{name: partial(synthetic, poison) for name, poison in ATTACKS.items()},
    **{f"{attack}-{data}": partial(published, attack, data) for data in ("compas", "drug", "german") for attack in ("raa", "nraa")},
}


def run(row: str, seeds: int) -> None:
    """Append what is not known yet."""
    known = set(pd.read_json(PATH, lines=True)[["row", "seed"]].itertuples(index=False, name=None)) if PATH.is_file() else set()
    for seed in range(seeds):
        if (row, seed) in known:
            continue
        problem = ROWS[row](seed)
        data = problem.clean if problem.poisoned is None else problem.poisoned.data
        mask = np.zeros(len(data), dtype=bool) if problem.poisoned is None else problem.poisoned.mask
        task = fit(data)
        before = {"clean": measure(fit(problem.clean), problem.test), "attacked": measure(task, problem.test)}
        found = scores(task, data, problem.valid, seed)
        if mask.any():
            found["perfect"] = rif.Scores(mask.astype(float), data.ids, "perfect")
        records: list[dict[str, object]] = [{"row": row, "seed": seed, "n": len(data), "poison": int(mask.sum()), **before}]
        for name, each in found.items():
            record = {"row": row, "seed": seed, "score": name}
            if mask.any():
                quality = detection(each, mask, replicates=0)
                record |= {key: round(getattr(quality, key), 5) for key in ("auroc", "average_precision", "tpr_at_1_fpr")}
                weights = rif.remove_top(each, k=int(mask.sum()))
                record["removed"] = measure(fit(data.take(weights > 0)), problem.test)
                relabelled = data.with_labels(rif.relabel(data.labels, 1 - data.labels, weights))
                record["relabelled"] = measure(fit(relabelled), problem.test)
            kept = automatic(found, name) > 0
            record["automatic"] = measure(fit(data.take(kept)), problem.test) | {"count": int((~kept).sum()), "poison": int((mask & ~kept).sum())}
            records.append(record)
        PATH.parent.mkdir(exist_ok=True)
        with PATH.open("a") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)
        print(f"{row} seed {seed}: gap {before['clean']['gap']:.3f} -> {before['attacked']['gap']:.3f}", flush=True)


def tables() -> str:
    """Markdown, scores down and rows across, means over seeds. Bold is the best; for gaps the smallest mean distance from the clean model's gap."""
    lines = [json.loads(line) for line in PATH.read_text().splitlines()]
    runs = pd.json_normalize([line for line in lines if "score" not in line])
    records = pd.json_normalize([line for line in lines if "score" in line]).merge(runs, on=["row", "seed"])
    for kind in ("removed", "relabelled", "automatic"):
        records[f"{kind}.distance"] = (records[f"{kind}.gap"] - records["clean.gap"]).abs()
    rows = [row for row in ROWS if row in set(records["row"])]
    mean = records.groupby(["score", "row"]).mean(numeric_only=True)
    order = list(dict.fromkeys(records["score"]))
    poisoned = [row for row in rows if row != "no-poison"]

    def block(title: str, cell: Callable[[pd.Series], str], columns: list[str], key: Callable[[pd.Series], float] | None) -> str:
        lines = [f"{title}\n", "| score | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
        best = {c: min(key(mean.loc[s, c]) for s in order if s != "perfect" and (s, c) in mean.index) if key else None for c in columns}
        for score in order:
            cells = []
            for column in columns:
                if (score, column) not in mean.index:
                    cells.append("")
                    continue
                text = cell(mean.loc[score, column])
                cells.append(f"**{text}**" if key and score != "perfect" and key(mean.loc[score, column]) <= best[column] + 5e-4 else text)
            lines.append(f"| {score} | " + " | ".join(cells) + " |")
        return "\n".join(lines)

    first = [mean.loc["loss", row] for row in rows]
    head = ["| model | " + " | ".join(rows) + " |", "|---" * (len(rows) + 1) + "|"]
    for name in ("clean", "attacked"):
        head.append(f"| {name}: accuracy, gap | " + " | ".join(f"{m[f'{name}.accuracy']:.3f}, {m[f'{name}.gap']:.3f}" for m in first) + " |")
    head.append("| *seeds* | " + " | ".join(str(records[records["row"] == row]["seed"].nunique()) for row in rows) + " |")

    def distance(kind: str) -> Callable[[pd.Series], float]:
        return lambda m: m[f"{kind}.distance"]

    return "\n\n".join([
        "\n".join(head),
        block("AUROC", lambda m: f"{m['auroc']:.3f}", poisoned, lambda m: -m["auroc"]),
        block("Average precision, share found at 1 % false positives",
              lambda m: f"{m['average_precision']:.2f}, {m['tpr_at_1_fpr']:.2f}", poisoned, None),
        block("Accuracy and gap after removing as many as are poisoned",
              lambda m: f"{m['removed.accuracy']:.3f}, {m['removed.gap']:.3f}", poisoned, distance("removed")),
        block("Accuracy and gap after giving as many as are poisoned the other label",
              lambda m: f"{m['relabelled.accuracy']:.3f}, {m['relabelled.gap']:.3f}", poisoned, distance("relabelled")),
        block("Accuracy and gap after removal by the automatic rule (samples removed, poison among them)",
              lambda m: f"{m['automatic.accuracy']:.3f}, {m['automatic.gap']:.3f} ({m['automatic.count']:.0f}, {m['automatic.poison']:.0f})",
              rows, distance("automatic")),
    ])  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("row", nargs="*", choices=[*ROWS, []], help="rows to run; all by default")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table", "--markdown", action="store_true", help="only print the tables of all results")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if not args.table:
        for each in args.row or ROWS:
            run(each, args.seeds)
    print(tables())
