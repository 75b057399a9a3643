"""Does a toxicity classifier of tweets take identity terms for insults, and can its training tweets be repaired?

    python benchmarks/toxicity.py --splits 3           all rows, then the tables
    python benchmarks/toxicity.py balanced --actions reweigh
    python benchmarks/toxicity.py --markdown           the tables of what has been run

Trained on tweets of Davidson et al. 2017 (hate or offensive = toxic), words weighed by TF-IDF, the most frequent ``--words`` of them; ``as-given``
with their 83 % toxic tweets, ``balanced`` with as many of either label, ``mlp`` the same with a hidden layer, scored by the inner product. Judged on
sentences made from templates, such as "Being muslim is kind.", with as many toxic as harmless ones for each of 50 identity terms: the groups are the
terms, and the gap is how far the false positive rate of a term is from that of all. Repairs see half of the words that make a sentence toxic or
harmless, in sentences with two names, as validation data. Tests: ``words``, the other half of these words with other names; ``terms``, the same for a
repair that saw only half of the terms, judged on the others; ``comments``, real comments from Wikipedia that name a term, in groups of at least 30
harmless ones. Of 45 names of the templates four are used: the others make copies, for hardly a tweet has them.

The data are read from the folder that ROBUST_IF_DATA names. Results go to ``benchmarks/results/toxicity.jsonl``; what is there is not run again.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from fairness_data import DATA
from numpy.typing import NDArray
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.metrics import roc_auc_score

from robust_if import Recipe, Task
from robust_if.fairness.groups import Groups
from robust_if.fairness.learners import Learner, Network
from robust_if.fairness.logistic import Logistic
from robust_if.fairness.metrics import Confusion, gap, signed_gaps
from robust_if.fairness.repair import repair
from robust_if.fairness.targets import FairnessGap, fairness_gap
from robust_if.models import build

PATH = Path(__file__).parent / "results" / "toxicity.jsonl"
NOTION = "false_positive_rate_parity"
ACTIONS = ("reweigh", "remove", "relabel")
ROWS = ("balanced", "as-given", "mlp")
IDENTITIES = {
    "orientation": "lesbian gay bisexual queer lgbt lgbtq homosexual straight heterosexual",
    "gender": "trans transgender female male nonbinary",
    "origin": "african african_american black white european hispanic latino latina latinx mexican canadian american asian indian middle_eastern "
    "chinese japanese",
    "religion": "christian muslim jewish buddhist catholic protestant sikh taoist",
    "age": "old older young younger teenage millenial middle_aged elderly",
    "ability": "blind deaf paralyzed",
}
IDENTITY = {term.replace("_", " "): identity for identity, terms in IDENTITIES.items() for term in terms.split()}
TERM = re.compile(rf"\b({'|'.join(sorted(IDENTITY, key=len, reverse=True))})\b")
#: Where in a sentence, without its term, the word is that makes it toxic or harmless.
PLACE = {"being_adj": -1, "name_adj": -1, "you_are_adj": -1, "verb_adj": 0, "am_hate_adj": 1}
Labels = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Texts:
    """Sentences as TF-IDF, whether they are toxic, and the term that each names."""

    x: NDArray[np.float64]
    y: Labels
    terms: Labels | NDArray[np.str_]

    @property
    def held_out(self) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.from_numpy(self.x), torch.from_numpy(self.y)


@cache
def tweets() -> pd.DataFrame:
    frame = pd.read_csv(DATA / "hate_davidson" / "labeled_data.csv.gz", index_col=0)
    return pd.DataFrame({"text": frame["tweet"], "toxic": (frame["class"] != 2).astype(int)})


@cache
def templates() -> pd.DataFrame:
    """Sentences with their term, the word that decides, and the name where there is one."""
    frame = pd.read_csv(DATA / "wiki_toxicity_bias" / "bias_madlibs_77k.csv.gz", keep_default_na=False)
    frame = frame[frame["Template"] != "you_occupation"]
    text = frame["Text"].str.lower()
    rest = text.str.replace(TERM, "", regex=True).str.replace(".", "", regex=False).str.split()
    word = [words[PLACE[template]] for words, template in zip(rest, frame["Template"], strict=True)]
    name = np.where(frame["Template"] == "name_adj", rest.str[0], "")
    return pd.DataFrame({"text": text, "toxic": (frame["Label"] == "BAD").astype(int), "term": text.str.extract(TERM)[0], "word": word, "name": name})


def comments() -> pd.DataFrame:
    """Real comments with the first identity term that each names."""
    frame = pd.read_csv(DATA / "wiki_toxicity_bias" / "toxicity_nonfuzzed_testset.csv")
    text = frame["comment"].str.lower()
    return pd.DataFrame({"text": text, "toxic": frame["toxic"].astype(int), "term": text.str.extract(TERM)[0]}).dropna()


def plain(text: str) -> str:
    """Without mentions, links, entities and the mark of a retweet."""
    return re.sub(r"@\w+|https?://\S+|&\w+;|\brt\b", " ", text.lower())


@dataclass(frozen=True, eq=False)
class Problem:
    """Training and held-out tweets, validation and test sentences, and real comments."""

    train: Texts
    tweets: Texts
    valid: dict[str, Texts]
    tests: dict[str, Texts]
    vocabulary: frozenset[str]

    @classmethod
    def of(cls, row: str, seed: int, size: int, words: int) -> Problem:
        rng = np.random.default_rng(seed)
        frame = tweets()
        order = rng.permutation(len(frame))
        toxic = frame["toxic"].to_numpy()[order]
        if row == "as-given":
            train, rest = order[:size], order[size:]
        else:
            halves = [order[toxic == label] for label in (0, 1)]
            train = rng.permutation(np.concatenate([half[: size // 2] for half in halves]))
            rest = np.setdiff1d(order, train)
        vectorizer = TfidfVectorizer(max_features=words, preprocessor=plain, token_pattern=r"[^\W\d_]+", sublinear_tf=True)
        vectorizer.fit(frame["text"].iloc[train])

        def texts(some: pd.DataFrame) -> Texts:
            terms = some["term"].to_numpy(str) if "term" in some else np.full(len(some), "")
            return Texts(vectorizer.transform(some["text"]).toarray(), some["toxic"].to_numpy(np.int64, copy=True), terms)

        made = templates()
        chosen = _half(made.drop_duplicates("word"), "word", "toxic", rng)
        terms = _half(pd.DataFrame({"term": list(IDENTITY), "identity": list(IDENTITY.values())}), "term", "identity", rng)
        names = rng.permutation([name for name in sorted(made["name"].unique()) if name])
        first = made[made["word"].isin(chosen) & made["name"].isin(["", *names[:2]])]
        second = made[~made["word"].isin(chosen) & made["name"].isin(["", *names[2:4]])]
        valid = {"words": texts(first), "terms": texts(first[first["term"].isin(terms)])}
        real = comments()
        tests = {"words": texts(second), "terms": texts(second[~second["term"].isin(terms)]), "comments": texts(real)}
        return cls(texts(frame.iloc[train]), texts(frame.iloc[rest]), valid, tests, frozenset(vectorizer.get_feature_names_out()))

    def learner(self, row: str) -> Learner:
        if row != "mlp":
            return Logistic(self.train.x, self.train.y, 1.0)
        recipe = Recipe(epochs=6, lr=3e-3, optimizer="adamw", weight_decay=1e-3, batch_size=64)
        task = Task(build("mlp", (self.train.x.shape[1],), 2))
        return Network(task, (torch.from_numpy(self.train.x).float(), torch.from_numpy(self.train.y)), recipe)  # type: ignore[arg-type]

    def target(self, split: str, single: bool) -> FairnessGap:
        valid = self.valid[split]
        x, y = valid.held_out
        return fairness_gap(NOTION, (x.float() if single else x, y), valid.terms, method="to_overall", smallest=1)


def _half(frame: pd.DataFrame, column: str, strata: str, rng: np.random.Generator) -> set[str]:
    """Half of the values of a column, as many from every stratum."""
    groups = [rng.permutation(some[column].to_numpy(str)) for _, some in frame.groupby(strata)]
    return {str(value) for values in groups for value in values[: len(values) // 2]}


def scores(task: Task, texts: Texts) -> NDArray[np.float64]:
    """Log-odds of being toxic."""
    with torch.no_grad():
        out = task.outputs(task.params(), (torch.from_numpy(texts.x).to(next(task.model.parameters())), torch.from_numpy(texts.y)))
    return np.asarray(out.reshape(-1) if out.numel() == len(texts.y) else out[:, 1] - out[:, 0], dtype=np.float64)


def measure(task: Task, texts: Texts) -> dict[str, Any]:
    """Accuracy, area under the curve; false positive rate of all, its gap between groups, and from all; the groups where it is highest."""
    found = scores(task, texts)
    decided = (found > 0).astype(np.int64)
    measured: dict[str, Any] = {"n": len(texts.y), "accuracy": float(np.mean(decided == texts.y)), "auc": float(roc_auc_score(texts.y, found))}
    harmless = pd.Series(texts.terms[texts.y == 0]).value_counts()
    large = np.isin(texts.terms, harmless.index[harmless >= 10 if len(texts.y) > 2000 else harmless >= 30])
    if (texts.terms != "").all():
        y, p, s = texts.y[large], decided[large], texts.terms[large]
        groups = Groups.of(s)
        rates = Confusion.of(y, p, groups).rate("false_positive_rate", 1)
        measured |= {
            "tpr": float(decided[texts.y == 1].mean()),
            "fpr": float(decided[texts.y == 0].mean()),
            "groups": len(groups.values),
            "gap": gap(NOTION, y, p, groups),
        }
        measured["from all"] = float(np.abs(signed_gaps(NOTION, y, p, groups, method="to_overall")).max())
        measured["mean from all"] = float(np.abs(signed_gaps(NOTION, y, p, groups, method="to_overall")).mean())
        measured["gap of identities"] = gap(NOTION, y, p, [IDENTITY[term] for term in s])
        top = np.argsort(-rates, kind="stable")[:5]
        measured["highest"] = {groups.values[at][0]: round(float(rates[at]), 3) for at in top}
    return {name: round(value, 5) if isinstance(value, float) else value for name, value in measured.items()}


def run(row: str, seed: int, actions: list[str], size: int, words: int) -> Iterator[dict[str, Any]]:
    problem = Problem.of(row, seed, size, words)
    learner = problem.learner(row)
    base = learner.fit()
    known = {"known terms": sum(set(term.split()) <= problem.vocabulary for term in IDENTITY), "size": size, "words": words}
    for action in ("none", *actions):
        for split in ("words", "terms"):
            began, notes, fitted = time.process_time(), {}, base
            if action != "none":
                found = repair(learner, problem.target(split, row == "mlp"), action)  # type: ignore[arg-type]
                fitted = found.fitted
                notes = {"touched": float(np.mean(found.touched)), "rounds": len(found.rounds) - 1, "unmet": found.unmet}
            seconds = round(time.process_time() - began, 1)
            places = {
                "tweets": problem.tweets,
                "validation": problem.valid[split],
                "test": problem.tests[split],
                "comments": problem.tests["comments"],
            }
            for place, texts in places.items():
                yield {"action": action, "split": split, "place": place, **measure(fitted.task, texts), **notes, **known, "seconds": seconds}


def tables() -> str:
    """Markdown: means and standard errors over the splits."""
    frame = pd.DataFrame([json.loads(line) for line in PATH.read_text().splitlines()])
    columns = ["accuracy", "auc", "tpr", "fpr", "from all", "mean from all", "gap", "gap of identities"]
    lines = []
    for (row, split, place), some in frame.groupby(["row", "split", "place"], sort=False):
        shown = [column for column in columns if some[column].notna().any()]
        said = f"{some['seed'].nunique()} splits, {some['size'].iloc[0]} tweets, {some['known terms'].mean():.0f} of 50 terms known"
        title = f"{row}, by {split}: {place}, {said}"
        lines += [f"\n{title}\n", f"| action | {' | '.join(shown)} | touched | highest rates, first split |", "|---" * (len(shown) + 3) + "|"]
        for action in ("none", *ACTIONS):
            each = some[some["action"] == action]
            if each.empty:
                continue
            cells = [f"{each[column].mean():.3f}±{each[column].sem():.3f}" for column in shown]
            touched = f"{each['touched'].mean():.1%}" if "touched" in each and each["touched"].notna().any() else ""
            highest = "" if place == "tweets" else ", ".join(f"{term} {rate:.2f}" for term, rate in each["highest"].iloc[0].items())
            lines.append(f"| {action} | {' | '.join(cells)} | {touched} | {highest} |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("row", nargs="*", choices=[*ROWS, []], help="rows to run; all by default")
    parser.add_argument("--splits", type=int, default=3)
    parser.add_argument("--actions", nargs="+", choices=ACTIONS, default=list(ACTIONS))
    parser.add_argument("--size", type=int, default=4000, help="training tweets")
    parser.add_argument("--words", type=int, default=2000)
    parser.add_argument("--table", "--markdown", action="store_true", help="only print the tables of all results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("robust_if").setLevel(logging.ERROR)
    known = {(each["row"], each["seed"]) for each in map(json.loads, PATH.read_text().splitlines())} if PATH.is_file() else set()
    for seed in range(0 if args.table else args.splits):
        for row in args.row or ROWS:
            if (row, seed) not in known:
                records = [{"row": row, "seed": seed, **each} for each in run(row, seed, args.actions, args.size, args.words)]
                PATH.parent.mkdir(exist_ok=True)
                with PATH.open("a") as file:
                    file.writelines(json.dumps(record) + "\n" for record in records)
                print(f"{row} seed {seed}", flush=True)
    print(tables())
