"""A repair of a file: the figures are those of the data, the files agree with each other, and the page escapes what the data say."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn.linear_model import LogisticRegression

from robust_if import Recipe
from robust_if.encoding import Encoder
from robust_if.evaluations.repair_plan import RepairPlan
from robust_if.evaluations.repairing import run
from robust_if.evaluations.report.repair import render_repair, verdict, worse
from robust_if.fairness.audit import audit
from robust_if.loading import read

ATTACK = "<script>alert(1)</script>"


def table(n: int, seed: int, groups: tuple[str, str] = ("f", "m")) -> pd.DataFrame:
    """Group m is favoured: by its labels, and by a feature that goes with the group."""
    draw = np.random.default_rng(seed)
    s = np.arange(n) % 5 > 1
    skill, proxy = draw.normal(size=n), s + 0.5 * draw.normal(size=n)
    y = skill + 1.5 * s + 0.5 * draw.normal(size=n) > 1
    frame = pd.DataFrame({"skill": skill.round(6), "proxy": proxy.round(6), "sex": np.where(s, groups[1], groups[0])})
    frame["area"] = np.array(["north", "south", "west"])[draw.integers(3, size=n)]
    frame["id"] = [f"s{seed}-{at}" for at in range(n)]
    frame["paid"] = np.where(y, "yes", "no")
    return frame


def plan(folder: Path, *, groups: tuple[str, str] = ("f", "m"), sizes: tuple[int, int, int] = (500, 400, 400), **settings: Any) -> RepairPlan:
    folder.mkdir(parents=True, exist_ok=True)
    parts = []
    for seed, (name, n) in enumerate(zip(("train", "valid", "test"), sizes, strict=True)):
        table(n, seed, groups).to_csv(folder / f"{name}.csv", index=False)
        parts.append(read(folder / f"{name}.csv", label="paid"))
    return RepairPlan(*parts, ("sex",), ("demographic_parity",), **settings)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[RepairPlan, dict[str, Any], Path]:
    folder = tmp_path_factory.mktemp("repair")
    asked = plan(folder)
    return asked, run(asked, folder / "out"), folder / "out"


def metric(result: dict[str, Any], name: str) -> dict[str, Any]:
    return next(each for each in result["metrics"] if each["name"] == name)


def fitted(asked: RepairPlan, weights: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Labels and decisions on test data of scikit-learn's own fit."""
    encoder = Encoder.fit(asked.train)
    x, y = (encoder.samples(part).batch(slice(None)) for part in (asked.train, asked.test))
    codes = np.searchsorted(encoder.classes, labels)
    model = LogisticRegression(C=1 / asked.penalty, tol=1e-10, max_iter=10_000).fit(x[0].double().numpy(), codes, sample_weight=weights)
    return y[1].numpy(), model.predict(y[0].double().numpy())


@pytest.mark.parametrize("action", ["reweigh", "remove", "relabel"])
def test_an_independent_fit_to_the_written_weights_has_the_reported_rates(tmp_path: Path, action: Any) -> None:
    asked = plan(tmp_path, action=action)
    result = run(asked, tmp_path / "out")
    written = pd.read_csv(tmp_path / "out" / "weights.csv")
    assert list(written) == ["id", "weight", "label", "original_label", "changed"] and list(written["id"]) == list(asked.train.ids)
    assert result["changed"]["samples"] == written["changed"].sum() > 0
    sex = table(400, 2)["sex"].to_numpy()
    for when, weights, labels in (("before", np.ones(500), asked.train.labels), ("after", written["weight"], written["label"])):
        y, decided = fitted(asked, np.asarray(weights), np.asarray(labels))
        assert metric(result, "accuracy")[when]["value"] == pytest.approx((y == decided).mean())
        rates = {group: decided[sex == group].mean() for group in ("f", "m")}
        assert metric(result, "demographic_parity")[when]["value"] == pytest.approx(rates["m"] - rates["f"])
        for row in result["groups"]:
            assert row["rates"]["selection_rate"][when == "after"]["value"] == pytest.approx(rates[row["group"].removeprefix("sex=")])
    validation = metric(result, "demographic_parity")["validation"]
    assert abs(validation["after"]) < 0.5 * abs(validation["before"])


def test_the_gap_closes_and_what_got_worse_is_said(done: tuple[RepairPlan, dict[str, Any], Path]) -> None:
    _, result, _ = done
    parity, odds = metric(result, "demographic_parity"), metric(result, "true_positive_rate_parity")
    assert result["positive_sign"] == ["sex=m", "sex=f"] and parity["target"] and not odds["target"]
    assert parity["before"]["value"] > 0.3 > 0.15 > abs(parity["after"]["value"])
    assert result["verdict"].startswith("Reweighing ") and " cut the gap in demographic parity from " in result["verdict"]
    said = " ".join(worse(result))
    for row in result["metrics"][1:]:
        grew = abs(row["after"]["value"]) > abs(row["before"]["value"]) + 0.01 and not row["after"]["low"] <= 0 <= row["after"]["high"]
        assert bool(row["worse"]) == grew
    assert any(row["worse"] for row in result["metrics"]) and "worse" in said


def test_a_gap_that_grew_is_worse_only_as_far_as_the_intervals_say() -> None:
    before = {"value": 0.05, "low": 0.01, "high": 0.1, "highest": "sex=m", "lowest": "sex=f", "where": "", "runs": [0.05]}
    after = before | {"value": -0.3, "low": -0.34, "high": -0.26, "highest": "sex=f", "lowest": "sex=m"}
    row = {"name": "true_positive_rate_parity", "target": False, "worse": "clearly", "turned": True, "before": before, "after": after}
    (said,) = worse({"metrics": [row, row]})
    assert said == (
        "Equal opportunity got worse: the gap in the true positive rate went from 5.0\xa0points (1.0 to 10.0) to 30.0\xa0points (26.0 to 34.0), "
        "and now sex=f has the higher one."
    )
    (said,) = worse({"metrics": [row, row | {"worse": "perhaps", "turned": False}]})
    assert "may have got worse" in said and said.endswith("with sex=f at the higher end, which the interval of before still holds.")
    assert worse({"metrics": [row, row | {"worse": "", "turned": True}]}) == []


def test_intervals_are_those_of_the_audit(done: tuple[RepairPlan, dict[str, Any], Path]) -> None:
    asked, result, out = done
    written = pd.read_csv(out / "weights.csv")
    y, decided = fitted(asked, written["weight"].to_numpy(), written["label"].to_numpy())
    found = audit(y, decided, table(400, 2)[["sex"]], classes=[0, 1])
    gap = found.gaps.set_index("gap").loc["equal_opportunity"]
    after = metric(result, "true_positive_rate_parity")["after"]
    assert abs(after["value"]) == pytest.approx(gap["difference"])
    if gap["low"] > 0:
        assert sorted(map(abs, (after["low"], after["high"]))) == pytest.approx([gap["low"], gap["high"]])
    row = found.rates[(found.rates["group"] == "sex=f") & (found.rates["metric"] == "false_positive_rate")].iloc[0]
    cell = result["groups"][0]["rates"]["false_positive_rate"][1]
    assert (cell["n"], cell["low"], cell["high"]) == (row["n"], pytest.approx(row["low"]), pytest.approx(row["high"]))


def test_the_counts_by_group_and_the_copy_agree_with_the_weights(done: tuple[RepairPlan, dict[str, Any], Path]) -> None:
    asked, result, out = done
    written = pd.read_csv(out / "weights.csv")
    sex = table(500, 0)["sex"]
    for row in result["changed_by"]:
        own = written[(sex == row["group"].removeprefix("sex=")) & (written["original_label"] == row["label"])]["weight"]
        assert (row["n"], row["removed"], row["up"]) == (len(own), (own == 0).sum(), (own > 1).sum())
        assert row["down"] == ((own > 0) & (own < 1)).sum()
    assert sum(row["n"] for row in result["changed_by"]) == 500
    copy, original = (pd.read_csv(path, dtype=str) for path in (result["files"]["repaired"], asked.train.path))
    assert copy.drop(columns="sample_weight").equals(original)
    assert np.allclose(copy["sample_weight"].astype(float), written["weight"], atol=1e-5)
    assert result["rounds"][result["chosen"]]["changed"] == pytest.approx(np.abs(written["weight"] - 1).sum(), abs=1e-3)
    assert json.loads((out / "result.json").read_text()) == result


@pytest.mark.parametrize("action", ["remove", "relabel"])
def test_the_copy_keeps_what_was_split_off(tmp_path: Path, action: Any) -> None:
    asked = plan(tmp_path)
    whole = read(tmp_path / "train.csv", label="paid")
    asked = replace(asked, train=whole.take(np.arange(450)), whole=whole, action=action)
    result = run(asked, tmp_path / "out")
    written = pd.read_csv(tmp_path / "out" / "weights.csv", index_col="id")
    copy = pd.read_csv(result["files"]["repaired"], index_col="id")
    assert len(written) == 450 and [f"s0-{at}" for at in range(450, 500)] == list(copy.index[-50:])
    gone = set(written.index[written["weight"] == 0])
    assert set(copy.index) == {f"s0-{at}" for at in range(500)} - gone and bool(gone) == (action == "remove")
    kept = copy.index.intersection(written.index)
    assert (copy.loc[kept, "paid"] == written.loc[kept, "label"]).all()
    assert (written["label"] != written["original_label"]).any() == (action == "relabel")


def test_parquet_keeps_its_types(tmp_path: Path) -> None:
    asked = plan(tmp_path)
    pd.read_csv(tmp_path / "train.csv").astype({"area": "category"}).to_parquet(tmp_path / "train.parquet", index=False)
    asked = replace(asked, train=read(tmp_path / "train.parquet", label="paid"))
    result = run(asked, tmp_path / "out")
    copy, original = (pd.read_parquet(path) for path in (result["files"]["repaired"], tmp_path / "train.parquet"))
    assert copy.drop(columns="sample_weight").equals(original)
    assert np.allclose(copy["sample_weight"], pd.read_csv(tmp_path / "out" / "weights.csv")["weight"])


def test_test_data_decide_nothing_and_runs_repeat(tmp_path: Path, done: tuple[RepairPlan, dict[str, Any], Path]) -> None:
    asked, result, out = done
    again = run(asked, tmp_path / "again")
    assert {**again, "files": None} == {**result, "files": None}
    frame = table(200, 7).assign(skill=0.0)
    frame.to_csv(tmp_path / "other.csv", index=False)
    other = run(replace(asked, test=read(tmp_path / "other.csv", label="paid")), tmp_path / "other")
    assert (tmp_path / "other" / "weights.csv").read_text() == (out / "weights.csv").read_text()
    assert other["metrics"] != result["metrics"]


def test_a_finished_run_is_found_and_another_one_refused(done: tuple[RepairPlan, dict[str, Any], Path]) -> None:
    asked, result, out = done
    assert run(asked, out) == result
    with pytest.raises(ValueError, match="out: .* is not empty"):
        run(replace(asked, penalty=2.0), out)


def test_a_bound_that_cannot_be_met_is_a_warning(tmp_path: Path) -> None:
    result = run(plan(tmp_path, bound=0.0, max_accuracy_loss=0.0, action="remove"), tmp_path / "out")
    assert re.match(r"demographic_parity within 0 cannot be met at an accuracy loss of at most 0: the best found .* is 0\.\d+", result["unmet"])
    assert result["unmet"] in result["warnings"] and "Not reached" in (tmp_path / "out" / "report.html").read_text()
    assert metric(result, "accuracy")["validation"]["after"] >= metric(result, "accuracy")["validation"]["before"]


def test_small_empty_and_unseen_groups_are_named(tmp_path: Path) -> None:
    asked = plan(tmp_path, smallest=30)
    frame = table(400, 2)
    frame.loc[frame.index[:12], "sex"] = "x"
    frame.loc[(frame["sex"] == "f") & (frame["area"] == "west"), "area"] = "north"
    frame.to_csv(tmp_path / "test.csv", index=False)
    asked = replace(asked, test=read(tmp_path / "test.csv", label="paid"), sensitive=("sex", "area"))
    said = " | ".join(run(asked, tmp_path / "out")["warnings"])
    assert "test: no training sample belongs to sex=x, area=north; sex=x, area=south" in said
    assert re.search(r"sex=x has only 12 samples, too few to judge it by; its selection rate is \d\.\d+ \[", said)
    assert re.search(r"no sample in \d of 9 groups, whose rates are NaN: .*sex=f, area=west", said)
    assert "validation: 400 samples; with fewer than 1,000 a repair transfers badly" in said


def test_networks_are_confirmed_from_scratch(tmp_path: Path) -> None:
    asked = plan(tmp_path, model="mlp", recipe=Recipe(epochs=2, lr=0.01, optimizer="adamw"), repeats=2, rounds=2)
    result = run(asked, tmp_path / "out")
    assert not result["closed_form"] and [len(each["before"]["runs"]) for each in result["metrics"]] == [2] * 6
    assert metric(result, "accuracy")["before"]["value"] == metric(result, "accuracy")["before"]["runs"][0]
    assert not (tmp_path / "out" / "work").exists()
    assert not result["collect"]["calibrated"] and {each["predicted"] for each in result["harmful"]} == {None}  # inner products only rank
    assert "The scores only rank" in (tmp_path / "out" / "report.html").read_text()


def test_three_classes_compare_each_of_them(tmp_path: Path) -> None:
    asked = plan(tmp_path, sizes=(200, 150, 150), rounds=2, repeats=1, recipe=Recipe(epochs=3, lr=0.05))
    paths = []
    for name in ("train", "valid", "test"):
        frame = pd.read_csv(tmp_path / f"{name}.csv")
        frame.loc[frame.index % 4 == 0, "paid"] = "later"
        frame.to_csv(tmp_path / f"{name}.csv", index=False)
        paths.append(read(tmp_path / f"{name}.csv", label="paid"))
    result = run(replace(asked, train=paths[0], valid=paths[1], test=paths[2]), tmp_path / "out")
    assert result["positive"] is None and result["positive_sign"] is None
    assert metric(result, "demographic_parity")["before"]["where"] in {"class later", "class no", "class yes"}


def test_values_from_the_data_stay_text(tmp_path: Path) -> None:
    run(plan(tmp_path, groups=(ATTACK, "<b>m</b>")), tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<script" not in page and "<b>m</b>" not in page and html.escape(f"sex={ATTACK}") in page
    assert re.search(r'http-equiv="Content-Security-Policy" content="default-src \'none\'', page)


def test_the_page_says_what_the_result_says(done: tuple[RepairPlan, dict[str, Any], Path]) -> None:
    _, result, out = done
    page = html.unescape((out / "report.html").read_text())
    assert verdict(result, intervals=False) in page and all(text in page for text in worse(result))
    for row in result["changed_by"]:
        assert f"{row['group']}<small>label {row['label']}</small>" in page
    for row in result["groups"]:
        for rate in row["rates"].values():
            assert all(f"{100 * each['value']:.1f}\xa0%" in page for each in rate)
    assert page.count('class="dot validation') == page.count('class="dot test') - 1 == len(result["rounds"])  # one more in the legend
    kinds = [each["words"] for each in (*result["kinds"], *result["harmful"], *result["collect"]["kinds"])]
    assert kinds and all(each in page for each in kinds) and len(result["collect"]["samples"]) > 0


def test_a_broken_result_is_not_rendered(tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text('{"title": "x"}')
    with pytest.raises(ValueError, match=r"result.json: missing the fields \['data'"):
        render_repair(tmp_path)
    (tmp_path / "result.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read"):
        render_repair(tmp_path)
    assert not (tmp_path / "report.html").exists()


CHROMIUM = os.environ.get("ROBUST_IF_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.browser
def test_the_page_fits_any_screen(done: tuple[RepairPlan, dict[str, Any], Path]) -> None:
    playwright = pytest.importorskip("playwright.sync_api", reason="the browser test needs the package playwright")
    if not CHROMIUM:
        pytest.skip("the browser test needs Chromium: install it or set ROBUST_IF_CHROMIUM to its executable")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        for width in (1280, 400):
            page = browser.new_page(viewport={"width": width, "height": 900})
            trouble: list[str] = []
            page.on("console", lambda message, said=trouble: said.append(message.text))
            page.goto((done[2] / "report.html").as_uri())
            assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth") and not trouble
        browser.close()
