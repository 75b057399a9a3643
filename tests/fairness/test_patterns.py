"""Patterns against dense algebra and Newton refits, on subgroups that were planted."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import robust_if as rif
from robust_if.fairness.effects import LogisticEffects, SummedScores
from robust_if.fairness.lattice import search
from robust_if.fairness.learners import Network
from robust_if.fairness.logistic import FittedLogistic, Logistic
from robust_if.fairness.patterns import as_frame, collect_more, find_patterns
from robust_if.fairness.predicates import Predicate, as_table, in_words, predicates_of
from robust_if.fairness.targets import FairnessGap, fairness_gap
from robust_if.fairness.tree import tree_summary


def draw(n: int, rng: np.random.Generator) -> tuple[pd.DataFrame, np.ndarray, np.ndarray]:
    """Readable rows, features and fair labels."""
    table = pd.DataFrame({
        "sex": rng.choice(["Female", "Male"], n),
        "hours": rng.integers(10, 60, n),
        "job": rng.choice(["clerk", "cook", "driver"], n, p=[0.5, 0.4, 0.1]),
    })  # fmt: skip
    x = np.column_stack([table["sex"] == "Male", (table["hours"] - 35) / 15, *(table["job"] == job for job in ("clerk", "cook", "driver"))]).astype(
        float
    )
    y = (x[:, 1] + 0.5 * x[:, 3] + rng.logistic(size=n) > 0).astype(np.int64)
    return table, x, y


@cache
def planted(helpful: bool = False) -> tuple[Logistic, FairnessGap, pd.DataFrame, np.ndarray]:
    """Women below 22 hours are labelled 0 (harmful), or most women are but those from one source, which the model does not see (helpful)."""
    rng = np.random.default_rng(0)
    table, x, y = draw(1200, rng)
    women = (table["sex"] == "Female").to_numpy()
    if helpful:
        table["source"] = rng.choice(["bank", "post"], len(y), p=[0.2, 0.8])
        mask = women & (table["source"] == "bank").to_numpy()
        y[women] = mask[women]
        table = table[["sex", "source"]]
    else:
        mask = women & (table["hours"] < 22).to_numpy()
        x[mask, 1] += 2  # they do not look like the few hours that they are
        y[mask] = 0
        table = table[["sex", "hours"]]
    _, xv, yv = draw(800, rng)
    target = fairness_gap("demographic_parity", (xv, yv), np.where(xv[:, 0] == 1, "Male", "Female"))
    return Logistic(x, y, l2=1.0), target, table, mask


@pytest.fixture(scope="module")
def fitted() -> FittedLogistic:
    rng = np.random.default_rng(1)
    x = rng.normal(size=(80, 4))
    y = (x @ [1, -1, 0.5, 0] + rng.logistic(size=80) > 0).astype(int)
    return Logistic(x, y, l2=3.0).fit(rng.uniform(0.5, 1.5, 80))


@pytest.fixture(scope="module")
def target() -> rif.Target:
    rng = np.random.default_rng(2)
    x = rng.normal(size=(60, 4))
    return fairness_gap("demographic_parity", (x, (x[:, 0] > 0).astype(int)), rng.integers(2, size=60))


def groups(n: int, count: int = 6) -> np.ndarray:
    rng = np.random.default_rng(3)
    return rng.random((count, n)) < rng.uniform(0.05, 0.3, (count, 1))


@pytest.mark.parametrize("change", [-1, 1])
def test_the_second_order_is_the_expansion_written_out_densely(fitted: FittedLogistic, target: rif.Target, change: int) -> None:
    x, w, p = fitted.learner.design, fitted.weights, fitted.probabilities
    slope, whole = fitted.gradients([target])[:, 0], fitted.curvature
    data = (x * (w * p * (1 - p))[:, None]).T @ x
    masks = groups(len(x))
    expected = []
    for u in masks:
        gradient = ((w * (p - fitted.labels))[u, None] * x[u]).sum(0)
        own = (x[u] * (w * p * (1 - p))[u, None]).T @ x[u]
        share = w[u].sum() / w.sum()
        inverse = np.linalg.inv(whole + change * share * data)
        step = -change * inverse @ gradient + inverse @ (own - share * data) @ inverse @ gradient
        expected.append(-slope @ step)
    np.testing.assert_allclose(LogisticEffects(fitted, target, change).second_order(masks), expected, rtol=1e-9)


def test_without_penalty_it_is_that_of_basu_et_al(target: rif.Target) -> None:
    rng = np.random.default_rng(1)
    x = rng.normal(size=(80, 4))
    fitted = Logistic(x, (x[:, 0] + rng.logistic(size=80) > 0).astype(int), l2=1e-9).fit()
    x, p = fitted.learner.design, fitted.probabilities
    (u,) = groups(len(x), 1)
    share, gradient, inverse = u.mean(), ((p - fitted.labels)[u, None] * x[u]).sum(0), np.linalg.inv(fitted.curvature)
    own = (x[u] * (p * (1 - p))[u, None]).T @ x[u]
    step = (1 - 2 * share) / (1 - share) ** 2 * inverse @ gradient + inverse @ own @ inverse @ gradient / (1 - share) ** 2
    effect = LogisticEffects(fitted, target).second_order(u[None])
    np.testing.assert_allclose(effect, -fitted.gradients([target])[:, 0] @ step, rtol=1e-6)


@pytest.mark.parametrize("change", [-1, 1])
def test_effects_come_near_those_of_fitting_again(fitted: FittedLogistic, target: FairnessGap, change: int) -> None:
    masks = groups(len(fitted.labels), 12)
    linear = fairness_gap("covariance", target.data.batch(slice(None))[:2], target.data.batch(slice(None))[2].numpy())
    errors = {}
    for each in (target, linear):
        effects = LogisticEffects(fitted, each, change)
        (before,) = fitted.values([each])
        exact = np.array([before - fitted.learner.fit(np.where(u, 1 + change, 1) * fitted.weights).values([each])[0] for u in masks])
        first = -change * masks @ (fitted.weights * fitted.scores([each])[:, 0])
        errors[each.notion] = [
            np.abs(found - exact).max() / np.abs(exact).max() for found in (effects.few(masks), effects.second_order(masks), first)
        ]
    assert errors["demographic_parity"][0] < 0.05 < 0.2 < errors["demographic_parity"][2]
    newton, second, first = errors["covariance"]
    assert max(newton, second) < 0.5 * first


def test_effects_do_not_depend_on_how_many_groups_are_asked_for(fitted: FittedLogistic, target: rif.Target, monkeypatch: pytest.MonkeyPatch) -> None:
    effects, masks = LogisticEffects(fitted, target), groups(len(fitted.labels))
    whole = effects.many(masks)
    monkeypatch.setattr("robust_if.fairness.effects.BLOCK", 100)
    np.testing.assert_allclose(effects.many(masks), whole, rtol=1e-12)
    assert effects.many(masks[:0]).shape == (0,)


def test_sums_of_scores() -> None:
    scores, masks = np.array([1.0, -2, 3]), np.array([[True, True, False], [False, False, True]])
    np.testing.assert_array_equal(SummedScores(scores).many(masks), [-1, 3])
    np.testing.assert_array_equal(SummedScores(scores, 1).few(masks), [1, -3])


def test_predicates_in_words_and_masks() -> None:
    table = as_table({"sex": ["F", "M", None, "F"], "hours": [10.0, 20, np.nan, 40]}, 4)
    found, masks = predicates_of(table, edges={"hours": [20]})
    rows = {each.words: mask.tolist() for each, mask in zip(found, masks, strict=True)}
    assert rows == {
        "sex = F": [True, False, False, True], "sex = M": [False, True, False, False], "sex missing": [False, False, True, False],
        "hours ≥ 20": [False, True, False, True], "hours < 20": [True, False, False, False], "hours missing": [False, False, True, False],
    }  # fmt: skip
    for each in found:
        if each.relation in ("=", "missing"):
            np.testing.assert_array_equal(each.negated.holds(table), ~each.holds(table))
    assert Predicate("hours", "≥", 20.0).negated.words == "hours < 20"


def test_bounds_of_a_column_are_put_together() -> None:
    parts = [Predicate("hours", "<", 40.0), Predicate("sex", "=", "F"), Predicate("hours", "≥", 20.0), Predicate("hours", "<", 35.0)]
    assert in_words(parts) == "20 ≤ hours < 35 and sex = F"
    assert in_words([]) == "all"


def test_quantiles_are_values_that_occur_and_rare_predicates_are_left_out() -> None:
    table = as_table({"n": np.arange(100), "kind": ["a"] * 97 + ["b"] * 3}, 100)
    found, masks = predicates_of(table, smallest=5, bins=4)
    assert [each.words for each in found] == ["n ≥ 25", "n < 25", "n ≥ 50", "n < 50", "n ≥ 75", "n < 75", "kind = a"]
    assert masks.sum(1).tolist() == [75, 25, 50, 50, 25, 75, 97]


def by_hand(masks: np.ndarray, values: np.ndarray, smallest: int, depth: int) -> dict[tuple[int, ...], int]:
    """Every conjunction of enough samples that is narrower than all those with one predicate less."""
    from itertools import combinations

    found = {}
    for length in range(1, depth + 1):
        for members in combinations(range(len(masks)), length):
            size = masks[list(members)].all(0).sum()
            shorter = [masks[list(part)].all(0).sum() for part in combinations(members, length - 1)] if length > 1 else [len(values) + 1]
            if size >= smallest and size < min(shorter):
                found[members] = size
    return found


def test_without_pruning_the_lattice_is_complete() -> None:
    rng = np.random.default_rng(0)
    masks, values = rng.random((6, 60)) < 0.6, rng.normal(size=60)
    levels = search(masks, lambda m: m @ values, smallest=5, largest=30, depth=3, beam=1000, prune=False)
    found = {tuple(row): mask.sum() for level in levels for row, mask in zip(level.members.tolist(), level.masks, strict=True)}
    assert found == by_hand(masks, values, 5, 3)
    for level in levels:
        np.testing.assert_allclose(level.effects, level.masks @ values)
        for row, mask in zip(level.members, level.masks, strict=True):
            np.testing.assert_array_equal(mask, masks[row].all(0))


def test_a_pruned_lattice_keeps_what_beats_its_parents_or_is_too_large() -> None:
    rng = np.random.default_rng(0)
    masks, values = rng.random((6, 60)) < 0.6, rng.normal(size=60)
    first, second = search(masks, lambda m: m @ values, smallest=5, largest=20, depth=2, beam=1000)
    kept = set(map(tuple, second.members.tolist()))
    assert 0 < len(kept) < 15
    for a in range(6):
        for b in range(a + 1, 6):
            both = masks[a] & masks[b]
            beats = both @ values / both.sum() > max(first.interest[a], first.interest[b])
            assert ((a, b) in kept) == (beats or both.sum() > 20)


def test_a_beam_that_bites_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    masks = np.random.default_rng(0).random((6, 60)) < 0.6
    search(masks, lambda m: m.sum(1).astype(float), smallest=5, largest=30, depth=2, beam=3)
    assert "the best 3 are extended" in caplog.text


def test_a_planted_harmful_subgroup_is_found_first_and_verified() -> None:
    learner, target, table, mask = planted()
    best, *rest = find_patterns(learner, target, table, edges={"hours": [22, 40]}, valid=target.data, others=[rif.Utility(target.data)])
    assert best.words in ("sex = Female and hours < 22", "hours < 22 and sex = Female")
    np.testing.assert_array_equal(best.mask, mask)
    assert best.n == mask.sum() and best.support == pytest.approx(mask.mean())
    (before,) = learner.fit().values([target])
    (after,) = learner.fit(1.0 - mask).values([target])
    assert best.verified == pytest.approx((before - after) / before, abs=1e-6)
    assert best.predicted == pytest.approx(best.verified, abs=0.05) and best.verified > 0.5 > best.random
    assert best.metrics["accuracy"][1] > best.metrics["accuracy"][0] and set(best.metrics) == {"accuracy", "utility"}
    for one in (best, *rest):
        for other in (best, *rest):
            assert one is other or (one.mask & other.mask).sum() / min(one.n, other.n) < 0.2
    assert as_frame([best, *rest])["verified"].notna().all()


def test_ranked_by_share_the_first_explains_most() -> None:
    learner, target, table, _ = planted()
    found = find_patterns(learner, target, table, rank="share", support=(0.02, 0.6), verify=False)
    assert found[0].predicted == max(each.predicted for each in found) and found[0].verified is None


def test_a_planted_helpful_subgroup_is_to_be_collected() -> None:
    learner, target, table, mask = planted(helpful=True)
    best = collect_more(learner, target, table, support=(0.02, 0.3), top=2)[0]
    np.testing.assert_array_equal(best.mask, mask)
    assert best.words == "sex = Female and source = bank"
    (before,) = learner.fit().values([target])
    assert best.verified == pytest.approx(1 - learner.fit(1.0 + mask).values([target])[0] / before, abs=1e-6)
    assert best.predicted == pytest.approx(best.verified, abs=0.1)


def test_the_order_of_the_samples_does_not_matter() -> None:
    learner, target, table, _ = planted()
    order = np.random.default_rng(0).permutation(len(table))
    found = find_patterns(learner, target, table, verify=False)
    others = find_patterns(Logistic(learner.x[order], learner.y[order], learner.l2), target, table.iloc[order], verify=False)
    assert [each.words for each in found] == [each.words for each in others]
    np.testing.assert_allclose([each.predicted for each in found], [each.predicted for each in others], rtol=1e-6)


def test_a_gap_that_would_open_on_the_other_side_counts_less_than_one_that_closes() -> None:
    learner, target, table, _ = planted()
    (before,) = learner.fit().values([target])
    lone = SummedScores(np.where(table["sex"] == "Female", before / 100, 0.0))
    found = find_patterns(learner, target, table, effects=lone, support=(0.01, 0.9), rank="share", overlap=1.0, bins=10, verify=False)
    assert 0.9 < found[0].predicted <= 1 + 1e-12 and 90 <= (found[0].mask & (table["sex"] == "Female")).sum() <= 110
    assert all(each.random <= 1 + 1e-12 for each in found)


def test_a_pattern_that_empties_a_feature_says_so_and_is_predicted_safely() -> None:
    rng = np.random.default_rng(4)
    table, x, y = draw(600, rng)
    y[table["job"] == "driver"] = 1
    _, xv, _ = draw(600, rng)
    xv[xv[:, 0] == 0, 4] = 0  # women who drive are among the training samples only
    target = fairness_gap("demographic_parity", (xv, (xv[:, 1] > 0).astype(int)), xv[:, 0].astype(int))
    learner = Logistic(x, y, l2=0.1)
    names = ["male", "hours", "clerk", "cook", "driver"]
    found = find_patterns(learner, target, table, features=names, top=10, overlap=0.9, support=(0.03, 0.3))
    drivers = next(each for each in found if each.words == "job = driver")
    assert drivers.empties == ("driver",)
    assert all(each.empties == () for each in found if (each.mask & (table["job"] == "driver")).sum() < 0.5 * drivers.n)
    assert drivers.predicted == pytest.approx(drivers.verified, abs=0.05)
    effects = LogisticEffects(learner.fit(), target)
    assert effects.many(drivers.mask[None]) == pytest.approx(effects.few(drivers.mask[None]))


def test_patterns_leave_out_samples_without_weight_and_never_a_whole_class() -> None:
    learner, target, table, mask = planted()
    weights = np.where(np.arange(len(mask)) % 5 == 0, 0.0, 1.0)
    found = find_patterns(learner, target, table.assign(label=learner.y), fitted=learner.fit(weights), verify=False, support=(0.05, 0.9))
    assert found
    for each in found:
        assert not each.mask[weights == 0].any()
        assert len(np.unique(learner.y[(weights > 0) & ~each.mask])) == 2


def test_other_models_are_searched_by_sums_of_scores() -> None:
    learner, target, table, mask = planted()
    x, y = learner.x, learner.y
    task = rif.Task(torch.nn.Linear(x.shape[1], 2).double().eval())
    recipe = rif.Recipe(epochs=15, lr=0.05, optimizer="adamw", weight_decay=0.0, batch_size=100)
    network = Network(task, rif.Samples((torch.from_numpy(x), torch.from_numpy(y))), recipe, rif.InnerProduct(rif.Exact(damping=1e-3)))
    best = find_patterns(network, target, table, edges={"hours": [22, 40]}, top=1, valid=target.data)[0]
    np.testing.assert_array_equal(best.mask, mask)
    assert best.verified is not None and best.verified > 0.3 and best.predicted > 0.3
    ranks = find_patterns(replace(network, estimator=rif.InnerProduct()), target, table, edges={"hours": [22, 40]}, top=1)[0]
    assert np.isnan(ranks.predicted) and np.isnan(ranks.random) and ranks.verified is not None


def test_tree_finds_the_same_kind_in_words() -> None:
    learner, target, table, _ = planted()
    summary = tree_summary(learner.fit().scores([target])[:, 0], table, depth=3)
    worst = summary.leaves[0]
    assert "sex = Female" in worst.words or "sex ≠ Male" in worst.words
    assert sum(leaf.n for leaf in summary.leaves) == len(table) and sum(leaf.harm for leaf in summary.leaves) == pytest.approx(1)
    assert all(leaf.total == pytest.approx(leaf.n * leaf.mean) for leaf in summary.leaves)
    assert worst.words in str(summary) and len(summary.as_frame()) == len(summary.leaves) <= 8


def test_tree_of_planted_scores() -> None:
    table = pd.DataFrame({"age": np.arange(100), "sex": ["F", "M"] * 50})
    scores = np.where((table["age"] >= 75) & (table["sex"] == "F"), 2.0, -1.0)
    summary = tree_summary(scores, table, depth=2, bins=4)
    assert summary.r2 == pytest.approx(1) and summary.leaves[0].words == "age ≥ 75 and sex = F"
    assert (summary.leaves[0].n, summary.leaves[0].mean, summary.leaves[0].harm) == (12, 2.0, 1.0)
    constant = tree_summary(np.zeros(100), table)
    assert [leaf.words for leaf in constant.leaves] == ["all"] and constant.leaves[0].harm == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"table": {"sex": ["F"] * 3}}, "table: expected one row for each of the 1200"),
        ({"support": (0.3, 0.1)}, "support: expected shares 0 < smallest < largest < 1"),
        ({"support": (0.0, 0.1)}, "support: "),
        ({"depth": 0}, "depth: expected at least 1, got 0"),
        ({"top": 0}, "top: expected at least 1, got 0"),
        ({"overlap": 0.0}, "overlap: expected a share above 0"),
        ({"rank": "size"}, "rank: expected 'interest' or 'share', got 'size'"),
        ({"action": "flip"}, "action: expected 'remove' or 'collect', got 'flip'"),
        ({"bins": 1}, "bins: expected at least 2"),
        ({"edges": {"sex": [1]}}, "edges: expected names of columns with numbers, got 'sex'"),
        ({"features": ["male"]}, "features: expected 5 names, got 1"),
    ],
)
def test_bad_input(settings: dict[str, Any], message: str) -> None:
    learner, target, table, _ = planted()
    with pytest.raises(ValueError, match=message):
        find_patterns(learner, target, **({"table": table} | settings))


def test_nothing_to_explain_and_nothing_found(fitted: FittedLogistic) -> None:
    learner, target, table, _ = planted()
    with pytest.raises(ValueError, match="expected a value to explain"):
        find_patterns(learner, 0 * target, table)
    assert find_patterns(learner, target, {"id": [str(at) for at in range(len(table))]}) == []
    with pytest.raises(ValueError, match="change: expected -1"):
        LogisticEffects(fitted, target, 2)


def test_bad_input_of_the_tree() -> None:
    with pytest.raises(ValueError, match="scores: expected"):
        tree_summary([1.0, np.nan], {"a": [1, 2]})
    with pytest.raises(ValueError, match="depth, smallest"):
        tree_summary([1.0, 2.0], {"a": [1, 2]}, depth=0)
    with pytest.raises(ValueError, match="table: expected columns of different names"):
        tree_summary([1.0, 2.0], pd.DataFrame([[1, 2], [3, 4]], columns=["a", "a"]))
