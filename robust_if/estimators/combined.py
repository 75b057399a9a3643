"""Several estimators in one score, by the ranks that each of them gives."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.stats import mode

from robust_if.data import Samples
from robust_if.estimators.base import Estimator, Job, Result
from robust_if.estimators.ensemble import scaled_ranks
from robust_if.scores import Scores
from robust_if.task import Task


@dataclass(frozen=True)
class Combined(Estimator):
    """The maximum or the mean of the ranks that several estimators give a sample, scaled to [0, 1] with 1 the most harmful.

    A poison that is built to escape one score often stands out in another: a small gradient hides a sample from the plain inner product, not from the
    cosine; a gradient that also points elsewhere hides it from the cosine more than from the product. The maximum finds what any of the estimators
    finds, at the price of what any of them finds wrongly; the mean asks for agreement. Equal scores share the mean of their ranks.

    Over checkpoints every estimator's scores are summed first, with the checkpoints' weights, and ranked then: TracIn and GAS are sums, and ranks of
    single checkpoints would let one of them with hardly any weight count like the others. An :class:`~robust_if.Ensemble` of this ranks each of its
    members by itself.

    ``members`` of the scores are the single ranks, ``(k, n)``, in the order of the estimators, and their spread tells where these disagree. Every
    estimator makes passes of its own over the data; with an ``index`` those that read per-sample gradients need none.

    Args:
        estimators: at least two.
        how: ``"max"`` or ``"mean"``.

    Raises:
        TypeError: if one of ``estimators`` is not an estimator.
        ValueError: if there are fewer than two, one of them twice, or ``how`` is unknown.

    Source: this project. That raw and normalised influence fail on different attacks: Hammoudeh and Lowd 2022 (arXiv 2201.10055).
    """

    estimators: tuple[Estimator, ...]
    how: Literal["max", "mean"] = "max"

    def __post_init__(self) -> None:
        if isinstance(self.estimators, list):
            object.__setattr__(self, "estimators", tuple(self.estimators))
        if not isinstance(self.estimators, tuple) or not all(isinstance(each, Estimator) for each in self.estimators):
            raise TypeError(f"estimators: expected some such as (InnerProduct(), Loss()), got {self.estimators!r}")
        if len(self.estimators) < 2:
            raise ValueError(f"estimators: expected at least 2, got {len(self.estimators)}")
        twice = [each for k, each in enumerate(self.estimators) if each in self.estimators[:k]]
        if twice:
            raise ValueError(f"estimators: expected different ones, {twice[0]!r} is there twice")
        if self.how not in ("max", "mean"):
            raise ValueError(f"how: expected 'max' or 'mean', got {self.how!r}")

    @property
    def name(self) -> str:
        """The estimators' names, joined by ``or`` for the maximum and ``and`` for the mean; what all share with the first is said once."""
        first, *others = (each.name for each in self.estimators)
        return ("-or-" if self.how == "max" else "-and-").join([first, *(name.removeprefix(f"{first}-") for name in others)])

    @property
    def summary(self) -> str:
        return f"the {'largest' if self.how == 'max' else 'mean'} of the ranks of {', '.join(each.name for each in self.estimators)}"

    @property
    def needs_target(self) -> bool:  # type: ignore[override]
        return any(each.needs_target for each in self.estimators)

    def check(self, task: Task) -> None:
        for each in self.estimators:
            each.check(task)

    def estimate(self, job: Job) -> Result:
        return self.estimates(job)[0]

    def estimates(self, job: Job) -> list[Result]:
        """One result per target; ``members`` are the estimators' own scores, which become ranks when they have been summed over checkpoints."""
        found = [self._scored(each, replace(job, name=f"{job.name}-{k}")) for k, each in enumerate(self.estimators)]
        return [self._joined(list(results)) for results in zip(*found, strict=True)]

    def _scored(self, estimator: Estimator, job: Job) -> list[Result]:
        """One result per target of the job, the same for all where the estimator looks at none."""
        repeats = 1 if estimator.needs_target else max(1, len(job.targets))
        results = estimator.estimates(job if estimator.needs_target else replace(job, targets=()))
        for result in results:
            Scores(result.values, job.samples.ids, estimator.name)  # refuses values that are not finite, which have no rank
        return results * repeats

    def _joined(self, results: list[Result]) -> Result:
        members = np.stack([result.values for result in results])
        labels = [result.suggestions for result in results if result.suggestions is not None]
        notes: dict[str, Any] = {"combined": [{"name": each.name, **result.notes} for each, result in zip(self.estimators, results, strict=True)]}
        solved = [result.notes["converged"] for result in results if "converged" in result.notes]
        if solved:
            notes["converged"] = all(solved)
        return Result(self._values(scaled_ranks(members)), members, mode(np.stack(labels)).mode if labels else None, notes)

    def _values(self, ranks: NDArray[np.float64]) -> NDArray[np.float64]:
        values: NDArray[np.float64] = ranks.max(0) if self.how == "max" else ranks.mean(0)
        return values

    def _scores(self, results: list[Result], weights: NDArray[np.float64], scored: Samples, target: str, provenance: dict[str, Any]) -> Scores:
        summed = super()._scores(results, weights, scored, target, provenance)
        assert summed.members is not None
        ranks = scaled_ranks(summed.members)
        return replace(summed, values=self._values(ranks), members=ranks)
