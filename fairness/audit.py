"""The audit of predictions: metrics of every group and intersection with intervals, tests against the rest, and gaps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, combinations, product
from math import prod
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from robust_if.fairness.confusion import Array, Confusion, class_at, coded, quotient, weights
from robust_if.fairness.groups import Groups, at_least_two
from robust_if.fairness.intervals import adjusted, by_chance, differs, percentiles, resampled, shifted, wilson
from robust_if.fairness.metrics import COMPARED, as_groups, spread

#: The rates that are audited; the others are one minus one of these.
METRICS = ("base_rate", "selection_rate", "accuracy", "true_positive_rate", "false_positive_rate", "precision")
#: The gaps that are audited.
GAPS = ("demographic_parity", "equal_opportunity", "false_positive_rate_parity", "equalized_odds", "error_rate_parity")
#: Numbers in the largest table of counts, of which there is one per replicate.
LARGEST = 20_000


@dataclass(frozen=True, eq=False)
class Audit:
    """What was found; made by :func:`audit`.

    Args:
        rates: one row per set of features, stratum, class, group and metric: ``features``, ``stratum``, ``positive``, ``group``, ``size`` (samples
            of the group), ``metric``, ``n`` (samples that the metric is taken among), ``value``, ``low``, ``high``, ``rest`` (the value of all
            others), ``p`` that the two are equal, and ``p_adjusted`` for all rows together. The set of no features is everybody.
        gaps: one row per set of features, stratum, class and gap: ``gap``, ``difference``, ``low``, ``high``, ``by_chance`` (what the difference of
            alike groups stays below with the probability ``level``), ``ratio``, ``ratio_low``, ``ratio_high``, ``highest`` and ``lowest`` group (by
            the rate that differs most), and ``left_out`` groups, which lack a rate.
        warnings: small and empty groups.
        level: of the intervals.
    """

    rates: pd.DataFrame
    gaps: pd.DataFrame
    warnings: tuple[str, ...]
    level: float

    def to_frame(self) -> pd.DataFrame:
        """The rates, tidy; a copy."""
        return self.rates.copy()


def audit(
    y_true: ArrayLike,
    y_pred: ArrayLike,
    sensitive_features: Any,
    *,
    control_features: Any = None,
    positive: Any = 1,
    classes: Sequence[Any] | None = None,
    sample_weight: ArrayLike | None = None,
    replicates: int = 1000,
    level: float = 0.95,
    smallest: int = 30,
    seed: int = 0,
) -> Audit:
    """Audit hard predictions for every sensitive feature alone and for all their intersections.

    Intervals are percentiles over replicates of the data, drawn as multinomial counts of all cells at once; where a rate is taken among fewer than
    ``smallest`` samples, or is 0 or 1, they are Wilson's. Those of gaps are corrected for bias, since chance sets groups apart, the more the more
    groups there are; and they begin at 0 where the difference is no larger than alike groups show ``by_chance``. Every group is tested against the
    rest, by the test of two proportions or, for small counts, Fisher's, and Benjamini and Hochberg adjust for the number of groups and metrics. With
    weights, tests and Wilson's intervals count (Σw)²/Σw² samples (Kish).

    Args:
        y_true: ``(n,)`` labels: strings, booleans or whole numbers.
        y_pred: ``(n,)`` predicted labels, not scores.
        sensitive_features: ``(n,)`` or ``(n, k)`` categories, or :class:`~robust_if.fairness.groups.Groups`.
        control_features: the same for strata that are audited apart.
        positive: the class whose prediction is the benefit; ``None`` audits each class against the rest.
        classes: all labels there may be; those of ``y_true`` by default.
        sample_weight: ``(n,)`` weights from 0 on.
        replicates: of the bootstrap.
        level: of the intervals.
        smallest: groups with fewer samples are warned of.
        seed: of the bootstrap.

    Raises:
        ValueError: if an argument does not fit the others, predictions are scores, or there is one group or far too many.
    """
    if replicates < 1 or not 0 < level < 1 or smallest < 0:
        raise ValueError(f"replicates, level, smallest: expected at least 1, a share and at least 0, got {replicates}, {level} and {smallest}")
    groups = at_least_two(as_groups(sensitive_features))
    strata = None if control_features is None else as_groups(control_features, "control_features")
    place, known = coded(y_true, y_pred, groups, strata=strata, classes=classes)
    weight = weights(sample_weight, len(place))
    if positive is not None:
        class_at(known, positive)
    table = _Table.of(place, known, groups, strata, weight, replicates, np.random.default_rng(seed))
    subsets = list(chain.from_iterable(combinations(range(len(groups.features)), k) for k in range(len(groups.features) + 1)))
    labels = known.tolist() if positive is None else [positive]
    tables = {subset: table.of_features(subset) for subset in subsets}
    parts = [_Part(tables[subset], subset, label, level, smallest) for label, subset in product(labels, subsets)]
    rates = pd.DataFrame([row for part in parts for row in part.rates()])
    rates["p_adjusted"] = adjusted(rates["p"].to_numpy(dtype=np.float64))
    rng = np.random.default_rng([seed, 1])
    gaps = pd.DataFrame([row for part in parts if part.subset for row in part.gaps(rng)])
    warnings = [text for part in parts if part.subset and part.label == labels[0] for text in part.warnings()]
    return Audit(rates, gaps, tuple(warnings), level)


@dataclass(frozen=True, eq=False)
class _Table:
    """Counts ``(S, *levels, K, K)`` with one axis per feature: of samples, of weight and of its square, and of every replicate."""

    classes: Any
    features: tuple[str, ...]
    levels: tuple[tuple[str, ...], ...]
    strata: tuple[str, ...]
    samples: Array
    weight: Array
    squares: Array
    draws: Array

    @classmethod
    def of(
        cls, place: Any, classes: Any, groups: Groups, strata: Groups | None, weight: Array | None, replicates: int, rng: np.random.Generator
    ) -> _Table:
        levels = tuple(tuple(sorted({value[at] for value in groups.values})) for at in range(len(groups.features)))
        names = strata.names if strata is not None else ("",)
        shape = (len(names), *map(len, levels), len(classes), len(classes))
        if prod(shape) > LARGEST:
            raise ValueError(
                f"sensitive_features: expected at most {LARGEST:,} combinations of group, stratum, label and prediction, these make {prod(shape):,}; "
                "leave features out or join their values"
            )
        powers = (None, weight, None if weight is None else weight**2)
        samples, weighed, squares = (np.bincount(place, each, minlength=prod(shape)).astype(np.float64).reshape(shape) for each in powers)
        draws = resampled(place, prod(shape), weight, replicates, rng).reshape(replicates, *shape)
        return cls(classes, groups.features, levels, names, samples, weighed, squares, draws)

    def of_features(self, subset: tuple[int, ...]) -> _Table:
        """The same for some of the features only."""
        gone = tuple(at - len(self.features) - 2 for at in range(len(self.features)) if at not in subset)
        samples, weighed, squares, draws = (each.sum(gone) for each in (self.samples, self.weight, self.squares, self.draws))
        features, levels = tuple(self.features[at] for at in subset), tuple(self.levels[at] for at in subset)
        return _Table(self.classes, features, levels, self.strata, samples, weighed, squares, draws)

    @property
    def names(self) -> list[str]:
        return [", ".join(map("=".join, zip(self.features, value, strict=True))) or "all" for value in product(*self.levels)]

    def cells(self, counts: Array) -> Confusion:
        lead, k = counts.ndim - len(self.features) - 2, len(self.classes)
        return Confusion(counts.reshape(*counts.shape[:lead], -1, k, k), self.classes)


@dataclass(frozen=True, eq=False)
class _Part:
    """The audit for one set of features and one positive class."""

    table: _Table
    subset: tuple[int, ...]
    label: Any
    level: float
    smallest: int

    @cached_property
    def sizes(self) -> Array:
        total: Array = self.table.samples.sum((-2, -1)).reshape(len(self.table.strata), -1)
        return total

    def counted(self, metric: str) -> tuple[Array, Array]:
        """As many as count for the test: rate times effective number, and that number, ``(S, G)``."""
        (share, among), squares = (self.table.cells(each).counted(metric, self.label) for each in (self.table.weight, self.table.squares))
        effective = among * quotient(among, squares[1])
        effective = np.where(np.isnan(effective), 0, effective)
        return np.where(effective > 0, share * quotient(effective, among), 0), effective

    def drawn(self, metric: str) -> Array:
        return self.table.cells(self.table.draws).rate(metric, self.label)

    def rate(self, metric: str) -> Array:
        return self.table.cells(self.table.weight).rate(metric, self.label)

    def rates(self) -> list[dict[str, Any]]:
        rows = []
        for metric in METRICS:
            n = self.table.cells(self.table.samples).counted(metric, self.label)[1]
            value, (low, high) = self.rate(metric), self.interval(metric)
            share, among = self.table.cells(self.table.weight).counted(metric, self.label)
            others = [each.sum(1, keepdims=True) - each for each in (share, among)]
            others = [np.where(self.sizes.sum(1, keepdims=True) > self.sizes, each, 0) for each in others]
            own = self.counted(metric)
            p = differs(*own, *(each.sum(1, keepdims=True) - each for each in own))
            for s, g in np.ndindex(value.shape):
                rows.append({
                    **self._where(s), "group": self.table.names[g], "size": int(self.sizes[s, g]), "metric": metric, "n": int(n[s, g]),
                    "value": value[s, g], "low": low[s, g], "high": high[s, g], "rest": quotient(others[0], others[1])[s, g], "p": p[s, g],
                })  # fmt: skip
        return rows

    def interval(self, metric: str) -> tuple[Array, Array]:
        value, n = self.rate(metric), self.table.cells(self.table.samples).counted(metric, self.label)[1]
        few = (n < self.smallest) | (value == 0) | (value == 1)
        pairs = zip(wilson(*self.counted(metric), self.level), percentiles(self.drawn(metric), self.level), strict=True)
        low, high = (np.where(np.isnan(value), np.nan, np.where(few, exact, drawn)) for exact, drawn in pairs)
        return low, high

    def gaps(self, rng: np.random.Generator) -> list[dict[str, Any]]:
        rows, n = [], len(self.table.draws)
        every = dict.fromkeys(metric for gap in GAPS for metric in COMPARED[gap])
        alike = {metric: [by_chance(*counts, spread, n, rng) for counts in zip(*self.counted(metric), strict=True)] for metric in every}
        for gap in GAPS:
            metrics = COMPARED[gap]
            rates, drawn = [self.rate(metric) for metric in metrics], [self.drawn(metric) for metric in metrics]
            difference, ratio = self._spread(rates), self._spread(rates, ratio=True)
            low, high = shifted(difference, self._spread(drawn), self.level)
            ratio_low, ratio_high = shifted(ratio, self._spread(drawn, ratio=True), self.level)
            for s in range(len(self.table.strata)):
                same = np.max([alike[metric][s] for metric in metrics], axis=0)
                chance = np.nanquantile(same, self.level) if not np.isnan(difference[s]) else np.nan
                rows.append({
                    **self._where(s), "gap": gap, "difference": difference[s], "low": 0.0 if difference[s] <= chance else low[s], "high": high[s],
                    "by_chance": float(chance), "ratio": ratio[s], "ratio_low": ratio_low[s],
                    "ratio_high": 1.0 if difference[s] <= chance and ratio_high[s] <= 1 else ratio_high[s], **self._extremes(metrics, s),
                })  # fmt: skip
        return rows

    def _spread(self, rates: list[Array], *, ratio: bool = False) -> Array:
        """The worst of several rates; NaN if one of them cannot be compared."""
        apart = np.stack([spread(each, ratio=ratio) for each in rates])
        worst: Array = apart.min(0) if ratio else apart.max(0)
        return worst

    def _extremes(self, metrics: Sequence[str], s: int) -> dict[str, str]:
        """Groups with the highest and lowest rate, of the metric that differs most."""
        rates = np.stack([self.rate(metric)[s] for metric in metrics])
        lacking = [name for name, gone in zip(self.table.names, np.isnan(rates).any(0), strict=True) if gone]
        apart = spread(rates)
        if np.isnan(apart).any():
            return {"highest": "", "lowest": "", "left_out": "; ".join(lacking)}
        row = rates[int(apart.argmax())]
        high, low = self.table.names[int(np.nanargmax(row))], self.table.names[int(np.nanargmin(row))]
        return {"highest": high, "lowest": low, "left_out": "; ".join(lacking)}

    def warnings(self) -> list[str]:
        said, names, selection = [], self.table.names, self.rate("selection_rate")
        low, high = self.interval("selection_rate")
        for s, stratum in enumerate(self.table.strata):
            where = " x ".join(self.table.features) + (f", {stratum}" if stratum else "")
            empty = [names[g] for g in np.flatnonzero(self.sizes[s] == 0)]
            if empty:
                said.append(f"{where}: no sample in {len(empty)} of {len(names)} groups, whose rates are NaN: {'; '.join(empty)}")
            for g in np.flatnonzero((self.sizes[s] > 0) & (self.sizes[s] < self.smallest)):
                few = f"{int(self.sizes[s, g])} sample{'' if self.sizes[s, g] == 1 else 's'}"
                rate = f"{selection[s, g]:.3f} [{low[s, g]:.3f}, {high[s, g]:.3f}]"
                said.append(f"{where}: {names[g]} has only {few}, too few to judge it by; its selection rate is {rate}")
            for metric, among in (("true_positive_rate", "positive"), ("false_positive_rate", "negative")):
                n = self.table.cells(self.table.samples).counted(metric, self.label)[1][s]
                thin = [f"{names[g]} ({int(n[g])})" for g in np.flatnonzero((self.sizes[s] >= max(self.smallest, 1)) & (n < self.smallest))]
                if thin:
                    said.append(f"{where}: the {metric.replace('_', ' ')} rests on few {among} samples: {'; '.join(thin)}")
        return said

    def _where(self, s: int) -> dict[str, str]:
        return {"features": " x ".join(self.table.features), "stratum": self.table.strata[s], "positive": str(self.label)}
