"""The commands ``trace`` and ``select``: language models from local folders."""

from __future__ import annotations

import json
import logging
import shlex
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from robust_if.commands import options
from robust_if.commands.options import Json, Overwrite, Seed, out
from robust_if.estimators import Estimator
from robust_if.estimators.named import named
from robust_if.evaluations import finetuning, selecting, tracing
from robust_if.evaluations.tables import SNIPPET
from robust_if.evaluations.texts import Columns, Source
from robust_if.formats.parts import require
from robust_if.sweep import Sweep
from robust_if.training import Recipe

#: Queries, and texts on either side of each, that the terminal shows.
QUERIES, TEXTS = 5, 5

Rows = Annotated[Path, typer.Argument(metavar="DATA", help="The training texts: JSON lines, CSV, Parquet, or a Hugging Face data set saved on disk.")]
Folder = Annotated[Path, typer.Option("--model", help="Folder of the fine-tuned model, or of a PEFT adapter; nothing is ever downloaded.")]
Kind = Annotated[Literal["causal-lm", "classification"], typer.Option(help="What the model does.")]
Prompt = Annotated[str, typer.Option(help="Column before the completion; its tokens are read and not learnt.")]
Completion = Annotated[str, typer.Option(help="Column that is learnt after the prompt.")]
Text = Annotated[str, typer.Option(help="Column of whole texts, where there is no prompt; for classification the input.")]
Label = Annotated[str, typer.Option(help="Column of classes, for classification.")]
MaxLength = Annotated[int | None, typer.Option(help="Tokens after which a text is cut; longer ones than the model takes are an error by default.")]
Named = Annotated[str, typer.Option("--estimator", help="ip-layer, ip-cosine, ip, datainf, datainf-layer, ekfac … ; cosines by layer suit most.")]
Along = Annotated[
    Path | None, typer.Option("--checkpoints", help="Folder of the Trainer callback KeepCheckpoints: scores are summed over its states (TracIn).")
]
Batch = Annotated[int, typer.Option(help="Texts at a time; changes speed and memory, and no score.")]
Device = Annotated[str | None, typer.Option(help="Where the model is held, such as cuda; the CPU by default.")]
DType = Annotated[str | None, typer.Option(help="Precision of the model, such as bfloat16; as it was saved by default.")]


def trace(
    data: Rows,
    model: Folder,
    queries: Annotated[Path, typer.Option(help="What is traced, in columns as those of the data; without completions, or labels, the model's own.")],
    out_dir: Annotated[Path, typer.Option("--out", help="Folder for matrix, table and page; the same command resumes there.")] = Path("runs/trace"),
    base: Annotated[Path | None, typer.Option(help="Folder of the base model of an adapter.")] = None,
    kind: Kind = "causal-lm",
    prompt: Prompt = "prompt",
    completion: Completion = "completion",
    text: Text = "text",
    label: Label = "label",
    max_length: MaxLength = None,
    estimator: Named = tracing.ESTIMATOR,
    checkpoints: Along = None,
    top: Annotated[int, typer.Option(help="Texts on either side of every query that are written.")] = 10,
    new_tokens: Annotated[int, typer.Option(help="Of the completion that the model is asked for where queries carry none, at most.")] = 32,
    batch_size: Batch = 8,
    device: Device = None,
    dtype: DType = None,
    seed: Seed = 0,
    as_json: Json = False,
    overwrite: Overwrite = False,
) -> None:
    """Show the training texts behind what a language model says: behind every query those that made it likely, and those that speak against it.

    Queries that carry their completion, or label, are traced as they are; otherwise the model is asked first.
    """
    with options.errors():
        known = tracing.forms(kind, seed)
        if estimator not in known:
            raise ValueError(f"estimator: expected one of {', '.join(known)}, which compare single pairs of texts, got {estimator!r}")
        source = Source(model, base, kind, Columns(prompt, completion, text, label), max_length, checkpoints, device, dtype)
        _quiet(as_json)
        result = tracing.run(
            source, data, queries, out_dir, estimator=known[estimator], top=top, new_tokens=new_tokens,
            sweep=_sweep(batch_size), command=shlex.join(["robust-if", *sys.argv[1:]]), overwrite=overwrite,
        )  # fmt: skip
        if as_json:
            typer.echo(json.dumps(result))
            return
        for query in result["queries"][:QUERIES]:
            out.print(traced(query))
        left = result["n_queries"] - QUERIES
        if left > 0:
            out.print(f"{left:,} more {'query' if left == 1 else 'queries'} in the files")
        options.note(result["warnings"])
        options.files(result)


def select(
    data: Rows,
    model: Folder,
    target: Annotated[Path, typer.Option(help="Texts like those that the model is meant for, in columns as those of the data; not the test set.")],
    out_dir: Annotated[Path, typer.Option("--out", help="Folder for scores and selected rows; the same command resumes there.")] = Path(
        "runs/select"
    ),
    keep: Annotated[float, typer.Option(help="Share of the texts that is kept.")] = 0.7,
    by: Annotated[str | None, typer.Option(help="Column of whose every value the same share is kept, such as the label.")] = None,
    cover: Annotated[bool, typer.Option("--cover", help="Keep what is best for at least one target text, and not for their mean.")] = False,
    alike: Annotated[
        bool, typer.Option("--alike", help="Not the loss on the target texts counts, but whether they are judged alike if they are about others.")
    ] = False,
    noise: Annotated[bool, typer.Option("--noise", help="Only look for wrong texts: scores, worst first; nothing is selected.")] = False,
    base: Annotated[
        Path | None, typer.Option(help="Folder of the model before fine-tuning: an adapter's base, and where all that trains anew starts.")
    ] = None,
    kind: Kind = "causal-lm",
    prompt: Prompt = "prompt",
    completion: Completion = "completion",
    text: Text = "text",
    label: Label = "label",
    max_length: MaxLength = None,
    estimator: Annotated[
        str | None,
        typer.Option(help="A name, see `robust-if estimators`; by default tuned-loss, with --cover ip-layer, with --alike datainf."),
    ] = None,
    checkpoints: Along = None,
    verify: Annotated[bool, typer.Option("--verify", help="Fine-tune on the choice, on all, on random and on low-loss texts; needs --test.")] = False,
    test: Annotated[Path | None, typer.Option(help="Texts that nothing else sees, for --verify.")] = None,
    epochs: Annotated[int, typer.Option(help="Of --verify: passes over the texts.")] = 3,
    lr: Annotated[float | None, typer.Option(help="Of --verify: peak learning rate; 5e-5, or 2e-4 for an adapter, by default.")] = None,
    seeds: Annotated[int, typer.Option(help="Of --verify: fine-tunings on every choice.")] = 3,
    lora_rank: Annotated[int, typer.Option(help="Of --verify: rank of a fresh adapter that alone is trained; 0 trains what the model has.")] = 0,
    batch_size: Batch = 8,
    device: Device = None,
    dtype: DType = None,
    seed: Seed = 0,
    as_json: Json = False,
    overwrite: Overwrite = False,
) -> None:
    """Choose texts for fine-tuning: score each for the loss on target texts, keep the best, and see by fine-tuning whether that was right.

    The score of a text is positive if the model would do better on the target without it. With `--noise` the scores alone are wanted: what is wrong
    or poisoned in instruction data tends to stand first.
    """
    with options.errors():
        if verify != (test is not None):
            raise ValueError("test: expected --verify and --test together, got " + ("--verify" if verify else "--test") + " alone")
        verification = None
        if test is not None:
            rate = lr if lr is not None else 2e-4 if lora_rank else 5e-5
            recipe = Recipe(epochs=epochs, lr=rate, optimizer="adamw", weight_decay=0.01, batch_size=batch_size, seed=seed)
            verification = finetuning.Verification(test, base, recipe, seeds, lora_rank)
        source = Source(
            model, base, kind, Columns(prompt, completion, text, label), max_length, checkpoints, device, dtype
        )
        usual = "datainf" if alike else tracing.ESTIMATOR if cover else selecting.ESTIMATOR
        scorer = _estimator(estimator or usual, kind, seed)
        _quiet(as_json)
        result = selecting.run(
            source, data, target, out_dir, estimator=scorer, chosen=selecting.Chosen(None if noise else keep, by, cover, alike),
            verification=verification,
            sweep=_sweep(batch_size), command=shlex.join(["robust-if", *sys.argv[1:]]), overwrite=overwrite,
        )  # fmt: skip
        if as_json:
            typer.echo(json.dumps(result))
            return
        out.print(worst(result))
        if result["kept"] is not None:
            groups = "; ".join(f"{each['value']}: {each['kept']:,} of {each['n']:,}" for each in result["groups"])
            out.print(f"kept {result['kept']:,} of {result['n']:,} texts{f' ({groups})' if groups else ''}", soft_wrap=True, markup=False)
        if result["verified"]:
            out.print(verified(result))
        options.note(result["warnings"])
        options.files(result)


def _estimator(name: str, kind: Literal["causal-lm", "classification"], seed: int) -> Estimator:
    compared = {name: each for name, each in tracing.forms(kind, seed).items() if isinstance(each, Estimator)}
    known: Mapping[str, Estimator] = {**named(seed), **compared}
    if name not in known:
        raise ValueError(f"estimator: expected one of {', '.join(known)}, got {name!r}")
    return known[name]


def _sweep(batch_size: int) -> Sweep:
    """Texts are many and slow: little is lost by an interruption."""
    return Sweep(batch_size=batch_size, progress=options.progress, rows_per_part=32 * batch_size)


def _quiet(as_json: bool) -> None:
    """The toolkit's warnings are shown; the progress bars and reports of the libraries that load the model are not."""
    logs: Any = require("transformers", "a language model", "'robust-if[hf]'").logging
    logs.set_verbosity_error()
    logs.disable_progress_bar()
    warnings.filterwarnings("ignore", module=r"(transformers|peft|datasets)\.")
    require("datasets", "a data set of texts", "'robust-if[hf]'").disable_progress_bars()
    options.logs(as_json, (), logging.WARNING)


def traced(query: Mapping[str, Any]) -> Table:
    """A query with the texts behind it and against it, for a terminal."""
    title = f"{query['id']}: {said(query)}" + (f" ({query['label']})" if query["label"] is not None else "")
    return _listing(title, {side: query[side][:TEXTS] for side in ("behind", "against")})


def worst(result: Mapping[str, Any]) -> Table:
    """The texts with the highest scores, for a terminal."""
    target = f" for {Path(result['target']).name}" if result["judged"] else ""
    return _listing(f"The most harmful texts{target} by {result['estimator']}", {"": result["worst"]})


def _listing(title: str, sides: Mapping[str, Sequence[Mapping[str, Any]]]) -> Table:
    listing = Table(title=escape(title), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    ids = [len(str(row["id"])) for rows in sides.values() for row in rows]
    fixed = {"": max(map(len, sides)), "score": 9, "id": min(max(ids, default=2), 16)}
    for name, width in fixed.items():
        if name or width:
            listing.add_column(name, justify="right" if name == "score" else "left", no_wrap=True, min_width=width, max_width=width)
    # long texts must not squeeze the others
    listing.add_column("text", no_wrap=True, overflow="ellipsis", max_width=max(20, out.width - sum(fixed.values()) - 3 * len(fixed)))
    for side, rows in sides.items():
        listing.add_section()
        for k, row in enumerate(rows):
            label = "" if row["label"] is None else f"[{row['label']}] "
            cells = (f"{row['score']:#.3g}", str(row["id"]), label + said(row))
            listing.add_row(*([side if k == 0 else ""] if any(sides) else []), *map(escape, cells))
    return listing


def said(row: Mapping[str, Any], width: int = SNIPPET) -> str:
    """A text in one line: the end of its prompt, and its own beginning."""
    prompt, text = (" ".join((row[part] or "").split()) for part in ("prompt", "text"))
    if not prompt:
        return _cut(text, width)
    half = max(width // 2, width - len(text))
    before = prompt if len(prompt) <= half else "…" + prompt[-half:].lstrip()
    return f"{before} → {_cut(text, width - min(half, len(before)))}"


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[:width].rstrip() + "…"


def verified(result: Mapping[str, Any]) -> Table:
    """The test loss, and accuracy, after fine-tuning on every choice."""
    rows = result["verified"]
    seeds = len(rows[0]["runs"])
    listing = Table(title=f"{result['n_test']:,} test texts after fine-tuning, {seeds} {'seed' if seeds == 1 else 'seeds'}", title_justify="left")
    listing.add_column("trained on")
    listing.add_column("texts", justify="right")
    loss = "loss" if result["kind"] == "classification" else "loss per token"
    metrics = {"loss": loss, "accuracy": "accuracy in %", "fair_score": "judged otherwise in %"}
    shown = {key: heading for key, heading in metrics.items() if key in rows[0]["runs"][0]}
    for heading in shown.values():
        listing.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        cells = []
        for key in shown:
            values = np.array([run[key] for run in row["runs"]]) * (1 if key == "loss" else 100)
            digits = 3 if key == "loss" else 1
            cells.append(f"{values.mean():.{digits}f}" + (f" ± {values.std(ddof=1):.{digits}f}" if seeds > 1 else ""))
        listing.add_row(CHOICES[row["trained_on"]], f"{row['n']:,}", *cells)
    return listing


#: The choices that are verified, in words.
CHOICES = {"all": "all texts", "selected": "the selected", "random": "random ones", "lowest-loss": "those of lowest loss"}
