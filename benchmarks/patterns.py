"""Which kinds of training samples make the gap: the search for patterns on German Credit and Adult.

    python benchmarks/patterns.py                 all rows, then the table
    python benchmarks/patterns.py german          one row
    python benchmarks/patterns.py --markdown      the table of what has been run

``gopher`` is the published protocol of Gopher (Pradhan et al. 2022, arXiv 2112.09745) on German Credit: 800 / 200 samples, 31 ordinal and dummy
features, 100 full-batch steps of gradient descent with momentum, which do not reach the optimum, the gap in mean probabilities between those from 45
years on and the others *on the test set*, and the second-order formula with a penalty that is counted per sample. It looks at test data to choose
what to remove, so its numbers show that the search is the same and no more. The published patterns were confirmed by training on from one to the
next, as in ``gopher``; ``gopher, anew`` trains each from the start. Their code keeps triples and longer patterns that do not beat those they are
joined from, which the paper prunes; ``gopher`` keeps all, ``gopher, pruned`` follows the paper. The other rows are the product: logistic regression
at its optimum and the gap in decisions on validation data; the last gap is that on test data, which nothing has looked at. German has 200 validation
samples, too few: random sets do nearly as much as the patterns. Data are read from the folder that ROBUST_IF_DATA names. Each pattern is appended to
``benchmarks/results/patterns.jsonl``.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from sklearn.model_selection import train_test_split

import robust_if as rif
from robust_if.fairness.logistic import Logistic, logistic_loss
from robust_if.fairness.patterns import Pattern, collect_more, find_patterns
from robust_if.fairness.predicates import Predicate
from robust_if.fairness.targets import fairness_gap
from robust_if.targets import Target

DATA = Path(os.environ.get("ROBUST_IF_DATA", "../shared/data"))
PATH = Path(__file__).parent / "results" / "patterns.jsonl"

#: What Gopher's tutorial notebook prints: pattern, support, predicted and actual share of the gap, accuracy after.
PUBLISHED = (
    ("age ≥ 45 and sex = female", 0.05, 0.515989, 0.566519, 0.745),
    ("age ≥ 45 and credit history = critical account and sex = male", 0.0625, 0.407219, 0.433364, 0.755),
    (
        "checking account = below 0 and credit amount = up to 2000 and instalment rate = 4 and other instalments = none",
        0.065,
        0.285849,
        0.281938,
        0.755,
    ),
    ("duration = 13 to 24 and employment = 7 years or more and liable for = 1 and residence = 4", 0.05375, 0.228425, 0.227714, 0.740),
    ("credit history = paid back duly and housing = own and savings = below 100 and sex = female", 0.08, 0.330062, 0.323289, 0.760),
)
#: Columns of german.data: name, and the values of ordinal ones in their order; names alone are numbers, () are dummies.
GERMAN: dict[str, tuple[tuple[str, str], ...] | None] = {
    "checking account": (("A11", "below 0"), ("A12", "0 to 200"), ("A13", "200 or more"), ("A14", "none")),
    "duration": None,
    "credit history": (
        ("A34", "critical account"), ("A33", "delays"), ("A32", "paid back duly"), ("A31", "all here paid back"), ("A30", "none taken"),
    ),
    "purpose": (),
    "credit amount": None,
    "savings": (("A61", "below 100"), ("A62", "100 to 500"), ("A63", "500 to 1000"), ("A64", "1000 or more"), ("A65", "unknown or none")),
    "employment": (("A71", "none"), ("A72", "below 1 year"), ("A73", "1 to 4 years"), ("A74", "4 to 7 years"), ("A75", "7 years or more")),
    "instalment rate": None,
    "sex": (("A92", "female"), ("A91", "male"), ("A93", "male"), ("A94", "male")),
    "debtors": (("A101", "none"), ("A102", "co-applicant"), ("A103", "guarantor")),
    "residence": None,
    "property": (("A124", "none"), ("A123", "car"), ("A122", "savings agreement"), ("A121", "real estate")),
    "age": None,
    "other instalments": (("A143", "none"), ("A141", "bank or stores"), ("A142", "bank or stores")),
    "housing": (),
    "credits": None,
    "job": (("A171", "unskilled, non-resident"), ("A172", "unskilled"), ("A173", "skilled"), ("A174", "management")),
    "liable for": None,
    "telephone": (("A191", "none"), ("A192", "yes")),
    "foreign worker": (("A202", "no"), ("A201", "yes")),
}  # fmt: skip
PURPOSES = {
    "A40": "new car", "A41": "used car", "A42": "furniture", "A43": "radio, television", "A44": "appliances", "A45": "repairs", "A46": "education",
    "A48": "retraining", "A49": "business", "A410": "others", "A151": "rent", "A152": "own", "A153": "free",
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Problem:
    """Training samples with their readable form, and held-out data."""

    x: np.ndarray
    y: np.ndarray
    table: pd.DataFrame
    valid: tuple[np.ndarray, np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray, np.ndarray]
    features: Sequence[str]
    edges: dict[str, Sequence[float]] = field(default_factory=dict)


def german(share_valid: float) -> Problem:
    """German Credit with Gopher's 31 features and split; ``share_valid`` of the training samples are taken for validation, or the test data are."""
    raw = pd.read_csv(DATA / "german_credit" / "german.data", sep=" ", header=None, names=[*GERMAN, "label"])
    table, features = pd.DataFrame(index=raw.index), pd.DataFrame(index=raw.index)
    for name, values in GERMAN.items():
        if values is None:
            features[name] = raw[name]
            table[name] = raw[name] if name == "age" else raw[name].astype(str)
        elif not values:
            table[name] = raw[name].map(PURPOSES)
            for value in sorted(raw[name].unique()):
                features[f"{name}={PURPOSES[value]}"] = (raw[name] == value).astype(int)
        else:
            words = list(dict.fromkeys(word for _, word in values))
            table[name] = raw[name].map(dict(values))
            features[name] = table[name].map({word: at for at, word in enumerate(words)})
    for name, cuts, words in (
        ("credit amount", [2000, 5000], ["up to 2000", "2001 to 5000", "above 5000"]),
        ("duration", [12, 24, 36], ["up to 12", "13 to 24", "25 to 36", "above 36"]),
    ):
        features[name] = np.digitize(raw[name], cuts, right=True)
        table[name] = np.array(words)[features[name]]
    features["age"] = (raw["age"] >= 45).astype(int)
    last = ["sex", *(name for name in features if name.startswith(("purpose=", "housing=")))]
    features = features[[name for name in features if name not in last] + last]  # the order decides which initial weight a feature gets
    y, old = (raw["label"] == 1).to_numpy(dtype=np.int64), features["age"].to_numpy()
    rows, tests = train_test_split(np.arange(len(raw)), test_size=0.2, random_state=1)
    valid = tests
    if share_valid:
        rows, valid = train_test_split(rows, test_size=share_valid, random_state=1)
    x = features.to_numpy(dtype=np.float64)
    x = (x - x[rows].mean(0)) / np.where(x[rows].std(0) > 0, x[rows].std(0), 1)
    held = [(x[part], y[part], old[part]) for part in (valid, tests)]
    return Problem(x[rows], y[rows], table.iloc[rows].reset_index(drop=True), held[0], held[1], list(features), {"age": [45]})


def adult(label: bool = False) -> Problem:
    """Adult, official split, the last quarter of adult.data for validation; one-hot features; ``label`` puts the income into the table."""
    names = (
        "age workclass fnlwgt education education-num marital-status occupation relationship race sex capital-gain capital-loss hours country income"
    )
    frames = [
        pd.read_csv(DATA / "adult" / name, header=None, names=names.split(), skipinitialspace=True, na_values="?", skiprows=skip).dropna()
        for name, skip in (("adult.data.gz", 0), ("adult.test.gz", 1))
    ]
    whole = pd.concat(frames, ignore_index=True).drop(columns="fnlwgt")
    y = whole.pop("income").str.startswith(">50K").to_numpy(dtype=np.int64)
    s = (whole["sex"] == "Male").to_numpy(dtype=np.int64)
    numbers = whole.select_dtypes("number").columns
    features = pd.get_dummies(whole, columns=[name for name in whole if name not in numbers and name != "sex"], prefix_sep="=")
    features["sex"] = s
    x, n, known = features.to_numpy(dtype=np.float64), int(np.ceil(0.75 * len(frames[0]))), len(frames[0])
    x = (x - x[:n].mean(0)) / np.where(x[:n].std(0) > 0, x[:n].std(0), 1)
    table = whole.iloc[:n].copy()
    if label:
        table["income"] = np.where(y[:n], "above 50K", "up to 50K")
    return Problem(x[:n], y[:n], table, (x[n:known], y[n:known], s[n:known]), (x[known:], y[known:], s[known:]), list(features))


@dataclass(eq=False)
class Steps:
    """Gopher's learner: gradient descent that stops after 100 steps, and goes on where it stopped if ``onward``."""

    x: np.ndarray
    y: np.ndarray
    onward: bool
    penalty: float = 0.03

    @property
    def train(self) -> rif.Samples:
        return rif.Samples((torch.from_numpy(self.x), torch.from_numpy(self.y)))

    def fit(self, weights: Any = None, labels: Any = None, start: Any = None) -> Stopped:
        if start is None or not self.onward:
            torch.manual_seed(0)
            self.module = torch.nn.Linear(self.x.shape[1], 1).double()
            self.optimizer = torch.optim.SGD(self.module.parameters(), lr=0.05, momentum=0.9)
        kept = torch.ones(len(self.y), dtype=torch.bool) if weights is None else torch.as_tensor(np.asarray(weights)) > 0
        x, y = (tensor[kept] for tensor in self.train.tensors)
        for _ in range(100):
            p = torch.sigmoid(self.module(x))[:, 0]
            loss = -(torch.log(p + 1e-8) * y + torch.log(1 - p + 1e-8) * (1 - y)).mean()
            loss = loss + self.penalty * sum((value**2).sum() for value in self.module.parameters())
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        module = torch.nn.Linear(self.x.shape[1], 1).double()
        module.load_state_dict(self.module.state_dict())
        return Stopped(rif.Task(module.eval(), loss=logistic_loss), self, kept.numpy().astype(float), self.y)


@dataclass(frozen=True, eq=False)
class Stopped:
    """Where it stopped; its effects are those of :class:`MeanForm`, so it scores nothing itself."""

    task: rif.Task
    learner: Steps
    weights: np.ndarray
    labels: np.ndarray
    calibrated = True

    def values(self, targets: Sequence[Target]) -> list[float]:
        with torch.no_grad():
            return [float(target.value(self.task, self.task.params())) for target in targets]


class MeanForm:
    """Second-order effects where the penalty belongs to the mean loss: every sample carries its part of it away (Basu et al., as used by Gopher)."""

    def __init__(self, fitted: Stopped, target: Target) -> None:
        learner, params = fitted.learner, fitted.task.params()
        self.x = np.column_stack([learner.x, np.ones(len(learner.x))])
        with torch.no_grad():
            p = torch.sigmoid(fitted.task.model(torch.from_numpy(learner.x)))[:, 0].numpy()
        n, ridge = len(self.x), 2 * learner.penalty
        self.curvature, gradients = p * (1 - p), (p - learner.y)[:, None] * self.x
        slope = torch.cat([value.reshape(-1) for value in target.gradient(fitted.task, params).values()]).numpy()
        hessian = (self.x * self.curvature[:, None]).T @ self.x / n + ridge * np.eye(self.x.shape[1])
        self.slope, self.solved = slope, np.linalg.solve(hessian, slope)
        self.moves, self.ridge, self.n = np.linalg.solve(hessian, gradients.T).T, ridge, n

    def many(self, groups: np.ndarray) -> np.ndarray:
        inside, size = groups.astype(float), groups.sum(1)
        share, v = size / self.n, inside @ self.moves
        turned = (((v @ self.x.T) * inside) @ (self.curvature * (self.x @ self.solved)) + size * self.ridge * (v @ self.solved)) / self.n
        return -((1 - 2 * share) * (v @ self.slope) + turned) / (self.n * (1 - share) ** 2)

    few = many

    def emptied(self, group: np.ndarray) -> np.ndarray:
        return np.empty(0, dtype=int)


def gap(part: tuple[np.ndarray, np.ndarray, np.ndarray], temperature: float = 0.25) -> Target:
    """Demographic parity."""
    return fairness_gap("demographic_parity", part[:2], part[2], temperature=temperature, smallest=1)


class Named:
    """A target under another name."""

    def __init__(self, target: Target, name: str) -> None:
        self.target, self.name = target, name

    def __getattr__(self, name: str) -> Any:
        return getattr(self.target, name)


def gopher(onward: bool, prune: bool = False) -> tuple[list[Pattern], dict[str, float]]:
    problem = german(0)
    learner, target = Steps(problem.x, problem.y, onward), gap(problem.test, temperature=1)
    fitted = learner.fit()
    begin = time.perf_counter()
    effects = MeanForm(fitted, target)
    settings = {"fitted": fitted, "effects": effects, "edges": problem.edges, "prune": prune}
    find_patterns(learner, target, problem.table, verify=False, **settings)
    seconds = time.perf_counter() - begin
    found = find_patterns(learner, target, problem.table, valid=problem.test[:2], **settings)
    return found, {"gap": fitted.values([target])[0], "seconds": seconds}


def right(fitted: Stopped, problem: Problem) -> float:
    """Accuracy on test data."""
    with torch.no_grad():
        decided = fitted.task.model(torch.from_numpy(problem.test[0]))[:, 0] > 0
    return float((decided.numpy() == problem.test[1]).mean())


def published() -> tuple[list[Pattern], dict[str, float]]:
    """The published patterns themselves, without a search, trained on from one to the next in their order."""
    problem = german(0)
    learner, target = Steps(problem.x, problem.y, True), gap(problem.test, temperature=1)
    fitted = learner.fit()
    effects, before = MeanForm(fitted, target), fitted.values([target])[0]
    found = []
    for words, *_ in PUBLISHED:
        parts = [part.split(" = ") for part in words.split(" and ")]
        predicates = tuple(Predicate("age", "≥", 45.0) if len(part) == 1 else Predicate(part[0], "=", part[1]) for part in parts)
        mask = np.all([each.holds(problem.table) for each in predicates], axis=0)
        after = learner.fit(1.0 - mask, start=fitted)
        accuracy = tuple(right(each, problem) for each in (fitted, after))
        predicted = float(effects.many(mask[None])[0]) / before
        found.append(Pattern(predicates, mask, float(mask.mean()), predicted, 1 - after.values([target])[0] / before, metrics={"accuracy": accuracy}))
    return found, {"gap": before, "seconds": 0.0}


def own(problem: Problem, action: str, l2: float, depth: int) -> tuple[list[Pattern], dict[str, float]]:
    """The product."""
    learner, target = Logistic(problem.x, problem.y, l2), gap(problem.valid)
    fitted = learner.fit()
    settings = {"fitted": fitted, "edges": problem.edges, "features": problem.features, "depth": depth}
    search = find_patterns if action == "remove" else collect_more
    begin = time.perf_counter()
    search(learner, target, problem.table, verify=False, **settings)
    seconds = time.perf_counter() - begin
    found = search(learner, target, problem.table, others=[Named(gap(problem.test), "test gap")], valid=problem.test[:2], **settings)
    return found, {"gap": fitted.values([target])[0], "seconds": seconds}


ROWS: dict[str, Callable[[], tuple[list[Pattern], dict[str, float]]]] = {
    "gopher, their patterns": published,
    "gopher": lambda: gopher(True),
    "gopher, anew": lambda: gopher(False),
    "gopher, pruned": lambda: gopher(True, prune=True),
    "german": lambda: own(german(0.25), "remove", 5.0, 4),
    "german, collect": lambda: own(german(0.25), "collect", 5.0, 4),
    "adult": lambda: own(adult(), "remove", 2.2622, 3),
    "adult, with label": lambda: own(adult(label=True), "remove", 2.2622, 3),
    "adult, collect": lambda: own(adult(label=True), "collect", 2.2622, 3),
}


def run(row: str) -> None:
    """Append the patterns of a row."""
    found, facts = ROWS[row]()
    records = [
        {"row": row, "gap": round(facts["gap"], 5), "seconds": round(facts["seconds"], 2), "pattern": each.words, "support": round(each.support, 5),
         "predicted": round(each.predicted, 5), "verified": round(each.verified or 0.0, 5), "random": round(each.random, 5),
         "empties": list(each.empties), "metrics": {name: [round(value, 5) for value in values] for name, values in each.metrics.items()}}
        for each in found
    ]  # fmt: skip
    PATH.parent.mkdir(exist_ok=True)
    with PATH.open("a") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def table() -> str:
    """Markdown of the last run of every row."""
    records = [json.loads(line) for line in PATH.read_text().splitlines()]
    last = {(record["row"], record["pattern"]): record for record in records}
    head = "| pattern | support | predicted | verified | random 95 % | accuracy | gap on test | empties |"
    parts = []
    for row in ROWS:
        own = [record for (name, _), record in last.items() if name == row]
        if not own:
            continue
        lines = [f"**{row}**: gap {own[0]['gap']:.4f}, search {own[0]['seconds']:.2f} s", "", head, "|---" * 8 + "|"]
        for each in own:
            accuracy, test = (each["metrics"].get(name) for name in ("accuracy", "test gap"))
            random = f"{each['random']:.1%}" if each["random"] else ""
            moved = f"{test[0]:.3f} -> {test[1]:.3f}" if test else ""
            lines.append(
                f"| {each['pattern']} | {each['support']:.2%} | {each['predicted']:.1%} | {each['verified']:.1%} | {random} "
                f"| {accuracy[0]:.3f} -> {accuracy[1]:.3f} | {moved} | {', '.join(each['empties'])} |"
            )
        parts.append("\n".join(lines))
    lines = ["**as published**", "", "| pattern | support | predicted | verified | accuracy |", "|---|---|---|---|---|"]
    lines += [
        f"| {words} | {support:.2%} | {predicted:.1%} | {actual:.1%} | {accuracy:.3f} |" for words, support, predicted, actual, accuracy in PUBLISHED
    ]
    return "\n\n".join([*parts, "\n".join(lines)])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("row", nargs="*", choices=[*ROWS, []], help="rows to run; all by default")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table", "--markdown", action="store_true", help="only print the table of all results")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if not args.table:
        for each in args.row or ROWS:
            run(each)
    print(table())
