"""Whether influence should choose the samples of adversarial training: robust accuracy and cost beside random choice and beside all samples.

    python benchmarks/robust_training.py                      run what is missing, then print the table; hours on one core
    python benchmarks/robust_training.py --data digits        one data set
    python benchmarks/robust_training.py --preset lite        cheaper attacks, kept apart
    python benchmarks/robust_training.py --explore            draws of the data by which settings were chosen, with the cheaper attacks
    python benchmarks/robust_training.py --table              the table of what has been run

Models are trained plainly, by PGD (Madry et al. 2018) and by TRADES (Zhang et al. 2019) on digits (L∞ radius 0.2) and Fashion-MNIST (0.1), as the
data are and with a fifth of the training labels flipped. On Fashion-MNIST TRADES takes two fifths of the learning rate: at the full one a model of
one draw in three stayed at chance, with and without a choice. Three seeds draw the data, the initial parameters and the batches; settings were chosen
by other draws, seeds 0 to 4. Choices of samples, every few epochs while the model is trained:

* ``all``: none are left out.
* ``harmful``: those whose removal is predicted to lower the loss of attacked validation samples most are left out: 5 %, or 20 % of flipped data,
  where EK-FAC and the clean loss are used, which find flipped labels better.
* ``random``: as many are left out at random.
* ``relabelled``: of flipped data; before the training, labels that are more probably wrong than right are replaced (label odds).
* ``learnt half``: half of the samples are drawn, in proportion to the size of their influence, and weighted by the inverse.
* ``random half``: half of the samples are drawn at random.

Gradients are counted as forward and backward passes of one sample, those that craft points and choose samples among them, but not those of label odds
and of EK-FAC's factors. Each (data, method, choice, seed) is appended to ``benchmarks/results/robust_training.jsonl`` when it is known; finished
ones are not run again.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from data_sets import Splits, digits, fashion
from torch import Tensor, nn

import robust_if as rif
from robust_if import models
from robust_if.attacks.evasion import FGSM, PGD, Threat
from robust_if.attacks.labels import uniform
from robust_if.attacks.rescoring import Rescoring
from robust_if.attacks.robust_training import TRADES, PGDTraining
from robust_if.attacks.targets import AdversarialLoss
from robust_if.decisions import relabel, remove_above
from robust_if.estimators.named import named
from robust_if.evaluations.robustness import robust_accuracy
from robust_if.task import Batch, Task
from robust_if.training import Objective

RESULTS = Path(__file__).parent / "results" / "robust_training.jsonl"
#: Test samples that are attacked.
POINTS = 300
#: Steps of the attack in training, and of the target's.
STEPS = 7
SEEDS, EXPLORED = (10, 11, 12), (0, 1, 2)


@dataclass(frozen=True)
class Setting:
    """A data set with everything that is the same for all methods on it.

    Args:
        load: training, validation and test samples of a seed.
        shape: of one input.
        eps: L∞ radius, of pixels from 0 to 1.
        width: of the network.
        recipe: of every training; AT needs many small steps.
        start: the first epoch before which samples are chosen.
        harmful: share that is left out as harmful.
        flipped: share of the training labels that are flipped.
        slower: factor of the learning rate of TRADES.
    """

    load: Callable[[int], Splits]
    shape: tuple[int, int, int]
    eps: float
    width: int
    recipe: rif.Recipe
    start: int
    harmful: float = 0.05
    flipped: float = 0.0
    slower: float = 1.0


DIGITS = Setting(lambda s: digits(s, (1000, 300, 497)), (1, 8, 8), 0.2, 16, rif.Recipe(epochs=60, lr=0.05, batch_size=32), 30)
FASHION = Setting(lambda s: fashion(s, (5000, 500, POINTS)), (1, 28, 28), 0.1, 8, rif.Recipe(epochs=30, lr=0.05, batch_size=32), 10, slower=0.4)
SETTINGS = {
    "digits": DIGITS, "fashion": FASHION, "digits-flipped": replace(DIGITS, harmful=0.2, flipped=0.2),
    "fashion-flipped": replace(FASHION, harmful=0.2, flipped=0.2),
}  # fmt: skip
#: Epochs from one choice to the next.
EVERY = 5
#: How samples are chosen: the rule, and whether half of them stay.
CHOICES: dict[str, tuple[str, bool]] = {
    "all": ("", False), "harmful": ("harmful", False), "random": ("random", False), "learnt half": ("learnt", True), "random half": ("random", True),
    "relabelled": ("", False),
}  # fmt: skip
METHODS: dict[str, Callable[[Threat], Objective]] = {
    "plain": lambda _: Plain(), "pgd": lambda threat: PGDTraining(threat, steps=STEPS), "trades": lambda threat: TRADES(threat, steps=STEPS)
}  # fmt: skip


class Plain:
    """The task's own loss."""

    def __call__(self, task: Task, model: nn.Module, batch: Batch, _: torch.Generator) -> Tensor:
        return task.loss(task.forward(model, batch), batch)


@dataclass
class Counted:
    """An objective that counts the samples it sees."""

    objective: Objective
    samples: int = field(default=0, repr=False)

    def __call__(self, task: Task, model: nn.Module, batch: Batch, generator: torch.Generator) -> Tensor:
        self.samples += len(batch[0])
        return self.objective(task, model, batch, generator)


def trained(data: str, method: str, choice: str, seed: int) -> tuple[Task, rif.Samples, dict[str, Any]]:
    """The model, test samples, and what the training cost."""
    setting, (rule, half) = SETTINGS[data], CHOICES[choice]
    train, valid, test = setting.load(seed)
    train = uniform(train, setting.flipped, seed=seed).data if setting.flipped else train
    threat = Threat(setting.eps, bounds=(0.0, 1.0))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = models.cnn(setting.shape, 10, width=setting.width).eval().to(memory_format=torch.channels_last)
    if choice == "relabelled":
        train = relabelled(Task(model), train, valid, seed)
    clean = method == "plain" or bool(setting.flipped)
    attack = None if clean else FGSM(threat)
    target = rif.Utility(valid) if clean else AdversarialLoss(valid, PGD(threat, steps=STEPS))
    estimator = rif.InnerProduct(rif.EKFAC()) if setting.flipped else rif.InnerProduct()
    keep = 0.5 if half else 1 - setting.harmful
    options: dict[str, Any] = {"attack": attack, "rule": rule, "keep": keep, "start": setting.start, "every": EVERY, "seed": seed}
    reweigh = Rescoring(train, target, estimator, **options) if rule else None
    objective = Counted(METHODS[method](threat))
    lr = setting.recipe.lr * (setting.slower if method == "trades" else 1.0)
    recipe = replace(setting.recipe, objective=objective, lr=lr, seed=seed)
    began = time.process_time()
    task = rif.fit(Task(model), train, recipe, reweigh=reweigh)
    seconds = time.process_time() - began
    times = len(range(setting.start, recipe.epochs, EVERY)) if rule not in ("", "random") else 0
    per_choice = len(train) * (1 + (attack is not None)) + len(valid) * (1 if clean else 1 + STEPS)
    gradients = objective.samples * (1 if method == "plain" else 1 + STEPS) + times * per_choice
    return task, test, {"seconds": round(seconds, 1), "gradients": gradients, "seen": objective.samples}


def relabelled(task: Task, train: rif.Samples, valid: rif.Samples, seed: int) -> rif.Samples:
    """The samples with the suggested label where it is more probable than the given one."""
    scores = rif.score(task, train, target=rif.Utility(valid), estimator=named(seed)["label-odds"])
    assert scores.suggestions is not None
    return train.with_labels(relabel(train.labels.numpy(), scores.suggestions, remove_above(scores)))


def row(data: str, method: str, choice: str, seed: int, preset: str) -> dict[str, Any]:
    """Train and attack."""
    task, test, cost = trained(data, method, choice, seed)
    threat = Threat(SETTINGS[data].eps, bounds=(0.0, 1.0))
    found = robust_accuracy(task, test.take(np.arange(min(POINTS, len(test)))), threat, preset=preset)  # type: ignore[arg-type]
    said = {"clean": round(found.clean_accuracy, 4), "robust": round(found.accuracy, 4), "n": found.n, "believable": found.believable}
    return {**said, **cost, "attack_seconds": round(found.seconds, 1)}


def key(each: Mapping[str, Any]) -> tuple[Any, ...]:
    """What a row is known by."""
    return tuple(each[name] for name in ("data", "method", "choice", "seed", "preset"))


def rows() -> list[dict[str, Any]]:
    """What has been run."""
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.is_file() else []


def table() -> str:
    """Means over seeds, differences from ``all`` with their standard error over seeds, and the cost relative to it."""
    frame = pd.DataFrame(rows())
    lines = ["| data | method | choice | seeds | clean % | robust % | robust − all | gradients | seconds |", "|---|---|---|---|---|---|---|---|---|"]
    for (data, method, preset), part in frame.groupby(["data", "method", "preset"], sort=False):
        whole = part[part["choice"] == "all"].set_index("seed")
        for choice, some in part.groupby("choice", sort=False):
            some = some.set_index("seed")
            shared = some.index.intersection(whole.index)
            gain = 100 * (some.loc[shared, "robust"] - whole.loc[shared, "robust"])
            cost = [some.loc[shared, name].mean() / whole.loc[shared, name].mean() for name in ("gradients", "seconds")]
            lines.append(
                f"| {data}, {preset} | {method} | {choice} | {len(some)} | {100 * some['clean'].mean():.1f} | {100 * some['robust'].mean():.1f} | "
                f"{gain.mean():+.1f} ± {gain.sem():.1f} | {cost[0]:.2f} | {cost[1]:.2f} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", choices=list(SETTINGS), action="append")
    parser.add_argument("--method", choices=list(METHODS), action="append")
    parser.add_argument("--choice", choices=list(CHOICES), action="append")
    parser.add_argument("--preset", choices=["standard", "lite"])
    parser.add_argument("--explore", action="store_true")
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    preset, seeds = options.preset or ("lite" if options.explore else "standard"), EXPLORED if options.explore else SEEDS
    parts = product(seeds, options.data or SETTINGS, options.method or METHODS, options.choice or CHOICES)
    for seed, data, method, choice in parts if not options.table else ():
        if choice == "relabelled" and not SETTINGS[data].flipped:
            continue
        asked = {"data": data, "method": method, "choice": choice, "seed": seed, "preset": preset}
        if key(asked) in map(key, rows()):
            continue
        found = asked | row(**asked)
        RESULTS.parent.mkdir(exist_ok=True)
        with RESULTS.open("a") as file:
            file.write(json.dumps(found) + "\n")
        print(json.dumps(found), flush=True)
    print(table())


if __name__ == "__main__":
    main()
