"""Which training texts are behind what a language model says: influence on the loss of single generations or predictions."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from robust_if.checkpoints import Checkpoint
from robust_if.data import Samples
from robust_if.estimators import InnerProduct
from robust_if.evaluations.folder import check_holds_none, claim
from robust_if.evaluations.report.trace import render_trace
from robust_if.evaluations.texts import Source, Texts
from robust_if.fisher import Fisher
from robust_if.language.models import is_adapter
from robust_if.overlap import Overlap
from robust_if.pairs import Normalise, pairwise
from robust_if.preconditioners import EKFAC, KFAC, DataInf, DiagonalFisher, Identity, RandomProjection
from robust_if.selection import most_influential
from robust_if.sweep import Sweep
from robust_if.task import Task
from robust_if.token_losses import Kind
from robust_if.writing import plain, write_json, write_whole

#: The estimator where none is named: gradients compared layer by layer, so that no layer and no long text drowns the others.
ESTIMATOR = "ip-layer"
#: How gradients are compared: by products, by their cosine, or by the mean of the layers' cosines.
FORMS: tuple[Normalise, ...] = ("none", "cosine", "layer")
#: What compares pairs of texts. The overlap has no sign: all that it finds counts as behind a query.
Compared = InnerProduct | Overlap
#: Queries that the result and the page show; the table of the most influential samples and the matrix hold all.
SHOWN = 50


def forms(kind: Kind = "causal-lm", seed: int = 0) -> dict[str, Compared]:
    """What compares every training text with every query, by name: IP and influence functions, as products or as cosines, and the overlap.

    The Fisher matrix of K-FAC and EK-FAC is the empirical one for a language model, whose outputs, a vocabulary for every token, are too many for the
    other.
    """
    fisher: Fisher = "empirical" if kind == "causal-lm" else "sampled"
    curved = (DiagonalFisher(), DataInf(), KFAC(fisher=fisher, seed=seed), EKFAC(fisher=fisher, seed=seed))
    known: list[Compared] = [InnerProduct(each, form) for each in (Identity(), *curved) for form in FORMS]
    return {each.name: each for each in (*known, InnerProduct(RandomProjection(seed=seed)), Overlap())}


class Shown(Protocol):
    """Samples that a person can look at: texts or images."""

    @property
    def samples(self) -> Samples:
        """Encoded, with their ids."""

    @property
    def own(self) -> bool:
        """Whether completion, or class, is the model's own."""

    def shown(self, i: int) -> dict[str, Any]:
        """Sample ``i`` for a person: ``id``, ``prompt``, ``text``, ``label``, and ``image`` if it is one."""


@dataclass(frozen=True, eq=False)
class Trace:
    """The influence of n training texts on the loss of q queries.

    Args:
        matrix: ``(n, q)``; positive: without the sample, the query's loss would be lower. The samples behind a query are the most negative.
        top: how many samples on either side count as most influential.
        estimator: its name.
    """

    matrix: NDArray[Any] = field(repr=False)
    train: Shown
    queries: Shown
    top: int
    estimator: str

    def sides(self) -> dict[str, list[list[tuple[int, float]]]]:
        """For every query the samples ``behind`` it and ``against`` it, as ``(position, score)``, the strongest first."""
        found = {}
        for side, sign in (("behind", -1), ("against", 1)):
            positions, values = most_influential(self.matrix, self.top, harmful=sign > 0)
            pairs = zip(positions.tolist(), values.tolist(), strict=True)
            found[side] = [[(i, value) for i, value in zip(*each, strict=True) if sign * value > 0] for each in pairs]
        return found

    def table(self) -> pd.DataFrame:
        """The most influential samples: ``query``, ``rank``, ``sample``, ``score`` and ``direction``."""
        sides, ids = self.sides(), self.train.samples.ids
        rows = [
            (name, rank, ids[i], score, side)
            for q, name in enumerate(self.queries.samples.ids)
            for side, found in sides.items()
            for rank, (i, score) in enumerate(found[q], 1)
        ]
        return pd.DataFrame(rows, columns=["query", "rank", "sample", "score", "direction"])

    def shown(self, queries: int = SHOWN) -> list[dict[str, Any]]:
        """The first queries with the texts of their most influential samples, as the page and ``result.json`` show them."""
        sides = self.sides()
        return [
            {
                **self.queries.shown(q), "own": self.queries.own,
                **{side: [{**self.train.shown(i), "score": score} for i, score in found[q]] for side, found in sides.items()},
            }
            for q in range(min(queries, len(self.queries.samples)))
        ]  # fmt: skip


def trace(
    task: Task,
    train: Texts,
    queries: Texts,
    *,
    estimator: Compared = InnerProduct(normalise="layer"),  # noqa: B008 - frozen
    checkpoints: Sequence[Checkpoint] = (),
    top: int = 10,
    directory: Path | None = None,
    sweep: Sweep = Sweep(batch_size=8),  # noqa: B008 - frozen
) -> Trace:
    """The influence of every training text on the loss of every query.

    Args:
        task: the model.
        train: what it was trained on.
        queries: texts whose completion, or label, is traced.
        estimator: one of :func:`forms`.
        checkpoints: states of the model, whose matrices are summed with the checkpoints' weights; the model's own state by default.
        top: how many samples on either side count as most influential.
        directory: where unfinished matrices are kept, so that the same call resumes.
        sweep: batch size and progress.

    Raises:
        ValueError: if the estimator cannot serve the model.

    Source: influence functions for generations, Kwon et al. 2024 (arXiv 2310.00902), section 4.3; over checkpoints Pruthi et al. 2020
    (arXiv 2002.08484).
    """
    matrix = influences(task, train.samples, queries.samples, estimator=estimator, checkpoints=checkpoints, directory=directory, sweep=sweep)
    return Trace(matrix, train, queries, min(top, len(matrix)), estimator.name)


def influences(
    task: Task, train: Samples, queries: Samples, *, estimator: Compared, checkpoints: Sequence[Checkpoint], directory: Path | None, sweep: Sweep
) -> NDArray[Any]:
    """The matrix ``(n, q)`` of a :class:`Trace`, by one of :func:`forms`; arguments and errors are those of :func:`trace`."""
    estimator.check(task)
    weights = [each.weight for each in checkpoints] or [1.0]
    scale = sum(weights) if isinstance(estimator, InnerProduct) and estimator.units == "target" else 1.0
    total: NDArray[Any] = np.zeros(())
    for k, weight in enumerate(weights):
        at = task.at(checkpoints[k].state) if checkpoints else task
        if isinstance(estimator, Overlap):
            matrix = -estimator.pairs(at, train, queries, sweep=sweep)
        else:
            kept = None if directory is None else directory / f"pairs-{k}"
            form = cast(Normalise, estimator.normalise)
            matrix = pairwise(at, train, queries, preconditioner=estimator.preconditioner, normalise=form, directory=kept, sweep=sweep)
        total = total + weight / scale * np.asarray(matrix)
    return total


def run(
    source: Source,
    data: Path,
    queries: Path,
    directory: Path,
    *,
    estimator: Compared,
    top: int = 10,
    new_tokens: int = 32,
    sweep: Sweep = Sweep(batch_size=8),  # noqa: B008 - frozen
    command: str = "",
    overwrite: bool = False,
) -> dict[str, Any]:
    """Trace the queries of a file, and write ``matrix.npy``, ``influential.csv``, ``result.json`` and ``report.html``; the same call resumes.

    Args:
        data, queries: files that :func:`robust_if.language.files.read` reads.
        new_tokens: of a completion at most, for queries that carry none.
        command: what repeats this.
        overwrite: whether an earlier run in ``directory`` is replaced.

    Returns:
        The content of ``result.json``.

    Raises:
        ValueError: if something does not fit; before any long work.
    """
    for name, number in (("top", top), ("new-tokens", new_tokens)):
        if number < 1:
            raise ValueError(f"{name}: expected at least 1, got {number}")
    if source.base is not None and not is_adapter(source.model):
        raise ValueError(f"base: {source.model} is a whole model and no adapter, so it has no base model; leave it out")
    check_holds_none(directory, [path for path in (data, queries, source.model, source.base, source.checkpoints) if path is not None])
    rows, asked = source.columns.read(data), source.columns.read(queries)
    loaded = source.load()
    estimator.check(loaded.task)
    train = loaded.texts(rows, "data")
    prompts = loaded.prompts(asked, new_tokens)
    texts = loaded.predicted(asked, "queries", train) if prompts is None else None
    settings = (asked.to_dict(), source.columns, estimator, top, new_tokens)
    finished = claim(directory, loaded.mark(train.samples, *settings), overwrite)
    if finished is not None:
        return finished
    work = directory / "work"
    work.mkdir(exist_ok=True)
    if texts is None:
        assert prompts is not None
        texts = loaded.completed(asked, prompts, new_tokens, kept=work / "generated.json", progress=sweep.progress)
    found = trace(loaded.task, train, texts, estimator=estimator, checkpoints=loaded.checkpoints, top=top, directory=work, sweep=sweep)
    warnings = []
    if texts.own:
        what = "completion" if source.kind == "causal-lm" else "label"
        warnings.append(f"The queries carry no {what}, so what the model itself says is traced.")
    result = write(found, directory, {
        "data": str(data), "asked": str(queries), "model": str(source.model), "kind": source.kind, "checkpoints": len(loaded.checkpoints),
        "warnings": warnings, "command": command,
    })  # fmt: skip
    shutil.rmtree(work, ignore_errors=True)
    return result


def write(found: Trace, directory: Path, said: Mapping[str, Any]) -> dict[str, Any]:
    """The matrix, the table, the page and ``result.json`` of a trace, whose content is returned; ``said`` is what else it holds."""
    with (directory / "matrix.npy").open("wb") as file:
        np.save(file, found.matrix, allow_pickle=False)
    write_whole(directory / "influential.csv", found.table().to_csv(index=False).encode())
    n, q = found.matrix.shape
    more = [f"The first {SHOWN} of {q:,} queries are shown; influential.csv and matrix.npy hold all."] if q > SHOWN else []
    result = {
        "trace": True, **said, "n_train": n, "n_queries": q, "estimator": found.estimator, "top": found.top, "queries": found.shown(),
        "warnings": [*said["warnings"], *more], "files": {name: str(directory / file) for name, file in _FILES.items()},
    }  # fmt: skip
    write_json(directory / "result.json", result, plain)
    render_trace(directory)
    return result


_FILES: Mapping[str, str] = {"influential": "influential.csv", "matrix": "matrix.npy", "report": "report.html"}
