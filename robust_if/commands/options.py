"""What the commands share: the options, the consoles, and how options become what the toolkit takes."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from rich.progress import track

from robust_if.estimators import Estimator
from robust_if.estimators.named import named
from robust_if.evaluations.attack_files import with_truth
from robust_if.evaluations.question import TARGETS, Question
from robust_if.evaluations.splits import split_off
from robust_if.loading import Dataset, read
from robust_if.models import MODELS
from robust_if.training import Recipe

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
Truth = Annotated[
    str | None, typer.Option(help="Column with the true labels, or truth.parquet of `robust-if attack`, for validation data that are split off.")
]
Test = Annotated[Path | None, typer.Option(help="Test data in the same format, for the accuracy before and after.")]
TestFraction = Annotated[float, typer.Option(help="Without --test: share of the data taken for the test.")]
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
Sensitive = Annotated[str | None, typer.Option(help="For gaps: a column of groups, several, sex,race, for intersections, or one group, race=White.")]
Positive = Annotated[str | None, typer.Option(help="For gaps: the label whose prediction is the benefit; the last one by default.")]
Eps = Annotated[float, typer.Option(help="Of attacked inputs: L∞ radius; for images a share of the pixel range, for tables standard deviations.")]
Steps = Annotated[int, typer.Option(help="Of attacked inputs: steps of projected gradient ascent.")]
Immutable = Annotated[str, typer.Option(help="Of attacked tables: comma-separated columns that an attacker cannot change.")]
Categories = Annotated[bool, typer.Option("--categories", help="Of attacked tables: an attacker can also change categories.")]
Radius = Annotated[float, typer.Option(help="How far an attacker may go: of images a share of the pixel range, of tables in standard deviations.")]
Norm = Annotated[Literal["linf", "l2"], typer.Option(help="Of an attacker's change: each feature on its own, or all together.")]
Preset = Annotated[Literal["standard", "lite"], typer.Option(help="Attacks: the budget of AutoAttack, or a far cheaper one, nearly as strong.")]
Attacked = Annotated[int, typer.Option("--samples", help="Test samples that are attacked, drawn at random; 0 for all.")]
Damping = Annotated[float | None, typer.Option(help="λ of estimators with curvature, as an L2 penalty; a tenth of the mean eigenvalue by default.")]
Memory = Annotated[str | None, typer.Option(help="Most memory that scoring may use, such as 2GB; batches are made to fit.")]


def recipe(model: str, samples: int, epochs: int | None, lr: float | None, optimizer: Literal["sgd", "adamw"], batch_size: int, seed: int) -> Recipe:
    """The usual passes for the model, or as many as make 300 steps, without which a small data set is hardly learnt."""
    steps = math.ceil(samples / max(batch_size, 1))
    usual = max(EPOCHS.get(model, 20), math.ceil(300 / steps))
    return Recipe(
        epochs=usual if epochs is None else epochs, lr=RATES[optimizer] if lr is None else lr, optimizer=optimizer, batch_size=batch_size, seed=seed
    )


def question(
    data: Path | None, label: str | None, sample_id: str | None, truth: str | None, valid: Path | None, fraction: float, model: str | None, seed: int
) -> Question:
    """What the options ask."""
    return Question(str(data), label, sample_id, truth, str(valid) if valid else None, fraction, model, seed)


def names(text: str) -> list[str]:
    """The parts of a comma-separated list."""
    return [name for name in map(str.strip, text.split(",")) if name]


def estimators(text: str, seed: int, damping: float | None) -> list[Estimator]:
    """Estimators by name, each once.

    Raises:
        ValueError: if a name is unknown or occurs twice, or there is none.
    """
    known, wanted = named(seed, damping), names(text)
    unknown = [name for name in wanted if name not in known]
    if unknown or not wanted or len(set(wanted)) < len(wanted):
        raise ValueError(f"estimator: expected some of {', '.join(known)}, each once, got {', '.join(unknown or wanted) or 'none'}")
    return [known[name] for name in wanted]


def one(found: list[Estimator]) -> list[Estimator]:
    """The only estimator.

    Raises:
        ValueError: if there are more.
    """
    if len(found) > 1:
        raise ValueError(f"estimator: expected one name, got {', '.join(each.name for each in found)}")
    return found


def read_judged(data: Path, label: str | None, sample_id: str | None, truth: str | None) -> Dataset:
    """The data with their truth, which stands in a column, or in a table of its own."""
    if truth is not None and truth.lower().endswith((".parquet", ".csv")) and Path(truth).is_file():
        return with_truth(read(data, label=label, id=sample_id), Path(truth))
    return read(data, label=label, id=sample_id, truth=truth)


def splits(
    data: Dataset, valid_path: Path | None, test_path: Path | None, label: str | None, sample_id: str | None, fractions: tuple[float, float],
    seed: int,
) -> tuple[Dataset, Dataset, Dataset, tuple[str, ...]]:  # fmt: skip
    """Training, validation and test data, and warnings; what is not given is split off."""
    valid, test = (None if path is None else read(path, label=label, id=sample_id) for path in (valid_path, test_path))
    warnings: list[str | None] = []
    if valid is None:
        data, valid, warning = split_off(data, fractions[0], seed, "validation")
        warnings.append(warning)
    if test is None:
        data, test, warning = split_off(data, fractions[1], seed + 1, "test")
        warnings.append(warning)
    return data, valid, test, tuple(filter(None, warnings))


def progress(items: Iterable[Any], description: str) -> Iterable[Any]:
    """A bar on standard error, where somebody looks at it."""
    return track(items, description, console=err, transient=True, disable=not err.is_terminal)


def logs(as_json: bool, warnings: Iterable[str], level: int = logging.INFO) -> None:
    """Warnings of the run, and what the toolkit says on the way: memory plans, sizes, where it goes on."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[RichHandler(console=err, show_time=False, show_path=False)])
    if not as_json:
        logging.getLogger("robust_if").setLevel(level)
        note(warnings)


def files(result: Mapping[str, Any]) -> None:
    """Where the files of a result are."""
    for what, path in result["files"].items():
        out.print(f"{what:>10}  {path or '– (this format can hold no weights)'}", soft_wrap=True, markup=False)


def note(warnings: Iterable[str]) -> None:
    """What a user should know, on standard error."""
    for warning in warnings:
        err.print(f"[yellow]note:[/] {escape(warning)}", soft_wrap=True)


@contextmanager
def errors() -> Iterator[None]:
    """One line for a user's error (exit code 2), a hint for an interruption (exit code 1), and no traceback."""
    try:
        yield
    except KeyboardInterrupt:
        err.print("interrupted; what was done is kept, and the same command (without --overwrite) goes on from there", soft_wrap=True)
        raise typer.Exit(1) from None
    except (ValueError, TypeError, OSError, ImportError) as error:
        err.print(f"[bold red]error:[/] {escape(' '.join(str(error).splitlines()))}", soft_wrap=True)
        raise typer.Exit(2) from None
