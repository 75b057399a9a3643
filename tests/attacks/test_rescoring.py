"""attacks/rescoring.py: samples chosen anew by their influence while a model is trained."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

from cases import TRAIN, Case, case
from oracles import sample_gradients
from robust_if import Estimator, Recipe, Samples, Task, Utility, train
from robust_if.attacks.evasion import FGSM, PGD, Threat
from robust_if.attacks.rescoring import Rescoring, attacked, probabilities
from robust_if.attacks.robust_training import PGDTraining
from robust_if.attacks.targets import AdversarialLoss
from robust_if.estimators.base import Job, Result
from unchanged import untouched

THREAT = Threat(0.2)
RECIPE = Recipe(epochs=7, lr=0.05, batch_size=4, objective=PGDTraining(THREAT, steps=2), keep=7)


@dataclass(frozen=True)
class Given(Estimator):
    """Scores that are known: the first feature of a sample."""

    needs_target: ClassVar[bool] = True

    @property
    def name(self) -> str:
        return "given"

    def estimate(self, job: Job) -> Result:
        return Result(job.samples.batch(slice(None))[0][:, 0].double().numpy())


def rescoring(c: Case, **options: Any) -> Rescoring:
    known: dict[str, Any] = {"attack": FGSM(THREAT), "start": 1, "every": 2, "keep": 0.7}
    return Rescoring(c.train, AdversarialLoss(c.valid, PGD(THREAT, steps=3)), **{**known, **options})


def column(values: list[float]) -> tuple[Task, Samples]:
    c = case("mlp")
    x = torch.zeros(len(values), 5).double()
    x[:, 0] = torch.tensor(values)
    return c.task, Samples((x, torch.zeros(len(values)).long()))


def test_scores_are_products_of_gradients_at_attacked_points() -> None:
    c = case("mlp")
    got = rescoring(c).scores(c.task).values
    params = c.task.params()
    moved, held = (FGSM(THREAT)(c.task, params, c.train.batch(slice(None))), PGD(THREAT, steps=3)(c.task, params, c.valid.batch(slice(None))))
    grads = sample_gradients(c.task, Samples((moved, c.train.labels)))
    target = {name: value.mean(0) for name, value in sample_gradients(c.task, Samples((held, c.valid.labels))).items()}
    expected = -sum((grads[name].flatten(1) @ target[name].flatten() for name in grads), torch.zeros(TRAIN).double()) / TRAIN
    assert np.allclose(got, expected.numpy(), rtol=1e-9, atol=1e-15)
    plain = rescoring(c, attack=None).scores(c.task).values
    assert not np.allclose(got, plain, rtol=1e-3)


def test_harmful_samples_are_left_out_and_no_helpful_one() -> None:
    task, data = column([3.0, -1.0, 2.0, 0.0, 1.0, -2.0, -3.0, -4.0, -5.0, -6.0])
    target = Utility(case("mlp").valid)
    few = Rescoring(data, target, Given(), keep=0.8, start=0, every=1)(task, 0)
    assert few is not None and np.flatnonzero(few == 0).tolist() == [0, 2]
    many = Rescoring(data, target, Given(), keep=0.3, start=0, every=1)(task, 0)
    assert many is not None and np.flatnonzero(many == 0).tolist() == [0, 2, 4]  # only three are harmful
    assert set(few) == set(many) == {0.0, 1.0}


def test_learnt_samples_are_drawn_seldom_and_the_weighted_loss_stays_what_it_is_in_the_mean() -> None:
    sizes = [0.0, 0.001, 0.01, 0.1, 0.5, 1.0, -1.0, 2.0, -3.0, 10.0]
    task, data = column(sizes)
    chances = probabilities(np.abs(sizes), 0.6)
    assert chances.mean() == pytest.approx(0.6, abs=1e-9)
    assert (np.diff(chances[np.argsort(np.abs(sizes))]) >= 0).all() and chances.min() == pytest.approx(0.3) and chances.max() == 1
    inner = (chances > 0.3 + 1e-9) & (chances < 1 - 1e-9)
    ratio = chances[inner] / np.abs(sizes)[inner]
    assert inner.sum() >= 2 and np.allclose(ratio, ratio[0])
    target = Utility(case("mlp").valid)
    drawn = np.array([Rescoring(data, target, Given(), rule="learnt", keep=0.6, start=0, every=1, seed=seed)(task, 0) for seed in range(400)])
    values = np.where(drawn > 0, drawn * chances, 1)
    assert np.allclose(values, 1)  # either 0 or the inverse of the probability
    assert np.abs(drawn.mean(0) - 1).max() < 0.35 and np.abs((drawn > 0).mean(0) - chances).max() < 0.1


@pytest.mark.parametrize("sizes", [np.zeros(4), np.array([0.0, 0.0, 0.0, 1.0]), np.ones(4), np.array([1e-30, 1e30, 1.0, 2.0])])
def test_probabilities_are_defined_for_any_sizes(sizes: np.ndarray) -> None:
    found = probabilities(sizes, 0.5)
    assert ((found >= 0.25) & (found <= 1)).all() and found.mean() <= 0.5 + 1e-9


def test_random_choices_differ_by_epoch_and_seed_and_keep_the_share() -> None:
    c = case("mlp")
    choose = rescoring(c, rule="random", keep=0.5, every=1)
    drawn = [choose(c.task, 1), choose(c.task, 2), replace_seed(choose, 1)(c.task, 1), choose(c.task, 1)]
    assert all(each is not None and each.sum() == TRAIN - TRAIN // 2 for each in drawn)
    assert np.array_equal(drawn[0], drawn[3]) and not np.array_equal(drawn[0], drawn[1]) and not np.array_equal(drawn[0], drawn[2])


def replace_seed(choose: Rescoring, seed: int) -> Rescoring:
    return rescoring(case("mlp"), rule=choose.rule, keep=choose.keep, every=choose.every, seed=seed)


def test_it_chooses_in_its_epochs_alone() -> None:
    c = case("mlp")
    choose = rescoring(c, start=2, every=3)
    assert [epoch for epoch in range(10) if choose(c.task, epoch) is not None] == [2, 5, 8]


@pytest.mark.parametrize("rule", ["harmful", "learnt", "random"])
def test_a_choice_repeats_and_leaves_everything_as_it_was(rule: str) -> None:
    c = case("mlp")
    choose = rescoring(c, rule=rule)
    with untouched(c.task.model):
        first = choose(c.task, 1)
        torch.rand(3, generator=torch.Generator())
        second = choose(c.task, 1)
    assert first is not None and second is not None and np.array_equal(first, second)


@pytest.mark.parametrize("rule", ["harmful", "learnt", "random"])
@pytest.mark.parametrize("epochs", [2, 4])
def test_an_interrupted_training_makes_the_same_choices(rule: str, epochs: int, tmp_path: Path) -> None:
    c = case("mlp")

    def interrupted(items: Iterable[Any], _: str) -> Iterator[Any]:
        for position, item in enumerate(items):
            if position == epochs:
                raise KeyboardInterrupt
            yield item

    whole = train(c.task, c.train, RECIPE, reweigh=rescoring(c, rule=rule))
    plain = train(c.task, c.train, RECIPE)
    assert torch.equal(flat(whole[0].state), flat(plain[0].state)) and not torch.equal(flat(whole[-1].state), flat(plain[-1].state))
    with pytest.raises(KeyboardInterrupt):
        train(c.task, c.train, RECIPE, reweigh=rescoring(c, rule=rule), directory=tmp_path, progress=interrupted)
    torch.rand(2)
    resumed = train(c.task, c.train, RECIPE, reweigh=rescoring(c, rule=rule), directory=tmp_path)
    assert all(torch.equal(flat(a.state), flat(b.state)) for a, b in zip(whole, resumed, strict=True))


def flat(state: dict[str, Tensor]) -> Tensor:
    return torch.cat([state[name].flatten() for name in sorted(state)])


OTHERS: dict[str, dict[str, Any]] = {
    "keep": {"keep": 0.5},
    "rule": {"rule": "learnt"},
    "attack": {"attack": None},
    "seed": {"seed": 1},
    "every": {"every": 3},
}


@pytest.mark.parametrize("options", OTHERS.values(), ids=OTHERS)
def test_the_directory_of_another_choice_is_refused(options: dict[str, Any], tmp_path: Path) -> None:
    c, recipe = case("mlp"), replace(RECIPE, epochs=1, keep=1)
    train(c.task, c.train, recipe, reweigh=rescoring(c), directory=tmp_path)
    with pytest.raises(ValueError, match="belongs to another training run"):
        train(c.task, c.train, recipe, reweigh=rescoring(c, **options), directory=tmp_path)


def test_the_directory_of_other_held_out_samples_is_refused(tmp_path: Path) -> None:
    c, recipe = case("mlp"), replace(RECIPE, epochs=1, keep=1)
    train(c.task, c.train, recipe, reweigh=rescoring(c), directory=tmp_path)
    other = Rescoring(c.train, AdversarialLoss(c.valid.take(range(5)), PGD(THREAT, steps=3)), attack=FGSM(THREAT), start=1, every=2, keep=0.7)
    with pytest.raises(ValueError, match="belongs to another training run"):
        train(c.task, c.train, recipe, reweigh=other, directory=tmp_path)


def test_attacked_samples_keep_ids_and_labels_whatever_the_batch_size() -> None:
    c = case("mlp")
    data = Samples(c.train.batch(slice(None)), np.arange(TRAIN) + 100)
    one, two = (attacked(c.task, data, PGD(THREAT, steps=3), batch_size=size) for size in (3, 100))
    assert np.array_equal(one.ids, data.ids) and torch.equal(one.labels, data.labels)
    moved = one.batch(slice(None))[0]
    assert torch.allclose(moved, two.batch(slice(None))[0], rtol=0, atol=1e-12)
    assert not torch.equal(moved, data.batch(slice(None))[0]) and ((moved - data.batch(slice(None))[0]).abs() <= 0.2 + 1e-12).all()


def test_mislabelled_samples_are_what_harms_robustness() -> None:
    """Two clouds, a tenth of the labels flipped: what is left out of adversarial training is mostly these."""
    rng = np.random.default_rng(0)
    y = np.arange(200) % 2
    x = rng.normal(size=(200, 5)) + 1.5 * (2 * y[:, None] - 1)
    wrong = np.arange(200) % 10 == 3
    data, valid = (
        Samples((torch.from_numpy(x), torch.from_numpy(np.where(wrong, 1 - y, y)))),
        Samples((torch.from_numpy(x[:60] + 0.1), torch.from_numpy(y[:60]))),
    )
    task = Task(torch.nn.Linear(5, 2).double().eval())
    trained = task.at(train(task, data, replace(RECIPE, epochs=3, keep=1))[-1].state)
    choose = Rescoring(data, AdversarialLoss(valid, PGD(THREAT)), attack=FGSM(THREAT), keep=0.9, start=0)
    weights = choose(trained, 0)
    assert weights is not None and wrong[weights == 0].mean() > 0.8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "helpful"}, "rule: expected one of harmful, learnt, random, got 'helpful'"),
        ({"keep": 0.0}, "keep: expected a share above 0 and up to 1, got 0.0"),
        ({"keep": 1.1}, "keep: expected a share above 0"),
        ({"every": 0}, "every: expected at least 1, got 0"),
        ({"start": -1}, "start: expected at least 0, got -1"),
    ],
)
def test_a_setting_out_of_range_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rescoring(case("mlp"), **options)
