"""Which detector finds poison, with what knowledge, and whether its removal ends the attack.

    python benchmarks/poisoning.py digits-badnets            one row of the table, five seeds
    python benchmarks/poisoning.py --data fashion            all rows of one data set
    python benchmarks/poisoning.py --table                   the tables of all rows that have been run

A defender knows (a) ten triggered inputs and the goal class, (b) one of them, (c) clean validation samples and nothing else; (-) stands for detectors
that need not even these. Triggered inputs are stamped test images, and the attack's success is measured on the other ones. Covers (tampered
with, but rightly labelled) count as neither poison nor clean. A backdoor that succeeds on fewer than 80 % of the test inputs has failed: that is
reported, and nothing is scored.

Every (row, seed, detector) is appended to ``benchmarks/results/poisoning.jsonl`` as soon as it is known; finished ones are not run again.
Fashion-MNIST and CIFAR-10 are read from the folder that ROBUST_IF_DATA names.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from poisons import GOAL, INPUTS, ROWS, Case, Row
from scipy.stats import t as student
from sklearn.preprocessing import normalize

import robust_if as rif
from robust_if.attacks.success import AttackSuccess, DeltaInfluence
from robust_if.attacks.universal import universal_triggers
from robust_if.decisions import automatic_threshold, remove_above, remove_top, threshold_at
from robust_if.estimators import Estimator
from robust_if.estimators.base import Job, Result
from robust_if.evaluations import detectors as others
from robust_if.evaluations.baselines import ConfidentLearning, accuracy, predict
from robust_if.evaluations.calibration import calibrated, remove_until_ended, thresholds
from robust_if.evaluations.detection import RATES, detection
from robust_if.evaluations.poisoning import WORKS, clean_model, defended
from robust_if.scores import Scores

RESULTS = Path(__file__).parent / "results" / "poisoning.jsonl"
METRICS = ("auroc", "average_precision", *RATES)
Knowledge = Literal["a", "b", "c", "-"]


@dataclass(frozen=True)
class Similarity(Estimator):
    """The baseline of a defender with triggered inputs: the largest cosine between a sample's penultimate features and those of an input."""

    @property
    def name(self) -> str:
        return "feature-similarity"

    def estimate(self, job: Job) -> Result:
        (shown,) = job.target.held_out
        ours, theirs = (others.features(job.task, samples) for samples in (job.samples, shown))
        return Result((normalize(ours) @ normalize(theirs).T).max(1))


@dataclass(frozen=True)
class Detector:
    """A score, and what it has to know."""

    label: str
    knows: Knowledge
    estimator: Estimator
    ours: bool = False
    along: bool = False
    delta: bool = False
    kind: Literal["product", "unlearning", "clean", "universal"] = "product"

    @property
    def decides(self) -> bool:
        """Whether its removals are tried; the search for a universal trigger has no half of the validation samples to spare."""
        return self.ours and self.kind != "universal"

    def target(self, case: Case, valid: rif.Samples) -> rif.Target:
        if self.knows not in ("a", "b") or self.kind == "clean":
            return rif.Utility(valid)
        shown = case.shown.take(range(INPUTS if self.knows == "a" else 1))
        if self.delta:
            return DeltaInfluence(shown, goal_class=GOAL, transforms=(blurred, shifted, noisy))
        success = AttackSuccess(shown, goal_class=GOAL)
        return success + rif.Utility(valid) if self.kind == "unlearning" else success

    def scores(self, case: Case) -> Scores:
        """Scores of the training samples; with a goal class in hand those of other labels come last, for every detector."""
        states, target, goal = case.checkpoints if self.along else (), self.target(case, case.valid), GOAL
        if self.kind == "universal":
            trigger = universal_triggers(case.victim, case.valid)[0]
            target, goal = trigger.target + target, trigger.goal_class
        found = self.estimator.score(case.victim, case.train, target=target, checkpoints=states)
        return found.put_first(case.train.labels.numpy() == goal) if self.knows in ("a", "b") or self.kind == "universal" else found

    def calibrated(self, case: Case) -> tuple[Scores, Scores]:
        """Scores of the training samples and of half of the validation samples, which the target has not seen."""
        half = len(case.valid) // 2
        seen, held = case.valid.take(range(half)), case.valid.take(range(half, len(case.valid)))
        return calibrated(
            self.estimator, case.victim, case.train, target=self.target(case, seen), clean=held,
            goal_class=GOAL if self.knows in ("a", "b") else None, checkpoints=case.checkpoints if self.along else (),
        )  # fmt: skip

    def decisions(self, case: Case) -> dict[str, np.ndarray]:
        """Weights by rule: at 1 and 5 % of false positives, and, with inputs in hand, until the attack no longer works on these."""
        scores, clean = self.calibrated(case)
        found = {f"{100 * rate:g} %": remove_above(scores, threshold_at(clean, rate)) for rate in (0.01, 0.05)}
        if self.knows in ("a", "b"):
            shown = case.shown.take(range(INPUTS if self.knows == "a" else 1))

            def said(task: rif.Task) -> float:
                return float(predict(task, shown)[:, GOAL].mean())

            def success(weights: np.ndarray) -> float:
                return said(rif.fit(case.start, case.train, replace(case.recipe, keep=1), weights=weights))

            usual = said(clean_model(case.start, case.valid, case.recipe, len(case.train)))
            found["until ended"] = remove_until_ended(scores, thresholds(clean), success, usual=usual).weights
        return {f"{self.knows}: {self.label}, {rule}": weights for rule, weights in found.items()}


def blurred(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


def shifted(x: torch.Tensor) -> torch.Tensor:
    return torch.roll(x, (1, 1), (-2, -1))


def noisy(x: torch.Tensor) -> torch.Tensor:
    return x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x)


#: Left out of the backdoors on the larger data sets, where digits show that they are not the best there.
SLOW = ("label odds", "rank of product or cosine")


def asked(name: str, seed: int) -> list[Detector]:
    """The detectors of a row."""
    found = detectors(ROWS[name], seed)
    if name.startswith("digits") or "-flip-" in name or name.endswith("-none"):
        return found
    return [each for each in found if each.label not in SLOW]


def detectors(row: Row, seed: int) -> list[Detector]:
    """Ours and their rivals with the same knowledge, in the order of the table."""
    recipe, product, cosine = replace(row.recipe, seed=seed), rif.InnerProduct(), rif.InnerProduct(normalise="cosine")
    found = []
    for knows in ("a", "b"):
        found += [
            Detector("unlearn the attack", knows, rif.LossChange(), ours=True, kind="unlearning"),
            Detector("cosine (GAS)", knows, cosine, along=True),
            Detector("product (TracIn)", knows, product, along=True),
            Detector("rank of product or cosine", knows, rif.Combined((product, cosine)), along=True),
            Detector("feature similarity", knows, Similarity()),
        ]
    found.append(Detector("loss change on clean data alone", "a", rif.LossChange(), kind="clean"))
    return [
        *found,
        Detector("Δ-Influence, cosine", "b", cosine, along=True, delta=True),
        Detector("unlearn the suspects", "c", rif.Unlearning(rif.ValidationLoss(seed=seed)), ours=True),
        Detector("label odds", "c", rif.LabelOdds(seed=seed), ours=True),
        Detector("unlearn a universal trigger", "c", rif.LossChange(), ours=True, kind="universal"),
        Detector("loss of a validation model", "c", rif.ValidationLoss(seed=seed)),
        Detector("product (IP)", "c", product, along=True),
        Detector("rank of product or cosine", "c", rif.Combined((product, cosine)), along=True),
        Detector("SCAn, clean", "c", others.SCAn(clean=True)),
        Detector("STRIP", "c", others.STRIP(seed=seed)),
        Detector("loss", "-", rif.Loss()),
        Detector("self-influence", "-", rif.SelfInfluence(), along=True),
        Detector("AUM", "-", others.AUM(replace(recipe, keep=1), seed=seed)),
        Detector("early loss (ABL), 2 epochs", "-", others.EarlyLoss(replace(recipe, epochs=2), seed=seed)),
        Detector("early loss (ABL), 5 epochs", "-", others.EarlyLoss(replace(recipe, epochs=5), seed=seed)),
        Detector("activation clustering", "-", others.ActivationClustering()),
        Detector("spectral signatures", "-", others.SpectralSignatures()),
        Detector("SPECTRE", "-", others.SPECTRE(seed=seed)),
        Detector("SCAn", "-", others.SCAn()),
        Detector("deep k-NN", "-", others.DeepKNN()),
        Detector("gradient forest", "-", others.GradientForest(seed=seed)),
        Detector("confident learning", "-", ConfidentLearning(recipe, seed=seed)),
        Detector("random", "-", rif.Random(seed)),
    ]  # fmt: skip


def run(name: str, seeds: range, only: tuple[str, ...], removal: bool) -> None:
    """Score, and remove, whatever of a row is not known yet."""
    known = {(r["row"], r["seed"], r["knows"], r["detector"]) for r in records()}

    def write(case: Case, knows: str, detector: str, **found: Any) -> None:
        record = {"row": name, "seed": case.seed, "knows": knows, "detector": detector, "n": len(case.train), **found}
        with RESULTS.open("a") as file:
            file.write(json.dumps(record) + "\n")
        print(name, case.seed, knows, detector, {key: round(value, 4) for key, value in found.items() if isinstance(value, float)}, flush=True)

    for seed in seeds:
        todo = [each for each in asked(name, seed) if not only or each.label in only]
        todo = [each for each in todo if (name, seed, each.knows, each.label) not in known and not removal]
        removed = (name, seed, "", "removal") in known or bool(only)
        if (name, seed, "", "failed") in known or (not todo and removed):
            continue
        case = Case(ROWS[name], seed)
        fit = {"success": case.success, "accuracy": accuracy(case.victim, case.test)}
        if case.success is not None and case.success < WORKS:
            write(case, "", "failed", **fit)
            continue
        for each in todo:
            if each.knows in ("a", "b") and case.backdoor is None and case.poison is not None:
                continue  # flips have no trigger
            begin = time.perf_counter()
            scores = each.scores(case)
            seconds = time.perf_counter() - begin
            if case.poison is None:
                if each.decides:
                    rules = {rule.rpartition(", ")[2]: float(1 - weights.mean()) for rule, weights in each.decisions(case).items()}
                else:
                    rules = {"automatic": float((scores.values > automatic_threshold(scores)).mean())}
                write(case, each.knows, each.label, flagged=rules, seconds=seconds, **fit)
                continue
            found = detection(scores, case.poison.mask, ignore=case.poison.covers, replicates=0)
            strict = detection(scores, case.poison.mask, replicates=0).auroc
            metrics = {metric: getattr(found, metric) for metric in METRICS}
            write(case, each.knows, each.label, **metrics, auroc_covers_clean=strict, seconds=seconds, **fit)
        if case.backdoor is not None and not removed:
            assert case.poison is not None
            ours = {key: weights for each in asked(name, seed) if each.decides for key, weights in each.decisions(case).items()}
            rate = int(1.5 * case.poison.mask.sum())
            blind = {
                f"-: {each.label}, 1.5 x the poison": remove_top(each.scores(case), k=rate)
                for each in asked(name, seed)
                if each.label in ("spectral signatures", "loss")
            }
            judged = defended(
                case.start, case.train, case.poison.mask, {**ours, **blind}, test=case.test, triggered=case.triggered, goal=GOAL,
                recipe=replace(case.recipe, keep=1), seed=seed,
            )  # fmt: skip
            clean = accuracy(rif.fit(case.start, case.row.load(seed)[0], replace(case.recipe, keep=1)), case.test)
            write(case, "", "removal", defences=[asdict(each) for each in judged.defences], clean_accuracy=clean)


def records() -> list[dict[str, Any]]:
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.is_file() else []


def table(data: str, metric: str) -> str:
    """Mean of a metric over seeds ± half of its 95 % interval, detectors by knowledge down, attacks across; the best of each knowledge in bold."""
    found = pd.DataFrame([r for r in records() if r["row"].startswith(f"{data}-") and metric in r])
    columns = [name for name in ROWS if name in set(found["row"])]
    groups = found.groupby(["knows", "detector", "row"])[metric]
    mean, half = groups.mean().unstack(), groups.agg(_half).unstack()
    lines = ["| knows | detector | " + " | ".join(name.removeprefix(f"{data}-") for name in columns) + " |", "|---" * (len(columns) + 2) + "|"]
    for each in detectors(ROWS[columns[0]], 0):
        key = (each.knows, each.label)
        if key not in mean.index:
            continue
        best = mean.loc[each.knows].max()
        cells = [_cell(mean.loc[key, name], half.loc[key, name], best[name]) for name in columns]
        lines.append(f"| {each.knows} | {'**' if each.ours else ''}{each.label}{'**' if each.ours else ''} | " + " | ".join(cells) + " |")
    victims = found.drop_duplicates(["row", "seed"]).groupby("row")
    for name, values in (("attack success", victims["success"].mean()), ("accuracy", victims["accuracy"].mean()), ("seeds", victims["seed"].count())):
        lines.append(f"| | *{name}* | " + " | ".join("" if pd.isna(values[c]) else f"{values[c]:.3g}" for c in columns) + " |")
    return "\n".join(lines)


def _half(values: pd.Series) -> float:
    return float(student.ppf(0.975, len(values) - 1) * values.std() / np.sqrt(len(values))) if len(values) > 1 else np.nan


def _cell(mean: float, half: float, best: float) -> str:
    if np.isnan(mean):
        return ""
    text = f"{mean:.3f}" + ("" if np.isnan(half) else f" ± {half:.3f}")
    return f"**{text}**" if mean == best else text


#: Ours for each knowledge, one choice for all rows.
OURS = (("a", "unlearn the attack"), ("b", "unlearn the attack"), ("c", "unlearn the suspects"), ("c", "unlearn a universal trigger"))


def summary(metric: str) -> str:
    """Ours against the best baseline with the same knowledge, which is chosen for every row with hindsight."""
    found = pd.DataFrame([r for r in records() if metric in r])
    mean = found.groupby(["row", "knows", "detector"])[metric].mean()
    own = {(each.knows, each.label) for row in ROWS.values() for each in detectors(row, 0) if each.ours}
    head = [f"({knows}) {label} | ({knows}) best baseline" if knows != "c" else f"(c) {label}" for knows, label in OURS]
    lines = [f"| attack | {' | '.join(head)} | (c) best baseline |", "|---" * 8 + "|"]
    for name in [each for each in ROWS if each in mean.index.get_level_values("row")]:
        part = mean[name]

        def best(knows: str, part: pd.Series = part) -> str:
            rivals = part[[key for key in part.index if key[0] in knows and key not in own]]
            return "" if rivals.empty else f"{rivals.max():.3f} {rivals.idxmax()[1]}"

        ours = [f"{part[key]:.3f}" if key in part.index else "" for key in OURS]
        lines.append(f"| {name} | {ours[0]} | {best('a')} | {ours[1]} | {best('b')} | {ours[2]} | {ours[3]} | {best('c-')} |")
    return "\n".join(lines)


def removals() -> str:
    """What each defence leaves of each attack: success and accuracy in percent, precision and recall of the removal; means over seeds."""
    rows = [{"row": r["row"], "clean": r["clean_accuracy"], **each} for r in records() if r["detector"] == "removal" for each in r["defences"]]
    frame = pd.DataFrame(rows)
    frame["name"] = frame["name"].str.replace("-: ", "").where(frame["name"].str[:2] != "a:", frame["name"])
    lines = ["| attack | defence | attack success | accuracy | precision | recall | removed |", "|---" * 7 + "|"]
    for name in [each for each in ROWS if each in set(frame["row"])]:
        part = frame[frame["row"] == name]
        means = part.groupby("name", sort=False)[["attack_success", "clean_accuracy", "precision", "recall", "removed"]].mean()
        lines.append(f"| **{name}** | *trained on clean data* | | {100 * part['clean'].mean():.1f} % | | | |")
        for defence, m in means.iterrows():
            share = ["" if np.isnan(m[each]) else f"{m[each]:.2f}" for each in ("precision", "recall")]
            percents = " | ".join(f"{100 * m[each]:.1f} %" for each in ("attack_success", "clean_accuracy"))
            lines.append(f"| | {defence} | {percents} | {share[0]} | {share[1]} | {m['removed']:.0f} |")
    return "\n".join(lines)


def clean_rows() -> str:
    """What is flagged when nothing is wrong, as a share of the samples; and attacks that failed."""
    found = pd.DataFrame([r for r in records() if "flagged" in r], columns=["row", "knows", "detector", "flagged"])
    if found.empty:
        return ""
    columns = list(dict.fromkeys(found["row"]))
    shares = pd.DataFrame([{**r, "rule": rule, "share": share} for r in found.to_dict("records") for rule, share in r["flagged"].items()])
    means = shares.groupby(["knows", "detector", "rule", "row"], sort=False)["share"].mean().unstack()
    lines = ["| knows | detector | rule | " + " | ".join(columns) + " |", "|---" * (len(columns) + 3) + "|"]
    for (knows, detector, rule), row in means.iterrows():
        lines.append(f"| {knows} | {detector} | {rule} | " + " | ".join(f"{100 * row[c]:.1f} %" for c in columns) + " |")
    failed = pd.DataFrame([r for r in records() if r["detector"] == "failed"])
    if len(failed):
        said = [f"{row} seed {seed} ({100 * success:.0f} %)" for row, seed, success in failed[["row", "seed", "success"]].to_numpy()]
        lines += ["", f"Failed attacks: {', '.join(said)}"]
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("row", nargs="*", choices=[*ROWS, []], help="rows to run")
    parser.add_argument("--data", choices=["digits", "fashion", "cifar"], help="all rows of one data set")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--removal", action="store_true", help="removal alone")
    parser.add_argument("--only", nargs="*", default=[], help="only these detectors")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--table", action="store_true", help="print the tables of all results")
    parser.add_argument("--metric", choices=METRICS, default="auroc", help="of the tables")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for each in args.row or [name for name in ROWS if args.data and name.startswith(args.data)]:
        run(each, range(args.seeds), tuple(args.only), args.removal)
    if args.table:
        for data in ("digits", "fashion", "cifar"):
            if any(r["row"].startswith(data) for r in records()):
                print(table(data, args.metric), end="\n\n")
        print(summary(args.metric), removals(), clean_rows(), sep="\n\n")
