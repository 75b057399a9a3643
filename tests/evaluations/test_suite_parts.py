"""The shipped parts of suites: every one runs, none but the perfect filter looks where it must not, numbers are what they say, files parse."""

import os
import tomllib
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from robust_if.data import Samples
from robust_if.evaluations.baselines import predict
from robust_if.evaluations.suites import published
from robust_if.evaluations.suites.attacks import ATTACKS
from robust_if.evaluations.suites.data import DATA
from robust_if.evaluations.suites.defences import DEFENCES
from robust_if.evaluations.suites.files import VARIABLE, files, folder
from robust_if.evaluations.suites.metrics import HIGHER_IS_BETTER, METRICS
from robust_if.evaluations.suites.parts import Attacked, Change, Defended, Scene
from robust_if.evaluations.suites.suite import Suite, suites
from robust_if.evaluations.suites.truth import Known
from robust_if.fairness.groups import Groups
from robust_if.scores import Scores
from robust_if.task import Task

SMALL: Mapping[str, Mapping[str, Any]] = {
    "digits": {"train": 150, "valid": 60, "test": 120, "epochs": 6, "model": "mlp"},
    "two-groups": {"train": 200, "valid": 150, "test": 200},
    "breast-cancer": {},
}
#: Of every attack: the data it fits, and options that keep it short.
TRIED: Mapping[str, tuple[str, dict[str, Any]]] = {
    **{name: ("digits", {}) for name in ATTACKS if name not in published.ATTACKS},
    "none": ("digits", {"seen": 3, "size": 2}),
    "label-consistent": ("digits", {"steps": 2}),
    "gradient-matching": ("digits", {"steps": 3, "restarts": 1, "reported": True}),
    "bullseye-polytope": ("digits", {"steps": 3}),
    "feature-collision": ("digits", {"steps": 3}),
    "evasion": ("digits", {"eps": 0.05, "preset": "pgd-3", "points": 20}),
    **{name: ("two-groups", {}) for name in ("feature-trigger", "group-flips", "anchoring", "influence-flips")},
}
SHORT: Mapping[str, tuple[str, str, dict[str, Any]]] = {
    "none": ("digits", "badnets", {}),
    "random": ("digits", "badnets", {"remove": 0.2}),
    "filter": ("digits", "badnets", {"estimator": "deep-knn", "remove": 0.1}),
    "confident-learning": ("breast-cancer", "label-uniform", {"remove": 0.1}),
    "adversarial-training": ("digits", "badnets", {"method": "trades", "steps": 1, "estimator": "ip", "remove": 0.2}),
    "sam": ("digits", "badnets", {"rho": 0.05}),
    "reweighing": ("two-groups", "group-flips", {}),
    "fair-repair": ("two-groups", "group-flips", {"rounds": 2}),
    "oracle": ("digits", "badnets", {}),
}


@cache
def scene(name: str, seed: int = 0) -> Scene:
    return DATA[name](seed=seed, **SMALL[name])


@cache
def changed(data: str, attack: str, seed: int = 0) -> Change:
    return ATTACKS[attack](scene(data, seed), seed=seed, **dict(TRIED[attack][1]))


def after(change: Change) -> Attacked:
    kept: list[Task] = []

    def undefended() -> Task:
        if not kept:
            kept.append(change.scene.fitted())
        return kept[0]

    return Attacked(change.scene, change.bad, change.success, change.seen, undefended)


def same(one: Task, other: Task) -> bool:
    return all(torch.equal(value, other.model.state_dict()[name]) for name, value in one.model.state_dict().items())


@pytest.mark.parametrize("name", SMALL)
def test_a_data_set_is_three_parts_that_share_no_sample_and_repeats(name: str) -> None:
    found, again = scene(name), DATA[name](seed=0, **SMALL[name])
    for part in ("train", "valid", "test"):
        assert torch.equal(getattr(found, part).tensors[0], getattr(again, part).tensors[0])
    ids = [set(getattr(found, part).ids.tolist()) for part in ("train", "valid", "test")]
    assert not ids[0] & ids[1] and not ids[0] & ids[2] and not ids[1] & ids[2]
    assert isinstance(found, Known) and np.array_equal(found.right, found.train.labels.numpy())
    assert same(found.task, again.task) and found.recipe.seed == 0
    assert not torch.equal(found.train.tensors[0], scene(name, 1).train.tensors[0])  # type: ignore[index]
    assert all(len(groups) == len(getattr(found, part)) for part, groups in found.groups.items())


@pytest.mark.parametrize("name", TRIED)
def test_an_attack_says_what_it_changed_and_leaves_the_rest(name: str) -> None:
    data = TRIED[name][0]
    before, change = scene(data, 0), changed(data, name)
    again = ATTACKS[name](before, seed=0, **TRIED[name][1])
    assert change.bad is not None and again.bad is not None and np.array_equal(change.bad, again.bad)
    assert torch.equal(change.scene.train.tensors[0], again.scene.train.tensors[0])  # type: ignore[index]
    assert change.scene.valid is before.valid and change.scene.test is before.test
    x, y = change.scene.train.batch(slice(None))
    old, labels = before.train.batch(slice(None))
    n = len(labels)
    assert len(change.bad) == len(y) and change.bad[n:].all()
    if name not in ("tact", "adaptive-blend", "wanet", "flooded-backdoor"):  # these have covers, too
        differs = ((x[:n] != old).flatten(1).any(1) | (y[:n] != labels)).numpy()
        assert not (differs & ~change.bad[:n]).any()
        assert (differs | ~change.bad[:n]).mean() > 0.9  # a trigger may meet an input that has it already
    assert change.bad.any() != (name in ("none", "evasion"))
    if change.success is not None:
        assert 0 <= change.success(change.scene.fitted()) <= 1
    if change.seen is not None and name != "gradient-matching":
        assert set(change.seen.labels.tolist()) == {0} and len(change.seen) == {"none": 3}.get(name, 10)


def test_added_samples_have_a_group_and_a_right_label() -> None:
    change = changed("two-groups", "anchoring")
    assert isinstance(change.scene, Known)
    assert len(change.scene.right) == len(change.scene.groups["train"]) == len(change.scene.train) > 200
    added = change.scene.train.labels.numpy()[200:]
    assert np.array_equal(change.scene.right[200:], 1 - added)


@pytest.mark.parametrize("name", SHORT)
def test_a_defence_repeats_and_never_looks_at_test_samples_or_the_truth(name: str) -> None:
    data, attack, options = SHORT[name]
    if name == "confident-learning":
        pytest.importorskip("cleanlab")
    change = changed(data, attack)
    found = DEFENCES[name](after(change), seed=0, **options)
    rubbish = Samples((torch.zeros_like(change.scene.test.tensors[0]), torch.zeros(len(change.scene.test), dtype=torch.int64)))  # type: ignore[index]
    hidden = replace(change.scene, test=rubbish, right=np.zeros_like(change.scene.right))  # type: ignore[attr-defined]
    truth = change.bad if name == "oracle" else None
    blind = DEFENCES[name](after(replace(change, scene=hidden, bad=truth, success=None)), seed=0, **options)
    assert same(found.task, blind.task)
    if found.weights is not None:
        assert blind.weights is not None and np.array_equal(found.weights, blind.weights) and (found.weights >= 0).all()


def test_the_perfect_filter_removes_what_is_bad_and_asks_for_the_truth() -> None:
    change = changed("digits", "badnets")
    found = DEFENCES["oracle"](after(change), seed=0)
    assert found.weights is not None and np.array_equal(found.weights == 0, change.bad)
    with pytest.raises(ValueError, match="oracle: it needs to know which samples are bad"):
        DEFENCES["oracle"](after(replace(change, bad=None)), seed=0)
    noisy = changed("digits", "label-uniform")
    assert isinstance(noisy.scene, Known)
    assert np.array_equal(DEFENCES["oracle"](after(noisy), seed=0, action="relabel").labels, noisy.scene.right)


def test_what_a_filter_does_with_the_highest_scores() -> None:
    attacked = after(changed("digits", "label-uniform"))
    removed, weighed, relabelled = (
        DEFENCES["filter"](attacked, seed=0, estimator="loss", remove=0.2, action=action) for action in ("remove", "reweigh", "relabel")
    )
    assert removed.scores is not None and removed.weights is not None and weighed.weights is not None and relabelled.labels is not None
    top = removed.scores.order()[:30]
    assert set(np.flatnonzero(removed.weights == 0)) == set(top)
    assert np.allclose(weighed.weights[top], np.arange(30) / 30) and (np.delete(weighed.weights, top) == 1).all()
    given = attacked.scene.train.labels.numpy()
    assert set(np.flatnonzero(relabelled.labels != given)) <= set(top)
    scored = DEFENCES["filter"](attacked, seed=0, estimator="loss", remove=0.2, retrain=False)
    assert same(scored.task, attacked.undefended())


def test_labels_of_least_influence_are_suggested() -> None:
    attacked = after(changed("two-groups", "group-flips"))
    found = DEFENCES["filter"](attacked, seed=0, estimator="ip", remove=1.0, action="relabel", retrain=False)
    assert found.labels is not None and found.scores is not None
    keep = found.scores.values < 0  # of two labels the scores have opposite signs, so the less harmful one is the better one
    assert np.array_equal(found.labels == attacked.scene.train.labels.numpy(), keep)


def test_reports_are_unlearnt_and_nothing_is_done_without() -> None:
    attacked = after(changed("digits", "badnets"))
    found = DEFENCES["filter"](attacked, seed=0, estimator="poisoned", remove=0.1)
    assert found.scores is not None and found.weights is not None
    goal = attacked.scene.train.labels.numpy() == 0
    assert found.scores.values[goal].min() > found.scores.values[~goal].max()
    silent = DEFENCES["filter"](replace(attacked, seen=None), seed=0, estimator="poisoned")
    assert same(silent.task, attacked.undefended()) and "nothing was done" in silent.about["decision"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"estimator": "magic"}, "estimator: expected one of"),
        ({"action": "burn"}, "action: expected one of remove, relabel, reweigh"),
        ({"remove": 1.0}, "remove: expected some of the 150 samples to stay"),
        ({"target": "happiness"}, "target: expected 'utility', 'adversarial'"),
        ({"checkpoints": 0}, "checkpoints: expected a number from 1 on"),
    ],
)
def test_a_filter_refuses_what_makes_no_sense_before_any_training(options: dict[str, Any], message: str) -> None:
    def never() -> Task:
        raise AssertionError("trained too early")

    attacked = replace(after(changed("digits", "label-uniform")), undefended=never)
    with pytest.raises(ValueError, match=message):
        DEFENCES["filter"](attacked, seed=0, **{"estimator": "loss", "remove": 0.1, **options})


def test_metrics_are_what_direct_computation_gives() -> None:
    attacked = after(changed("two-groups", "group-flips"))
    n, bad = len(attacked.scene.train), np.asarray(attacked.bad)
    weights, values = np.ones(n), np.random.default_rng(0).normal(size=n) + bad
    weights[np.argsort(-values)[:30]] = 0
    given = attacked.scene.train.labels.numpy()
    labels = np.where(np.arange(n) < 10, 1 - given, given)
    defended = Defended(attacked.undefended(), weights, Scores(values, attacked.scene.train.ids, "drawn"), labels)
    found: dict[str, float] = {}
    for name, metric in METRICS.items():
        if name not in published.METRICS:
            found |= metric(attacked, defended, seed=0, **({"preset": "pgd-3", "points": 50} if name == "robust-accuracy" else {}))
    assert set(found) - set(HIGHER_IS_BETTER) == {"removed_share", "relabelled_share"}  # neither good nor bad in themselves
    y, decisions = attacked.scene.test.labels.numpy(), predict(defended.task, attacked.scene.test).argmax(1)
    codes = attacked.scene.groups["test"].codes
    parts = [codes == code for code in (0, 1)]
    assert found["accuracy"] == (y == decisions).mean()
    assert found["worst_class_accuracy"] == min((decisions == y)[y == label].mean() for label in (0, 1))
    assert found["worst_group_accuracy"] == min((decisions == y)[part].mean() for part in parts)
    rates = [decisions[part].mean() for part in parts]
    assert found["demographic_parity_difference"] == found["attack_success"] == pytest.approx(abs(rates[0] - rates[1]))
    chances = [decisions[part & (y == 1)].mean() for part in parts]
    assert found["equal_opportunity_difference"] == pytest.approx(abs(chances[0] - chances[1]))
    assert found["auroc"] == pytest.approx((values[bad][:, None] > values[~bad]).mean())
    gone, moved = weights == 0, np.arange(n) < 10
    assert (found["removed_share"], found["relabelled_share"]) == (gone.mean(), moved.mean())
    assert found["bad_kept"] == (~gone & ~moved)[bad].mean()
    assert found["false_positive_rate"] == gone[~bad].mean()
    assert found["worst_class_false_positive_rate"] == max(gone[~bad & (given == label)].mean() for label in (0, 1))
    right = attacked.scene.right  # type: ignore[attr-defined]
    assert found["relabel_accuracy"] == (labels == right).mean() and found["relabel_accuracy_of_bad"] == (labels == right)[bad].mean()
    assert found["robust_accuracy"] <= (y == decisions)[:50].mean()


def test_metrics_without_meaning_are_left_out() -> None:
    plain = replace(scene("digits"), threat=None)
    attacked = after(Change(plain, np.zeros(len(plain.train), dtype=bool)))
    defended = DEFENCES["none"](attacked, seed=0)
    found = {name: METRICS[name](attacked, defended, seed=0) for name in METRICS if name not in published.METRICS}
    assert {name for name, values in found.items() if values} == {"accuracy", "removed"}
    assert "bad_kept" not in found["removed"]


def test_robust_accuracy_is_that_of_the_model_that_is_judged() -> None:
    change = changed("digits", "evasion")
    attacked = after(change)
    good = attacked.undefended()
    constant = good.at({name: torch.zeros_like(value) for name, value in good.model.state_dict().items()})
    assert change.success is not None
    options: dict[str, Any] = {"seed": 0, "preset": "pgd-3", "points": 20}
    held = METRICS["robust-accuracy"](attacked, Defended(constant), **options)["robust_accuracy"]
    labels = change.scene.test.labels.numpy()[:20]
    assert held == (labels == 0).mean() and change.success(constant) == 0  # it says the first class whatever the input


def test_a_file_of_ones_own_is_a_scene(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    sex, number = rng.choice(["a", "b"], 200), rng.normal(size=200)
    truth = (number > 0).astype(int)
    label = np.where(np.arange(200) % 10 == 0, 1 - truth, truth)
    lines = [f"{s},{v:.6f},{y},{t}" for s, v, y, t in zip(sex, number, label, truth, strict=True)]
    path = tmp_path / "table.csv"
    path.write_text("\n".join(["sex,number,label,truth", *lines]))
    found = files(seed=0, train=str(path), truth="truth", sensitive="sex", model="logistic-regression", epochs=2, eps=0.1)
    assert isinstance(found, Known) and found.mislabelled is not None and found.threat is not None
    assert np.array_equal(found.mislabelled, found.right != found.train.labels.numpy()) and found.mislabelled.any()
    assert set(found.groups) == {"train", "valid", "test"} and isinstance(found.groups["train"], Groups)
    assert found.threat.mutable is not None and found.threat.mutable.sum() == 1  # the number alone
    attacked = after(ATTACKS["none"](found, seed=0))
    assert METRICS["fairness"](attacked, DEFENCES["oracle"](attacked, seed=0), seed=0)
    with pytest.raises(ValueError, match="sensitive: there is no column 'age'"):
        files(seed=0, train=str(path), sensitive="age")


def test_real_data_that_are_not_there_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    with pytest.raises(FileNotFoundError, match=f"set the environment variable {VARIABLE} to a folder that holds adult/"):
        DATA["adult"](seed=0)
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    with pytest.raises(FileNotFoundError, match="holds no folder adult"):
        folder("adult")


@pytest.mark.skipif(not os.environ.get(VARIABLE), reason=f"{VARIABLE} names no folder of real data")
@pytest.mark.parametrize("name", ["bank", "german", "cifar10"])
def test_real_data_become_scenes(name: str) -> None:
    options: dict[str, Any] = {"train": 50, "valid": 20, "test": 20, "labels": "worst"} if name == "cifar10" else {}
    found = DATA[name](seed=0, **options)
    assert isinstance(found, Known)
    if name == "cifar10":
        assert found.mislabelled is not None and np.array_equal(found.mislabelled, found.train.labels.numpy() != found.right)
    else:
        assert set(found.groups) == {"train", "valid", "test"}


@pytest.mark.parametrize("name", suites())
def test_a_shipped_suite_parses_and_has_its_references(name: str) -> None:
    text = tomllib.loads(suites()[name].read_text(encoding="utf-8"))
    suite = Suite.read(name)
    assert suite.about and suite.rows()
    if name.startswith("paper"):
        return
    parts = {role: {each["name"] for each in text[role]} for role in ("attack", "defence")}
    assert "none" in parts["attack"] and parts["defence"] >= {"none", "random", "oracle"}
    assert name == "smoke" or len(suite.seeds) >= 3


def test_every_part_takes_a_seed_and_plain_options() -> None:
    for parts in (DATA, ATTACKS, DEFENCES, METRICS):
        for name, part in parts.items():
            taken = signature(part).parameters
            assert "seed" in taken, name
            defaults = [each.default for each in taken.values() if each.default is not each.empty]
            assert all(isinstance(each, bool | int | float | str) for each in defaults), name
