"""The pages of `robust-if evaluate` and `robust-if tradeoffs`: they say what the results say, escape it, and open offline in a browser."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sklearn.datasets import load_breast_cancer

from robust_if.evaluations.report.remade import remake
from robust_if.evaluations.report.suite import html as page_of
from robust_if.evaluations.report.suite import render_suite
from robust_if.evaluations.report.tradeoffs import merged
from robust_if.evaluations.suites import engine
from robust_if.evaluations.suites.suite import Suite
from test_cli import invoke

ATTACK = "<script>alert(1)</script>"
QUOTED = '"\' onload="alert(1)'
HEIGHT = 900
CHROMIUM = os.environ.get("ROBUST_IF_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def row(defence: str = "none", seed: int = 0, attack: str = "flips", **more: Any) -> dict[str, Any]:
    known = {
        "id": f"{defence} {seed}", "data": "blobs", "attack": attack, "defence": defence, "seed": seed, "family": defence.partition(" ")[0],
        "options": {"data": {}, "attack": {}, "defence": {}}, "metrics": {"accuracy": 0.5 + 0.01 * seed}, "about": {}, "seconds": 1.5,
        "peak_bytes": 2**20, "error": None, "command": f"robust-if evaluate mine --row {seed}",
    }  # fmt: skip
    return {**known, **more}


def result(rows: list[dict[str, Any]] | None = None, **more: Any) -> dict[str, Any]:
    """What `robust-if evaluate` writes of two seeds: no defence, and a filter that removes more and more."""
    if rows is None:
        rows = [row(seed=seed) for seed in (0, 1)] + [
            row(f"filter remove={share}", seed, options={"defence": {"remove": share}}, metrics={"accuracy": 0.6 + share + 0.02 * seed})
            for share in (0.1, 0.2, 0.3) for seed in (0, 1)
        ]  # fmt: skip
    known = {
        "title": "Mine", "about": "Blobs.", "suite": "mine.toml", "command": "robust-if evaluate mine.toml --out x", "versions": {"python": "3"},
        "environment": {"python": "3", "workers": 2}, "started": "2026-01-02T03:04:05+00:00", "seconds": 75.0, "seeds": [0, 1], "rows": rows,
        "warnings": [],
    }  # fmt: skip
    return {**known, **more}


def text(page: str) -> str:
    """What a reader sees, roughly."""
    body = re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL)
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", " ", body)))


def cells(page: str, defence: str) -> list[str]:
    """The table cells of a defence, with their half-widths."""
    found = re.search(rf'<th scope="row">{re.escape(defence)}</th>(.*?)</tr>', page)
    assert found
    return [text(each).strip() for each in re.findall(r"<td.*?>(.*?)</td>", found[1])]


def test_the_page_is_one_file_without_scripts() -> None:
    page = page_of(result())
    assert "<script" not in page and "http:" not in page and "https:" not in page and "default-src 'none'" in page
    assert not re.search(r"(?:src|href|url|action)\s*[=(]\s*[\"']?(?!#|data:)[\w/.:]", page)
    assert not re.search(r"\son\w+\s*=", page) and "NaN" not in page and ">nan" not in page and "None of" not in page


@pytest.mark.parametrize("hostile", [ATTACK, QUOTED])
def test_what_a_suite_file_and_an_error_say_stays_text(hostile: str) -> None:
    rows = [
        row(f"{hostile}{tail} {hostile}={value}", seed, hostile, data=hostile, family=hostile + tail,
            options={"defence": {hostile: value, "k": tail}}, metrics={"accuracy": 0.1 * value + 0.01 * seed, hostile: 3.0 * value}, command=hostile)
        for tail in ("", "x") for value in (1, 2, 3) for seed in (0, 1)
    ]  # fmt: skip
    rows += [row(data=hostile, attack=hostile, seed=seed, metrics={"accuracy": 0.05, hostile: 2.0}) for seed in (0, 1)]
    rows += [row(hostile, 0, hostile, data=hostile, error=hostile, metrics={}), row(hostile, error=hostile, metrics={}, traceback=hostile)]
    told = dict.fromkeys(("title", "about", "suite", "command", "started"), hostile)
    page = page_of(result(rows, **told, warnings=[hostile], environment={hostile: hostile, "workers": hostile}, versions={hostile: hostile}))
    assert hostile not in page and "<script" not in page and page.count("<polyline") == 4
    attributes = re.findall(r'\s([\w-]+)="[^"]*"', page)
    assert not [name for name in attributes if name.startswith("on")]
    said = [html.unescape(each) for each in re.findall(r'<svg [^>]*aria-label="([^"]*)"', page)]
    assert len(said) == 2 and all(hostile.replace("_", " ") in each for each in said)
    assert text(page).count(hostile) > 15


def test_rows_that_failed_and_warnings_are_shown() -> None:
    rows = [row(seed=0), row(seed=1), row("filter", 0, error="RuntimeError: it is broken", metrics={}, seconds=None, peak_bytes=None)]
    page = text(page_of(result(rows, warnings=["some rows were worked out under torch 1"])))
    assert "One row failed and counts nowhere" in page
    assert "blobs, flips, filter, seed 0: RuntimeError: it is broken" in page and "some rows were worked out under torch 1" in page
    quiet = page_of(result())
    assert "Rows that failed" not in quiet and "Warnings" not in quiet


def test_shares_are_in_percent_and_everything_else_as_it_is() -> None:
    metrics = [{"accuracy": 0.5, "epochs": 12.5, "my_loss": 0.25}, {"accuracy": 0.7, "epochs": 12.5, "my_loss": -0.25}]
    page = page_of(result([row("filter", seed, metrics=each) for seed, each in enumerate(metrics)]))
    assert re.findall(r'<th scope="col">(.*?)</th>', page)[1:4] == ["accuracy,\N{NO-BREAK SPACE}%", "epochs", "my loss"]
    assert cells(page, "filter")[:3] == ["60.0 ± 127.1", "12.5 ± 0", "0 ± 3.177"]


def test_a_metric_is_written_alike_in_all_tables() -> None:
    """A name that sounds like a share, but is larger than 1 somewhere."""
    page = page_of(result([row(metrics={"rate": 0.5}, attack="a"), row(metrics={"rate": 40.0}, attack="b")], seeds=[0]))
    assert "rate,\N{NO-BREAK SPACE}%" not in page and "0.5" in text(page) and "50.0" not in text(page)


def test_many_metrics_are_in_tables_that_fit() -> None:
    names = [f"metric {k}" for k in range(13)]
    page = page_of(result([row(metrics=dict.fromkeys(names, 2.0))], seeds=[0]))
    tables = [re.findall(r'<th scope="col">(metric \d+)</th>', each) for each in page.split("<table")]
    assert [len(each) for each in tables if each] == [5, 5, 3] and [name for each in tables for name in each] == names and "8 more metrics" in page


def test_a_metric_that_is_no_share_is_drawn_as_it_is() -> None:
    rows = [
        row(f"filter k={k}", seed, options={"defence": {"k": k}}, metrics={"loss": 1000.0 * place + seed})
        for place, k in enumerate((1, 10, 100), 1) for seed in (0, 1)
    ]  # fmt: skip
    page = page_of(result(rows))
    said = re.search(r'aria-label="(loss by k[^"]*)"', page)
    assert said and said[1] == "loss by k. filter: 1: 1000, 10: 2000, 100: 3000. "
    assert re.findall(r'text-anchor="end">(.*?)<', page)[:2] == ["1000", "1500"] and "ogarithmic axis" in page
    points = re.search(r'<polyline points="(.*?)"', page)
    assert points and [each.split(",")[0] for each in points[1].split()] == ["40.0", "176.0", "312.0"]


def test_a_defence_has_one_colour_in_all_charts_and_what_never_changes_is_not_drawn() -> None:
    rows = [
        row(f"{name} k={k}", options={"defence": {"k": k}}, family=name,
            metrics={"accuracy": 0.1 * k} | ({"auroc": 0.9, "bad_kept": 0.2 * k} if name == "b" else {}))
        for name in ("a", "b") for k in (1, 2, 3)
    ]  # fmt: skip
    page = page_of(result(rows, seeds=[0]))
    figures = re.findall(r"<figure>.*?</figure>", page, flags=re.DOTALL)
    assert [text(each).split(" by ")[0].strip().replace("\N{NO-BREAK SPACE}", " ") for each in figures] == ["accuracy, %", "bad kept, %"]
    colours = [re.findall(r'<g style="color: var\(--(series-\d)\)">', each) for each in figures]
    assert colours == [["series-0", "series-1"], ["series-1"]]
    assert "95 % intervals" not in page  # of one seed


def test_many_lines_can_be_told_apart() -> None:
    rows = [
        row(f"f{j} k={k}", options={"defence": {"k": k}}, family=f"f{j}", metrics={"accuracy": 0.01 * j * k}) for j in range(1, 14) for k in (1, 2, 3)
    ]
    page = page_of(result(rows, seeds=[0]))
    looks = re.findall(r'<g style="(.*?)">.*?stroke-dasharray="(.*?)"', page)
    assert len(looks) == 13 == len(set(looks))


def test_values_of_an_option_that_lie_close_are_not_written_over_one_another() -> None:
    rows = [row(f"f k={k}", options={"defence": {"k": k}}, metrics={"accuracy": k / 20}) for k in (0.0, 0.1, 0.2, 0.3, 5.0, 10.0)]
    page = page_of(result(rows, seeds=[0]))
    assert re.findall(r'y="184" text-anchor="middle">(.*?)<', page) == ["0", "5", "10"]


def test_one_seed_is_said_and_has_no_intervals() -> None:
    page = page_of(result([row(), row("filter", metrics={"accuracy": 0.9})], seeds=[0]))
    assert "There is one seed" in page and "±" not in page and "✓ and" not in page
    assert cells(page, "filter")[0] == "90.0" and "noise may explain the difference" in text(page)


def test_without_no_defence_nothing_is_compared() -> None:
    page = page_of(result([row("filter", seed) for seed in (0, 1)]))
    assert "<h1>1\N{NO-BREAK SPACE}setting evaluated.</h1>" in page and "✓ and" not in page and "better" not in text(page)


def test_where_no_row_is_finished_the_page_says_why() -> None:
    page = page_of(result([row(error="it broke", metrics={})]))
    assert "<h1>No row is finished.</h1>" in page and "it broke" in page
    assert "<h1>No row is finished.</h1>" in page_of(result([]))


def test_the_headline_counts_defences_and_not_what_is_there_to_compare() -> None:
    values = {"none": 0.5, "random": 0.9, "oracle": 0.9, "random forest": 0.9, "good": 0.8, "bad": 0.1, "like none": 0.5}
    rows = [
        row(name, seed, family=name, metrics={"accuracy": value + 0.01 * seed + (0.004 * seed if value != 0.5 else 0)})
        for name, value in values.items() for seed in (0, 1)
    ]  # fmt: skip
    page = page_of(result(rows))
    assert "<h1>2 of 4 defended settings beat no defence by more than noise, 1 is worse.</h1>" in page
    assert "accuracy 90.7 % with random forest, 50.5 % without a defence." in text(page)
    assert cells(page, "bad")[0] == "10.7 , worse ± 8.9" and cells(page, "like none")[0] == "50.5 ± 6.4"


def test_a_best_defence_that_is_worse_is_not_called_noise() -> None:
    rows = [row("none", seed, metrics={"accuracy": 0.9}) for seed in (0, 1)]
    rows += [row("filter", seed, metrics={"accuracy": 0.2 + 0.001 * seed}) for seed in (0, 1)]
    page = page_of(result(rows))
    assert "None of 1 defended setting beats no defence by more than noise, 1 is worse." in page and "noise may explain" not in page


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": 3}, "rows: expected what `robust-if evaluate` writes, got 3"),
        ({"rows": [3]}, r"rows\[0\]: missing the fields"),
        ({"rows": [{"data": "blobs"}]}, r"rows\[0\]: missing the fields \['attack'"),
        ({"rows": [row(), row(metrics={"accuracy": "high"})]}, r"rows\[1\]: metrics: expected numbers or null by name"),
        ({"rows": [row(metrics=[0.5])]}, r"rows\[0\]: metrics: expected"),
        ({"rows": [row(metrics={"accuracy": float("nan")})]}, r"rows\[0\]: metrics: expected"),
        ({"rows": [row(options={"defence": None})]}, r"rows\[0\]: options: expected"),
        ({"rows": [{**row(), "seed": "0"}]}, r"rows\[0\]: expected labels that are strings"),
        ({"rows": [row(family=None)]}, r"rows\[0\]: expected labels"),
        ({"rows": [row(seconds="long")]}, r"rows\[0\]: seconds, peak_bytes: expected"),
        ({"environment": {}}, r"environment: missing the fields \['workers'\]"),
        ({"seconds": None}, "seconds: expected"),
        ({"started": 3}, "started: expected"),
        ({"warnings": "none"}, "warnings: expected"),
    ],
)
def test_a_malformed_result_is_refused_and_nothing_is_written(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text(json.dumps(result(**change)))
    with pytest.raises(ValueError, match=message):
        render_suite(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]


@pytest.mark.parametrize("content", ["", "[]", "3", '{"suite": "mine"}', json.dumps({"suite": "mine", "rows": []})])
def test_what_is_no_result_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text(content)
    with pytest.raises(ValueError, match=r"result.json: (missing the fields|cannot be read)"):
        render_suite(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_a_missing_result_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"result\.json"):
        render_suite(tmp_path)


def test_marks_that_would_hide_one_another_are_one() -> None:
    places = {"1": (10, 10), "2": (60, 10), "3": (12, 13), "r": (10, 18), "0": (8, 9)}
    marks = merged([{"mark": name, "plain": name in "r0", "x": x, "y": y} for name, (x, y) in places.items()])
    assert marks == [
        {"mark": "1 3 0", "plain": False, "x": 10.0, "y": 10.67}, {"mark": "2", "plain": False, "x": 60.0, "y": 10.0},
        {"mark": "r", "plain": True, "x": 10.0, "y": 18.0},
    ]  # fmt: skip


# real runs

SUITE = """
title = "Removing wrong labels"
seeds = [0, 1]

[[data]]
name = "digits"
train = 150
valid = 40
test = 100
epochs = 3

[[attack]]
name = "label-uniform"
rate = 0.2

[[defence]]
name = "none"

[[defence]]
name = "random"
remove = 0.2

[[defence]]
name = "filter"
label = "a filter with a long label, by the neighbours of the last layer"
estimator = "deep-knn"
remove = ["auto", 0.1, 0.2, 0.3]

[[metric]]
name = "accuracy"

[[metric]]
name = "detection"

[[metric]]
name = "removed"
"""


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluated")
    (folder / "mine.toml").write_text(SUITE)
    found = engine.run(Suite.read(folder / "mine.toml"), folder / "out", workers=0)
    assert not [each["error"] for each in found["rows"] if each["error"]]
    return folder / "out" / "report.html"


@pytest.fixture(scope="module")
def traded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("traded")
    frame = load_breast_cancer(as_frame=True).frame[["mean radius", "mean texture", "mean area", "target"]]
    frame.assign(group=(frame["mean texture"] > 19).map({True: "A", False: "B"})).to_csv(folder / "cells.csv", index=False)
    options = {"label": "target", "target": "utility,demographic_parity,equal_opportunity", "sensitive": "group", "model": "logistic-regression"}
    options |= {"epochs": 3, "repeats": 2, "remove": 20, "estimator": "ip", "out": folder / "out"}
    found = invoke("tradeoffs", "--data", folder / "cells.csv", *(each for key, value in options.items() for each in (f"--{key}", value)))
    assert found.exit_code == 0, found.stderr
    return folder / "out" / "report.html"


@pytest.mark.parametrize("made", ["evaluated", "traded"])
def test_a_page_is_made_anew_from_what_lies_beside_it(made: str, request: pytest.FixtureRequest) -> None:
    path: Path = request.getfixturevalue(made)
    before = path.read_bytes()
    path.unlink()
    assert remake(path.parent) == path and path.read_bytes() == before


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="the browser test needs the package playwright")
    if not CHROMIUM:
        pytest.skip("the browser test needs Chromium: install it or set ROBUST_IF_CHROMIUM to its executable")
    with playwright.sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield running
        running.close()


@pytest.fixture(params=[1280, 400])
def opened(request: pytest.FixtureRequest, browser: Any) -> Iterator[Any]:
    """Opens a file in a window of some width; in the end nothing may have gone wrong or been asked from elsewhere."""
    page = browser.new_page(viewport={"width": request.param, "height": HEIGHT})
    trouble: list[str] = []
    requests: list[str] = []
    page.on("console", lambda message: trouble.append(message.text))
    page.on("pageerror", lambda error: trouble.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))

    def visit(path: Path) -> Any:
        page.goto(path.as_uri())
        fits(page)
        return page

    yield visit
    assert not trouble and len([url for url in requests if not url.startswith("data:")]) == 1
    page.close()


def fits(page: Any) -> None:
    """Nothing is wider than the page, and no table has to be scrolled or is cut."""
    assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    wide = """[...document.querySelectorAll('main *')].filter((each) => each.checkVisibility() && !each.closest('.skip, thead')
        && each.getBoundingClientRect().right > document.documentElement.clientWidth + 1).map((each) => each.outerHTML.slice(0, 200))"""
    assert page.evaluate(wide) == []
    assert page.evaluate("[...document.querySelectorAll('.wide')].every((each) => each.scrollWidth <= each.clientWidth)")


def reached(page: Any, count: int) -> list[str]:
    """What the key Tab stops at: the names of the elements, or their texts."""
    stops = []
    for _ in range(count):
        page.keyboard.press("Tab")
        stops.append(page.evaluate("document.activeElement.tagName + ' ' + (document.activeElement.innerText || '').slice(0, 60)"))
    return stops


@pytest.mark.browser
def test_the_page_of_a_suite_can_be_read_in_a_browser(evaluated: Path, opened: Any) -> None:
    page = opened(evaluated)
    assert page.locator("h1").inner_text().endswith("worse.") and page.locator("section h2").count() == 3
    charts = page.locator("figure svg[role=img]")
    assert charts.count() == page.locator("figure polyline").count() == 2
    for chart in charts.all():
        box, label = chart.bounding_box(), chart.get_attribute("aria-label")
        assert box["width"] > 250 and box["height"] > 140 and "by remove. a filter with a long label" in label
    assert page.locator("figure circle").count() == 6 and page.locator("figure .none").count() == 4
    widths = page.evaluate("[...document.querySelectorAll('figure polyline')].map((each) => each.getBoundingClientRect().width)")
    assert min(widths) > 200
    rows = page.locator(".wide").first.locator("tbody tr")
    assert rows.count() == 6 and "deep-knn" not in rows.nth(2).inner_text() and "remove=auto" in rows.nth(2).inner_text()
    sizes = page.evaluate("[...document.querySelectorAll('td .mean')].map((each) => parseFloat(getComputedStyle(each).fontSize))")
    assert min(sizes) >= 13
    overlapping = """(table) => [...table.querySelectorAll('tbody tr')].some((row) => [...row.children].some((one, k) =>
        [...row.children].some((other, m) => { const a = one.getBoundingClientRect(), b = other.getBoundingClientRect();
        return k < m && a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 1 && b.top < a.bottom - 1; })))"""
    assert not page.locator(".wide table").first.evaluate(overlapping)
    stops = reached(page, 6)
    assert stops[0] == "A Skip to the finding" and any(each.startswith("SUMMARY") for each in stops)
    page.locator("summary").first.focus()
    page.keyboard.press("Enter")
    assert all(table.is_visible() for table in page.locator("details.more table").all())
    page.locator("summary").last.click()
    assert page.locator("code", has_text="--row").first.is_visible()
    fits(page)


@pytest.mark.browser
def test_the_page_of_tradeoffs_can_be_read_in_a_browser(traded: Path, opened: Any) -> None:
    page = opened(traded)
    pairs, choices = 3, len(json.loads((traded.parent / "result.json").read_text())["choices"])
    assert page.locator(".cloud path").count() == 2 * pairs and page.locator(".plot").count() == 2 * pairs
    for drawn in page.locator(".cloud, .plot").all():
        box = drawn.bounding_box()
        assert box["width"] > 250 and box["height"] > 250 and drawn.get_attribute("aria-label")
    assert page.locator(".matrix td").count() == 9
    assert page.locator("section[aria-labelledby=h-choices] tbody tr").count() == choices
    shown = page.locator(".plot").nth(1).locator(".mark").all_inner_texts()
    assert len(" ".join(shown).split()) == choices  # every one, though they may share a mark
    assert reached(page, 1) == ["A Skip to the finding"]
    for kind in page.locator(".kind > summary").all():
        kind.focus()
        page.keyboard.press("Enter")
    fits(page)
