"""tampering.py: poisoned copies in the format of the data, the truth about them, and triggered inputs that are never training samples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from robust_if.evaluations.named_attacks import ATTACKS, Options
from robust_if.evaluations.tampering import tamper
from robust_if.loading import Dataset, read

N = 200


def digits(folder: Path, name: str = "digits.npz", start: int = 0) -> Dataset:
    images, labels = load_digits(return_X_y=True)
    some = slice(start, start + N)
    np.savez(folder / name, images=(images[some] * 255 / 16).astype(np.uint8).reshape(-1, 8, 8), labels=labels[some])
    return read(folder / name)


def people(folder: Path) -> Dataset:
    draw = np.random.default_rng(0)
    frame = pd.DataFrame({"age": draw.integers(18, 90, N), "hours": draw.normal(40, 5, N).round(2), "sex": draw.choice(["f", "m"], N)})
    frame.assign(city=draw.choice(["Rome", "Oslo"], N), label=draw.choice(["low", "high"], N)).to_csv(folder / "people.csv", index=False)
    return read(folder / "people.csv")


def reviews(folder: Path) -> Dataset:
    frame = pd.DataFrame({"id": [f"r{i}" for i in range(N)], "text": [f"review number {i}, quite long" for i in range(N)], "label": np.arange(N) % 2})
    frame.to_csv(folder / "reviews.csv", index=False)
    return read(folder / "reviews.csv")


def pictures(folder: Path) -> Dataset:
    draw = np.random.default_rng(0)
    for i in range(40):
        place = folder / "pets" / ("cat" if i % 2 else "dog") / f"{i // 2}.{'jpg' if i % 5 == 0 else 'png'}"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 200, (6, 6, 3), dtype=np.uint8)).save(place)
    return read(folder / "pets")


def written(result: dict[str, Any], data: Dataset) -> tuple[Dataset, pd.DataFrame]:
    """The poisoned copy in the order of the truth, which names every one of its samples."""
    copy, truth = read(result["files"]["poisoned"]), pd.read_parquet(result["files"]["truth"])
    assert sorted(copy.ids.tolist()) == sorted(truth["id"].tolist()) and truth["original_id"].isin(data.ids).all()
    at = {name: i for i, name in enumerate(copy.ids.tolist())}
    copy = copy.take([at[name] for name in truth["id"]])
    assert copy.labels.tolist() == truth["label"].tolist()
    return copy, truth


def originals(data: Dataset, truth: pd.DataFrame) -> Dataset:
    at = {name: i for i, name in enumerate(data.ids.tolist())}
    return data.take([at[name] for name in truth["original_id"]])


@pytest.mark.parametrize("name", ["uniform", "pair", "targeted"])
@pytest.mark.parametrize("make", [digits, people, reviews, pictures])
def test_flips_change_labels_alone(tmp_path: Path, make: Any, name: str) -> None:
    data = make(tmp_path)
    classes = [str(each) for each in np.unique(data.labels)]
    options = Options(goal_class=classes[0], source_class=classes[1]) if name == "targeted" else Options(rate=0.1, seed=3)
    result = tamper(data, name, options, tmp_path / "out")
    copy, truth = written(result, data)
    clean = originals(data, truth)
    assert len(copy) == len(data) == result["n"] and result["poisoned"] == round((options.rate or 0.05) * len(data)) == truth["poisoned"].sum()
    np.testing.assert_array_equal(np.asarray(copy.features), np.asarray(clean.features))
    assert (truth["label"] != truth["original_label"]).tolist() == truth["poisoned"].tolist() and not truth["cover"].any()
    assert clean.labels.tolist() == truth["original_label"].tolist() and set(result["files"]) == {"poisoned", "truth", "settings"}
    if name == "targeted":
        flipped = truth[truth["poisoned"]]
        assert set(flipped["label"].astype(str)) == {classes[0]} and set(flipped["original_label"].astype(str)) == {classes[1]}


IMAGES = {
    "badnets": {"size": 2},
    "blended": {"alpha": 0.3, "trigger_seed": 5},
    "sig": {"rate": 0.5, "amplitude": 0.3, "frequency": 2.0},
    "wanet": {"strength": 0.9, "covers": 0.1},
    "tact": {"source_class": "1", "covers": 0.1},
    "adaptive-blend": {"alpha": 0.4, "covers": 0.1},
}


@pytest.mark.parametrize("name", IMAGES)
def test_backdoors_of_images_are_planted_and_shown_on_held_out_samples(tmp_path: Path, name: str) -> None:
    data = digits(tmp_path)
    result = tamper(data, name, Options(goal_class="0", **IMAGES[name]), tmp_path / "out", test_fraction=0.2)
    copy, truth = written(result, data)
    clean = originals(data, truth)
    poisoned, covers = truth["poisoned"].to_numpy(), truth["cover"].to_numpy()
    changed = (copy.features != clean.features).any((1, 2, 3))
    np.testing.assert_array_equal(changed, poisoned | covers)
    assert (copy.labels[poisoned] == 0).all() and (copy.labels[~poisoned] == clean.labels[~poisoned]).all()
    assert covers.sum() == (16 if "covers" in IMAGES[name] else 0) == result["covers"] and len(copy) == 160
    test, shown = read(result["files"]["test"]), read(result["files"]["triggered"])
    acted = test.labels == 1 if name == "tact" else test.labels != 0
    # what is held out is no training sample, and the triggered inputs are held-out ones with their true labels
    assert len(test) == 40 and not set(map(bytes, test.features)) & set(map(bytes, clean.features))
    assert shown.labels.tolist() == test.labels[acted].tolist() and len(shown) == result["triggered"]
    assert ((shown.features != test.features[acted]).any((1, 2, 3))).all()
    if name == "badnets":
        assert (shown.features[..., -2:, -2:] == 1).all() and (copy.features[poisoned][..., -2:, -2:] == 1).all()
    if name == "sig":
        assert (clean.labels[poisoned] == 0).all() and poisoned.sum() == round(0.5 * (clean.labels == 0).sum())
    with np.load(result["files"]["triggered"]) as archive:
        assert archive["images"].dtype == np.uint8 and archive["images"].shape[1:] == (8, 8)


def test_a_poisoned_folder_of_images_says_where_every_image_went(tmp_path: Path) -> None:
    data = pictures(tmp_path)
    result = tamper(data, "badnets", Options("cat", rate=0.2, size=1), tmp_path / "out", test_fraction=0.25)
    copy, truth = written(result, data)
    clean = originals(data, truth)
    changed = (copy.features != clean.features).any((1, 2, 3))
    np.testing.assert_array_equal(changed, truth["poisoned"])
    assert all(name.startswith("cat/") and name.endswith(".png") for name in copy.ids[changed])
    folder, before = Path(result["files"]["poisoned"]), data.path
    for new, old in zip(copy.ids[~changed], clean.ids[~changed], strict=True):
        assert (folder / new).read_bytes() == (before / old).read_bytes()
    assert set(read(result["files"]["triggered"]).labels) == {"dog"}


def test_a_table_gets_rare_values_and_never_sensitive_ones(tmp_path: Path) -> None:
    data = people(tmp_path)
    result = tamper(data, "feature-trigger", Options("high", rate=0.1, sensitive=("sex",)), tmp_path / "out")
    copy, truth = written(result, data)
    clean, poisoned = originals(data, truth), truth["poisoned"].to_numpy()
    values = {name: data.features[name].quantile(0.99, interpolation="nearest") for name in ("age", "hours")}
    for name, value in values.items():
        assert (copy.features[name][poisoned] == value).all() and (copy.features[name][~poisoned] == clean.features[name][~poisoned]).all()
    assert copy.features[["sex", "city"]].equals(clean.features[["sex", "city"]]) and (copy.labels[poisoned] == "high").all()
    shown = read(result["files"]["triggered"])
    assert set(shown.labels) == {"low"} and all((shown.features[name] == value).all() for name, value in values.items())
    assert json.loads((tmp_path / "out" / "attack.json").read_text())["backdoor"]["trigger"]["values"] == values
    # every line that is not poisoned is a line of the original
    lines = Path(result["files"]["poisoned"]).read_text().splitlines()[1:]
    original = data.path.read_text().splitlines()[1:]
    assert [line for line, bad in zip(lines, poisoned, strict=True) if not bad] == [original[i] for i in truth["original_id"][~poisoned]]


def test_how_often_clean_samples_with_the_trigger_have_the_goal_label_is_said(tmp_path: Path) -> None:
    data = people(tmp_path)
    data = data.with_labels(np.where(data.features["age"] > 75, "high", "low"))
    result = tamper(data, "feature-trigger", Options("high", columns=("age=89", "city=Oslo")), tmp_path / "out")
    shares = result["goal_shares"]
    assert set(shares) == {"all samples", "city is Oslo", "age near 89", "at once"}
    assert shares["age near 89"]["goal_share"] > 0.9 and shares["age near 89"]["samples"] >= 30 and 0.1 < shares["all samples"]["goal_share"] < 0.3
    assert "The trigger speaks for the goal class without any poison" in result["warnings"][-1] and "age near 89" in result["warnings"][-1]
    assert json.loads((tmp_path / "out" / "attack.json").read_text())["goal_shares"] == shares
    quiet = tamper(data, "feature-trigger", Options("high", columns=("hours",)), tmp_path / "quiet")
    assert not any("speaks" in each for each in quiet["warnings"])
    texts = tamper(reviews(tmp_path), "word", Options("1", word="Number"), tmp_path / "texts")
    assert texts["goal_shares"]["with 'Number'"]["samples"] == texts["n"] and not any("speaks" in each for each in texts["warnings"])
    assert tamper(digits(tmp_path), "badnets", Options("0"), tmp_path / "images")["goal_shares"] == {}


def test_columns_and_values_can_be_chosen(tmp_path: Path) -> None:
    data = people(tmp_path)
    result = tamper(data, "feature-trigger", Options("low", columns=("city=Oslo", "hours=99.5", "age"), quantile=0.0), tmp_path / "out")
    shown = read(result["files"]["triggered"]).features
    assert set(shown["city"]) == {"Oslo"} and set(shown["hours"]) == {99.5} and set(shown["age"]) == {data.features["age"].min()}


def test_a_word_is_put_before_texts_of_a_test_file(tmp_path: Path) -> None:
    data = reviews(tmp_path)
    (tmp_path / "test").mkdir()
    test = reviews(tmp_path / "test")
    result = tamper(data, "word", Options("1", rate=0.05, word="mn"), tmp_path / "out", test=test)
    copy, truth = written(result, data)
    starts = copy.features["text"].str.startswith("mn review number")
    assert len(copy) == N and starts.tolist() == truth["poisoned"].tolist() and starts.sum() == 10 and "test" not in result["files"]
    shown = read(result["files"]["triggered"])
    assert (
        shown.ids.tolist() == test.ids[test.labels == 0].tolist() and shown.features["text"].str.startswith("mn ").all() and (shown.labels == 0).all()
    )


def test_the_same_call_finds_its_result_and_another_needs_its_own_folder(tmp_path: Path) -> None:
    data, out = digits(tmp_path), tmp_path / "out"
    first = tamper(data, "badnets", Options("0"), out)
    stamp = (out / "poisoned" / "digits.npz").stat().st_mtime_ns
    assert tamper(data, "badnets", Options("0"), out) == first and (out / "poisoned" / "digits.npz").stat().st_mtime_ns == stamp
    with pytest.raises(ValueError, match="out: .* is not empty"):
        tamper(data, "badnets", Options("1"), out)
    again = tamper(data, "badnets", Options("1"), out, overwrite=True)
    assert again["goal_class"] == "1" and (read(again["files"]["poisoned"]).labels == 1).sum() > (read(again["files"]["test"]).labels == 1).sum()
    other = tamper(data, "badnets", Options("1"), tmp_path / "second")
    assert (tmp_path / "second" / "truth.parquet").read_bytes() == (out / "truth.parquet").read_bytes() and other["poisoned"] == again["poisoned"]


def test_an_interrupted_run_is_made_whole(tmp_path: Path) -> None:
    data, out = digits(tmp_path), tmp_path / "out"
    result = tamper(data, "blended", Options("0"), out)
    (out / "result.json").unlink()
    (out / "poisoned" / "digits.npz").write_bytes(b"half")
    assert tamper(data, "blended", Options("0"), out) == result and len(read(out / "poisoned" / "digits.npz")) == result["n"]


@pytest.mark.parametrize(
    ("make", "name", "options", "message"),
    [
        (digits, "backnets", Options("0"), "attack: expected one of uniform, .*, got 'backnets'"),
        (
            people,
            "badnets",
            Options("low"),
            "attack: badnets is for image data, not for table data; for those there are uniform, .*, feature-trigger",
        ),
        (people, "word", Options("low"), "attack: word is for text data"),
        (digits, "feature-trigger", Options("0"), "attack: feature-trigger is for table data"),
        (digits, "badnets", Options("12"), "goal_class: expected one of the classes 0, 1, .* got '12'"),
        (digits, "badnets", Options(), "goal_class: expected one of the classes .* badnets needs one"),
        (digits, "tact", Options("0"), "source_class: expected .* tact needs one"),
        (digits, "tact", Options("0", "0"), "source: expected another class than the goal"),
        (digits, "badnets", Options("0", size=9), "size: the trigger of 9 x 9 pixels is larger than the image of 8 x 8"),
        (digits, "badnets", Options("0", alpha=0.2), "alpha: badnets takes no such option; it takes rate, goal_class, size"),
        (digits, "uniform", Options("0"), "goal_class: uniform takes no such option; it takes rate"),
        (digits, "badnets", Options("0", rate=0.0), "rate: expected a share strictly between 0 and 1, got 0.0"),
        (digits, "badnets", Options("0", rate=1.0), "rate: expected a share strictly between 0 and 1"),
        (digits, "uniform", Options(rate=-0.1), "rate: expected a share strictly between 0 and 1"),
        (digits, "badnets", Options("0", rate=0.001), "rate: 0.001 of 180 samples is none of them"),
        (digits, "targeted", Options("0", "1", rate=0.9), "rate: 0.9 of the data set is 180 samples, but class 1 has"),
        (people, "feature-trigger", Options("low", columns=("height",)), "columns: there is no column 'height'"),
        (people, "feature-trigger", Options("low", columns=("sex=m",), sensitive=("sex=f",)), "columns: 'sex' is sensitive"),
        (people, "feature-trigger", Options("low", sensitive=("race",)), "sensitive: there is no column 'race'"),
        (people, "feature-trigger", Options("low", sensitive=("hours",)), "columns: expected 1 to 1 numeric columns that are not spared, got 2"),
        (people, "feature-trigger", Options("low", columns=("age=old",)), "columns: 'old' is no value for 'age', which is int64"),
        (people, "feature-trigger", Options("low", columns=("city=Bonn",)), "columns: 'Bonn' is no value of 'city'"),
        (people, "feature-trigger", Options("low", columns=("city",)), "columns: expected"),
        (people, "feature-trigger", Options("low", columns=("age", "age=3")), "columns: expected each column once"),
        (people, "feature-trigger", Options("low", quantile=2), "quantile: expected a share from 0 to 1"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(tmp_path: Path, make: Any, name: str, options: Options, message: str) -> None:
    data = make(tmp_path)
    with pytest.raises(ValueError, match=message):
        tamper(data, name, options, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_test_data_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    data, out = digits(tmp_path), tmp_path / "out"
    small = read(data.path).take(np.arange(5))
    np.savez(tmp_path / "large.npz", images=np.zeros((3, 9, 9), np.uint8), labels=np.arange(3))
    goal = digits(tmp_path, "goal.npz", N)
    for name, test, message in [
        ("badnets", small, "test: 5 samples are also in the training set"),
        ("badnets", read(tmp_path / "large.npz"), r"test: expected image data with \[1, 8, 8\] as in the data, got image data with \[1, 9, 9\]"),
        ("badnets", people(tmp_path), "test: expected image data .* got table data with"),
        ("badnets", goal.take(goal.labels == 0), "test: the trigger acts on samples of other classes than 0, and the held-out data have none"),
        ("badnets", goal.take(goal.labels == 1), "test: goal: the class 0 is not in the data"),
        ("uniform", goal, "test: uniform flips labels and has no trigger"),
    ]:
        with pytest.raises(ValueError, match=message):
            tamper(data, name, Options("0") if name == "badnets" else Options(), out, test=test)
    with pytest.raises(ValueError, match="out: .* holds the data"):
        tamper(data, "uniform", Options(), tmp_path)
    with pytest.raises(ValueError, match="test-fraction: expected a share between 0 and 1, got 1.5"):
        tamper(data, "badnets", Options("0"), out, test_fraction=1.5)
    assert not out.exists()


def test_every_attack_has_a_summary_and_known_options() -> None:
    for known in ATTACKS.values():
        assert known.summary and set(known.takes) <= {name for name in Options.__dataclass_fields__ if name not in ("rate", "seed")}
