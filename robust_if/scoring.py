"""One call: which training samples hurt?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, overload

from robust_if.checkpoints import Checkpoint
from robust_if.estimators import Estimator, InnerProduct
from robust_if.estimators.named import named
from robust_if.scores import Scores
from robust_if.store import Store
from robust_if.sweep import Sweep
from robust_if.targets import Target
from robust_if.task import Task


@overload
def score(
    task: Task, train: Any, *, target: Target | None = ..., estimator: str | Estimator = ..., checkpoints: Sequence[Checkpoint] = ...,
    samples: Any = ..., index: Store | str | Path | None = ..., **options: Any,
) -> Scores: ...  # fmt: skip


@overload
def score(
    task: Task, train: Any, *, target: Sequence[Target] | Mapping[str, Target], estimator: str | Estimator = ...,
    checkpoints: Sequence[Checkpoint] = ..., samples: Any = ..., index: Store | str | Path | None = ..., **options: Any,
) -> list[Scores]: ...  # fmt: skip


def score(
    task: Task,
    train: Any,
    *,
    target: Target | Sequence[Target] | Mapping[str, Target] | None = None,
    estimator: str | Estimator = InnerProduct(),  # noqa: B008 - frozen
    checkpoints: Sequence[Checkpoint] = (),
    samples: Any = None,
    index: Store | str | Path | None = None,
    **options: Any,
) -> Scores | list[Scores]:
    """One score per training sample; positive: leaving the sample out is predicted to lower the target.

    Args:
        task: the model, in evaluation mode, and its loss.
        train: training data, ``Samples``, ``(X, y)`` or a map-style data set.
        target: what should become lower, such as ``Utility(valid)``; a list, or a dict with names of your own, scores several in one pass.
        estimator: an estimator, or its name as ``robust-if estimators`` lists it; IP by default.
        checkpoints: states of the model, summed with their weights (TracIn); the model's own state by default.
        samples: what is scored, where it is not ``train`` itself.
        index: the factored gradient store of ``train``, or its folder.
        **options: the fields of :class:`~robust_if.Sweep`: ``batch_size``, ``max_memory``, ``precision``, ``engine``, ``directory`` to resume, ….

    Returns:
        Scores ``(n,)``; a list of them, one per target, where several targets were given.

    Raises:
        ValueError: if a name is unknown, or data, target and model do not fit each other.
    """
    if isinstance(estimator, str):
        known = named()
        if estimator not in known:
            raise ValueError(f"estimator: expected one of {', '.join(known)}, got {estimator!r}")
        estimator = known[estimator]
    store = Store.open(Path(index)) if isinstance(index, (str, Path)) else index
    return estimator.score(
        task, train, target=target, checkpoints=checkpoints, samples=samples, sweep=Sweep(**options), index=store
    )  # fmt: skip
