"""The command ``trace-images``: diffusion models from local folders."""

from __future__ import annotations

import json
import logging
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from robust_if.commands import options
from robust_if.commands.language import QUERIES, traced
from robust_if.commands.options import Json, Label, Overwrite, Seed, out
from robust_if.estimators import InnerProduct
from robust_if.evaluations import tracing, tracing_images
from robust_if.formats.parts import require
from robust_if.sweep import Sweep


def trace_images(
    data: Annotated[Path, typer.Argument(metavar="DATA", help="The training images: .npz, IDX, a folder class/*.png, or a saved data set.")],
    model: Annotated[Path, typer.Option(help="Folder of a UNet2DModel of diffusers and its scheduler; nothing is ever downloaded.")],
    queries: Annotated[Path, typer.Option(help="Generated images in the same format, labelled by the classes that they were asked for.")],
    out_dir: Annotated[Path, typer.Option("--out", help="Folder for matrix, table and page; the same command resumes there.")] = Path("runs/trace"),
    label: Label = None,
    estimator: Annotated[str, typer.Option(help="ip-layer, ip-cosine, ip, datainf, datainf-layer, ekfac ….")] = tracing.ESTIMATOR,
    top: Annotated[int, typer.Option(help="Images on either side of every query that are written.")] = 10,
    batch_size: Annotated[int, typer.Option(help="Images at a time; changes speed and memory, and no score.")] = 16,
    device: Annotated[str | None, typer.Option(help="Where the model is held, such as cuda; the CPU by default.")] = None,
    seed: Seed = 0,
    as_json: Json = False,
    overwrite: Overwrite = False,
) -> None:
    """Show the training images behind what a diffusion model makes: influence on the denoising loss of single generated images.

    A model that is told classes numbers them in the order of their names.
    """
    with options.errors():
        known = {name: each for name, each in tracing.forms("classification", seed).items() if isinstance(each, InnerProduct)}
        if estimator not in known:
            raise ValueError(f"estimator: expected one of {', '.join(known)}, got {estimator!r}")
        logs: Any = require("diffusers", "a diffusion model", "'robust-if[diffusers]'").logging
        logs.set_verbosity_error()
        logs.disable_progress_bar()
        options.logs(as_json, (), logging.WARNING)
        result = tracing_images.run(
            tracing_images.Denoiser(model, label, device, seed), data, queries, out_dir, estimator=known[estimator], top=top,
            sweep=Sweep(batch_size=batch_size, progress=options.progress, rows_per_part=32 * batch_size),
            command=shlex.join(["robust-if", *sys.argv[1:]]), overwrite=overwrite,
        )  # fmt: skip
        if as_json:
            typer.echo(json.dumps(result))
            return
        for query in result["queries"][:QUERIES]:
            out.print(traced(query))
        options.note(result["warnings"])
        options.files(result)
