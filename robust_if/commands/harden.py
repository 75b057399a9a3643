"""The command ``harden``."""

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
    Test,
    TestFraction,
    Valid,
    ValidFraction,
    err,
    out,
)  # fmt: skip
from robust_if.evaluations import hardening
from robust_if.loading import read
from robust_if.models import usual


def harden(
    data: Data,
    eps: Radius,
    out_dir: Annotated[Path, typer.Option("--out", help="Folder for the model, the weights and the result; the same command resumes there.")],
    label: Label = None,
    sample_id: Id = None,
    norm: Norm = "linf",
    immutable: Immutable = "",
    categories: Categories = False,
    method: Annotated[str, typer.Option(help=f"How the model is trained, one of {', '.join(hardening.METHODS)}.")] = "pgd",
    steps: Annotated[int, typer.Option(help="Of the attack in training; each costs about as much as plain training.")] = 7,
    rho: Annotated[float, typer.Option(help="Radius of sharpness-aware minimisation, such as 0.05, at twice the cost.")] = 0.0,
    remove: Annotated[float, typer.Option(help="Share of the training samples, those that harm robustness most, that --action is about.")] = 0.0,
    action: Annotated[str, typer.Option(help="remove, reweigh or relabel: what happens to them.")] = "remove",
    rescore_every: Annotated[
        int | None, typer.Option(help="Choose the samples anew every so many epochs; by default once, by a first model.")
    ] = None,
    estimator: Annotated[str, typer.Option(help="What scores the samples: a name, see `robust-if estimators`.")] = "ip",
    preset: Preset = "standard",
    samples: Attacked = 200,
    valid: Valid = None,
    valid_fraction: ValidFraction = 0.1,
    test: Test = None,
    test_fraction: TestFraction = 0.2,
    model: Model = None,
    epochs: Epochs = None,
    lr: Rate = None,
    optimizer: Optimizer = "adamw",
    batch_size: BatchSize = 64,
    seed: Seed = 0,
    as_json: Json = False,
    overwrite: Overwrite = False,
) -> None:
    """Train a model that holds under attack, on all samples or on those that do robustness no harm, and show what it gained and what it cost.

    An undefended model is trained beside it by the same recipe, and both are attacked on the same test samples. Which training samples to leave out,
    reweigh or relabel is decided by their influence on the loss of attacked validation samples.
    """
    with options.errors():
        whole = read(data, label=label, id=sample_id)
        train, valid_data, test_data, warnings = options.splits(whole, valid, test, label, sample_id, (valid_fraction, test_fraction), seed)
        name = model or usual(train.kind)
        plan = hardening.HardeningPlan(
            train, valid_data, test_data, eps, norm, tuple(options.names(immutable)), categories, method, steps, rho, action,  # type: ignore[arg-type]
            remove, rescore_every, options.one(options.estimators(estimator, seed, None))[0], name,
            options.recipe(name, len(train), epochs, lr, optimizer, batch_size, seed), preset, samples or None, seed, f"Hardening {data.name}",
            shlex.join(["robust-if", *sys.argv[1:]]), warnings,
        )  # fmt: skip
        options.logs(as_json, (), logging.WARNING)
        result = hardening.run(plan, out_dir, progress=options.progress, overwrite=overwrite)
        if as_json:
            typer.echo(json.dumps(result))
            return
        out.print(table(result))
        out.print(said(result), soft_wrap=True, markup=False)
        for which, each in result["models"].items():
            if each["believable"] is False:
                err.print(f"[bold red]warning:[/] {escape(which)}: {escape(each['verdict'])}", soft_wrap=True)
        options.note(result["warnings"])
        options.files(result)


def table(result: Mapping[str, Any]) -> Table:
    """Every model without and under attack, for a terminal."""
    found = Table(title=f"Accuracy of {result['n_test']:,} test samples in %", title_justify="left", caption_justify="left")
    found.caption = escape(next(iter(result["models"].values()))["budget"])
    found.add_column("model")
    for heading in ("clean", "under attack"):
        found.add_column(heading, justify="right", no_wrap=True)
    for name, each in result["models"].items():
        shares = [_share(each[kind], each[interval]) for kind, interval in (("clean_accuracy", "clean_interval"), ("accuracy", "interval"))]
        found.add_row(escape(name), *shares)
    found.add_section()
    found.add_row("difference", *(_difference(result["gain"][what]) for what in ("right", "robust")), style="bold")
    return found


def said(result: Mapping[str, Any]) -> str:
    """What was done to the training samples, in a sentence."""
    changed = ", ".join(f"{count:,} {what}" for what, count in result["changed"].items() if count) or "none removed, reweighed or relabelled"
    again = f", chosen anew every {result['rescore_every']} epochs (this is the last choice)" if result["rescore_every"] else ""
    return f"Of {result['n_train']:,} training samples {changed}{again}."


def _share(value: float, ends: Sequence[float]) -> str:
    return f"{100 * value:.1f} \\[{100 * ends[0]:.1f}, {100 * ends[1]:.1f}]"


def _difference(found: Mapping[str, float]) -> str:
    return f"{100 * found['value']:+.1f} \\[{100 * found['low']:+.1f}, {100 * found['high']:+.1f}]"
