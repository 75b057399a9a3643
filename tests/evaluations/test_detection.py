"""Detection metrics against scikit-learn's."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from robust_if.evaluations.detection import detection
from robust_if.scores import Scores


def scores_of(values):
    return Scores(np.asarray(values, dtype=float), np.arange(len(values)), "any")


@settings(max_examples=200)
@given(st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=2, max_size=80).filter(lambda rows: len({bad for _, bad in rows}) == 2))
def test_area_and_average_precision_equal_those_of_scikit_learn_with_ties(rows):
    values, bad = np.array([value for value, _ in rows], dtype=float), np.array([bad for _, bad in rows])
    found = detection(scores_of(values), bad, replicates=0)
    assert found.auroc == pytest.approx(roc_auc_score(bad, values), abs=1e-12)
    assert found.average_precision == pytest.approx(average_precision_score(bad, values), abs=1e-12)
    fpr, tpr, _ = roc_curve(bad, values, drop_intermediate=False)
    assert found.tpr_at_5_fpr == pytest.approx(np.interp(0.05, fpr, tpr), abs=1e-12)


def test_a_perfect_ranking_reaches_one_everywhere_and_its_reverse_zero():
    bad = np.arange(200) < 40
    best, worst = detection(scores_of(bad), bad), detection(scores_of(~bad), bad)
    assert (best.auroc, best.average_precision, best.precision_at_k, best.tpr_at_1_fpr) == (1, 1, 1, 1)
    assert (worst.auroc, worst.precision_at_k, worst.tpr_at_1_fpr) == (0, 0, 0.0)


def test_precision_at_k_counts_the_highest_scores():
    values = np.arange(100, 0, -1.0)
    bad = np.zeros(100, dtype=bool)
    bad[[0, 1, 5, 50]] = True
    assert detection(scores_of(values), bad, k=2, replicates=0).precision_at_k == 1
    assert detection(scores_of(values), bad, replicates=0).precision_at_k == 0.5


def test_intervals_cover_the_point_shrink_with_n_and_follow_the_seed():
    rng = np.random.default_rng(0)
    widths = []
    for n in (200, 5000):
        bad = rng.uniform(size=n) < 0.3
        scores = scores_of(rng.normal(size=n) + bad)
        found = detection(scores, bad, replicates=300)
        low, high = found.intervals["auroc"]
        assert low < found.auroc < high
        assert detection(scores, bad, replicates=300).intervals == found.intervals
        widths.append(high - low)
    # the standard error of an area falls with the root of n
    assert widths[0] / widths[1] == pytest.approx(5, rel=0.4)


def test_bad_masks_are_refused():
    with pytest.raises(ValueError, match="one truth value per sample"):
        detection(scores_of([1, 2, 3]), [True, False])
    with pytest.raises(ValueError, match="both good and bad"):
        detection(scores_of([1, 2, 3]), [False] * 3)


def test_ignored_samples_count_as_neither():
    rng = np.random.default_rng(0)
    values, bad, ignore = rng.normal(size=300), rng.random(300) < 0.2, rng.random(300) < 0.3
    whole = detection(scores_of(values), bad, ignore=ignore)
    assert whole == detection(scores_of(values[~ignore]), bad[~ignore])
    fpr, tpr, _ = roc_curve(bad[~ignore], values[~ignore], drop_intermediate=False)
    assert whole.tpr_at_01_fpr == pytest.approx(np.interp(0.001, fpr, tpr), abs=1e-12)
    with pytest.raises(ValueError, match="ignore: expected one truth value per sample"):
        detection(scores_of(values), bad, ignore=ignore[:5])
