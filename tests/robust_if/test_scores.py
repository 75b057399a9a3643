"""scores.py: the table of scores."""

from __future__ import annotations

import numpy as np
import pytest

from robust_if import Scores
from robust_if.scores import table

IDS = np.array(["a", "b", "c", "d"])


def scores(values: list[float], name: str = "ip", members: np.ndarray | None = None) -> Scores:
    return Scores(np.array(values), IDS[: len(values)], name, "utility", members=members)


def test_order_is_most_harmful_first_and_ties_keep_the_order_of_the_data() -> None:
    got = scores([1.0, 3.0, 1.0, 3.0])
    assert got.order().tolist() == [1, 3, 0, 2]
    assert got.ranks().tolist() == [2, 0, 3, 1]
    assert got.top(3).tolist() == ["b", "d", "a"]
    assert got.top(0).tolist() == []


@pytest.mark.parametrize("k", [-1, 5])
def test_more_samples_than_there_are_cannot_be_on_top(k: int) -> None:
    with pytest.raises(ValueError, match=f"k: expected a number from 0 to 4, got {k}"):
        scores([1.0, 2.0, 3.0, 4.0]).top(k)


def test_spread_is_the_standard_deviation_over_members() -> None:
    members = np.array([[1.0, 2.0], [3.0, 2.0]])
    assert scores([2.0, 2.0], members=members).spread() == pytest.approx([np.sqrt(2), 0])
    assert scores([1.0, 2.0], members=members[:1]).spread().tolist() == [0, 0]
    with pytest.raises(ValueError, match="spread: ip is a single estimator; wrap it in Ensemble"):
        scores([1.0]).spread()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused_and_named(bad: float) -> None:
    with pytest.raises(ValueError, match=r"scores: ip gave values that are not finite for 2 of 4 samples, ids \[.*'b'.*'d'"):
        scores([1.0, bad, 2.0, bad])


@pytest.mark.parametrize("values", [np.ones(3), np.ones((4, 1)), np.ones(())])
def test_one_value_per_id_is_expected(values: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"scores: expected one value per sample, shape \(4,\), got shape"):
        Scores(values, IDS, "ip")


def test_a_frame_has_ids_score_rank_and_spread() -> None:
    frame = scores([1.0, 3.0], members=np.array([[1.0, 3.0]])).to_frame()
    assert list(frame.columns) == ["id", "ip:utility", "rank", "spread"]
    assert frame["rank"].tolist() == [1, 0] and frame["id"].tolist() == ["a", "b"]
    assert list(Scores(np.ones(4), IDS, "loss").to_frame().columns) == ["id", "loss", "rank"]


def test_a_table_has_one_column_per_estimator_and_target() -> None:
    frame = table([scores([1.0, 2.0]), scores([3.0, 4.0], "fvm")])
    assert list(frame.columns) == ["id", "ip:utility", "fvm:utility"]
    assert frame["fvm:utility"].tolist() == [3, 4]


def test_a_table_of_different_samples_or_equal_names_is_refused() -> None:
    with pytest.raises(ValueError, match="are of different samples, or in a different order"):
        table([scores([1.0, 2.0]), Scores(np.ones(2), IDS[1::-1], "fvm")])
    with pytest.raises(ValueError, match="two columns would be named 'ip:utility'"):
        table([scores([1.0]), scores([2.0])])
