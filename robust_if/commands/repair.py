"""The command ``repair``."""

from __future__ import annotations

import json
import logging
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from robust_if.commands import options
from robust_if.commands.fairness import Features
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
    Truth,
    Valid,
    ValidFraction,
    err,
    out,
)  # fmt: skip
from robust_if.evaluations import repairing
from robust_if.evaluations.repair_plan import CLOSED_FORM, RepairPlan
from robust_if.evaluations.report.repair import NAMES, RATES, worse
from robust_if.fairness.metrics import COMPARED
from robust_if.fairness.steps import ACTIONS


def repair(
    data: Data,
    sensitive: Features,
    target: Annotated[str, typer.Option(help=f"Comma-separated gaps that should close, some of {', '.join(COMPARED)}.")],
    out_dir: Annotated[Path, typer.Option("--out", help="Folder for the weights, the repaired data and the report.")],
    label: Label = None,
    sample_id: Id = None,
    truth: Truth = None,
    action: Annotated[str, typer.Option(help=f"One of {', '.join(ACTIONS)}: what may be done to training samples.")] = "reweigh",
    bound: Annotated[float, typer.Option(help="Of the absolute value of every gap, on validation data.")] = 0.005,
    max_accuracy_loss: Annotated[float | None, typer.Option(help="On validation data, such as 0.01; no limit by default.")] = None,
    positive: Annotated[
        str | None, typer.Option(help="The label whose prediction is the benefit; the last of two by default, and each of more.")
    ] = None,
    control: Annotated[str, typer.Option(help="Columns like --sensitive: groups are compared within each of their values.")] = "",
    without_sensitive: Annotated[
        bool, typer.Option("--without-sensitive", help="Keep the sensitive columns from the model; else they are features like the others.")
    ] = False,
    smallest: Annotated[int, typer.Option(help="Groups with fewer samples are warned of.")] = 30,
    valid: Valid = None,
    valid_fraction: ValidFraction = 0.4,
    test: Test = None,
    test_fraction: TestFraction = 0.2,
    model: Model = None,
    penalty: Annotated[float, typer.Option(help="L2 penalty of logistic regression of two classes, which is fitted in closed form.")] = 1.0,
    estimator: Annotated[
        str | None, typer.Option(help="A name, see `robust-if estimators`; by default exact in closed form, and ip for other models.")
    ] = None,
    cost: Annotated[float, typer.Option(help="Of changing data, in units of accuracy: at 1 about a third as many samples change as at 0.05.")] = 0.05,
    rounds: Annotated[int, typer.Option(help="Steps that are tried at most; after each the model is fitted again.")] = 10,
    epochs: Epochs = None,
    lr: Rate = None,
    optimizer: Optimizer = "adamw",
    batch_size: BatchSize = 64,
    repeats: Annotated[int, typer.Option(help="Other models than the closed form: trainings from scratch that confirm the result.")] = 3,
    seed: Seed = 0,
    as_json: Json = False,
    overwrite: Overwrite = False,
) -> None:
    """Reweigh, remove or relabel training samples until groups are treated alike, and show what that did to every metric.

    What is changed is decided on validation data, in rounds that each fit the model again; test data are looked at once, at the end. The model is
    logistic regression unless `--model` names another one.
    """
    with options.errors():
        whole = options.read_judged(data, label, sample_id, truth)
        train, valid_data, test_data, warnings = options.splits(whole, valid, test, label, sample_id, (valid_fraction, test_fraction), seed)
        name = model or CLOSED_FORM
        plan = RepairPlan(
            train, valid_data, test_data, tuple(options.names(sensitive)), tuple(options.names(target)), action,  # type: ignore[arg-type]
            bound, max_accuracy_loss, tuple(options.names(control)), positive, without_sensitive, name,
            options.recipe(name, len(train), epochs, lr, optimizer, batch_size, seed),
            None if estimator is None else options.one(options.estimators(estimator, seed, None))[0],
            penalty, rounds, cost, repeats, smallest, seed, f"Repairing {data.name}", shlex.join(["robust-if", *sys.argv[1:]]), warnings, whole,
        )  # fmt: skip
        options.logs(as_json, (), logging.WARNING)
        result = repairing.run(plan, out_dir, progress=options.progress, overwrite=overwrite)
        if as_json:
            typer.echo(json.dumps(result))
            return
        out.print(result["verdict"], soft_wrap=True, markup=False)
        for text in worse(result):
            err.print(f"[bold red]worse:[/] {escape(text)}", soft_wrap=True)
        for listing in tables(result):
            out.print(listing)
        options.note(result["warnings"])
        options.files(result)


def tables(result: Mapping[str, Any]) -> list[Table]:
    """The result for a terminal: all metrics, the groups, and who was changed."""
    sign = f" (positive: {result['positive_sign'][0]} higher)" if result["positive_sign"] else ""
    metrics = Table(title=escape(f"Metrics in %, gaps in points{sign}"), title_justify="left", padding=0)
    metrics.add_column("metric", no_wrap=True)
    for heading in ("test before", "test after", "predicted", "verified", "valid. before", "valid. after"):
        metrics.add_column(heading, justify="right")
    for row in result["metrics"]:
        inside = [_points(row["validation"][key]) for key in ("predicted", "verified", "before", "after")]
        mark = ("*" if row["target"] else "") + {"clearly": "!", "perhaps": "?"}.get(row["worse"], "")
        metrics.add_row(
            NAMES[row["name"]][0].replace("rate parity", "rate") + mark, *(escape(_interval(row[when])) for when in ("before", "after")), *inside
        )
    metrics.caption = "* repaired; ! worse; ? perhaps worse; predicted and verified: with a soft threshold, on validation data"
    metrics.caption_justify = "left"
    groups = Table(title=f"Groups on test data, in %: before → after ({escape(result['bars_of'])} is positive)", title_justify="left")
    for heading in ("group", "n", *(heading for heading, _ in RATES.values())):
        groups.add_column(heading, justify="left" if heading == "group" else "right")
    for row in result["groups"]:
        rates = [" → ".join(_points(each["value"]) for each in row["rates"][name]) for name in RATES]
        groups.add_row(escape(row["group"]), f"{row['n_test']:,}", *rates)
    if not result["changed"]["samples"]:
        return [metrics, groups]
    changed = Table(title="Changed training samples", title_justify="left")
    keys = [key for key in ("removed", "down", "up", "relabelled") if result["changed"][key]]
    for heading in ("group", "label", "n", *keys):
        changed.add_column(heading, justify="left" if heading in ("group", "label") else "right")
    for row in result["changed_by"]:
        changed.add_row(escape(row["group"]), escape(row["label"]), f"{row['n']:,}", *(f"{row[key]:,}" for key in keys))
    return [metrics, groups, changed]


def _points(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def _interval(found: Mapping[str, Any]) -> str:
    ends = "" if found["low"] is None else f" [{100 * found['low']:.1f}, {100 * found['high']:.1f}]"
    return _points(found["value"]) + ends
