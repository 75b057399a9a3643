"""The command ``tradeoffs``."""

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
    Truth,
    Valid,
    ValidFraction,
    out,
)  # fmt: skip
from robust_if.evaluations import tradeoffs as trading
from robust_if.evaluations.report.tradeoff_words import findings, seen, side
from robust_if.evaluations.report.tradeoff_words import label as named
from robust_if.models import usual
from robust_if.sweep import Sweep


def tradeoffs(
    data: Data,
    target: Targets,
    out_dir: Annotated[Path, typer.Option("--out", help="Folder for scores, choices and report; the same command resumes there.")],
    label: Label = None,
    sample_id: Id = None,
    truth: Truth = None,
    sensitive: Sensitive = None,
    positive: Positive = None,
    eps: Eps = 0.1,
    steps: Steps = 10,
    immutable: Immutable = "",
    categories: Categories = False,
    remove: Annotated[str, typer.Option(help="What every choice removes: a share such as 0.05, or a number of samples such as 200.")] = "0.05",
    estimator: Annotated[str, typer.Option(help="A name, see `robust-if estimators`; ip is cheaper, and hardly tells targets apart.")] = "ekfac",
    damping: Damping = None,
    valid: Valid = None,
    valid_fraction: ValidFraction = 0.2,
    test: Test = None,
    test_fraction: TestFraction = 0.2,
    model: Model = None,
    epochs: Epochs = None,
    lr: Rate = None,
    optimizer: Optimizer = "adamw",
    batch_size: BatchSize = 64,
    repeats: Annotated[int, typer.Option(help="Trainings with different seeds behind every verified number.")] = 5,
    seed: Seed = 0,
    max_memory: Memory = None,
    as_json: Json = False,
    overwrite: Overwrite = False,
) -> None:
    """Score the data for two to four targets at once, and show which samples help one and hurt another.

    Removals that trade the targets off are tried: each target alone, all alike, and each as far as it harms no other. Every one is verified by
    retraining and measuring all targets on test data, under attack where one of them is about that.
    """
    with options.errors():
        whole = options.read_judged(data, label, sample_id, truth)
        train, valid_data, test_data, warnings = options.splits(whole, valid, test, label, sample_id, (valid_fraction, test_fraction), seed)
        name = model or usual(train.kind)
        attacker = {"eps": eps, "steps": steps, "immutable": options.names(immutable), "categories": categories}
        plan = trading.TradeoffPlan(
            train, valid_data, test_data, tuple(options.names(target)), {"sensitive": sensitive, "positive": positive, **attacker},
            options.one(options.estimators(estimator, seed, damping))[0], remove, name,
            options.recipe(name, len(train), epochs, lr, optimizer, batch_size, seed), repeats, seed,
            f"Objectives of {data.name}", shlex.join(["robust-if", *sys.argv[1:]]), warnings,
        )  # fmt: skip
        options.logs(as_json, (), logging.WARNING)
        result = trading.run(plan, out_dir, sweep=Sweep(progress=options.progress, max_memory=max_memory), overwrite=overwrite)
        if as_json:
            typer.echo(json.dumps(result))
            return
        out.print(result["verdict"], soft_wrap=True, markup=False)
        for text in findings(result):
            out.print(text, soft_wrap=True, markup=False)
        for listing in tables(result):
            out.print(listing)
        options.note(result["warnings"])
        options.files(result)


def tables(result: Mapping[str, Any]) -> list[Table]:
    """The result for a terminal: where targets disagree, and what every choice did on test data."""
    called = {each["name"]: each["words"] for each in result["objectives"]}
    pairs = Table(title="Samples between two objectives, in %", title_justify="left")
    for heading in ("pair", "rank correlation", "harm both", "1st only", "2nd only", f"in both worst {result['k']:,}"):
        pairs.add_column(heading, justify="left" if heading == "pair" else "right")
    for row in result["pairs"]:
        rho = "–" if row["correlation"] is None else f"{row['correlation']:.2f}"
        shares = [f"{100 * share:.0f}" for share in (row["together"], *row["against"], row["shared"])]
        pairs.add_row(" and ".join(called[name] for name in row["pair"]), rho, *shares)
    pairs.caption = "1st only: harms the first and helps the second"
    pairs.caption_justify = "left"
    choices = Table(title="Gains on test data over no removal (shares in points; positive is better)", title_justify="left")
    first = result["choices"][0]
    choices.add_column("choice", overflow="fold")
    for objective in result["objectives"]:
        choices.add_column(seen(first, objective)["name"], justify="right")
    for choice in result["choices"]:
        cells = [_cell(seen(choice, objective), choice["name"] == "none") for objective in result["objectives"]]
        choices.add_row(escape(labelled(result, choice)), *cells)
    choices.caption = f"means of {result['settings']['repeats']} seeds with {result['level']:.0%} intervals; * clearly better, ! clearly worse"
    choices.caption_justify = "left"
    return [pairs, choices]


def labelled(result: Mapping[str, Any], choice: Mapping[str, Any]) -> str:
    """A choice in words, with how many samples it removes."""
    size = result["k"] if choice["name"] == "random" else 0 if choice["name"] == "none" else choice["removed"]
    return f"{named(result, choice['name'])} ({size:,.0f})"


def _cell(found: Mapping[str, Any], none: bool) -> str:
    factor = 100 if found["share"] else 1
    if found["value"] is None or found["gain"] is None:
        return "–"
    value = f"{factor * found['value']:.1f} %" if found["share"] else f"{found['value']:.3g}"
    if none:
        return value
    digits = ".1f" if found["share"] else ".2g"
    ends = "" if found["low"] is None else f"\n{factor * found['low']:{digits}} to {factor * found['high']:{digits}}"
    mark = {1: "*", -1: "!", 0: ""}[side(found)]
    return f"{value}\n{factor * found['gain']:+{digits}}{mark}{ends}"
