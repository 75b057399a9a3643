"""One score per training sample, with its id, its unit and where it came from.

The sign is the same for every estimator and target: positive means harmful, leaving the sample out is predicted to lower the target.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

Units = Literal["target", "log-odds", "rank"]


@dataclass(frozen=True, eq=False)
class Scores:
    """Scores of n samples, aligned with the data they were computed from.

    Args:
        values: ``(n,)`` float64, positive = harmful.
        ids: ``(n,)`` the samples' ids.
        estimator: name of the estimator, for example ``"fvm"``.
        target: name of the target, for example ``"utility"``; ``""`` where the estimator needs none.
        units: ``"target"`` if a value is the predicted decrease of the target when the sample is removed; ``"log-odds"`` if it is the logarithm of
            the odds that the label is wrong; ``"rank"`` if values only order the samples.
        members: ``(k, n)`` scores of an ensemble's members, whose mean is ``values``; ``None`` for a single estimator.
        suggestions: ``(n,)`` the label that the estimator would give each sample, where it has an opinion.
        provenance: what a reader needs to repeat or to distrust the scores: settings, seconds, warnings.

    Raises:
        ValueError: if lengths differ or a score is not finite; the samples are named.
    """

    values: NDArray[np.float64] = field(repr=False)
    ids: NDArray[Any] = field(repr=False)
    estimator: str
    target: str = ""
    units: Units = "rank"
    members: NDArray[np.float64] | None = field(default=None, repr=False)
    suggestions: NDArray[np.int64] | None = field(default=None, repr=False)
    provenance: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        values = np.asarray(self.values, dtype=np.float64)
        object.__setattr__(self, "values", values)
        if values.shape != (len(self.ids),):
            raise ValueError(f"scores: expected one value per sample, shape ({len(self.ids)},), got shape {values.shape}")
        bad = ~np.isfinite(values)
        if bad.any():
            raise ValueError(
                f"scores: {self.estimator} gave values that are not finite for {bad.sum()} of {len(values)} samples, ids {list(self.ids[bad][:5])}; "
                "the model may have diverged, or the damping is too small for its dtype"
            )

    def __len__(self) -> int:
        return len(self.values)

    @property
    def name(self) -> str:
        """``estimator`` or ``estimator:target``, the column name in tables and files."""
        return f"{self.estimator}:{self.target}" if self.target else self.estimator

    def order(self) -> NDArray[np.int64]:
        """Positions ``(n,)``, most harmful first; ties keep the order of the data."""
        return np.argsort(-self.values, kind="stable")

    def top(self, k: int) -> NDArray[Any]:
        """The ids of the ``k`` most harmful samples, most harmful first."""
        if not 0 <= k <= len(self):
            raise ValueError(f"k: expected a number from 0 to {len(self)}, got {k}")
        return self.ids[self.order()[:k]]

    def ranks(self) -> NDArray[np.int64]:
        """Rank of every sample, ``(n,)``; 0 is the most harmful."""
        ranks = np.empty(len(self), dtype=np.int64)
        ranks[self.order()] = np.arange(len(self))
        return ranks

    def spread(self) -> NDArray[np.float64]:
        """Standard deviation over the members, ``(n,)``.

        Raises:
            ValueError: if the scores do not come from an ensemble.
        """
        if self.members is None:
            raise ValueError(f"spread: {self.estimator} is a single estimator; wrap it in Ensemble to get a spread over members")
        spread: NDArray[np.float64] = self.members.std(axis=0, ddof=1 if len(self.members) > 1 else 0)
        return spread

    def to_frame(self) -> pd.DataFrame:
        """A table with the columns ``id``, the score, its rank, and the spread where there are members."""
        frame = pd.DataFrame({"id": self.ids, self.name: self.values, "rank": self.ranks()})
        return frame if self.members is None else frame.assign(spread=self.spread())


def table(scores: Sequence[Scores]) -> pd.DataFrame:
    """One row per sample: ``id`` and one column per estimator and target.

    Raises:
        ValueError: if the scores are of different samples, or two have the same name.
    """
    frame = pd.DataFrame({"id": scores[0].ids})
    for column in scores:
        if not np.array_equal(column.ids, scores[0].ids):
            raise ValueError(f"scores: {column.name} and {scores[0].name} are of different samples, or in a different order")
        if column.name in frame:
            raise ValueError(f"scores: two columns would be named {column.name!r}")
        frame[column.name] = column.values
    return frame
