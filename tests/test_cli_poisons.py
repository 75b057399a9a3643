"""cli.py: detect with attack inputs, explain, attack."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from backdoored import frame, write
from robust_if import Recipe, training
from robust_if.evaluations import scenario, suspicion
from robust_if.evaluations.detectors import poison_detectors
from robust_if.evaluations.poisoning import filter_bias
from robust_if.loading import read
from test_cli import invoke


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write(tmp_path_factory.mktemp("data"))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Suggest each sample the next class instead of tuning for it."""
    monkeypatch.setattr(scenario, "_suggest", lambda prepared, *_: (prepared.problem.train.labels.numpy() + 1) % 3)


def given(verb: str, paths: dict[str, Path], out: Path, *more: object, **options: object) -> list[object]:
    known: dict[str, object] = {
        "data": paths["train"], "valid": paths["valid"], "test": paths["test"], "truth": "poison", "out": out, "model": "logistic-regression",
        "epochs": 20, "lr": 0.05, **{key.replace("_", "-"): value for key, value in options.items()},
    }  # fmt: skip
    return [verb, *more, *(each for key, value in known.items() if value is not None for each in (f"--{key}", value))]


def detect(paths: dict[str, Path], out: Path, *more: object, **options: object) -> list[object]:
    known = {"estimator": "ip,loss", "repeats": 1, "attack_inputs": paths["inputs"], "goal_class": "bird"} | options
    return given("detect", paths, out, *more, **known)


@pytest.fixture(scope="module")
def found(paths: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path, str]:
    out = tmp_path_factory.mktemp("run") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scenario, "_suggest", lambda prepared, *_: (prepared.problem.train.labels.numpy() + 1) % 3)
        result = invoke(*detect(paths, out, sensitive="sex"))
    assert result.exit_code == 0, result.stderr
    return json.loads((out / "result.json").read_text()), out, result.output


def test_the_two_verdicts_stand_apart(found: tuple[dict[str, Any], Path, str]) -> None:
    result, out, _ = found
    scores, samples = pd.read_parquet(out / "scores.parquet"), pd.read_parquet(out / "samples.parquet")
    assert list(scores) == ["id", f"{suspicion.ESTIMATOR.name}:attack-success", "ip:utility", "loss"]
    assert list(samples) == ["id", "label", "suggested_label", "removed", "poisoned", "harms_utility", "truly_poisoned"]
    assert samples["removed"].equals(samples["poisoned"].rename("removed")) and result["decided_by"] == scores.columns[1]
    assert np.array_equal(samples["poisoned"], scores.iloc[:, 1] > result["threshold"]) and result["removed"] == samples["poisoned"].sum()
    automatic = scenario.decide(scenario.Scores(scores["ip:utility"].to_numpy(), scores["id"].to_numpy(), "ip"), "auto")[0] == 0
    assert np.array_equal(samples["harms_utility"], automatic)
    attack = result["attack"]
    assert attack["harms_by"] == "ip:utility" and attack["harms_utility"] == automatic.sum()
    assert attack["both"] == (samples["poisoned"] & samples["harms_utility"]).sum()
    # 60 of the 120 validation samples calibrate, and can promise no less
    assert result["decision"] == "threshold that at most 1.6 % of clean samples exceed" and attack["max_false_positives"] == 1 / 61


def test_the_attack_is_found_and_its_end_measured_on_inputs_that_no_score_saw(found: tuple[dict[str, Any], Path, str]) -> None:
    result, _, _ = found
    attack, success = result["attack"], result["attack"]["success"]
    assert (attack["seen"], attack["measured"], attack["shared"], attack["failed"]) == (12, 12, False, False)
    assert success["before"] == success["scored"] >= 0.8 and success["random"] >= 0.6 > 0.3 > success["after"] and success["oracle"] < 0.3
    assert result["detection"][0]["auroc"] > 0.95 and min(result["accuracy"][key] for key in ("before", "after", "oracle")) > 0.8
    assert set(attack["success_runs"]) == {"before", "after", "random", "relabelled", "oracle", "scored"}


def test_who_was_wrongly_removed_is_told_by_class_and_group(found: tuple[dict[str, Any], Path, str], paths: dict[str, Path]) -> None:
    result, out, output = found
    samples, table = pd.read_parquet(out / "samples.parquet"), pd.read_csv(paths["train"])
    expected = filter_bias(table["poison"], samples["removed"], table["label"], table["sex"], name="sex")
    pd.testing.assert_frame_equal(pd.DataFrame(result["filter"]).astype(expected.dtypes), expected)
    assert "Who was removed" in output and "class bird" in output and "sex F" in output and "Verdict: harms utility" in output
    page = (out / "report.html").read_text()
    for text in ("Attack success before and after", "Verdict: poisoned", "Verdict: harms utility", "Who was removed", "sex F"):
        assert text in page, text


def test_triggered_inputs_truth_and_threshold_reach_no_score(paths: dict[str, Path], tmp_path: Path, found: tuple[dict[str, Any], Path, str]) -> None:
    """Other true labels of the inputs, a shuffled truth, another promise: the scores are the same."""
    table, inputs = pd.read_csv(paths["train"]), pd.read_csv(paths["inputs"])
    shuffled = table.assign(poison=np.random.default_rng(0).permutation(table["poison"]))
    shuffled.to_csv(tmp_path / "train.csv", index=False)
    inputs.assign(label="dog").to_csv(tmp_path / "inputs.csv", index=False)
    other = paths | {"train": tmp_path / "train.csv", "inputs": tmp_path / "inputs.csv"}
    result = invoke(*detect(other, tmp_path / "out", "--json", max_false_positives=0.05))
    assert result.exit_code == 0, result.stderr
    frames = [pd.read_parquet(folder / "scores.parquet") for folder in (found[1], tmp_path / "out")]
    pd.testing.assert_frame_equal(*frames, check_exact=True)
    assert json.loads(result.stdout)["threshold"] < found[0]["threshold"]


def test_groups_are_counted_without_a_suspicion_too(paths: dict[str, Path], tmp_path: Path) -> None:
    """What was removed as harmful, by group; there is no attack to tell of."""
    result = invoke(*detect(paths, tmp_path / "out", attack_inputs=None, goal_class=None, sensitive="sex", remove=10))
    assert result.exit_code == 0, result.stderr
    got = json.loads((tmp_path / "out" / "result.json").read_text())
    assert "attack" not in got and sum(row["removed"] for row in got["filter"] if row["by"] == "sex") == 10
    assert "Who was removed" in result.stdout and "Verdict" not in result.stdout
    assert "Verdict: " not in (tmp_path / "out" / "report.html").read_text()
    assert list(pd.read_parquet(tmp_path / "out" / "samples.parquet"))[-1] == "mislabelled"


def test_a_share_or_a_number_is_removed_by_the_verdict_poisoned(paths: dict[str, Path], tmp_path: Path) -> None:
    pd.read_csv(paths["train"]).drop(columns="poison").to_csv(tmp_path / "train.csv", index=False)
    result = invoke(*detect(paths | {"train": tmp_path / "train.csv"}, tmp_path / "out", "--json", remove=20, truth=None))
    assert result.exit_code == 0, result.stderr
    got = json.loads(result.stdout)
    assert got["removed"] == got["attack"]["poisoned"] == 20 and got["attack"]["max_false_positives"] is None
    assert got["attack"]["success"]["oracle"] is None and got["filter"][0]["recall"] is None


def test_an_attack_without_success_is_told_loudly_and_the_verdict_given(tmp_path: Path) -> None:
    paths = write(tmp_path / "data", poisoned=1, mark=0.5)
    result = invoke(*detect(paths, tmp_path / "out", "--json"))
    assert result.exit_code == 0 and "THE ATTACK DOES NOT WORK ON THIS MODEL" in " ".join(result.stderr.split())
    got = json.loads(result.stdout)
    assert got["attack"]["failed"] and "THE ATTACK DOES NOT WORK" in got["warnings"][-1] and got["attack"]["success"]["scored"] < 0.8
    page = (tmp_path / "out" / "report.html").read_text()
    assert "The suspected attack does not work on this model" in page and "THE ATTACK DOES NOT WORK" in page


def test_relabelling_ends_the_attack_too(found: tuple[dict[str, Any], Path, str]) -> None:
    """The suggested labels are those of a model that never saw what was called poisoned."""
    assert found[0]["attack"]["success"]["relabelled"] < 0.3 and "without any poison" in found[2]
    samples = pd.read_parquet(found[1] / "samples.parquet").query("poisoned and truly_poisoned")
    assert (samples["suggested_label"] != "bird").mean() > 0.8
    page = (found[1] / "report.html").read_text()
    assert "Without any poison" in page and "without any poison, behind a perfect filter, it is" in page


def test_poison_is_looked_for_without_any_input(paths: dict[str, Path], tmp_path: Path) -> None:
    """Ranks have no gap between good and bad, so the threshold is one that clean validation samples seldom exceed."""
    result = invoke(*detect(paths, tmp_path / "out", "--json", attack_inputs=None, goal_class=None, estimator="unlearning"))
    got = json.loads(result.stdout)
    assert got["decision"] == "threshold that at most 1.6 % of clean samples exceed" and 10 <= got["removed"] <= 60
    scores, samples = pd.read_parquet(tmp_path / "out" / "scores.parquet"), pd.read_parquet(tmp_path / "out" / "samples.parquet")
    assert np.array_equal(samples["removed"], scores["unlearning:utility"] > got["threshold"]) and got["detection"][0]["auroc"] > 0.8


def test_one_input_is_enough_and_what_that_means_is_said(paths: dict[str, Path], tmp_path: Path) -> None:
    pd.read_csv(paths["inputs"]).drop(columns="label").head(1).to_csv(tmp_path / "one.csv", index=False)
    result = invoke(*detect(paths, tmp_path / "out", attack_inputs=tmp_path / "one.csv"))
    assert result.exit_code == 0 and "Only one attack input was given, too few to split" in " ".join(result.stderr.split())
    assert "attack success was measured on 1 triggered input, the very one that the scores saw" in result.stdout
    assert json.loads((tmp_path / "out" / "result.json").read_text())["detection"][0]["auroc"] > 0.9


def test_an_interrupted_run_resumes(paths: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, found: Any) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(scenario, "_retrained", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert invoke(*detect(paths, tmp_path / "out", sensitive="sex")).exit_code == 1
    epochs: list[int] = []
    epoch = training._epoch
    monkeypatch.setattr(training, "_epoch", lambda *args: epochs.append(1) or epoch(*args))  # type: ignore[func-returns-value]
    assert invoke(*detect(paths, tmp_path / "out", sensitive="sex")).exit_code == 0
    assert len(epochs) == 4 * 20  # only the retrainings, but for the one that gave the suggested labels
    got = json.loads((tmp_path / "out" / "result.json").read_text())
    assert got["attack"] == found[0]["attack"] | {"inputs": got["attack"]["inputs"]}


WRONG: dict[str, tuple[dict[str, object], str]] = {
    "inputs alone": ({"goal_class": None}, "attack-inputs and goal-class: expected both or neither, got attack-inputs alone"),
    "goal alone": ({"attack_inputs": None}, "attack-inputs and goal-class: expected both or neither, got goal-class alone"),
    "goal absent": ({"goal_class": "fish"}, "goal-class: expected a class of the training data, bird, cat, dog, got 'fish'"),
    "no inputs": ({"attack_inputs": "absent.csv"}, "absent.csv: there is no such file"),
    "a rate without inputs": (
        {"attack_inputs": None, "goal_class": None, "max_false_positives": 0.01},
        "max-false-positives: it is about the verdict that --attack-inputs gives",
    ),
    "a rate of zero": ({"max_false_positives": 0}, "max-false-positives: expected a share strictly between 0 and 1, got 0"),
    "a rate of one": ({"max_false_positives": 1}, "max-false-positives: expected a share strictly between 0 and 1, got 1"),
    "a rate too small": (
        {"max_false_positives": 0.001},
        "the smallest that they can is 0.0164, and 0.001 needs 999; half of the validation samples calibrate",
    ),
    "no such column": ({"sensitive": "race"}, "sensitive: there is no column 'race'"),
    "no groups": ({"sensitive": "height"}, "sensitive: expected a column of at most 50 groups"),
}


@pytest.mark.parametrize(("options", "message"), WRONG.values(), ids=WRONG)
def test_detect_names_what_is_wrong_before_any_training(
    paths: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, object], message: str
) -> None:
    monkeypatch.setattr(training, "_epoch", lambda *_: pytest.fail("trained"))
    result = invoke(*detect(paths, tmp_path / "out", **options))
    assert result.exit_code == 2 and message in " ".join(result.stderr.split()) and not (tmp_path / "out").exists()


def test_inputs_from_the_training_data_are_refused(paths: dict[str, Path], tmp_path: Path) -> None:
    pd.read_csv(paths["train"]).iloc[:20].drop(columns="poison").to_csv(tmp_path / "inputs.csv", index=False)
    result = invoke(*detect(paths, tmp_path / "out", attack_inputs=tmp_path / "inputs.csv"))
    assert result.exit_code == 2 and "attack-inputs: 20 of 20 have the content of a training sample" in result.stderr


def images(path: Path, n: int, seed: int, size: int = 8) -> Path:
    draw = np.random.default_rng(seed)
    y = np.arange(n) % 2
    x = np.clip(0.6 * y[:, None, None] + draw.uniform(0, 0.4, (n, size, size)), 0, 1)
    np.savez(path, images=(255 * x).astype(np.uint8), labels=y)
    return path


def test_images_of_another_size_are_refused(tmp_path: Path) -> None:
    paths = {name: images(tmp_path / f"{name}.npz", 40, seed) for seed, name in enumerate(("train", "valid", "test"))}
    paths["inputs"] = images(tmp_path / "inputs.npz", 12, 3, size=9)
    result = invoke(*detect(paths, tmp_path / "out", truth=None, goal_class=1, model="mlp"))
    assert result.exit_code == 2 and "attack-inputs: images: expected (channels, height, width) = (1, 8, 8)" in result.stderr


# explain


def test_explain_shows_the_samples_behind_one_prediction_of_an_earlier_run(
    paths: dict[str, Path], tmp_path: Path, found: tuple[dict[str, Any], Path, str]
) -> None:
    run = found[1]
    name = pd.read_csv(paths["inputs"])["id"][0]
    options = {"run": run, "inputs": paths["inputs"], "model": None, "epochs": None}
    result = invoke(*given("explain", paths, tmp_path / "out", name, **options))
    assert result.exit_code == 0, result.stderr
    assert f"sample {name} (inputs, label cat): the model says bird" in result.stdout and "speak against it" in result.stdout
    got = json.loads((tmp_path / "out" / "result.json").read_text())
    poison = set(pd.read_csv(paths["train"]).query("poison")["id"])
    assert {each["id"] for each in got["for"][:8]} <= poison and got["model"] == "logistic-regression"
    assert (tmp_path / "out" / "report.html").is_file()


def test_either_page_is_made_anew(paths: dict[str, Path], tmp_path: Path, found: tuple[dict[str, Any], Path, str]) -> None:
    assert invoke(*given("explain", paths, tmp_path / "out", "s2-004", run=found[1], model=None, epochs=None)).exit_code == 0
    for folder in (tmp_path / "out", found[1]):
        page = (folder / "report.html").read_text()
        (folder / "report.html").unlink()
        assert invoke("report", folder).exit_code == 0 and (folder / "report.html").read_text() == page
    assert invoke("report", tmp_path).exit_code == 2


def test_explain_shows_texts(tmp_path: Path) -> None:
    words = {"good": "a lovely warm happy play", "bad": "a grim cold sad play"}
    rows = [{"text": f"{words[label]} number {i}", "label": label} for i in range(60) for label in words]
    for name, part in (("train", rows[:80]), ("valid", rows[80:100]), ("test", rows[100:])):
        pd.DataFrame(part).to_csv(tmp_path / f"{name}.csv", index=False)
    paths = {name: tmp_path / f"{name}.csv" for name in ("train", "valid", "test")}
    result = invoke(*given("explain", paths, tmp_path / "out", 0, truth=None, among="test"))
    assert result.exit_code == 0, result.stderr
    assert "the model says good" in result.stdout and "a lovely warm happy play number" in result.stdout
    assert "a lovely warm happy play number 50" in (tmp_path / "out" / "report.html").read_text()


def test_explain_trains_a_model_where_none_is_given(paths: dict[str, Path], tmp_path: Path) -> None:
    result = invoke(*given("explain", paths, tmp_path / "out", "s2-004", "--json", estimator="ip-cosine"))
    got = json.loads(result.stdout)
    assert (got["among"], got["true"], got["predicted"], got["estimator"]) == ("test", "cat", "cat", "ip-cosine")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "nobody"}, "id: there is no 'nobody' in validation or test"),
        ({"name": "s0-003"}, "it is a training sample"),
        ({"name": "s2-004", "among": "validation"}, "id: there is no 's2-004' in validation"),
        ({"name": "s2-004", "estimator": "ip,loss"}, "estimator: expected one name, got ip, loss"),
        ({"name": "s2-004", "estimator": "magic"}, "estimator: expected some of"),
        ({"name": "s2-004", "run": "absent", "model": None}, "run: absent holds no finished run"),
        ({"name": "s2-004", "run": "absent"}, "run: it brings its own model"),
        ({"name": "s2-004", "checkpoint": "absent.safetensors"}, "checkpoint: there is no file"),
        ({"name": "s2-004", "checkpoints": 0}, "keep: expected at least 1, got 0"),
        ({"name": "s2-004", "inputs": "absent.csv"}, "absent.csv: there is no such file"),
    ],
)
def test_explain_names_what_is_wrong(paths: dict[str, Path], tmp_path: Path, options: dict[str, Any], message: str) -> None:
    name, others = options["name"], {key: value for key, value in options.items() if key != "name"}
    result = invoke(*given("explain", paths, tmp_path / "out", name, **others))
    assert result.exit_code == 2 and message in " ".join(result.stderr.split()) and not (tmp_path / "out").exists()


# attack


def clean(folder: Path) -> Path:
    frame(200, 5).drop(columns="poison").to_csv(folder / "clean.csv", index=False)
    return folder / "clean.csv"


def test_attack_writes_what_detect_reads(tmp_path: Path) -> None:
    planted = invoke(
        "attack", "feature-trigger", "--data", clean(tmp_path), "--goal-class", "bird", "--rate", 0.1, "--columns", "odd=9", "--sensitive", "sex",
        "--test-fraction", 0.2, "--out", tmp_path / "poisoned", "--json",
    )  # fmt: skip
    assert planted.exit_code == 0, planted.stderr
    result = json.loads(planted.stdout)
    files = result["files"]
    assert result["poisoned"] == 16 and read(files["poisoned"]).features["odd"].eq(9).sum() == 16
    paths = {"train": files["poisoned"], "valid": tmp_path / "valid.csv", "test": files["test"], "inputs": files["triggered"]}
    frame(120, 6).drop(columns="poison").to_csv(paths["valid"], index=False)
    judged = invoke(*detect(paths, tmp_path / "out", "--json", truth=files["truth"]))
    assert judged.exit_code == 0, judged.stderr
    got = json.loads(judged.stdout)
    assert got["attack"]["success"]["before"] > 0.8 and got["filter"][0]["poisoned"] == 16 and got["detection"][0]["auroc"] > 0.9


def test_attack_says_what_comes_next(tmp_path: Path) -> None:
    result = invoke("attack", "uniform", "--data", clean(tmp_path), "--rate", 0.1, "--out", tmp_path / "out")
    assert result.exit_code == 0 and "poisoned 20 of 200 samples" in result.stdout and "next: robust-if detect" in result.stdout
    assert "--attack-inputs" not in result.stdout


NO_ATTACK: dict[str, tuple[list[object], str]] = {
    "unknown": (["magic"], "attack: expected one of"),
    "for images": (["badnets", "--goal-class", "bird"], "attack: badnets is for image data"),
    "no goal": (["feature-trigger"], "goal_class: expected one of the classes"),
    "goal absent": (["feature-trigger", "--goal-class", "fish"], "got 'fish'"),
    "rate of one": (["uniform", "--rate", 1], "rate: expected a share strictly between 0 and 1, got 1"),
    "rate of zero": (["uniform", "--rate", 0], "rate: expected a share strictly between 0 and 1, got 0"),
    "nothing to poison": (["uniform", "--rate", 0.0001], "is none of them"),
    "another option": (["uniform", "--size", 3], "size: uniform takes no such option"),
}


def test_a_trigger_larger_than_the_image_is_refused(tmp_path: Path) -> None:
    data = images(tmp_path / "images.npz", 40, 0)
    result = invoke("attack", "badnets", "--data", data, "--goal-class", 1, "--size", 9, "--out", tmp_path / "out")
    assert result.exit_code == 2 and "size: the trigger of 9 x 9 pixels is larger than the image of 8 x 8" in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("words", "message"), NO_ATTACK.values(), ids=NO_ATTACK)
def test_attack_names_what_is_wrong(tmp_path: Path, words: list[object], message: str) -> None:
    result = invoke("attack", *words, "--data", clean(tmp_path), "--out", tmp_path / "out")
    assert result.exit_code == 2 and message in " ".join(result.stderr.split()) and not (tmp_path / "out").exists()


def test_the_detectors_of_the_literature_go_by_name(paths: dict[str, Path], tmp_path: Path) -> None:
    names = [each.name for each in poison_detectors(Recipe())]
    result = invoke(*detect(paths, tmp_path / "out", "--json", attack_inputs=None, goal_class=None, estimator=",".join(names), remove=10))
    assert result.exit_code == 0, result.stderr
    rows = json.loads(result.stdout)["detection"]
    assert [row["estimator"] for row in rows] == names and len(set(names)) == 10
    scores = pd.read_parquet(tmp_path / "out" / "scores.parquet").drop(columns="id")
    assert len({tuple(column) for column in scores.to_numpy().T}) == 10, "two names give the same scores"
