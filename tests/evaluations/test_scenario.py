"""scenario.py: the main job from end to end."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from robust_if import Recipe, Scores
from robust_if.attacks.labels import uniform
from robust_if.data import as_samples
from robust_if.evaluations import folder, scenario
from robust_if.evaluations.plan import Plan
from robust_if.evaluations.scenario import decide, run
from robust_if.loading import Dataset, read

FEW = Recipe(epochs=3, batch_size=32)


def scores(values: Any, **kwargs: Any) -> Scores:
    return Scores(np.asarray(values, dtype=float), np.arange(len(values)), "loss", **kwargs)


@pytest.mark.parametrize(
    ("remove", "removed", "description"),
    [
        ("0.3", [7, 8, 9], "the highest 30.0%"),
        ("0.05", [], "the highest 5.0%"),
        ("3e-1", [7, 8, 9], "the highest 30.0%"),
        ("2", [8, 9], "the highest 2"),
        ("1", [9], "the highest 1"),
        ("0", [], "the highest 0"),
        ("1.0", list(range(10)), "the highest 100.0%"),
    ],
)
def test_a_share_and_a_number_are_told_apart(remove: str, removed: list[int], description: str) -> None:
    weights, threshold, said = decide(scores(np.arange(10)), remove)
    assert np.flatnonzero(weights == 0).tolist() == removed and threshold is None and said == description


def test_auto_takes_zero_for_log_odds_and_a_mixture_for_the_rest() -> None:
    weights, threshold, said = decide(scores([-2, -1, 0, 1, 2], units="log-odds"), "auto")
    assert weights.tolist() == [1, 1, 1, 0, 0] and threshold == 0 and said == "automatic threshold"
    draw = np.random.default_rng(0)
    two = scores(np.exp(np.where(np.arange(300) < 60, draw.normal(4, 0.5, 300), draw.normal(0, 0.5, 300))))
    weights, threshold, _ = decide(two, "auto")
    assert (weights == 0).sum() == pytest.approx(60, abs=3) and threshold in two.values
    assert np.array_equal(weights == 0, two.values > threshold)


@pytest.mark.parametrize("remove", ["many", "", "-0.1", "1.1", "-3", "11", "nan", "inf", "1e400", "10%", "0,1"])
def test_anything_else_is_refused(remove: str) -> None:
    with pytest.raises(ValueError, match=r"remove: expected 'auto', a share .* got"):
        decide(scores(np.arange(10)), remove)


def files(folder: Path, n: int = 100, seed: int = 0) -> tuple[Dataset, Dataset, Dataset]:
    """Three well-separated classes with names; a fifth of the training labels wrong."""
    draw = np.random.default_rng(seed)
    names = np.array(["bird", "cat", "dog"])

    def draw_split(count: int) -> tuple[np.ndarray, np.ndarray]:
        y = np.arange(count) % 3
        return 3 * np.eye(3)[y] + draw.normal(size=(count, 3)), y

    folder.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", n), ("valid", 30), ("test", 45)):
        x, y = draw_split(count)
        given = uniform(as_samples((x, y)), 0.2, seed=0).data.labels.numpy() if split == "train" else y
        extra = {"truth": names[y]} if split == "train" else {}
        np.savez(folder / f"{split}.npz", x=x, label=names[given], id=np.array([f"{split}-{i}" for i in range(count)]), **extra)
    return read(folder / "train.npz", truth="truth"), read(folder / "valid.npz"), read(folder / "test.npz")


def plan(folder: Path, estimators: tuple[str, ...] = ("loss", "ip"), **changes: Any) -> Plan:
    given = files(folder)
    return replace(Plan(*given, estimators, remove="0.2", model="logistic-regression", recipe=FEW, repeats=1), **changes)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Suggest each sample the next class instead of tuning for it."""
    monkeypatch.setattr(scenario, "_suggest", lambda prepared, *_: (prepared.problem.train.labels.numpy() + 1) % 3)


def columns(directory: Path) -> pd.DataFrame:
    return pd.read_parquet(directory / "scores.parquet")


def test_neither_the_truth_nor_the_test_data_reach_a_score(tmp_path: Path) -> None:
    given = plan(tmp_path / "data", ("label-odds", "fvm", "ip", "loss", "knn"))
    first = run(given, tmp_path / "first")
    assert given.train.truth is not None
    shuffled = replace(given.train, truth=np.random.default_rng(1).permutation(given.train.truth))
    test = given.test.with_labels(np.roll(given.test.labels, 1))
    second = run(replace(given, train=shuffled, test=test), tmp_path / "second")
    pd.testing.assert_frame_equal(columns(tmp_path / "first"), columns(tmp_path / "second"), check_exact=True)
    assert first["removed"] == second["removed"] and first["threshold"] == second["threshold"]
    assert first["accuracy"]["before"] > 0.8 > 0.3 > second["accuracy"]["before"]
    assert first["detection"][0]["auroc"] > 0.9 and abs(second["detection"][0]["auroc"] - 0.5) < 0.25
    kept = ["id", "label", "suggested_label", "removed"]
    both = [pd.read_parquet(tmp_path / name / "samples.parquet")[kept] for name in ("first", "second")]
    pd.testing.assert_frame_equal(*both)


def test_without_a_truth_the_scores_are_the_same_and_nothing_is_judged(tmp_path: Path, quick: None) -> None:
    given = plan(tmp_path / "data")
    run(given, tmp_path / "with")
    result = run(replace(given, train=replace(given.train, truth=None)), tmp_path / "without")
    pd.testing.assert_frame_equal(columns(tmp_path / "with"), columns(tmp_path / "without"), check_exact=True)
    assert result["accuracy"]["oracle"] is None and "oracle" not in result["accuracy_runs"]
    assert result["detection"][0]["auroc"] is None
    assert "mislabelled" not in pd.read_parquet(tmp_path / "without" / "samples.parquet")


def recorded(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[np.ndarray, Any, int]]:
    """Weights, labels and seed of every training, none of which is carried out."""
    found: dict[str, tuple[np.ndarray, Any, int]] = {}

    def trained(self: Any, weights: np.ndarray, seed: int, directory: Path, progress: Any, labels: Any = None) -> Any:
        found[directory.name] = weights, labels, seed
        return self.task

    monkeypatch.setattr(scenario._Prepared, "trained", trained)
    return found


@pytest.mark.parametrize("seed", [0, 1])
def test_the_retrainings_get_the_weights_and_labels_that_their_names_say(
    tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    runs, given = recorded(monkeypatch), plan(tmp_path / "data", repeats=2, seed=seed)
    result = run(given, tmp_path / "out")
    order, wrong = columns(tmp_path / "out")["loss"].to_numpy().argsort(kind="stable")[::-1], given.train.mislabelled
    assert wrong is not None and set(runs) == {"model", *(f"{name}-{i}" for name in scenario_names() for i in range(2))}
    for name in scenario_names():
        (one, labels, first), (other, _, second) = runs[f"{name}-0"], runs[f"{name}-1"]
        assert np.array_equal(one, other) and (first, second) == (seed, seed + 1)
        assert (labels is None) == (name != "relabelled")
    assert runs["before-0"][0].all() and runs["relabelled-0"][0].all()
    removed = runs["after-0"][0] == 0
    assert set(np.flatnonzero(removed)) == set(order[:20]) and result["removed"] == 20
    assert (runs["random-0"][0] == 0).sum() == 20
    assert np.array_equal(runs["oracle-0"][0] == 0, wrong)
    codes = np.searchsorted(["bird", "cat", "dog"], given.train.labels)
    assert np.array_equal(runs["relabelled-0"][1], np.where(removed, (codes + 1) % 3, codes))


def scenario_names() -> tuple[str, ...]:
    return ("before", "after", "random", "relabelled", "oracle")


def test_the_random_control_does_not_draw_the_noise_again(tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise and control once came from the same seed, so that the control removed exactly the wrong labels."""
    runs, given = recorded(monkeypatch), plan(tmp_path / "data", seed=0)
    run(given, tmp_path / "out")
    control, wrong = runs["random-0"][0] == 0, given.train.mislabelled
    assert wrong is not None and control.sum() == wrong.sum() == 20
    assert (control & wrong).sum() <= 12


def test_the_relabelled_copy_carries_suggestions_for_removed_samples_only(tmp_path: Path, quick: None) -> None:
    given = plan(tmp_path / "data")
    result = run(given, tmp_path / "out")
    samples = pd.read_parquet(tmp_path / "out" / "samples.parquet")
    relabelled, cleaned = (read(result["files"][name], truth="truth") for name in ("relabelled", "cleaned"))
    removed = samples["removed"].to_numpy()
    assert removed.sum() == result["removed"] == 20
    assert relabelled.ids.tolist() == samples["id"].tolist()
    assert relabelled.labels.tolist() == np.where(removed, samples["suggested_label"], samples["label"]).tolist()
    assert (relabelled.labels != given.train.labels).tolist() == removed.tolist()
    assert cleaned.ids.tolist() == samples["id"][~removed].tolist() and cleaned.labels.tolist() == samples["label"][~removed].tolist()


def test_the_suggested_labels_of_a_run_without_an_opinion_are_mostly_the_true_ones(tmp_path: Path) -> None:
    given = plan(tmp_path / "data", ("loss",))
    run(given, tmp_path / "out")
    samples = pd.read_parquet(tmp_path / "out" / "samples.parquet")
    assert (samples["suggested_label"] == given.train.truth).mean() >= 0.85


def test_what_the_run_says_is_what_the_files_hold(tmp_path: Path, quick: None) -> None:
    result = run(plan(tmp_path / "data"), tmp_path / "out")
    assert result == json.loads((tmp_path / "out" / "result.json").read_text())
    assert all(Path(path).is_file() for path in result["files"].values()) and not (tmp_path / "out" / "work").exists()
    assert columns(tmp_path / "out").columns.tolist() == ["id", "loss", "ip:utility"]
    worst = json.loads((tmp_path / "out" / "worst.json").read_text())
    values = columns(tmp_path / "out").set_index("id")["loss"].sort_values(ascending=False, kind="stable")
    assert [entry["id"] for entry in worst] == values.index[: len(worst)].tolist() and len(worst) == 60
    assert worst[0]["score"] == values.iloc[0] and set(worst[0]["row"]) == {"x0", "x1", "x2"}


CHANGES: dict[str, Any] = {
    "estimators": lambda p: replace(p, estimators=("loss",)),
    "remove": lambda p: replace(p, remove="0.1"),
    "recipe": lambda p: replace(p, recipe=Recipe(epochs=4)),
    "repeats": lambda p: replace(p, repeats=2),
    "seed": lambda p: replace(p, seed=1),
    "training labels": lambda p: replace(p, train=p.train.with_labels(np.roll(p.train.labels, 1))),
    "truth": lambda p: replace(p, train=replace(p.train, truth=None)),
    "validation data": lambda p: replace(p, valid=p.valid.take(range(20))),
    "test data": lambda p: replace(p, test=p.test.take(range(20))),
    "path": lambda p: replace(p, train=replace(p.train, path=p.train.path.with_name("other.npz"))),
}


def test_the_same_plan_returns_at_once_and_another_one_is_refused(tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    given, out = plan(tmp_path / "data"), tmp_path / "out"
    result = run(given, out)
    monkeypatch.setattr(scenario, "fit", lambda *_, **__: pytest.fail("trained again"))
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert run(given, out) == result
    for name, change in CHANGES.items():
        with pytest.raises(ValueError, match=r"out: .* is not empty; choose another folder, or pass --overwrite"):
            run(change(given), out)
        assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before, name


@pytest.mark.parametrize("kind", ["valid", "test", "checkpoint"])
def test_overwriting_never_deletes_what_the_run_was_given(tmp_path: Path, kind: str) -> None:
    given, old = plan(tmp_path / "data"), tmp_path / "old"
    old.mkdir()
    (old / "manifest.json").write_text(json.dumps({folder.MARK: "x"}))
    (old / "precious").write_text("kept")
    moved = old / "precious" if kind == "checkpoint" else replace(getattr(given, kind), path=old / "precious")
    with pytest.raises(ValueError, match="out: .*old holds the data .*precious"):
        run(replace(given, **{kind: moved}), old, overwrite=True)
    assert (old / "precious").read_text() == "kept"


def test_the_folder_of_the_data_is_never_the_output(tmp_path: Path) -> None:
    given = plan(tmp_path / "data")
    (tmp_path / "data" / "manifest.json").write_text(json.dumps({folder.MARK: "x"}))
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="out: .* holds the data"):
            run(given, tmp_path / "data", overwrite=overwrite)
    assert (tmp_path / "data" / "train.npz").is_file()


@pytest.mark.parametrize("place", ["render", "_judged"])
def test_an_interruption_while_the_results_are_written_does_no_harm(tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    given = plan(tmp_path / "data")
    expected = run(given, tmp_path / "whole")

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(folder, place, interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(given, tmp_path / "out")
    monkeypatch.setattr("robust_if.training._epoch", lambda *_: pytest.fail("trained again"))
    result = run(given, tmp_path / "out")
    assert result["accuracy_runs"] == expected["accuracy_runs"] and result["removed"] == expected["removed"]
    assert Path(result["files"]["report"]).is_file() and read(result["files"]["cleaned"]).ids.tolist()


def test_the_test_data_may_not_be_training_data(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.random.default_rng(0).normal(size=(60, 3)), y=np.arange(60) % 2)
    whole = read(tmp_path / "a.npz")
    train, valid = whole.take(np.arange(40)), whole.take(np.arange(40, 60))
    with pytest.raises(ValueError, match="test: 40 samples are also in the training set"):
        run(Plan(train, valid, train, ("loss",), model="logistic-regression"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
