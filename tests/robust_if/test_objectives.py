"""objectives.py: against brute force over all removals of a few samples."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.stats import spearmanr

from robust_if import Scores, remove_top
from robust_if.objectives import conflicts, fronts, harmless, pareto

NAMES = ("utility", "adversarial", "gap")


def scored(harm: np.ndarray | list[list[float]], units: str = "target", estimator: str = "ip") -> list[Scores]:
    """Scores for as many targets as ``harm (n, t)`` has columns."""
    columns = np.asarray(harm, dtype=float).T
    return [Scores(column, np.arange(len(column)), estimator, name, units) for name, column in zip(NAMES, columns, strict=False)]  # type: ignore[arg-type]


def drawn(n: int, targets: int, seed: int = 0) -> np.ndarray:
    """Heavy-tailed scores in units that differ by orders of magnitude."""
    return np.random.default_rng(seed).standard_t(3, size=(n, targets)) * 10.0 ** -np.arange(targets)


harms = arrays(float, st.tuples(st.integers(2, 12), st.integers(1, 3)), elements=st.integers(-4, 4).map(float))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("targets", [2, 3])
def test_every_choice_is_the_best_of_all_removals_for_its_mix_and_dominated_by_none(targets: int, seed: int) -> None:
    harm, k = drawn(9, targets, seed), 3
    every = np.array([harm[list(rows)].sum(0) for rows in combinations(range(9), k)])
    reach = np.sort(np.abs(harm), axis=0)[-k:].sum(0)
    choices = pareto(scored(harm), k=k)
    assert len(choices) > 1
    for choice in choices:
        mix, gain = np.array(list(choice.mix.values())), np.array(list(choice.predicted.values()))
        assert (choice.weights == 0).sum() == k and np.allclose(gain, (1 - choice.weights) @ harm)
        assert mix.sum() == pytest.approx(1) and gain / reach @ mix == pytest.approx((every / reach @ mix).max())
        assert not ((every >= gain - 1e-12).all(1) & (every > gain + 1e-9).any(1)).any()


@pytest.mark.parametrize("targets", [2, 3])
def test_corners_and_the_even_mix_are_on_the_usual_grid(targets: int) -> None:
    choices = pareto(scored(drawn(400, targets)), fraction=0.1)
    mixes = np.array([list(choice.mix.values()) for choice in choices])
    for wanted in [*np.eye(targets), np.full(targets, 1 / targets)]:
        assert np.isclose(mixes, wanted).all(1).any()
    for name, each in zip(NAMES, scored(drawn(400, targets)), strict=False):
        alone = next(choice for choice in choices if choice.mix[name] == 1)
        assert np.array_equal(alone.weights, remove_top(each, fraction=0.1))


@given(harm=harms, data=st.data())
def test_no_choice_dominates_another_and_no_two_are_the_same(harm: np.ndarray, data: st.DataObject) -> None:
    choices = pareto(scored(harm), k=data.draw(st.integers(0, len(harm))))
    gains = np.array([list(choice.predicted.values()) for choice in choices])
    assert len({choice.weights.tobytes() for choice in choices}) == len(choices) > 0
    for gain in gains:
        assert not ((gains >= gain).all(1) & (gains > gain + 1e-6).any(1)).any()


@given(harm=harms, factors=st.lists(st.integers(-30, 30), min_size=3, max_size=3))
def test_units_do_not_matter(harm: np.ndarray, factors: list[int]) -> None:
    k, scaled = len(harm) // 2, harm * 2.0 ** np.array(factors[: harm.shape[1]])
    one, other = (pareto(scored(each), k=k) for each in (harm, scaled))
    assert [choice.weights.tolist() for choice in one] == [choice.weights.tolist() for choice in other]
    assert (fronts(scored(harm)) == fronts(scored(scaled))).all()


@given(harm=harms.filter(lambda harm: len(np.unique(harm[:, 0])) == len(harm)), seed=st.integers(0, 9))
def test_the_order_of_samples_does_not_matter(harm: np.ndarray, seed: int) -> None:
    order, k = np.random.default_rng(seed).permutation(len(harm)), len(harm) // 3
    assert (fronts(scored(harm))[order] == fronts(scored(harm[order]))).all()
    assert np.allclose(conflicts(scored(harm)).correlations, conflicts(scored(harm[order])).correlations, equal_nan=True)
    alone = [pareto(scored(each), k=k, weightings=np.eye(1, each.shape[1]))[0].weights for each in (harm, harm[order])]
    assert (alone[0][order] == alone[1]).all()


@given(values=arrays(float, st.integers(1, 15), elements=st.integers(-2, 2).map(float)), data=st.data())
def test_a_single_target_is_remove_top_ties_included(values: np.ndarray, data: st.DataObject) -> None:
    k = data.draw(st.integers(0, len(values)))
    (choice,) = pareto(scored(values[:, None]), k=k)
    assert np.array_equal(choice.weights, remove_top(scored(values[:, None])[0], k=k))
    kept = harmless(scored(values[:, None]), "utility", k=k)
    assert kept.predicted["utility"] == pytest.approx(np.sort(np.maximum(values, 0))[::-1][:k].sum())


def test_rounding_makes_no_ties_of_one_target_alone() -> None:
    values = 1.9 + np.finfo(float).eps * np.random.default_rng(0).permutation(50)
    for k in range(50):
        assert np.array_equal(pareto(scored(values[:, None]), k=k)[0].weights, remove_top(scored(values[:, None])[0], k=k))


def test_ties_of_one_target_are_broken_by_the_others() -> None:
    (choice,) = pareto(scored([[1, -1], [1, 0], [1, 1], [0, 9]]), k=1, weightings=[[5, 0]])
    assert choice.weights.tolist() == [1, 1, 0, 1] and choice.removed == 1 and choice.mix == {"utility": 1, "adversarial": 0}


@pytest.mark.parametrize("seed", range(6))
def test_harmless_reaches_the_bound_of_its_dual(seed: int) -> None:
    """The programme's dual has one price; it is least where two samples tie or one is worth nothing, so all such prices are tried."""
    harm, k = drawn(12, 2, seed), 4
    a, b = harm[:, 0], harm[:, 1]
    prices = [0.0, *(-a / b), *((a[i] - a[j]) / (b[j] - b[i]) for i, j in combinations(range(12), 2))]
    bound = min(np.sort(np.maximum(a + price * b, 0))[-k:].sum() for price in prices if price >= 0)
    choice = harmless(scored(harm), "utility", k=k)
    assert choice.predicted["utility"] == pytest.approx(bound, rel=1e-4)
    assert choice.predicted["adversarial"] >= -1e-9 and choice.removed <= k + 1e-9
    assert ((choice.weights > 0) & (choice.weights < 1)).sum() <= 2 and choice.weights.min() >= 0 and choice.weights.max() <= 1
    whole = [harm[list(rows)].sum(0) for size in range(k + 1) for rows in combinations(range(12), size)]
    assert choice.predicted["utility"] >= max(gain for gain, other in whole if other >= 0) - 1e-6


def test_harmless_demands_nothing_that_is_free() -> None:
    """Where the worst samples of one target harm the others too, nothing is given up."""
    harm = drawn(50, 3)
    harm[:, 1:] = np.abs(harm[:, 1:])
    scores = scored(harm)
    assert np.array_equal(harmless(scores, "utility", k=5).weights, remove_top(scores[0], k=5))


@pytest.mark.parametrize("targets", [1, 2, 3])
def test_fronts_are_those_of_peeling_one_after_another(targets: int) -> None:
    harm = np.random.default_rng(targets).integers(0, 7, size=(120, targets)).astype(float)
    naive, left, front = np.zeros(120, dtype=int), np.arange(120), 0
    while len(left):
        dominated = np.array([any((harm[j] >= harm[i]).all() and (harm[j] > harm[i]).any() for j in left) for i in left])
        naive[left[~dominated]] = front
        left, front = left[dominated], front + 1
    assert front > 5 and (fronts(scored(harm)) == naive).all()


def test_conflicts_are_counted_sample_by_sample() -> None:
    harm = drawn(200, 3)
    harm[:20] = 0
    found = conflicts(scored(harm))
    assert found.names == NAMES and np.allclose(found.correlations, spearmanr(harm).statistic)
    for a in range(3):
        for b in range(3):
            assert found.together[a, b] == np.mean([x > 0 and y > 0 for x, y in harm[:, [a, b]]])
            assert found.against[a, b] == np.mean([x > 0 and y < 0 for x, y in harm[:, [a, b]]])
    assert np.isnan(conflicts(scored(np.stack([harm[:, 0], np.ones(200)], 1))).correlations[0, 1])


def test_the_sharpest_conflicts_harm_the_one_and_help_the_other() -> None:
    harm = np.array([[3.0, -1], [1, -9], [5, 5], [-2, -2], [-4, 4], [0, -8]])
    found = conflicts(scored(harm))
    assert found.sharpest("utility", "adversarial", 5).tolist() == [1, 0]
    assert found.sharpest("adversarial", "utility", 1).tolist() == [4]
    assert found.sharpest("utility", "utility", 3).tolist() == []


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: pareto([], k=1), "expected those of at least one target, got none"),
        (lambda s: pareto(s), "expected either k or fraction"),
        (lambda s: pareto(s, k=6), "k: expected a number from 0 to 5, got 6"),
        (lambda s: pareto(s, k=1, weightings=[[1, 2, 3]]), r"weightings: expected shape \(m, 2\), .* got \(1, 3\)"),
        (lambda s: pareto(s, k=1, weightings=[[1, -1]]), "weightings: expected finite numbers of at least 0"),
        (lambda s: pareto(s, k=1, weightings=[[0, 0]]), "weightings: expected finite numbers of at least 0"),
        (lambda s: pareto([s[0], s[0]], k=1), "expected different targets, got utility, utility"),
        (lambda s: conflicts([s[0], *scored(drawn(5, 2), estimator="fvm")[1:]]), "expected one estimator, got ip:utility .* and fvm:adversarial"),
        (lambda s: fronts([s[0], *scored(drawn(5, 2), units="rank")[1:]]), "in units 'target' and .* in units 'rank'"),
        (lambda s: fronts([s[0], *scored(drawn(4, 2))[1:]]), "are of different samples"),
        (lambda s: harmless(s, "gap", k=1), "target: expected one of utility, adversarial, got 'gap'"),
        (lambda s: conflicts(s).sharpest("utility", "loss", 1), "target: expected one of utility, adversarial, got 'loss'"),
    ],
)
def test_errors(call, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        call(scored(drawn(5, 2)))
