"""robust_if/neighbours.py: neighbours of texts; those of tables are tested with the estimators that ask for them."""

import numpy as np
import pytest

from robust_if.neighbours import nearest, word_weights


def test_texts_with_the_same_rare_words_are_neighbours() -> None:
    common = 1
    tokens = np.array([[common, 7, 8, -1], [common, 5, 6, 9], [8, 7, common, common], [common, 9, 5, -1]])
    weights = word_weights(tokens)
    assert np.allclose(np.sqrt(weights.multiply(weights).sum(1)), 1) and weights.shape == (4, 10)
    assert weights[0, common] < weights[0, 7] and weights[0, 5] == 0
    distances, found = nearest(weights, 4, 1)
    cosines = (weights @ weights.T).toarray()[np.arange(4), found[:, 0]]
    assert found[:, 0].tolist() == [2, 3, 0, 1] and distances[:, 0] == pytest.approx(np.sqrt(2 - 2 * cosines))
