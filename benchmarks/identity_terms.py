"""Can a tweet classifier be made to answer alike whoever a tweet is about, by leaving out training tweets?

    python benchmarks/identity_terms.py          what is missing, then the tables; about ten minutes on one core
    python benchmarks/identity_terms.py --table  the tables of what has been run

Tweets of Davidson et al. 2017, hate or offensive against neither, half of each. No pretrained model is used: for every seed, which draws the split
and the initial parameters, a transformer with the shape of GPT-2 learns to write tweets, the training tweets and others without their labels. Then
it is fine-tuned on 2,400 labelled ones; ``as-given``, or ``biased``, where all harmless training tweets that mention women or girls are labelled
offensive and the truth is known. The target is the divergence between the predictions of a validation tweet and of its demographic perturbation.
Tested on tweets that nothing else has seen, with their labels as given: accuracy, macro F1, and of pairs FairScore (share whose class changes) and
the gap. And on template sentences about 50 identity terms, half of them harmless: the standard deviation of the terms' false positive rates, and how
far the highest is from that of all. Settings were chosen with seed 7.

* ``none``: the model as it is; all others are fine-tuned anew from the same language model by the same recipe.
* ``truth``: the mislabelled tweets are left out, which nobody knows.
* ``random``, ``loss``: tweets left out at random, or those with the largest training loss.
* ``terms``: all tweets that hold an identity term are left out, or a share at random among them.
* ``reweigh``: weights that make the label independent of whom a tweet mentions: women, men, others (Kamiran and Calders 2012).
* ``augment``: every training tweet with a term also in its perturbed form (counterfactual data augmentation).
* ``ip`` and others: those are left out whose absence is predicted to lower the gap most, or the sum of gap and loss of validation tweets (``+u``).

Results go to ``benchmarks/results/identity_terms.jsonl``; what is there is not run again. Data are read from the folder that ROBUST_IF_DATA names.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from sklearn.metrics import accuracy_score, f1_score
from toxicity import plain, templates, tweets

import robust_if as rif
from robust_if.data import concatenate
from robust_if.decisions import remove_top
from robust_if.estimators import Estimator, Loss
from robust_if.fairness.baselines import kamiran_calders
from robust_if.fairness.perturbation import PerturbationGap, fair_score, mentions, perturb
from robust_if.language.encoding import encode
from robust_if.language.small import classifier, language_model, tokenizer

PATH = Path(__file__).parent / "results" / "identity_terms.jsonl"
#: Of every class: training, validation and test tweets; and tweets of any class that only the language model reads.
SIZES, UNLABELLED = (1200, 900, 1800), 5600
POSITIONS, SHAPE = 40, {"layers": 2, "width": 64, "heads": 4}
WRITING = rif.Recipe(optimizer="adamw", lr=2e-3, epochs=1, batch_size=32, weight_decay=0.01)
READING = rif.Recipe(optimizer="adamw", lr=2e-3, epochs=2, batch_size=32, weight_decay=0.01, keep=2)
#: Template sentences of every term and label.
SENTENCES = 20
WOMEN = "she her hers herself woman women girl girls mother mom daughter daughters sister sisters wife lady ladies female females girlfriend aunt"
MEN = "he him his himself man men boy boys father dad son sons brother brothers husband gentleman male males boyfriend uncle"
SHARES = (0.025, 0.05, 0.1)
#: The estimators, and whether the checkpoints after all epochs are summed.
ESTIMATORS: dict[str, tuple[Estimator, bool]] = {
    "ip": (rif.InnerProduct(), False),
    "ip-layer": (rif.InnerProduct(normalise="layer"), False),
    "ip-cosine": (rif.InnerProduct(normalise="cosine"), False),
    "tracin": (rif.InnerProduct(), True),
    "datainf": (rif.InnerProduct(rif.DataInf()), False),
}
#: By row, actions with the shares of the training tweets that they leave out; 1 where there is no choice of one.
ACTIONS: dict[str, dict[str, tuple[float, ...]]] = {
    "biased": {
        "none": (1,), "truth": (1,), "augment": (1,), "reweigh": (1,), "random": SHARES[1:], "terms": (1,), "loss": (0.05,),
        "ip": SHARES, "datainf": SHARES,
        "tracin": (0.05,), "ip-layer": (0.05,), "ip-cosine": (0.05,), "ip+u": (0.05,), "datainf+u": (0.05,),
    },
    "as-given": {"none": (1,), "augment": (1,), "random": (0.05,), "terms": (1,), "ip": (0.05,)},
}  # fmt: skip
#: What the table shows.
SHOWN = {
    "accuracy": "accuracy %", "f1": "macro F1 %", "fair_score": "FairScore %", "gap": "gap x 100", "fpr_spread": "spread of FPR %",
    "fpr_worst": "highest FPR − all %",
}  # fmt: skip


@dataclass(frozen=True)
class Texts:
    """Tweets or sentences with their labels, encoded when they are asked for."""

    texts: list[str]
    labels: NDArray[np.int64]
    tokenizer: Any

    @cached_property
    def samples(self) -> rif.Samples:
        x, y = self._encoded("classification").batch(slice(None))
        return rif.Samples((x[:, :POSITIONS].contiguous(), y))

    @property
    def writing(self) -> rif.Samples:
        """For the language model."""
        x, y = self._encoded("causal-lm").batch(slice(None))
        return rif.Samples((x[:, :POSITIONS].contiguous(), y[:, :POSITIONS].contiguous()))

    def pairs(self, seed: int) -> tuple[rif.Samples, rif.Samples]:
        """Those that a perturbation changes, as they are and perturbed; a tweet of any length is cut where the model ends."""
        new, changed = perturb(self.texts, seed=seed)
        return self.samples.take(changed), replace(self, texts=new).samples.take(changed)

    def _encoded(self, kind: Any) -> rif.Samples:
        frame = pd.DataFrame({"text": self.texts, "label": self.labels})
        return encode(frame, self.tokenizer, kind=kind, max_length=POSITIONS)


class Tweets:
    """The tweets of a seed, and the language model that a classifier of them starts from."""

    def __init__(self, seed: int) -> None:
        frame = tweets()
        text, toxic = frame["text"].map(plain).to_numpy(object), frame["toxic"].to_numpy()
        order = np.random.default_rng(seed).permutation(len(frame))
        halves, ends = [order[toxic[order] == label] for label in (0, 1)], np.cumsum(SIZES)
        parts = [np.concatenate([half[end - size : end] for half in halves]) for size, end in zip(SIZES, ends, strict=True)]
        pool = text[np.concatenate([parts[0], np.setdiff1d(order, np.concatenate(parts))[:UNLABELLED]])].tolist()
        self.tokenizer = tokenizer(pool, vocabulary=2000, positions=POSITIONS)
        self.train, self.valid, self.test = (Texts(text[rows].tolist(), toxic[rows], self.tokenizer) for rows in parts)
        model = rif.Task.from_transformers(language_model(self.tokenizer, **SHAPE, seed=seed), self.tokenizer, reduction="mean")
        written = Texts(pool, np.zeros(len(pool), np.int64), self.tokenizer).writing
        self.body = rif.fit(model, written, replace(WRITING, seed=seed)).model


class Problem:
    """Training tweets as given or with biased labels, and the scores of the model fine-tuned on all."""

    def __init__(self, row: str, seed: int, made: Tweets) -> None:
        self.seed, self.valid, self.test = seed, made.valid, made.test
        held = mentions(made.train.texts)
        self.with_terms = np.any(list(held.values()), axis=0)
        self.people = mentions(made.train.texts, {"women": [WOMEN.split()], "men": [MEN.split()]}) | {"others": np.any([*held.values()][1:], axis=0)}
        self.mislabelled = self.people["women"] & (made.train.labels == 0) & (row == "biased")
        self.train = replace(made.train, labels=np.where(self.mislabelled, 1, made.train.labels))
        self.templates = Texts(sentences()["text"].tolist(), sentences()["toxic"].to_numpy(), made.tokenizer)
        start = classifier(made.tokenizer, 2, **SHAPE, seed=seed, body=made.body)
        self.start = rif.Task.from_transformers(start, made.tokenizer, "classification")
        self.test_pairs, self.valid_pairs = self.test.pairs(seed), self.valid.pairs(seed)

    @cached_property
    def checkpoints(self) -> list[rif.Checkpoint]:
        return rif.train(self.start, self.train.samples, replace(READING, seed=self.seed))

    @cached_property
    def base(self) -> rif.Task:
        return self.start.at(self.checkpoints[-1].state)

    @cache  # noqa: B019 - a problem lives as long as its seed
    def scores(self, name: str) -> tuple[rif.Scores, rif.Scores]:
        """For the gap alone, and for its sum with the utility."""
        estimator, summed = ESTIMATORS[name]
        gap = PerturbationGap(*self.valid_pairs)
        targets = {"gap": gap, "gap+u": gap + rif.Utility(self.valid.samples)}
        one, other = rif.score(
            self.base, self.train.samples, target=targets, estimator=estimator, checkpoints=self.checkpoints if summed else (), batch_size=128
        )
        return one, other

    def kept(self, action: str, share: float) -> NDArray[np.float64]:
        """Weights of the training tweets."""
        n, rng = len(self.with_terms), np.random.default_rng((self.seed, int(1000 * share)))
        if action == "reweigh":
            groups = [" ".join(name for name, mask in self.people.items() if mask[i]) or "nobody" for i in range(n)]
            return kamiran_calders(self.train.labels, groups)
        weights = np.ones(n)
        if action in ("random", "terms"):
            among = np.arange(n) if action == "random" else np.flatnonzero(self.with_terms)
            weights[rng.permutation(among)[: len(among) if share == 1 else int(share * n)]] = 0
        elif action == "truth":
            weights[self.mislabelled] = 0
        elif action == "loss":
            return remove_top(rif.score(self.base, self.train.samples, estimator=Loss(), batch_size=128), fraction=share)
        elif action not in ("none", "augment"):
            return remove_top(self.scores(action.removesuffix("+u"))[action.endswith("+u")], fraction=share)
        return weights

    def run(self, action: str, share: float) -> dict[str, Any]:
        """Fine-tune and judge."""
        began, data = time.process_time(), self.train.samples
        weights = self.kept(action, share)
        scored = time.process_time() - began
        if action == "augment":
            data = concatenate([data, self.train_copies()])
            weights = np.ones(len(data))
        task = self.base if action == "none" else rif.fit(self.start, data, replace(READING, seed=self.seed), weights=weights)
        out = weights[: len(self.with_terms)] == 0
        about: dict[str, Any] = {"removed": int(out.sum()), "with_terms": int(self.with_terms.sum()), "mislabelled": int(self.mislabelled.sum())}
        about |= {f"removed_{name}": int(getattr(self, name)[out].sum()) for name in ("with_terms", "mislabelled")}
        seconds = {"scoring_seconds": round(scored, 1), "seconds": round(time.process_time() - began, 1)}
        return about | self.measured(task) | seconds

    def train_copies(self) -> rif.Samples:
        """The training tweets with a term, perturbed by another draw than the validation and test tweets, as wide as the originals."""
        x, y = replace(self.train, texts=perturb(self.train.texts, seed=self.seed + 1000)[0]).samples.take(self.with_terms).batch(slice(None))
        width = self.train.samples.batch(slice(0, 1))[0].shape[1]
        return rif.Samples((torch.nn.functional.pad(x, (0, max(0, width - x.shape[1])), value=-1)[:, :width], y))

    def measured(self, task: rif.Task) -> dict[str, Any]:
        labels, said = self.test.labels, classes(task, self.test.samples)
        found = {"accuracy": accuracy_score(labels, said), "f1": f1_score(labels, said, average="macro")}
        for name, pairs in (("", self.test_pairs), ("valid_", self.valid_pairs)):
            found |= {f"{name}fair_score": fair_score(task, *pairs), f"{name}gap": PerturbationGap(*pairs).value(task, task.params()).item()}
        said, wrong = classes(task, self.templates.samples), self.templates.labels
        rates = pd.Series(said[wrong == 0]).groupby(sentences()["term"].to_numpy()[wrong == 0]).mean()
        overall = said[wrong == 0].mean()
        found |= {"fpr": overall, "fpr_spread": rates.std(), "fpr_worst": rates.max() - overall, "templates": (said == wrong).mean()}
        return {name: round(float(value), 5) for name, value in found.items()} | {"pairs": len(self.test_pairs[0])}


@torch.no_grad()
def classes(task: rif.Task, samples: rif.Samples) -> NDArray[np.int64]:
    """Predicted class of every sample."""
    batches = (samples.batch(slice(start, start + 256)) for start in range(0, len(samples), 256))
    return np.asarray(torch.cat([task.outputs(task.params(), batch).argmax(1) for batch in batches]).numpy())


@cache
def sentences() -> pd.DataFrame:
    """As many harmless as toxic template sentences for each identity term, the same for every seed."""
    found = templates().dropna(subset=["term"])
    drawn = found.sample(frac=1, random_state=0).groupby(["term", "toxic"]).head(SENTENCES)
    return drawn.assign(text=drawn["text"].map(plain)).reset_index(drop=True)


def asked() -> Iterator[tuple[str, str, float]]:
    """Every row with every action and every share."""
    for row, actions in ACTIONS.items():
        for action, shares in actions.items():
            for share in shares:
                yield row, action, share


def rows() -> list[dict[str, Any]]:
    """What has been run."""
    return [json.loads(line) for line in PATH.read_text().splitlines()] if PATH.is_file() else []


def tables() -> str:
    """Means over seeds, with their standard deviation; after those of ``none`` the differences from it, with their standard error over seeds."""
    frame, lines = pd.DataFrame(rows()), []
    for row in ACTIONS:
        part = frame[frame["row"] == row]
        whole = part[part["action"] == "none"].set_index("seed")
        if whole.empty:
            continue
        n, pairs, terms, wrong = 2 * SIZES[0], *(whole[name].mean() for name in ("pairs", "with_terms", "mislabelled"))
        lines += [
            f"\n{row}: {len(whole)} seeds, {pairs:.0f} test pairs; of {n} training tweets {terms:.0f} hold a term, {wrong:.0f} are mislabelled\n"
        ]
        lines += [f"| action | left out | {' | '.join(SHOWN.values())} | with terms | mislabelled |", "|---" * (len(SHOWN) + 4) + "|"]
        for _, action, share in (each for each in asked() if each[0] == row):
            some = part[(part["action"] == action) & (part["share"] == share)].set_index("seed")
            if some.empty:
                continue
            cells = [f"{100 * some[name].mean():.2f} (sd {100 * some[name].std():.2f})" for name in SHOWN]
            if action != "none":
                gains = [100 * (some[name] - whole.loc[some.index, name]) for name in SHOWN]
                cells = [f"{gain.mean():+.2f} ± {gain.sem():.2f}" for gain in gains]
            out = [f"{some[name].mean():.0f}" if some["removed"].any() else "" for name in ("removed_with_terms", "removed_mislabelled")]
            lines.append(f"| {action} | {some['removed'].mean() / n:.1%} | {' | '.join(cells)} | {' | '.join(out)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--rows", nargs="+", choices=list(ACTIONS), default=list(ACTIONS))
    parser.add_argument("--table", "--markdown", action="store_true", help="only print the tables of what has been run")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name in ("robust_if", "transformers"):  # which say that long tweets are cut
        logging.getLogger(name).setLevel(logging.ERROR)
    for seed in () if args.table else args.seeds:
        done = {(each["row"], each["action"], each["share"]) for each in rows() if each["seed"] == seed}
        left = [each for each in asked() if each not in done and each[0] in args.rows]
        made = Tweets(seed) if left else None
        problems = {row: Problem(row, seed, made) for row in dict.fromkeys(each[0] for each in left) if made is not None}
        for row, action, share in left:
            found = {"seed": seed, "row": row, "action": action, "share": share} | problems[row].run(action, share)
            PATH.parent.mkdir(exist_ok=True)
            with PATH.open("a") as file:
                file.write(json.dumps(found) + "\n")
            print(json.dumps(found), flush=True)
    print(tables())


if __name__ == "__main__":
    main()
