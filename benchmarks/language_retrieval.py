"""Which training samples are behind an answer of a language model: are those of the query's kind found?

    python benchmarks/language_retrieval.py MODELS                run what is missing, then print the table; trained models are kept in MODELS
    python benchmarks/language_retrieval.py MODELS --wordings 3   kinds in three wordings, which word overlap does not give away
    python benchmarks/language_retrieval.py MODELS --base words   a model that has seen neither instructions nor answers before the fine-tuning
    python benchmarks/language_retrieval.py MODELS --seeds 1      the first draw of the data alone
    python benchmarks/language_retrieval.py MODELS --table        the table of what has been run

The protocol is that of DataInf (Kwon et al. 2024, arXiv 2310.00902, section 4.3) on prompts of our own: three tasks of ten kinds each, 90 training
and 10 query prompts of a kind (``robust_if.evaluations.prompts``). A GPT-2-shaped model of 4 layers and width 128 is trained from scratch, once, on
prompts of other seeds of all three tasks in three wordings; then, for every seed and task anew, a LoRA adapter (rank 8, on ``c_attn``) on the 900
prompts. Gradients are those of the adapter. AUC: the probability that a training sample of the query's kind is ranked before another one; recall:
the share of its kind among the first 90.

Estimators see neither kinds nor wordings. Every matrix is read twice: signed, the samples without which the query's loss would be higher first; and
by absolute value, the samples that move the query's loss most either way first. VM, FVM, squared cosines and overlaps have no sign. VM and FVM tune
on the query prompts of another seed. Seconds are those of the processor in scoring alone, on one thread and with the passes for gradients; memory
is by how much resident memory rises above what the process held before. Checkpoints for TracIn are those after each third of the epochs. ``datainf,
one by one`` is the published program's order of work, written anew: single-precision gradients of one sample at a time, kept, and for one query
after another a loop over parameters and samples. ``prompt tokens`` is the loss of the prompt in place of that of the answer, which the published
program uses too; ``whole text`` that of both. The overlap was
made, and its damping set, on the first seed; the others confirm it.

Each (base, task, wordings, seed, estimator) is appended to ``benchmarks/results/language_retrieval.jsonl`` when it is known; finished ones are not
run again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from sklearn.feature_extraction.text import TfidfVectorizer
from torch.nn import functional as F  # noqa: N812 - the name that every reader of torch code expects

import robust_if as rif
from robust_if.data import batches
from robust_if.evaluations.prompts import PromptTask, prompts
from robust_if.evaluations.retrieval import retrieval
from robust_if.evaluations.suites.meter import Meter
from robust_if.language import small
from robust_if.language.encoding import encode
from robust_if.layers import LayerGradients
from robust_if.overlap import Overlap
from robust_if.token_losses import NOT_LEARNT, NextToken
from robust_if.tuning import Plain

RESULTS = Path(__file__).parent / "results" / "language_retrieval.jsonl"
TASKS: tuple[PromptTask, ...] = ("sentences", "maths", "maths-reasoning")
SEEDS = (0, 1, 2)
#: Prompts of other seeds for the first training, samples per step, and peak learning rate.
PRETRAIN_SEEDS, BATCH, RATE = range(1000, 1008), 32, 3e-3
#: What the model has seen before the fine-tuning, sentences and problems without instructions and answers or the tasks as a whole; steps of that.
STEPS = {"tasks": 3000, "words": 1000}
#: The seed of the prompts that VM and FVM tune on, apart from all others.
TUNING_SEED = 500
RECIPE = rif.Recipe(optimizer="adamw", lr=5e-3, weight_decay=0.0, epochs=8, batch_size=32, keep=3)
SWEEP = rif.Sweep(batch_size=50)

Matrix = NDArray[Any]


@dataclass(frozen=True)
class Setting:
    """A fine-tuned model and what it is asked.

    Args:
        task: at the end of the fine-tuning.
        checkpoints: of it, the last one last.
        train: 900 samples.
        queries: 100 samples.
        tuning: 100 samples of another seed.
        texts: the rows of train and queries.
        tokenizer: of the model.
    """

    task: rif.Task
    checkpoints: list[rif.Checkpoint]
    train: rif.Samples
    queries: rif.Samples
    tuning: rif.Samples
    texts: tuple[pd.DataFrame, pd.DataFrame]
    tokenizer: Any


def pretrained(folder: Path, base: str) -> tuple[Any, Any]:
    """A GPT-2-shaped model of 4 layers, trained from scratch on prompts of other seeds of all three tasks in three wordings; kept in ``folder``."""
    import transformers

    folder = folder / base
    if not (folder / "config.json").is_file():
        data = pd.concat([prompts(task, seed, wordings=3) for seed in PRETRAIN_SEEDS for task in TASKS], ignore_index=True)
        whole = pd.DataFrame({"text": data["prompt"] + data["completion"]})
        tokenizer = small.tokenizer(whole["text"], vocabulary=1000, positions=96)
        model = small.language_model(tokenizer, layers=4, width=128, heads=4)
        words = pd.DataFrame({"text": data["prompt"].str.removesuffix(" Answer:").str.replace(".*Sentence: ", "", regex=True)})
        train_all(model, encode(whole if base == "tasks" else words, tokenizer).batch(slice(None))[0], STEPS[base])
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    model, tokenizer = transformers.GPT2LMHeadModel.from_pretrained(folder), transformers.AutoTokenizer.from_pretrained(folder)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # in the fine-tuning: so small a model forgets with it
    return model, tokenizer


def train_all(model: Any, tokens: torch.Tensor, steps: int) -> None:
    """Next-token training of all parameters; samples of similar length share a batch, since a third of the work would be padding otherwise."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.1)
    rng, lengths = np.random.default_rng(0), (tokens >= 0).sum(1).numpy()
    queue: list[NDArray[Any]] = []
    for step in range(steps):
        if not queue:
            order = np.argsort(lengths + rng.random(len(lengths)))
            queue = [order[i : i + BATCH] for i in range(0, len(order), BATCH)]
            rng.shuffle(queue)
        rows = queue.pop()
        batch = tokens[rows, : lengths[rows].max()]
        logits = model(input_ids=torch.where(batch >= 0, batch, batch[:, :1]), use_cache=False).logits
        loss = F.cross_entropy(logits[:, :-1].transpose(1, 2), batch[:, 1:].masked_fill(batch[:, 1:] < 0, -100))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 250 == 249:
            print(f"step {step + 1}: loss {loss.item():.2f}", flush=True)


def fine_tuned(models: Path, base: str, name: PromptTask, wordings: int, seed: int) -> tuple[Setting, dict[str, float]]:
    """The setting, and how well the model does the task: mean loss of the queries' answers, and the share of answers with every token right."""
    import peft

    model, tokenizer = pretrained(models, base)
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = peft.get_peft_model(model, config).eval()
    start = rif.Task.from_transformers(model, tokenizer)
    frame, other = prompts(name, seed, wordings=wordings), prompts(name, TUNING_SEED + seed, wordings=wordings)
    texts = frame[frame["split"] == "train"], frame[frame["split"] == "query"]
    other = other[(other["split"] == "query") & ~other["prompt"].isin(frame["prompt"])]
    train, queries, tuning = (encode(each, tokenizer) for each in (*texts, other))
    checkpoints = rif.train(start, train, replace(RECIPE, seed=seed), directory=models / f"{base}-{name}-{wordings}-{seed}")
    task = start.at(checkpoints[-1].state)
    before, after = quality(start, queries), quality(task, queries)
    said = {"loss_before": before[0], "right_before": before[1], "loss": after[0], "right": after[1]}
    return Setting(task, checkpoints, train, queries, tuning, texts, tokenizer), said


def quality(task: rif.Task, queries: rif.Samples) -> tuple[float, float]:
    tokens, labels = queries.batch(slice(None))
    with torch.no_grad():
        logits = task.outputs(task.params(), (tokens, labels))
        loss = float(task.losses(task.params(), (tokens, labels)).mean())
    sought = labels[:, 1 : logits.shape[1]]
    right = (logits[:, :-1].argmax(-1) == sought) | (sought == NOT_LEARNT)
    return round(loss, 3), round(float(right.all(1).float().mean()), 3)


# --- estimators: a matrix (900, 100) in which the smallest values of a column are said to be behind the query ---------------------------------------


def pairs(preconditioner: rif.Preconditioner = rif.Identity(), normalise: Any = "none") -> Callable[[Setting], Matrix]:  # noqa: B008 - frozen
    def matrix(at: Setting) -> Matrix:
        return rif.pairwise(at.task, at.train, at.queries, preconditioner=preconditioner, normalise=normalise, sweep=SWEEP)

    return matrix


def tracin(normalise: Any) -> Callable[[Setting], Matrix]:
    def matrix(at: Setting) -> Matrix:
        found = [
            each.weight * rif.pairwise(at.task.at(each.state), at.train, at.queries, normalise=normalise, sweep=SWEEP) for each in at.checkpoints
        ]
        return np.asarray(sum(found))

    return matrix


def mean_over_tokens(at: Setting) -> Matrix:
    return pairs()(replace(at, task=replace(at.task, loss=NextToken("mean"))))


def prompt_tokens(matrix: Callable[[Setting], Matrix], *, answer: bool = False) -> Callable[[Setting], Matrix]:
    """The loss of the prompt's tokens in place of the answer's, or beside it."""

    def turned(samples: rif.Samples) -> rif.Samples:
        tokens, labels = samples.batch(slice(None))
        return samples.with_labels(torch.where((tokens >= 0) & (answer | (labels == NOT_LEARNT)), tokens, NOT_LEARNT))

    return lambda at: matrix(replace(at, train=turned(at.train), queries=turned(at.queries)))


def relatif(at: Setting) -> Matrix:
    targets = {str(q): rif.Utility(at.queries.take([q])) for q in range(len(at.queries))}
    scores = rif.score(at.task, at.train, target=targets, estimator=rif.InnerProduct(rif.EKFAC(), normalise="relatif"), batch_size=50)
    return np.stack([each.values for each in scores], 1)


def flat_minima(flatness: Any) -> Callable[[Setting], Matrix]:
    def matrix(at: Setting) -> Matrix:
        tuning = rif.Tuning(steps=30, lr=1e-3, batch_size=32, flatness=flatness)
        found = rif.FlatMinima(tuning, fisher="train").pairs(at.task, at.train, target=rif.Utility(at.tuning), queries=at.queries, sweep=SWEEP)
        return -found

    return matrix


def dense(at: Setting, samples: rif.Samples) -> dict[str, torch.Tensor]:
    """The gradients of every parameter, ``(n, rows, columns)`` with no more rows than columns: of LoRA's matrices the rows are the rank."""
    params = at.task.params()
    like = next(iter(params.values()))
    rules = LayerGradients(at.task, params, samples.batch(slice(0, 4)))
    parts: dict[str, list[torch.Tensor]] = {name: [] for name in params}
    for batch in batches(samples, SWEEP.batch_size, like):
        for name, grads in rules.dense(batch):
            parts[name].append(grads if grads.shape[1] <= grads.shape[2] else grads.mT)
    return {name: torch.cat(each) for name, each in parts.items()}


def squared_cosines(at: Setting) -> Matrix:
    """Cosines of single tensors, squared before they are added up: layers that agree in the direction, but not in the sign, do not cancel."""
    rows, columns = (dense(at, each) for each in (at.train, at.queries))
    found = [(F.normalize(rows[name].flatten(1)) @ F.normalize(columns[name].flatten(1)).T) ** 2 for name in rows]
    return -torch.stack(found).sum(0).numpy()


def overlap(damping: float = 0.1, only: str = "*lora_*") -> Callable[[Setting], Matrix]:
    """:class:`robust_if.overlap.Overlap`, of the parameters whose names match ``only``; with much damping nothing is whitened."""

    def matrix(at: Setting) -> Matrix:
        return -Overlap(damping).pairs(replace(at.task, parameters=only), at.train, at.queries, sweep=SWEEP)

    return matrix


def one_by_one(at: Setting) -> Matrix:
    """DataInf as its published program works."""
    counted = at.task.params()
    leaves = {name: value.clone().requires_grad_() for name, value in counted.items()}

    def gradients(samples: rif.Samples) -> list[dict[str, torch.Tensor]]:
        found = []
        for i in range(len(samples)):
            loss = at.task.losses(leaves, samples.batch(slice(i, i + 1))).sum()
            found.append(dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True)))
        return found

    rows, columns = gradients(at.train), gradients(at.queries)
    matrix = np.zeros((len(rows), len(columns)), np.float32)
    for q, query in enumerate(columns):
        direction = {}
        for name, value in query.items():
            damping = 0.1 * torch.stack([(row[name] ** 2).mean() for row in rows]).mean()
            solved = torch.zeros_like(value)
            for row in rows:
                grad = row[name]
                solved += (value - (value * grad).sum() / (damping + (grad**2).sum()) * grad) / (len(rows) * damping)
            direction[name] = solved
        for i, row in enumerate(rows):
            matrix[i, q] = -sum(float((direction[name] * grad).sum()) for name, grad in row.items())
    return matrix


def tf_idf(at: Setting) -> Matrix:
    words = TfidfVectorizer().fit(at.texts[0]["prompt"])
    train, queries = (words.transform(each["prompt"]) for each in at.texts)
    return -np.asarray((train @ queries.T).todense())


def hidden_states(at: Setting) -> Matrix:
    """Cosine of the last layer's output at the prompt's last token, from which the answer begins."""

    def states(samples: rif.Samples) -> torch.Tensor:
        found = []
        for tokens, labels in batches(samples, SWEEP.batch_size, next(at.task.model.parameters())):
            last = ((labels == NOT_LEARNT) & (tokens >= 0)).sum(1) - 1
            with torch.no_grad():
                read = at.task.model(input_ids=torch.where(tokens >= 0, tokens, tokens[:, :1]), output_hidden_states=True, use_cache=False)
            found.append(read.hidden_states[-1][torch.arange(len(last)), last])
        return F.normalize(torch.cat(found), dim=1)

    return -(states(at.train) @ states(at.queries).T).numpy()


def at_random(at: Setting) -> Matrix:
    return np.random.default_rng(len(at.train)).normal(size=(len(at.train), len(at.queries)))


#: The estimators that are run with every seed; all are run with the first.
MAIN = (
    "random", "tf-idf", "hidden states", "ip", "ip, prompt tokens", "ip, cosine", "ip, layer", "tracin", "tracin, layer", "datainf", "datainf, layer",
    "datainf, prompt tokens", "squared cosines", "overlap", "overlap, not whitened", "overlap, A", "overlap, prompt tokens", "overlap, whole text",
    "datainf, whole text",
)  # fmt: skip
ESTIMATORS: dict[str, Callable[[Setting], Matrix]] = {
    "random": at_random,
    "tf-idf": tf_idf,
    "hidden states": hidden_states,
    "ip": pairs(),
    "ip, mean over tokens": mean_over_tokens,
    "ip, prompt tokens": prompt_tokens(pairs()),
    "ip, cosine": pairs(normalise="cosine"),
    "ip, layer": pairs(normalise="layer"),
    "tracin": tracin("none"),
    "tracin, layer": tracin("layer"),
    "datainf": pairs(rif.DataInf()),
    "datainf, cosine": pairs(rif.DataInf(), "cosine"),
    "datainf, layer": pairs(rif.DataInf(), "layer"),
    "datainf, prompt tokens": prompt_tokens(pairs(rif.DataInf())),
    "datainf, whole text": prompt_tokens(pairs(rif.DataInf()), answer=True),
    "datainf, one by one": one_by_one,
    "ek-fac": pairs(rif.EKFAC()),
    "ek-fac, layer": pairs(rif.EKFAC(), "layer"),
    "ek-fac, relatif": relatif,
    "squared cosines": squared_cosines,
    "overlap, not whitened": overlap(1e6),
    "overlap": overlap(),
    "overlap, A": overlap(only="*lora_A*"),
    "overlap, prompt tokens": prompt_tokens(overlap()),
    "overlap, whole text": prompt_tokens(overlap(), answer=True),
    "diagonal": pairs(rif.DiagonalFisher()),
    "diagonal, layer": pairs(rif.DiagonalFisher(), "layer"),
    "trak": pairs(rif.RandomProjection(2048)),
    "vm": flat_minima(Plain()),
    "fvm": flat_minima(rif.LowPass()),
}


def row(setting: Setting, estimator: str) -> dict[str, Any]:
    meter = Meter()
    with meter.running():
        matrix = ESTIMATORS[estimator](setting)
    said: dict[str, float] = {}
    for name, values in (("signed", matrix), ("absolute", -abs(matrix))):
        found = retrieval(values, *(each["kind"] for each in setting.texts))
        said |= dict(zip((f"{name}_auc", f"{name}_recall"), found.means, strict=True))
        said |= dict(zip((f"{name}_auc_std", f"{name}_recall_std"), found.stds, strict=True))
    return {
        **{name: round(value, 4) for name, value in said.items()},
        "seconds": round(meter.cpu_seconds, 1),
        "mb": round((meter.added or 0) / 2**20),
    }


def key(each: Mapping[str, Any]) -> tuple[Any, ...]:
    """What a row is known by."""
    return tuple(each[name] for name in ("base", "task", "wordings", "seed", "estimator"))


def rows() -> list[dict[str, Any]]:
    """What has been run."""
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.is_file() else []


def write(found: Mapping[str, Any]) -> None:
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a") as file:
        file.write(json.dumps(found) + "\n")
    print(json.dumps(found), flush=True)


def table() -> str:
    """A table for every base, task and number of wordings: means over seeds of the means over queries, ± those of the deviations over queries."""
    frame = pd.DataFrame(rows())
    lines = []
    for (base, task, wordings), part in frame.groupby(["base", "task", "wordings"], sort=False):
        trained = part[part["estimator"] == "model"].mean(numeric_only=True)
        said = (
            f"\n{task}, wordings: {wordings}, seen before: {base}; loss of an answer {trained['loss_before']:.2f} before and {trained['loss']:.2f} "
            f"after the fine-tuning, answers right {100 * trained['right_before']:.0f} % and {100 * trained['right']:.0f} %\n"
        )
        lines += [said, "| estimator | seeds | AUC | recall | AUC, absolute | recall, absolute | seconds | MB |", "|" + "---|" * 8]
        for name in ESTIMATORS:
            some = part[part["estimator"] == name]
            if len(some):
                mean = some.mean(numeric_only=True)
                names = ("signed_auc", "signed_recall", "absolute_auc", "absolute_recall")
                cells = " | ".join(f"{mean[each]:.3f} ± {mean[f'{each}_std']:.3f}" for each in names)
                lines.append(f"| {name} | {len(some)} | {cells} | {mean['seconds']:.1f} | {mean['mb']:.0f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("models", type=Path)
    parser.add_argument("--task", choices=TASKS, action="append")
    parser.add_argument("--estimator", choices=list(ESTIMATORS), action="append")
    parser.add_argument("--wordings", type=int, choices=(1, 2, 3), default=1)
    parser.add_argument("--base", choices=list(STEPS), default="tasks")
    parser.add_argument("--seeds", type=int, choices=(1, 2, 3), default=len(SEEDS))
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for seed, task in product(SEEDS[: options.seeds], options.task or TASKS) if not options.table else ():
        about = {"base": options.base, "task": task, "wordings": options.wordings, "seed": seed}
        known = {key(each) for each in rows()}
        wanted = [name for name in options.estimator or ESTIMATORS if seed == SEEDS[0] or name in MAIN]
        missing = [name for name in wanted if key({**about, "estimator": name}) not in known]
        if not missing:
            continue
        setting, said = fine_tuned(options.models, options.base, task, options.wordings, seed)
        if key({**about, "estimator": "model"}) not in known:
            write({**about, "estimator": "model", **said})
        for name in missing:
            write({**about, "estimator": name, **row(setting, name)})
    print(table())


if __name__ == "__main__":
    main()
