"""The command ``robustness``."""

from __future__ import annotations

import json
import logging
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from robust_if.commands import options
from robust_if.commands.options import (
    Attacked,
    BatchSize,
    Categories,
    Data,
    Epochs,
    Id,
    Immutable,
    Json,
    Label,
    Model,
    Norm,
    Optimizer,
    Overwrite,
    Preset,
    Radius,
    Rate,
    Seed,
    TestFraction,
    Valid,
    ValidFraction,
    err,
    out,
)  # fmt: skip
from robust_if.evaluations import robustness_files
from robust_if.loading import read
from robust_if.models import usual


def robustness(
    data: Data,
    eps: Radius,
    out_dir: Annotated[Path, typer.Option("--out", help="Folder for the samples, the result and the model; the same command resumes there.")],
    label: Label = None,
    sample_id: Id = None,
    norm: Norm = "linf",
    preset: Preset = "standard",
    immutable: Immutable = "",
    categories: Categories = False,
    samples: Attacked = 200,
    checks: Annotated[bool, typer.Option(help="Look for signs that the number is too high.")] = True,
    valid: Valid = None,
    valid_fraction: ValidFraction = 0.1,
    test: Annotated[Path | None, typer.Option(help="Held-out data in the same format: the samples that are attacked.")] = None,
    test_fraction: TestFraction = 0.2,
    model: Model = None,
    checkpoint: Annotated[Path | None, typer.Option(help="Attack this trained model (safetensors) instead of training one.")] = None,
    epochs: Epochs = None,
    lr: Rate = None,
    optimizer: Optimizer = "adamw",
    batch_size: BatchSize = 64,
    seed: Seed = 0,
    as_json: Json = False,
    overwrite: Overwrite = False,
) -> None:
    """Attack a model on test samples, and tell the accuracy that is left, with what speaks against the number.

    A model is trained on the data unless `--checkpoint` names one. Robust accuracy is an upper bound: a sample counts if no attack broke it. Checks
    look for models on which attacks fail for the wrong reasons, such as random or rounded ones; where one fails, the number is not to be believed.
    """
    with options.errors():
        whole = read(data, label=label, id=sample_id)
        train, valid_data, test_data, warnings = options.splits(whole, valid, test, label, sample_id, (valid_fraction, test_fraction), seed)
        name = model or usual(train.kind)
        options.logs(as_json, (), logging.WARNING)
        result = robustness_files.measure(
            train, valid_data, test_data, out_dir, name=name, eps=eps, norm=norm, preset=preset, immutable=options.names(immutable),
            categories=categories, samples=samples or None, checks=checks, seed=seed, progress=options.progress, overwrite=overwrite,
            model=checkpoint or options.recipe(name, len(train), epochs, lr, optimizer, batch_size, seed),
            warnings=() if test else warnings[-1:],  # of the test samples: nothing is measured on the validation samples
            command=shlex.join(["robust-if", *sys.argv[1:]]),
        )  # fmt: skip
        if as_json:
            typer.echo(json.dumps(result))
            return
        for listing in tables(result):
            out.print(listing)
        if result["believable"] is False:
            err.print(f"[bold red]warning:[/] {escape(result['verdict'])}", soft_wrap=True)
        else:
            out.print(result["verdict"], soft_wrap=True, markup=False)
        options.note(result["warnings"])
        options.files(result)


def tables(result: Mapping[str, Any]) -> list[Table]:
    """The result for a terminal: accuracy after each attack, and the checks."""
    doubt = "" if result["believable"] is not False else ": NOT TO BE BELIEVED"
    attacks = Table(title=escape(f"Accuracy of {result['n']:,} samples in %{doubt}"), title_justify="left", caption_justify="left")
    attacks.caption = escape(f"{result['threat']}; preset {result['preset']}; each attack tries the samples that are left")
    attacks.add_column("attack", no_wrap=True)
    attacks.add_column("budget")
    for heading in ("broke", "accuracy", "95 % interval", "seconds"):
        attacks.add_column(heading, justify="right", no_wrap=True)
    attacks.add_row("none (clean)", "", "", _points(result["clean_accuracy"]), _interval(result["clean_interval"]), "")
    for each in result["members"]:
        share = (_points(each["accuracy"]), _interval(each["interval"]), f"{each['seconds']:.1f}")
        attacks.add_row(escape(each["name"]), each["budget"], f"{each['broke']:,}", *share)
    attacks.add_section()
    attacks.add_row("robust", "", "", _points(result["accuracy"]), _interval(result["interval"]), f"{result['seconds']:.1f}", style="bold")
    if not result["checks"]:
        return [attacks]
    checks = Table(title=f"Checks, on {result['checked']} samples", title_justify="left")
    for heading in ("check", "passed", "what was seen"):
        checks.add_column(heading, no_wrap=heading != "what was seen")
    for each in result["checks"]:
        passed = {True: "yes", False: "[bold red]NO[/]", None: "–"}[each["passed"]]
        checks.add_row(each["name"], passed, escape(each["said"]))
    return [attacks, checks]


def _points(share: float) -> str:
    return f"{100 * share:.1f}"


def _interval(ends: Sequence[float]) -> str:
    return f"{100 * ends[0]:.1f}–{100 * ends[1]:.1f}"
