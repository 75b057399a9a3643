"""label_odds.py: the odds that a label is wrong, from models that never saw it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import logsumexp
from sklearn.metrics import roc_auc_score

from cases import blobs
from robust_if import Recipe, Samples, Sweep, Task, Utility, automatic_threshold, training
from robust_if.estimators import LabelOdds, label_odds
from robust_if.estimators.label_odds import estimate_noise
from robust_if.models import logistic_regression, mlp
from unchanged import untouched

FAST = Recipe(epochs=6, lr=0.05, optimizer="adamw", weight_decay=0.0, batch_size=32)
SMALL = LabelOdds(rounds=2, folds=3, neighbours=5, starts=2, recipe=FAST, start_recipe=replace(FAST, epochs=25))


def easy(n: int = 120, flipped: int = 20) -> tuple[Task, Samples, np.ndarray, Utility]:
    torch.manual_seed(0)
    data, mask = blobs(n, seed=0, flipped=flipped, distance=6)
    return Task(logistic_regression((2,), 2).double().eval()), data, mask, Utility(blobs(40, seed=1, distance=6)[0])


def three_classes() -> tuple[Task, Samples, np.ndarray, Utility]:
    draw = np.random.default_rng(3)

    def sample(n: int) -> tuple[np.ndarray, np.ndarray]:
        y = draw.integers(3, size=n)
        return 5 * np.array([[0, 0], [1, 0], [0, 1]])[y] + draw.normal(size=(n, 2)), y

    (x, y), mask = sample(120), np.arange(120) < 25
    clean = Samples(tuple(map(torch.from_numpy, sample(45))))
    noisy = Samples((torch.from_numpy(x), torch.from_numpy(np.where(mask, (y + draw.integers(1, 3, 120)) % 3, y))))
    return Task(mlp((2,), 3, width=8).double().eval()), noisy, mask, Utility(clean)


@pytest.mark.parametrize("make", [easy, three_classes])
@pytest.mark.parametrize("neighbours", [0, 5])
def test_planted_flips_are_found_and_their_true_labels_suggested(make: Any, neighbours: int) -> None:
    task, data, mask, target = make()
    got = replace(SMALL, neighbours=neighbours).score(task, data, target=target)
    assert roc_auc_score(mask, got.values) >= 0.98
    assert got.units == "log-odds" and automatic_threshold(got) == 0
    assert ((got.values > 0) == mask).mean() >= 0.93
    assert (got.suggestions[~mask] == data.labels.numpy()[~mask]).mean() >= 0.95  # type: ignore[index]
    assert (got.suggestions[mask] != data.labels.numpy()[mask]).mean() > 0.75  # type: ignore[index]


@pytest.mark.parametrize("make", [easy, three_classes])
def test_the_score_is_the_log_odds_of_the_last_joint(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    joints: list[np.ndarray] = []

    def remembered(*args: Any) -> Any:
        joint, noise = estimate_noise(*args)
        joints.append(joint)
        return joint, noise

    monkeypatch.setattr(label_odds, "estimate_noise", remembered)
    task, data, _, target = make()
    got, labels = SMALL.score(task, data, target=target), data.labels.numpy()
    assert len(joints) == 1 + SMALL.rounds
    joint = joints[-1]
    expected = [logsumexp(np.delete(row, y)) - row[y] for row, y in zip(joint, labels, strict=True)]
    assert np.allclose(got.values, expected, rtol=1e-10, atol=1e-10)
    assert got.suggestions is not None and got.suggestions.tolist() == joint.argmax(1).tolist()
    assert (got.values[got.suggestions != labels] > 0).all()
    posterior = np.exp(joint[np.arange(len(labels)), labels] - logsumexp(joint, axis=1))
    assert ((got.values > 0) == (posterior < 0.5)).all()
    if joint.shape[1] == 2:
        assert ((got.values > 0) == (got.suggestions != labels)).all()


def test_no_sample_is_judged_by_a_model_that_saw_it(monkeypatch: pytest.MonkeyPatch) -> None:
    task, data, _, target = easy()
    seen: list[set[float]] = []
    judged: list[set[float]] = []
    fit, predict = label_odds.fit, label_odds._log_probabilities

    def first(samples: Samples) -> set[float]:
        return set(samples.batch(slice(None))[0][:, 0].tolist())

    def training_on(task: Task, samples: Samples, *args: Any, **kwargs: Any) -> Any:
        seen.append(first(samples))
        return fit(task, samples, *args, **kwargs)

    def judging(task: Task, samples: Samples, batch_size: int) -> np.ndarray:
        judged.append(first(samples))
        return predict(task, samples, batch_size)

    monkeypatch.setattr(label_odds, "fit", training_on)
    monkeypatch.setattr(label_odds, "_log_probabilities", judging)
    SMALL.score(task, data, target=target)
    everything, clean, starts = first(data), first(target.data), SMALL.starts
    assert len(everything) == len(data) and len(seen) == len(judged) == starts + SMALL.rounds * SMALL.folds
    assert all(each == clean for each in seen[:starts]) and all(each == everything for each in judged[:starts])
    for trained, predicted in zip(seen[starts:], judged[starts:], strict=True):
        assert not trained & predicted and trained == (everything - predicted) | clean
    for r in range(SMALL.rounds):
        folds = judged[starts + r * SMALL.folds :][: SMALL.folds]
        assert sorted(value for fold in folds for value in fold) == sorted(everything)


def planted(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Good probabilities, labels drawn through a noise matrix, and that matrix."""
    draw = np.random.default_rng(seed)
    noise = np.array([[0.8, 0.15, 0.05], [0.05, 0.7, 0.25], [0.1, 0.0, 0.9]])
    p = draw.dirichlet([0.2] * 3, size=n) + 1e-6
    p /= p.sum(1, keepdims=True)
    true = np.array([draw.choice(3, p=row) for row in p])
    return np.log(p), np.array([draw.choice(3, p=noise[c]) for c in true]), noise


@pytest.mark.parametrize("sharpness", [0.5, 1.0, 2.0])
def test_the_noise_matrix_is_recovered_and_the_temperature_with_it(sharpness: float) -> None:
    log_p, labels, noise = planted(3000)
    joint, got = estimate_noise(sharpness * log_p, labels)
    assert np.abs(got - noise).max() <= 0.05
    assert np.allclose(got.sum(1), 1, atol=1e-12) and (got > 0).all()
    exact, _ = estimate_noise(log_p, labels)
    assert np.allclose(joint, exact, atol=1e-9)  # the exponent that undoes the sharpness is among the candidates, and the likeliest


def test_the_joint_is_the_probability_times_the_noise() -> None:
    log_p, labels, _ = planted(400)
    joint, noise = estimate_noise(log_p, labels)
    log_q = joint - np.log(noise[:, labels].T)
    assert np.allclose(logsumexp(log_q, axis=1), 0, atol=1e-9)


def test_neighbours_that_tell_nothing_get_no_weight_and_good_ones_do() -> None:
    log_p, labels, noise = planted(2000)
    alone, _ = estimate_noise(log_p, labels)
    useless = np.log(np.random.default_rng(1).dirichlet([1.0] * 3, size=len(labels)))
    assert np.abs(estimate_noise(log_p, labels, useless)[0] - alone).mean() <= 0.5
    uniform = np.full_like(log_p, -np.log(3))
    assert np.abs(estimate_noise(uniform, labels, log_p)[1] - noise).max() <= 0.06


@pytest.mark.parametrize("k", [1, 4, 50])
def test_a_sample_is_not_its_own_neighbour_not_even_among_copies(k: int) -> None:
    x = torch.cat([torch.zeros(9, 2), torch.arange(6.0)[:, None].repeat(1, 2) + 5])
    data = Samples((x, torch.zeros(15, dtype=torch.long)))
    clean = Samples((torch.zeros(3, 2), torch.tensor([0, 1, 1])))
    index = label_odds._Neighbours(data, clean, k).index
    assert index.shape == (15, min(k, 17))
    for i, row in enumerate(index):
        assert i not in row and len(set(row.tolist())) == len(row)
    everything = torch.cat([x, clean.batch(slice(None))[0]])
    for i in range(15):
        found = np.sort(np.linalg.norm((everything[index[i]] - x[i]).numpy(), axis=1))
        others = np.delete(np.arange(18), i)
        assert np.allclose(found, np.sort(np.linalg.norm((everything[others] - x[i]).numpy(), axis=1))[: len(found)], atol=1e-5)


def test_neighbours_vote_with_their_posteriors_and_clean_samples_with_their_label() -> None:
    data = Samples((torch.tensor([[0.0], [0.1], [9.0]]), torch.tensor([0, 0, 1])))
    clean = Samples((torch.tensor([[0.2], [9.1]]), torch.tensor([1, 0])))
    posterior = np.array([[0.9, 0.1], [0.6, 0.4], [0.3, 0.7]])
    got = np.exp(label_odds._Neighbours(data, clean, 2)(posterior))
    votes = np.array([posterior[1] + [0, 1], posterior[0] + [0, 1], [1, 1]]) + 0.1
    assert np.allclose(got, votes / votes.sum(1, keepdims=True))


def test_ids_follow_a_permutation_of_the_data() -> None:
    task, data, mask, target = easy()
    order = np.random.default_rng(5).permutation(len(data))
    one, other = SMALL.score(task, data, target=target), SMALL.score(task, data.take(order), target=target)
    assert other.ids.tolist() == order.tolist()
    assert roc_auc_score(mask[order], other.values) >= 0.98
    assert np.corrcoef(one.values[order], other.values)[0, 1] >= 0.9  # folds are drawn by position, so the numbers differ a little


def interrupt_in_round(name: str, after: int) -> Any:
    def progress(items: Iterable[Any], description: str) -> Iterator[Any]:
        for position, item in enumerate(items):
            if description == name and position == after:
                raise KeyboardInterrupt
            yield item

    return progress


def test_scores_repeat_and_resume_bit_identically_without_repeating_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task, data, _, target = easy()
    whole = SMALL.score(task, data, target=target)
    with pytest.raises(KeyboardInterrupt):
        SMALL.score(task, data, target=target, sweep=Sweep(directory=tmp_path, progress=interrupt_in_round("label-odds round 2", 1)))
    epochs: list[int] = []
    epoch = training._epoch
    monkeypatch.setattr(training, "_epoch", lambda *args: epochs.append(1) or epoch(*args))  # type: ignore[func-returns-value]
    resumed = SMALL.score(task, data, target=target, sweep=Sweep(directory=tmp_path))
    assert len(epochs) == 2 * FAST.epochs
    assert np.array_equal(resumed.values, whole.values) and np.array_equal(resumed.suggestions, whole.suggestions)  # type: ignore[arg-type]
    assert resumed.provenance["noise"] == whole.provenance["noise"]


def test_the_users_model_stays_as_it_is_and_its_parameters_do_not_matter() -> None:
    task, data, _, target = easy()
    with untouched(task.model):
        got = SMALL.score(task, data, target=target)
    state = {name: value + 1 for name, value in task.model.state_dict().items()}
    assert np.array_equal(got.values, SMALL.score(task.at(state), data, target=target).values)
    assert not np.array_equal(got.values, replace(SMALL, seed=1).score(task, data, target=target).values)


def test_validation_labels_are_used() -> None:
    task, data, mask, target = easy(flipped=40)
    swapped = Utility(target.data.with_labels(1 - target.data.labels))
    right, wrong = (SMALL.score(task, data, target=each).values for each in (target, swapped))
    assert roc_auc_score(mask, right) >= 0.98 and roc_auc_score(mask, wrong) < 0.5


def test_the_start_alone_is_a_score_too() -> None:
    task, data, mask, target = easy()
    assert roc_auc_score(mask, replace(SMALL, rounds=0).score(task, data, target=target).values) >= 0.98


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"folds": 1}, "folds: expected at least 2, since .*, got 1"),
        ({"starts": 0}, "starts: expected at least 1, got 0"),
        ({"rounds": -1}, "rounds: expected at least 0, got -1"),
        ({"neighbours": -1}, "neighbours: expected at least 0, got -1"),
    ],
)
def test_wrong_settings_are_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LabelOdds(**options)  # type: ignore[arg-type]


def test_a_target_is_needed() -> None:
    task, data, _, _ = easy()
    with pytest.raises(ValueError, match="target: LabelOdds needs a target"):
        SMALL.score(task, data)
