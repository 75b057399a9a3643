"""suspicion.py: triggered inputs read, encoded, split, and never training samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from backdoored import write
from robust_if.encoding import Encoder
from robust_if.evaluations.attack_files import read_inputs, with_truth
from robust_if.evaluations.plan import Suspicion
from robust_if.evaluations.suspicion import ENOUGH, Suspected
from robust_if.loading import Dataset, read


@pytest.fixture
def paths(tmp_path: Path) -> dict[str, Path]:
    return write(tmp_path)


def suspected(paths: dict[str, Path], goal: str = "bird", inputs: Dataset | None = None, seed: int = 0) -> Suspected:
    train = read(paths["train"], truth="poison")
    encoder = Encoder.fit(train)
    given = read_inputs(paths["inputs"], train) if inputs is None else inputs
    return Suspected.of(Suspicion(given, goal), encoder, encoder.samples(train), seed)


def test_the_two_halves_share_no_input_and_hold_all(paths: dict[str, Path]) -> None:
    found, other = suspected(paths), suspected(paths, seed=1)
    ids = set(found.seen.ids.tolist()), set(found.held_out.ids.tolist())
    assert not ids[0] & ids[1] and ids[0] | ids[1] == set(pd.read_csv(paths["inputs"])["id"]) and len(found.seen) == 12
    assert set(other.seen.ids.tolist()) != ids[0]
    assert found.goal == 0 and not found.shared and not found.warnings and set(found.held_out.labels.tolist()) == {1, 2}


def test_a_handful_serves_for_both_and_that_is_said(paths: dict[str, Path]) -> None:
    few = read_inputs(paths["inputs"], read(paths["train"], truth="poison")).take(range(ENOUGH - 1))
    found = suspected(paths, inputs=few)
    assert found.shared and found.seen.ids.tolist() == found.held_out.ids.tolist() == few.ids.tolist()
    assert (
        len(found.warnings) == 1 and "Only 9 attack inputs" in found.warnings[0] and "the very inputs that the scores had seen" in found.warnings[0]
    )


def test_inputs_of_the_goal_class_show_no_attack(paths: dict[str, Path]) -> None:
    train = read(paths["train"], truth="poison")
    given = read_inputs(paths["inputs"], train)
    labels = np.where(np.arange(len(given)) < 4, "bird", given.labels)
    found = suspected(paths, inputs=given.with_labels(labels))
    assert len(found.seen) + len(found.held_out) == len(given) - 4 and "4 attack inputs are truly of the goal class" in found.warnings[0]
    found = suspected(paths, inputs=given.with_labels(np.full(len(given), "bird")))
    assert len(found.seen) + len(found.held_out) == len(given) and "the attacker's label" in found.warnings[0]


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_labels_are_not_needed(paths: dict[str, Path], suffix: str) -> None:
    bare = pd.read_csv(paths["inputs"]).drop(columns="label")
    path = paths["inputs"].with_name(f"bare.{suffix}")
    bare.to_csv(path, index=False) if suffix == "csv" else bare.to_parquet(path)
    found = suspected(paths, inputs=read_inputs(path, read(paths["train"], truth="poison")))
    named = suspected(paths)
    assert found.seen.ids.tolist() == named.seen.ids.tolist() and set(found.held_out.labels.tolist()) == {-1}
    assert np.array_equal(found.seen.batch(slice(None))[0], named.seen.batch(slice(None))[0])


@pytest.mark.parametrize("shape", [(20, 4, 4), (20, 5)])
def test_archives_without_labels_are_read(tmp_path: Path, shape: tuple[int, ...]) -> None:
    draw = np.random.default_rng(0)
    name = "images" if len(shape) == 3 else "x"
    np.savez(tmp_path / "train.npz", **{name: draw.uniform(size=shape), "labels": np.arange(20) % 2})
    np.savez(tmp_path / "bare.npz", **{name: draw.uniform(size=(3, *shape[1:]))})
    train = read(tmp_path / "train.npz")
    given = read_inputs(tmp_path / "bare.npz", train)
    assert len(given) == 3 and given.labels.tolist() == [""] * 3 and given.kind == train.kind
    encoder = Encoder.fit(train)
    assert len(Suspected.of(Suspicion(given, "1"), encoder, encoder.samples(train), 0).seen) == 3


def spoil(paths: dict[str, Path], change: Any) -> None:
    change(pd.read_csv(paths["inputs"])).to_csv(paths["inputs"], index=False)


@pytest.mark.parametrize(
    ("change", "goal", "message"),
    [
        (lambda t: t, "fish", "goal-class: expected a class of the training data, bird, cat, dog, got 'fish'"),
        (lambda t: t.drop(columns="age"), "bird", "attack-inputs: features: the columns .*'age'"),
        (lambda t: t.assign(age="old"), "bird", "attack-inputs: column 'age': expected numbers"),
        (lambda t: t.assign(id="a"), "bird", "attack-inputs: ids: expected unique ids"),
        (lambda t: t.iloc[:0], "bird", "attack-inputs: .* holds no sample"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(paths: dict[str, Path], change: Any, goal: str, message: str) -> None:
    spoil(paths, change)
    with pytest.raises(ValueError, match=message):
        suspected(paths, goal)


def test_training_samples_are_no_attack_inputs(paths: dict[str, Path]) -> None:
    """Rows of a table may be alike by chance, so a few are left out; many are no chance."""
    train = pd.read_csv(paths["train"]).drop(columns="poison")
    own = train.query("label != 'bird'").assign(id=lambda t: "new-" + t["id"])
    spoil(paths, lambda t: pd.concat([t, own.iloc[:3]]))
    found = suspected(paths)
    assert len(found.seen) + len(found.held_out) == 24 and "3 attack inputs are alike with a training sample in all columns" in found.warnings[0]
    spoil(paths, lambda t: own.iloc[:20])
    with pytest.raises(ValueError, match=r"attack-inputs: 20 of 20 have the content of a training sample, first id new-(s0-\d+) that of \1"):
        suspected(paths)


def test_one_training_image_among_the_inputs_is_refused(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).uniform(size=(40, 4, 4))
    np.savez(tmp_path / "train.npz", images=pixels[:20], labels=np.arange(20) % 2)
    np.savez(tmp_path / "inputs.npz", images=pixels[19:], labels=np.zeros(21, dtype=int))
    train = read(tmp_path / "train.npz")
    encoder = Encoder.fit(train)
    with pytest.raises(ValueError, match="attack-inputs: 1 of 21 have the content of a training sample, first id 0 that of 19"):
        Suspected.of(Suspicion(read(tmp_path / "inputs.npz"), "1"), encoder, encoder.samples(train), 0)


def test_a_truth_in_a_table_of_its_own_is_matched_by_id(paths: dict[str, Path], tmp_path: Path) -> None:
    table = pd.read_csv(paths["train"])
    data = read(paths["train"], truth="poison")
    truth = table[["id"]].assign(poisoned=table["poison"]).sample(frac=1, random_state=0)
    for path, save in ((tmp_path / "t.parquet", truth.to_parquet), (tmp_path / "t.csv", truth.to_csv)):
        save(path)
        assert np.array_equal(with_truth(data, path).mislabelled, table["poison"])  # type: ignore[arg-type]
    for change, message in (
        (truth.iloc[1:], "expected the 180 of"),
        (truth.assign(poisoned=1), "needs a column id and a boolean column poisoned"),
        (truth.drop(columns="id"), "needs a column id"),
        (pd.concat([truth, truth.iloc[:1]]), "each once"),
    ):
        change.to_parquet(tmp_path / "t.parquet")
        with pytest.raises(ValueError, match=message):
            with_truth(data, tmp_path / "t.parquet")
