"""cli.py: tradeoffs."""

from __future__ import annotations

import html
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn.datasets import load_digits

from robust_if.attacks.evasion import PGD, Threat
from robust_if.evaluations import traded
from robust_if.evaluations import tradeoffs as trading
from robust_if.evaluations.report.tradeoff_words import findings, verdict
from robust_if.evaluations.report.tradeoffs import html as page_of
from robust_if.evaluations.report.tradeoffs import render_tradeoffs
from robust_if.objectives import harmless
from robust_if.scores import Scores
from test_cli import invoke

ATTACK = "<script>alert(1)</script>"


def table(n: int, seed: int = 0) -> pd.DataFrame:
    """Incomes that favour men, with labels as Adult spells them, and a value that no page may run."""
    draw = np.random.default_rng(seed)
    male, skill = np.arange(n) % 5 > 1, draw.normal(size=n)
    frame = pd.DataFrame({"skill": skill.round(6), "proxy": (male + 0.5 * draw.normal(size=n)).round(6), "sex": np.where(male, "Male", "Female")})
    frame["note"] = np.where(draw.uniform(size=n) < 0.5, ATTACK, "b & c")
    frame["income"] = np.where(skill + 1.5 * male + 0.5 * draw.normal(size=n) > 0.4, " >50K", " <=50K")
    return frame


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "people.csv"
    table(600).to_csv(path, index=False)
    return path


def tradeoffs(data: Path, out: Path, *more: object, **options: object) -> Any:
    known: dict[str, object] = {
        "data": data, "label": "income", "target": "utility,demographic_parity", "sensitive": "sex", "model": "logistic-regression", "epochs": 3,
        "repeats": 2, "remove": 20, "estimator": "ip", "valid-fraction": 0.25, "test-fraction": 0.25, "out": out,
        **{key.replace("_", "-"): value for key, value in options.items()},
    }  # fmt: skip
    return invoke("tradeoffs", *more, *(each for key, value in known.items() if value is not None for each in (f"--{key}", value)))


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """One short attack in place of an ensemble."""
    whole = traded.robust_accuracy

    def short(task: Any, data: Any, threat: Threat, *, preset: str, checks: bool, radius: str | None) -> Any:
        assert preset == "lite"
        return whole(task, data, threat, preset=PGD(threat, steps=3, loss="margin"), checks=False, radius=radius)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(traded, "robust_accuracy", short)
        yield


@pytest.fixture(scope="module")
def done(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A finished run of a table and what it printed, with three targets in units of their own."""
    out = tmp_path_factory.mktemp("runs") / "out"
    found = tradeoffs(data, out, target="utility,adversarial,equal_opportunity", estimator="ekfac", eps=0.3)
    assert found.exit_code == 0, found.stderr
    return out, found.stdout


def test_every_choice_is_verified_beside_no_and_random_removal(done: tuple[Path, str]) -> None:
    out, said = done
    result = json.loads((out / "result.json").read_text())
    assert [each["name"] for each in result["objectives"]] == ["utility", "adversarial", "equal_opportunity"]
    names = [each["name"] for each in result["choices"]]
    assert names[0] == "none" and names[-1] == "random" and any("even mix" in name for name in names)
    assert {part for name in names for part in name.split(", ")} >= {f"{name} {how}" for name in ("utility", "adversarial") for how in ("alone",)}
    for each in result["choices"]:
        for objective in result["objectives"]:
            verified = each["verified"][objective["name"]]
            assert set(verified) == {"soft", "hard"} and len(verified["hard"]["runs"]) == 2
            assert verified["hard"]["low"] <= verified["hard"]["gain"] <= verified["hard"]["high"]
    none = result["choices"][0]["verified"]
    assert none["utility"]["hard"]["gain"] == 0 and none["adversarial"]["hard"]["value"] <= none["utility"]["hard"]["value"]
    assert result["attack"].startswith("L∞ radius 0.3 standard deviations,") and "pgd-3" in result["attack"]
    assert result["verdict"] in said and "Worst for utility" in said and "harm both" in said
    assert sorted(path.name for path in out.iterdir()) == [
        "choices.csv", "manifest.json", "model.safetensors", "report.html", "result.json", "scores.parquet"
    ]  # fmt: skip


def test_promises_are_sums_of_the_scores_of_what_is_removed(done: tuple[Path, str]) -> None:
    out, _ = done
    result, scores, weights = json.loads((out / "result.json").read_text()), pd.read_parquet(out / "scores.parquet"), pd.read_csv(out / "choices.csv")
    assert list(weights["id"]) == list(scores["id"]) and len(scores) == result["n_train"] == 337 and (scores["front"] == 0).any()
    for each in result["choices"][1:-1]:
        gone = 1 - weights[each["name"]].to_numpy()
        assert gone.sum() == pytest.approx(each["removed"]) and each["removed"] <= 20 + 1e-6
        for name, promised in each["predicted"].items():
            assert gone @ scores[f"ekfac:{name}"] == pytest.approx(promised, abs=1e-9)
        if all("no harm" in name for name in each["name"].split(", ")):
            assert min(each["predicted"].values()) >= -1e-9


def test_the_page_escapes_what_the_data_say_and_runs_nothing(done: tuple[Path, str]) -> None:
    page = (done[0] / "report.html").read_text()
    assert ATTACK not in page and html.escape(ATTACK) in page and "<script" not in page and "default-src 'none'" in page
    assert len(page) < 400_000 and "NaN" not in page and ">nan" not in page
    hostile = json.loads((done[0] / "result.json").read_text())
    for part in (hostile["objectives"][0], hostile["choices"][1], hostile["settings"], hostile):
        part.update({key: ATTACK for key in ("words", "command", "title", "estimator", "attack") if key in part})
    assert ATTACK not in page_of(hostile)


def test_the_page_is_made_anew_from_its_result_alone(done: tuple[Path, str]) -> None:
    before = (done[0] / "report.html").read_bytes()
    (done[0] / "report.html").unlink()
    assert render_tradeoffs(done[0]).read_bytes() == before
    broken = json.loads((done[0] / "result.json").read_text())
    del broken["pairs"]
    with pytest.raises(ValueError, match=r"missing the fields \['pairs'\]; expected what `robust-if tradeoffs` writes"):
        page_of(broken)


def test_json_is_one_object_and_a_finished_run_is_not_run_again(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = tradeoffs(data, tmp_path / "out", "--json", repeats=1)
    result = json.loads(first.stdout)
    assert result == json.loads((tmp_path / "out" / "result.json").read_text()) and result["units"] == "rank"
    assert "cannot tell an effect from chance" in result["verdict"]
    monkeypatch.setattr(trading, "fit", None)
    assert json.loads(tradeoffs(data, tmp_path / "out", "--json", repeats=1).stdout) == result
    other = tradeoffs(data, tmp_path / "out", "--json", repeats=1, remove=10)
    assert other.exit_code == 2 and "is not empty" in other.stderr


def test_an_interrupted_run_goes_on_where_it_stopped(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = json.loads(tradeoffs(data, tmp_path / "whole", "--json").stdout)
    fit, calls = trading.fit, []

    def failing(*args: Any, **kwargs: Any) -> Any:
        calls.append(0)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return fit(*args, **kwargs)

    monkeypatch.setattr(trading, "fit", failing)
    stopped = tradeoffs(data, tmp_path / "out", "--json")
    assert stopped.exit_code == 1 and "goes on from there" in stopped.stderr
    resumed = json.loads(tradeoffs(data, tmp_path / "out", "--json").stdout)
    trainings = 2 * (len(whole["choices"])) + 1  # the model that is scored, and every choice with two seeds
    assert len(calls) == trainings + 2  # the scored model is loaded once more, and the interrupted training begins again
    assert resumed["choices"] == whole["choices"] and resumed["pairs"] == whole["pairs"]


def test_images_are_attacked_again_after_every_training(tmp_path: Path) -> None:
    """Even where two models are equally accurate, the loss that the attack adds differs."""
    images, labels = load_digits(return_X_y=True)
    pixels = (images[:260] * 255 / 16).astype(np.uint8).reshape(-1, 8, 8)
    np.savez(tmp_path / "digits.npz", images=pixels, labels=labels[:260])
    found = tradeoffs(
        tmp_path / "digits.npz", tmp_path / "out", "--json", label=None, sensitive=None, target="utility,robust_gap", eps=0.05, remove=0.1,
        model="mlp", epochs=2, valid_fraction=0.3,
    )  # fmt: skip
    assert found.exit_code == 0, found.stderr
    result = json.loads(found.stdout)
    assert result["attack"].startswith("L∞ radius 0.05 of the pixel range,")  # not that of the encoded images
    assert result["k"] == int(0.1 * result["n_train"] + 1e-9) and result["kind"] == "image"
    assert [each["metric"] for each in result["objectives"]] == ["accuracy", "robust accuracy"]
    assert any(entry["image"].startswith("data:image/png") for group in result["samples"] for entry in group["entries"])
    assert len({tuple(each["verified"]["robust_gap"]["soft"]["runs"]) for each in result["choices"]}) == len(result["choices"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "utility"}, "target: expected 2 to 4 of utility, adversarial,"),
        ({"target": "utility,loss"}, "target: expected some of utility, adversarial,"),
        ({"target": "utility,utility"}, "target: expected each name once"),
        ({"sensitive": None}, "sensitive: demographic_parity needs a column"),
        ({"sensitive": "race"}, "sensitive: there is no column 'race'"),
        ({"target": "utility,adversarial", "eps": -1}, "eps: expected a positive number, got -1.0"),
        ({"remove": "0"}, "remove: expected a share between 0 and 1 such as 0.05, or a number of samples such as 200, that takes some and leaves"),
        ({"remove": "337"}, "that takes some and leaves some of 337, got '337'"),
        ({"remove": "half"}, "got 'half'"),
        ({"remove": "-3"}, "got '-3'"),
        ({"repeats": 0}, "repeats: expected at least 1, got 0"),
        ({"estimator": "loss"}, "estimator: loss looks at no target"),
        ({"estimator": "ip,fvm"}, "estimator: expected one name, got ip, fvm"),
        ({"model": "nope"}, "model: "),
        ({"target": "utility,equal_opportunity", "test-fraction": 0.05}, "test: data: expected at least 10 validation samples in every cell"),
    ],
)
def test_a_wrong_option_is_one_line_and_leaves_nothing(data: Path, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    found = tradeoffs(data, tmp_path / "out", **options)
    assert found.exit_code == 2 and found.stdout == "" and found.stderr.count("\n") == 1
    assert found.stderr.startswith("error:") and message in found.stderr
    assert not (tmp_path / "out").exists()


def test_test_data_that_decided_are_refused(data: Path, tmp_path: Path) -> None:
    table(100, 1).to_csv(tmp_path / "held.csv", index=False)
    found = tradeoffs(data, tmp_path / "out", valid=tmp_path / "held.csv", test=tmp_path / "held.csv")
    assert found.exit_code == 2 and "test: its samples are the validation data" in found.stderr
    assert tradeoffs(data, data.parent, "--overwrite").exit_code == 2 and data.exists()


def told(gains: dict[str, tuple[float, float]], **changes: Any) -> dict[str, Any]:
    """A result of two objectives with a half-width of 0.01 around every gain, by choice."""
    objectives = [
        {"name": "utility", "words": "utility", "value": "loss", "metric": "accuracy", "is_gap": False, "validation": 0.3},
        {"name": "demographic_parity", "words": "demographic parity", "value": "soft gap", "metric": "demographic parity gap", "is_gap": True,
         "validation": 0.2},
    ]  # fmt: skip
    choices = [
        {"name": name, "removed": 20.0, "predicted": None if name in ("none", "random") else {},
         "verified": {each["name"]: {"hard": {"value": 0.5, "gain": gain, "low": gain - 0.01, "high": gain + 0.01}}
                      for each, gain in zip(objectives, pair, strict=True)}}
        for name, pair in {"none": (0.0, 0.0), **gains, "random": (0.0, 0.0)}.items()
    ]  # fmt: skip
    pairs = [{"pair": ["utility", "demographic_parity"], "correlation": -0.4, "against": [0.25, 0.3]}]
    return {"objectives": objectives, "choices": choices, "k": 20, "pairs": pairs} | changes


@pytest.mark.parametrize(
    ("gains", "said"),
    [
        ({"utility alone": (0.03, -0.05), "even mix": (0.02, 0.0)},
         "Removing the 20 samples worst for utility raised accuracy by 3.0 points and widened the demographic parity gap by 5.0 points."),
        ({"even mix": (0.02, 0.03)},
         "Removing the 20 samples worst for the even mix raised accuracy by 2.0 points and cut the demographic parity gap by 3.0 points, and clearly "  # noqa: ISC004
         "cost nothing."),
        ({"demographic_parity at no harm": (-0.02, 0.0)},
         "No choice clearly helped; removing the 20 samples that promised most for demographic parity and no harm lowered accuracy by 2.0 points."),
        ({"utility alone": (0.005, 0.0)}, "1 removal of up to 20 samples was retrained; none clearly changed an objective on test data."),
    ],
)  # fmt: skip
def test_the_verdict_is_what_retraining_made_clear(gains: dict[str, tuple[float, float]], said: str) -> None:
    assert verdict(told(gains)).replace("\N{NO-BREAK SPACE}", " ") == said
    assert findings(told(gains))[0].replace("\N{NO-BREAK SPACE}", " ") == (
        "Utility and demographic parity rank samples against each other (rank correlation −0.4); 55 % of the samples harm one and help the other."
    )


def test_choices_with_the_same_weights_are_one_with_all_their_names() -> None:
    scores = [Scores(np.array(values, dtype=float), np.arange(3), "ip", name) for name, values in (("a", [2, 1, -1]), ("b", [1, -3, -2]))]
    found = trading.candidates(scores, 1)
    assert {name: each.weights.tolist() for name, each in found.items()} == {
        "a alone, b alone, even mix, a at no harm, b at no harm": [0, 1, 1]
    }  # fmt: skip
    assert harmless(scores, "a", k=2).predicted["b"] >= 0
