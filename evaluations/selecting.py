"""Which texts to keep for fine-tuning: scores for the loss on target texts, a choice by them, and fine-tunings that verify it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from robust_if.checkpoints import Checkpoint
from robust_if.data import Samples
from robust_if.estimators import Estimator, InnerProduct, Loss
from robust_if.evaluations.finetuning import Verification, started, verify
from robust_if.evaluations.folder import check_holds_none, claim
from robust_if.evaluations.texts import Loaded, Source, repeated
from robust_if.evaluations.tracing import FORMS, influences
from robust_if.fairness.perturbation import PerturbationGap
from robust_if.language import files
from robust_if.language.datasets import select as selected_rows
from robust_if.scores import Scores, table
from robust_if.selection import cover, keep_best
from robust_if.sweep import Sweep, fingerprint
from robust_if.targets import Target, Utility
from robust_if.task import Task
from robust_if.writing import plain, write_json, write_whole

#: The estimator where none is named: raw influence and cosines find wrong labels of fine-tuned classifiers worse than losses do.
ESTIMATOR = "tuned-loss"
#: Texts that ``result.json`` and the terminal show, the most harmful ones.
SHOWN = 20


@dataclass(frozen=True, eq=False)
class Selection:
    """Scores of n texts, and what is kept by them.

    Args:
        scores: positive: without the text, the loss on the target is predicted to be lower.
        weights: ``(n,)``, 1 for a text that is kept and 0 for one that is not; ``None`` where nothing was to be chosen.
    """

    scores: Scores
    weights: NDArray[np.float64] | None = None

    def table(self) -> pd.DataFrame:
        """One row per text, the most harmful first: ``id``, ``score`` and, where there was a choice, ``weight``."""
        columns = {"id": self.scores.ids, "score": self.scores.values} | ({} if self.weights is None else {"weight": self.weights})
        return pd.DataFrame(columns).iloc[self.scores.order()]


def select(
    task: Task,
    train: Samples,
    target: Samples | Target,
    *,
    keep: float | None,
    estimator: Estimator = InnerProduct(normalise="layer"),  # noqa: B008 - frozen
    groups: NDArray[Any] | None = None,
    covering: bool = False,
    checkpoints: Sequence[Checkpoint] = (),
    directory: Path | None = None,
    sweep: Sweep = Sweep(batch_size=8),  # noqa: B008 - frozen
) -> Selection:
    """Score every training text for the loss on the target, and keep the best.

    Args:
        task: a model that was fine-tuned on ``train``.
        train: texts to choose from.
        target: texts like those that the model is meant for, whose loss should be low; or what else should be low.
        keep: the share that is kept; ``None`` to score alone.
        estimator: of the influence; with ``covering`` an :class:`~robust_if.InnerProduct` that compares single pairs.
        groups: ``(n,)``; the same share of every group is kept.
        covering: whether the texts are kept that are best for at least one target text, taken in turns, and not those best for the mean.
        checkpoints: states of the model that scores are summed over.
        directory: where unfinished work is kept, so that the same call resumes.
        sweep: batch size and progress.

    Raises:
        ValueError: if an argument is out of range, or the estimator cannot serve the model.
    """
    _check_choice(keep, estimator, groups is not None, covering)
    if covering:
        assert isinstance(estimator, InnerProduct) and isinstance(target, Samples) and keep is not None
        matrix = influences(task, train, target, estimator=estimator, checkpoints=checkpoints, directory=directory, sweep=sweep)
        scores = Scores(matrix.mean(1), train.ids, estimator.name, "utility", provenance={"estimator": repr(estimator), "covering": True})
        return Selection(scores, cover(matrix, keep))
    parts = None if directory is None else directory / "parts"
    wanted = Utility(target, batch_size=sweep.batch_size) if isinstance(target, Samples) else target
    scores = estimator.score(task, train, target=wanted, checkpoints=checkpoints, sweep=replace(sweep, directory=parts))
    return Selection(scores, None if keep is None else keep_best(scores, keep, groups=groups))


def _check_choice(keep: float | None, estimator: Estimator, grouped: bool, covering: bool) -> None:
    if keep is not None and not 0 < keep < 1:
        raise ValueError(f"keep: expected a share above 0 and below 1, got {keep}")
    if keep is None and (grouped or covering):
        raise ValueError("keep: --by and --cover say how a share is kept; give --keep, and not --noise")
    if covering and grouped:
        raise ValueError("cover: texts are taken in turns for single target texts, which --by has no say in; give one of the two")
    if covering and not (isinstance(estimator, InnerProduct) and estimator.normalise in FORMS):
        raise ValueError(f"cover: {estimator.name!r} compares no single pairs of texts; use one such as ip-layer or datainf")


@dataclass(frozen=True)
class Chosen:
    """What of the data is kept.

    Args:
        keep: the share; ``None`` to look for wrong texts alone.
        by: column of whose every value the same share is kept.
        cover: see :func:`select`.
        alike: whether the target is not the loss, but how differently the model judges the target texts when they are about other people.
    """

    keep: float | None = 0.7
    by: str | None = None
    cover: bool = False
    alike: bool = False

    def groups(self, data: Any) -> NDArray[Any] | None:
        """The group of every row as text, ``(n,)``.

        Raises:
            ValueError: if there is no such column.
        """
        if self.by is None:
            return None
        if self.by not in data.column_names:
            raise ValueError(f"by: there is no column {self.by!r}; the columns are {data.column_names}")
        return np.array([str(each) for each in data[self.by]])


def run(
    source: Source,
    data: Path,
    target: Path,
    directory: Path,
    *,
    estimator: Estimator,
    chosen: Chosen = Chosen(),
    verification: Verification | None = None,
    sweep: Sweep = Sweep(batch_size=8),  # noqa: B008 - frozen
    command: str = "",
    overwrite: bool = False,
) -> dict[str, Any]:
    """Score the texts of a file, and write ``scores.parquet``, ``scores.csv``, ``result.json`` and the selected rows; the same call resumes.

    Args:
        data, target: files that :func:`robust_if.language.files.read` reads; the selected rows are written as ``data`` are.
        verification: fine-tunings on the choice, on all texts, on random ones and on those of lowest loss.
        command: what repeats this.
        overwrite: whether an earlier run in ``directory`` is replaced.

    Returns:
        The content of ``result.json``.

    Raises:
        ValueError: if something does not fit; before any long work.
    """
    _check_choice(chosen.keep, estimator, chosen.by is not None, chosen.cover)
    if chosen.cover and chosen.alike:
        raise ValueError("cover: it is about single target texts, and --alike about all pairs of them; give one of the two")
    if verification is not None and chosen.keep is None:
        raise ValueError("verify: it is about a choice; give --keep, and not --noise")
    if verification is not None and verification.seeds < 1:
        raise ValueError(f"seeds: expected at least 1, got {verification.seeds}")
    test_path = None if verification is None else verification.test
    paths = (data, target, test_path, source.model, source.base, source.checkpoints, None if verification is None else verification.start)
    check_holds_none(directory, [each for each in paths if each is not None])
    rows, wanted = source.columns.read(data), source.columns.read(target)
    tested = None if test_path is None else source.columns.read(test_path)
    groups = chosen.groups(rows)
    loaded = source.load()
    estimator.check(loaded.task)
    train, held = loaded.texts(rows, "data"), loaded.texts(wanted, "target")
    if len(train.samples) != len(rows):
        raise ValueError("data: several samples are packed into a row (seq_lengths); expected one sample per row, so that rows can be chosen")
    gap = PerturbationGap(*loaded.pairs(wanted, "target"), batch_size=sweep.batch_size) if chosen.alike else None
    start = test = pairs = None
    if verification is not None:
        start, test = started(loaded, verification, train.samples), loaded.texts(tested, "test").samples
        pairs = loaded.pairs(tested, "test") if chosen.alike else None
    held_out = [fingerprint({}, each) for each in (held.samples, test) if each is not None]
    begins = None if start is None else fingerprint(start.model.state_dict(), held.samples)
    mark = loaded.mark(train.samples, held_out, begins, estimator, chosen, verification, None if groups is None else groups.tolist())
    finished = claim(directory, mark, overwrite)
    if finished is not None:
        return finished
    work = directory / "work"
    found = select(
        loaded.task, train.samples, gap or held.samples, keep=chosen.keep, estimator=estimator, groups=groups, covering=chosen.cover,
        checkpoints=loaded.checkpoints, directory=work, sweep=sweep,
    )  # fmt: skip
    written = _write(directory, found, rows, data)
    result = {
        "selection": True, "data": str(data), "n": len(rows), "target": str(target), "n_target": len(wanted), "model": str(source.model),
        "kind": source.kind, "estimator": found.scores.estimator, "units": found.scores.units, "checkpoints": len(loaded.checkpoints),
        "keep": chosen.keep, "by": chosen.by, "cover": chosen.cover, "alike": chosen.alike,
        "kept": None if found.weights is None else int((found.weights > 0).sum()),
        "groups": _kept_of(found, groups), "verified": None, "judged": bool(found.scores.target),
        "warnings": _overlaps(train.samples, held.samples, test), "command": command, "files": written,
        "worst": [{**train.shown(int(i)), "score": float(found.scores.values[i])} for i in found.scores.order()[:SHOWN]],
    }  # fmt: skip
    if verification is not None:
        assert chosen.keep is not None and start is not None and test is not None
        others = _others(found, chosen.keep, loaded, train.samples, groups, work, sweep)
        recipe, seeds = verification.recipe, verification.seeds
        runs = verify(start, train.samples, test, others, recipe, seeds, pairs=pairs, directory=work, progress=sweep.progress)
        sizes = {name: int((weights(verification.recipe.seed) > 0).sum()) for name, weights in others.items()}
        result["verified"] = [{"trained_on": name, "n": sizes[name], "runs": each} for name, each in runs.items()]
        result |= {"test": str(verification.test), "n_test": len(test), "recipe": repr(verification.recipe)}
    write_json(directory / "result.json", result, plain)
    shutil.rmtree(work, ignore_errors=True)
    return result


def _overlaps(train: Samples, target: Samples, test: Samples | None) -> list[str]:
    """What a reader should know of texts that stand where they should not."""
    said = []
    both = repeated(target, train)
    if both:
        said.append(
            f"{both:,} of {len(target):,} target texts are also in the data; a text that is compared with itself looks helpful, wrong or not."
        )
    seen = 0 if test is None else max(repeated(test, train), repeated(test, target))
    if test is not None and seen:
        said.append(f"At least {seen:,} of {len(test):,} test texts are also in the data or the target, so they are not unseen.")
    return said


def _write(directory: Path, found: Selection, rows: Any, like: Path) -> dict[str, str]:
    table([found.scores]).to_parquet(directory / "scores.parquet", index=False)
    write_whole(directory / "scores.csv", found.table().to_csv(index=False).encode())
    written = {"scores": str(directory / "scores.csv"), "parquet": str(directory / "scores.parquet")}
    if found.weights is None:
        return written
    shutil.rmtree(directory / "selected", ignore_errors=True)  # left by an interruption at this very place
    return written | {"selected": str(files.write(selected_rows(rows, found.weights), directory / "selected", like=like))}


def _kept_of(found: Selection, groups: NDArray[Any] | None) -> list[dict[str, Any]]:
    """How many of every group are kept."""
    if groups is None or found.weights is None:
        return []
    kept = found.weights > 0
    return [{"value": str(each), "n": int((groups == each).sum()), "kept": int(kept[groups == each].sum())} for each in np.unique(groups)]


def _others(
    found: Selection, keep: float, loaded: Loaded, train: Samples, groups: NDArray[Any] | None, work: Path, sweep: Sweep
) -> dict[str, Callable[[int], NDArray[Any]]]:
    """The choices that are compared, as weights by seed; random ones are drawn anew for every seed."""
    assert found.weights is not None
    selected, n = found.weights, len(train)
    losses = Loss().score(loaded.task, train, sweep=replace(sweep, directory=work / "losses"))
    lowest = keep_best(losses, keep, groups=groups)

    def random(seed: int) -> NDArray[Any]:
        draws = Scores(np.random.default_rng(seed).uniform(size=n), train.ids, "random")
        return keep_best(draws, keep, groups=groups)

    choices = {"all": lambda _: np.ones(n), "selected": lambda _: selected, "random": random}
    return choices if found.scores.estimator == "loss" else {**choices, "lowest-loss": lambda _: lowest}
