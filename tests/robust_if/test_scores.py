"""scores.py: the table of scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import t, ttest_1samp

from robust_if import Scores
from robust_if.scores import MARK, table

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


# What can be trusted


def drawn(n: int = 40, k: int = 5, seed: int = 0, noise: float = 0.3) -> Scores:
    draw = np.random.default_rng(seed)
    members = draw.normal(size=n) + noise * draw.normal(size=(k, n))
    return Scores(members.mean(0), np.arange(n), "ip-ensemble", "utility", members=members)


@given(k=st.integers(1, 39), confidence=st.floats(0.5, 0.99))
def test_a_sample_is_stable_where_a_t_test_tells_it_from_the_boundary(k: int, confidence: float) -> None:
    got = drawn()
    sorted_values = np.sort(got.values)[::-1]
    boundary = (sorted_values[k - 1] + sorted_values[k]) / 2
    assert got.members is not None
    differs = ttest_1samp(got.members, boundary).pvalue < 1 - confidence
    assert got.stable(k, confidence).tolist() == differs.tolist()


def test_an_interval_is_students() -> None:
    got = Scores(np.array([2.0, 5.0]), IDS[:2], "e", members=np.array([[1.0, 5.0], [3.0, 5.0]]))
    low, high = got.interval(0.9)
    half = t.ppf(0.95, 1) * np.sqrt(2) / np.sqrt(2)
    assert low == pytest.approx([2 - half, 5]) and high == pytest.approx([2 + half, 5])


def test_less_noise_and_less_confidence_make_more_samples_stable() -> None:
    assert drawn(noise=0.05).stable(10).sum() > drawn(noise=0.5).stable(10).sum()
    assert drawn().stable(10, 0.5).sum() > drawn().stable(10, 0.99).sum()
    assert drawn(noise=0.0).stable(10).all()
    assert not Scores(np.ones(3), IDS[:3], "e", members=np.ones((2, 3))).stable(1).any()


@pytest.mark.parametrize("k", [0, 4])
def test_without_a_boundary_nothing_is_stable_or_not(k: int) -> None:
    with pytest.raises(ValueError, match=f"k: expected a number from 1 to 3, got {k}"):
        scores([1.0, 2.0, 3.0, 4.0], members=np.ones((2, 4))).stable(k)


@pytest.mark.parametrize(("members", "kind"), [(None, "a single estimator"), (np.ones((1, 2)), "an ensemble of one")])
def test_stability_needs_two_members(members: Any, kind: str) -> None:
    with pytest.raises(ValueError, match=f"interval: ip is {kind}; wrap it in Ensemble with at least 2 members"):
        scores([1.0, 2.0], members=members).stable(1)


@pytest.mark.parametrize("confidence", [0.0, 1.0, np.nan])
def test_a_confidence_is_a_probability(confidence: float) -> None:
    with pytest.raises(ValueError, match="confidence: expected a number between 0 and 1"):
        drawn().interval(confidence)


def test_members_of_other_samples_are_refused() -> None:
    with pytest.raises(ValueError, match=r"members: expected shape \(k, 2\), got \(2, 3\)"):
        scores([1.0, 2.0], members=np.ones((2, 3)))


# On disk

SAVED: dict[str, Scores] = {
    "plain": scores([1.0, -3e-17, 7.0, 0.1]),
    "members": drawn(),
    "one member": scores([1.0, 2.0], members=np.array([[1.0, 2.0]])),
    "suggestions": Scores(
        np.array([1.0, 2.0]), np.array([7, 5]), "label-odds", "", "log-odds", suggestions=np.array([0, 3]),
        provenance={"noise": [[0.9, 0.1]], "seconds": 0.5, "é": None},
    ),
    "numpy": Scores(np.ones(1), np.array(["x"]), "ip", "a|b", provenance={"a": np.float64(2), "b": np.arange(2), "c": (1, 2)}),
}  # fmt: skip


@pytest.mark.parametrize("name", SAVED)
def test_saved_scores_come_back_as_they_were(name: str, tmp_path: Path) -> None:
    one, path = SAVED[name], tmp_path / "scores.parquet"
    one.to_parquet(path)
    got = Scores.read(path)
    for field in ("values", "ids", "members", "suggestions"):
        before, after = getattr(one, field), getattr(got, field)
        assert (before is None) == (after is None)
        assert before is None or (np.array_equal(before, after) and before.dtype == after.dtype)
    assert (got.estimator, got.target, got.units) == (one.estimator, one.target, one.units)
    plain = {"a": 2.0, "b": [0, 1], "c": [1, 2]} if name == "numpy" else one.provenance
    assert got.provenance == plain
    assert [each.name for each in tmp_path.iterdir()] == ["scores.parquet"]


@pytest.mark.parametrize("name", SAVED)
def test_equal_scores_give_equal_bytes(name: str, tmp_path: Path) -> None:
    one = SAVED[name]
    one.to_parquet(tmp_path / "first")
    Scores.read(tmp_path / "first").to_parquet(tmp_path / "second")
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()


def test_the_file_is_a_table_that_others_can_read(tmp_path: Path) -> None:
    drawn().to_parquet(tmp_path / "scores.parquet")
    frame = pq.read_table(tmp_path / "scores.parquet").to_pandas()
    assert list(frame.columns) == ["id", "value", "rank", "spread", "members"]
    assert frame["rank"].tolist() == drawn().ranks().tolist() and frame["spread"].to_numpy() == pytest.approx(drawn().spread())


def test_what_has_no_place_in_the_file_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    for bad in (Scores(np.ones(1), IDS[:1], "ip", provenance={"a": object()}), Scores(np.ones(2), np.array([1, "a"], dtype=object), "ip")):
        with pytest.raises(ValueError, match="scores: ip cannot be written to Parquet"):
            bad.to_parquet(tmp_path / "scores.parquet")
    assert not list(tmp_path.iterdir())


ABOUT = {"estimator": "ip", "target": "", "units": "rank", "provenance": {}}
COLUMNS: dict[str, Any] = {"id": [1, 2], "value": [0.5, 1.5]}
DAMAGED: dict[str, Any] = {
    "no description": (COLUMNS, None),
    "no json": (COLUMNS, b"{"),
    "not a mapping": (COLUMNS, b"[1]"),
    "units": (COLUMNS, {**ABOUT, "units": "miles"}),
    "provenance": (COLUMNS, {**ABOUT, "provenance": 3}),
    "estimator": (COLUMNS, {key: value for key, value in ABOUT.items() if key != "estimator"}),
    "no value": ({"id": [1, 2]}, ABOUT),
    "missing value": ({"id": [1, 2], "value": [0.5, None]}, ABOUT),
    "missing id": ({"id": [1, None], "value": [0.5, 1.0]}, ABOUT),
    "not finite": ({"id": [1, 2], "value": [0.5, float("inf")]}, ABOUT),
    "text": ({"id": [1, 2], "value": ["a", "b"]}, ABOUT),
    "members of no list": ({**COLUMNS, "members": [1.0, 2.0]}, ABOUT),
    "members of different lengths": ({**COLUMNS, "members": [[1.0], [2.0, 3.0]]}, ABOUT),
    "nested missing": ({**COLUMNS, "members": [[1.0], [None]]}, ABOUT),
    "text as suggestions": ({**COLUMNS, "suggestion": ["a", "b"]}, ABOUT),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_or_foreign_table_is_refused(kind: str, tmp_path: Path) -> None:
    columns, about = DAMAGED[kind]
    described = about if isinstance(about, bytes) else json.dumps(about).encode()
    metadata = {} if about is None else {MARK: described}
    pq.write_table(pa.table(columns).replace_schema_metadata(metadata), tmp_path / "scores.parquet")
    with pytest.raises(ValueError, match="is not a table of scores, or damaged"):
        Scores.read(tmp_path / "scores.parquet")


@pytest.mark.parametrize("content", [b"", b"PAR1", b"x" * 200])
def test_a_file_that_is_no_parquet_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "scores.parquet").write_bytes(content)
    with pytest.raises(ValueError, match="is not a table of scores, or damaged"):
        Scores.read(tmp_path / "scores.parquet")
    with pytest.raises(FileNotFoundError, match="scores: there is no file"):
        Scores.read(tmp_path / "other.parquet")


@pytest.mark.parametrize("values", [[3.0, 1.0, 2.0, -1.0], [0.0, 0.0, 0.0, 0.0], [-1.0, 5.0, 1.0, 4.0]])
def test_samples_put_first_keep_their_order_and_so_do_the_others(values: list[float]) -> None:
    first = np.array([False, True, False, True])
    scores = Scores(np.array(values), np.arange(4), "any", units="target").put_first(first)
    assert set(scores.order()[:2]) == {1, 3} and scores.units == "rank"
    assert np.array_equal(scores.values[first], np.array(values)[first])
    assert scores.values[0] - scores.values[2] == pytest.approx(values[0] - values[2])
    assert scores.values[~first].max() < scores.values[first].min()
    assert np.array_equal(scores.put_first(np.ones(4, dtype=bool)).values, scores.values)


@pytest.mark.parametrize("mask", [[True], [False, False]])
def test_a_mask_that_does_not_fit_is_refused(mask: list[bool]) -> None:
    with pytest.raises(ValueError, match="mask: expected 2 truth values, one of them true"):
        Scores(np.zeros(2), np.arange(2), "any").put_first(mask)


def test_an_interval_is_refused_where_the_score_is_not_the_mean_of_its_members() -> None:
    members = np.array([[0.0, 1.0], [1.0, 0.5]])
    with pytest.raises(ValueError, match="not the mean of its members"):
        Scores(members.max(0), np.arange(2), "any", members=members).interval()
