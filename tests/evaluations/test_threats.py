"""evaluations/threats.py: what an attacker may do to encoded images and tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from robust_if import Task
from robust_if.attacks.evasion import APGD, PGD, Attack, OneHot, Threat, WholeNumbers
from robust_if.encoding import Encoder
from robust_if.evaluations.question import TARGETS, Asked, Question
from robust_if.evaluations.threats import Kept, threat_of
from robust_if.loading import Dataset, read
from robust_if.models import logistic_regression, mlp
from robust_if.sweep import fingerprint
from test_cli import invoke

N = 120


def people(n: int = N, seed: int = 0) -> pd.DataFrame:
    """Floats and whole numbers, some missing, categories with a rare and a missing one, booleans, free text and an id."""
    draw = np.random.default_rng(seed)
    frame = pd.DataFrame(
        {
            "height": draw.normal(170, 9, n),
            "age": draw.integers(20, 60, n),
            "children": draw.integers(0, 4, n),
            "income": np.where(np.arange(n) % 7 == 3, np.nan, draw.normal(30, 9, n)),
            "rooms": np.where(np.arange(n) % 9 == 4, np.nan, draw.integers(1, 200, n)),
            "city": draw.choice(["Rome", "Oslo", "Bern"], n),
            "job": np.where(np.arange(n) % 10 == 0, None, draw.choice(["cook", "nurse"], n)),
            "married": draw.random(n) > 0.5,
            "note": [f"the {draw.choice(['red', 'green'])} note number {i}" for i in range(n)],
        }
    )
    frame.loc[5, "city"] = "Ulm"
    return frame.assign(label=np.where(frame["height"] + draw.normal(0, 9, n) > 170, "yes", "no"))


def table(folder: Path, frame: pd.DataFrame | None = None, name: str = "people") -> Dataset:
    (people() if frame is None else frame).to_csv(folder / f"{name}.csv", index=False)
    return read(folder / f"{name}.csv")


def mask(column: pd.Series) -> Tensor:
    return torch.tensor(column.tolist())


def place(encoder: Encoder, data: Dataset, column: str, change: Any) -> list[int]:
    """The positions that differ when one column is changed."""
    frame = data.features
    assert isinstance(frame, pd.DataFrame)
    other = data.with_features(frame.assign(**{column: change(frame[column]).astype(frame[column].dtype)}))
    x, moved = (encoder.samples(each).batch(slice(None))[0] for each in (data, other))
    return (x != moved).any(0).nonzero()[:, 0].tolist()


def swap(city: pd.Series) -> pd.Series:
    """Other cities, where they are not rare."""
    return city.map({"Rome": "Oslo", "Oslo": "Bern", "Bern": "Rome", "Ulm": "Ulm"})


def attacked(threat: Threat, x: Tensor, attack: type[Attack] = PGD, seed: int = 0) -> Tensor:
    """The points of an attack on a network that is not trained."""
    torch.manual_seed(seed)
    task = Task(mlp((x.shape[1],), 2, width=16).eval())
    return attack(threat)(task, task.params(), (x, torch.arange(len(x)) % 2))


# Images


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_pixels_move_by_a_share_of_their_range_and_stay_within_it(tmp_path: Path, norm: Any) -> None:
    pixels = np.random.default_rng(0).integers(0, 200, (20, 6, 5, 3), dtype=np.uint8)
    pixels[0, 0, 0], pixels[1, 0, 0] = 0, 255
    np.savez(tmp_path / "images.npz", images=pixels, labels=np.arange(20) % 2)
    data = read(tmp_path / "images.npz")
    encoder = Encoder.fit(data)
    images = torch.from_numpy(np.asarray(data.features))
    mean, std = images.double().mean((0, 2, 3)).view(3, 1, 1), images.double().std((0, 2, 3), correction=0).view(3, 1, 1)
    threat = threat_of(encoder, data, eps=0.1, norm=norm)
    x = encoder.samples(data).batch(slice(None))[0]
    threat.check(x)
    torch.manual_seed(0)
    task = Task(mlp((3, 6, 5), 2, width=8).eval())
    found = PGD(threat)(task, task.params(), (x, torch.arange(20) % 2)).double() * std + mean
    assert found.min() >= -1e-6 and found.max() <= 1 + 1e-6 and found.min() < 1e-6
    change = (found - images).flatten(1)
    moved = change.abs().amax(1) if norm == "linf" else change.norm(dim=1)
    assert (moved <= 0.1 * (1 + 1e-5)).all() and moved.max() >= 0.1 * (1 - 1e-5)


# Tables


def test_numbers_move_by_standard_deviations_within_their_range(tmp_path: Path) -> None:
    data, frame = table(tmp_path), people()
    encoder = Encoder.fit(data)
    x = encoder.samples(data).batch(slice(None))[0]
    threat = threat_of(encoder, data, eps=0.5)
    points = attacked(threat, x)
    for name in ("height", "income"):
        (at,) = place(encoder, data, name, lambda column: column + 1)
        measured = mask(frame[name].notna())
        deviation = frame[name].fillna(frame[name].median()).std(ddof=0)
        got = (points - x)[measured, at].double() * deviation
        assert got.abs().max() == pytest.approx(0.5 * deviation, rel=1e-4)
        assert points[:, at].max() <= x[:, at].max() and points[:, at].min() >= x[:, at].min()


@pytest.mark.parametrize("attack", [PGD, APGD])
@pytest.mark.parametrize("eps", [0.1, 0.5, 1.0])
def test_whole_numbers_stay_whole_and_those_with_large_steps_stay(tmp_path: Path, attack: type[Attack], eps: float) -> None:
    data, frame = table(tmp_path), people()
    encoder = Encoder.fit(data)
    x = encoder.samples(data).batch(slice(None))[0]
    points = attacked(threat_of(encoder, data, eps=eps), x, attack)
    for name in ("age", "children", "rooms"):
        at = place(encoder, data, name, lambda column: column + 1)[0]
        measured = mask(frame[name].notna())
        deviation = frame[name].fillna(frame[name].median()).std(ddof=0)
        steps = (points - x)[measured, at].double() * deviation
        assert relative_to_whole(steps) < 1e-3 and steps.abs().max().round() == np.floor(eps * deviation + 1e-6)


def relative_to_whole(steps: Tensor) -> float:
    return float((steps - steps.round()).abs().max())


def test_missing_cells_their_indicators_text_and_immutable_columns_stay(tmp_path: Path) -> None:
    data, frame = table(tmp_path), people()
    encoder = Encoder.fit(data)
    x = encoder.samples(data).batch(slice(None))[0]
    for changeable in (False, True):
        threat = threat_of(encoder, data, eps=0.5, immutable=("age", "married"), categories=changeable)
        points = attacked(threat, x)
        for name in ("income", "rooms"):
            at, indicator = place(encoder, data, name, lambda column: column.where(column.isna(), np.nan))
            gone = mask(frame[name].isna())
            assert 0 < gone.sum() < len(gone) and torch.equal(points[gone, at], x[gone, at]) and torch.equal(points[:, indicator], x[:, indicator])
            assert not torch.equal(points[~gone, at], x[~gone, at])
        for name, change in (
            ("age", lambda column: column + 1),
            ("married", lambda column: ~column),
            ("note", lambda column: column.map(lambda _: "some green words")),
        ):
            at = place(encoder, data, name, change)
            assert at and torch.equal(points[:, at], x[:, at])
        city = place(encoder, data, "city", swap)
        assert torch.equal(points[:, city], x[:, city]) != changeable


def test_categories_that_may_change_stay_categories(tmp_path: Path) -> None:
    data, frame = table(tmp_path), people()
    encoder = Encoder.fit(data)
    x = encoder.samples(data).batch(slice(None))[0]
    threat = threat_of(encoder, data, eps=0.1, categories=True)
    points = attacked(threat, x)
    cities = place(encoder, data, "city", swap)
    jobs = place(encoder, data, "job", lambda column: column.map({"cook": "nurse", "nurse": "cook"}))
    flags = place(encoder, data, "married", lambda column: ~column)
    assert (len(cities), len(jobs), len(flags)) == (3, 2, 2)
    ordinary, known = mask(frame["city"].isin(["Rome", "Oslo", "Bern"])), mask(frame["job"].notna())
    for group, free in ((cities, ordinary), (jobs, known), (flags, torch.ones(N) > 0)):
        one_hot = torch.eye(len(group))[points[free][:, group].argmax(1)]
        assert torch.equal(points[free][:, group], one_hot) and (points[free][:, group] != x[free][:, group]).any()
        assert torch.equal(points[~free][:, group], x[~free][:, group])
    assert not ordinary.all() and not known.all()
    kinds = [type(each) for each in threat.project]
    assert kinds[:2] == [WholeNumbers, OneHot] and set(kinds[2:]) == {Kept}


def test_of_a_linear_model_the_worst_row_is_found(tmp_path: Path) -> None:
    """The logit is a sum over columns, so the worst row is the worst of every column on its own."""
    frame = people()[["height", "age", "city", "label"]].drop(index=5)
    data = table(tmp_path, frame)
    encoder = Encoder.fit(data)
    x, y = encoder.samples(data).batch(slice(None))
    task = Task(logistic_regression(encoder.shape, 2).double().eval())
    threat = threat_of(encoder, data, eps=0.3, categories=True)
    points = PGD(threat)(task, task.params(), (x, y))
    weight = task.params()["1.weight"]
    rise = torch.where(y[:, None] == 1, weight[0] - weight[1], weight[1] - weight[0])
    whole = np.floor(0.3 * frame["age"].std(ddof=0)) / frame["age"].std(ddof=0)
    for at, step in ((0, 0.3), (1, whole)):
        expected = (x[:, at] + step * rise[:, at].sign()).clamp(x[:, at].min(), x[:, at].max())
        close = (points[:, at] - expected).abs() < 1e-4
        assert close.all() if at == 0 else close.float().mean() > 0.9  # the range ends at whole numbers, the step may not
    assert torch.equal(points[:, 2:].argmax(1), rise[:, 2:].argmax(1))


def test_held_out_values_count_as_valid(tmp_path: Path) -> None:
    data, tall = table(tmp_path), people(30, seed=1)
    tall.loc[0, "height"] = 260.0
    held = table(tmp_path, tall, "tall")
    encoder = Encoder.fit(data)
    x = encoder.samples(held).batch(slice(None))[0]
    with pytest.raises(ValueError, match="bounds: expected inputs within"):
        threat_of(encoder, data, eps=0.1).check(x)
    threat_of(encoder, data, held, eps=0.1).check(x)


def test_dates_move_by_whole_days_unless_they_hold_a_time(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    draw = np.random.default_rng(0)
    days = pd.Timestamp("2020-01-01") + pd.to_timedelta(draw.integers(0, 99, 40), unit="D")
    frame = pd.DataFrame({"day": days, "time": days + pd.to_timedelta(draw.uniform(0, 9, 40), unit="h"), "label": np.arange(40) % 2})
    frame.loc[3, "day"] = pd.NaT
    frame.to_parquet(tmp_path / "dates.parquet")
    data = read(tmp_path / "dates.parquet")
    encoder = Encoder.fit(data)
    x = encoder.samples(data).batch(slice(None))[0]
    points = attacked(threat_of(encoder, data, eps=0.2), x)
    known = mask(frame["day"].notna())
    numbers = (frame["day"] - pd.Timestamp(0)) / pd.Timedelta(days=1)
    day = (points - x)[:, 0].double() * numbers.fillna(numbers.median()).std(ddof=0)
    assert torch.equal(points[~known], torch.cat([x[~known, :1], points[~known, 1:2], x[~known, 2:]], 1))
    assert relative_to_whole(day[known]) < 1e-3 and day.abs().max() > 1
    assert (points - x)[:, 1].abs().max() == pytest.approx(0.2, rel=1e-4)


def test_whole_numbers_beyond_single_precision_move_freely(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    data = table(tmp_path, pd.DataFrame({"cents": draw.integers(0, 10**9, 40), "label": np.arange(40) % 2}))
    encoder = Encoder.fit(data)
    threat = threat_of(encoder, data, eps=0.1)
    assert threat.project == () and attacked(threat, encoder.samples(data).batch(slice(None))[0]).shape == (40, 1)
    assert threat_of(encoder, data, eps=0.1, norm="l2").norm == "l2"


def test_a_column_with_one_value_and_gaps_stays(tmp_path: Path) -> None:
    frame = people()[["height", "label"]].assign(same=np.where(np.arange(N) % 2, 3.0, np.nan))
    data = table(tmp_path, frame)
    encoder = Encoder.fit(data)
    threat = threat_of(encoder, data, eps=0.1)
    assert int((torch.as_tensor(threat.eps) > 0).sum()) == 1


def test_unknown_categories_cannot_change(tmp_path: Path) -> None:
    data = table(tmp_path, people(8).assign(city=["Rome", "Oslo"] * 4))
    encoder = Encoder.fit(data)
    held = table(tmp_path, people(8).assign(city="Bern"), "other")
    threat_of(encoder, data, held, eps=0.1)
    threat_of(encoder, data, held, eps=0.1, categories=True, immutable=["city"])
    with pytest.raises(ValueError, match="categories: training does not know 'Bern' of column 'city'; name the column as immutable"):
        threat_of(encoder, data, held, eps=0.1, categories=True)


def test_the_threat_is_a_setting_that_is_recognised(tmp_path: Path) -> None:
    data = table(tmp_path)
    encoder = Encoder.fit(data)
    samples = encoder.samples(data)
    made = [threat_of(encoder, data, eps=0.2, immutable=names) for names in ((), (), ("age",))]
    marks = [fingerprint({}, samples, PGD(each)) for each in made]
    assert marks[0] == marks[1] != marks[2] and " at 0x" not in repr(made[0])


# What is wrong


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eps": 0.0}, "eps: expected a positive number, got 0"),
        ({"eps": float("inf")}, "eps: expected a positive number, got inf"),
        ({"eps": 0.1, "immutable": ["sex"]}, r"immutable: there is no column 'sex'; the columns are \['height', 'age', "),
        ({"eps": 0.1, "norm": "l2"}, "norm: whole numbers, missing cells and categories need 'linf', got 'l2'"),
        ({"eps": 0.01, "immutable": ["height", "income"]}, r"the finest column of whole numbers, 'rooms', has steps of 0\.01\d+"),
        ({"eps": 9.0, "immutable": ["height", "income", "age", "children", "rooms"]}, "eps: nothing can move by 9 .*; no column may"),
    ],
)
def test_what_does_not_fit_a_table_is_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    data = table(tmp_path)
    with pytest.raises(ValueError, match=message):
        threat_of(Encoder.fit(data), data, **options)


def test_texts_have_no_neighbourhood_and_images_no_columns(tmp_path: Path) -> None:
    texts = table(tmp_path, people()[["note", "label"]], "texts")
    with pytest.raises(ValueError, match="data: expected images or a table; texts have no neighbourhood"):
        threat_of(Encoder.fit(texts), texts, eps=0.1)
    np.savez(tmp_path / "images.npz", images=np.random.default_rng(0).random((8, 4, 4)), labels=np.arange(8) % 2)
    images = read(tmp_path / "images.npz")
    for options in ({"immutable": ["age"]}, {"categories": True}):
        with pytest.raises(ValueError, match=f"{next(iter(options))}: expected none, since images have no columns"):
            threat_of(Encoder.fit(images), images, eps=0.1, **options)


# Targets of files, and the command line


def test_targets_of_files_attack_what_may_move(tmp_path: Path) -> None:
    for name, seed in (("train", 0), ("valid", 1)):
        table(tmp_path, people(seed=seed), name)
    asked = Asked.of(Question(str(tmp_path / "train.csv"), "label", valid=str(tmp_path / "valid.csv"), model="logistic-regression"))
    assert TARGETS[:3] == ("utility", "adversarial", "robust_gap")
    clean, loss, gap = asked.targets(TARGETS[:3], eps=0.2, steps=3, immutable=["age"])
    task = asked.problem.task()
    values = [each.value(task, task.params()) for each in (clean, loss, gap)]
    assert values[2] > 0 and values[1] == pytest.approx(float(values[0] + values[2]), rel=1e-5)
    assert loss.attack.steps == 3 and float(loss.attack.threat.eps.max()) == pytest.approx(0.2)
    wider, categories = asked.targets(["adversarial", "robust_gap"], eps=0.2, steps=3, categories=True)
    assert wider.value(task, task.params()) > values[1] and categories.name == "robust_gap"


def test_the_command_line_takes_what_an_attacker_may_do(tmp_path: Path) -> None:
    for name, seed in (("train", 0), ("valid", 1)):
        table(tmp_path, people(seed=seed).drop(columns="note"), name)
    given = ("--data", tmp_path / "train.csv", "--valid", tmp_path / "valid.csv", "--model", "logistic-regression", "--epochs", 2)
    settings = ("--target", "adversarial,robust_gap", "--eps", 0.2, "--steps", 2, "--immutable", "age,job", "--categories")
    result = invoke("score", *given, *settings, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert list(pd.read_parquet(tmp_path / "out" / "scores.parquet")) == ["id", "ip:adversarial", "ip:robust_gap"]
    refused = invoke("score", *given, *settings, "--steps", 3, "--out", tmp_path / "out")
    assert refused.exit_code == 2 and "not empty" in refused.output
    for verb in ("score", "validate"):
        wrong = invoke(verb, *given, "--target", "robust_gap", "--immutable", "sex", "--out", tmp_path / verb)
        assert wrong.exit_code == 2 and "immutable: there is no column 'sex'" in " ".join(wrong.output.split())
