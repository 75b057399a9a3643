"""Kamiran-Calders and FairBatch-like weights: by hand, by their defining property, and on data with a gap."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression

from robust_if.fairness.baselines import CLASSES, fair_batch, kamiran_calders

# six samples: a a a a b b with labels 1 1 1 0 1 0
Y, S = np.array([1, 1, 1, 0, 1, 0]), np.array(list("aaaabb"))


def test_weights_by_hand():
    # P(a) P(1) / P(a, 1) = (4/6 · 4/6) / (3/6) and so on
    by_cell = {("a", 1): 8 / 9, ("a", 0): 4 / 3, ("b", 1): 4 / 3, ("b", 0): 2 / 3}
    np.testing.assert_allclose(kamiran_calders(Y, S), [by_cell[s, y] for s, y in zip(S, Y, strict=True)])


def test_weights_that_samples_have_count_as_copies():
    copies = np.array([2, 1, 1, 3, 1, 2])
    together = kamiran_calders(Y, S, copies)
    apart = kamiran_calders(np.repeat(Y, copies), np.repeat(S, copies))
    np.testing.assert_allclose(together, np.add.reduceat(apart, np.r_[0, np.cumsum(copies)[:-1]]))


@given(st.integers(0, 10_000), st.integers(2, 4), st.integers(2, 3))
def test_label_is_independent_of_the_group(seed, groups, classes):
    rng = np.random.default_rng(seed)
    every = np.indices((groups, classes)).reshape(2, -1)  # so that no combination is empty
    s, y = np.concatenate([every, np.stack([rng.integers(groups, size=40), rng.integers(classes, size=40) ** 2 // 2])], axis=1)
    w = kamiran_calders(y, s)
    joint = pd.Series(w).groupby([s, y]).sum().unstack().to_numpy() / w.sum()
    np.testing.assert_allclose(joint, joint.sum(1, keepdims=True) * joint.sum(0))
    np.testing.assert_allclose(joint.sum(0), pd.Series(y).value_counts(normalize=True, sort=False).sort_index())
    order = rng.permutation(len(y))
    np.testing.assert_allclose(kamiran_calders(y[order], s[order]), w[order])


def test_strings_intersections_and_empty_cells():
    features = {"sex": ["f", "f", "m", "m", "m", "f"], "race": ["x", "x", "x", "y", "y", "x"]}  # no (f, y)
    w = kamiran_calders(["no", "yes", "yes", "yes", "no", "no"], features)
    np.testing.assert_allclose(w, kamiran_calders([0, 1, 1, 1, 0, 0], ["fx", "fx", "mx", "my", "my", "fx"]))
    assert np.isfinite(w).all()
    weightless = kamiran_calders(Y, S, [1, 1, 1, 0, 1, 1])
    assert weightless[3] == 0 and np.isfinite(weightless).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((Y, S[:5]), "sensitive_features: expected one value for each of the 6 samples, got 5"),
        ((Y, ["a"] * 6), "sensitive_features: expected at least two groups"),
        ((Y, [None, *S[1:]]), "sensitive_features: 1 of 6 values"),
        ((np.array([np.nan, 1, 1, 0, 1, 0]), S), "y: 1 of 6 values"),
        ((Y / 7, S), "y: .* measurements"),
        ((Y, S, np.zeros(6)), "sample_weight: expected 6 finite numbers"),
        ((Y, S, -np.ones(6)), "sample_weight"),
        ((Y, S, np.ones(5)), r"sample_weight.*got shape \(5,\)"),
        ((Y, S, [np.nan] * 6), "sample_weight"),
    ],
)
def test_bad_input_of_reweighing(arguments, message):
    with pytest.raises(ValueError, match=message):
        kamiran_calders(*arguments)


def biased(groups: int = 2, n: int = 900) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features with the group among them, and labels that favour the later groups."""
    rng = np.random.default_rng(0)
    s = rng.integers(groups, size=n)
    x = rng.normal(size=(n, 3)) + np.c_[0.8 * s, np.zeros((n, 2))]
    return np.c_[x, np.eye(groups)[s]], (x.sum(1) + rng.logistic(size=n) > 0.8).astype(int), s


def trainer(x, y):
    return lambda w: LogisticRegression().fit(x, y, sample_weight=w).predict(x)


def gap(notion, decided, y, s):
    def spread(rows):
        return np.ptp([decided[rows & (s == group)].mean() for group in np.unique(s)])

    return max(spread(rows) for rows in {"demographic_parity": [y >= 0], "equal_opportunity": [y == 1], "equalized_odds": [y == 0, y == 1]}[notion])


@pytest.mark.parametrize("groups", [2, 3])
@pytest.mark.parametrize("notion", CLASSES)
def test_gap_falls(notion, groups):
    x, y, s = biased(groups)
    fit = trainer(x, y)
    found = fair_batch(fit, y, s, notion, steps=60, rate=0.01)
    before, after = gap(notion, fit(np.ones(len(y))), y, s), gap(notion, fit(found.weights), y, s)
    assert found.gaps[0] == pytest.approx(before) and after < 0.5 * before
    np.testing.assert_allclose(found.shares.sum(1), 1)
    for label in (0, 1):  # a class keeps its weight
        assert found.weights[y == label].sum() == pytest.approx(np.sum(y == label))
    if notion == "equal_opportunity":
        np.testing.assert_allclose(found.weights[y == 0], 1)


def test_first_step_by_hand():
    """The model accepts of a one in three positives and the negative, of b none: a gives to b among the positive."""
    decided = np.array([1, 0, 0, 1, 0, 0])
    found = fair_batch(lambda w: decided, Y, S, "equal_opportunity", steps=1, rate=0.25)
    np.testing.assert_allclose(found.shares, [[0.5, 0.5], [0.5, 0.5]])
    np.testing.assert_allclose(found.weights, [2 / 3, 2 / 3, 2 / 3, 1, 2, 1])
    found = fair_batch(lambda w: decided, Y, S, "equalized_odds", steps=1, rate=0.25)  # false positive rates differ more: 1 and 0
    np.testing.assert_allclose(found.shares, [[0.75, 0.25], [0.75, 0.25]])
    np.testing.assert_allclose(found.gaps, [1])
    found = fair_batch(lambda w: decided, Y, S, "demographic_parity", steps=1, rate=0.25)
    np.testing.assert_allclose(found.shares, [[0.75, 0.25], [0.5, 0.5]])


def test_equal_groups_stay_and_no_share_falls_below_zero():
    assert (fair_batch(lambda w: Y, Y, S, "equalized_odds", steps=3).weights == 1).all()
    found = fair_batch(lambda w: (S == "a").astype(int), Y, S, "equal_opportunity", steps=10, rate=0.3)
    np.testing.assert_allclose(found.shares[1], [0, 1], atol=1e-12)
    assert (found.weights >= 0).all()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"notion": "calibration"}, "notion: expected one of demographic_parity"),
        ({"y": Y + 1}, r"y: expected one label 0 or 1 per sample.*\[1, 2\]"),
        ({"y": np.where(Y, "yes", "no")}, "y: expected one label 0 or 1"),
        ({"y": Y[:5]}, "sensitive_features: expected one value for each of the 5 samples, got 6"),
        ({"y": np.array([0, 0, 1, 0, 0, 0])}, r"samples of label 1 in every group, but \['sensitive_feature_0=b'\]"),
        ({"sensitive_features": ["a"] * 6}, "at least two groups"),
        ({"steps": 0}, "steps, rate"),
        ({"rate": 1.0}, "steps, rate"),
        ({"fit": lambda w: np.full(6, 0.3)}, "fit: expected it to return 6 predictions 0 or 1"),
        ({"fit": lambda w: Y[:3]}, "fit: expected it to return 6"),
    ],
)
def test_bad_input_of_sampling(changed, message):
    arguments = {"fit": lambda w: Y, "y": Y, "sensitive_features": S, "notion": "equal_opportunity"} | changed
    with pytest.raises(ValueError, match=message):
        fair_batch(**arguments)
