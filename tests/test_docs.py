"""What the documentation shows runs, and what is public is documented."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import robust_if as rif
from robust_if.evaluations.attribution import lds
from robust_if.evaluations.detection import detection
from robust_if.models import logistic_regression, mlp
from test_architecture import ROOMS, is_command, modules

ROOT = Path(__file__).parents[1]
API = "\n".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs" / "api").glob("*.md")))


def python_blocks(path: Path) -> list[tuple[int, str]]:
    """The Python blocks of a page with the line at which each begins."""
    text = path.read_text(encoding="utf-8")
    return [(text.count("\n", 0, found.start(1)) + 1, found[1]) for found in re.finditer(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)]


def run_blocks(path: Path, names: dict[str, Any]) -> dict[str, Any]:
    """What the names stand for after all blocks of a page; a traceback names the page and its line."""
    blocks = python_blocks(path)
    assert blocks
    for line, block in blocks:
        exec(compile("\n" * (line - 1) + block, str(path), "exec"), names)
    return names


def test_the_readme_example_runs() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(600, 4, generator=generator)
    y = (x[:, 0] > 0).long()
    model = torch.nn.Linear(4, 2).eval()
    given = {"model": model, "train": (x[:400], y[:400]), "valid": (x[400:], y[400:]), "odd_inputs": x[:5], "labels": y[:400]}
    given |= {"X": x.numpy(), "y": y.numpy(), "sex": np.where(x[:, 1] > 0, "m", "f"), "X_new": x[:9].numpy()}
    names = run_blocks(ROOT / "README.md", given)
    assert len(set(names["worst"])) == 100
    assert names["weights"].sum() == 360
    assert names["weights"][names["worst"][:40]].sum() == 0
    assert set(names["suspects"].top(int(y[:400].sum()))) == set(np.flatnonzero(y[:400].numpy()))


def test_the_quickstart_runs_and_finds_the_wrong_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = run_blocks(ROOT / "docs" / "quickstart.md", {})
    assert np.isin(names["worst"], names["wrong"]).mean() > 0.8
    assert (tmp_path / "runs" / "digits" / "scores.csv").is_file()


@pytest.fixture
def fitted() -> dict[str, Any]:
    """A small trained task, its training and its validation data."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 4, generator=generator)
    y = (x[:, 0] + 0.5 * torch.randn(300, generator=generator) > 0).long()
    train, valid = rif.Samples((x[:200], y[:200])), rif.Samples((x[200:], y[200:]))
    return {"task": rif.fit(rif.Task(mlp((4,), 2, width=8).eval()), train, rif.Recipe(epochs=5)), "train": train, "valid": valid}


def test_the_page_on_influence_runs(fitted: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    names = run_blocks(ROOT / "docs" / "influence.md", fitted)
    assert "predicted correlation" in capsys.readouterr().out
    assert names["utility"].target == "utility" and names["robust"].target == "adversarial"
    assert names["matrix"].shape == (200, 100) and len(names["removal"].positions) == 20 and names["effects"].shape == (2,)


def test_the_page_on_trust_runs(fitted: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    names = run_blocks(ROOT / "docs" / "trust.md", fitted | {"task": rif.Task(logistic_regression((4,), 2).eval())})
    assert names["values"].shape == (20, 1) and names["effects"].shape == (10, 1)
    assert capsys.readouterr().out.count("Correlation(") == 3
    assert lds(names["scores"], names["subsets"], names["values"][:, 0]).value > 0.8


def test_the_page_on_scale_runs(fitted: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    monkeypatch.chdir(tmp_path)
    one = rif.score(fitted["task"], fitted["train"], target=rif.Utility(fitted["valid"]))
    names = run_blocks(ROOT / "docs" / "scale.md", fitted)
    assert np.allclose(names["scores"].values, one.values, atol=1e-7) and names["pairs"].shape == (200, 100)


def test_the_page_on_robustness_runs(fitted: dict[str, Any]) -> None:
    names = run_blocks(ROOT / "docs" / "robustness.md", fitted)
    assert len(names["scores"]) == 200 and names["hardened"].params().keys() == fitted["task"].params().keys()
    under = [float(names["target"].value(task, task.params())) for task in (fitted["task"], names["hardened"])]
    assert under[1] < under[0]


def test_the_page_on_language_models_runs() -> None:
    names = run_blocks(ROOT / "docs" / "language.md", {})
    assert names["matrix"].shape == names["related"].shape == (100, 5) and names["behind"].shape == (5, 5)
    assert (np.take_along_axis(names["matrix"].T, names["behind"], 1) == names["values"]).all()
    assert (names["values"][:, 0] == names["matrix"].min(0)).all()
    assert names["weights"].sum() == 70 and names["which"].tolist() == [True, False] and names["changed"][0].startswith("He gave the old woman")


def test_the_page_on_poisons_finds_the_poison(capsys: pytest.CaptureFixture[str]) -> None:
    names = run_blocks(ROOT / "docs" / "poisons.md", {})
    removed, poison = names["weights"] == 0, names["poisoned"].mask
    assert names["before"] > 0.8 and names["after"] < 0.02
    assert removed[poison].mean() > 0.95 and removed[~poison].mean() < 0.02
    right, wrong = (np.array([detection(names["asked"][name], poison).auroc for name in part]) for part in np.split(np.array([*names["asked"]]), 2))
    assert (right > 0.98).all() and (wrong < 0.95).all()  # which question is asked decides everything
    assert capsys.readouterr().out.count("AUROC") == 5


def test_the_page_on_fairness_runs(capsys: pytest.CaptureFixture[str]) -> None:
    draw = np.random.default_rng(0)
    n = 1200
    male, skill, age = draw.random(n) < 0.6, draw.normal(size=n), draw.integers(18, 70, size=n)
    y = torch.from_numpy((skill + 1.2 * male + 0.5 * draw.normal(size=n) > 0.5).astype(np.int64))
    sex, city = np.where(male, "m", "f"), np.where(age % 2, "A", "B")
    x = torch.from_numpy(np.column_stack([skill, male, (age - 44) / 15])).double()
    frame = pd.DataFrame({"skill": skill, "sex": sex, "age": age})
    train, valid = slice(0, 600), slice(600, n)
    task = rif.Task(torch.nn.Linear(3, 2).double().eval())
    given = {
        "rif": rif, "task": task, "x": x[train], "y": y[train], "x_valid": x[valid], "y_valid": y[valid], "sex_valid": sex[valid],
        "city_valid": city[valid], "predicted": (skill > 0)[valid].astype(int), "table": frame[train], "frame": frame[train],
        "frame_valid": frame[valid], "income": y[train].numpy(), "income_valid": y[valid].numpy(), "sex": sex[train],
    }  # fmt: skip
    names = run_blocks(ROOT / "docs" / "fairness.md", given)
    first, best = names["found"].rounds[0], names["found"].best
    assert abs(best.hard["true_positive_rate_parity"]) < 0.05 < abs(first.hard["true_positive_rate_parity"])
    assert "sex = m" in capsys.readouterr().out and np.isnan(names["harm"]).mean() == 0.25


@pytest.mark.parametrize("name", rif.__all__)
def test_a_public_name_is_documented(name: str) -> None:
    thing = getattr(rif, name)
    assert thing.__doc__, f"{name} has no docstring"
    assert not re.match(rf"{name}\(.*\)$", thing.__doc__.strip(), re.DOTALL), f"{name} has only the docstring that dataclass writes"
    assert f"`{name}`" in API, f"docs/api/index.md does not list {name}"
    assert f"::: {thing.__module__}\n" in API, f"no page of docs/api shows {thing.__module__}"


@pytest.mark.parametrize("module", [name for name, path in modules().items() if path.stem not in ("__init__", "__main__") and not is_command(name)])
def test_a_module_is_in_the_reference(module: str) -> None:
    if any(part.startswith("_") for part in module.split(".")[1:]):
        return
    package = module.rpartition(".")[0]
    shown = f"::: {module}\n" in API or (package not in ROOMS.values() and f"::: {package}\n" in API)
    assert shown, f"docs/api lacks the line '::: {module}'"


def test_the_readme_names_commands_that_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    commands = re.findall(r"\bmake ([a-z]+)\b(?=\s+#)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert commands == ["demo", "test"]
    assert all(f"\n{command}:" in makefile for command in commands)


def test_links_of_the_readme_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", (ROOT / "README.md").read_text(encoding="utf-8")):
        assert (ROOT / target).exists(), target
