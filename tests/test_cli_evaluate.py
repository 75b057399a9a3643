"""cli.py: evaluate and compare."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from robust_if.commands import evaluate as commands

SUITE = """
title = "Small"
seeds = [0, 1, 2]
[[data]]
name = "tinyparts:blobs"
label = "blobs"
[[attack]]
name = "tinyparts:flips"
label = "flips"
[[defence]]
name = "tinyparts:undefended"
label = "none"
[[defence]]
name = "tinyparts:noisy"
label = "noise"
[[metric]]
name = "tinyparts:accuracy"
"""

app = typer.Typer()
app.command()(commands.evaluate)
app.command()(commands.compare)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.toml").write_text(SUITE)


def invoke(*args: object) -> Any:
    found = CliRunner().invoke(app, [str(each) for each in args])
    assert found.exception is None or isinstance(found.exception, SystemExit), found.exception
    assert "Traceback" not in found.output
    return found


def evaluate(*args: object) -> Any:
    return invoke("evaluate", "mine.toml", "--workers", 0, *args)


def test_the_table_shows_means_and_intervals_and_the_rows_as_they_end() -> None:
    found = evaluate()
    assert found.exit_code == 0, found.stderr
    assert "blobs, flips" in found.stdout and "none" in found.stdout and "±" in found.stdout and "results.parquet" in found.stdout
    assert "6/6 blobs / flips / noise / seed 2" in found.stderr and "a part may print" not in found.stdout
    assert {path.name for path in Path("runs/mine").iterdir()} == {
        "manifest.json", "report.html", "result.json", "results.parquet", "rows", "suite.toml"
    }  # fmt: skip
    again = evaluate()
    assert again.exit_code == 0 and again.stdout == found.stdout and "seed" not in again.stderr


def test_json_is_one_object_and_its_commands_repeat_a_row() -> None:
    found = evaluate("--out", "out", "--seeds", "3,5-6", "--json")
    result = json.loads(found.stdout)
    assert result == json.loads(Path("out/result.json").read_text()) and result["seeds"] == [3, 5, 6]
    assert result["command"] == "robust-if evaluate mine.toml --seeds 3,5-6 --out out"
    row = result["rows"][-1]
    repeated = invoke(*row["command"].split()[1:])
    assert repeated.exit_code == 0 and "the same as stored" in repeated.stdout and repr(row["metrics"]["accuracy"]) in repeated.stdout
    again = json.loads(invoke(*row["command"].split()[1:], "--json").stdout)
    assert again["metrics"] == again["stored"] == row["metrics"] and again["id"] == row["id"]


def test_a_failing_row_is_told_and_is_exit_code_one() -> None:
    Path("mine.toml").write_text(SUITE.replace("tinyparts:noisy", "tinyparts:failing"))
    found = evaluate()
    assert found.exit_code == 1 and "defence 'noise': RuntimeError: it is broken" in found.stderr and "3 of 6 rows failed" in found.stderr
    assert "0 (3 failed)" in found.stdout
    result = json.loads(Path("runs/mine/result.json").read_text())
    row = next(row for row in result["rows"] if row["error"])
    repeated = CliRunner().invoke(app, row["command"].split()[1:])
    assert repeated.exit_code == 1 and "failed: defence 'noise'" in repeated.stderr and "tinyparts.py" in repeated.stderr


def test_compare_finds_a_planted_regression() -> None:
    assert evaluate("--out", "one").exit_code == 0
    Path("mine.toml").write_text(SUITE.replace('label = "noise"', 'label = "noise"\nscale = 5.0'))
    assert evaluate("--out", "two").exit_code == 0
    same = invoke("compare", "one", "one", "--fail")
    assert same.exit_code == 0 and "4 of 4 metrics are the same on every seed" in same.stdout
    result = json.loads(Path("two/result.json").read_text())
    for row in result["rows"]:
        row["metrics"]["accuracy"] -= 0.25 if row["defence"] == "none" else 0
    Path("two/result.json").write_text(json.dumps(result))
    found = invoke("compare", "one", "two", "--fail")
    assert found.exit_code == 1 and "worse" in found.stdout and "unclear" in found.stdout
    told = json.loads(invoke("compare", "one", "two", "--json").stdout)
    worse = [each for each in told["differences"] if each["verdict"] == "worse"]
    assert [each["defence"] for each in worse] == ["none"] and worse[0]["difference"] == pytest.approx(-0.25) and told["regressed"]
    assert invoke("compare", "one", "two").exit_code == 0


def test_the_shipped_suites_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {"smoke": Path("mine.toml").resolve()}
    monkeypatch.setattr(commands, "suites", lambda: known)
    monkeypatch.setattr("robust_if.evaluations.suites.suite.suites", lambda: known)
    found = invoke("evaluate", "--list")
    assert found.exit_code == 0 and "smoke" in found.stdout and "Small" in found.stdout and "6" in found.stdout
    assert json.loads(invoke("evaluate", "--list", "--json").stdout) == [{"name": "smoke", "title": "Small", "about": "", "rows": 6}]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("evaluate",), "suite: expected the name of a shipped suite, see --list, or a TOML file"),
        (("evaluate", "none-such"), "suite: unknown name 'none-such'"),
        (("evaluate", "mine.toml", "--seeds", "a"), "seeds: expected whole numbers and ranges, such as 0,1,2 or 0-9, got 'a'"),
        (("evaluate", "mine.toml", "--seeds", "1,1"), "seeds: expected a list of different whole numbers"),
        (("evaluate", "mine.toml", "--workers", "-1"), "workers: expected a whole number of at least 0, got -1"),
        (("evaluate", "mine.toml", "--row", "zzz"), "row: expected the id of one row of mine.toml, 'zzz' is that of 0"),
        (("evaluate", "mine.toml", "--out", "mine.toml"), "out: mine.toml is there and holds something else"),
        (("compare", "one", "two"), "compare: one is not the folder of a finished"),
    ],
)
def test_bad_input_is_one_line(args: tuple[str, ...], message: str) -> None:
    found = invoke(*args)
    assert found.exit_code == 2 and message in " ".join(found.stderr.split()) and not Path("runs").exists()


@pytest.mark.parametrize(
    ("seconds", "text"), [(None, ""), (0.0, ""), (42.4, ", about 42 s left"), (200, ", about 3 min left"), (9000, ", about 2.5 h left")]
)
def test_the_time_left_is_told_in_one_unit(seconds: float | None, text: str) -> None:
    assert commands._left(seconds) == text
