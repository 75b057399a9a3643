"""The command line. It reads options, calls the pipeline, and turns errors into one clear line; nothing else."""

from __future__ import annotations

import json
import logging
import math
import shlex
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from rich.progress import track
from rich.table import Table

import robust_if
from robust_if.estimators import Estimator
from robust_if.estimators.named import named
from robust_if.evaluations import report as pages
from robust_if.evaluations import scoring, tables, validation
from robust_if.evaluations.digits import digits
from robust_if.evaluations.plan import Plan
from robust_if.evaluations.question import TARGETS, Asked, Question
from robust_if.evaluations.scenario import detectors, run
from robust_if.evaluations.splits import split_off
from robust_if.loading import Dataset, read
from robust_if.models import MODELS
from robust_if.sweep import Sweep
from robust_if.training import Recipe

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode="markdown", pretty_exceptions_enable=False)
out, err = Console(), Console(stderr=True)

#: Peak learning rate by optimiser.
RATES = {"sgd": 0.05, "adamw": 2e-3}
#: Epochs of the ready models; enough to fit the data, few enough not to memorise wrong labels.
EPOCHS = {"logistic-regression": 30, "mlp": 15, "cnn": 8, "resnet18": 25}

Data = Annotated[Path, typer.Option(help="CSV, Parquet, .npz, IDX images, a folder class/*.png, or a Hugging Face data set saved on disk.")]
Label = Annotated[str | None, typer.Option(help="Column or array with the labels.")]
Id = Annotated[str | None, typer.Option("--id", help="Column or array with the sample ids; the row number by default.")]
Valid = Annotated[Path | None, typer.Option(help="Clean validation data in the same format: the samples that the score is about.")]
ValidFraction = Annotated[float, typer.Option(help="Without --valid: share of the data taken for validation.")]
Model = Annotated[str | None, typer.Option(help=f"One of {', '.join(MODELS)}, or module:function taking (shape, classes).")]
Trained = Annotated[Path | None, typer.Option("--checkpoint", help="Score with this trained model (safetensors) instead of training one.")]
Epochs = Annotated[int | None, typer.Option(help="Passes over the data; depends on the model by default.")]
Rate = Annotated[float | None, typer.Option(help="Peak learning rate; 0.002 for adamw and 0.05 for sgd by default.")]
Optimizer = Annotated[Literal["sgd", "adamw"], typer.Option(help="AdamW copes with features of any scale, such as those of text.")]
BatchSize = Annotated[int, typer.Option(help="Samples per training step.")]
Seed = Annotated[int, typer.Option(help="Of everything random.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else on standard output.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier run in the output folder.")]
Targets = Annotated[str, typer.Option("--target", help=f"Comma-separated, some of {', '.join(TARGETS)}; all are scored in one pass.")]
Sensitive = Annotated[str | None, typer.Option(help="For demographic-parity: a column with two values, or column=value.")]
Positive = Annotated[str | None, typer.Option(help="For demographic-parity: the label that is compared; the last one by default.")]
Eps = Annotated[float, typer.Option(help="For adversarial: L∞ radius of the attack, in standard deviations of a feature.")]
Damping = Annotated[float | None, typer.Option(help="λ of estimators with curvature, as an L2 penalty; a tenth of the mean eigenvalue by default.")]
Memory = Annotated[str | None, typer.Option(help="Most memory that scoring may use, such as 2GB; batches are made to fit.")]


@app.callback(invoke_without_command=True)
def main(version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False) -> None:
    """Find the training samples that hurt, remove or relabel them, retrain, and see whether it helped.

    Start with `robust-if demo`. For your own data use `robust-if detect --data PATH`.
    """
    if version:
        out.print(f"robust-if {robust_if.__version__}")
        raise typer.Exit


@app.command()
def demo(
    out_dir: Annotated[Path, typer.Option("--out", help="Folder for scores and report.")] = Path("runs/demo"),
    as_json: Json = False,
    overwrite: Overwrite = False,
) -> None:
    """The whole job in under a minute: scikit-learn's digits with 20 % of the labels flipped."""
    torch.set_num_threads(1)  # for so small a model a second thread costs more than it gives, most of all on a busy machine
    with _errors():
        train, valid, test = digits(out_dir.with_name(out_dir.name + "-data"))
        plan = Plan(
            train, valid, test, DEMO, model="mlp", recipe=Recipe(epochs=40), title="Handwritten digits with 20 % wrong labels",
            command="robust-if demo",
        )  # fmt: skip
        _finish(_run(plan, out_dir, as_json, overwrite), out_dir, as_json)


@app.command()
def detect(
    data: Data,
    out_dir: Annotated[Path, typer.Option("--out", help="Folder for scores, cleaned data and report; the same command resumes there.")],
    label: Label = None,
    sample_id: Id = None,
    truth: Annotated[
        str | None, typer.Option(help="Column with the true labels, or a boolean one marking bad rows: judges the detectors, never seen by them.")
    ] = None,
    valid: Valid = None,
    valid_fraction: ValidFraction = 0.1,
    test: Annotated[Path | None, typer.Option(help="Test data in the same format, for the accuracy before and after.")] = None,
    test_fraction: Annotated[float, typer.Option(help="Without --test: share of the data taken for the test.")] = 0.2,
    model: Model = None,
    checkpoint: Trained = None,
    estimator: Annotated[str, typer.Option(help="Comma-separated names, see `robust-if estimators`; the first one decides.")] = "label-odds,fvm,ip",
    remove: Annotated[str, typer.Option(help="'auto', a share such as 0.1, or a number of samples such as 100.")] = "auto",
    epochs: Epochs = None,
    lr: Rate = None,
    optimizer: Optimizer = "adamw",
    batch_size: BatchSize = 64,
    repeats: Annotated[int, typer.Option(help="Retrainings with different seeds behind every accuracy.")] = 3,
    seed: Seed = 0,
    as_json: Json = False,
    overwrite: Overwrite = False,
) -> None:
    """Score every training sample, show the worst, write a cleaned copy, retrain, and measure the accuracy before and after."""
    with _errors():
        whole = read(data, label=label, id=sample_id, truth=truth)
        train_data, valid_data, test_data, warnings = _splits(
            whole,
            None if valid is None else read(valid, label=label, id=sample_id),
            None if test is None else read(test, label=label, id=sample_id),
            (valid_fraction, test_fraction),
            seed,
        )
        name = model or ("cnn" if train_data.kind == "image" else "mlp")
        recipe = _recipe(name, len(train_data), epochs, lr, optimizer, batch_size, seed)
        plan = Plan(
            train_data, valid_data, test_data, tuple(_names(estimator)), remove, name, recipe, checkpoint,
            repeats=repeats, seed=seed, title=f"Samples that hurt in {data.name}",
            command=shlex.join(["robust-if", *sys.argv[1:]]), warnings=warnings, whole=whole,
        )  # fmt: skip
        _finish(_run(plan, out_dir, as_json, overwrite), out_dir, as_json)


@app.command()
def score(
    out_dir: Annotated[Path, typer.Option("--out", help="Folder for the scores; the same command resumes there.")],
    data: Annotated[Path | None, typer.Option(help="As for detect; not needed with --index.")] = None,
    index_dir: Annotated[Path | None, typer.Option("--index", help="Folder of `robust-if index`: its data, model and gradients are used.")] = None,
    label: Label = None,
    sample_id: Id = None,
    truth: Annotated[str | None, typer.Option(help="Column with the true labels, for validation data that are split off.")] = None,
    valid: Valid = None,
    valid_fraction: ValidFraction = 0.1,
    model: Model = None,
    checkpoint: Trained = None,
    checkpoints: Annotated[int, typer.Option(help="Checkpoints along the training that scores are summed over (TracIn).")] = 1,
    estimator: Annotated[str, typer.Option(help="Comma-separated names, see `robust-if estimators`.")] = "ip",
    target: Targets = "utility",
    sensitive: Sensitive = None,
    positive: Positive = None,
    eps: Eps = 0.1,
    damping: Damping = None,
    pairs: Annotated[bool, typer.Option("--pairs", help="Also write pairs.npy: which training sample harms which validation sample.")] = False,
    greedy: Annotated[int, typer.Option(help="Also remove so many samples one after another, scoring the rest again: removal.csv.")] = 0,
    epochs: Epochs = None,
    lr: Rate = None,
    optimizer: Optimizer = "adamw",
    batch_size: BatchSize = 64,
    seed: Seed = 0,
    max_memory: Memory = None,
    precision: Annotated[Literal["full", "bf16"], typer.Option(help="bf16 computes in half precision and checks the ranks against full.")] = "full",
    engine: Annotated[Literal["local", "ray"], typer.Option(help="ray spreads the training data over the workers of a cluster.")] = "local",
    workers: Annotated[int | None, typer.Option(help="Workers of the ray engine; all CPUs or GPUs by default.")] = None,
    as_json: Json = False,
    overwrite: Overwrite = False,
) -> None:
    """Score every training sample by any estimators for any targets, and write the scores as Parquet."""
    with _errors():
        if (data is None) == (index_dir is None):
            raise ValueError("data: expected either --data or --index, got " + ("neither" if data is None else "both"))
        question = (
            Question.load(index_dir / "question.json") if index_dir else _question(data, label, sample_id, truth, valid, valid_fraction, model, seed)
        )
        asked = Asked.of(question)
        recipe = replace(_recipe(asked.problem.model, len(asked.problem.train), epochs, lr, optimizer, batch_size, seed), keep=checkpoints)
        sweep = Sweep(progress=_progress, max_memory=max_memory, precision=precision, engine=engine, workers=workers)
        _logs(as_json, asked.warnings)
        result = scoring.score(
            asked, out_dir, _estimators(estimator, seed, damping), asked.targets(_names(target), sensitive=sensitive, positive=positive, eps=eps),
            model=checkpoint or recipe, sweep=sweep, index=index_dir, pairs=pairs, greedy=greedy, overwrite=overwrite,
        )  # fmt: skip
        if as_json:
            typer.echo(json.dumps(result, default=str))
            return
        for listing in (tables.scores(out_dir), tables.notes(result)):
            out.print(listing)
        for name, advice in result["advice"].items():
            out.print(f"{name}: {advice}", soft_wrap=True, markup=False)
        for what, path in result["files"].items():
            out.print(f"{what:>10}  {path}", soft_wrap=True, markup=False)


@app.command()
def index(
    data: Data,
    out_dir: Annotated[Path, typer.Option("--out", help="Folder for the model and the gradients; the same command resumes there.")],
    label: Label = None,
    sample_id: Id = None,
    truth: Annotated[str | None, typer.Option(help="Column with the true labels, for validation data that are split off.")] = None,
    valid: Valid = None,
    valid_fraction: ValidFraction = 0.1,
    model: Model = None,
    checkpoint: Trained = None,
    epochs: Epochs = None,
    lr: Rate = None,
    optimizer: Optimizer = "adamw",
    batch_size: BatchSize = 64,
    seed: Seed = 0,
    max_memory: Memory = None,
) -> None:
    """Store the gradients of all training samples once; then `robust-if score --index DIR` answers any target in a moment."""
    with _errors():
        asked = Asked.of(_question(data, label, sample_id, truth, valid, valid_fraction, model, seed))
        recipe = _recipe(asked.problem.model, len(asked.problem.train), epochs, lr, optimizer, batch_size, seed)
        _logs(False, asked.warnings)
        store = scoring.build_index(asked, out_dir, model=checkpoint or recipe, sweep=Sweep(progress=_progress, max_memory=max_memory))
        out.print(f"stored {store.describe()} in {out_dir}", soft_wrap=True, markup=False)
        out.print(f"next: robust-if score --index {shlex.quote(str(out_dir))} --target utility --out runs/scores", soft_wrap=True, markup=False)


@app.command()
def validate(
    data: Data,
    out_dir: Annotated[Path, typer.Option("--out", help="Folder for the trainings and the result; the same command resumes there.")],
    label: Label = None,
    sample_id: Id = None,
    truth: Annotated[str | None, typer.Option(help="Column with the true labels, for validation data that are split off.")] = None,
    valid: Valid = None,
    valid_fraction: ValidFraction = 0.1,
    model: Model = None,
    estimator: Annotated[str, typer.Option(help="Comma-separated names, see `robust-if estimators`.")] = "ip,ekfac,loss,random",
    target: Targets = "utility",
    sensitive: Sensitive = None,
    positive: Positive = None,
    eps: Eps = 0.1,
    damping: Damping = None,
    subsets: Annotated[int, typer.Option(help="Random halves of the data that a model is trained on, for the LDS.")] = 40,
    seeds: Annotated[int, typer.Option(help="Trainings per subset.")] = 2,
    left_out: Annotated[int, typer.Option(help="Samples left out one at a time, for the leave-one-out correlation.")] = 0,
    removed: Annotated[str, typer.Option(help="Shares of worst samples to retrain without, such as 0.05,0.1, against random ones.")] = "",
    epochs: Epochs = None,
    lr: Rate = None,
    optimizer: Optimizer = "adamw",
    batch_size: BatchSize = 64,
    seed: Seed = 0,
    as_json: Json = False,
    overwrite: Overwrite = False,
) -> None:
    """Retrain on subsets of the data, and see how well each estimator predicted what that does to each target."""
    with _errors():
        asked = Asked.of(_question(data, label, sample_id, truth, valid, valid_fraction, model, seed))
        _logs(as_json, asked.warnings)
        result = validation.validate(
            asked, out_dir, _estimators(estimator, seed, damping), asked.targets(_names(target), sensitive=sensitive, positive=positive, eps=eps),
            recipe=_recipe(asked.problem.model, len(asked.problem.train), epochs, lr, optimizer, batch_size, seed), subsets=subsets, seeds=seeds,
            left_out=left_out, removed=[float(share) for share in _names(removed)], sweep=Sweep(progress=_progress), overwrite=overwrite,
        )  # fmt: skip
        if as_json:
            typer.echo(json.dumps(result))
            return
        for listing in tables.validation(result):
            out.print(listing)


@app.command()
def report(directory: Annotated[Path, typer.Argument(help="Folder that demo or detect wrote.")]) -> None:
    """Make report.html anew from a finished run."""
    with _errors():
        out.print(f"wrote {pages.render(directory)}", soft_wrap=True, markup=False)


@app.command()
def estimators() -> None:
    """List the estimators and what each one is."""
    listing = Table("name", "what it is", box=None)
    for name, each in (named() | detectors(Recipe())).items():
        listing.add_row(name, escape(each.summary))
    out.print(listing)


DEMO = ("label-odds", "fvm", "vm", "ip", "ip-ensemble", "loss", "tuned-loss", "random")


def _recipe(
    model: str, samples: int, epochs: int | None, lr: float | None, optimizer: Literal["sgd", "adamw"], batch_size: int, seed: int
) -> Recipe:
    """The usual passes for the model, or as many as make 300 steps, without which a small data set is hardly learnt."""
    steps = math.ceil(samples / max(batch_size, 1))
    usual = max(EPOCHS.get(model, 20), math.ceil(300 / steps))
    return Recipe(
        epochs=usual if epochs is None else epochs, lr=RATES[optimizer] if lr is None else lr, optimizer=optimizer, batch_size=batch_size, seed=seed
    )


def _question(
    data: Path | None, label: str | None, sample_id: str | None, truth: str | None, valid: Path | None, fraction: float, model: str | None, seed: int
) -> Question:
    return Question(str(data), label, sample_id, truth, str(valid) if valid else None, fraction, model, seed)


def _names(text: str) -> list[str]:
    return [name for name in map(str.strip, text.split(",")) if name]


def _estimators(text: str, seed: int, damping: float | None) -> list[Estimator]:
    known, names = named(seed, damping), _names(text)
    unknown = [name for name in names if name not in known]
    if unknown or not names or len(set(names)) < len(names):
        raise ValueError(f"estimator: expected some of {', '.join(known)}, each once, got {', '.join(unknown or names) or 'none'}")
    return [known[name] for name in names]


def _splits(
    data: Dataset, valid: Dataset | None, test: Dataset | None, fractions: tuple[float, float], seed: int
) -> tuple[Dataset, Dataset, Dataset, tuple[str, ...]]:
    """Training, validation and test data; what is not given is split off."""
    warnings: list[str | None] = []
    if valid is None:
        data, valid, warning = split_off(data, fractions[0], seed, "validation")
        warnings.append(warning)
    if test is None:
        data, test, warning = split_off(data, fractions[1], seed + 1, "test")
        warnings.append(warning)
    return data, valid, test, tuple(filter(None, warnings))


def _progress(items: Iterable[Any], description: str) -> Iterable[Any]:
    return track(items, description, console=err, transient=True, disable=not err.is_terminal)


def _logs(as_json: bool, warnings: Iterable[str], level: int = logging.INFO) -> None:
    """Warnings of the run, and what the toolkit says on the way: memory plans, sizes, where it goes on."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[RichHandler(console=err, show_time=False, show_path=False)])
    if not as_json:
        logging.getLogger("robust_if").setLevel(level)
        for warning in warnings:
            err.print(f"[yellow]note:[/] {warning}", soft_wrap=True)


def _run(plan: Plan, directory: Path, as_json: bool, overwrite: bool) -> dict[str, Any]:
    _logs(as_json, plan.warnings, logging.WARNING)
    return run(plan, directory, progress=_progress, overwrite=overwrite)


def _finish(result: dict[str, Any], directory: Path, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(result))
        return
    out.print(tables.detection(result))
    out.print(tables.worst(directory))
    out.print(tables.accuracy(result))
    out.print(f"removed {result['removed']} of {result['n_train']} samples ({result['decision']} on {result['decided_by']})")
    for what in ("scores", "cleaned", "relabelled", "report"):
        out.print(f"{what:>10}  {result['files'][what]}", soft_wrap=True, markup=False)


@contextmanager
def _errors() -> Iterator[None]:
    """One line for a user's error (exit code 2), a hint for an interruption (exit code 1), and no traceback."""
    try:
        yield
    except KeyboardInterrupt:
        err.print("interrupted; what was done is kept, and the same command (without --overwrite) goes on from there", soft_wrap=True)
        raise typer.Exit(1) from None
    except (ValueError, TypeError, OSError, ImportError) as error:
        err.print(f"[bold red]error:[/] {escape(' '.join(str(error).splitlines()))}", soft_wrap=True)
        raise typer.Exit(2) from None
