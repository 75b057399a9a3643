"""fairness/audit.py, fairness/intervals.py: intervals, tests and gaps by group and intersection."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chi2, fisher_exact

from adultlike import adult_like
from robust_if.fairness.audit import GAPS, METRICS, audit
from robust_if.fairness.confusion import Confusion
from robust_if.fairness.groups import Groups
from robust_if.fairness.intervals import adjusted, by_chance, differs, percentiles, resampled, wilson
from robust_if.fairness.metrics import gap, spread


def row(frame: pd.DataFrame, **wanted: Any) -> pd.Series:
    (found,) = [each for _, each in frame.iterrows() if all(each[key] == value for key, value in wanted.items())]
    return found


@pytest.mark.parametrize("classes", [2, 3])
def test_every_row_is_the_rate_of_its_group_and_everybody_elses(classes: int) -> None:
    y, predicted, frame = adult_like(classes=classes)
    found = audit(y, predicted, frame, positive=1 if classes == 2 else None, replicates=20)
    assert list(found.rates["features"].unique()) == ["", "sex", "race", "sex x race"]
    assert len(found.rates) == (1 + 2 + 3 + 6) * len(METRICS) * (1 if classes == 2 else 3)
    assert len(found.gaps) == 3 * len(GAPS) * (1 if classes == 2 else 3)
    for features in (["sex"], ["race"], ["sex", "race"]):
        groups = Groups.of(frame[features])
        cells = Confusion.of(y, predicted, groups)
        for g, name in enumerate(groups.names):
            inside = groups.codes == g
            for k in (1,) if classes == 2 else range(3):
                for metric in METRICS:
                    got = row(found.rates, features=" x ".join(features), positive=str(k), group=name, metric=metric)
                    others = Confusion.of(y[~inside], predicted[~inside], Groups.of(["all"] * (~inside).sum()))
                    assert np.isclose(got["value"], cells.rate(metric, k)[g], atol=1e-12)
                    assert np.isclose(got["rest"], others.rate(metric, k)[0], atol=1e-12)
                    assert got["n"] == cells.counted(metric, k)[1][g] and got["size"] == inside.sum()
        for name in GAPS:
            got = row(found.gaps, features=" x ".join(features), positive="1", gap=name)
            assert np.isclose(got["difference"], gap(name, y, predicted, frame[features]), atol=1e-12)
            assert np.isclose(got["ratio"], gap(name, y, predicted, frame[features], ratio=True), atol=1e-12)
    pd.testing.assert_frame_equal(found.to_frame(), found.rates)


def test_control_features_are_audited_apart() -> None:
    y, predicted, frame = adult_like()
    found = audit(y, predicted, frame["sex"], control_features=frame["race"], replicates=50)
    assert list(found.gaps["stratum"].unique()) == ["race=Black", "race=Other", "race=White"]
    for race, inside in frame.groupby("race").indices.items():
        alone = audit(y[inside], predicted[inside], frame["sex"].iloc[inside], replicates=50)
        here = found.rates[found.rates["stratum"] == f"race={race}"]
        assert np.allclose(here["value"], alone.rates["value"], atol=1e-12) and np.allclose(here["p"], alone.rates["p"], atol=1e-12, equal_nan=True)


def test_intervals_are_those_of_resampling_rows() -> None:
    y, predicted, frame = adult_like()
    weight = np.random.default_rng(1).choice([0.5, 1.0, 3.0], len(y))
    for w in (None, weight):
        found = audit(y, predicted, frame["race"], replicates=2000, sample_weight=w)
        draw, groups = np.random.default_rng(2), Groups.of(frame["race"])
        values = []
        for _ in range(2000):
            at = draw.integers(len(y), size=len(y))
            drawn = Groups(groups.codes[at], groups.features, groups.values)
            values.append(Confusion.of(y[at], predicted[at], drawn, sample_weight=None if w is None else w[at]).rate("true_positive_rate"))
        rates = np.array(values)
        own = Confusion.of(y, predicted, groups, sample_weight=w).rate("true_positive_rate")
        for g, name in enumerate(groups.names):
            got = row(found.rates, group=name, metric="true_positive_rate")
            assert np.allclose([got["low"], got["high"]], np.quantile(rates[:, g], [0.025, 0.975]), atol=0.012)
        got, apart = row(found.gaps, gap="equal_opportunity"), np.ptp(rates, 1)
        low, high = np.quantile(apart, [0.025, 0.975]) - (apart.mean() - np.ptp(own))
        assert np.isclose(got["high"], high, atol=0.015) and np.isclose(got["low"], 0 if got["difference"] <= got["by_chance"] else low, atol=0.015)


def test_intervals_of_gaps_cover_what_is_true_alike_and_apart() -> None:
    """Where plain percentiles never cover a gap of 0: the gap of resampled groups is always larger."""
    draw, size, trials = np.random.default_rng(0), 150, 60
    for rates in (np.full(6, 0.3), np.linspace(0.1, 0.7, 6)):
        covered = 0
        for _ in range(trials):
            s = np.repeat(np.arange(6), size)
            predicted = (draw.uniform(size=len(s)) < rates[s]).astype(int)
            got = row(audit(draw.integers(2, size=len(s)), predicted, s, replicates=200).gaps, gap="demographic_parity")
            covered += got["low"] <= np.ptp(rates) <= got["high"]
        assert covered >= 0.85 * trials


def test_p_values_are_adjusted_over_everything() -> None:
    y, predicted, frame = adult_like()
    rates = audit(y, predicted, frame, replicates=2).rates
    known = rates.dropna(subset="p").sort_values("p")
    assert len(known) == 11 * len(METRICS) and rates["p_adjusted"].isna().equals(rates["p"].isna())
    m = len(known)
    by_hand = np.minimum.accumulate((known["p"].to_numpy() * m / np.arange(1, m + 1))[::-1])[::-1]
    assert np.allclose(known["p_adjusted"], np.minimum(by_hand, 1), atol=1e-14)
    assert np.allclose(adjusted(np.array([0.01, np.nan, 0.04, 0.03])), [0.03, np.nan, 0.04, 0.04], equal_nan=True)


def test_tests_are_fishers_where_counts_are_small_and_of_two_proportions_else() -> None:
    assert differs(*map(np.array, ([3.0], [4.0], [5.0], [30.0])))[0] == fisher_exact([[3, 1], [5, 25]]).pvalue
    a, n, b, m = 60.0, 200.0, 90.0, 210.0
    pooled = (a + b) / (n + m)
    chi = (a / n - b / m) ** 2 / (pooled * (1 - pooled) * (1 / n + 1 / m))
    assert np.isclose(differs(*map(np.array, ([a], [n], [b], [m])))[0], chi2.sf(chi, 1), rtol=1e-10)
    assert np.isnan(differs(*map(np.array, ([0.0], [0.0], [5.0], [30.0])))[0])
    assert differs(*map(np.array, ([0.0], [40.0], [0.0], [30.0])))[0] == 1


def test_intervals_by_hand() -> None:
    low, high = wilson(np.array([0.0, 10.0, 5.0]), np.array([10.0, 10.0, 10.0]), 0.95)
    assert np.allclose(low, [0, 0.7224672, 0.2365931], atol=1e-6) and np.allclose(high, [0.2775328, 1, 0.7634069], atol=1e-6)
    values = np.array([[3.0, np.nan], [1.0, np.nan], [np.nan, np.nan], [2.0, np.nan]])
    low, high = percentiles(values, 0.5)
    assert np.allclose(low, [1.5, np.nan], equal_nan=True) and np.allclose(high, [2.5, np.nan], equal_nan=True)


@given(st.integers(0, 2**32 - 1))
def test_replicates_have_as_many_samples_and_the_variance_of_resampled_rows(seed: int) -> None:
    draw = np.random.default_rng(seed)
    place, weight = draw.integers(4, size=300), draw.integers(1, 4, size=300).astype(float)
    tables = resampled(place, 6, None, 400, draw)
    assert tables.shape == (400, 6) and (tables.sum(1) == 300).all() and not tables[:, 4:].any()
    share = (place == 2).mean()
    assert np.isclose(tables[:, 2].var(), 300 * share * (1 - share), rtol=0.35)
    weighed = resampled(place, 6, weight, 400, draw)[:, 2]
    each = weight * (place == 2)
    assert np.isclose(weighed.mean(), each.sum(), rtol=0.05) and np.isclose(weighed.var(), 300 * each.var(), rtol=0.35)


def test_chance_alone_sets_many_small_groups_apart() -> None:
    many, few = (by_chance(np.full(k, 30.0), np.full(k, 100.0), spread, 500, np.random.default_rng(0)) for k in (40, 2))
    assert many.mean() > 0.17 > 0.07 > few.mean()


def test_small_empty_and_undefined_groups_are_named_not_hidden() -> None:
    y, predicted, frame = adult_like(n=400)
    keep = ~((frame["sex"] == "Female") & (frame["race"] == "Other")).to_numpy()
    keep &= ~((frame["sex"] == "Male") & (frame["race"] == "Other")).to_numpy() | (np.cumsum(frame["race"] == "Other") <= 12).to_numpy()
    found = audit(y[keep], predicted[keep], frame[keep], replicates=50)
    empty = found.rates[found.rates["group"] == "sex=Female, race=Other"]
    assert len(empty) == len(METRICS) and empty[["value", "low", "high", "p", "p_adjusted"]].isna().all(axis=None) and not empty["n"].any()
    assert any("sex x race: no sample in 1 of 6 groups, whose rates are NaN: sex=Female, race=Other" in text for text in found.warnings)
    small = row(found.rates, group="race=Other", metric="selection_rate")
    words = f"race: race=Other has only {small['size']} samples, too few to judge it by; its selection rate is {small['value']:.3f}"
    assert small["size"] < 30 and any(text.startswith(words) for text in found.warnings)
    assert row(found.gaps, features="sex x race", gap="demographic_parity")["left_out"] == "sex=Female, race=Other"
    assert not audit(y, predicted, frame["sex"], replicates=2, smallest=1).warnings


def test_nothing_counted_in_a_small_group_is_not_certain() -> None:
    y, predicted, s = np.tile([0, 1], 60), np.tile([0, 1, 1, 1], 30), np.repeat(["a", "b"], [115, 5])
    predicted[s == "b"] = 0
    got = row(audit(y, predicted, s).rates, group="sensitive_feature_0=b", metric="selection_rate")
    assert (got["value"], got["low"]) == (0, 0) and got["high"] > 0.4


def test_the_same_seed_gives_the_same_audit_whatever_the_order_of_the_samples() -> None:
    y, predicted, frame = adult_like()
    order = np.random.default_rng(5).permutation(len(y))
    weight = np.random.default_rng(6).uniform(size=len(y))
    first, again = (audit(y[at], predicted[at], frame.iloc[at], replicates=30, sample_weight=weight[at]) for at in (slice(None), order))
    pd.testing.assert_frame_equal(first.rates, again.rates, rtol=1e-9)
    pd.testing.assert_frame_equal(first.gaps, again.gaps, rtol=1e-9)
    other = audit(y, predicted, frame, replicates=30, sample_weight=weight, seed=1)
    assert not other.rates["low"].equals(first.rates["low"])


def test_whole_weights_of_one_change_nothing() -> None:
    y, predicted, frame = adult_like(n=300)
    plain, weighed = (audit(y, predicted, frame, replicates=30, sample_weight=w) for w in (None, np.ones(300)))
    pd.testing.assert_frame_equal(plain.rates, weighed.rates, rtol=1e-12)
    pd.testing.assert_frame_equal(plain.gaps, weighed.gaps, rtol=1e-12)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"replicates": 0}, "replicates, level, smallest: expected at least 1"),
        ({"level": 1.0}, "replicates, level, smallest"),
        ({"sensitive_features": ["a"] * 300}, "sensitive_features: expected at least two groups"),
        ({"y_pred": np.full(300, 0.5)}, "y_pred: expected labels, got numbers such as 0.5"),
        ({"positive": 7}, "positive: expected one of the labels"),
        ({"sensitive_features": {str(k): np.arange(300) for k in range(2)}}, "expected at most 20,000 combinations .* these make 360,000"),
        ({"sample_weight": np.zeros(300)}, "sample_weight"),
    ],
)
def test_what_does_not_fit_is_refused(bad: dict[str, Any], message: str) -> None:
    y, predicted, frame = adult_like(n=300)
    with pytest.raises(ValueError, match=message):
        audit(**{"y_true": y, "y_pred": predicted, "sensitive_features": frame, **bad})
