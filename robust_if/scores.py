"""One score per training sample, with its id, its unit and where it came from.

The sign is the same for every estimator and target: positive means harmful, leaving the sample out is predicted to lower the target.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import ArrayLike, NDArray
from scipy.stats import t as student

Units = Literal["target", "log-odds", "rank"]

#: The entry of a Parquet file's metadata by which scores are known.
MARK = b"robust-if scores"


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
        members: ``(k, n)`` scores of the members of an ensemble or a combination; ``None`` for a single estimator.
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
        if self.members is not None and (self.members.ndim != 2 or self.members.shape[1] != len(values)):
            raise ValueError(f"members: expected shape (k, {len(values)}), got {self.members.shape}")
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

    def put_first(self, mask: ArrayLike) -> Scores:
        """The scores with every other sample below those in ``mask (n,)``; the order within both parts stays.

        For what only some samples can have done: what teaches a model to answer a class carries that label. The values in ``mask`` stay, and those of
        the others are lowered by one number.

        Raises:
            ValueError: if there is not one truth value per sample, or none is true.
        """
        first = np.asarray(mask, dtype=bool)
        if first.shape != self.values.shape or not first.any():
            raise ValueError(f"mask: expected {len(self)} truth values, one of them true, got {first.sum()} true of shape {first.shape}")
        values = self.values.copy()
        gap = values[~first].max(initial=-np.inf) - values[first].min()
        if gap >= 0:
            values[~first] -= gap + max(1e-6, 1e-6 * float(np.ptp(values)))
        return replace(self, values=values, members=None, units="rank")

    def spread(self) -> NDArray[np.float64]:
        """Standard deviation over the members, ``(n,)``.

        Raises:
            ValueError: if the scores do not come from an ensemble.
        """
        if self.members is None:
            raise ValueError(f"spread: {self.estimator} is a single estimator; wrap it in Ensemble to get a spread over members")
        spread: NDArray[np.float64] = self.members.std(axis=0, ddof=1 if len(self.members) > 1 else 0)
        return spread

    def interval(self, confidence: float = 0.95) -> NDArray[np.float64]:
        """Lower and upper end ``(2, n)`` of the interval for the mean over all members that could be drawn: value ∓ t · spread / √k, Student's t.

        It tells how far the score may move with other members, and nothing about an error that all members share.

        Raises:
            ValueError: if there are fewer than two members, or a score is not their mean.
        """
        if self.members is None or len(self.members) < 2:
            count = "a single estimator" if self.members is None else "an ensemble of one"
            raise ValueError(f"interval: {self.estimator} is {count}; wrap it in Ensemble with at least 2 members")
        if not np.allclose(self.members.mean(0), self.values):
            raise ValueError(f"interval: the scores of {self.estimator} are not the mean of its members, so that their spread says nothing of it")
        if not 0 < confidence < 1:
            raise ValueError(f"confidence: expected a number between 0 and 1, got {confidence}")
        k = len(self.members)
        half = student.ppf((1 + confidence) / 2, k - 1) * self.spread() / np.sqrt(k)
        return np.stack([self.values - half, self.values + half])

    def stable(self, k: int, confidence: float = 0.95) -> NDArray[np.bool_]:
        """Which samples, ``(n,)``, can be trusted to be among the ``k`` most harmful, or not to be.

        True where the sample's :meth:`interval` does not hold the boundary, the midpoint between the k-th and the (k+1)-th value: such a sample would
        stand on the same side of it for other members, with this confidence for each sample by itself. The rest may change sides, so that a decision
        about them rests on the draw of the members.

        Raises:
            ValueError: if there are fewer than two members, or no boundary: ``k`` is not from 1 to n − 1.
        """
        if not 1 <= k < len(self):
            raise ValueError(f"k: expected a number from 1 to {len(self) - 1}, got {k}")
        low, high = self.interval(confidence)
        boundary = self.values[self.order()[k - 1 : k + 1]].mean()
        return np.asarray((low > boundary) | (high < boundary))

    def to_parquet(self, path: Path) -> None:
        """Write a table of id, value, rank, spread and whatever else the scores hold, all of which :meth:`read` restores.

        Name, target, units and provenance stand in the schema's metadata as JSON. Equal scores give equal bytes, and a half-written file never stands
        under the final name.

        Raises:
            ValueError: if ids or provenance are of a type that Parquet or JSON has no place for.
        """
        about = {"estimator": self.estimator, "target": self.target, "units": self.units, "provenance": dict(self.provenance)}
        columns: dict[str, Any] = {"value": self.values, "rank": self.ranks()}
        if self.members is not None:
            columns["spread"] = self.spread()
            flat = pa.array(np.ascontiguousarray(self.members.T, dtype=np.float64).ravel())
            columns["members"] = pa.FixedSizeListArray.from_arrays(flat, len(self.members))
        if self.suggestions is not None:
            columns["suggestion"] = self.suggestions
        try:
            described = json.dumps(about, sort_keys=True, default=_plain).encode()
            columns = {"id": pa.array(self.ids), **columns}
        except (TypeError, pa.ArrowException) as error:
            raise ValueError(f"scores: {self.name} cannot be written to Parquet: {error}") from None
        part = path.with_name(path.name + ".part")
        pq.write_table(pa.table(columns).replace_schema_metadata({MARK: described}), part)
        os.replace(part, path)

    @classmethod
    def read(cls, path: Path) -> Scores:
        """Scores that :meth:`to_parquet` wrote. Nothing in the file is run, and its content is checked.

        Raises:
            ValueError: if the file is damaged, or holds something else.
            FileNotFoundError: if there is no such file.
        """
        if not path.is_file():
            raise FileNotFoundError(f"scores: there is no file {path}")
        try:
            table = pq.ParquetFile(path).read()
            about = json.loads((table.schema.metadata or {})[MARK])
            columns = {name: table[name].combine_chunks() for name in table.column_names}
            members, suggestions = columns.get("members"), columns.get("suggestion")
            if any(column.null_count for column in [*columns.values(), *([] if members is None else [members.flatten()])]):
                raise ValueError("values are missing")
            if suggestions is not None and not pa.types.is_integer(suggestions.type):
                raise ValueError(f"suggestions are {suggestions.type}")
            if about["units"] not in get_args(Units) or not isinstance(about["provenance"], dict):
                raise ValueError("its description makes no sense")
            return cls(
                values=columns["value"].to_numpy(zero_copy_only=False),
                ids=np.array(columns["id"].to_pylist()) if pa.types.is_string(columns["id"].type) else columns["id"].to_numpy(zero_copy_only=False),
                estimator=str(about["estimator"]),
                target=str(about["target"]),
                units=about["units"],
                members=None if members is None else members.flatten().to_numpy(zero_copy_only=False).reshape(len(members), -1).T,
                suggestions=None if suggestions is None else suggestions.to_numpy(zero_copy_only=False),
                provenance=about["provenance"],
            )
        except (KeyError, TypeError, AttributeError, ValueError, OSError, pa.ArrowException) as error:
            raise ValueError(f"scores: {path} is not a table of scores, or damaged ({error})") from None

    def to_frame(self) -> pd.DataFrame:
        """A table with the columns ``id``, the score, its rank, and the spread where there are members."""
        frame = pd.DataFrame({"id": self.ids, self.name: self.values, "rank": self.ranks()})
        return frame if self.members is None else frame.assign(spread=self.spread())


def _plain(value: Any) -> Any:
    """Numbers and arrays of numpy as JSON has them."""
    if isinstance(value, (np.generic, np.ndarray)):
        return value.tolist()
    raise TypeError(f"provenance holds {type(value).__name__}")


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
