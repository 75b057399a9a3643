"""suites: what a file may say, what determines a row, and that neither workers nor interruptions change a table."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from robust_if.evaluations.suites import comparing, engine
from robust_if.evaluations.suites.meter import Meter
from robust_if.evaluations.suites.rows import Record, read, write
from robust_if.evaluations.suites.suite import Suite, suites

#: A table of the results, but for what depends on the machine.
NUMBERS = ["id", "data", "attack", "defence", "seed", "metric", "value", "error"]

SMALL = """
title = "Small"
about = "Blobs."
seeds = [0, 1]

[[data]]
name = "tinyparts:blobs"
label = "blobs"

[[attack]]
name = "tinyparts:none"
label = "none"

[[attack]]
name = "tinyparts:flips"
label = "flips"
rate = [0.1, 0.3]

[[defence]]
name = "tinyparts:undefended"
label = "none"

[[defence]]
name = "tinyparts:noisy"
label = "noise"
attack = "flips"

[[metric]]
name = "tinyparts:accuracy"
"""


def suite(folder: Path, text: str = SMALL, *changes: tuple[str, str], **options: Any) -> Suite:
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    path = folder / "mine.toml"
    path.write_text(text)
    return Suite.read(path, **options)


def run(chosen: Suite, folder: Path, **options: Any) -> pd.DataFrame:
    engine.run(chosen, folder, **{"workers": 0, **options})
    return pd.read_parquet(folder / "results.parquet")


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Counter[str]]:
    """What the parts were called for since the last time that this was asked."""
    folder = tmp_path / "counted"
    folder.mkdir()
    monkeypatch.setenv("TINY_CALLS", str(folder))

    def counted() -> Counter[str]:
        path = folder / "calls"
        found = Counter(path.read_text().split("\n")[:-1]) if path.exists() else Counter[str]()
        path.unlink(missing_ok=True)
        return found

    return counted


# what a file may say


def test_a_list_is_a_grid_and_a_table_may_name_what_it_goes_with(tmp_path: Path) -> None:
    found = suite(tmp_path)
    assert [part.label for part in found.parts["attack"]] == ["none", "flips rate=0.1", "flips rate=0.3"]
    assert [row.said() for row in found.rows()][:4] == [
        "blobs / none / none / seed 0", "blobs / none / none / seed 1", "blobs / flips rate=0.1 / none / seed 0",
        "blobs / flips rate=0.1 / none / seed 1",
    ]  # fmt: skip
    assert len(found.rows()) == 2 * (1 + 2 + 2) and len({row.id for row in found.rows()}) == 10 and len({row.job for row in found.rows()}) == 6
    one = suite(tmp_path, SMALL, ('attack = "flips"', 'attack = ["flips rate=0.3"]'), seeds=[7])
    assert [row.said() for row in one.rows() if row.defence.label == "noise"] == ["blobs / flips rate=0.3 / noise / seed 7"]


def test_a_row_is_known_by_what_determines_it_and_by_nothing_else(tmp_path: Path) -> None:
    before = {row.said(): row.id for row in suite(tmp_path).rows()}
    again = suite(
        tmp_path,
        SMALL,
        ("Blobs.", "Two blobs."),
        ("Small", "Tiny"),
        ("seeds = [0, 1]", "seeds = [1, 0, 5]"),
        ('label = "flips"', 'label = "flips"\nrate = 0.1\n[[attack]]\nname = "tinyparts:flips"\nlabel = "more"'),
        ("rate = [0.1, 0.3]", "rate = 0.3"),
        ('attack = "flips"', ""),
        ('name = "tinyparts:blobs"', 'name = "tinyparts:blobs"\nn = 40\ndistance = 2'),
    )
    after = {row.said(): row.id for row in again.rows()}
    renamed = {name.replace("flips rate=0.1", "flips").replace("flips rate=0.3", "more"): found for name, found in before.items()}
    assert {name: after[name] for name in renamed} == renamed
    changes = [("[0.1, 0.3]", "[0.1, 0.31]"), ('label = "blobs"', 'label = "blobs"\nn = 41'), ("tinyparts:accuracy", "tinyparts:empty")]
    shared = [len({row.id for row in suite(tmp_path, SMALL, change).rows()} & set(before.values())) for change in changes]
    assert shared == [6, 0, 0]


def test_the_source_of_a_users_part_and_the_files_that_it_is_given_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "users_own.py").write_text("def data(*, path: str, seed: int): ...\n")
    (tmp_path / "table.csv").write_text("a\n1\n")
    change = ('name = "tinyparts:blobs"', 'name = "users_own:data"\npath = "table.csv"')
    ids = [[row.id for row in suite(tmp_path, SMALL, change).rows()]]
    ids += [[row.id for row in suite(tmp_path, SMALL, change).rows()]]
    (tmp_path / "table.csv").write_text("a\n22\n")
    ids += [[row.id for row in suite(tmp_path, SMALL, change).rows()]]
    (tmp_path / "users_own.py").write_text("def data(*, path: str, seed: int): return None\n")
    ids += [[row.id for row in suite(tmp_path, SMALL, change).rows()]]
    assert ids[0] == ids[1] and len({tuple(each) for each in ids}) == 3


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("title =", "titel =", "mine.toml: unknown key 'titel'; expected some of title, about, seeds, data, attack, defence, metric"),
        ("[[metric]]", "[[metrics]]", "unknown key 'metrics'"),
        ("[0, 1]", "[0, 0]", r"seeds: expected a list of different whole numbers from 0, got \[0, 0\]"),
        ("[0, 1]", "[]", r"seeds: expected a list .* got \[\]"),
        ("[0, 1]", "3", "seeds: expected a list of different whole numbers from 0, got 3"),
        ("[0, 1]", "[-1]", "seeds: expected"),
        ("[0, 1]", "[0, 1", "mine.toml: "),
        ('[[metric]]\nname = "tinyparts:accuracy"', "", r"metric: expected at least one table \[\[metric\]\], got \[\]"),
        ('[[metric]]\nname = "tinyparts:accuracy"', "[metric]", r"metric: expected at least one table \[\[metric\]\], got {}"),
        ('name = "tinyparts:none"', "", r"\[\[attack\]\] number 1: expected a 'name', .* got None and 'none'"),
        ("tinyparts:none", "nothing", "attack: unknown name 'nothing'; expected one of .*, or module:function"),
        ("tinyparts:none", "tinyparts:absent", "attack: cannot import 'tinyparts:absent': module 'tinyparts' has no attribute 'absent'"),
        ("tinyparts:none", "tinyparts:NUMBER", "attack: expected a function, 'tinyparts:NUMBER' is int"),
        ("tinyparts:none", "tinyparts:seedless", "attack 'none': expected a function that takes 'seed' by keyword, got one of "),
        ("tinyparts:none", "tinyparts:needy", "attack 'none': the option 'rate' is missing; it has no default"),
        ("tinyparts:none", "tinyparts:lonely", "attack 'none': expected a function of 1 positional arguments and options by keyword, got one of "),
        ("rate = [0.1, 0.3]", "share = 0.1", "attack 'flips': unknown option 'share'; expected some of rate"),
        ("rate = [0.1, 0.3]", "seed = 1", "attack 'flips': unknown option 'seed'; expected some of rate"),
        ("rate = [0.1, 0.3]", 'rate = [0.1, "a"]', "attack 'flips': rate: expected a number, got 'a'"),
        ("rate = [0.1, 0.3]", "rate = true", "attack 'flips': rate: expected a number, got True"),
        ("rate = [0.1, 0.3]", "rate = []", "attack 'flips': rate: expected at least one value, got an empty list"),
        ("rate = [0.1, 0.3]", "rate = {low = 1}", "attack 'flips': rate: expected a number, a string, true or false, or a list of these"),
        ("rate = [0.1, 0.3]", "rate = [0.1, 0.1]", "attack: two are labelled 'flips rate=0.1'; give one of them a 'label' of its own"),
        ('label = "flips"\nrate = [0.1, 0.3]', 'label = "none"', "attack: two are labelled 'none'"),
        ('label = "blobs"', 'label = "blobs"\nn = 40.5', "data 'blobs': n: expected a whole number, got 40.5"),
        ('label = "blobs"', 'label = "blobs"\nmodel = "deep"', "data 'blobs': model: expected one of 'linear', 'wide', got 'deep'"),
        ('attack = "flips"', 'attack = ["flops"]', "defence 'noise': attack: unknown label 'flops'; expected some of "),
        ('attack = "flips"', "attack = 3", r"defence 'noise': attack: expected labels of \[\[attack\]\] tables, got 3"),
        ('name = "tinyparts:undefended"', 'name = "tinyparts:undefended"\nattack = ["flips"]', "attack 'none': it is in no row"),
        ('name = "tinyparts:undefended"', 'name = "tinyparts:noisy"\nscale = 0.1', "/ none / seed 0 and .* / noise / seed 0 are the same under two"),
    ],
)  # fmt: skip
def test_a_file_that_asks_for_what_cannot_be_is_refused_before_any_work(old: str, new: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        suite(tmp_path, SMALL, (old, new))


def test_a_suite_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"suite: unknown name 'none-such'; expected one of .* or the path of a .toml file"):
        Suite.read("none-such")
    with pytest.raises(ValueError, match="suite: there is no file"):
        Suite.read(tmp_path / "absent.toml")


@pytest.mark.parametrize("name", suites())
def test_every_shipped_suite_can_be_read(name: str) -> None:
    found = Suite.read(name)
    assert found.title and found.about and len({row.id for row in found.rows()}) == len(found.rows())


# what comes out


def test_rows_of_one_job_share_their_work_and_every_number_is_there(tmp_path: Path, calls: Callable[[], Counter[str]]) -> None:
    standings: list[engine.Standing] = []
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    result = engine.run(suite(tmp_path), tmp_path / "out", workers=0, watch=standings.append)
    assert torch.get_num_threads() == threads and torch.equal(torch.get_rng_state(), state)
    assert calls() == Counter(
        {"blobs 0": 3, "blobs 1": 3, "flips 0": 2, "flips 1": 2, "undefended 0": 3, "undefended 1": 3, "noisy 0": 2, "noisy 1": 2}
    )
    assert [each.done for each in standings] == list(range(11)) and standings[0].left is None and standings[-1].left == 0
    assert json.loads((tmp_path / "out" / "result.json").read_text()) == result
    first = result["rows"][0]
    assert (first["data"], first["attack"], first["defence"], first["seed"]) == ("blobs", "none", "none", 0)
    assert first["about"] == {"loss": None, "kind": 3, "path": "x"} and first["options"]["data"] == {"n": 40, "distance": 2.0, "model": "linear"}
    assert first["command"].endswith(f"--row {first['id']}") and first["error"] is None
    assert first["undefended_seconds"] > 0 and first["shared_seconds"] > 0 and first["peak_bytes"] > 10**7
    assert {"python", "torch", "platform", "cpus", "threads", "engine", "workers"} <= set(result["environment"])
    table = pd.read_parquet(tmp_path / "out" / "results.parquet")
    assert len(table) == 20 and list(table["id"].unique()) == [row.id for row in suite(tmp_path).rows()]
    assert table.set_index(["id", "metric"])["value"][first["id"], "accuracy"] == first["metrics"]["accuracy"]
    assert (tmp_path / "out" / "suite.toml").read_text() == SMALL


def test_finished_rows_are_never_worked_out_again_and_changed_ones_are(tmp_path: Path, calls: Callable[[], Counter[str]]) -> None:
    out = tmp_path / "out"
    before = run(suite(tmp_path), out)
    calls()
    assert run(suite(tmp_path), out).equals(before) and not calls()
    changed = run(suite(tmp_path, SMALL, ("[0.1, 0.3]", "[0.1, 0.4]"), ("[0, 1]", "[1]")), out)
    assert calls() == Counter({"blobs 1": 1, "flips 1": 1, "undefended 1": 1, "noisy 1": 1}) and len(changed) == 10
    run(suite(tmp_path), out, overwrite=True)
    assert calls().total() == 20


def test_two_uses_of_one_metric_have_names_of_their_own(tmp_path: Path) -> None:
    text = SMALL + '\n[[metric]]\nname = "tinyparts:accuracy"\nlabel = "shifted"\nshift = [0.5, 1]\n[[metric]]\nname = "tinyparts:undefined"\n'
    table = run(suite(tmp_path, text, seeds=[0]), tmp_path / "out").pivot_table(index="id", columns="metric", values="value", dropna=False)
    assert set(table) == {f"{name}{end}" for name in ("accuracy", "logit") for end in ("", " (shifted shift=0.5)", " (shifted shift=1)")} | {
        "nothing"
    }
    assert np.allclose(table["accuracy"] - table["accuracy (shifted shift=1)"], 1) and table["nothing"].isna().all()


@pytest.mark.parametrize(
    ("old", "new", "error"),
    [
        ("tinyparts:undefended", "tinyparts:failing", "defence 'none': RuntimeError: it is broken"),
        ("tinyparts:undefended", "tinyparts:wrong", "defence 'none': expected it to return a Defended, got str"),
        ("tinyparts:undefended", "tinyparts:spoiling", "defence 'none', or a metric: it changed the data that other rows share"),
        ("tinyparts:none", "tinyparts:undefended", "attack 'none': AttributeError: "),
        ("tinyparts:accuracy", "tinyparts:text", "metric .*: expected numbers by name, got 'high' for 'accuracy'"),
        ('"tinyparts:accuracy"', '"tinyparts:accuracy"\n[[metric]]\nname = "cleanparts:accuracy"', "another metric has given 'accuracy' already"),
    ],
)  # fmt: skip
def test_a_part_that_fails_costs_its_rows_and_is_tried_again(
    old: str, new: str, error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: Callable[[], Counter[str]]
) -> None:
    (tmp_path / "cleanparts.py").write_text("from tinyparts import accuracy\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    chosen = suite(tmp_path, SMALL, (old, new))
    result = engine.run(chosen, tmp_path / "out", workers=0)
    failed = [row for row in result["rows"] if row["error"] is not None]
    assert failed and all(pd.Series([row["error"]]).str.contains(error).all() and not row["metrics"] for row in failed)
    table = pd.read_parquet(tmp_path / "out" / "results.parquet")
    assert set(table[table["metric"].isna()]["id"]) == {row["id"] for row in failed}
    fine = len(result["rows"]) - len(failed)
    calls()
    monkeypatch.setenv("TINY_MENDED", "1")
    again = engine.run(chosen, tmp_path / "out", workers=0)
    assert "failing" not in new or (all(row["error"] is None for row in again["rows"]) and calls()["undefended 0"] == 3)
    assert "spoiling" not in new or (fine == 4 and table["value"].notna().sum() == 8)  # the scene is made afresh for the rows after it


def test_one_row_can_be_repeated(tmp_path: Path) -> None:
    chosen = suite(tmp_path)
    run(chosen, tmp_path / "out")
    row = chosen.rows()[-1]
    found, record, stored = engine.repeat(chosen, row.id[:7], tmp_path / "out")
    assert found == row and stored is not None and record.metrics == stored.metrics and record.metrics
    assert engine.repeat(chosen, row.id)[2] is None
    for wanted in ("", "zzz"):
        with pytest.raises(ValueError, match=f"row: expected the id of one row of .*, {wanted!r} is that of"):
            engine.repeat(chosen, wanted)


def test_a_folder_of_somebody_else_and_bad_arguments_are_refused(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "thesis.tex").write_text("")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="out: .*theirs is there and holds something else"):
            engine.run(suite(tmp_path), tmp_path / "theirs", overwrite=overwrite)
    assert (tmp_path / "theirs" / "thesis.tex").exists()
    for options, message in (
        ({"workers": -1}, "workers: expected"),
        ({"engine": "slurm"}, "engine: expected 'local' or 'ray'"),
        ({"engine": "ray", "workers": 0}, "at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            engine.run(suite(tmp_path), tmp_path / "new", **options)
    assert not (tmp_path / "new").exists()


def test_a_record_that_cannot_be_read_is_worked_out_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = run(suite(tmp_path), tmp_path / "out")
    spoilt = sorted((tmp_path / "out" / "rows").iterdir())[0]
    spoilt.write_text(spoilt.read_text()[:50])
    assert run(suite(tmp_path), tmp_path / "out")[NUMBERS].equals(before[NUMBERS])
    assert "cannot be read; the row is worked out again" in caplog.text


def test_numbers_come_back_bit_for_bit(tmp_path: Path) -> None:
    row = suite(tmp_path).rows()[0]
    (tmp_path / "rows").mkdir()
    record = Record(row.id, {"a": 0.1 + 0.2, "b": 1e-310, "c": None, "d": -0.0}, {"n": 3}, seconds=1 / 3)
    write(tmp_path, row, record)
    assert read(tmp_path, [row.id, "absent"]) == {row.id: record}
    assert repr(read(tmp_path, [row.id])[row.id].metrics) == repr(record.metrics)


# workers and interruptions


def test_workers_give_the_same_table_and_one_that_dies_costs_its_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = SMALL + '\n[[defence]]\nname = "tinyparts:deadly"\nattack = "none"\n'
    chosen = suite(tmp_path, text)
    found = run(chosen, tmp_path / "two", workers=2)
    dead = found["error"].notna()
    assert dead.sum() == 1 and set(found[dead]["seed"]) == {1} and set(found[dead]["defence"]) == {"tinyparts:deadly"}
    assert found[dead]["error"].str.contains("the worker was ended by SIGKILL; the machine may have run out of memory").all()
    monkeypatch.setenv("TINY_MENDED", "1")
    mended, alone = run(chosen, tmp_path / "two"), run(chosen, tmp_path / "here")
    assert mended["error"].isna().all() and mended[NUMBERS].equals(alone[NUMBERS])
    assert found[~dead][NUMBERS].equals(alone[~alone["id"].isin(found[dead]["id"])][NUMBERS].set_axis(found[~dead].index))


def test_an_interruption_ends_the_workers_and_keeps_what_is_done(tmp_path: Path) -> None:
    def interrupt(standing: engine.Standing) -> None:
        if standing.done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.run(suite(tmp_path), tmp_path / "out", workers=1, watch=interrupt)
    assert not multiprocessing.active_children() and len(list((tmp_path / "out" / "rows").iterdir())) == 3
    assert run(suite(tmp_path), tmp_path / "out")[NUMBERS].equals(run(suite(tmp_path), tmp_path / "whole")[NUMBERS])


RUN = """
import sys
from pathlib import Path
from robust_if.evaluations.suites import engine
from robust_if.evaluations.suites.suite import Suite
engine.run(Suite.read(sys.argv[1]), Path(sys.argv[2]), workers=2, watch=lambda standing: print(standing.done, flush=True))
"""


def started(folder: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", RUN, str(folder / "mine.toml"), str(folder / "out")]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True)


def members(session: int) -> list[int]:
    """Processes of a session that still run."""
    found = subprocess.run(["ps", "-o", "pid=,stat=", "-s", str(session)], capture_output=True, text=True).stdout.split("\n")
    return [int(line.split()[0]) for line in found if line and "Z" not in line.split()[1]]


def test_a_run_that_is_killed_half_way_gives_the_same_table_and_leaves_no_worker(tmp_path: Path, calls: Callable[[], Counter[str]]) -> None:
    chosen = suite(tmp_path, SMALL, ("[0, 1]", "[0, 1, 2]"), ('label = "noise"', 'label = "noise"\npause = 0.3'))
    with started(tmp_path) as process:
        assert process.stdout is not None
        while process.stdout.readline().strip() not in ("5", ""):
            pass
        assert process.poll() is None
        process.kill()
    kept = {path.stem: path.read_bytes() for path in (tmp_path / "out" / "rows").glob("*.json")}
    assert 5 <= len(kept) < len(chosen.rows()) and not (tmp_path / "out" / "result.json").exists()
    deadline = time.monotonic() + 30
    while members(process.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not members(process.pid)
    calls()
    resumed = run(chosen, tmp_path / "out")
    defended = calls()
    assert sum(defended[f"{name} {seed}"] for name in ("undefended", "noisy") for seed in range(3)) == len(chosen.rows()) - len(kept)
    assert {name: (tmp_path / "out" / "rows" / f"{name}.json").read_bytes() for name in kept} == kept
    assert resumed[NUMBERS].equals(run(chosen, tmp_path / "whole")[NUMBERS])


def test_ray_gives_the_same_table_and_an_actor_that_dies_costs_its_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    chosen = suite(tmp_path, SMALL, ("tinyparts:undefended", "tinyparts:deadly"), ("[0.1, 0.3]", "0.1"), ("[0, 1]", "[1, 2]"))
    found = run(chosen, tmp_path / "ray", engine="ray", workers=1)
    dead = found["error"].notna()
    assert dead.sum() == 2 and found[dead]["error"].str.contains("the worker died").all()
    monkeypatch.setenv("TINY_MENDED", "1")
    alone = run(chosen, tmp_path / "here")
    assert found[~dead][NUMBERS].reset_index(drop=True).equals(alone[alone["id"].isin(found[~dead]["id"])][NUMBERS].reset_index(drop=True))


def test_workers_without_work_take_from_those_with_much(tmp_path: Path) -> None:
    text = SMALL.replace('name = "tinyparts:noisy"', 'name = "tinyparts:noisy"\nscale = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]')
    rows = [row for row in suite(tmp_path, text, ("[0.1, 0.3]", "0.1"), seeds=[0]).rows() if row.attack.label == "flips"]
    given: dict[int, list[str]] = {0: [], 1: []}

    class Crew:
        size = 2

        def __init__(self) -> None:
            self.hands: list[tuple[int, str]] = []

        def give(self, worker: int, row: Any) -> None:
            given[worker].append(row.id)
            self.hands.append((worker, row.id))

        def next(self) -> tuple[int, Record]:
            worker, name = self.hands.pop(0)
            return worker, Record(name)

    done = [row.id for row, record in engine._worked_out(rows, Crew()) if row.id == record.id]
    assert sorted(done) == sorted(row.id for row in rows) and len(rows) == 9
    assert min(map(len, given.values())) >= 4 and given[1] == [row.id for row in rows[-len(given[1]) :]]


def test_a_meter_leaves_out_what_it_is_told_to() -> None:
    meter = Meter()
    with meter.paused(), meter.running():
        with meter.paused():
            time.sleep(0.2)
            large = np.ones(30_000_000)
            del large
        time.sleep(0.05)
    assert 0.05 <= meter.seconds < 0.15 and meter.cpu_seconds < 0.1
    if sys.platform == "linux":
        other = Meter()
        with other.running():
            large = np.ones(30_000_000)
            del large
        assert other.added is not None and other.added > 2e8
        assert meter.added is not None and meter.added < 1e8


# two runs


def result(folder: Path, values: dict[str, Sequence[float | None]], **metrics: Sequence[float]) -> Path:
    """A run with the accuracies of every defence over seeds; ``None`` for a row that failed."""
    rows = [
        {
            "data": "d", "attack": "a", "defence": defence, "seed": seed, "error": "broken" if value is None else None,
            "metrics": {} if value is None else {"accuracy": value, **{name: each[seed] for name, each in metrics.items()}},
        }
        for defence, found in values.items() for seed, value in enumerate(found)
    ]  # fmt: skip
    folder.mkdir()
    (folder / "result.json").write_text(json.dumps({"rows": rows}))
    return folder


def test_a_planted_regression_is_found_and_noise_is_not(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    base = 0.8 + 0.05 * draw.normal(size=5)
    noise = base + 0.001 * draw.normal(size=5)
    moved = base + np.array([0.01, -0.01, 0.012, -0.011, 0.001])
    one = result(tmp_path / "one", {name: base.tolist() for name in ("same", "worse", "noisy", "better", "gone")}, mystery=[0.0, 1, 2, 3, 4])
    two = result(
        tmp_path / "two",
        {"same": base.tolist(), "worse": (noise - 0.02).tolist(), "noisy": moved.tolist(), "better": (noise + 0.02).tolist(), "new": base.tolist()},
        mystery=[5.0, 6, 7, 8, 9],
    )
    found = comparing.compare(one, two)
    verdicts = {each.defence: each.verdict for each in found.differences if each.metric == "accuracy"}
    assert verdicts == {"same": "same", "worse": "worse", "noisy": "unclear", "better": "better"}
    assert {each.verdict for each in found.differences if each.metric == "mystery"} == {"changed"}
    assert found.regressed and {key[2] for key in found.only_first} == {"gone"} and {key[2] for key in found.only_second} == {"new"}
    worse = next(each for each in found.differences if each.verdict == "worse")
    assert worse.paired and worse.low is not None and worse.high is not None and worse.low < worse.difference < worse.high < 0
    assert not comparing.compare(one, two, tolerance=0.1).regressed and not comparing.compare(one, one).regressed


def test_intervals_are_those_of_scipy(tmp_path: Path) -> None:
    from scipy.stats import ttest_ind, ttest_rel

    draw = np.random.default_rng(1)
    a, b, longer = draw.normal(size=4), draw.normal(size=4), draw.normal(size=7)
    found = comparing.compare(
        result(tmp_path / "one", {"x": a.tolist(), "y": a.tolist()}), result(tmp_path / "two", {"x": b.tolist(), "y": longer.tolist()})
    )
    for each, test in zip(found.differences, (ttest_rel(b, a), ttest_ind(longer, a, equal_var=False)), strict=True):
        expected = test.confidence_interval(0.95)
        assert np.allclose([each.low, each.high, each.p], [expected.low, expected.high, test.pvalue])
    assert [each.paired for each in found.differences] == [True, False]


def test_with_one_seed_only_a_tolerance_tells_worse_from_changed(tmp_path: Path) -> None:
    one, two = result(tmp_path / "one", {"x": [0.9], "y": [0.9]}), result(tmp_path / "two", {"x": [0.8], "y": [None]})
    found = comparing.compare(one, two)
    assert [each.verdict for each in found.differences] == ["changed"] and found.differences[0].low is None
    assert found.failed == ("d / a / y / 0",) and found.regressed
    assert [each.verdict for each in comparing.compare(one, two, tolerance=0.05).differences] == ["worse"]


def test_two_runs_that_cannot_be_compared_are_refused(tmp_path: Path) -> None:
    one, two = result(tmp_path / "one", {"x": [0.9]}), result(tmp_path / "two", {"y": [0.8]})
    with pytest.raises(ValueError, match="have no data, attack, defence and metric in common"):
        comparing.compare(one, two)
    with pytest.raises(ValueError, match="is not the folder of a finished `robust-if evaluate`"):
        comparing.compare(one, tmp_path)
    with pytest.raises(ValueError, match="tolerance: expected a number of at least 0, got -1"):
        comparing.compare(one, one, tolerance=-1)


def test_a_script_that_its_workers_cannot_import_is_told_so_at_once(tmp_path: Path) -> None:
    """Without the guard every worker would run the script again, and die before its first row."""
    (tmp_path / "small.toml").write_text(SMALL)
    script = tmp_path / "script.py"
    script.write_text(
        "from pathlib import Path\nfrom robust_if.evaluations.suites import engine\nfrom robust_if.evaluations.suites.suite import Suite\n"
        "engine.run(Suite.read('small.toml'), Path('out'), workers=1)\n"
    )
    here = str(Path(__file__).parents[1])
    ended = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, env={**os.environ, "PYTHONPATH": f"{here}:{Path(here).parent}"}, capture_output=True,
        text=True, check=False, timeout=120,
    )  # fmt: skip
    assert ended.returncode == 1
    assert "if __name__ == '__main__':" in ended.stderr
    assert not list((tmp_path / "out" / "rows").iterdir())
