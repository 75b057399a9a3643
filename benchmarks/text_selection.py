"""Which sentences to keep for fine-tuning a small transformer, where a fifth of the labels are flipped.

    python benchmarks/text_selection.py FOLDER --pretrain      a language model of all seven sets' sentences, kept in FOLDER; about ten minutes
    python benchmarks/text_selection.py FOLDER                 run what is missing, then print the tables; four to six minutes a seed and set
    python benchmarks/text_selection.py FOLDER --data trec     one data set
    python benchmarks/text_selection.py FOLDER --explore       the settings that were compared, by validation accuracy, on another draw
    python benchmarks/text_selection.py --table                the tables of what has been run

A model of the shape of GPT-2 (2 layers of width 128) is first trained to predict the next token of the sentences, without labels, of the training
parts of SST-2, SST-5, TREC, MR, SUBJ, CR and MPQA; those that the validation or test part of SST-2, SST-5 or TREC holds are left out. It stands in
for a published checkpoint. A classifier that starts from it is fine-tuned on 1,500 sentences drawn from the training part, 20 % of them with another
label. Of TREC 500 training sentences are held out as validation data; of SST-2 it is 400 of the official ones. Validation data are clean, and serve
as target and for all settings; the same settings hold for all rows.

* Detection: which of the training labels were flipped.
* Selection: test accuracy after fine-tuning from the start on the best 70 % by each score, over all, with the same share of every (given) class, or
  taken in turns from those that are best for one class of the validation data (``cover``).

Each (data, seed, method, choice) is appended to ``benchmarks/results/text_selection.jsonl`` when it is known; finished ones are not run again.
The data are read from the folder that ROBUST_IF_DATA names.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from cleanlab.rank import get_label_quality_scores
from numpy.typing import NDArray
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_predict

import robust_if as rif
from robust_if.attacks.labels import uniform
from robust_if.data import batches
from robust_if.estimators import Estimator
from robust_if.evaluations.baselines import accuracy
from robust_if.evaluations.detection import detection
from robust_if.language import small
from robust_if.language.encoding import encode
from robust_if.selection import cover, keep_best

DATA = Path(os.environ.get("ROBUST_IF_DATA", "../shared/data")) / "sentence_classification"
RESULTS = Path(__file__).parent / "results" / "text_selection.jsonl"
SEEDS, EXPLORED = (10, 11, 12), 0
POSITIONS, SHAPE = 96, {"layers": 2, "width": 128, "heads": 4}
FLIPPED, SHARE = 0.2, 0.7
#: Test part, validation part (``None``: some of the training part), training part.
SETS = {"trec": ("TREC.test.all", None, "TREC.train.all"), "sst2": ("stsa.binary.test", "stsa.binary.dev", "stsa.binary.train")}
#: Sentences that are drawn of the training part and of the validation part, and tokens after which they are cut; the tenth that is longer costs most.
TRAIN, VALID, LONGEST = 1500, {"trec": 500, "sst2": 400}, {"trec": 24, "sst2": 40}
CORPUS = ("TREC.train.all", "stsa.binary.train", "stsa.fine.train", "rt-polarity.all", "subj.all", "custrev.all", "mpqa.all")
HELD_OUT = ("TREC.test.all", "stsa.binary.dev", "stsa.binary.test", "stsa.fine.dev", "stsa.fine.test")
#: All parameters and three epochs, by validation accuracy on the explored draw.
RECIPE = rif.Recipe(optimizer="adamw", lr=1e-3, weight_decay=0.01, batch_size=32, epochs=3)
#: Far fewer samples need more epochs.
ON_VALIDATION = 3
TUNING = rif.Tuning(steps=150, lr=0.01, batch_size=32)

Splits = tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]


def sentences(name: str) -> pd.DataFrame:
    """Columns label, text and letters; the last tells sentences apart, whatever their case and their spaces."""
    # not by splitlines, which also splits at a byte that stands for three dots in a few of the files
    rows = [line.split(" ", 1) for line in (DATA / name).read_text(encoding="latin1").split("\n") if " " in line]
    frame = pd.DataFrame({"label": [int(row[0]) for row in rows], "text": [row[1].strip().lower() for row in rows]})
    frame["letters"] = frame["text"].str.replace(r"-[lr]rb-|[^a-z0-9]", "", regex=True)
    return frame[frame["letters"] != ""].drop_duplicates("letters")


@cache
def parts(data: str) -> Splits:
    """The training sentences to draw from, validation and test; none is in two of them."""
    test, valid, train = SETS[data]
    tested, pool = sentences(test), sentences(train)
    held = pool[~pool["letters"].isin(tested["letters"])] if valid is None else sentences(valid)
    held = held.sample(VALID[data], random_state=0)
    return pool[~pool["letters"].isin([*tested["letters"], *held["letters"]])], held, tested


def pretrain(folder: Path, epochs: int = 4) -> None:
    """Train the language model, and keep it with its tokenizer."""
    left_out = pd.concat([*map(sentences, HELD_OUT), *(parts(data)[1] for data in SETS)])["letters"]
    corpus = pd.concat([sentences(name) for name in CORPUS]).drop_duplicates("letters")
    texts = corpus["text"][~corpus["letters"].isin(left_out)].sample(frac=1, random_state=0).tolist()
    tokenizer = small.tokenizer(texts, vocabulary=4000, positions=POSITIONS)
    tokens = torch.tensor([token for row in tokenizer(texts)["input_ids"] for token in (*row, tokenizer.eos_token_id)])
    blocks = tokens[: len(tokens) // POSITIONS * POSITIONS].view(-1, POSITIONS)
    task = rif.Task.from_transformers(small.language_model(tokenizer, **SHAPE), tokenizer, reduction="mean")
    data, recipe = rif.Samples((blocks, blocks)), rif.Recipe(optimizer="adamw", lr=2e-3, weight_decay=0.01, batch_size=16, epochs=epochs)
    rest, last = data.take(np.arange(64, len(data))), data.take(np.arange(64))
    trained = rif.fit(task, rest, recipe, directory=folder / "training")
    trained.model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    loss = float(rif.Utility(last).value(trained, trained.params()))
    print(f"{len(texts)} sentences, {len(tokens)} tokens, perplexity of {last.labels.numel()} that were held out {np.exp(loss):.1f}")


@dataclass(frozen=True, eq=False)
class FineTuned(rif.Task):
    """A classifier that begins afresh as the pre-trained model under another head."""

    fresh: Callable[[int], Any] | None = field(default=None, kw_only=True)

    def reset(self, seed: int) -> FineTuned:
        assert self.fresh is not None
        return replace(self, model=self.fresh(seed))


def start(folder: Path, classes: int, seed: int, rank: int = 0) -> tuple[FineTuned, Any]:
    """The task before fine-tuning, and the tokenizer; with an adapter of LoRA of this rank."""
    import transformers

    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    body = transformers.GPT2LMHeadModel.from_pretrained(folder, local_files_only=True)

    def fresh(seed: int) -> Any:
        model = small.classifier(tokenizer, classes, **SHAPE, seed=seed, body=body)
        if not rank:
            return model
        import peft

        options = {"target_modules": ["c_attn", "c_proj", "c_fc"], "modules_to_save": ["score"], "fan_in_fan_out": True}
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return peft.get_peft_model(model, peft.LoraConfig(r=rank, lora_alpha=2 * rank, task_type="SEQ_CLS", **options)).eval()

    task = FineTuned.from_transformers(fresh(seed), tokenizer, "classification")
    return replace(task, fresh=fresh), tokenizer


@dataclass(eq=False)
class Run:
    """Everything that the methods look at, for one data set and seed."""

    folder: Path
    data: str
    seed: int
    rank: int = 0
    recipe: rif.Recipe = RECIPE
    tuned: dict[str, tuple[rif.Task, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.recipe = replace(self.recipe, seed=self.seed)
        pool, valid, test = parts(self.data)
        drawn = pool.sample(TRAIN, random_state=self.seed)
        self.texts = drawn["text"].tolist()
        self.start, tokenizer = start(self.folder, int(pool["label"].max()) + 1, self.seed, self.rank)
        options: dict[str, Any] = {"kind": "classification", "max_length": LONGEST[self.data]}
        clean, self.valid, self.test = (encode(frame[["text", "label"]], tokenizer, **options) for frame in (drawn, valid, test))
        poisoned = uniform(clean, FLIPPED, seed=self.seed)
        self.train, self.mask = poisoned.data, poisoned.mask
        self.labels = self.train.labels.numpy()

    @cached_property
    def checkpoints(self) -> list[rif.Checkpoint]:
        return rif.train(self.start, self.train, replace(self.recipe, keep=min(3, self.recipe.epochs)))

    @cached_property
    def task(self) -> rif.Task:
        """The model under examination, fine-tuned on all sentences."""
        return self.start.at(self.checkpoints[-1].state)

    def at_minimum(self, flatness: Any) -> tuple[rif.Task, float]:
        """The task at a minimum of the validation loss, and the seconds of a processor that it took to get there."""
        if repr(flatness) not in self.tuned:
            began = time.process_time()
            state = replace(TUNING, flatness=flatness, seed=self.seed).run(self.task, rif.Utility(self.valid))
            self.tuned[repr(flatness)] = self.task.at(state), time.process_time() - began
        return self.tuned[repr(flatness)]

    @cached_property
    def tfidf(self) -> Any:
        return TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True).fit_transform(self.texts)

    def plain(self, name: str) -> NDArray[np.float64] | None:
        """Scores without an estimator of the toolkit."""
        if name == "knn-tfidf":
            return disagreement((self.tfidf @ self.tfidf.T).toarray(), self.labels)
        if name == "knn-hidden":
            rows = self.hidden()
            return disagreement(rows @ rows.T, self.labels)
        if name == "confident-tfidf":
            p = cross_val_predict(LogisticRegression(C=10, max_iter=500), self.tfidf, self.labels, cv=5, method="predict_proba")
            return 1 - get_label_quality_scores(self.labels, p)
        return None

    def hidden(self) -> NDArray[np.float64]:
        """What the classifier's head looks at, of length 1."""
        seen: list[torch.Tensor] = []
        head = self.task.model.get_submodule("base_model.model.score" if self.rank else "score")
        handle = head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        params = self.task.params()
        with torch.no_grad():
            for batch in batches(self.train, 64, next(iter(params.values()))):
                self.task.outputs(params, batch)
                last = (batch[0] >= 0).sum(1) - 1
                seen[-1] = seen[-1][torch.arange(len(last)), last]
        handle.remove()
        rows = torch.cat(seen).double().numpy()
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    def score(self, name: str) -> tuple[rif.Scores, float]:
        """Scores by the name of a method, and the seconds of a processor that they took once the model was fine-tuned."""
        task, extra = self.task, 0.0
        if name in ("vm", "fvm", "tuned-loss"):
            task, extra = self.at_minimum(rif.LowPass() if name == "fvm" else rif.Plain())
        began, values = time.process_time(), self.plain(name)
        if values is not None:
            scores = rif.Scores(values, self.train.ids, name)
        else:
            along = self.checkpoints if name == "tracin" else ()
            scores = rif.score(task, self.train, target=rif.Utility(self.valid), estimator=self.estimators[name], checkpoints=along, batch_size=64)
        return scores, time.process_time() - began + extra

    @cached_property
    def estimators(self) -> dict[str, Estimator]:
        longer, zero = replace(self.recipe, epochs=ON_VALIDATION * self.recipe.epochs), rif.Tuning(steps=0)
        return {
            "random": rif.Random(self.seed), "loss": rif.Loss(), "grad-norm": rif.GradNorm(), "ip": rif.InnerProduct(),
            "ip-cosine": rif.InnerProduct(normalise="cosine"), "ip-layer": rif.InnerProduct(normalise="layer"), "tracin": rif.InnerProduct(),
            "datainf": rif.InnerProduct(rif.DataInf()),
            "ekfac": rif.InnerProduct(rif.EKFAC(seed=self.seed)), "vm": rif.FlatMinima(replace(zero, flatness=rif.Plain())),
            "fvm": rif.FlatMinima(zero), "tuned-loss": rif.TunedLoss(zero), "valid-only": rif.ValidationLoss(longer, seed=self.seed),
            "label-odds": rif.LabelOdds(rounds=1, folds=4, neighbours=0, starts=1, recipe=self.recipe, start_recipe=longer, seed=self.seed),
        }  # fmt: skip

    def by_class(self) -> list[rif.Scores]:
        """The cosines with the loss of the validation data of each class."""
        y = self.valid.labels.numpy()
        targets = {str(c): rif.Utility(self.valid.take(y == c)) for c in np.unique(y)}
        return rif.score(self.task, self.train, target=targets, estimator=rif.InnerProduct(normalise="cosine"), batch_size=64)

    def accuracy(self, weights: NDArray[np.float64] | None) -> float:
        """Of test data, after fine-tuning with these weights."""
        return round(accuracy(rif.fit(self.start, self.train, self.recipe, weights=weights), self.test), 4)


def disagreement(similar: NDArray[np.float64], labels: NDArray[np.int64], k: int = 10) -> NDArray[np.float64]:
    """Share of the k most similar other sentences that carry another label, weighted by similarity."""
    similar = similar - 3 * np.eye(len(similar))
    found = np.argsort(-similar, axis=1, kind="stable")[:, :k]
    weights = np.maximum(np.take_along_axis(similar, found, 1), 1e-6)
    return np.asarray((weights * (labels[found] != labels[:, None])).sum(1) / weights.sum(1))


#: Methods in the order of the tables, and those by which a training set is chosen.
METHODS = (
    "random", "loss", "grad-norm", "knn-tfidf", "knn-hidden", "confident-tfidf", "valid-only", "tuned-loss", "ip", "ip-cosine",
    "ip-layer", "tracin", "datainf", "ekfac", "vm", "fvm", "label-odds",
)  # fmt: skip
CHOSEN = ("random", "loss", "confident-tfidf", "valid-only", "ip-cosine", "datainf", "ekfac", "fvm", "label-odds")
BY_CLASS = ("loss", "ip-cosine")


def missing(data: str, seed: int) -> list[tuple[str, str]]:
    """Methods and choices that have not been run."""
    asked = [("", "all"), ("", "clean 80 %"), ("tfidf-regression", "all")]
    asked += [(method, "best 70 %" if method in CHOSEN else "scores") for method in METHODS]
    asked += [(method, "by class") for method in BY_CLASS] + [("ip-cosine", "cover")]
    known = {(row["method"], row["choice"]) for row in rows() if (row["data"], row["seed"]) == (data, seed)}
    return [each for each in asked if each not in known]


def run(folder: Path, data: str, seed: int) -> None:
    todo = missing(data, seed)
    this = Run(folder, data, seed) if todo else None
    kept: dict[str, rif.Scores] = {}
    for method, choice in todo:
        assert this is not None
        row: dict[str, Any] = {"data": data, "seed": seed, "method": method, "choice": choice}
        weights: NDArray[np.float64] | None = None
        if choice in ("best 70 %", "scores"):
            kept[method], seconds = this.score(method)
            found = detection(kept[method], this.mask, replicates=0)
            row |= {"auroc": round(found.auroc, 4), "tpr": round(found.tpr_at_5_fpr, 4), "seconds": round(seconds, 2)}
            weights = keep_best(kept[method], SHARE)
        elif choice == "by class":
            weights = keep_best(kept.get(method) or this.score(method)[0], SHARE, groups=this.labels)
        elif choice == "cover":
            weights = cover(this.by_class(), SHARE)
        elif choice == "clean 80 %":
            weights = (~this.mask).astype(float)
        if weights is not None:
            row["wrong"] = round(float(this.mask[weights > 0].mean()), 4)
        if method == "tfidf-regression":
            words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True).fit(this.texts)
            tested = parts(data)[2]
            model = LogisticRegression(C=10, max_iter=500).fit(words.transform(this.texts), this.labels)
            row["accuracy"] = round(float(model.score(words.transform(tested["text"]), tested["label"])), 4)
        elif choice != "scores":
            row["accuracy"] = this.accuracy(weights)
        RESULTS.parent.mkdir(exist_ok=True)
        with RESULTS.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)


def rows() -> list[dict[str, Any]]:
    """What has been run."""
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.is_file() else []


def explore(folder: Path, data: str) -> None:
    """Validation accuracy on a draw of its own, of models fine-tuned on all its sentences."""
    for rank, lr, epochs in [(0, 1e-3, 2), (0, 1e-3, 3), (0, 1e-3, 6), (8, 3e-3, 3)]:
        this = Run(folder, data, EXPLORED, rank, replace(RECIPE, lr=lr, epochs=epochs))
        began = time.process_time()
        found = accuracy(this.task, this.valid), accuracy(this.task, this.train)
        print(
            f"{data} rank {rank} lr {lr} epochs {epochs}: valid {found[0]:.3f} train {found[1]:.3f}, {time.process_time() - began:.1f} s", flush=True
        )


def table() -> str:
    """Mean ± standard deviation over seeds: detection, then selection."""
    frame = pd.DataFrame(rows())
    sets = [data for data in SETS if data in set(frame["data"])]

    def cell(part: pd.DataFrame, column: str, scale: float = 100, digits: int = 1) -> str:
        values = scale * part[column].dropna()
        return f"{values.mean():.{digits}f} ± {values.std():.{digits}f}" if len(values) > 1 else "".join(f"{value:.{digits}f}" for value in values)

    lines = ["| score | " + " | ".join(f"{data} AUROC | {data} found at 5 % | seconds" for data in sets) + " |", "|---" * (1 + 3 * len(sets)) + "|"]
    for method in METHODS:
        cells = []
        for data in sets:
            part = frame[(frame["data"] == data) & (frame["method"] == method) & frame["auroc"].notna()]
            cells += [cell(part, "auroc", 1, 3), cell(part, "tpr"), f"{part['seconds'].mean():.1f}"]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "| fine-tuned on | " + " | ".join(f"{data} accuracy % | wrong labels %" for data in sets) + " |",
        "|---" * (1 + 2 * len(sets)) + "|",
    ]
    for method, choice in product(["", "tfidf-regression", *METHODS], ["all", "clean 80 %", "best 70 %", "by class", "cover"]):
        some = frame[(frame["method"] == method) & (frame["choice"] == choice) & frame["accuracy"].notna()]
        if len(some):
            cells = [text for data in sets for part in [some[some["data"] == data]] for text in (cell(part, "accuracy"), cell(part, "wrong"))]
            lines.append(f"| {choice} {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="where the pre-trained model is kept")
    parser.add_argument("--data", choices=list(SETS), action="append")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--pretrain", action="store_true")
    parser.add_argument("--explore", action="store_true")
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    if options.table:
        print(table())
        return
    if options.folder is None:
        parser.error("expected the folder of the pre-trained model")
    if options.pretrain:
        pretrain(options.folder)
        return
    for data in options.data or SETS:
        if options.explore:
            explore(options.folder, data)
            continue
        for seed in options.seeds:
            run(options.folder, data, seed)
    if not options.explore:
        print(table())


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
