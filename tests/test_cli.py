"""cli.py: what a user types, sees, and gets."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

import robust_if
from robust_if import cli, training
from robust_if.commands import options as shared
from robust_if.evaluations import scenario

ROOT = Path(__file__).parents[1]
NAMES = np.array(["bird", "cat", "dog"])


def invoke(*args: object) -> Any:
    result = CliRunner().invoke(cli.app, [str(each) for each in args])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert "Traceback" not in result.output
    return result


def table(n: int, seed: int, wrong: int = 0) -> pd.DataFrame:
    """Numbers and categories with gaps, string ids and labels; the first ``wrong`` labels are those of another class."""
    draw = np.random.default_rng(seed)
    y = np.arange(n) % 3
    frame = pd.DataFrame(4 * np.eye(3)[y] + draw.normal(size=(n, 3)), columns=["height", "weight", "age"])
    frame["colour"] = np.array(["red", "green", None, "blue"], dtype=object)[draw.integers(4, size=n)]
    frame.loc[draw.uniform(size=n) < 0.1, "age"] = np.nan
    frame["id"] = [f"s{seed}-{i:03d}" for i in range(n)]
    frame["label"] = NAMES[np.where(np.arange(n) < wrong, (y + 1) % 3, y)]
    frame["truth"] = NAMES[y]
    return frame.sample(frac=1, random_state=seed) if wrong else frame.drop(columns="truth")


@pytest.fixture
def data(tmp_path: Path) -> dict[str, Path]:
    paths = {name: tmp_path / f"{name}.csv" for name in ("train", "valid", "test")}
    for seed, (path, n) in enumerate(zip(paths.values(), (90, 30, 45), strict=True)):
        table(n, seed, wrong=15 if seed == 0 else 0).to_csv(path, index=False)
    return paths


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Suggest each sample the next class instead of tuning for it."""
    monkeypatch.setattr(scenario, "_suggest", lambda prepared, *_: (prepared.problem.train.labels.numpy() + 1) % 3)


def command(paths: dict[str, Path], out: Path, *more: object, **options: object) -> list[object]:
    given = {
        "data": paths["train"], "valid": paths["valid"], "test": paths["test"], "out": out, "truth": "truth", "model": "logistic-regression",
        "epochs": 4, "optimizer": "sgd", "repeats": 1, "estimator": "loss,ip", "remove": 15,
        **{key.replace("_", "-"): value for key, value in options.items()},
    }  # fmt: skip
    return ["detect", *(each for key, value in given.items() if value is not None for each in (f"--{key}", value)), *more]


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def essence(result: dict[str, Any]) -> dict[str, Any]:
    """What of a result does not depend on the clock, the folder or the command."""
    kept = {key: value for key, value in result.items() if key not in ("files", "command", "settings")}
    return {**kept, "detection": [{key: value for key, value in row.items() if key != "seconds"} for row in result["detection"]]}


# The demo


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    out = tmp_path_factory.mktemp("demo") / "run"
    return invoke("demo", "--json", "--out", out), out


def test_the_demo_prints_one_object_and_nothing_else(demo: tuple[Any, Path]) -> None:
    result, out = demo
    assert result.exit_code == 0
    assert result.stdout.count("\n") == 1 and result.stdout.startswith("{")
    found = json.loads(result.stdout, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert {"detection", "accuracy", "removed", "files"} <= set(found)
    for row in found["detection"]:
        assert {"estimator", "target", "auroc", "average_precision", "tpr_at_1_fpr", "seconds"} <= set(row)
    assert {"before", "after", "random", "oracle"} <= set(found["accuracy"])
    assert [row["estimator"] for row in found["detection"]] == list(cli.DEMO)
    assert set(found["files"]) >= {"scores", "cleaned", "relabelled", "report", "model"}
    assert all(Path(path).is_file() for path in found["files"].values())
    assert found == json.loads((out / "result.json").read_text())


def test_the_demo_finds_the_wrong_labels_and_their_removal_helps(demo: tuple[Any, Path]) -> None:
    found = json.loads(demo[0].stdout)
    auroc = {row["estimator"]: row["auroc"] for row in found["detection"]}
    assert auroc["label-odds"] >= 0.99 and auroc["fvm"] >= 0.985 and abs(auroc["random"] - 0.5) < 0.08
    accuracy = found["accuracy"]
    assert accuracy["after"] > accuracy["before"] + 0.03 and accuracy["after"] > accuracy["random"]
    assert 180 <= found["removed"] <= 300


def test_the_demos_scores_have_one_column_per_estimator_and_target(demo: tuple[Any, Path]) -> None:
    found = json.loads(demo[0].stdout)
    frame = pd.read_parquet(found["files"]["scores"])
    names = [row["estimator"] + (f":{row['target']}" if row["target"] else "") for row in found["detection"]]
    assert frame.columns.tolist() == ["id", *names] and len(frame) == found["n_train"] == 1200
    assert frame["id"].tolist() == list(range(1200)) and np.isfinite(frame[names].to_numpy()).all()
    with np.load(found["files"]["cleaned"]) as file:
        assert len(file["labels"]) == 1200 - found["removed"]


def test_the_demo_again_returns_at_once(demo: tuple[Any, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scenario, "fit", lambda *_, **__: pytest.fail("trained again"))
    again = invoke("demo", "--json", "--out", demo[1])
    assert again.exit_code == 0 and again.stdout == demo[0].stdout


def test_the_demo_overwrites_no_other_data(tmp_path: Path) -> None:
    (tmp_path / "run-data").mkdir()
    np.savez(tmp_path / "run-data" / "train.npz", images=np.zeros(3))
    before = contents(tmp_path)
    result = invoke("demo", "--out", tmp_path / "run")
    assert result.exit_code == 2 and "out: " in result.stderr and "exists and holds something else" in result.stderr
    assert contents(tmp_path) == before


# What detect prints and writes


def test_detect_shows_the_worst_and_writes_a_cleaned_copy_in_the_files_format(data: dict[str, Path], tmp_path: Path, quick: None) -> None:
    result = invoke(*command(data, tmp_path / "out"))
    assert result.exit_code == 0, result.stderr
    samples = pd.read_parquet(tmp_path / "out" / "samples.parquet").merge(pd.read_parquet(tmp_path / "out" / "scores.parquet"))
    worst = samples.sort_values("loss", ascending=False, kind="stable")
    table_, rest = result.stdout.split("The twenty most harmful samples by loss")[1].split("Test accuracy after retraining")
    assert all(name in table_ for name in ("id", "label", "suggested", "score", "removed"))
    rows = [line for line in table_.splitlines() if "s0-" in line]
    assert len(rows) == 20
    for line, row in zip(rows, worst.itertuples(), strict=False):
        assert all(str(each) in line for each in (row.id, row.label, row.suggested_label, f"{row.loss:.4g}")), line
    assert "removed 15 of 90 samples (the highest 15 on loss)" in rest
    assert all(name in rest for name in ("all samples", "most harmful removed", "as many removed at random", "oracle"))

    removed = set(worst["id"][:15])
    cleaned = (tmp_path / "out" / "cleaned" / "train.csv").read_text().splitlines()
    assert cleaned == [line for line in data["train"].read_text().splitlines() if not any(each in line for each in removed)]
    assert len(cleaned) == 1 + 75 and str(tmp_path / "out" / "cleaned" / "train.csv") in result.stdout.replace("\n", "")
    found = json.loads((tmp_path / "out" / "result.json").read_text())
    assert found["detection"][0]["auroc"] > 0.85 and found["accuracy"]["before"] > 0.8


def test_the_defaults_find_the_wrong_labels_of_a_table(data: dict[str, Path], tmp_path: Path) -> None:
    given = ("--data", data["train"], "--truth", "truth", "--valid", data["valid"])
    result = invoke("detect", *given, "--out", tmp_path / "out", "--repeats", 1, "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert [row["estimator"] for row in found["detection"]] == ["label-odds", "fvm", "ip"] and found["decision"] == "automatic threshold"
    assert found["detection"][0]["auroc"] > 0.95 and found["threshold"] == 0
    assert found["n_test"] == 18 and found["n_train"] == 72 and not found["warnings"]


def test_without_a_truth_a_note_says_that_the_split_data_are_noisy(data: dict[str, Path], tmp_path: Path, quick: None) -> None:
    frame = pd.read_csv(data["train"]).drop(columns="truth")
    frame.to_csv(data["train"], index=False)
    result = invoke(*command(data, tmp_path / "out", truth=None, valid=None, test=None))
    assert result.exit_code == 0 and result.stderr.count("note: The ") == 2 and "validation data were split off" in result.stderr
    assert "Estimators (no truth given to judge them by)" in result.stdout


def test_ids_that_look_like_markup_are_printed_as_they_are(data: dict[str, Path], tmp_path: Path, quick: None) -> None:
    frame = pd.read_csv(data["train"])
    frame["id"] = [f"[/b]{i}[red]" for i in range(len(frame))]
    frame.to_csv(data["train"], index=False)
    result = invoke(*command(data, tmp_path / "out[bold]"))
    assert result.exit_code == 0, result.stderr
    assert result.stdout.count("[/b]") == 20 and "out[bold]" in result.stdout


def test_report_writes_the_page_anew(data: dict[str, Path], tmp_path: Path, quick: None) -> None:
    assert invoke(*command(data, tmp_path / "out")).exit_code == 0
    page = tmp_path / "out" / "report.html"
    before = page.read_bytes()
    page.unlink()
    result = invoke("report", tmp_path / "out")
    assert result.exit_code == 0 and result.stdout == f"wrote {page}\n" and page.read_bytes() == before


def test_the_same_command_returns_at_once_and_another_one_overwrites_only_when_told(
    data: dict[str, Path], tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    first = invoke(*command(data, out, "--json"))
    before = contents(out)
    with monkeypatch.context() as patch:
        patch.setattr(scenario, "fit", lambda *_, **__: pytest.fail("trained again"))
        assert invoke(*command(data, out, "--json")).stdout == first.stdout
        other = invoke(*command(data, out, "--json", epochs=5))
    assert other.exit_code == 2 and other.stdout == "" and "out: " in other.stderr and "--overwrite" in other.stderr
    assert contents(out) == before
    replaced = invoke(*command(data, out, "--json", "--overwrite", epochs=5))
    assert replaced.exit_code == 0 and json.loads(replaced.stdout)["settings"]["recipe"] != json.loads(first.stdout)["settings"]["recipe"]
    assert contents(out).keys() == before.keys()


@pytest.mark.parametrize("manifest", [None, "{}", "[1]", '"robust-if run"', "not json", '{"robust-if": "x"}'])
def test_a_folder_that_is_not_ours_is_never_overwritten(data: dict[str, Path], tmp_path: Path, manifest: str | None) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    if manifest is not None:
        (out / "manifest.json").write_text(manifest)
    before = contents(out)
    for more in ((), ("--overwrite",)):
        result = invoke(*command(data, out, *more))
        assert result.exit_code == 2 and "is not empty" in result.stderr
        assert contents(out) == before


# Help


def test_version_and_help() -> None:
    assert invoke("--version").stdout == f"robust-if {robust_if.__version__}\n"
    for args in ([], ["demo"], ["detect"], ["explain"], ["attack"], ["report"], ["estimators"]):
        result = invoke(*args, "--help")
        assert result.exit_code == 0 and "Usage:" in result.stdout


def test_the_list_of_estimators_names_each_one() -> None:
    result = invoke("estimators")
    assert result.exit_code == 0
    for name in (*cli.DEMO, "confident-learning", "knn", "self-influence", "valid-only"):
        assert any(line.split()[0] == name for line in result.stdout.splitlines() if line.strip()), name


# Bad input: one line, exit code 2, before any training


def refused(monkeypatch: pytest.MonkeyPatch, args: list[object], out: Path, *words: str) -> str:
    monkeypatch.setattr(training, "_epoch", lambda *_: pytest.fail("trained"))
    result = invoke(*args)
    assert result.exit_code == 2, (result.exit_code, result.output)
    assert result.stdout == "" and not out.exists()
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    assert all(word in lines[0] for word in words), (lines[0], words)
    return lines[0]


def rewrite(path: Path, **columns: Any) -> None:
    pd.read_csv(path).assign(**columns).to_csv(path, index=False)


def drop(path: Path, label: str) -> None:
    frame = pd.read_csv(path)
    frame[frame["label"] != label].to_csv(path, index=False)


BAD_TABLES: dict[str, tuple[Any, tuple[str, ...]]] = {
    "validation label unknown": (lambda d: rewrite(d["valid"], label=["fish", *["cat", "dog", "bird"] * 9, "cat", "dog"]), ("validation", "fish")),
    "test label unknown": (lambda d: rewrite(d["test"], label="fish"), ("test: labels out of range", "fish")),
    "class absent from validation": (lambda d: drop(d["valid"], "dog"), ("validation", "dog")),
    "empty validation": (lambda d: d["valid"].write_text(d["valid"].read_text().splitlines()[0] + "\n"), ("valid.csv", "no sample")),
    "empty file": (lambda d: d["valid"].write_text(""), ("valid.csv", "empty")),
    "column missing from validation": (lambda d: pd.read_csv(d["valid"]).drop(columns="age").to_csv(d["valid"]), ("valid: ", "age")),
    "infinite value": (lambda d: rewrite(d["train"], height=[np.inf, *range(89)]), ("height", "infinite")),
    "label missing": (lambda d: rewrite(d["train"], label=None), ("labels", "missing")),
    "id twice": (lambda d: rewrite(d["train"], id="a"), ("ids", "'a'")),
    "one class": (lambda d: (rewrite(d["train"], label="cat"), drop(d["valid"], "dog"), drop(d["valid"], "bird")), ("two classes", "cat")),
}


@pytest.mark.parametrize(("spoil", "words"), BAD_TABLES.values(), ids=BAD_TABLES)
def test_bad_tables_are_refused(data: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil: Any, words: tuple[str, ...]) -> None:
    spoil(data)
    refused(monkeypatch, command(data, tmp_path / "out"), tmp_path / "out", *words)


BAD_OPTIONS: dict[str, tuple[dict[str, object], tuple[str, ...]]] = {
    "unknown label column": ({"label": "species"}, ("label: ", "species")),
    "unknown id column": ({"id": "name"}, ("id: ", "name")),
    "unknown truth column": ({"truth": "gold"}, ("truth: ", "gold")),
    "unknown estimator": ({"estimator": "loss,magic"}, ("estimator: ", "magic", "label-odds")),
    "no estimator": ({"estimator": " , "}, ("estimator: ", "none")),
    "estimator twice": ({"estimator": "loss,ip,loss"}, ("estimator: ", "once")),
    "unknown model": ({"model": "transformer"}, ("model: ", "transformer", "logistic-regression")),
    "image model for a table": ({"model": "cnn"}, ("model: ", "images")),
    "no such module": ({"model": "no_such_module_here:make"}, ("model: ", "no_such_module_here")),
    "no such function": ({"model": "json:make"}, ("model: ", "make")),
    "no module": ({"model": "json:dumps"}, ("model: ", "json:dumps")),
    "remove nonsense": ({"remove": "a few"}, ("remove: ", "a few")),
    "remove too many": ({"remove": "91"}, ("remove: ", "91")),
    "remove a negative number": ({"remove": "-3"}, ("remove: ", "-3")),
    "remove more than all": ({"remove": "1.5"}, ("remove: ", "1.5")),
    "remove all": ({"remove": "1.0"}, ("remove: ", "1.0")),
    "remove every one": ({"remove": "90"}, ("remove: ", "90")),
    "remove infinity": ({"remove": "inf"}, ("remove: ", "inf")),
    "remove not a number": ({"remove": "nan"}, ("remove: ", "nan")),
    "validation share": ({"valid": None, "valid_fraction": 0.0}, ("valid-fraction: ", "0.0")),
    "validation share too large": ({"valid": None, "valid_fraction": 1.0}, ("valid-fraction: ", "1.0")),
    "validation share too small": ({"valid": None, "valid_fraction": 0.01}, ("valid-fraction: ", "0.01")),
    "test share": ({"test": None, "test_fraction": -0.2}, ("test-fraction: ", "-0.2")),
    "test share not a number": ({"test": None, "test_fraction": "nan"}, ("test-fraction: ", "nan")),
    "no epoch": ({"epochs": 0}, ("epochs: ", "0")),
    "no rate": ({"lr": 0}, ("lr: ", "0")),
    "no batch": ({"batch_size": 0}, ("batch_size: ", "0")),
    "no repeat": ({"repeats": 0}, ("repeats: ", "0")),
    "missing data": ({"data": "absent.csv"}, ("absent.csv", "no such file")),
    "missing validation": ({"valid": "absent.csv"}, ("absent.csv", "no such file")),
    "missing checkpoint": ({"checkpoint": "absent.safetensors"}, ("checkpoint: ", "absent.safetensors")),
    "unknown format": ({"data": __file__}, ("test_cli.py", "expected one of")),
}


@pytest.mark.parametrize(("options", "words"), BAD_OPTIONS.values(), ids=BAD_OPTIONS)
def test_bad_options_are_refused(
    data: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], words: tuple[str, ...]
) -> None:
    refused(monkeypatch, command(data, tmp_path / "out", **options), tmp_path / "out", *words)


def test_an_unknown_option_and_an_unknown_optimiser_are_refused(data: dict[str, Path], tmp_path: Path) -> None:
    for args in (command(data, tmp_path / "out", "--colour", "red"), command(data, tmp_path / "out", optimizer="lion"), ["detect"]):
        assert invoke(*args).exit_code == 2
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("what", ["absent", "empty"])
def test_a_report_of_nothing_is_refused(tmp_path: Path, what: str) -> None:
    (tmp_path / "empty").mkdir()
    result = invoke("report", tmp_path / what)
    assert result.exit_code == 2 and len(result.stderr.strip().splitlines()) == 1 and what in result.stderr


def images(path: Path, n: int = 30, size: int = 8, **changes: Any) -> Path:
    draw = np.random.default_rng(0)
    np.savez(path, **{"images": draw.uniform(size=(n, size, size)), "labels": np.arange(n) % 3, **changes})
    return path


def numbers(path: Path, **changes: Any) -> Path:
    np.savez(path, **{"x": np.random.default_rng(0).normal(size=(30, 4)), "labels": np.arange(30) % 3, **changes})
    return path


def archives(folder: Path, make: Any, **valid: Any) -> dict[str, Path]:
    return {name: make(folder / f"{name}.npz", **(valid if name == "valid" else {})) for name in ("train", "valid", "test")}


def gap(path: Path) -> Path:
    x = np.random.default_rng(0).normal(size=(30, 4))
    x[3, 2] = np.nan
    return numbers(path, x=x)


BAD_ARCHIVES: dict[str, tuple[Any, tuple[str, ...]]] = {
    "validation images of another size": (lambda f: archives(f, images, size=10), ("valid: images", "(1, 8, 8)", "(1, 10, 10)")),
    "tables to validate images": (lambda f: {**archives(f, images), "valid": numbers(f / "other.npz")}, ("valid: features", "expected images")),
    "validation with fewer features": (lambda f: archives(f, numbers, x=np.ones((30, 3))), ("valid: ", "x3")),
    "NaN in images": (lambda f: archives(f, images, images=np.full((30, 8, 8), np.nan)), ("images", "nan")),
    "infinity in features": (lambda f: archives(f, numbers, x=np.full((30, 4), np.inf)), ("30 samples hold NaN or infinity", "row 0")),
    "only NaN": (lambda f: {**archives(f, numbers), "train": numbers(f / "nan.npz", x=np.full((30, 4), np.nan))}, ("30 samples hold NaN", "row 0")),
    "one NaN": (lambda f: {**archives(f, numbers), "train": gap(f / "nan.npz")}, ("1 samples hold NaN", "row 3")),
    "Python objects": (lambda f: archives(f, numbers, x=np.array([[{}]] * 30, dtype=object)), ("valid.npz", "pickled")),
    "labels as objects": (lambda f: archives(f, numbers, labels=np.array([None] * 30, dtype=object)), ("valid.npz", "pickled")),
    "fewer labels": (lambda f: archives(f, numbers, labels=np.arange(29) % 3), ("labels", "(30,)")),
    "no archive": (lambda f: {**archives(f, numbers), "valid": (f / "text.npz", (f / "text.npz").write_text("x"))[0]}, ("text.npz", "archive")),
    "empty archive": (lambda f: archives(f, numbers, x=np.ones((0, 4)), labels=np.ones(0, dtype=int)), ("valid.npz", "no sample")),
}


@pytest.mark.parametrize(("make", "words"), BAD_ARCHIVES.values(), ids=BAD_ARCHIVES)
def test_bad_archives_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Any, words: tuple[str, ...]) -> None:
    refused(monkeypatch, command(make(tmp_path), tmp_path / "out", truth=None), tmp_path / "out", *words)


def test_an_image_of_another_size_in_a_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for split, size in (("train", 8), ("valid", 9), ("test", 8)):
        for i in range(6):
            folder = tmp_path / split / str(i % 2)
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((size, size), 40 * i, dtype=np.uint8)).save(folder / f"{i}.png")
    paths = {"train": tmp_path / "train", "valid": tmp_path / "valid", "test": tmp_path / "test"}
    refused(monkeypatch, command(paths, tmp_path / "out", truth=None, remove=1), tmp_path / "out", "valid: images", "(1, 9, 9)")


# Checkpoints and models of the user


def test_a_checkpoint_of_another_shape_is_refused(data: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "other.safetensors"
    save_file({"1.weight": torch.zeros(3, 2), "1.bias": torch.zeros(3)}, path)
    refused(monkeypatch, command(data, tmp_path / "out", checkpoint=path), tmp_path / "out", "checkpoint: ", "1.weight", "(3, 2)")
    save_file({"1.bias": torch.zeros(3)}, path)
    refused(monkeypatch, command(data, tmp_path / "out", checkpoint=path), tmp_path / "out", "checkpoint: ", "lacks '1.weight'")


def test_a_pickled_checkpoint_is_refused_unopened(data: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"1.weight": torch.zeros(3, 7)}, tmp_path / "model.pt")
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("opened"))
    args = command(data, tmp_path / "out", checkpoint=tmp_path / "model.pt")
    refused(monkeypatch, args, tmp_path / "out", "checkpoint: ", "Pickled", "safetensors.torch.save_file")


def test_a_checkpoint_is_scored_instead_of_a_new_model(data: dict[str, Path], tmp_path: Path, quick: None) -> None:
    assert invoke(*command(data, tmp_path / "first")).exit_code == 0
    again = invoke(*command(data, tmp_path / "second", checkpoint=tmp_path / "first" / "model.safetensors", seed=5))
    assert again.exit_code == 0, again.stderr
    one, two = (pd.read_parquet(tmp_path / name / "scores.parquet") for name in ("first", "second"))
    pd.testing.assert_frame_equal(one, two, check_exact=True)
    assert (tmp_path / "first" / "model.safetensors").read_bytes() == (tmp_path / "second" / "model.safetensors").read_bytes()


MODELS = """
import torch
from torch import nn

def small(shape, classes):
    return nn.Sequential(nn.Linear(shape[0], 6), nn.Tanh(), nn.Linear(6, classes))

def fails(shape, classes):
    raise RuntimeError("no memory for that\\nat all")

def takes_nothing():
    return nn.Linear(2, 2)

def other_classes(shape, classes):
    return nn.Linear(shape[0], classes + 1)

def other_inputs(shape, classes):
    return nn.Linear(shape[0] + 1, classes)

class Pair(nn.Linear):
    def forward(self, x):
        return super().forward(x), x

def returns_a_pair(shape, classes):
    return Pair(shape[0], classes)

class Bare(nn.Module):
    def __init__(self, size, classes):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size, classes))

    def forward(self, x):
        return x @ self.weight

def cannot_start_afresh(shape, classes):
    return Bare(shape[0], classes)
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module with models in the working directory; its name is new to the interpreter."""
    name = f"models_of_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    return name


def test_the_users_own_model_is_trained_and_scored(data: dict[str, Path], tmp_path: Path, own: str, quick: None) -> None:
    path = list(sys.path)
    result = invoke(*command(data, tmp_path / "out", "--json", model=f"{own}:small", epochs=12))
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["model"] == f"{own}:small" and found["accuracy"]["before"] > 0.6 and sys.path == path


def test_a_model_that_only_some_estimators_can_use_is_used_by_those(data: dict[str, Path], tmp_path: Path, own: str, quick: None) -> None:
    assert invoke(*command(data, tmp_path / "out", model=f"{own}:cannot_start_afresh")).exit_code == 0


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("fails", ("fails failed: RuntimeError: no memory",)),
        ("takes_nothing", ("failed: TypeError",)),
        ("other_classes", ("one output per class, shape (B, 3), got (2, 4)",)),
        ("other_inputs", ("failed: RuntimeError",)),
        ("returns_a_pair", ("one output per class", "tuple")),
        ("cannot_start_afresh", ("no reset_parameters()",)),
    ],
)
def test_a_model_that_fails_is_refused(
    data: dict[str, Path], tmp_path: Path, own: str, monkeypatch: pytest.MonkeyPatch, function: str, words: tuple[str, ...]
) -> None:
    args = command(data, tmp_path / "out", model=f"{own}:{function}", estimator="loss,label-odds")
    refused(monkeypatch, args, tmp_path / "out", "model: ", *words)


def test_a_module_that_cannot_be_imported_is_refused(data: dict[str, Path], tmp_path: Path, own: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / f"broken_{own}.py").write_text("def make(shape, classes:\n")
    refused(monkeypatch, command(data, tmp_path / "out", model=f"broken_{own}:make"), tmp_path / "out", "model: ", f"broken_{own}", "SyntaxError")


# Interruptions


class Bars:
    """Stands in for the progress bars: remembers what was done, and may interrupt the n-th item of the k-th bar of a name."""

    def __init__(self, name: str = "", bar: int = 0, item: int = 0) -> None:
        self.name, self.bar, self.item = name, bar, item
        self.done: list[str] = []
        self.begun: dict[str, int] = {}

    def __call__(self, items: Iterable[Any], description: str, **_: Any) -> Iterator[Any]:
        bar = self.begun.get(description, 0)
        self.begun[description] = bar + 1
        for position, item in enumerate(items):
            if (description, bar, position) == (self.name, self.bar, self.item):
                raise KeyboardInterrupt
            yield item
            self.done.append(description)


WHOLE = {"train": 6 * 4, "loss": 1, "ip-utility": 1}  # the model and five retrainings of four epochs
STOPS: dict[str, tuple[tuple[str, int, int], dict[str, int]]] = {
    "the first epoch": (("train", 0, 0), {}),
    "training": (("train", 0, 2), {"train": 2}),
    "the first estimator": (("loss", 0, 0), {"train": 4}),
    "the second estimator": (("ip-utility", 0, 0), {"train": 4, "loss": 1}),
    "retraining": (("train", 2, 1), {"train": 9, "loss": 1, "ip-utility": 1}),
}


@pytest.mark.parametrize(("stop", "saved"), STOPS.values(), ids=STOPS)
def test_an_interrupted_run_keeps_its_work_and_the_same_command_ends_like_one_that_was_not(
    data: dict[str, Path], tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch, stop: tuple[str, int, int], saved: dict[str, int]
) -> None:
    whole, first, second = Bars(), Bars(*stop), Bars()
    monkeypatch.setattr(shared, "track", whole)
    expected = invoke(*command(data, tmp_path / "whole", "--json"))
    assert {name: whole.done.count(name) for name in WHOLE} == WHOLE

    monkeypatch.setattr(shared, "track", first)
    broken = invoke(*command(data, tmp_path / "out", "--json"))
    assert broken.exit_code == 1 and broken.stdout == ""
    assert "interrupted" in broken.stderr and "the same command" in broken.stderr and len(broken.stderr.strip().splitlines()) == 1
    assert {name: first.done.count(name) for name in saved} == saved

    other = invoke(*command(data, tmp_path / "out", "--json", epochs=5))
    assert other.exit_code == 2 and "is not empty" in other.stderr

    monkeypatch.setattr(shared, "track", second)
    resumed = invoke(*command(data, tmp_path / "out", "--json"))
    assert resumed.exit_code == 0, resumed.stderr
    assert {name: second.done.count(name) for name in WHOLE} == {name: count - saved.get(name, 0) for name, count in WHOLE.items()}
    assert essence(json.loads(resumed.stdout)) == essence(json.loads(expected.stdout))
    frames = [pd.read_parquet(tmp_path / name / "scores.parquet") for name in ("whole", "out")]
    pd.testing.assert_frame_equal(*frames, check_exact=True)
    assert not (tmp_path / "out" / "work").exists()


def test_label_odds_resume_inside_their_folds(data: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"estimator": "label-odds", "remove": "auto"}
    expected = invoke(*command(data, tmp_path / "whole", "--json", **options))
    monkeypatch.setattr(shared, "track", Bars("label-odds round 2", 0, 2))
    assert invoke(*command(data, tmp_path / "out", "--json", **options)).exit_code == 1
    epochs: list[int] = []
    epoch = training._epoch
    monkeypatch.setattr(training, "_epoch", lambda *args: epochs.append(1) or epoch(*args))  # type: ignore[func-returns-value]
    resumed = invoke(*command(data, tmp_path / "out", "--json", **options))
    assert len(epochs) == 3 * 15 + 5 * 4  # the other three folds and the five retrainings
    assert essence(json.loads(resumed.stdout)) == essence(json.loads(expected.stdout))


# As a program of its own


def test_an_error_of_the_program_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    program = "from robust_if.cli import app; app()"
    args = [sys.executable, "-c", program, "detect", "--data", "absent.csv", "--out", str(tmp_path / "out")]
    done = subprocess.run(args, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "error: absent.csv: there is no such file or folder\n"
