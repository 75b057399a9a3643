"""cli.py: harden."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from robust_if import load_checkpoint
from robust_if.commands import options as shared
from robust_if.evaluations.hardening import softened
from robust_if.models import build
from robust_if.scores import Scores
from test_cli import invoke


def people(n: int, seed: int) -> pd.DataFrame:
    """Two classes that a weak feature tells apart safely and a strong one does not survive an attack."""
    draw = np.random.default_rng(seed)
    y = draw.permutation(np.arange(n) % 2)
    frame = pd.DataFrame({"strong": (2 * y - 1) * 0.3 + 0.05 * draw.normal(size=n), "safe": (2 * y - 1) + 0.8 * draw.normal(size=n)})
    frame["town"] = np.array(["A", "B"])[draw.integers(2, size=n)]
    return frame.assign(id=[f"p{seed}-{i}" for i in range(n)], label=np.where(y, "good", "bad"))


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("data")
    found = {name: folder / f"{name}.csv" for name in ("data", "valid", "test")}
    for seed, (path, n) in enumerate(zip(found.values(), (200, 60, 60), strict=True)):
        people(n, seed).to_csv(path, index=False)
    return found


def harden(paths: dict[str, Path], out: Path, *more: object, **options: object) -> Any:
    known: dict[str, object] = {
        **paths, "label": "label", "id": "id", "eps": 0.3, "out": out, "preset": "lite", "samples": 12, "epochs": 3, "steps": 2,
        "model": "logistic-regression", **{key.replace("_", "-"): value for key, value in options.items()},
    }  # fmt: skip
    return invoke("harden", *more, *(each for key, value in known.items() if value is not None for each in (f"--{key}", value)))


def test_it_trains_both_models_and_shows_both_under_attack(paths: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    found = harden(paths, out, remove=0.1)
    assert found.exit_code == 0, found.stderr
    result = json.loads((out / "result.json").read_text())
    assert list(result["models"]) == ["undefended", "pgd, all samples", "hardened"]
    assert all(text in found.stdout for text in ("undefended", "hardened", "difference", "lite: apgd-ce", "20 removed", "weights.csv"))
    assert sorted(path.name for path in out.iterdir()) == ["manifest.json", "model.safetensors", "result.json", "weights.csv"]
    weights = pd.read_csv(out / "weights.csv")
    assert weights["id"].tolist() == pd.read_csv(paths["data"])["id"].tolist()
    assert (weights["weight"] == 0).sum() == 20 and weights.loc[weights["weight"] == 0, "score"].min() >= weights.loc[
        weights["weight"] > 0, "score"
    ].max()
    before, after = (result["models"][name] for name in ("undefended", "hardened"))
    assert result["gain"]["robust"]["value"] == pytest.approx(after["accuracy"] - before["accuracy"])
    assert result["gain"]["robust"]["low"] <= result["gain"]["robust"]["value"] <= result["gain"]["robust"]["high"]
    load_checkpoint(out / "model.safetensors", build("logistic-regression", (4,), 2))


@pytest.mark.parametrize("action", ["reweigh", "relabel"])
def test_other_actions_change_weights_or_labels(paths: dict[str, Path], tmp_path: Path, action: str) -> None:
    found = harden(paths, tmp_path / "out", "--json", remove=0.1, action=action, method="plain")
    assert found.exit_code == 0, found.stderr
    result, weights = json.loads(found.stdout), pd.read_csv(tmp_path / "out" / "weights.csv")
    assert list(result["models"]) == ["undefended", "hardened"] and result["action"] == action
    if action == "reweigh":
        assert weights["weight"].between(0, 2).all() and result["changed"]["reweighed"] > 100 and result["changed"]["relabelled"] == 0
    else:
        assert (weights["weight"] == 1).all() and set(weights["new_label"]) <= {"good", "bad"}
        assert (weights["label"] != weights["new_label"]).sum() == result["changed"]["relabelled"]


@pytest.mark.parametrize("method", ["trades", "mart", "fast"])
def test_every_method_trains_with_sharpness(paths: dict[str, Path], tmp_path: Path, method: str) -> None:
    result = json.loads(harden(paths, tmp_path / "out", "--json", method=method, rho=0.05).stdout)
    assert result["method"] == method and result["rho"] == 0.05 and list(result["models"]) == ["undefended", "hardened"]
    assert result["changed"] == {"removed": 0, "relabelled": 0, "reweighed": 0} and result["action"] is None


def test_an_interrupted_run_resumes_to_the_same_result(paths: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"remove": 0.2, "rescore_every": 1}
    whole = json.loads(harden(paths, tmp_path / "whole", "--json", **options).stdout)
    assert 0 < whole["changed"]["removed"] <= 40 and whole["rescore_every"] == 1
    calls = [0]

    def interrupting(items: Iterable[Any], description: str) -> Iterator[Any]:
        for item in items:
            if description == "train":
                calls[0] += 1
                if calls[0] == 6:  # in the middle of the second training
                    raise KeyboardInterrupt
            yield item

    monkeypatch.setattr(shared, "progress", interrupting)
    broken = harden(paths, tmp_path / "out", "--json", **options)
    assert broken.exit_code == 1 and "interrupted" in broken.stderr
    again = json.loads(harden(paths, tmp_path / "out", "--json", **options).stdout)
    assert calls[0] == 7  # the sixth epoch alone was left
    assert {name: (each["accuracy"], each["clean_accuracy"]) for name, each in again["models"].items()} == {
        name: (each["accuracy"], each["clean_accuracy"]) for name, each in whole["models"].items()
    }
    assert (tmp_path / "out" / "weights.csv").read_bytes() == (tmp_path / "whole" / "weights.csv").read_bytes()
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "madry"}, "method: expected one of plain, pgd, trades, mart, fast, got 'madry'"),
        ({"method": "plain"}, "method: plain training without --rho and --remove is the undefended model itself"),
        ({"action": "drop", "remove": 0.1}, "action: expected one of remove, reweigh, relabel, got 'drop'"),
        ({"remove": 1.0}, "remove: expected a share of at least 0 and below 1, got 1.0"),
        ({"rescore_every": 2}, "rescore-every: while a model is trained samples can only be removed; give a share with --remove"),
        ({"rescore_every": 2, "remove": 0.1, "action": "relabel"}, "rescore-every: while a model is trained samples can only be removed"),
        ({"rescore_every": 0, "remove": 0.1}, "rescore-every: expected at least 1, got 0"),
        ({"rho": -1}, "rho: expected a number of at least 0, got -1.0"),
        ({"eps": 0}, "eps: expected a positive number, got 0.0"),
        ({"steps": 0}, "steps: expected at least 1, got 0"),
        ({"immutable": "height"}, "immutable: there is no column 'height'"),
        ({"estimator": "ip,fvm"}, "estimator: expected one name, got ip, fvm"),
        ({"samples": -3}, "samples: expected at least 1, got -3"),
    ],
)
def test_a_wrong_option_is_one_line_and_leaves_nothing(paths: dict[str, Path], tmp_path: Path, options: dict[str, Any], message: str) -> None:
    found = harden(paths, tmp_path / "out", **options)
    assert found.exit_code == 2 and found.stdout == "" and found.stderr.count("\n") == 1
    assert found.stderr.startswith("error:") and message in found.stderr
    assert not (tmp_path / "out").exists()


def test_the_folder_of_the_data_is_not_overwritten(paths: dict[str, Path]) -> None:
    found = harden(paths, paths["data"].parent, "--overwrite")
    assert found.exit_code == 2 and "out: " in found.stderr and paths["data"].exists()


def test_softened_weights_fall_with_the_score() -> None:
    values = np.array([4.0, 2.0, 1.0, 0.0, -1.0, -9.0])
    weights = softened(Scores(values, np.arange(6), "given"), 2 / 6)
    assert np.allclose(weights, [0, 0, 0.5, 1, 1.5, 2])
    assert np.allclose(softened(Scores(np.array([3.0, -1.0, -2.0, -3.0]), np.arange(4), "given"), 0.5), [0, 4 / 3, 5 / 3, 2])
    assert np.allclose(softened(Scores(np.array([-1.0, -2.0]), np.arange(2), "given"), 0.5), 2)
