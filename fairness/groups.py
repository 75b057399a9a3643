"""Who belongs to which group: every intersection of one or several sensitive features."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from math import prod
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

#: A float column with at most this many values, all of them whole, is taken for codes; any other float column is a measurement.
CODES = 20
#: Most intersections that are counted as groups; more are identifiers or measurements by mistake.
MOST = 100_000


@dataclass(frozen=True, eq=False)
class Groups:
    """The groups of n samples; made by :meth:`of`.

    Args:
        codes: ``(n,)`` position of every sample's group in ``values``.
        features: names of the sensitive features.
        values: one tuple of values per group, all combinations of the values that occur, the last feature changing fastest; a combination that
            no sample has is a group of size 0.
    """

    codes: NDArray[np.int64]
    features: tuple[str, ...]
    values: tuple[tuple[str, ...], ...]

    @classmethod
    def of(cls, features: Any, *, name: str = "sensitive_features") -> Groups:
        """Groups from a list, array, Series, data frame (pandas, polars, pyarrow) or a mapping of columns; several columns mean their intersections.

        Args:
            features: ``(n,)`` or ``(n, k)`` categories: strings, booleans, whole numbers. Groups stay as they are.
            name: what errors call them.

        Raises:
            ValueError: if there is no sample, a value is missing, a column holds measurements instead of categories, or there are too many groups.
        """
        if isinstance(features, Groups):
            return features
        frame = _frame(features, name)
        if frame.empty:
            raise ValueError(f"{name}: expected at least one sample and one feature, got shape {frame.shape}")
        columns = [_categories(column, name) for _, column in frame.items()]
        levels = [sorted(set(column)) for column in columns]
        if prod(map(len, levels)) > MOST:
            counts = {str(column): len(level) for column, level in zip(frame, levels, strict=True)}
            raise ValueError(f"{name}: expected at most {MOST:,} intersections, got {prod(counts.values()):,} of the features {counts}; join values")
        values = tuple(product(*levels))
        position = {value: at for at, value in enumerate(values)}
        codes = np.array([position[value] for value in zip(*columns, strict=True)], dtype=np.int64)
        return cls(codes, tuple(map(str, frame.columns)), values)

    def of_others(self, features: Any, *, name: str = "sensitive_features") -> Groups:
        """The same groups, of other samples.

        Raises:
            ValueError: if the features differ, or a sample belongs to a group that none of these samples has; the groups are named.
        """
        others = Groups.of(features, name=name)
        reordered = others.features != self.features and sorted(others.features) == sorted(self.features)
        if len(others.features) != len(self.features) or reordered:
            raise ValueError(f"{name}: expected the features {list(self.features)}, got {list(others.features)}")
        seen = {value: at for at, value in enumerate(self.values) if self.sizes[at]}
        unseen = [self._words(value) for value, size in zip(others.values, others.sizes, strict=True) if size and value not in seen]
        if unseen:
            raise ValueError(f"{name}: the groups {unseen[:5]} have not been seen before; known are {[self._words(value) for value in seen][:20]}")
        places = np.array([seen.get(value, -1) for value in others.values], dtype=np.int64)
        return Groups(places[others.codes], self.features, self.values)

    def __len__(self) -> int:
        return len(self.codes)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The groups in words, such as ``"sex=Female, race=Black"``."""
        return tuple(map(self._words, self.values))

    @cached_property
    def sizes(self) -> NDArray[np.int64]:
        """Samples per group ``(len(values),)``, 0 for combinations that do not occur."""
        return np.bincount(self.codes, minlength=len(self.values))

    def _words(self, value: tuple[str, ...]) -> str:
        return ", ".join(f"{feature}={each}" for feature, each in zip(self.features, value, strict=True))


def at_least_two(groups: Groups, name: str = "sensitive_features") -> Groups:
    """The groups themselves.

    Raises:
        ValueError: if all samples belong to one group, which leaves nothing to compare.
    """
    if np.count_nonzero(groups.sizes) < 2:
        raise ValueError(f"{name}: expected at least two groups, but all {len(groups)} samples are {groups.names[groups.codes[0]]}; a gap needs two")
    return groups


def _frame(features: Any, name: str) -> pd.DataFrame:
    """Columns with names; ``sensitive_feature_0`` and so on where there are none, as fairlearn calls them."""
    if hasattr(features, "to_pandas"):
        features = features.to_pandas()
    if isinstance(features, pd.DataFrame):
        return features
    unnamed = name.removesuffix("s")
    if isinstance(features, pd.Series):
        return features.to_frame(f"{unnamed}_0" if features.name is None else features.name)
    if isinstance(features, Mapping):
        columns = {column: np.asarray(values) for column, values in features.items()}
        if len({each.shape for each in columns.values()}) > 1 or any(each.ndim != 1 for each in columns.values()):
            got = {column: each.shape for column, each in columns.items()}
            raise ValueError(f"{name}: expected columns of one length (n,), got shapes {got}")
        return pd.DataFrame(columns)
    array = np.asarray(features)
    if array.ndim not in (1, 2):
        raise ValueError(f"{name}: expected shape (n,) or (n, k), got {array.shape}")
    array = array[:, None] if array.ndim == 1 else array
    return pd.DataFrame(array, columns=[f"{unnamed}_{at}" for at in range(array.shape[1])])


def _categories(column: pd.Series[Any], name: str) -> list[str]:
    """Values as strings; whole numbers alike whether they are stored as integers or floats."""
    missing = int(column.isna().sum())
    if missing:
        advice = "drop these samples or give them a group of their own"
        raise ValueError(f"{name}: {missing} of {len(column)} values of {column.name!r} are missing; {advice}")
    values = pd.Series(column.tolist())  # of the plainest type, whatever the column's was
    if pd.api.types.is_float_dtype(values):
        distinct = np.unique(values.to_numpy())
        if not np.isfinite(distinct).all() or (distinct != np.round(distinct)).any() or len(distinct) > CODES:
            advice = "expected groups; cut it into a few, as pandas.cut does"
            raise ValueError(f"{name}: {column.name!r} holds measurements ({len(distinct)} different floats), {advice}")
        values = values.astype(np.int64)
    if pd.api.types.is_complex_dtype(values) or pd.api.types.is_datetime64_any_dtype(values):
        raise ValueError(f"{name}: expected categories in {column.name!r}, got {values.dtype}")
    return [str(value).strip() for value in values.tolist()]
