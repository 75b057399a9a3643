"""How far detectors fall when the attacker knows them, and what that costs the attacker: digits, two backdoors, three seeds.

    python benchmarks/adaptive.py                 run what is missing, then print the table; minutes on one thread
    python benchmarks/adaptive.py --table         the table of what has been run

Each (backdoor, attacker, strength, seed, detector) is appended to ``benchmarks/results/adaptive.jsonl`` as soon as it is known; finished ones are not
run again. Parameters of the attackers' surrogates and of the victim are drawn from different seeds. Covers count as clean: removing one is a mistake.

The defender of the first four detectors holds 10 triggered inputs and the goal class, so samples under other labels rank last for them.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import torch
from data_sets import digits

import robust_if as rif
from robust_if import models
from robust_if.attacks.adaptive import constrained, contaminate, decoys, easiest, flood, split
from robust_if.attacks.backdoors import Backdoor, badnets, blended
from robust_if.attacks.poisoned import Poisoned
from robust_if.attacks.success import AttackSuccess
from robust_if.estimators import Estimator
from robust_if.estimators.named import named
from robust_if.evaluations.baselines import accuracy
from robust_if.evaluations.detection import detection
from robust_if.evaluations.detectors import STRIP, ActivationClustering, DeepKNN, SpectralSignatures
from robust_if.evaluations.poisoning import WORKS, attack_success

RESULTS = Path(__file__).parent / "results" / "adaptive.jsonl"
GOAL, INPUTS = 0, 10
BACKDOORS = {"badnets": badnets(GOAL, 0.05, size=2), "blended": blended(GOAL, 0.05, alpha=0.3)}
RECIPE = rif.Recipe(epochs=25, lr=3e-3, optimizer="adamw")
#: Triggered inputs and the goal class are known to these; the first of them also uses the validation set, as STRIP does.
INFORMED = ("loss-change", "ip-cosine", "ip", "ip-or-cosine")
DETECTORS: dict[str, Estimator] = {name: named()[name] for name in INFORMED} | {
    each.name: each for each in (SpectralSignatures(), ActivationClustering(), STRIP(), DeepKNN(), rif.Loss(), rif.SelfInfluence())
}


@dataclass(frozen=True)
class Case:
    """One backdoor on one draw of the data, and the attacker's surrogate, trained on the plain poison."""

    backdoor: Backdoor
    train: rif.Samples
    valid: rif.Samples
    test: rif.Samples
    seed: int

    @cached_property
    def plain(self) -> Poisoned[rif.Samples]:
        return self.backdoor(self.train, seed=self.seed)

    @cached_property
    def surrogate(self) -> rif.Task:
        return rif.fit(network(self.seed), self.plain.data, replace(RECIPE, seed=self.seed))

    def at(self, rate: float) -> Case:
        """With more poison or less."""
        return replace(self, backdoor=replace(self.backdoor, rate=rate))

    @cached_property
    def plain_victim(self) -> rif.Task:
        return self.victim(self.plain)

    def victim(self, poisoned: Poisoned[rif.Samples]) -> rif.Task:
        return rif.fit(network(1000 + self.seed), poisoned.data, replace(RECIPE, seed=1000 + self.seed))


def network(seed: int) -> rif.Task:
    return rif.Task(models.build("cnn", (1, 8, 8), 10, seed))


Attack = Callable[[Case, float], Poisoned[rif.Samples]]


def hidden(case: Case, score: Literal["cosine", "loss-change"], weight: float, eps: float) -> Poisoned[rif.Samples]:
    """Constrained poison; the training data stand for the validation set that the attacker does not have."""
    own = case.backdoor.triggered(case.train).take(np.arange(50))
    success = AttackSuccess(own, goal_class=GOAL)
    target = success + rif.Utility(case.train) if score == "loss-change" else success
    return constrained(
        case.surrogate, case.backdoor, case.train, triggered=own, target=target, score=score, eps=eps, weight=weight, steps=40, seed=case.seed,
        batch_size=128,
    )  # fmt: skip


#: What is done to the training data, by the attacker's name: strengths, and how.
ATTACKERS: dict[str, tuple[tuple[float, ...], Attack]] = {
    "none": ((0,), lambda case, _: case.plain),
    "hides from loss-change, weight": ((0.003, 0.01, 0.03), lambda case, weight: hidden(case, "loss-change", weight, 0.1)),
    "hides from loss-change, eps": ((0.05, 0.2, 0.3), lambda case, eps: hidden(case, "loss-change", 0.01, eps)),
    "hides from loss-change, poison": ((0.08, 0.12, 0.2), lambda case, rate: hidden(case.at(rate), "loss-change", 0.01, 0.1)),
    "hides from cosine, weight": ((1, 10, 100), lambda case, weight: hidden(case, "cosine", weight, 0.1)),
    "small gradients, pool": ((2, 4, 8), lambda case, pool: easiest(case.surrogate, case.backdoor, case.train, pool=pool, seed=case.seed)),
    "covers, rate": ((0.01, 0.02, 0.05), lambda case, rate: replace(case.backdoor, covers=rate)(case.train, seed=case.seed)),
    "splitting, copies": ((2, 3, 4), lambda case, copies: split(case.backdoor, int(copies))(case.train, seed=case.seed)),
    "flooding, rate": ((0.02, 0.04, 0.06), lambda case, rate: flood(case.backdoor, case.train, rate=rate, seed=case.seed)),
}
#: What is done to what the defender trusts, while the poison stays plain.
TRUSTED = {"poisoned validation, rate": (0.01, 0.03, 0.1), "clean among the attack inputs, rate": (0.1, 0.3, 0.5)}


def cells(case: Case) -> Iterator[tuple[str, float, Attack]]:
    for name, (strengths, attack) in ATTACKERS.items():
        yield from ((name, strength, attack) for strength in strengths)
    for name, strengths in TRUSTED.items():
        yield from ((name, strength, ATTACKERS["none"][1]) for strength in strengths)


def run(seeds: range) -> None:
    RESULTS.parent.mkdir(exist_ok=True)
    lines = RESULTS.read_text().splitlines() if RESULTS.is_file() else []
    known = {(r["backdoor"], r["attacker"], r["strength"], r["seed"], r["detector"]) for r in map(json.loads, lines)}
    for seed in seeds:
        for name, backdoor in BACKDOORS.items():
            case = Case(backdoor, *digits(seed), seed)
            for attacker, strength, attack in cells(case):
                todo = [each for each in DETECTORS if (name, attacker, strength, seed, each) not in known]
                if attacker in TRUSTED:
                    todo = [each for each in todo if each in INFORMED or each == "strip"]
                if todo:
                    records = judge(case, attacker, strength, attack(case, strength), todo)
                    with RESULTS.open("a") as file:
                        file.writelines(json.dumps({"backdoor": name, **record}) + "\n" for record in records)


def judge(case: Case, attacker: str, strength: float, poisoned: Poisoned[rif.Samples], names: list[str]) -> Iterator[dict[str, float | str]]:
    """Train the victim, score by every detector, and compare with the truth."""
    victim = case.plain_victim if poisoned is case.plain else case.victim(poisoned)
    triggered = case.backdoor.triggered(case.test)
    seen, valid = triggered.take(np.arange(INPUTS)), case.valid
    held_out = triggered.take(np.arange(INPUTS, len(triggered)))
    if attacker == "poisoned validation, rate":
        valid = contaminate(valid, case.backdoor, rate=strength, seed=case.seed).data
    if attacker == "clean among the attack inputs, rate":
        seen = decoys(seen, case.test, goal=GOAL, rate=strength, seed=case.seed).data
    success, utility = AttackSuccess(seen, goal_class=GOAL), rif.Utility(valid)
    targets = {"loss-change": success + utility, "strip": utility}
    asr, right = attack_success(victim, held_out, GOAL), accuracy(victim, case.test)
    for name in names:
        begin = time.process_time()
        scores = DETECTORS[name].score(victim, poisoned.data, target=targets.get(name, success))
        seconds = time.process_time() - begin
        if name in INFORMED:
            values, goal = scores.values, poisoned.data.labels.numpy() == GOAL
            scores = replace(scores, values=np.where(goal, values, values[goal].min() - 1))
        found = detection(scores, poisoned.mask, replicates=0)
        without = detection(scores, poisoned.mask, ignore=poisoned.covers, replicates=0)
        print(f"{attacker} {strength:g} seed {case.seed} success {asr:.2f} {name:22s} {found.auroc:.3f} {found.tpr_at_1_fpr:.2f}", flush=True)
        yield {
            "attacker": attacker, "strength": strength, "seed": case.seed, "detector": name, "auroc": found.auroc,
            "tpr_at_1_fpr": found.tpr_at_1_fpr, "auroc_without_covers": without.auroc, "attack_success": asr, "accuracy": right,
            "poisoned": float(poisoned.mask.mean()), "covers": float(poisoned.covers.mean()), "seconds": seconds,
        }  # fmt: skip


def table() -> str:
    """AUROC / TPR at 1 % false positives, means over the seeds in which the attack worked; what the attacker pays is a mean over all seeds."""
    records = pd.DataFrame([json.loads(line) for line in RESULTS.read_text().splitlines()])
    records["works"] = records["attack_success"] >= WORKS
    lines = ["| backdoor | attacker | worked | success | accuracy | poison | covers | " + " | ".join(DETECTORS) + " |"]
    lines.append("|---" * (7 + len(DETECTORS)) + "|")
    names = [*ATTACKERS, *TRUSTED]
    groups = records.groupby(["backdoor", "attacker", "strength"])
    for (backdoor, attacker, strength), rows in sorted(groups, key=lambda group: (group[0][0], names.index(group[0][1]), group[0][2])):
        runs = rows.drop_duplicates("seed")
        costs = [f"{runs[column].mean():.3f}" for column in ("attack_success", "accuracy", "poisoned", "covers")]
        means = rows[rows["works"]].groupby("detector")[["auroc", "tpr_at_1_fpr"]].mean()
        found = ["" if each not in set(rows["detector"]) else "failed" if each not in means.index else _cell(means.loc[each]) for each in DETECTORS]
        what = attacker if attacker == "none" else f"{attacker} {strength:g}"
        lines.append(f"| {backdoor} | {what} | {runs['works'].sum()} of {len(runs)} | " + " | ".join(costs + found) + " |")
    return "\n".join(lines)


def _cell(means: pd.Series[float]) -> str:
    return f"{means['auroc']:.3f} / {means['tpr_at_1_fpr']:.2f}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table", action="store_true", help="print the table of all results and run nothing")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if not args.table:
        run(range(args.seeds))
    print(table())
