"""The commands ``explain`` and ``attack``."""

from __future__ import annotations

import json
import logging
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import typer

from robust_if.commands import options
from robust_if.commands.options import (
    BatchSize,
    Data,
    Epochs,
    Id,
    Json,
    Label,
    Model,
    Optimizer,
    Overwrite,
    Rate,
    Seed,
    Test,
    TestFraction,
    Trained,
    Truth,
    Valid,
    ValidFraction,
    out,
)  # fmt: skip
from robust_if.evaluations import explaining, tables
from robust_if.evaluations.attack_files import read_inputs
from robust_if.evaluations.named_attacks import ATTACKS, Options
from robust_if.evaluations.problem import Problem
from robust_if.evaluations.tampering import tamper
from robust_if.loading import read
from robust_if.models import usual
from robust_if.sweep import Sweep


def explain(
    name: Annotated[str, typer.Argument(metavar="ID", help="Id of a validation or test sample, or of one in --inputs.")],
    data: Data,
    out_dir: Annotated[Path, typer.Option("--out", help="Folder for scores and report; the same command resumes there.")],
    label: Label = None,
    sample_id: Id = None,
    truth: Truth = None,
    valid: Valid = None,
    valid_fraction: ValidFraction = 0.1,
    test: Test = None,
    test_fraction: TestFraction = 0.2,
    inputs: Annotated[
        Path | None, typer.Option(help="Other inputs in the same format that the sample is looked for in; labels are not needed.")
    ] = None,
    among: Annotated[Literal["validation", "test"] | None, typer.Option(help="Where to look, if the id is in both.")] = None,
    run: Annotated[Path | None, typer.Option(help="Folder of `robust-if detect` on the same data: its model is explained.")] = None,
    model: Model = None,
    checkpoint: Trained = None,
    checkpoints: Annotated[int, typer.Option(help="Checkpoints along the training that scores are summed over.")] = explaining.CHECKPOINTS,
    estimator: Annotated[str, typer.Option(help="A name, see `robust-if estimators`.")] = explaining.ESTIMATOR,
    epochs: Epochs = None,
    lr: Rate = None,
    optimizer: Optimizer = "adamw",
    batch_size: BatchSize = 64,
    seed: Seed = 0,
    as_json: Json = False,
    overwrite: Overwrite = False,
) -> None:
    """Show the training samples behind one prediction: those that made the model say it, and those that speak against it."""
    with options.errors():
        if run is not None and (checkpoint or model):
            raise ValueError("run: it brings its own model; do not pass --model or --checkpoint with it")
        whole = options.read_judged(data, label, sample_id, truth)
        if run is not None:
            seed = explaining.seed_of(run)
        train, valid_data, test_data, warnings = options.splits(whole, valid, test, label, sample_id, (valid_fraction, test_fraction), seed)
        model = model or usual(train.kind)
        if run is not None:
            checkpoint, model = explaining.used_by(run, whole, train)
        parts = {"validation": valid_data, "test": test_data}
        if inputs is not None:
            parts = {"inputs": read_inputs(inputs, train, label=label, id=sample_id, name="inputs")}
        elif among is not None:
            parts = {among: parts[among]}
        where, sample = explaining.find(name, parts, train)
        problem = Problem.of(train, valid_data, test_data, model=model, seed=seed)
        (chosen,) = options.one(options.estimators(estimator, seed, None))
        recipe = replace(options.recipe(model, len(train), epochs, lr, optimizer, batch_size, seed), keep=checkpoints)
        options.logs(as_json, warnings, logging.WARNING)
        result = explaining.explain(
            explaining.Prediction.of(sample, where, problem), problem, train, out_dir, chosen, model=checkpoint or recipe,
            sweep=Sweep(progress=options.progress), command=shlex.join(["robust-if", *sys.argv[1:]]), warnings=warnings, overwrite=overwrite,
        )  # fmt: skip
        if as_json:
            typer.echo(json.dumps(result))
            return
        out.print(tables.prediction(result), soft_wrap=True, markup=False)
        for listing in tables.explanation(result):
            out.print(listing)
        options.files(result)


def attack(
    name: Annotated[str, typer.Argument(metavar="NAME", help="; ".join(f"{name}: {each.summary}" for name, each in ATTACKS.items()))],
    data: Data,
    out_dir: Annotated[Path, typer.Option("--out", help="Folder for the poisoned copy, its truth and triggered inputs.")],
    goal_class: Annotated[str | None, typer.Option(help="The label that the attack makes the model say.")] = None,
    source_class: Annotated[str | None, typer.Option(help="The only class that the attack acts on; for targeted and tact.")] = None,
    rate: Annotated[float | None, typer.Option(help="Poisoned share of the samples, 0.05 or as published; for sig of the goal class.")] = None,
    covers: Annotated[float | None, typer.Option(help="Share of samples that carry the trigger under their right label.")] = None,
    size: Annotated[int | None, typer.Option(help="Side of a square, in pixels.")] = None,
    alpha: Annotated[float | None, typer.Option(help="How much of a pattern of noise shines through.")] = None,
    amplitude: Annotated[float | None, typer.Option(help="Of the stripes of sig, on pixels from 0 to 1.")] = None,
    frequency: Annotated[float | None, typer.Option(help="Of the stripes of sig, periods over the width.")] = None,
    strength: Annotated[float | None, typer.Option(help="Of the warp of wanet.")] = None,
    columns: Annotated[str, typer.Option(help="Of a table: comma-separated columns or column=value that carry the trigger.")] = "",
    sensitive: Annotated[str, typer.Option(help="Of a table: comma-separated columns that are left alone.")] = "",
    word: Annotated[str | None, typer.Option(help="The word before a text.")] = None,
    label: Label = None,
    sample_id: Id = None,
    test: Annotated[Path | None, typer.Option(help="Held-out data in the same format that triggered inputs are made of.")] = None,
    test_fraction: Annotated[float, typer.Option(help="Without --test: share of the data held out for them.")] = 0.1,
    seed: Seed = 0,
    as_json: Json = False,
    overwrite: Overwrite = False,
) -> None:
    """Write a poisoned copy of the data, to see whether it would be found. Use it on your own data and models."""
    with options.errors():
        chosen = Options(
            goal_class=goal_class, source_class=source_class, rate=rate, covers=covers, size=size, alpha=alpha, amplitude=amplitude,
            frequency=frequency, strength=strength, columns=tuple(options.names(columns)), sensitive=tuple(options.names(sensitive)), word=word,
            seed=seed,
        )  # fmt: skip
        held = None if test is None else read(test, label=label, id=sample_id)
        result = tamper(
            read(data, label=label, id=sample_id), name, chosen, out_dir, test=held, test_fraction=test_fraction, overwrite=overwrite
        )  # fmt: skip
        options.logs(as_json, result["warnings"], logging.WARNING)
        if as_json:
            typer.echo(json.dumps(result))
            return
        out.print(f"poisoned {result['poisoned']} of {result['n']} samples, {result['covers']} covers, {result['triggered']} triggered inputs")
        for line in tables.carried(result):
            out.print(line, soft_wrap=True, markup=False)
        options.files(result)
        out.print(f"next: {_next(result, label, sample_id)}", soft_wrap=True, markup=False)


def _next(result: dict[str, object], label: str | None, sample_id: str | None) -> str:
    """The command that looks for what was planted."""
    files = result["files"]
    assert isinstance(files, dict)
    words = ["robust-if", "detect", "--data", files["poisoned"], "--truth", files["truth"], "--out", "runs/detect"]
    words += ["--test", files["test"]] if "test" in files else []
    words += ["--attack-inputs", files["triggered"], "--goal-class", str(result["goal_class"])] if "triggered" in files else []
    words += [each for option, value in (("--label", label), ("--id", sample_id)) if value for each in (option, value)]
    return shlex.join(words)
