"""decisions.py: from scores to weights or labels."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from robust_if import Scores, automatic_threshold, relabel, remove_above, remove_automatic, remove_top
from robust_if.decisions import threshold_at


def scores(values: np.ndarray | list[float]) -> Scores:
    return Scores(np.asarray(values, dtype=float), np.arange(len(values)), "ip")


def test_the_most_harmful_are_removed_and_ties_keep_the_order_of_the_data() -> None:
    assert remove_top(scores([1, 2, 1, 2, 1]), k=3).tolist() == [0, 0, 1, 0, 1]
    assert remove_top(scores([1, 2, 1, 2, 1]), k=0).tolist() == [1] * 5


@given(n=st.integers(1, 60), percent=st.integers(0, 100))
def test_a_fraction_is_rounded_down(n: int, percent: int) -> None:
    assert (remove_top(scores(np.arange(n)), fraction=percent / 100) == 0).sum() == percent * n // 100


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "expected either k or fraction, got k=None and fraction=None"),
        ({"k": 1, "fraction": 0.1}, "expected either k or fraction, got k=1 and fraction=0.1"),
        ({"k": -1}, "k: expected a number from 0 to 3, got -1"),
        ({"k": 4}, "k: expected a number from 0 to 3, got 4"),
        ({"fraction": 1.1}, "fraction: expected a share from 0 to 1, got 1.1"),
        ({"fraction": -0.1}, "fraction: expected a share from 0 to 1, got -0.1"),
        ({"fraction": float("nan")}, "fraction: expected a share from 0 to 1, got nan"),
    ],
)
def test_a_wrong_number_to_remove_is_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        remove_top(scores([1, 2, 3]), **options)  # type: ignore[arg-type]


def test_what_is_above_the_threshold_is_removed_and_the_threshold_stays() -> None:
    assert remove_above(scores([-1, 0, 0.5, 2])).tolist() == [1, 1, 0, 0]
    assert remove_above(scores([-1, 0, 0.5, 2]), 0.5).tolist() == [1, 1, 1, 0]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("share", [0.05, 0.2, 0.4])
@pytest.mark.parametrize("unit", [1e-8, 1.0, 1e6])
def test_the_automatic_threshold_finds_the_planted_share_of_two_groups(seed: int, share: float, unit: float) -> None:
    draw = np.random.default_rng(seed)
    harmful = np.arange(500) < share * 500
    removed = remove_automatic(scores(unit * np.where(harmful, draw.normal(8, 1.5, 500), draw.normal(0, 1, 500)))) == 0
    assert removed.mean() == pytest.approx(share, abs=0.03)
    assert (removed & harmful).sum() >= 0.9 * harmful.sum()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("n", [200, 500, 2000])
@pytest.mark.parametrize("family", ["normal", "laplace", "logistic"])
def test_the_automatic_threshold_removes_nearly_nothing_of_one_group(family: str, n: int, seed: int) -> None:
    removed = remove_automatic(scores(getattr(np.random.default_rng(seed), family)(size=n))) == 0
    assert removed.mean() <= 0.01


@pytest.mark.parametrize("values", [[3.0] * 50, [0.0] * 49 + [1.0], [1.0, 2.0], [5.0]], ids=["constant", "one apart", "two", "one"])
def test_the_automatic_threshold_stands_scores_that_are_all_alike_or_few(values: list[float]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (remove_automatic(scores(values)) == 0).sum() <= 1


def test_the_automatic_threshold_is_one_of_the_scores_and_repeats() -> None:
    values = np.random.default_rng(0).normal(size=200) + 6 * (np.arange(200) < 40)
    first = automatic_threshold(scores(values))
    np.random.seed(1)
    assert first == automatic_threshold(scores(values)) and first in values


@pytest.mark.parametrize(
    ("m", "share", "rank"), [(99, 0.01, 99), (100, 0.01, 100), (199, 0.01, 198), (19, 0.05, 19), (39, 0.05, 38), (9, 0.5, 5), (1, 0.5, 1)]
)
def test_the_threshold_of_a_false_positive_rate_is_the_conformal_order_statistic(m: int, share: float, rank: int) -> None:
    values = np.random.default_rng(m).permutation(np.arange(1.0, m + 1))
    assert threshold_at(scores(values), share) == rank


@pytest.mark.parametrize("family", ["normal", "standard_cauchy", "exponential"])
@pytest.mark.parametrize(("m", "share"), [(99, 0.01), (150, 0.01), (39, 0.05), (30, 0.1)])
def test_exchangeable_clean_samples_exceed_it_no_more_often_than_promised(family: str, m: int, share: float) -> None:
    """The share of a fresh sample above it is 1 − rank / (m + 1) on average: at most the promise, and short of it by 1 / (m + 1) at most."""
    draw, fresh = getattr(np.random.default_rng(0), family), 200
    above = [(draw(size=fresh) > threshold_at(scores(draw(size=m)), share)).mean() for _ in range(2000)]
    error = 4 * np.std(above) / np.sqrt(len(above))
    assert share - 1 / (m + 1) - error <= np.mean(above) <= share + error


def test_ties_at_the_threshold_are_not_exceeded() -> None:
    clean = scores(np.r_[np.zeros(50), np.ones(49)])
    assert threshold_at(clean, 0.01) == 1 and remove_above(clean, 1.0).all()


def test_a_rate_that_too_few_clean_samples_cannot_promise_is_refused_with_the_smallest_that_they_can() -> None:
    with pytest.raises(ValueError, match=r"false_positives: 98 clean validation samples cannot promise .* 0.01; the smallest .* 0.0101, .* needs 99"):
        threshold_at(scores(np.arange(98)), 0.01)
    assert threshold_at(scores(np.arange(98)), 1 / 99) == 97


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, 2.0, float("nan")])
def test_a_false_positive_rate_out_of_range_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match="false_positives: expected a share strictly between 0 and 1"):
        threshold_at(scores(np.arange(200)), share)


def test_removed_samples_take_the_suggested_label() -> None:
    assert relabel([0, 1, 2], [5, 6, 7], [1.0, 0.0, 0.5]).tolist() == [0, 6, 2]
    with pytest.raises(ValueError, match=r"relabel: expected three arrays of one shape, got labels \(3,\), suggestions \(2,\), weights \(3,\)"):
        relabel([0, 1, 2], [5, 6], [1, 0, 1])
