"""cli.py: score and index."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from robust_if.evaluations.question import GAPS, Asked, Question
from robust_if.fairness.targets import FairnessGap
from test_cli import invoke, table


def people(n: int, seed: int, wrong: int = 0) -> pd.DataFrame:
    frame = table(n, seed, wrong).drop(columns="truth", errors="ignore")
    frame["sex"] = np.where(np.random.default_rng(seed).uniform(size=n) < 0.5, "F", "M")
    frame["job"] = np.array(["a", "b", "c"])[np.random.default_rng(seed + 9).integers(3, size=n)]
    return frame


@pytest.fixture
def data(tmp_path: Path) -> dict[str, Path]:
    paths = {name: tmp_path / f"{name}.csv" for name in ("train", "valid")}
    people(90, 0, wrong=15).to_csv(paths["train"], index=False)
    people(40, 1).to_csv(paths["valid"], index=False)
    return paths


def command(verb: str, paths: dict[str, Path], out: Path, *more: object) -> list[object]:
    given = {"data": paths["train"], "valid": paths["valid"], "out": out, "model": "logistic-regression", "epochs": 4}
    return [verb, *(each for key, value in given.items() for each in (f"--{key}", value)), *more]


def columns(out: Path) -> pd.DataFrame:
    return pd.read_parquet(out / "scores.parquet")


THREE = ("--target", "utility,demographic_parity,adversarial", "--sensitive", "sex", "--positive", "cat")


def test_score_writes_a_column_for_every_estimator_and_target(data: dict[str, Path], tmp_path: Path) -> None:
    result = invoke(*command("score", data, tmp_path / "out", "--estimator", "ip,ekfac,self-influence", *THREE))
    assert result.exit_code == 0, result.output
    frame = columns(tmp_path / "out")
    names = ("utility", "demographic_parity", "adversarial")
    assert list(frame) == ["id", *(f"ip:{name}" for name in names), *(f"ekfac:{name}" for name in names), "self-influence"]
    assert len(frame) == 90 and set(frame["id"]) == set(pd.read_csv(data["train"])["id"])
    assert "most harmful samples by ip:utility" in result.output and "damping" in result.output
    again = invoke(*command("score", data, tmp_path / "one", "--estimator", "ekfac"))
    assert again.exit_code == 0
    assert np.corrcoef(columns(tmp_path / "one")["ekfac:utility"], frame["ekfac:utility"])[0, 1] > 0.999


def test_gaps_of_one_column_of_intersections_and_of_one_group_against_all_others(data: dict[str, Path], tmp_path: Path) -> None:
    valid = people(400, 1)
    valid.to_csv(data["valid"], index=False)
    asked = Asked.of(Question(str(data["train"]), "label", "id", valid=str(data["valid"]), model="logistic-regression"))
    for sensitive, groups in {
        "job": [f"job={job}" for job in "abc"],
        "sex, job": [f"sex={sex}, job={job}" for sex in "FM" for job in "abc"],
        "job=a": ["job=a", "job=not a"],
    }.items():
        targets = asked.targets(GAPS, sensitive=sensitive, positive="cat")
        assert [target.name for target in targets] == list(GAPS)
        for target in targets:
            assert isinstance(target, FairnessGap) and list(target.groups) == groups
            assert asked.problem.encoder.classes[target.positive] == "cat"
    assert [cell.n for cell in target.cells] == [(valid["job"] == "a").sum(), (valid["job"] != "a").sum()]
    given = ("--target", "equalized_odds,worst_group_loss", "--sensitive", "sex,job")
    result = invoke(*command("score", data, tmp_path / "out", *given))
    assert result.exit_code == 0, result.output
    assert list(columns(tmp_path / "out")) == ["id", "ip:equalized_odds", "ip:worst_group_loss"]


def test_a_gap_on_the_training_data_is_refused(data: dict[str, Path], tmp_path: Path) -> None:
    copied = pd.read_csv(data["train"]).sample(frac=1, random_state=0)
    copied.assign(id=np.arange(len(copied))).to_csv(data["valid"], index=False)
    for verb in ("score", "validate"):
        result = invoke(*command(verb, data, tmp_path / verb, "--target", "loss_gap", "--sensitive", "sex"))
        assert result.exit_code == 2
        assert "target: the validation data of loss_gap are the training data" in " ".join(result.output.split())


def test_score_prints_one_object_with_json(data: dict[str, Path], tmp_path: Path) -> None:
    result = invoke(*command("score", data, tmp_path / "out", "--json"))
    found = json.loads(result.stdout)
    assert result.stdout.count("\n") == 1 and found["n"] == 90
    assert [each["name"] for each in found["scores"]] == ["ip:utility"]
    assert found == json.loads((tmp_path / "out" / "result.json").read_text())


def test_score_says_whether_curvature_would_change_the_order(data: dict[str, Path], tmp_path: Path) -> None:
    result = invoke(*command("score", data, tmp_path / "ip"))
    assert "predicted correlation of IP and IF" in result.output
    assert "predicted correlation" not in invoke(*command("score", data, tmp_path / "ekfac", "--estimator", "ip,ekfac")).output


def test_score_writes_pairs_and_a_greedy_removal(data: dict[str, Path], tmp_path: Path) -> None:
    result = invoke(*command("score", data, tmp_path / "out", "--estimator", "ekfac,ip-ensemble", "--damping", 0.1, "--pairs", "--greedy", 4))
    assert result.exit_code == 0, result.output
    matrix = np.load(tmp_path / "out" / "pairs" / "matrix.npy", allow_pickle=False)
    frame = columns(tmp_path / "out")
    assert matrix.shape == (90, 40)
    assert np.corrcoef(matrix.mean(1), frame["ekfac:utility"])[0, 1] > 0.999
    assert (frame["ip-ensemble:utility:spread"] > 0).all()
    removal = pd.read_csv(tmp_path / "out" / "removal.csv")
    assert len(set(removal["id"])) == 4 and removal["utility predicted"].is_monotonic_decreasing
    assert "pairs/matrix.npy" in result.output.replace("\n", "")


def test_validate_compares_scores_with_retraining(data: dict[str, Path], tmp_path: Path) -> None:
    options = ("--estimator", "ip,random", "--target", "utility,adversarial", "--subsets", 5, "--seeds", 1, "--left-out", 3, "--removed", "0.1")
    result = invoke(*command("validate", data, tmp_path / "out", *options))
    assert result.exit_code == 0, result.output
    assert "Agreement with retraining (5 random halves x 1 seeds)" in result.output and "without the worst" in result.output
    found = json.loads((tmp_path / "out" / "result.json").read_text())
    assert [(row["estimator"], row["target"]) for row in found["rows"]] == [
        (estimator, target) for estimator in ("ip", "random") for target in ("utility", "adversarial")
    ]
    for row in found["rows"]:
        assert -1 <= row["lds"]["low"] <= row["lds"]["value"] <= row["lds"]["high"] <= 1
        assert {each["k"] for each in row["brittleness"]} == {9}
    again = invoke(*command("validate", data, tmp_path / "out", *options, "--json"))
    assert json.loads(again.stdout) == found


def test_validate_names_what_is_wrong(data: dict[str, Path], tmp_path: Path) -> None:
    result = invoke(*command("validate", data, tmp_path / "out", "--subsets", 1))
    assert result.exit_code == 2 and "subsets: expected at least 3, got 1" in result.output


def test_an_index_answers_any_target_as_the_model_itself_does(data: dict[str, Path], tmp_path: Path) -> None:
    made = invoke(*command("index", data, tmp_path / "index"))
    assert made.exit_code == 0, made.output
    assert "robust-if score --index" in made.output
    assert {path.name for path in (tmp_path / "index").iterdir()} == {"question.json", "model.safetensors", "gradients"}
    fast = invoke("score", "--index", tmp_path / "index", "--out", tmp_path / "fast", *THREE)
    assert fast.exit_code == 0, fast.output
    slow = invoke(*command("score", data, tmp_path / "slow", "--checkpoint", tmp_path / "index" / "model.safetensors", *THREE))
    assert slow.exit_code == 0, slow.output
    for name in list(columns(tmp_path / "slow"))[1:]:
        got, expected = columns(tmp_path / "fast")[name], columns(tmp_path / "slow")[name]
        assert np.abs(got - expected).max() <= 1e-5 * np.abs(expected).max()


def test_checkpoints_are_summed(data: dict[str, Path], tmp_path: Path) -> None:
    assert invoke(*command("score", data, tmp_path / "one")).exit_code == 0
    assert invoke(*command("score", data, tmp_path / "two", "--checkpoints", 2)).exit_code == 0
    one, two = (columns(tmp_path / name)["ip:utility"].to_numpy() for name in ("one", "two"))
    assert not np.allclose(one, two) and np.corrcoef(one, two)[0, 1] > 0.5


def test_a_finished_score_is_not_computed_again_and_another_is_refused(data: dict[str, Path], tmp_path: Path) -> None:
    first = invoke(*command("score", data, tmp_path / "out"))
    assert first.exit_code == 0
    stamp = (tmp_path / "out" / "scores.parquet").stat().st_mtime_ns
    assert invoke(*command("score", data, tmp_path / "out")).exit_code == 0
    assert (tmp_path / "out" / "scores.parquet").stat().st_mtime_ns == stamp
    other = invoke(*command("score", data, tmp_path / "out", "--estimator", "loss"))
    assert other.exit_code == 2 and "not empty" in other.output
    assert invoke(*command("score", data, tmp_path / "out", "--estimator", "loss", "--overwrite")).exit_code == 0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--target", "fame"], "target: expected some of utility, adversarial, robust_gap, demographic_parity, "),
        (["--target", "demographic-parity"], "worst_group_loss, got 'demographic-parity'"),
        (["--target", "utility,utility"], "target: expected each name once"),
        (["--target", "equal_opportunity"], "sensitive: equal_opportunity needs a column, --sensitive sex, several, sex,race, or one"),
        (["--target", "loss_gap", "--sensitive", "race"], "sensitive: there is no column 'race'"),
        (["--target", "loss_gap", "--sensitive", "sex,race"], "sensitive: there is no column 'race'"),
        (["--target", "loss_gap", "--sensitive", "height"], "sensitive: 'height' holds measurements (40 different floats), expected groups"),
        (["--target", "loss_gap", "--sensitive", "colour"], "of 40 values of 'colour' are missing"),
        (["--target", "loss_gap", "--sensitive", "sex=X"], "sensitive: 'X' is no value of 'sex', which has ['F', 'M']"),
        (["--target", "loss_gap", "--sensitive", "sex,job"], "at least 10 validation samples in every cell, but 5 of 6 have fewer: sex=F, job=a (5)"),
        (["--target", "equal_opportunity", "--sensitive", "sex"], "join groups, give more validation data"),
        (["--target", "loss_gap", "--sensitive", "sex", "--positive", "cow"], "positive: expected one of the labels"),
        (["--target", "adversarial", "--eps", "-1"], "eps: expected a positive number"),
        (["--estimator", "magic"], "estimator: expected some of"),
        (["--estimator", "less", "--optimizer", "sgd"], "estimator: less needs a model that is trained here by adamw"),
        (["--estimator", "exact-ggn", "--model", "mlp"], "task: the exact inverse is for up to 10,000 parameters"),
        (["--greedy", "3"], "greedy: moving the parameters needs curvature with a damping of your choice"),
        (["--greedy", "90"], "greedy: expected a number from 0 to 89, got 90"),
        (["--damping", "-1", "--estimator", "cg"], "damping: expected"),
        (["--max-memory", "lots"], "max_memory: expected"),
        (["--max-memory", "100"], "max_memory: one sample needs"),
        (["--index", "nowhere"], "data: expected either --data or --index, got both"),
        (["--checkpoint", "nowhere.safetensors"], "checkpoint: there is no file"),
    ],
)
def test_score_names_what_is_wrong(more: list[Any], message: str, data: dict[str, Path], tmp_path: Path) -> None:
    result = invoke(*command("score", data, tmp_path / "out", *more))
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())


def test_score_needs_data_or_an_index(tmp_path: Path) -> None:
    result = invoke("score", "--out", tmp_path / "out")
    assert result.exit_code == 2 and "data: expected either --data or --index, got neither" in result.output
    result = invoke("score", "--index", tmp_path, "--out", tmp_path / "out")
    assert result.exit_code == 2 and "was not made by `robust-if index`" in result.output


def test_index_refuses_a_folder_of_something_else(data: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "index"
    folder.mkdir()
    (folder / "letter.txt").write_text("mine")
    assert "is not empty" in invoke(*command("index", data, folder)).output
    (folder / "letter.txt").unlink()
    assert invoke(*command("index", data, folder)).exit_code == 0
    other = invoke(*command("index", data, folder, "--seed", 1))
    assert other.exit_code == 2 and "is the index of other data" in other.output
    assert invoke(*command("index", data, folder)).exit_code == 0
