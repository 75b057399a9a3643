"""The command line. It reads options, calls the pipeline, and turns errors into one clear line; nothing else."""

from __future__ import annotations

import json
import logging
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from rich.markup import escape
from rich.table import Table

import robust_if
from robust_if.commands import evaluate, fairness, harden, images, language, options, poisons, repair, robustness, tradeoffs
from robust_if.commands.options import (
    BatchSize,
    Categories,
    Damping,
    Data,
    Epochs,
    Eps,
    Id,
    Immutable,
    Json,
    Label,
    Memory,
    Model,
    Optimizer,
    Overwrite,
    Positive,
    Rate,
    Seed,
    Sensitive,
    Steps,
    Targets,
    Test,
    TestFraction,
    Trained,
    Truth,
    Valid,
    ValidFraction,
    err,
    out,
)  # fmt: skip
from robust_if.estimators.named import named
from robust_if.evaluations import scoring, tables, validation
from robust_if.evaluations.attack_files import read_inputs
from robust_if.evaluations.digits import digits
from robust_if.evaluations.plan import Plan, Suspicion
from robust_if.evaluations.question import Asked, Question
from robust_if.evaluations.report.remade import remake
from robust_if.evaluations.scenario import detectors, run
from robust_if.models import usual
from robust_if.sweep import Sweep
from robust_if.training import Recipe

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode="markdown", pretty_exceptions_enable=False)


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
    with options.errors():
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
        str | None,
        typer.Option(
            help="Column with the true labels, or a boolean one marking bad rows, or truth.parquet of `robust-if attack`; no score sees it."
        ),
    ] = None,
    valid: Valid = None,
    valid_fraction: ValidFraction = 0.1,
    test: Test = None,
    test_fraction: TestFraction = 0.2,
    model: Model = None,
    checkpoint: Trained = None,
    estimator: Annotated[str, typer.Option(help="Comma-separated names, see `robust-if estimators`; the first one decides.")] = "label-odds,fvm,ip",
    remove: Annotated[str, typer.Option(help="'auto', a share such as 0.1, or a number of samples such as 100.")] = "auto",
    attack_inputs: Annotated[
        Path | None, typer.Option(help="Inputs on which a suspected attack works, in the same format, ten or more; labels are not needed.")
    ] = None,
    goal_class: Annotated[str | None, typer.Option(help="The label that the suspected attack makes the model say.")] = None,
    max_false_positives: Annotated[
        float | None,
        typer.Option(help="With --attack-inputs: share of clean samples that 'auto' may remove; the smallest from 0.01 to 0.1 that ends the attack."),
    ] = None,
    sensitive: Annotated[str | None, typer.Option(help="Column of a table by whose groups wrong removals are counted.")] = None,
    epochs: Epochs = None,
    lr: Rate = None,
    optimizer: Optimizer = "adamw",
    batch_size: BatchSize = 64,
    repeats: Annotated[int, typer.Option(help="Retrainings with different seeds behind every accuracy.")] = 3,
    seed: Seed = 0,
    as_json: Json = False,
    overwrite: Overwrite = False,
) -> None:
    """Score every training sample, show the worst, write a cleaned copy, retrain, and measure the accuracy before and after.

    With `--attack-inputs` and `--goal-class` the samples that make an attack work are looked for: the verdict "poisoned" decides what is removed, and
    the estimators give a second verdict, "harms utility", of its own.
    """
    with options.errors():
        if (attack_inputs is None) != (goal_class is None):
            raise ValueError(
                "attack-inputs and goal-class: expected both or neither, got " + ("goal-class" if goal_class else "attack-inputs") + " alone"
            )
        if max_false_positives is not None and attack_inputs is None:
            raise ValueError("max-false-positives: it is about the verdict that --attack-inputs gives; pass them too")
        whole = options.read_judged(data, label, sample_id, truth)
        train_data, valid_data, test_data, warnings = options.splits(whole, valid, test, label, sample_id, (valid_fraction, test_fraction), seed)
        name = model or usual(train_data.kind)
        recipe = options.recipe(name, len(train_data), epochs, lr, optimizer, batch_size, seed)
        suspicion = None
        if attack_inputs is not None and goal_class is not None:
            suspicion = Suspicion(read_inputs(attack_inputs, train_data, label=label, id=sample_id), goal_class, max_false_positives)
        plan = Plan(
            train_data, valid_data, test_data, tuple(options.names(estimator)), remove, name, recipe, checkpoint,
            repeats=repeats, seed=seed, title=f"Samples that {'make an attack work' if suspicion else 'hurt'} in {data.name}",
            command=shlex.join(["robust-if", *sys.argv[1:]]), warnings=warnings, whole=whole, suspicion=suspicion, sensitive=sensitive,
        )  # fmt: skip
        _finish(_run(plan, out_dir, as_json, overwrite), out_dir, as_json)


@app.command()
def score(
    out_dir: Annotated[Path, typer.Option("--out", help="Folder for the scores; the same command resumes there.")],
    data: Annotated[Path | None, typer.Option(help="As for detect; not needed with --index.")] = None,
    index_dir: Annotated[Path | None, typer.Option("--index", help="Folder of `robust-if index`: its data, model and gradients are used.")] = None,
    label: Label = None,
    sample_id: Id = None,
    truth: Truth = None,
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
    steps: Steps = 10,
    immutable: Immutable = "",
    categories: Categories = False,
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
    with options.errors():
        if (data is None) == (index_dir is None):
            raise ValueError("data: expected either --data or --index, got " + ("neither" if data is None else "both"))
        question = (
            Question.load(index_dir / "question.json")
            if index_dir
            else options.question(data, label, sample_id, truth, valid, valid_fraction, model, seed)
        )
        asked = Asked.of(question)
        problem = asked.problem
        recipe = replace(options.recipe(problem.model, len(problem.train), epochs, lr, optimizer, batch_size, seed), keep=checkpoints)
        sweep = Sweep(progress=options.progress, max_memory=max_memory, precision=precision, engine=engine, workers=workers)
        options.logs(as_json, asked.warnings)
        targets = asked.targets(
            options.names(target), sensitive=sensitive, positive=positive, eps=eps, steps=steps, immutable=options.names(immutable),
            categories=categories,
        )  # fmt: skip
        result = scoring.score(
            asked, out_dir, options.estimators(estimator, seed, damping), targets,
            model=checkpoint or recipe, sweep=sweep, index=index_dir, pairs=pairs, greedy=greedy, overwrite=overwrite,
        )  # fmt: skip
        if as_json:
            typer.echo(json.dumps(result, default=str))
            return
        for listing in (tables.scores(out_dir), tables.notes(result)):
            out.print(listing)
        for name, advice in result["advice"].items():
            out.print(f"{name}: {advice}", soft_wrap=True, markup=False)
        options.files(result)


@app.command()
def index(
    data: Data,
    out_dir: Annotated[Path, typer.Option("--out", help="Folder for the model and the gradients; the same command resumes there.")],
    label: Label = None,
    sample_id: Id = None,
    truth: Truth = None,
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
    with options.errors():
        asked = Asked.of(options.question(data, label, sample_id, truth, valid, valid_fraction, model, seed))
        problem = asked.problem
        recipe = options.recipe(problem.model, len(problem.train), epochs, lr, optimizer, batch_size, seed)
        options.logs(False, asked.warnings)
        store = scoring.build_index(asked, out_dir, model=checkpoint or recipe, sweep=Sweep(progress=options.progress, max_memory=max_memory))
        out.print(f"stored {store.describe()} in {out_dir}", soft_wrap=True, markup=False)
        out.print(f"next: robust-if score --index {shlex.quote(str(out_dir))} --target utility --out runs/scores", soft_wrap=True, markup=False)


@app.command()
def validate(
    data: Data,
    out_dir: Annotated[Path, typer.Option("--out", help="Folder for the trainings and the result; the same command resumes there.")],
    label: Label = None,
    sample_id: Id = None,
    truth: Truth = None,
    valid: Valid = None,
    valid_fraction: ValidFraction = 0.1,
    model: Model = None,
    estimator: Annotated[str, typer.Option(help="Comma-separated names, see `robust-if estimators`.")] = "ip,ekfac,loss,random",
    target: Targets = "utility",
    sensitive: Sensitive = None,
    positive: Positive = None,
    eps: Eps = 0.1,
    steps: Steps = 10,
    immutable: Immutable = "",
    categories: Categories = False,
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
    with options.errors():
        asked = Asked.of(options.question(data, label, sample_id, truth, valid, valid_fraction, model, seed))
        options.logs(as_json, asked.warnings)
        problem = asked.problem
        targets = asked.targets(
            options.names(target), sensitive=sensitive, positive=positive, eps=eps, steps=steps, immutable=options.names(immutable),
            categories=categories,
        )  # fmt: skip
        result = validation.validate(
            asked, out_dir, options.estimators(estimator, seed, damping), targets,
            recipe=options.recipe(problem.model, len(problem.train), epochs, lr, optimizer, batch_size, seed), subsets=subsets, seeds=seeds,
            left_out=left_out, removed=[float(share) for share in options.names(removed)], sweep=Sweep(progress=options.progress),
            overwrite=overwrite,
        )  # fmt: skip
        if as_json:
            typer.echo(json.dumps(result))
            return
        for listing in tables.validation(result):
            out.print(listing)


app.command()(poisons.explain)
app.command()(poisons.attack)
app.command()(repair.repair)
app.command()(fairness.audit)
app.command()(robustness.robustness)
app.command()(harden.harden)
app.command()(tradeoffs.tradeoffs)
app.command()(language.trace)
app.command()(language.select)
app.command()(images.trace_images)
app.command()(evaluate.evaluate)
app.command()(evaluate.compare)


@app.command()
def report(directory: Annotated[Path, typer.Argument(help="Folder that a command with a page wrote.")]) -> None:
    """Make report.html anew from a finished run."""
    with options.errors():
        out.print(f"wrote {remake(directory)}", soft_wrap=True, markup=False)


@app.command()
def estimators() -> None:
    """List the estimators and what each one is."""
    listing = Table("name", "what it is", box=None)
    for name, each in (named() | detectors(Recipe())).items():
        listing.add_row(name, escape(each.summary))
    out.print(listing)


DEMO = ("label-odds", "fvm", "vm", "ip", "ip-ensemble", "loss", "tuned-loss", "random")


def _run(plan: Plan, directory: Path, as_json: bool, overwrite: bool) -> dict[str, Any]:
    options.logs(as_json, plan.warnings, logging.WARNING)
    result = run(plan, directory, progress=options.progress, overwrite=overwrite)
    if not as_json:
        failed = result.get("attack", {}).get("failed", False)
        options.note(result["warnings"][len(plan.warnings) : -1 if failed else None])
    return result


def _finish(result: dict[str, Any], directory: Path, as_json: bool) -> None:
    if result.get("attack", {}).get("failed"):
        err.print(f"[bold red]warning:[/] {escape(result['warnings'][-1])}", soft_wrap=True)
    if as_json:
        typer.echo(json.dumps(result))
        return
    for listing in (*tables.detection(result), tables.worst(directory), tables.accuracy(result), *tables.filtered(result)):
        out.print(listing)
    for line in tables.verdicts(result):
        out.print(line, soft_wrap=True, markup=False)
    decision = f"({result['decision']} on {result['decided_by']})"
    out.print(f"removed {result['removed']} of {result['n_train']} samples {decision}", soft_wrap=True, markup=False)
    for what in ("scores", "cleaned", "relabelled", "report"):
        out.print(f"{what:>10}  {result['files'][what]}", soft_wrap=True, markup=False)
