"""How much accuracy does fairness cost: repairs of the training data beside fairlearn's methods, Kamiran-Calders and FairBatch.

    python benchmarks/fairness.py adult bank acs celeba german --splits 10
    python benchmarks/fairness.py adult --no-intercept --methods unconstrained "reweigh, exact"
    python benchmarks/fairness.py adult --validation-sizes       what of a repair's gain on validation data is left on test data
    python benchmarks/fairness.py adult bank --table --figure    tables and figures of what has been run

A method has a curve: one model per setting. Its point is chosen on validation data, the same way for all: the most accurate whose gap there is within
``--bound``, or the one with the smallest gap. Everything is fitted to the training samples; repairs look at the validation samples besides, and so
does a second ExponentiatedGradient, which trains on both. Seconds are those of the point alone, on one core with ``OMP_NUM_THREADS=1``.

Every (data, seed, model, method, notion, point) is appended to ``benchmarks/results/fairness.jsonl``; what is there is not run again. The data are
read from the folder that ROBUST_IF_DATA names.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from fairness_data import FIXED, LOADERS, Part, Split, adult_pool
from fairness_figures import curves, sizes_figure
from fairness_rivals import ANY_NOTION, MODELS, NOTIONS, RIVALS, Clock, Labels, Method, Predictor, Problem

import robust_if as rif
from robust_if.estimators import Estimator
from robust_if.fairness.groups import Groups
from robust_if.fairness.logistic import Logistic
from robust_if.fairness.metrics import gap, signed_gaps
from robust_if.fairness.repair import Repair, repair
from robust_if.fairness.targets import FairnessGap, fairness_gap

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "fairness.jsonl"
SIZES_RESULTS = RESULTS.with_name("fairness_validation.jsonl")
KEY = ["data", "seed", "model", "intercept", "method", "notion"]
VERSIONS = {name: version(name) for name in ("fairlearn", "scikit-learn", "numpy", "torch")}
BOUNDS = (0.005, 0.02, 0.05, 0.1)
SHARES = (0.0025, 0.005, 0.01, 0.02, 0.04, 0.08)
SIZES = (200, 500, 1_000, 2_000, 5_000, 10_000)


def target(split: Split, notion: str) -> FairnessGap:
    """The gap on validation data; the groups are those of ``split``, and cells of any size count, as they do in the hard gaps."""
    return fairness_gap(notion, (split.valid.x, split.valid.y), split.valid.s, smallest=1)


def learner(problem: Problem, estimator: Estimator | None) -> Logistic:
    train = problem.split.train
    return Logistic(train.x, train.y, problem.split.l2, problem.intercept, estimator)


def repaired_once(problem: Problem, notion: str, action: Any, estimator: Estimator | None, **settings: Any) -> Repair:
    return repair(learner(problem, estimator), target(problem.split, notion), action, **settings)


def repaired(problem: Problem, notion: str, *, action: Any, estimator: Estimator | None = None) -> Iterator[Predictor]:
    """One repair per bound. Where the model is not logistic regression, that one scores the samples, and the model itself judges the rounds."""
    split = problem.split
    for bound in BOUNDS:
        clock = Clock()
        tried: list[tuple[Any, Labels, Any]] = []

        def judge(weights: Any, labels: Labels, tried: list[tuple[Any, Labels, Any]] = tried) -> Labels:
            tried.append((weights, labels, problem.fit(weights, labels)))
            return np.asarray(tried[-1][2].predict(split.valid.x), dtype=np.int64)

        settings = {"bound": bound, "judge": None if problem.model == "logistic" else judge}
        found: Repair = clock.lap(partial(repaired_once, problem, notion, action, estimator, **settings))
        best = found.best
        model = (
            best.fitted if problem.model == "logistic" else next(model for w, labels, model in tried if w is best.weights and labels is best.labels)
        )
        yield Predictor(f"bound {bound:g}", predicting(model), touched=int(found.touched.sum()), **clock.seconds())


def half_held_out(problem: Problem, notion: str, *, action: Any) -> Iterator[Predictor]:
    """One repair for which training and validation samples are divided anew, in halves; that leaves none to choose points by."""
    split, clock = problem.split, Clock()
    both = Part(*(np.concatenate([getattr(part, name) for part in (split.train, split.valid)]) for name in "xys"))
    first, second = np.array_split(np.random.default_rng(split.seed).permutation(len(both)), 2)
    divided = replace(problem, split=replace(split, train=both.take(first), valid=both.take(second)))
    found = clock.lap(partial(repaired_once, divided, notion, action, None))
    yield Predictor("bound 0.005", predicting(found.fitted), touched=int(found.touched.sum()), **clock.seconds())


def ranked(problem: Problem, notion: str, *, estimator: Estimator, relabel: bool = False) -> Iterator[Predictor]:
    """The top shares of one scoring removed or relabelled: for scores without a sign, which no repair can balance against each other."""
    split, clock = problem.split, Clock()
    logistic = learner(problem, None)
    scores = clock.lap(lambda: estimator.score(logistic.fit().task, logistic.train, target=target(split, notion)))
    order = np.argsort(-scores.values, kind="stable")
    for share in SHARES:
        lap = Clock(**clock.seconds())
        top = order[: round(share * len(order))]
        weights, labels = np.ones(len(order)), split.train.y.copy()
        if relabel:
            labels[top] = 1 - labels[top]
        else:
            weights[top] = 0
        fit = logistic.fit if problem.model == "logistic" else problem.fit
        model = lap.lap(partial(fit, weights, labels))
        yield Predictor(f"top {100 * share:g} %", predicting(model), touched=len(top), **lap.seconds())


def predicting(model: Any) -> Any:
    return lambda part: np.asarray(model.predict(part.x), dtype=np.int64)


ESTIMATORS: dict[str, Estimator | None] = {"inverse Hessian": None, "IP": rif.InnerProduct(), "IP Ensemble": rif.Ensemble()}
#: Full-batch tuning from a converged model: the default batch of 128 validation samples has too few of a small group.
FLAT = rif.FlatMinima(rif.Tuning(steps=200, batch_size=2000))

#: Our methods by name, with the signature of the rivals.
OURS: dict[str, Method] = {
    **{
        f"{action}, {name}": partial(repaired, action=action, estimator=estimator)
        for action in ("remove", "reweigh", "relabel")
        for name, estimator in ESTIMATORS.items()
    },
    "remove, half held out": partial(half_held_out, action="remove"),
    "reweigh, half held out": partial(half_held_out, action="reweigh"),
    "remove, flat minimum": partial(ranked, estimator=FLAT),
    "relabel, flat minimum": partial(ranked, estimator=FLAT, relabel=True),
}
METHODS = {**RIVALS, **OURS}


def measure(predictor: Predictor, part: Part) -> dict[str, Any]:
    """Accuracy and gaps of hard predictions; with two groups also the signed gaps of selection, true positive and false positive rate."""
    decided = predictor.predict(part)
    groups = Groups.of(part.s)
    found: dict[str, Any] = {"n": len(part), "accuracy": round(float((decided == part.y).mean()), 5)}
    found |= {notion: round(gap(notion, part.y, decided, groups), 5) for notion in NOTIONS}
    if len(groups.values) == 2:
        signed = [signed_gaps(notion, part.y, decided, groups) for notion in ("demographic_parity", "equalized_odds")]
        found["signed"] = np.concatenate(signed).round(5).tolist()
    return found


def records(path: Path = RESULTS) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def write(found: list[dict[str, Any]], path: Path = RESULTS) -> None:
    path.parent.mkdir(exist_ok=True)
    with path.open("a") as file:
        file.writelines(json.dumps(each) + "\n" for each in found)


def measured(point: Predictor, split: Split) -> dict[str, Any]:
    facts = {name: getattr(point, name) for name in ("point", "touched", "deterministic", "needs_group")}
    seconds = {"cpu": round(point.cpu, 3), "wall": round(point.wall, 3)}
    return {**facts, **seconds, "valid": measure(point, split.valid), "tests": {name: measure(point, part) for name, part in split.tests.items()}}


def undominated(found: list[dict[str, Any]], notion: str) -> list[dict[str, Any]]:
    """The default and the points that no other one beats in both accuracy and gap on validation data: of a grid most are beaten."""

    def beaten(one: dict[str, Any]) -> bool:
        a, g = one["accuracy"], one[notion]
        return any(each["valid"]["accuracy"] >= a and each["valid"][notion] <= g and each["valid"] != one for each in found)

    return [each for each in found if not each["place"] or not beaten(each["valid"])]


def run(data: str, seed: int, models: list[str], intercept: bool, methods: list[str], notions: list[str]) -> None:
    """Whatever of a split is not known yet."""
    known = {tuple(record[name] for name in KEY) for record in records()}
    load = cache(lambda: LOADERS[data](seed))
    for model in models:
        for method in methods:
            for notion in ["any"] if method in ANY_NOTION else notions:
                key = (data, seed, model, intercept or model != "logistic", method, notion)
                if key in known:
                    continue
                split = load()
                found = [
                    {**dict(zip(KEY, key, strict=True)), "place": place, **measured(point, split)}
                    for place, point in enumerate(METHODS[method](Problem(split, model, intercept), notion))
                ]  # fmt: skip
                found = undominated(found, notion) if method == "GridSearch" else found
                found[0] |= {"n": len(split.train), "versions": VERSIONS}
                write(found)
                known.add(key)
                shown = {name: value for name, value in next(iter(found[0]["tests"].values())).items() if isinstance(value, float)}
                print(*key, f"{found[0]['cpu']:.2f} s", shown, flush=True)


def validation_sizes(draws: int, methods: list[str], notions: list[str]) -> None:
    """Adult, with validation sets that contain each other; 22,622 training samples and the same 12,600 test samples for all of them."""
    known = {(r["draw"], r["size"], r["method"], r["notion"]) for r in records(SIZES_RESULTS)}
    pool, names = adult_pool()
    for draw in range(draws):
        train, valid, test = (pool.take(rows) for rows in np.split(np.random.default_rng(draw).permutation(len(pool)), [22_622, 32_622]))
        for size in SIZES:
            split = Split("adult", draw, train, valid.take(np.arange(size)), {"test": test}, names, 2.2622).standardised()
            for method, notion in [(m, n) for m in methods for n in notions if (draw, size, m, n) not in known]:
                problem = Problem(split, "logistic")
                before = next(RIVALS["unconstrained"](problem, notion))
                after = next(METHODS[method](problem, notion))
                values = {
                    f"{part} {when}": measure(each, split.valid if part == "valid" else split.tests["test"])
                    for part in ("valid", "test")
                    for when, each in (("before", before), ("after", after))
                }
                write(
                    [{"draw": draw, "size": size, "method": method, "notion": notion, "point": after.point, **values, "versions": VERSIONS}],
                    SIZES_RESULTS,
                )
                print(draw, size, method, notion, *(f"{name} {value[notion]:.4f}" for name, value in values.items()), flush=True)


def frame(bound: float) -> pd.DataFrame:
    """One row per record and test, with ``chosen`` marking the points that validation data choose within ``bound``."""
    rows = []
    for record in records():
        for notion in NOTIONS if record["notion"] == "any" else [record["notion"]]:
            base = {**record, "notion": notion, "valid_gap": record["valid"][notion], "valid_accuracy": record["valid"]["accuracy"]}
            rows += [{**base, "test": name, **test, "gap": test[notion]} for name, test in record["tests"].items()]
    found = pd.DataFrame(rows).drop(columns=["tests", "valid", "versions"], errors="ignore")
    excess = (found["valid_gap"] - bound).clip(lower=0)
    order = found.assign(excess=excess, wrong=-found["valid_accuracy"]).sort_values(["excess", "wrong", "place"], kind="stable")
    found["chosen"] = found.index.isin(order.drop_duplicates([*KEY, "test"]).index)
    return found


def table(found: pd.DataFrame, notion: str) -> str:
    """One data set, test, model and notion: mean ± standard error over splits, at the published default and at the chosen point."""
    lines = [
        "| method | default: accuracy | gap | chosen: accuracy | gap | valid. gap | other gaps | samples touched | CPU s | |",
        "|---" * 10 + "|",
    ]  # fmt: skip
    others = [each for each in NOTIONS if each != notion]
    for method in [each for each in METHODS if each in set(found["method"])]:
        part = found[found["method"] == method]
        first, best = part[part["place"] == 0], part[part["chosen"]]
        flags = [words for words, told in (("random", not best["deterministic"].all()), ("needs the group", best["needs_group"].any())) if told]
        touched = "" if best["touched"].isna().any() else f"{best['touched'].mean():.0f}"
        cells = [_mean(first["accuracy"]), _mean(first["gap"]), _mean(best["accuracy"]), _mean(best["gap"]), f"{best['valid_gap'].mean():.3f}"]
        cells += [", ".join(f"{best[each].mean():.3f}" for each in others), touched, f"{best['cpu'].mean():.2f}", ", ".join(flags)]
        lines.append(f"| {f'**{method}**' if method in OURS else method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _mean(values: pd.Series) -> str:
    return f"{values.mean():.4f}" + (f" ± {values.std() / np.sqrt(len(values)):.4f}" if len(values) > 1 else "")


def tables(data: list[str], models: list[str], bound: float) -> str:
    found, out = frame(bound), []
    for keys, part in found[found["data"].isin(data) & found["model"].isin(models)].groupby(
        ["data", "test", "model", "intercept", "notion"], sort=False
    ):
        name, test, model, intercept, notion = keys
        where = f"{name}{'' if test == 'test' else f' ({test})'}, {model}{'' if intercept else ' without intercept'}"
        size, splits = int(part["n"].iloc[0]), part["seed"].nunique()
        out.append(f"**{where}: {notion.replace('_', ' ')}** ({splits} splits, {size:,} test samples)\n\n{table(part, notion)}")
    sizes = records(SIZES_RESULTS)
    return "\n\n".join([*out, *([sizes_table(survival(sizes))] if sizes else [])])


def survival(found: list[dict[str, Any]]) -> pd.DataFrame:
    """Gaps before and after on validation and test data, by draw."""
    parts = [f"{part} {when}" for part in ("valid", "test") for when in ("before", "after")]
    return pd.DataFrame(
        [{**{name: r[name] for name in ("draw", "size", "method", "notion")}, **{name: r[name][r["notion"]] for name in parts}} for r in found]
    )


def sizes_table(found: pd.DataFrame) -> str:
    """The share that survives is the mean gain on test data over the mean gain on validation data."""
    lines = [
        "| method, notion | validation samples | valid. gap before, after | test gap before, after | share of the gain left | draws |",
        "|---" * 6 + "|",
    ]
    for (method, notion, size), part in found.groupby(["method", "notion", "size"]):
        mean = part.mean(numeric_only=True)
        left = (mean["test before"] - mean["test after"]) / (mean["valid before"] - mean["valid after"])
        cells = [f"{mean[f'{each} before']:.3f}, {_mean(part[f'{each} after'])}" for each in ("valid", "test")]
        lines.append(f"| {method}, {notion.replace('_', ' ')} | {size:,} | {' | '.join(cells)} | {left:.2f} | {len(part)} |")
    return "\n".join(lines)


def figures(data: list[str], bound: float) -> None:
    """Those of logistic regression with an intercept, and of the validation sizes."""
    found = frame(bound)
    rows = found[found["data"].isin(data) & (found["model"] == "logistic") & found["intercept"]]
    if len(rows):
        (ROOT / "docs" / "fairness.svg").write_text(curves(rows))
    sizes = records(SIZES_RESULTS)
    if sizes:
        (ROOT / "docs" / "fairness_validation.svg").write_text(sizes_figure(survival(sizes)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="*", choices=[*LOADERS, []], help="data sets")
    parser.add_argument("--splits", type=int, default=10)
    parser.add_argument("--models", nargs="*", choices=MODELS, default=["logistic"])
    parser.add_argument("--intercept", action=argparse.BooleanOptionalAction, default=True, help="of logistic regression")
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=list(METHODS))
    parser.add_argument("--notions", nargs="*", choices=NOTIONS, default=list(NOTIONS))
    parser.add_argument("--validation-sizes", action="store_true", help="the experiment with validation sizes in place of the comparison")
    parser.add_argument("--bound", type=float, default=0.01, help="of the gap on validation data, for the choice in tables")
    parser.add_argument("--table", action="store_true", help="only print the tables")
    parser.add_argument("--figure", action="store_true", help="only draw docs/fairness.svg and docs/fairness_validation.svg")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.validation_sizes:
        chosen = [method for method in args.methods if method in OURS]
        validation_sizes(args.splits, chosen if args.methods != list(METHODS) else ["reweigh, inverse Hessian"], args.notions)
    elif not args.table and not args.figure:
        for each in args.data:
            for number in range(1 if each in FIXED else args.splits):
                run(each, number, args.models, args.intercept, args.methods, args.notions)
    if args.table:
        print(tables(args.data or list(LOADERS), args.models, args.bound))
    if args.figure:
        figures(args.data or list(LOADERS), args.bound)
