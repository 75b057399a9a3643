"""evaluations/calibration.py: scores with a threshold that promises a rate of false positives."""

from __future__ import annotations

import numpy as np
import pytest

from cases import case
from robust_if import InnerProduct, Random, Samples, Utility
from robust_if.data import concatenate
from robust_if.evaluations.calibration import calibrated


def test_scores_are_those_of_the_training_samples_and_the_threshold_that_of_the_clean_ones() -> None:
    c = case("mlp")
    target = Utility(c.valid)
    scores, threshold = calibrated(InnerProduct(), c.task, c.train, target=target, clean=c.valid, false_positives=0.2)
    alone = InnerProduct().score(c.task, c.train, target=target)
    clean = np.sort(InnerProduct().score(c.task, c.train, target=target, samples=c.valid).values)
    assert np.allclose(scores.values, alone.values, rtol=1e-12) and np.array_equal(scores.ids, c.train.ids)
    assert threshold == pytest.approx(clean[int(np.ceil((len(clean) + 1) * 0.8)) - 1], rel=1e-12)


def test_ranks_of_both_are_taken_together_and_the_goal_class_comes_first() -> None:
    c = case("mlp")
    both = concatenate([c.train, c.valid]).labels.numpy()
    scores, threshold = calibrated(Random(1), c.task, c.train, target=Utility(c.valid), clean=c.valid, false_positives=0.2, goal_class=0)
    whole = Random(1).score(c.task, concatenate([c.train, c.valid])).put_first(both == 0).values
    assert np.array_equal(scores.values, whole[: len(c.train)]) and threshold in whole[len(c.train) :]
    labels = c.train.labels.numpy()
    assert scores.values[labels == 0].min() > scores.values[labels != 0].max()


def test_the_promise_holds_on_average_for_clean_samples() -> None:
    """Scores that say nothing: the share above the threshold is at most what was promised, over many draws."""
    c = case("mlp")
    train = Samples(tuple(part.repeat_interleave(5, 0) for part in c.train.batch(slice(None))))
    shares = []
    for seed in range(400):
        scores, threshold = calibrated(Random(seed), c.task, train, target=Utility(c.valid), clean=c.valid, false_positives=0.2)
        shares.append((scores.values > threshold).mean())
    assert 0.15 < np.mean(shares) <= 0.21


def test_too_few_clean_samples_are_refused_before_any_work() -> None:
    c = case("mlp")
    with pytest.raises(ValueError, match="false_positives: .* cannot promise a share of 0.001"):
        calibrated(None, c.task, c.train, target=Utility(c.valid), clean=c.valid, false_positives=0.001)  # type: ignore[arg-type]
