"""What each ingredient of label odds is worth: AUROC of the detector without it, mean ± standard deviation over seeds.

    python benchmarks/ablation.py digits-sym20 digits-sym40 digits-pair40 --seeds 3

Results are kept in ``benchmarks/results/ablation.jsonl``; finished ones are not run again. The detector looks at fresh models only, so the
regime of the model under examination makes no difference.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from detection import RESULTS, ROWS

import robust_if as rif
from robust_if.estimators import label_odds
from robust_if.evaluations.detection import detection


@dataclass(frozen=True)
class Uncorrected(rif.LabelOdds):
    """Trains on the given labels as if they were right."""

    def _fit(self, job: Any, name: str, recipe: rif.Recipe, offset: int, data: rif.Samples, noise: Any) -> rif.Task:
        return super()._fit(job, name, recipe, offset, data, None)


@dataclass(frozen=True)
class SeenByItsJudge(rif.LabelOdds):
    """One model per round, trained on all samples and judging all of them."""

    def _cross_fitted(self, job: Any, clean: rif.Samples, noise: Any, r: int, shape: tuple[int, ...]) -> Any:
        task = self._fit(job, f"round-{r}", self.recipe, 1000 * (r + 1), label_odds._marked(job.samples, clean), noise)
        return label_odds._log_probabilities(task, job.samples, job.sweep.batch_size)


PATH = RESULTS / "ablation.jsonl"
FULL = rif.LabelOdds()
VARIANTS = {
    "as it is: 2 rounds, 5 folds, 10 neighbours, 3 starts": FULL,
    "no round: models on validation alone, noise matrix": replace(FULL, rounds=0),
    "one round": replace(FULL, rounds=1),
    "three rounds": replace(FULL, rounds=3),
    "two folds": replace(FULL, folds=2),
    "no neighbours": replace(FULL, neighbours=0),
    "plain loss in place of the noise-corrected one": Uncorrected(),
    "no cross-fitting: judged by models that saw the label": SeenByItsJudge(),
    "one start": replace(FULL, starts=1),
    "half the epochs": replace(FULL, recipe=replace(FULL.recipe, epochs=8)),
    "SGD (lr 0.05, momentum 0.9) in place of AdamW": replace(FULL, recipe=rif.Recipe(epochs=15, lr=0.05, weight_decay=0.0)),
}


def run(names: list[str], seeds: int) -> None:
    RESULTS.mkdir(exist_ok=True)
    done = {(r["row"], r["seed"], r["variant"]) for r in map(json.loads, PATH.read_text().splitlines())} if PATH.is_file() else set()
    for name in names:
        row = ROWS[name]
        for seed in range(seeds):
            train, valid, _ = row.load(seed)
            poisoned, task = row.poison(train, seed), rif.Task(row.model())
            for variant, estimator in VARIANTS.items():
                if (name, seed, variant) in done:
                    continue
                scores = replace(estimator, seed=seed).score(task, poisoned.data, target=rif.Utility(valid))
                auroc = detection(scores, poisoned.mask, replicates=0).auroc
                record = {"row": name, "seed": seed, "variant": variant, "auroc": auroc, "seconds": scores.provenance["seconds"]}
                with PATH.open("a") as file:
                    file.write(json.dumps(record) + "\n")
                print(f"{name} seed {seed} AUROC {auroc:.4f} {record['seconds']:6.1f} s  {variant}", flush=True)


def table() -> str:
    records = pd.DataFrame([json.loads(line) for line in PATH.read_text().splitlines()])
    groups = records.groupby(["variant", "row"])["auroc"]
    mean, std = groups.mean().unstack(), groups.std().unstack()
    rows = [row for row in ROWS if row in mean.columns]
    lines = ["| variant | " + " | ".join(f"{row} ({records[records['row'] == row]['seed'].nunique()} seeds)" for row in rows) + " |"]
    lines.append("|---" * (len(rows) + 1) + "|")
    for variant in VARIANTS:
        if variant in mean.index:
            spread = {row: "" if np.isnan(std.loc[variant, row]) else f" ± {std.loc[variant, row]:.4f}" for row in rows}
            lines.append(f"| {variant} | " + " | ".join(f"{mean.loc[variant, row]:.4f}{spread[row]}" for row in rows) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("row", nargs="*", choices=[*ROWS, []])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    run(args.row, args.seeds)
    print(table())
