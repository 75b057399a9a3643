"""explaining.py: the training samples behind one prediction."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from backdoored import write
from robust_if import InnerProduct, Recipe
from robust_if.evaluations.explaining import Prediction, explain, find, used_by
from robust_if.evaluations.problem import Problem
from robust_if.evaluations.report.explanation import html, render_explanation
from robust_if.loading import Dataset, read

RECIPE = Recipe(epochs=8, batch_size=32, keep=3)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    paths = write(tmp_path_factory.mktemp("data"))
    train, valid, test = read(paths["train"], truth="poison"), read(paths["valid"]), read(paths["test"])
    return {"train": train, "valid": valid, "test": test, "inputs": read(paths["inputs"]), "paths": paths}


def explained(parts: dict[str, Any], sample: Dataset, out: Path, **options: Any) -> dict[str, Any]:
    problem = Problem.of(parts["train"], parts["valid"], parts["test"], model="logistic-regression")
    given = {"model": RECIPE, **options}
    return explain(Prediction.of(sample, "test", problem), problem, parts["train"], out, InnerProduct(normalise="layer"), **given)


def test_the_poison_behind_a_triggered_prediction_stands_first(parts: dict[str, Any], tmp_path: Path) -> None:
    result = explained(parts, parts["inputs"].take([3]), tmp_path / "out")
    assert result == json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["predicted"] == "bird" != result["true"] and result["probability"] > 0.5
    scores = pd.read_parquet(tmp_path / "out" / "scores.parquet")
    assert list(scores) == ["id", "ip-layer:prediction-margin"] and scores["id"].tolist() == parts["train"].ids.tolist()
    values = scores.iloc[:, 1].to_numpy()
    assert np.isfinite(values).all() and parts["train"].truth[np.argsort(-values)[:10]].all()
    assert [each["id"] for each in result["for"]] == scores["id"].to_numpy()[np.argsort(-values, kind="stable")[:24]].tolist()
    assert all(each["score"] > 0 for each in result["for"]) and all(each["score"] < 0 for each in result["against"])
    assert {each["label"] for each in result["against"][:5]} <= {"cat", "dog"} and set(result["for"][0]["row"]) >= {"odd", "sex"}
    assert not (tmp_path / "out" / "work").exists()


def test_the_label_of_the_sample_is_not_looked_at(parts: dict[str, Any], tmp_path: Path) -> None:
    one = parts["inputs"].take([3])
    explained(parts, one, tmp_path / "a")
    result = explained(parts, one.with_labels(["fish"]), tmp_path / "b")
    assert result["true"] == "fish"
    frames = [pd.read_parquet(tmp_path / name / "scores.parquet") for name in ("a", "b")]
    pd.testing.assert_frame_equal(*frames, check_exact=True)


def test_the_same_question_returns_at_once_and_a_model_can_be_given(parts: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = parts["test"].take([0])
    first = explained(parts, one, tmp_path / "out")
    monkeypatch.setattr("robust_if.training._epoch", lambda *_: pytest.fail("trained again"))
    assert explained(parts, one, tmp_path / "out") == first
    given = explained(parts, one, tmp_path / "given", model=tmp_path / "out" / "model.safetensors")
    assert given["predicted"] == first["predicted"] and given["probability"] == first["probability"]
    with pytest.raises(ValueError, match="is not empty"):
        explained(parts, parts["test"].take([1]), tmp_path / "out")
    with pytest.raises(ValueError, match="out: .* holds .*model.safetensors"):
        explained(parts, one, tmp_path / "out", model=tmp_path / "out" / "model.safetensors", overwrite=True)


def test_a_sample_is_found_by_its_id_in_one_place(parts: dict[str, Any]) -> None:
    held = {"validation": parts["valid"], "test": parts["test"]}
    where, sample = find("s2-007", held, parts["train"])
    assert where == "test" and sample.ids.tolist() == ["s2-007"]
    with pytest.raises(ValueError, match="id: there is no 'nobody' in validation or test; the first ids there are s1-000, s2-000"):
        find("nobody", held, parts["train"])
    with pytest.raises(ValueError, match="id: there is no 's0-001' in validation or test; it is a training sample"):
        find("s0-001", held, parts["train"])
    with pytest.raises(ValueError, match="id: 's1-000' is in validation and in test; say which"):
        find("s1-000", held | {"test": parts["valid"]}, parts["train"])


@pytest.mark.parametrize("content", [None, "no json", "[]", '{"data": "x", "n_train": 3, "model": "mlp", "settings": {}}'])
def test_a_folder_without_a_run_is_refused(parts: dict[str, Any], tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "result.json").write_text(content)
    with pytest.raises(ValueError, match="run: .* holds no finished run"):
        used_by(tmp_path, parts["train"], parts["train"])


def test_a_run_on_other_data_is_refused(parts: dict[str, Any], tmp_path: Path) -> None:
    said = {"data": str(parts["paths"]["train"]), "n_train": 180, "model": "mlp", "settings": {"seed": 3}}
    (tmp_path / "result.json").write_text(json.dumps(said))
    assert used_by(tmp_path, parts["train"], parts["train"]) == (tmp_path / "model.safetensors", "mlp")
    for train in (parts["train"].take(range(100)), parts["valid"]):
        with pytest.raises(ValueError, match="run: .* was trained on 180 samples"):
            used_by(tmp_path, train, train)


ATTACK = "<script>alert(1)</script>\"'&"


def test_values_from_the_data_stay_text_and_no_script_may_run(parts: dict[str, Any], tmp_path: Path) -> None:
    result = explained(parts, parts["test"].take([0]), tmp_path / "out")
    entry = {"id": ATTACK, "label": ATTACK, "score": 0.5, "image": None, "row": {ATTACK: ATTACK}, "text": ATTACK}
    hostile = dict.fromkeys(("id", "true", "predicted", "among", "data", "model", "estimator", "command"), ATTACK)
    page = html({**result, **hostile, "sample": entry, "for": [entry], "against": [], "warnings": [ATTACK]})
    assert "<script" not in page and "&lt;script&gt;alert(1)" in page and "There are none." in page
    assert "default-src 'none'" in page and "script-src" not in page
    assert not re.search(r"(?:src|href)\s*=\s*[\"']?(?!#|data:)[\w/.:]", page)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: {name: value for name, value in r.items() if name != "for"}, "missing the fields .*for"),
        (lambda r: r | {"sample": r["sample"] | {"image": "https://example.org/a.png"}}, "result.json: sample: image"),
        (lambda r: r | {"for": [{"id": 1}]}, r"result.json: for\[0\]: missing the field 'label'"),
    ],
)
def test_a_malformed_result_is_named_and_nothing_is_written(parts: dict[str, Any], tmp_path: Path, change: Any, message: str) -> None:
    result = explained(parts, parts["test"].take([0]), tmp_path / "out")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "result.json").write_text(json.dumps(change(result)))
    with pytest.raises(ValueError, match=message):
        render_explanation(tmp_path / "other")
    assert not (tmp_path / "other" / "report.html").exists()
