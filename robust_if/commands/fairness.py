"""The command ``audit``."""

from __future__ import annotations

import json
import logging
import shlex
import sys
from pathlib import Path
from typing import Annotated

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
    TestFraction,
    Trained,
    Valid,
    ValidFraction,
    out,
)  # fmt: skip
from robust_if.evaluations import auditing
from robust_if.evaluations.audit_tables import tables
from robust_if.loading import read

Features = Annotated[
    str, typer.Option("--sensitive", help="Comma-separated columns; a column of numbers is cut in two by a comparison, such as 'age<30'.")
]


def audit(
    data: Data,
    sensitive: Features,
    out_dir: Annotated[Path, typer.Option("--out", help="Folder for audit.html, audit.json and two tables.")],
    label: Label = None,
    sample_id: Id = None,
    prediction: Annotated[str | None, typer.Option(help="Column with predicted labels: it is audited in every row, and nothing is trained.")] = None,
    positive: Annotated[
        str | None, typer.Option(help="The label whose prediction is the benefit; the last of two by default, and each of more in turn.")
    ] = None,
    control: Annotated[str, typer.Option(help="Columns like --sensitive: groups are compared within each of their values.")] = "",
    without_sensitive: Annotated[
        bool, typer.Option("--without-sensitive", help="Keep the sensitive columns from the model; else they are features like the others.")
    ] = False,
    smallest: Annotated[int, typer.Option(help="Groups with fewer samples are warned of.")] = 30,
    valid: Valid = None,
    valid_fraction: ValidFraction = 0.1,
    test: Annotated[Path | None, typer.Option(help="Held-out data in the same format: the rows that are audited.")] = None,
    test_fraction: TestFraction = 0.2,
    model: Model = None,
    checkpoint: Trained = None,
    epochs: Epochs = None,
    lr: Rate = None,
    optimizer: Optimizer = "adamw",
    batch_size: BatchSize = 64,
    seed: Seed = 0,
    as_json: Json = False,
    overwrite: Overwrite = False,
) -> None:
    """Compare the predictions for every sensitive group and intersection, with intervals, tests and a page.

    With `--prediction` a column of the data is audited. Otherwise a model is trained, and audited on test rows that it has not seen.
    """
    with options.errors():
        plan = auditing.AuditPlan(
            tuple(options.names(sensitive)), tuple(options.names(control)), positive, without_sensitive, smallest, seed=seed
        )  # fmt: skip
        whole, command = read(data, label=label, id=sample_id), shlex.join(["robust-if", *sys.argv[1:]])
        if prediction is not None:
            unused = {"test": test, "valid": valid, "model": model, "checkpoint": checkpoint, "epochs": epochs, "lr": lr}
            given = [name for name, value in unused.items() if value is not None]
            if given:
                raise ValueError(f"{', '.join(given)}: with --prediction nothing is trained, and all rows of --data are audited; leave it out")
            options.logs(as_json, (), logging.WARNING)
            result = auditing.audit_column(whole, prediction, plan, out_dir, command=command, overwrite=overwrite)
        else:
            train, valid_data, test_data, warnings = options.splits(whole, valid, test, label, sample_id, (valid_fraction, test_fraction), seed)
            name = model or "mlp"
            options.logs(as_json, (), logging.WARNING)
            result = auditing.audit_model(
                train, valid_data, test_data, plan, out_dir, name=name, seed=seed, progress=options.progress, command=command, overwrite=overwrite,
                model=checkpoint or options.recipe(name, len(train), epochs, lr, optimizer, batch_size, seed),
                warnings=() if test else warnings[-1:],  # of the test rows: nothing is measured on the validation rows
            )  # fmt: skip
        if as_json:
            typer.echo(json.dumps(result))
            return
        for listing in tables(result):
            out.print(listing)
        options.note(result["warnings"])
        options.files(result)
