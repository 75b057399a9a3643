"""evaluations/retrieval.py: AUC and recall of same-kind samples, against scikit-learn and against what can be counted by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from robust_if.evaluations.retrieval import retrieval

KINDS = np.array(["a", "a", "b", "b", "b", "c"])


def test_negative_scores_are_related() -> None:
    matrix = np.where(KINDS[:, None] == np.array(["a", "c"]), -1.0, 0.0)
    found = retrieval(matrix, KINDS, ["a", "c"])
    assert found.means == (1.0, 1.0) and found.stds == (0.0, 0.0)
    assert retrieval(-matrix, KINDS, ["a", "c"]).means == (0.0, 0.0)
    assert retrieval(-matrix, KINDS, ["a", "c"], largest=True).means == (1.0, 1.0)


@given(st.integers(0, 10**6), st.booleans())
def test_auc_is_that_of_scikit_learn_with_ties(seed: int, largest: bool) -> None:
    rng = np.random.default_rng(seed)
    kinds = np.concatenate([np.arange(4), rng.integers(4, size=30)])
    queries = rng.integers(4, size=5)
    matrix = rng.integers(6, size=(34, 5)).astype(float)
    found = retrieval(matrix, kinds, queries, largest=largest)
    for q, kind in enumerate(queries):
        assert found.auc[q] == pytest.approx(roc_auc_score(kinds == kind, matrix[:, q] if largest else -matrix[:, q]), abs=1e-12)


@given(st.integers(0, 10**6))
def test_recall_counts_the_first_k(seed: int) -> None:
    rng = np.random.default_rng(seed)
    kinds, queries = np.concatenate([np.arange(3), rng.integers(3, size=20)]), rng.integers(3, size=4)
    matrix = rng.permuted(np.arange(23.0)[:, None].repeat(4, 1), axis=0)
    found = retrieval(matrix, kinds, queries)
    for q, kind in enumerate(queries):
        k = int((kinds == kind).sum())
        assert found.recall[q] == pytest.approx(float((kinds[np.argsort(matrix[:, q])[:k]] == kind).mean()))


def test_ties_across_the_border_count_by_their_share() -> None:
    # one of the two "a" is first; the other shares the second place with three of "b"
    found = retrieval(np.array([[-2.0], [-1], [-1], [-1], [-1], [0]]), KINDS, ["a"])
    assert found.recall[0] == pytest.approx((1 + 1 / 4) / 2)
    # scores that are all equal say nothing: the expectation of a random order
    assert retrieval(np.zeros((6, 2)), KINDS, ["a", "b"]).recall.tolist() == pytest.approx([2 / 6, 3 / 6])


@given(st.integers(0, 10**6))
def test_the_order_of_samples_and_queries_does_not_matter(seed: int) -> None:
    rng = np.random.default_rng(seed)
    matrix, rows, columns = rng.normal(size=(6, 3)), rng.permutation(6), rng.permutation(3)
    queries = np.array(["a", "b", "c"])
    found, moved = retrieval(matrix, KINDS, queries), retrieval(matrix[rows][:, columns], KINDS[rows], queries[columns])
    assert np.allclose(moved.auc, found.auc[columns]) and np.allclose(moved.recall, found.recall[columns])


def test_it_reads_as_a_line() -> None:
    matrix = np.where(KINDS[:, None] == np.array(["a", "b"]), -1.0, 0.0)
    assert str(retrieval(matrix, KINDS, ["a", "b"])) == "AUC 1.000 ± 0.000, recall 1.000 ± 0.000"


def test_bad_input_is_named() -> None:
    matrix = np.zeros((6, 2))
    with pytest.raises(ValueError, match=r"matrix: expected the shape \(6, 1\) of train_kinds and query_kinds, got \(6, 2\)"):
        retrieval(matrix, KINDS, ["a"])
    with pytest.raises(ValueError, match=r"matrix: expected the shape"):
        retrieval(matrix.T, KINDS, ["a", "b"])
    with pytest.raises(ValueError, match="one kind per sample"):
        retrieval(matrix, KINDS[:, None], ["a", "b"])
    with pytest.raises(ValueError, match="matrix: 1 of 12 scores are not finite"):
        retrieval(np.where(np.arange(12).reshape(6, 2) == 3, np.nan, 0), KINDS, ["a", "b"])
    with pytest.raises(ValueError, match="query_kinds: .*'d'.* has no training sample"):
        retrieval(matrix, KINDS, ["a", "d"])
    with pytest.raises(ValueError, match="query_kinds: .*'a'.* is the kind of all training samples"):
        retrieval(matrix, ["a"] * 6, ["a", "a"])
    with pytest.raises(ValueError, match="at least one training sample and one query"):
        retrieval(np.zeros((6, 0)), KINDS, [])
