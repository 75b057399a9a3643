"""fairness/repair.py, steps.py and rounds.py: repairs of a small data set with biased labels."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import expit

from robust_if import InnerProduct, Recipe, Samples, Task, Utility
from robust_if.fairness.learners import Network
from robust_if.fairness.logistic import Logistic
from robust_if.fairness.repair import Repair, repair
from robust_if.fairness.rounds import SoftError, Validation
from robust_if.fairness.steps import ACTIONS, Effects, Terms, step
from robust_if.fairness.targets import FairnessGap, fairness_gap
from robust_if.fairness.weighting import Weighted
from robust_if.models import mlp

N, D = 600, 5


def draw(seed: int, n: int = N) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Two groups; the labels of group 0 are often negative where they should be positive, and a feature tells the groups apart."""
    random = np.random.default_rng(seed)
    s = (random.random(n) < 0.6).astype(np.int64)
    x = random.normal(size=(n, D))
    x[:, 0] += 3.0 * s
    y = (random.random(n) < expit(1.5 * x[:, 1] + x[:, 2] + s - 0.5)).astype(np.int64)
    return x, np.where((s == 0) & (random.random(n) < 0.5), 0, y), s


def learner(**settings: Any) -> Logistic:
    return Logistic(*draw(0)[:2], **{"l2": 1.0, **settings})


def gap(notion: str = "demographic_parity", seed: int = 1, features: Any = None) -> FairnessGap:
    x, y, s = draw(seed)
    return fairness_gap(notion, (torch.from_numpy(x), torch.from_numpy(y)), s if features is None else features)


def measured(found: Any, at: int = 1) -> tuple[float, float]:
    """Accuracy and demographic parity by hand."""
    x, y, s = draw(at)
    p = found.predict(x)
    return float((p == y).mean()), float(p[s == 1].mean() - p[s == 0].mean())


def merits(found: Repair, bound: float, cost: float) -> list[float]:
    first = found.rounds[0]
    names = [name for name in first.verified if " − " in name]
    touched = [np.abs(each.weights - first.weights).sum() + (each.labels != first.labels).sum() for each in found.rounds]
    worst = [max(abs(each.verified[name]) for name in names) for each in found.rounds]
    return [each.verified["utility"] + max(w - bound, 0) + cost / N * t for each, w, t in zip(found.rounds, worst, touched, strict=True)]


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("notion", ["demographic_parity", "true_positive_rate_parity", "equalized_odds"])
def test_every_action_lowers_the_gap_and_does_not_overshoot(action: Any, notion: str) -> None:
    found = repair(learner(), gap(notion), action, bound=0.02)
    contrasts = [each.name for each in gap(notion).signed()]
    before, after = ([each.hard[name] for name in contrasts] for each in (found.rounds[0], found.best))
    assert np.abs(before).max() > 0.1
    assert np.abs(after).max() < 0.6 * np.abs(before).max()
    for round_ in found.rounds:
        at = int(np.abs([round_.hard[name] for name in contrasts]).argmax())
        assert round_.hard[contrasts[at]] * before[at] > 0 or min(abs(round_.hard[contrasts[at]]), abs(before[at])) <= 0.02
    assert bool(found.unmet) == (np.abs(after).max() > 0.02)
    assert all(b <= a for a, b in pairwise(merits(found, 0.02, 0.05)))
    assert found.touched.any() and found.touched.sum() < N // 2


@pytest.mark.parametrize("action", ACTIONS)
def test_what_is_reported_is_what_a_refit_says(action: Any) -> None:
    found = repair(learner(), gap(), action, rounds=3)
    refit = learner().fit(found.weights, found.labels)
    accuracy, parity = measured(refit)
    assert abs(found.best.accuracy - accuracy) < 1e-12 and abs(found.best.hard["demographic_parity"] - parity) < 1e-12
    np.testing.assert_allclose(found.fitted.values([gap().signed()[0]]), refit.values([gap().signed()[0]]), atol=1e-6)
    assert set(found.best.verified) == set(found.best.predicted) >= {"demographic_parity", "equalized_odds", "error_rate_parity", "utility"}
    x, y, s = draw(1)
    p = found.fitted.predict(x)  # type: ignore[attr-defined]
    odds = [p[(s == 1) & (y == k)].mean() - p[(s == 0) & (y == k)].mean() for k in (0, 1)]
    assert abs(found.best.hard["equalized_odds"] - np.abs(odds).max()) < 1e-12
    assert abs(found.best.hard["true_positive_rate_parity"] - odds[1]) < 1e-12
    assert abs(found.best.hard["error_rate_parity"] - ((p != y)[s == 1].mean() - (p != y)[s == 0].mean())) < 1e-12


def test_each_action_changes_only_what_it_may() -> None:
    given = learner().y
    removed, weighed, labelled = (repair(learner(), gap(), action, rounds=4) for action in ("remove", "reweigh", "relabel"))
    assert set(np.unique(removed.weights)) == {0.0, 1.0} and (removed.labels == given).all()
    assert weighed.weights.min() >= 0 and 1 < weighed.weights.max() <= 2 and (weighed.labels == given).all()
    assert (labelled.weights == 1).all() and (labelled.labels != given).any() and set(np.unique(labelled.labels)) == {0, 1}
    assert repair(learner(), gap(), "reweigh", max_weight=1.0, rounds=4).weights.max() == 1.0
    for each in (removed, weighed, labelled):
        np.testing.assert_array_equal(each.touched, (each.weights != 1) | (each.labels != given))


def test_a_repair_helps_on_samples_that_it_has_not_seen() -> None:
    for action in ACTIONS:
        found = repair(learner(), gap(), action, bound=0.02, rounds=5)
        assert abs(measured(found.fitted, 2)[1]) < 0.6 * abs(measured(found.rounds[0].fitted, 2)[1])


@pytest.mark.parametrize("action", ACTIONS)
def test_no_more_accuracy_is_lost_than_allowed(action: Any) -> None:
    whole = repair(learner(), gap(), action, rounds=5)
    first = whole.rounds[0]
    for loss in (0.0, 0.01, 1.0):
        limited = repair(learner(), gap(), action, max_accuracy_loss=loss, rounds=8)
        assert all(first.accuracy - each.accuracy <= loss + 1e-12 for each in limited.rounds)
        # smaller steps come nearer to the limit than the rounds without one
        allowed = min(abs(each.hard["demographic_parity"]) for each in whole.rounds if each.accuracy >= first.accuracy - loss)
        reached = abs(limited.best.hard["demographic_parity"])
        assert max(reached, 0.005) <= max(allowed, 0.005) and bool(limited.unmet) == (reached > 0.005)


def test_what_accuracy_costs_is_said() -> None:
    found = repair(learner(), gap(), max_accuracy_loss=0.0, cost=5.0, rounds=4)
    assert found.unmet.startswith(
        "demographic_parity within 0.005 cannot be met at an accuracy loss of at most 0: the best found on validation data is"
    )


def test_what_cannot_be_met_is_said() -> None:
    found = repair(learner(), gap(), "remove", bound=0.0, rounds=1, budget=0.02)
    worst = abs(found.best.hard["demographic_parity"])
    assert found.unmet.endswith(f"is {worst:.4f}, from {abs(found.rounds[0].hard['demographic_parity']):.4f}")
    assert found.unmet.startswith("demographic_parity within 0 cannot be met: the best found on validation data is")


def test_a_gap_that_is_small_enough_is_left_alone() -> None:
    found = repair(learner(), gap(), bound=0.9, cost=1.0)
    assert found.unmet == "" and found.chosen == 0 and not found.touched.any()


@pytest.mark.parametrize("action", ["reweigh", "remove"])
def test_predictions_are_of_first_order(action: Any) -> None:
    """The error of a first-order prediction falls with the square of the step."""
    valid = Validation.of(learner(), [gap()], None, None)
    now = valid.look(learner().fit(), np.ones(N), learner().y)
    found = step(action, Effects.of(action, now, valid), now, valid, Terms(bound=0.0, cost=1e-4 * N), region=24.0, scale=1.0)
    assert found is not None and np.abs(found.weights - 1).sum() <= 25
    names = [*valid.contrasts, "false_positive_rate_parity", "error_rate_parity", "utility"]
    before, predicted = (np.array([each[name] for name in names]) for each in (now.verified, found.predicted))
    misses = []
    for share in (1.0, 0.25):
        after = np.array(learner().fit(1 + share * (found.weights - 1)).values([valid.targets[name] for name in names]))
        misses.append(np.abs(before + share * (predicted - before) - after))
    assert (misses[0] < 0.3 * np.abs(predicted - before) + 5e-3).all()
    assert misses[1].sum() < misses[0].sum() / 8


def test_flips_are_predicted_too() -> None:
    valid = Validation.of(learner(), [gap()], None, None)
    now = valid.look(learner().fit(), np.ones(N), learner().y)
    name = next(iter(valid.contrasts))
    found = step("relabel", Effects.of("relabel", now, valid), now, valid, Terms(bound=0.0, cost=1e-4 * N), region=15.0, scale=1.0)
    assert found is not None and (found.labels != now.labels).sum() <= 15
    after = valid.look(learner().fit(None, found.labels), found.weights, found.labels, found.predicted)
    assert 0.7 < (now.verified[name] - found.predicted[name]) / (now.verified[name] - after.verified[name]) < 1.3


def test_several_gaps_at_once() -> None:
    gaps = [gap("true_positive_rate_parity"), gap("false_positive_rate_parity")]
    found = repair(learner(), gaps, bound=0.02)
    one = repair(learner(), gap("equalized_odds"), bound=0.02)
    names = [each.signed()[0].name for each in gaps]
    before, after = ([abs(each.hard[name]) for name in names] for each in (found.rounds[0], found.best))
    assert max(after) < 0.5 * max(before)
    np.testing.assert_allclose(found.weights, one.weights, atol=1e-9)
    tight = repair(learner(), gaps, "remove", bound=0.0, rounds=1)
    assert "true_positive_rate_parity and false_positive_rate_parity within 0 cannot be met" in tight.unmet


def test_four_intersectional_groups() -> None:
    x, _, s = draw(1)
    found = repair(learner(), gap(features={"sex": s, "old": x[:, 3] > 0}), bound=0.03)
    contrasts = [name for name in found.best.hard if " − " in name]
    assert len(contrasts) == 6 and all("sex=" in name and "old=" in name for name in contrasts)
    worst = [max(abs(each.hard[name]) for name in contrasts) for each in (found.rounds[0], found.best)]
    assert worst[1] < 0.5 * worst[0]
    # the watched notions of more than two groups are the largest gaps
    assert abs(found.best.hard["demographic_parity"] - worst[1]) < 1e-12


def test_utility_alone_is_repaired_without_a_gap() -> None:
    x, y, _ = draw(1)
    target = Utility(Samples((torch.from_numpy(x), torch.from_numpy(y))))
    for action in ACTIONS:
        found = repair(learner(), (), action, utility=target)
        losses = [each.verified["utility"] for each in found.rounds]
        assert len(losses) > 1 and losses[-1] < losses[0] and found.unmet == ""
        assert set(found.best.verified) == {"utility"}


def test_a_utility_of_ones_own_is_kept_low() -> None:
    x, y, _ = draw(1)
    target = Utility(Samples((torch.from_numpy(x), torch.from_numpy(y))))
    found = repair(learner(), gap(), utility=target, rounds=2)
    np.testing.assert_allclose(
        found.rounds[0].verified["utility"], float(target.value(found.rounds[0].fitted.task, found.rounds[0].fitted.task.params()))
    )


def test_the_default_utility_is_the_soft_error_of_training_and_validation_samples() -> None:
    (x, y, _), (v, u, _) = draw(0), draw(1)
    both = SoftError(Samples((torch.from_numpy(np.concatenate([x, v])), torch.from_numpy(np.append(y, u)))))
    first = repair(learner(), gap(), rounds=1).rounds[0]
    p = expit((np.concatenate([x, v]) @ first.fitted.coef + first.fitted.intercept) / 0.5)  # type: ignore[attr-defined]
    by_hand = np.where(np.append(y, u) == 1, 1 - p, p).mean()
    assert abs(first.verified["utility"] - by_hand) < 1e-12
    np.testing.assert_allclose(float(both.value(first.fitted.task, first.fitted.task.params())), by_hand)


class Judge:
    """Decides for the true class, but for as many samples of group 1 as it was called times."""

    def __init__(self, best: int) -> None:
        self.calls: list[tuple[np.ndarray, np.ndarray]] = []
        self.best = best

    def __call__(self, weights: np.ndarray, labels: np.ndarray) -> np.ndarray:
        self.calls.append((weights, labels))
        _, _, s = draw(1)
        # parity holds at the call with number `best`, and is as wrong as can be before
        return np.ones(N, dtype=np.int64) if len(self.calls) == self.best else s


@pytest.mark.parametrize("best", [1, 2, 3])
def test_the_judge_decides_which_round_is_chosen(best: int) -> None:
    judge = Judge(best)
    found = repair(learner(), gap(), rounds=4, judge=judge)
    assert len(judge.calls) == len(found.rounds) == best  # it is fair then
    assert found.chosen == best - 1 and "cannot be met" not in found.unmet and abs(found.best.hard["demographic_parity"]) < 1e-12
    assert all(abs(each.hard["demographic_parity"] - 1) < 1e-12 for each in found.rounds[:-1])
    assert found.best.accuracy == draw(1)[1].mean()
    for round_ in found.rounds:
        assert any(np.array_equal(round_.weights, w) and np.array_equal(round_.labels, y) for w, y in judge.calls)


@pytest.mark.parametrize("action", ACTIONS)
def test_samples_may_have_weights_already(action: Any) -> None:
    base = np.random.default_rng(0).uniform(0.5, 1.5, N)
    base[:20] = 0
    found = repair(Weighted(learner(), base), gap(), action, bound=0.02)
    np.testing.assert_allclose(found.rounds[0].fitted.fitted.coef, learner().fit(base).coef)  # type: ignore[attr-defined]
    np.testing.assert_allclose(found.fitted.weights, base * found.weights)
    assert abs(found.best.hard["demographic_parity"]) < 0.6 * abs(found.rounds[0].hard["demographic_parity"])
    assert 0 < found.touched.sum() < N // 2
    assert not found.touched[:20].any()  # they have no effect


@pytest.mark.parametrize("action", ["reweigh", "remove"])
def test_a_price_is_paid_for_leaving_the_data_as_they_are(action: Any) -> None:
    valid = Validation.of(learner(), [gap()], None, None)
    now = valid.look(learner().fit(), np.ones(N), learner().y)
    assert step(action, Effects.of(action, now, valid), now, valid, Terms(bound=0.9, cost=1.0 * N), region=30.0, scale=1.0) is None


@pytest.mark.parametrize("action", ACTIONS)
def test_inner_products_repair_too(action: Any) -> None:
    found = repair(learner(estimator=InnerProduct()), gap(), action, bound=0.02)
    assert not found.fitted.calibrated
    assert abs(found.best.hard["demographic_parity"]) < 0.6 * abs(found.rounds[0].hard["demographic_parity"])


@pytest.mark.parametrize("action", ACTIONS)
def test_scores_that_only_rank_find_their_scale(action: Any) -> None:
    found = repair(learner(estimator=InnerProduct(normalise="cosine")), gap(), action, bound=0.02, rounds=3)
    values = [[each[gap().signed()[0].name] for each in (round_.predicted, round_.verified)] for round_ in found.rounds]
    promised = [(before[1] - after[0]) / (before[1] - after[1]) for before, after in pairwise(values)]
    assert len(promised) >= 2 and not 0.5 < promised[0] < 2 and all(0.7 < each < 1.4 for each in promised[1:])


@pytest.mark.parametrize("action", ACTIONS)
def test_a_repair_is_repeatable_and_does_not_depend_on_the_order_of_the_training_samples(action: Any) -> None:
    found, again = (repair(learner(), gap(), action, rounds=3) for _ in range(2))
    np.testing.assert_array_equal(found.weights, again.weights)
    np.testing.assert_array_equal(found.labels, again.labels)
    order = np.random.default_rng(3).permutation(N)
    x, y, _ = draw(0)
    other = repair(Logistic(x[order], y[order]), gap(), action, rounds=3)
    np.testing.assert_allclose(other.weights, found.weights[order], atol=1e-6)
    np.testing.assert_array_equal(other.labels, found.labels[order])


def test_the_learner_is_left_as_it_was() -> None:
    model = learner()
    before = model.x.copy(), model.y.copy()
    repair(model, gap(), "relabel", rounds=2)
    assert (model.x == before[0]).all() and (model.y == before[1]).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"action": "reward"}, "action: expected one of remove, reweigh, relabel, got 'reward'"),
        ({"bound": -0.1}, "bound, budget, rounds: expected .* got -0.1, 0.05 and 10"),
        ({"bound": float("nan")}, "bound, budget, rounds: expected"),
        ({"budget": 0.0}, "bound, budget, rounds: expected"),
        ({"budget": 1.5}, "bound, budget, rounds: expected"),
        ({"rounds": 0}, "bound, budget, rounds: expected"),
        ({"max_accuracy_loss": -0.01}, "max_accuracy_loss: expected a share from 0 to 1, got -0.01"),
        ({"max_accuracy_loss": 2}, "max_accuracy_loss: expected a share from 0 to 1, got 2"),
        ({"cost": -1.0}, "cost, max_weight: expected numbers from 0 and from 1 on, got -1.0 and 2.0"),
        ({"max_weight": 0.5}, "cost, max_weight: expected numbers from 0 and from 1 on, got 0.05 and 0.5"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        repair(learner(), gap(), **settings)


def test_validation_data_that_are_the_training_data_are_refused() -> None:
    with pytest.raises(ValueError, match="the validation data of demographic_parity are the training data"):
        repair(learner(), gap(seed=0))


def test_gaps_of_different_samples_are_refused() -> None:
    for other in (gap(seed=2), replace(gap(), data=gap().data.take(np.arange(N - 1)))):
        with pytest.raises(ValueError, match="gaps: expected all of them on the same validation samples"):
            repair(learner(), [gap(), other])


def test_neither_gap_nor_utility_is_refused() -> None:
    with pytest.raises(ValueError, match="gaps: expected at least one, or a utility on validation data, got none"):
        repair(learner(), ())


@pytest.mark.parametrize("action", ACTIONS)
def test_a_network_is_repaired(action: Any) -> None:
    found = repair(network(), gap(), action, bound=0.02, rounds=4)
    assert abs(found.best.hard["demographic_parity"]) < 0.7 * abs(found.rounds[0].hard["demographic_parity"])


def test_relabelling_chooses_among_all_classes() -> None:
    found = repair(network(classes=3), gap(), "relabel", bound=0.02, rounds=3)
    given = network(classes=3).train.batch(slice(None))[1].numpy()
    assert abs(found.best.hard["demographic_parity"]) < 0.8 * abs(found.rounds[0].hard["demographic_parity"])
    changed = found.labels != given
    assert changed.any() and len({(a, b) for a, b in zip(given[changed], found.labels[changed], strict=True)}) > 1
    assert set(np.unique(found.labels)) <= {0, 1, 2}


def network(classes: int = 2) -> Network:
    torch.manual_seed(0)
    x, y, _ = draw(0)
    y = y + (classes - 2) * ((y == 1) & (x[:, 4] > 1))
    recipe = Recipe(epochs=9, lr=0.2, batch_size=100)
    return Network(Task(mlp((D,), classes, width=8).double().eval()), Samples((torch.from_numpy(x), torch.from_numpy(y))), recipe)
