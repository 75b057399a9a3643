"""Columns of a table as boolean predicates in words: ``sex = Female``, ``hours < 20``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

Mask = NDArray[np.bool_]
Relation = Literal["=", "≠", "≥", "<", "missing", "present"]

_OPPOSITES: dict[Relation, Relation] = {"=": "≠", "≠": "=", "≥": "<", "<": "≥", "missing": "present", "present": "missing"}


@dataclass(frozen=True)
class Predicate:
    """What a sample may fulfil.

    Args:
        column: of the table.
        relation: ``"="`` and ``"≠"`` for categories, ``"≥"`` and ``"<"`` for numbers, ``"missing"`` and ``"present"`` for both. A missing value
            fulfils only ``"≠"`` and ``"missing"``.
        value: a category, or a number; ``None`` where a value is missing.
    """

    column: str
    relation: Relation
    value: Any = None

    def holds(self, table: pd.DataFrame) -> Mask:
        """Which rows fulfil it, ``(n,)``."""
        column = table[self.column]
        missing = column.isna().to_numpy()
        if self.relation in ("missing", "present"):
            return np.asarray(missing if self.relation == "missing" else ~missing)
        if self.relation in ("=", "≠"):
            equal = (column.astype(str).to_numpy() == self.value) & ~missing
            return np.asarray(equal if self.relation == "=" else ~equal)
        numbers = column.to_numpy(dtype=np.float64, na_value=np.nan)
        return np.asarray(numbers >= self.value if self.relation == "≥" else numbers < self.value)

    @property
    def words(self) -> str:
        """The predicate in words."""
        if self.relation in ("missing", "present"):
            return f"{self.column} {self.relation}"
        return f"{self.column} {self.relation} {self.value if self.relation in ('=', '≠') else format(self.value, 'g')}"

    @property
    def negated(self) -> Predicate:
        """What the other samples fulfil; of numbers, those that are not missing."""
        return Predicate(self.column, _OPPOSITES[self.relation], self.value)


def in_words(predicates: Iterable[Predicate]) -> str:
    """A conjunction in words, bounds of one column put together: ``25 ≤ age < 45 and sex = Female``; ``all`` if there is none."""
    lower: dict[str, float] = {}
    upper: dict[str, float] = {}
    order: list[Predicate] = []
    for each in predicates:
        if each.relation in ("≥", "<"):
            if each.column not in lower and each.column not in upper:
                order.append(each)
            bounds, tighter = (lower, max) if each.relation == "≥" else (upper, min)
            bounds[each.column] = tighter(bounds.get(each.column, each.value), each.value)
        else:
            order.append(each)
    words = []
    for each in order:
        name = each.column
        if each.relation not in ("≥", "<"):
            words.append(each.words)
        elif name in lower and name in upper:
            words.append(f"{lower[name]:g} ≤ {name} < {upper[name]:g}")
        else:
            words.append(f"{name} ≥ {lower[name]:g}" if name in lower else f"{name} < {upper[name]:g}")
    return " and ".join(words) or "all"


def as_table(table: Any, n: int) -> pd.DataFrame:
    """A data frame with ``n`` rows, from one of pandas or polars or a mapping of columns.

    Raises:
        ValueError: if the number of rows differs, or there is no column.
    """
    frame = table.to_pandas() if hasattr(table, "to_pandas") else pd.DataFrame(table)
    if len(frame) != n or not len(frame.columns):
        raise ValueError(f"table: expected one row for each of the {n} training samples and at least one column, got shape {frame.shape}")
    names = frame.columns.astype(str)
    if not names.is_unique:
        raise ValueError(f"table: expected columns of different names, got {names[names.duplicated()].tolist()} twice")
    return frame.reset_index(drop=True).set_axis(names, axis=1)


def predicates_of(
    table: pd.DataFrame,
    *,
    smallest: int = 1,
    bins: int = 4,
    edges: Mapping[str, Sequence[float]] | None = None,
) -> tuple[list[Predicate], Mask]:
    """Every predicate that at least ``smallest`` and not all rows fulfil.

    Args:
        table: as of :func:`as_table`. Categories give ``=``, numbers ``≥`` and ``<`` at every edge, missing values a predicate of their own.
        smallest: number of rows.
        bins: numbers are cut at quantiles into as many parts.
        edges: cuts by column instead of quantiles.

    Returns:
        The predicates, and their rows as masks ``(k, n)``.

    Raises:
        ValueError: if ``bins`` is less than 2, or ``edges`` names a column that is not there or not of numbers.
    """
    if bins < 2:
        raise ValueError(f"bins: expected at least 2, got {bins}")
    for name in edges or {}:
        if name not in table or not is_number(table[name]):
            raise ValueError(f"edges: expected names of columns with numbers, got {name!r}; the table has {list(table)[:20]}")
    found: list[Predicate] = []
    for name in map(str, table):
        column = table[name]
        if is_number(column):
            cuts = (edges or {}).get(name)
            for cut in _quantiles(column, bins) if cuts is None else sorted(cuts):
                found += [Predicate(name, "≥", float(cut)), Predicate(name, "<", float(cut))]
        else:
            found += [Predicate(name, "=", value) for value in sorted(column.dropna().astype(str).unique())]
        if column.isna().any():
            found.append(Predicate(name, "missing"))
    masks = np.array([each.holds(table) for each in found], dtype=bool).reshape(len(found), len(table))
    counts = masks.sum(1)
    kept = np.flatnonzero((counts >= max(smallest, 1)) & (counts < len(table)))
    return [found[at] for at in kept], masks[kept]


def is_number(column: pd.Series[Any]) -> bool:
    """Whether a column holds numbers, not categories or truth values."""
    return pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column)


def _quantiles(column: pd.Series[Any], bins: int) -> list[float]:
    """Inner quantiles, each a value that occurs, so that ``≥`` can be read."""
    values = column.dropna().to_numpy(dtype=np.float64)
    if not len(values):
        return []
    cuts = np.unique(np.quantile(values, np.arange(1, bins) / bins, method="higher"))
    return [float(cut) for cut in cuts if cut > values.min()]
