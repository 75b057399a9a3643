"""selection.py: the samples behind a query, and the share of the data that is worth keeping."""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from robust_if import Scores, remove_top
from robust_if.selection import BLOCK, cover, keep_best, most_influential


def scores(values: np.ndarray | list[float], name: str = "ip", ids: np.ndarray | None = None) -> Scores:
    return Scores(np.asarray(values, dtype=float), np.arange(len(values)) if ids is None else ids, name)


def distinct(n: int, seed: int, q: int = 1) -> np.ndarray:
    """Values without ties, of both signs, ``(n, q)``."""
    draw = np.random.default_rng(seed)
    return np.stack([draw.permutation(n) - n / 2 + draw.uniform(0, 0.5) for _ in range(q)], 1)


sizes, shares, seeds = st.integers(1, 60), st.integers(1, 100), st.integers(0, 10**6)


# --- most_influential ---


def test_the_samples_that_matter_most_for_each_query_in_both_directions() -> None:
    matrix = [[1.0, -5.0], [3.0, 2.0], [-2.0, 4.0]]
    positions, values = most_influential(matrix, 2)
    assert positions.tolist() == [[1, 0], [2, 1]] and values.tolist() == [[3, 1], [4, 2]]
    positions, values = most_influential(matrix, 2, harmful=False)
    assert positions.tolist() == [[2, 0], [0, 1]] and values.tolist() == [[-2, 1], [-5, 2]]


@settings(max_examples=30)
@given(n=sizes, q=st.integers(1, 4), seed=seeds, harmful=st.booleans(), levels=st.integers(1, 8), data=st.data())
def test_they_are_the_first_of_a_stable_sort_ties_included(n: int, q: int, seed: int, harmful: bool, levels: int, data: st.DataObject) -> None:
    matrix = np.random.default_rng(seed).integers(-levels, levels, size=(n, q)).astype(float)
    k = data.draw(st.integers(1, n))
    positions, values = most_influential(matrix, k, harmful=harmful)
    assert positions.shape == values.shape == (q, k)
    for j in range(q):
        expected = sorted(range(n), key=lambda i: (-matrix[i, j] if harmful else matrix[i, j], i))[:k]
        assert positions[j].tolist() == expected and values[j].tolist() == matrix[expected, j].tolist()


def test_more_queries_than_are_read_at_once_and_a_matrix_on_disk(tmp_path: Path) -> None:
    matrix = np.random.default_rng(0).normal(size=(9, 2 * BLOCK + 3)).astype(np.float32)
    np.save(tmp_path / "pairs.npy", matrix)
    positions, values = most_influential(np.load(tmp_path / "pairs.npy", mmap_mode="r"), 3)
    assert positions.tolist() == np.argsort(-matrix, axis=0, kind="stable")[:3].T.tolist()
    np.testing.assert_array_equal(values, np.take_along_axis(matrix.T, positions, 1))


@pytest.mark.parametrize("k", [0, 4, -1, 1.5])
def test_a_number_of_samples_out_of_range_is_refused(k: Any) -> None:
    with pytest.raises(ValueError, match=f"k: expected a whole number from 1 to 3, got {k}"):
        most_influential(np.zeros((3, 2)), k)


@pytest.mark.parametrize("matrix", [np.zeros(3), np.zeros((3, 2, 1)), np.zeros((0, 2)), np.zeros((3, 0)), np.array([["a", "b"]])])
def test_a_matrix_of_another_shape_or_of_text_is_refused(matrix: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"matrix: expected numbers of shape \(n, q\)"):
        most_influential(matrix, 1)
    with pytest.raises(ValueError, match=r"matrix: expected numbers of shape \(n, q\)"):
        cover(matrix, 0.5)


def test_values_that_are_not_finite_are_named_by_row_and_column() -> None:
    matrix = np.zeros((4, BLOCK + 2))
    matrix[2, BLOCK + 1] = np.nan
    with pytest.raises(ValueError, match=rf"expected finite numbers, got 1 that are not, at \(2, {BLOCK + 1}\)"):
        most_influential(matrix, 1)
    with pytest.raises(ValueError, match=rf"expected finite numbers, got 1 that are not, at \(2, {BLOCK + 1}\)"):
        cover(matrix, 0.5)
    with pytest.raises(ValueError, match="expected finite numbers, got 2 that are not, at 0, 2"):
        keep_best([np.inf, 0.0, np.nan], 0.5)


# --- keep_best ---


def test_the_lowest_scores_are_kept_and_of_equal_ones_the_first() -> None:
    assert keep_best(scores([3, -1, 0, 2]), 0.5).tolist() == [0, 1, 1, 0]
    assert keep_best(scores([1, 1, 1, 0, 1]), 0.6).tolist() == [1, 1, 0, 1, 0]


def test_each_group_keeps_its_own_best() -> None:
    values, groups = [0.0, 1.0, 2.0, 3.0, 10.0, 11.0, 12.0, 13.0], list("aaaabbbb")
    assert keep_best(values, 0.5).tolist() == [1, 1, 1, 1, 0, 0, 0, 0]
    assert keep_best(values, 0.5, groups=groups).tolist() == [1, 1, 0, 0, 1, 1, 0, 0]
    assert keep_best(values, 0.1, groups=groups).tolist() == [1, 0, 0, 0, 1, 0, 0, 0]  # no group loses all of its samples


@settings(max_examples=60)
@given(n=sizes, percent=shares)
def test_the_number_kept_is_the_share_rounded_up(n: int, percent: int) -> None:
    """Also where the share is not exact in binary, and there are as many as remove_top leaves."""
    kept = keep_best(np.zeros(n), percent / 100)
    assert kept.sum() == math.ceil(Fraction(percent, 100) * n) and set(kept) <= {0.0, 1.0}
    assert kept.sum() == remove_top(scores(np.zeros(n)), fraction=1 - percent / 100).sum()


@settings(max_examples=30)
@given(n=sizes, percent=shares, seed=seeds)
def test_without_groups_it_is_what_remove_top_leaves(n: int, percent: int, seed: int) -> None:
    found = scores(distinct(n, seed)[:, 0])
    np.testing.assert_array_equal(keep_best(found, percent / 100), remove_top(found, fraction=1 - percent / 100))


@settings(max_examples=30)
@given(n=sizes, percent=shares, seed=seeds, count=st.integers(1, 5))
def test_the_same_share_of_every_group_is_kept_and_its_best(n: int, percent: int, seed: int, count: int) -> None:
    values, groups = distinct(n, seed)[:, 0], np.random.default_rng(seed).integers(count, size=n)
    kept = keep_best(values, percent / 100, groups=groups) == 1
    for group in np.unique(groups):
        own = groups == group
        assert kept[own].sum() == math.ceil(Fraction(percent, 100) * int(own.sum()))
        assert values[own & kept].max() < values[own & ~kept].min(initial=np.inf)


@settings(max_examples=30)
@given(n=sizes, few=shares, more=shares, seed=seeds, q=st.integers(1, 4))
def test_what_a_share_keeps_a_larger_one_keeps_too(n: int, few: int, more: int, seed: int, q: int) -> None:
    draw = np.random.default_rng(seed)
    few, more = sorted((few, more))
    matrix, groups = draw.integers(-3, 3, size=(n, q)).astype(float), draw.integers(3, size=n)
    for choose in (lambda s: keep_best(matrix[:, 0], s), lambda s: keep_best(matrix[:, 0], s, groups=groups), lambda s: cover(matrix, s)):
        assert (choose(few / 100) <= choose(more / 100)).all()
        assert (choose(1.0) == 1).all()


@settings(max_examples=30)
@given(n=sizes, percent=shares, seed=seeds, q=st.integers(1, 4))
def test_the_order_of_the_data_changes_nothing_where_there_are_no_ties(n: int, percent: int, seed: int, q: int) -> None:
    draw = np.random.default_rng(seed)
    matrix, groups, order = distinct(n, seed, q), draw.integers(3, size=n), draw.permutation(n)
    share = percent / 100
    np.testing.assert_array_equal(keep_best(matrix[order, 0], share, groups=groups[order]), keep_best(matrix[:, 0], share, groups=groups)[order])
    np.testing.assert_array_equal(cover(matrix[order], share), cover(matrix, share)[order])
    k = 1 + int(share * (n - 1))
    np.testing.assert_array_equal(order[most_influential(matrix[order], k)[0]], most_influential(matrix, k)[0])


@pytest.mark.parametrize("share", [0.0, -0.1, 1.01, float("nan"), 70])
def test_a_share_out_of_range_is_refused(share: float) -> None:
    for choose in (lambda: keep_best([1.0, 2.0], share), lambda: cover(np.zeros((2, 2)), share)):
        with pytest.raises(ValueError, match=f"share: expected a number above 0 and at most 1, got {share}"):
            choose()


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([0, 1], r"groups: expected one group per sample, shape \(3,\), got \(2,\)"),
        (np.zeros((3, 1)), r"groups: expected one group per sample, shape \(3,\), got \(3, 1\)"),
        ([0.0, float("nan"), 1.0], r"groups: expected a group for every sample, got none for 1 of 3, positions \[1\]"),
        (np.array(["a", None, None], dtype=object), r"groups: .* got none for 2 of 3, positions \[1, 2\]"),
    ],
)
def test_groups_that_do_not_fit_or_are_missing_are_refused(groups: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        keep_best([1.0, 2.0, 3.0], 0.5, groups=groups)


@pytest.mark.parametrize("values", [np.zeros((3, 2)), 1.0, []])
def test_scores_that_are_not_one_per_sample_are_refused(values: Any) -> None:
    with pytest.raises(ValueError, match=r"scores: expected one value per sample, shape \(n,\), got shape"):
        keep_best(values, 0.5)


# --- cover ---


def test_targets_take_turns_whatever_their_scale() -> None:
    """The second target has small scores, so that the lowest of all are those of the first; in turns each gets its best."""
    matrix = np.array([[-100.0, 0.3], [-90.0, 0.4], [-80.0, -0.1], [-70.0, -0.2]])
    assert keep_best(matrix.min(1), 0.5).tolist() == [1, 1, 0, 0]
    assert cover(matrix, 0.5).tolist() == [1, 0, 0, 1]
    assert cover(matrix, 0.25).tolist() == [1, 0, 0, 0]  # the first target has the first turn


def test_a_sample_named_by_two_targets_is_kept_once() -> None:
    assert cover(np.array([[0.0, 0.0], [1.0, 2.0], [2.0, 1.0], [3.0, 3.0]]), 0.75).tolist() == [1, 1, 1, 0]


@settings(max_examples=30)
@given(n=sizes, percent=shares, seed=seeds, q=st.integers(1, 4))
def test_the_first_of_every_target_are_kept_as_far_as_they_fit(n: int, percent: int, seed: int, q: int) -> None:
    """Against turns that are played one after another."""
    matrix = distinct(n, seed, q)
    lists, size = np.argsort(matrix, axis=0), math.ceil(Fraction(percent, 100) * n)
    named = [int(lists[r, t]) for r in range(n) for t in range(q)]
    expected = list(dict.fromkeys(named))[:size]
    assert np.flatnonzero(cover(matrix, percent / 100)).tolist() == sorted(expected)


def test_scores_of_several_targets_and_their_matrix_are_the_same() -> None:
    matrix = distinct(12, 3, 3)
    columns = [scores(matrix[:, t], f"ip-{t}") for t in range(3)]
    np.testing.assert_array_equal(cover(columns, 0.4), cover(matrix, 0.4))
    np.testing.assert_array_equal(cover(columns[:1], 0.4), keep_best(columns[0], 0.4))
    np.testing.assert_array_equal(cover(columns[0], 0.4), keep_best(columns[0], 0.4))


def test_any_increasing_change_of_one_targets_scores_changes_nothing() -> None:
    matrix = distinct(15, 4, 2)
    changed = np.stack([1e6 * matrix[:, 0] ** 3 + 5, matrix[:, 1]], 1)
    np.testing.assert_array_equal(cover(matrix, 0.4), cover(changed, 0.4))


def test_scores_of_different_samples_are_refused() -> None:
    other = scores([1.0, 2.0], "fvm", np.array([1, 0]))
    with pytest.raises(ValueError, match="scores: expected the same samples for every target, but 'ip' and 'fvm' differ in their ids"):
        cover([scores([1.0, 2.0]), other], 0.5)
    with pytest.raises(ValueError, match="scores: expected Scores for every target, or a matrix, got one list among them"):
        cover([scores([1.0, 2.0]), [1.0, 2.0]], 0.5)  # type: ignore[list-item]
    with pytest.raises(ValueError, match="matrix: expected numbers"):
        cover([], 0.5)
