"""evaluations/calibration.py: thresholds that promise a rate of false positives, raised until an attack no longer works."""

from __future__ import annotations

import numpy as np
import pytest

from cases import case
from robust_if import InnerProduct, Random, Scores, Utility, remove_above, threshold_at
from robust_if.data import concatenate
from robust_if.evaluations.calibration import calibrated, remove_until_ended, thresholds


def test_scores_are_those_of_the_training_and_of_the_clean_samples() -> None:
    c = case("mlp")
    target = Utility(c.valid)
    scores, clean = calibrated(InnerProduct(), c.task, c.train, target=target, clean=c.valid)
    for found, samples in ((scores, c.train), (clean, c.valid)):
        alone = InnerProduct().score(c.task, c.train, target=target, samples=samples)
        assert np.allclose(found.values, alone.values, rtol=1e-12) and np.array_equal(found.ids, samples.ids)


def test_ranks_of_both_are_taken_together_and_the_goal_class_comes_first() -> None:
    c = case("mlp")
    both = concatenate([c.train, c.valid]).labels.numpy()
    scores, clean = calibrated(Random(1), c.task, c.train, target=Utility(c.valid), clean=c.valid, goal_class=0)
    whole = Random(1).score(c.task, concatenate([c.train, c.valid])).put_first(both == 0).values
    assert np.array_equal(scores.values, whole[: len(c.train)]) and np.array_equal(clean.values, whole[len(c.train) :])
    labels = c.train.labels.numpy()
    assert scores.values[labels == 0].min() > scores.values[labels != 0].max()


def drawn(n: int, seed: int) -> Scores:
    return Scores(np.random.default_rng(seed).normal(size=n), np.arange(n), "any")


def test_the_promise_holds_on_average_for_clean_samples() -> None:
    shares = [(remove_above(drawn(200, seed), thresholds(drawn(60, 9000 + seed), (0.05,))[0][1]) == 0).mean() for seed in range(3000)]
    assert 0.045 < np.mean(shares) <= 0.0505


def test_rates_that_cannot_be_promised_are_left_out() -> None:
    clean = drawn(30, 1)
    assert thresholds(clean, (0.01, 0.02, 0.05, 0.1)) == [(0.05, threshold_at(clean, 0.05)), (0.1, threshold_at(clean, 0.1))]
    assert thresholds(clean, (1 / 31,)) == [(1 / 31, threshold_at(clean, 1 / 31))]
    with pytest.raises(ValueError, match="false_positives: 30 clean validation samples cannot promise a share of 0.02"):
        thresholds(clean, (0.01, 0.02))


@pytest.mark.parametrize(
    ("successes", "usual", "rate"),
    [
        ([0.01], 0.0, 0.01),
        ([0.9, 0.02], 0.0, 0.02),
        ([0.9, 0.25], 0.3, 0.02),
        ([0.9, 0.5, 0.3, 0.0], 0.1, 0.1),
        ([0.9, 0.34, 0.31, 0.3], 0.1, 0.02),
        ([0.9, 0.9, 0.9, 0.9], 0.0, 0.01),
    ],
)
def test_the_rate_rises_until_the_attack_has_ended(successes: list[float], usual: float, rate: float) -> None:
    """Down to what a model of clean data says of the inputs, or as far as it goes; and no further."""
    scores, known, left = drawn(300, 0), thresholds(drawn(200, 1)), iter(successes)
    found = remove_until_ended(scores, known, lambda _: next(left), usual=usual)
    assert (found.false_positives, found.threshold) == (rate, dict(known)[rate]) and next(left, None) is None
    assert found.success == successes[[each for each, _ in known].index(rate)]
    assert np.array_equal(found.weights == 0, scores.values > found.threshold)


def test_a_larger_rate_never_removes_more_than_half() -> None:
    scores = Scores(np.arange(10.0), np.arange(10), "any")
    found = remove_until_ended(scores, [(0.01, 7.5), (0.02, 3.5)], lambda _: 1.0)
    assert found.false_positives == 0.01 and (found.weights == 0).sum() == 2
    with pytest.raises(ValueError, match="would remove all 10 samples"):
        remove_until_ended(scores, [(0.01, -1.0)], lambda _: 1.0)
