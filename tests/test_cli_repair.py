"""cli.py: repair."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from test_cli import invoke


def table(n: int, seed: int) -> pd.DataFrame:
    """Incomes that favour men, with labels as Adult spells them."""
    draw = np.random.default_rng(seed)
    male = np.arange(n) % 5 > 1
    skill = draw.normal(size=n)
    frame = pd.DataFrame({"skill": skill.round(6), "proxy": (male + 0.5 * draw.normal(size=n)).round(6), "sex": np.where(male, "Male", "Female")})
    frame["age"] = draw.integers(18, 70, size=n)
    frame["wage"] = draw.uniform(size=n).round(9)
    frame["constant"] = "x"
    frame["halves"] = draw.integers(4, size=n) / 2
    frame["income"] = np.where(skill + 1.5 * male + 0.5 * draw.normal(size=n) > 1, " >50K", " <=50K")
    return frame


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("data")
    found = {name: folder / f"{name}.csv" for name in ("train", "valid", "test")}
    for seed, (path, n) in enumerate(zip(found.values(), (500, 300, 300), strict=True)):
        table(n, seed).to_csv(path, index=False)
    return found


def repair(paths: dict[str, Path], out: Path, *more: object, **options: object) -> Any:
    known: dict[str, object] = {
        "data": paths["train"], "valid": paths["valid"], "test": paths["test"], "label": "income", "sensitive": "sex", "target": "demographic_parity",
        "out": out, **{key.replace("_", "-"): value for key, value in options.items()},
    }  # fmt: skip
    return invoke("repair", *more, *(each for key, value in known.items() if value is not None for each in (f"--{key}", value)))


def test_it_says_in_short_what_the_report_says_at_length(paths: dict[str, Path], tmp_path: Path) -> None:
    found = repair(paths, tmp_path / "out")
    assert found.exit_code == 0, found.stderr
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["positive"] == ">50K" and result["verdict"] in found.stdout and "report.html" in found.stdout
    assert all(name in found.stdout for name in ("sex=Female", "sex=Male", "Equalized odds", "Changed training samples"))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["manifest.json", "repaired", "report.html", "result.json", "weights.csv"]
    assert "worse:" in found.stderr and "with fewer than 1,000 a repair transfers badly" in found.stderr


def test_json_is_one_object(paths: dict[str, Path], tmp_path: Path) -> None:
    found = repair(paths, tmp_path / "out", "--json", "--without-sensitive", target="equal_opportunity", action="remove", positive=">50K")
    result = json.loads(found.stdout)
    assert result == json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["action"] == "remove" and result["without_sensitive"] and result["targets"] == ["equal_opportunity"]
    assert [each["name"] for each in result["metrics"] if each["target"]] == ["true_positive_rate_parity"]
    assert len(pd.read_csv(result["files"]["repaired"])) == 500 - result["changed"]["removed"]


def test_one_file_is_split_in_three(paths: dict[str, Path], tmp_path: Path) -> None:
    found = repair(paths, tmp_path / "out", "--json", valid=None, test=None, valid_fraction=0.3, test_fraction=0.3, sensitive="age<40", control="sex")
    result = json.loads(found.stdout)
    assert (result["n_train"], result["n_valid"], result["n_test"]) == (245, 150, 105)
    assert [each["group"] for each in result["groups"]] == ["age<40=no", "age<40=yes"] and result["control"] == ["sex"]
    assert len(pd.read_csv(result["files"]["repaired"])) == 500


def test_another_estimator_scores_the_closed_form(paths: dict[str, Path], tmp_path: Path) -> None:
    found = repair(paths, tmp_path / "out", "--json", estimator="ip", rounds=2)
    result = json.loads(found.stdout)
    assert result["closed_form"] and result["estimator"] == "ip"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sensitive": "constant"}, "sensitive (train): expected at least two groups, but all 500 samples are constant=x"),
        ({"sensitive": "halves"}, "sensitive: 'halves' holds measurements (4 different floats), expected groups"),
        ({"sensitive": "wage"}, "groups, 'wage' has 500 values; cut it, for example 'wage<0."),
        ({"sensitive": "race"}, "sensitive: there is no column 'race'"),
        ({"sensitive": "sex,sex"}, "sensitive: expected columns, each once, got sex, sex"),
        ({"control": "wage"}, "control: expected at most "),
        ({"target": "parity"}, "target: expected some of demographic_parity, "),
        ({"target": "loss_gap"}, "each once, got loss_gap"),
        ({"target": ""}, "each once, got none"),
        ({"action": "delete"}, "action: expected one of remove, reweigh, relabel, got 'delete'"),
        ({"positive": "50K"}, "positive: expected one of the labels ['<=50K', '>50K'], or None for each against the rest; got '50K'"),
        ({"bound": -0.1}, "bound: expected a number from 0 on, got -0.1"),
        ({"max_accuracy_loss": 2}, "max-accuracy-loss: expected a share from 0 to 1, got 2.0"),
        ({"penalty": 0}, "penalty: expected a number above 0, got 0.0"),
        ({"repeats": 0}, "repeats: expected at least 1, got 0"),
        ({"estimator": "ip,fvm"}, "estimator: expected one name, got ip, fvm"),
        ({"estimator": "nope"}, "estimator: expected some of"),
        ({"model": "cnn"}, "model: "),
    ],
)
def test_a_wrong_option_is_one_line_and_leaves_nothing(paths: dict[str, Path], tmp_path: Path, options: dict[str, Any], message: str) -> None:
    found = repair(paths, tmp_path / "out", **options)
    assert found.exit_code == 2 and found.stdout == "" and found.stderr.count("\n") == 1
    assert found.stderr.startswith("error:") and message in found.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("valid", "target: the validation data of demographic_parity are the training data"),
        ("test", "test: its samples are the training data"),
    ],
)
def test_held_out_data_that_are_training_data_are_refused(paths: dict[str, Path], tmp_path: Path, part: str, message: str) -> None:
    copy = tmp_path / "copy.csv"
    pd.read_csv(paths["train"]).sample(frac=1, random_state=0).to_csv(copy, index=False)  # under another name and in another order
    found = repair(paths, tmp_path / "out", **{part: copy})
    assert found.exit_code == 2 and message in found.stderr and not (tmp_path / "out").exists()
    found = repair(paths, tmp_path / "out", test=paths["valid"])
    assert found.exit_code == 2 and "test: its samples are the validation data" in found.stderr


def test_a_missing_group_is_refused(paths: dict[str, Path], tmp_path: Path) -> None:
    frame = table(500, 0)
    frame.loc[:2, "sex"] = None
    frame.to_csv(tmp_path / "gaps.csv", index=False)
    found = repair(paths | {"train": tmp_path / "gaps.csv"}, tmp_path / "out")
    assert found.exit_code == 2 and "values of 'sex' are missing" in found.stderr and not (tmp_path / "out").exists()


def test_the_folder_of_the_data_is_not_overwritten(paths: dict[str, Path]) -> None:
    found = repair(paths, paths["train"].parent, "--overwrite")
    assert found.exit_code == 2 and "out: " in found.stderr and paths["train"].exists()


def test_text_is_repaired_through_its_words(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    good, who = draw.integers(2, size=900), draw.integers(2, size=900)
    words = np.array([["poor", "dull", "weak", "grey"], ["fine", "bright", "strong", "vivid"]])
    texts = []
    for at in range(900):
        kind = np.where(draw.uniform(size=6) < 0.7, good[at], 1 - good[at])
        texts.append(" ".join([*words[kind, draw.integers(4, size=6)], "ada" if who[at] else "bob", f"row{at}"]))
    label = np.where((good == 1) & ((who == 1) | (draw.uniform(size=900) < 0.6)), "toxic", "fine")
    path = tmp_path / "text.csv"
    pd.DataFrame({"text": texts, "group": np.array(["a", "b"])[who], "label": label}).to_csv(path, index=False)
    found = invoke(
        "repair", "--data", path, "--sensitive", "group", "--target", "demographic_parity", "--without-sensitive", "--json",
        "--out", tmp_path / "out", "--valid-fraction", 0.3, "--rounds", 3,
    )  # fmt: skip
    assert found.exit_code == 0, found.stderr
    parity = json.loads(found.stdout)["metrics"][1]
    assert abs(parity["validation"]["after"]) < abs(parity["validation"]["before"])
