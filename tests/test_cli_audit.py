"""cli.py: audit, of a column of predictions and of a model, and its page."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from adultlike import adult_like
from robust_if.checkpoints import Checkpoint
from robust_if.commands import fairness
from robust_if.evaluations import auditing
from robust_if.evaluations.problem import Problem
from robust_if.evaluations.report.audit import html, render_audit, spoken
from robust_if.evaluations.splits import split_off
from robust_if.fairness.audit import audit
from robust_if.loading import read
from test_cli import invoke

ATTACK = "<script>alert('x')</script>"
WORDS = np.array(["<=50K", ">50K"])
CHROMIUM = os.environ.get("ROBUST_IF_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def people(seed: int, n: int = 300, **columns: Any) -> pd.DataFrame:
    """Labels that depend on sex and hours alone, predictions, and a value that would run as a script."""
    y, predicted, frame = adult_like(seed, n)
    draw = np.random.default_rng(seed + 100)
    frame["age"], frame["hours"] = draw.integers(18, 80, n), draw.normal(size=n) + y
    frame["race"] = frame["race"].replace("Other", ATTACK)
    return frame.assign(income=WORDS[y], said=WORDS[predicted], **columns)


@pytest.fixture
def data(tmp_path: Path) -> dict[str, Path]:
    paths = {name: tmp_path / f"{name}.csv" for name in ("train", "test")}
    for seed, path in enumerate(paths.values()):
        people(seed).to_csv(path, index=False)
    return paths


def command(paths: dict[str, Path], out: Path, *more: object, **options: object) -> list[object]:
    given = {"data": paths["train"], "label": "income", "sensitive": "sex,race", "out": out} | {k.replace("_", "-"): v for k, v in options.items()}
    return ["audit", *(each for key, value in given.items() if value is not None for each in (f"--{key}", value)), *more]


def of_model(paths: dict[str, Path], out: Path, *more: object, **options: object) -> list[object]:
    return command(paths, out, *more, **{"test": paths["test"], "model": "logistic-regression", "epochs": 20, "lr": 0.05, **options})


def test_a_column_of_predictions_is_audited_in_every_row(data: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "runs" / "audit"
    result = invoke(*command(data, out, "--json", prediction="said"))
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert result.stdout.count("\n") == 1 and found == json.loads((out / "audit.json").read_text())
    table = pd.read_csv(data["train"])
    expected = audit(table["income"], table["said"], table[["sex", "race"]], positive=">50K")
    for name, frame in (("audit", expected.rates), ("gaps", expected.gaps)):
        written = pd.read_csv(out / f"{name}.csv")
        same = [(written[column] == frame[column]) | (written[column].isna() & frame[column].isin(["", None, np.nan])) for column in frame]
        assert list(written) == list(frame) and np.all(same)
    assert found["n"] == 300 and found["positive"] == ">50K" and found["prediction"] == "said" and found["model"] is None
    assert found["accuracy"] == (table["income"] == table["said"]).mean()
    assert {row["p"] for row in found["rates"] if not row["features"]} == {None}
    assert sorted(path.name for path in out.iterdir()) == ["audit.csv", "audit.html", "audit.json", "gaps.csv", "manifest.json"]


def test_the_tables_say_who_and_how_sure(data: dict[str, Path], tmp_path: Path) -> None:
    result = invoke(*command(data, tmp_path / "out", prediction="said", smallest=60))
    assert result.exit_code == 0, result.stderr
    for text in ("By sex: predicted >50K", "By sex x race", "Gaps by race", "Female, Black", "demographic parity", "equalized odds", "audit.html"):
        assert text in result.stdout, text
    found = json.loads((tmp_path / "out" / "audit.json").read_text())
    (row,) = [row for row in found["rates"] if row["group"] == "sex=Female" and row["metric"] == "accuracy" and row["features"] == "sex"]
    assert f"{100 * row['value']:.1f}" in result.stdout and f"{100 * row['low']:.1f}–{100 * row['high']:.1f}" in result.stdout
    assert "too few to judge it by" in result.stderr and len(found["warnings"]) == result.stderr.count("note:")


def test_a_model_is_audited_on_rows_it_has_not_seen(data: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    fit = auditing.fit

    def watched(task: Any, samples: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(len(samples))
        return fit(task, samples, *args, **kwargs)

    monkeypatch.setattr(auditing, "fit", watched)
    result = invoke(*of_model(data, tmp_path / "out"))
    assert result.exit_code == 0, result.stderr
    found = json.loads((tmp_path / "out" / "audit.json").read_text())
    assert seen == [270] and found["n"] == 300 and found["n_train"] == 270 and found["data"] == str(data["test"]) and found["accuracy"] > 0.7
    assert not (tmp_path / "out" / "work").exists() and "validation data were split off" not in result.stderr
    result = invoke(*of_model(data, tmp_path / "split", "--json", test=None))
    found = json.loads(result.stdout)
    assert (found["n_train"], found["n"]) == (216, 54) and sum("test data were split off" in text for text in found["warnings"]) == 1


def test_a_trained_model_is_audited_without_training(data: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auditing, "fit", lambda *_, **__: pytest.fail("it was trained"))
    train, valid, _ = split_off(read(data["train"], label="income"), 0.1, 0, "validation")
    task = Problem.of(train, valid, model="logistic-regression", seed=3).task()
    Checkpoint.of(task.model).save(tmp_path / "model.safetensors")
    result = invoke(*of_model(data, tmp_path / "out", "--json", checkpoint=tmp_path / "model.safetensors", epochs=None, lr=None))
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["n_train"] is None and "model.safetensors was trained elsewhere" in found["warnings"][0]


def test_the_sensitive_columns_are_features_unless_the_user_says_otherwise(tmp_path: Path) -> None:
    paths = {name: tmp_path / f"{name}.csv" for name in ("train", "test")}
    for seed, path in enumerate(paths.values()):
        table = people(seed)
        table.assign(income=np.where(table["sex"] == "Male", ">50K", "<=50K"), hours=0.1 * table["hours"]).drop(columns="said").to_csv(
            path, index=False
        )
    gaps = []
    for more in ((), ("--without-sensitive",)):
        result = invoke(*of_model(paths, tmp_path / f"out{len(more)}", "--json", *more, sensitive="sex"))
        assert result.exit_code == 0, result.stderr
        gaps.append(json.loads(result.stdout)["gaps"][0]["difference"])
    assert gaps[0] == 1 and gaps[1] < 0.5


def test_numbers_are_cut_and_strata_kept_apart(data: dict[str, Path], tmp_path: Path) -> None:
    result = invoke(*command(data, tmp_path / "out", "--json", prediction="said", sensitive="age<30,sex", control="race"))
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert {row["group"] for row in found["rates"] if row["features"] == "age<30"} == {"age<30=yes", "age<30=no"}
    assert {row["stratum"] for row in found["gaps"]} == {"race=Black", "race=White", f"race={ATTACK}"}
    table = pd.read_csv(data["train"])
    sizes = {row["size"] for row in found["rates"] if row["group"] == "age<30=yes" and row["stratum"] == "race=White"}
    assert sizes == {((table["age"] < 30) & (table["race"] == "White")).sum()}
    frame, sources = auditing.columns(read(data["train"], label="income"), ["age>=30"], "sensitive")
    assert ((frame["age>=30"] == "yes") == (table["age"] >= 30)).all() and sources == ["age"]


def test_each_of_several_labels_is_audited(tmp_path: Path) -> None:
    y, predicted, frame = adult_like(classes=3)
    frame.assign(label=y, said=predicted).to_csv(tmp_path / "data.csv", index=False)
    result = invoke("audit", "--data", tmp_path / "data.csv", "--sensitive", "sex", "--prediction", "said", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    found = json.loads((tmp_path / "out" / "audit.json").read_text())
    assert found["positive"] is None and found["positives"] == ["0", "1", "2"] and "predicted 2" in result.stdout
    assert "2 against the rest" in (tmp_path / "out" / "audit.html").read_text()


def test_an_audit_is_not_overwritten_unasked(data: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    invoke(*command(data, out, prediction="said"))
    before = (out / "audit.json").read_bytes()
    again = invoke(*command(data, out, prediction="said", sensitive="sex"))
    assert again.exit_code == 2 and "holds an earlier audit" in again.stderr and (out / "audit.json").read_bytes() == before
    assert invoke(*command(data, out, "--overwrite", prediction="said", sensitive="sex")).exit_code == 0
    assert (out / "audit.json").read_bytes() != before
    inside = invoke(*command(data, data["train"].parent, "--overwrite", prediction="said"))
    assert inside.exit_code == 2 and "holds the data" in inside.stderr and data["train"].exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sensitive": "gender"}, "sensitive: there is no column 'gender' in train.csv"),
        ({"sensitive": "sex,sex"}, "sensitive: expected columns, each once, got sex, sex"),
        ({"sensitive": "age"}, "sensitive: expected at most 20 groups, 'age' has"),
        ({"sensitive": "hours"}, "cut it"),
        ({"sensitive": "sex<3"}, "sensitive: sex<3 needs numbers in every row"),
        ({"sensitive": "age<1.2.3"}, "sensitive: expected a number after age<, got '1.2.3'"),
        ({"sensitive": "age<200"}, "expected at least two groups"),
        ({"control": "nation"}, "control: there is no column 'nation'"),
        ({"positive": "rich"}, "positive: expected one of the labels ['<=50K', '>50K'], got 'rich'"),
        ({"prediction": "guess"}, "prediction: there is no column 'guess'"),
        ({"prediction": "sex"}, "prediction: ['Female', 'Male'] in 'sex' are not among the labels"),
        ({"prediction": "hours"}, "prediction: expected labels, got numbers such as"),
        ({"prediction": "said", "model": "mlp"}, "model: with --prediction nothing is trained"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_said_before_any_training(
    data: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, str], message: str
) -> None:
    monkeypatch.setattr(auditing, "fit", lambda *_, **__: pytest.fail("it was trained"))
    result = invoke(*command(data, tmp_path / "out", **options))
    assert result.exit_code == 2 and message in " ".join(result.stderr.split()), result.stderr
    assert not (tmp_path / "out").exists()


def test_missing_values_in_a_cut_column_are_refused(tmp_path: Path) -> None:
    table = people(0)
    table.loc[3, "age"] = np.nan
    table.to_csv(tmp_path / "data.csv", index=False)
    result = invoke(*command({"train": tmp_path / "data.csv"}, tmp_path / "out", prediction="said", sensitive="age<30"))
    assert result.exit_code == 2 and "'age' has 1 missing values" in result.stderr


def test_the_page_escapes_the_data_and_takes_no_other_file(data: dict[str, Path], tmp_path: Path) -> None:
    invoke(*command(data, tmp_path / "out", prediction="said"))
    page = (tmp_path / "out" / "audit.html").read_text()
    assert ATTACK not in page and "&lt;script&gt;alert" in page and "script-src" not in page and "default-src 'none'" in page
    with pytest.raises(ValueError, match="missing the fields"):
        html({"data": "x"})
    (tmp_path / "audit.json").write_text("{")
    with pytest.raises(ValueError, match="audit.json: cannot be read"):
        render_audit(tmp_path)


def test_the_headline_claims_no_more_than_the_data_show(data: dict[str, Path], tmp_path: Path) -> None:
    chance = "a difference that chance alone may explain"
    invoke(*command(data, tmp_path / "clear", prediction="said", sensitive="sex"))
    page = (tmp_path / "clear" / "audit.html").read_text()
    assert "is predicted for" in page and " of Male and " in page and chance not in page
    table = pd.read_csv(data["train"])
    table.assign(coin=np.arange(len(table)) % 2).to_csv(data["train"], index=False)
    invoke(*command(data, tmp_path / "coin", prediction="said", sensitive="coin"))
    assert chance in (tmp_path / "coin" / "audit.html").read_text()
    invoke(*command(data, tmp_path / "strata", prediction="said", sensitive="sex", control="race"))
    assert ", where White" in (tmp_path / "strata" / "audit.html").read_text()


def test_groups_are_spoken_by_their_values() -> None:
    assert spoken("sex=Female, race=Black") == "Female, Black" and spoken("age<30=yes, sex=Male") == "age<30, Male"
    assert spoken("age<30=no") == "not age<30" and spoken("city=Paris, Texas, sex=Male") == "Paris, Texas, Male" and spoken("") == ""


def test_the_options_are_those_that_detect_has() -> None:
    help_text = invoke("audit", "--help").stdout
    assert all(f"--{name}" in help_text for name in ("sensitive", "prediction", "positive", "control", "test", "valid", "model", "without-sensitive"))
    assert fairness.audit.__doc__


@pytest.mark.browser
def test_the_page_works_offline_in_a_browser(data: dict[str, Path], tmp_path: Path) -> None:
    playwright = pytest.importorskip("playwright.sync_api", reason="the browser test needs the package playwright")
    if not CHROMIUM:
        pytest.skip("the browser test needs Chromium: install it or set ROBUST_IF_CHROMIUM to its executable")
    invoke(*command(data, tmp_path / "out", prediction="said"))
    path = tmp_path / "out" / "audit.html"
    trouble: list[str] = []
    requests: list[str] = []
    with playwright.sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        for width, scheme in ((1280, "light"), (400, "dark")):
            page = running.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
            page.on("console", lambda message: trouble.append(message.text))
            page.on("dialog", lambda dialog: (trouble.append(dialog.message), dialog.dismiss()))
            page.on("request", lambda request: requests.append(request.url))
            page.goto(path.as_uri())
            narrow = "document.documentElement.scrollWidth <= document.documentElement.clientWidth"
            assert page.evaluate(narrow) and page.locator(".track .bar").count() == 4 * (2 + 3 + 6)
            for details in page.locator("summary").all():
                details.click()
            assert page.evaluate(narrow) and page.locator("text=alert('x')").count() > 0
            within = "e.offsetLeft >= -2 && e.offsetLeft + e.offsetWidth <= e.parentElement.clientWidth + 3"
            assert page.evaluate(f"[...document.querySelectorAll('.track span')].every((e) => {within})")
            page.close()
        running.close()
    assert not trouble and {url for url in requests if not url.startswith("data:")} == {path.as_uri()}
