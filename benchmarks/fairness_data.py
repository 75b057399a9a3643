"""The data sets of the fairness benchmark: training, validation and test samples with features, labels and sensitive groups.

All are read from the folder that ROBUST_IF_DATA names. Features are standardised on the training samples; categorical columns become one column per
level. ``fixed`` sets have one published split; all others are drawn anew for every seed.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn.model_selection import train_test_split

DATA = Path(os.environ.get("ROBUST_IF_DATA", "../shared/data"))


@dataclass(frozen=True, eq=False)
class Part:
    """n samples.

    Args:
        x: ``(n, d)`` features, float64.
        y: ``(n,)`` labels, 0 or 1, the favourable one.
        s: ``(n,)`` names of the sensitive groups. Of two groups, signed gaps are those of the last name in the alphabet minus the first.
    """

    x: NDArray[np.float64]
    y: NDArray[np.int64]
    s: NDArray[np.str_]

    def __len__(self) -> int:
        return len(self.y)

    def take(self, rows: NDArray[np.int64]) -> Part:
        return Part(self.x[rows], self.y[rows], self.s[rows])


@dataclass(frozen=True, eq=False)
class Split:
    """One division of a data set.

    Args:
        tests: by name; more than one where the distribution shifts.
        names: of the features.
        l2: penalty (l2 / 2) ‖θ‖² beside the sum of losses that the literature uses for logistic regression on these data.
    """

    data: str
    seed: int
    train: Part
    valid: Part
    tests: dict[str, Part]
    names: tuple[str, ...]
    l2: float = 1.0

    def standardised(self) -> Split:
        mean, scale = self.train.x.mean(0), self.train.x.std(0)
        scale[scale == 0] = 1.0

        def scaled(part: Part) -> Part:
            return replace(part, x=(part.x - mean) / scale)

        tests = {name: scaled(part) for name, part in self.tests.items()}
        return replace(self, train=scaled(self.train), valid=scaled(self.valid), tests=tests)


def adult_official(seed: int = 0) -> Split:
    """The first 75 % of adult.data to train on, the rest to validate, adult.test to test (Li and Liu 2022, arXiv 2202.00787)."""
    pool, given = _adult()
    a = int(np.ceil(0.75 * given))
    parts = (pool.take(np.arange(a)), pool.take(np.arange(a, given)), pool.take(np.arange(given, len(pool))))
    return Split("adult-official", seed, parts[0], parts[1], {"test": parts[2]}, _adult_names(), 2.2622).standardised()


def adult(seed: int) -> Split:
    """All 45,222 rows without a missing value, divided 50 : 17 : 33 as the official files are."""
    return _divided("adult", seed, _adult()[0], _adult_names(), (0.33, 0.17), 2.2622)


def adult_pool() -> tuple[Part, tuple[str, ...]]:
    """The 45,222 rows, not standardised, and the names of the features."""
    return _adult()[0], _adult_names()


def bank(seed: int) -> Split:
    """Bank marketing, 60 : 20 : 20; the groups are ages from 25 to 60 and others, and membership is a feature beside the age itself."""
    frame = pd.read_csv(DATA / "bank_marketing" / "bank-full-40004-no-divorced.csv.gz")
    within = frame["age"].between(25, 60)
    x, names = _encoded(frame.drop(columns="y").assign(within=within.astype(float)), both=True)
    whole = Part(x, (frame["y"] == "yes").to_numpy(np.int64), np.where(within, "25-60", "other"))
    return _divided("bank", seed, whole, names, (0.2, 0.2))


def acs(seed: int, *, race: bool = False) -> Split:
    """Income above 50,000: 75 : 25 of California 2014 to train and validate; tests in another place, at another time, and both.

    The tests are the same for all seeds. Groups are the sexes, or with ``race`` their intersections with White, Black, Asian and other.
    """
    names = ["AGEP", "COW", "SCHL", "MAR", "OCCP", "POBP", "RELP", "WKHP", "SEX", "RAC1P", "PINCP"]
    files = {"CA-2014": "train_CA_2014", "MI-2014": "test_MI_2014", "CA-2018": "test_CA_2018", "MI-2018": "test_MI_2018"}
    frames = {key: pd.read_csv(DATA / "acs_income_shift" / f"{file}.csv", header=None, names=names) for key, file in files.items()}
    joined = pd.concat(frames)
    races = joined["RAC1P"].map({1.0: "White", 2.0: "Black", 6.0: "Asian"}).fillna("other race")
    s = joined["SEX"] + ", " + races if race else joined["SEX"]
    features = joined.drop(columns="PINCP").astype({name: str for name in names if name not in ("AGEP", "WKHP", "PINCP")})
    x, columns = _encoded(features)
    where = joined.index.get_level_values(0)
    kept = np.flatnonzero(x[where == "CA-2014"].any(0))  # levels that occur elsewhere only say nothing
    whole = Part(x[:, kept], (joined["PINCP"] == "Y").to_numpy(np.int64), s.to_numpy(str))
    places = {key: whole.take(np.flatnonzero(where == key)) for key in files}
    ours = places.pop("CA-2014")
    train, valid = train_test_split(np.arange(len(ours)), test_size=0.25, random_state=seed, stratify=ours.y)
    return Split(
        "acs-sex-race" if race else "acs", seed, ours.take(train), ours.take(valid), places, tuple(np.array(columns)[kept]), 1.5
    ).standardised()


def celeba(seed: int, *, label: str = "Attractive", size: int | None = 20_000) -> Split:
    """One attribute from the other 38, groups by Male; the official partition, of which ``size`` training and a quarter as many validation rows."""
    frame, partition = _celeba()
    x = frame.drop(columns=[label, "Male"])
    whole = Part(x.to_numpy(np.float64), (frame[label] > 0).to_numpy(np.int64), np.where(frame["Male"] > 0, "Male", "Female"))
    rng = np.random.default_rng(seed)
    rows = [rng.permutation(np.flatnonzero(partition == at)) for at in (0, 1, 2)]
    train, valid = (rows[0], rows[1]) if size is None else (rows[0][:size], rows[1][: size // 4])
    name = "celeba" if label == "Attractive" else f"celeba-{label.partition('_')[0].lower()}"
    return Split(name, seed, whole.take(train), whole.take(valid), {"test": whole.take(np.sort(rows[2]))}, tuple(x), 15.16).standardised()


def german(seed: int) -> Split:
    """German credit, 600 : 200 : 200, groups by an age of 30 or more: a smoke test, for one standard error of a gap is about .07."""
    frame = pd.read_csv(DATA / "german_credit" / "german.data", sep=" ", header=None)
    x, names = _encoded(frame.drop(columns=20))
    whole = Part(x, (frame[20] == 1).to_numpy(np.int64), np.where(frame[12] >= 30, "age >= 30", "age < 30"))
    return _divided("german", seed, whole, names, (0.2, 0.2), 5.84843)


#: By name of the command line; the official split of Adult is one, so only its seed 0 is run.
LOADERS: dict[str, Callable[[int], Split]] = {
    "adult-official": adult_official,
    "adult": adult,
    "bank": bank,
    "acs": acs,
    "acs-sex-race": partial(acs, race=True),
    "celeba": celeba,
    "celeba-blond": partial(celeba, label="Blond_Hair"),
    "german": german,
}
FIXED = ("adult-official",)


def _divided(data: str, seed: int, whole: Part, names: tuple[str, ...], shares: tuple[float, float], l2: float = 1.0) -> Split:
    """Test and validation samples drawn at random, with as many positive labels in every part."""
    test, valid = shares
    rest, tested = train_test_split(np.arange(len(whole)), test_size=test, random_state=seed, stratify=whole.y)
    train, held = train_test_split(rest, test_size=valid / (1 - test), random_state=seed, stratify=whole.y[rest])
    return Split(data, seed, whole.take(train), whole.take(held), {"test": whole.take(tested)}, names, l2).standardised()


def _encoded(frame: pd.DataFrame, both: bool = False) -> tuple[NDArray[np.float64], tuple[str, ...]]:
    """Numbers as they are and one column per level; of two levels only the second, unless ``both``."""
    columns: dict[str, NDArray[np.float64]] = {}
    for name in frame:
        if pd.api.types.is_numeric_dtype(frame[name]):
            columns[str(name)] = frame[name].to_numpy(np.float64)
            continue
        levels = sorted(frame[name].unique())
        for level in levels[1:] if len(levels) == 2 and not both else levels:
            columns[f"{name}={level}"] = (frame[name] == level).to_numpy(np.float64)
    return np.column_stack(list(columns.values())), tuple(columns)


@cache
def _adult_read() -> tuple[Part, tuple[str, ...], int]:
    names = [
        "age", "workclass", "fnlwgt", "education", "education-num", "marital-status", "occupation", "relationship", "race", "sex", "capital-gain",
        "capital-loss", "hours-per-week", "native-country", "income",
    ]  # fmt: skip
    files = [
        pd.read_csv(DATA / "adult" / file, header=None, names=names, skipinitialspace=True, na_values="?", skiprows=skipped).dropna()
        for file, skipped in (("adult.data.gz", 0), ("adult.test.gz", 1))
    ]
    joined = pd.concat(files, ignore_index=True)
    x, columns = _encoded(joined.drop(columns=["fnlwgt", "income"]))
    y = joined["income"].str.startswith(">50K").to_numpy(np.int64)
    return Part(x, y, joined["sex"].to_numpy(str)), columns, len(files[0])


def _adult() -> tuple[Part, int]:
    """All rows in the order of the files, and how many are those of adult.data."""
    whole, _, given = _adult_read()
    return whole, given


def _adult_names() -> tuple[str, ...]:
    return _adult_read()[1]


@cache
def _celeba() -> tuple[pd.DataFrame, NDArray[np.int64]]:
    with zipfile.ZipFile(DATA / "celeba_attributes" / "list_attr_celeba.txt.zip") as file:
        frame = pd.read_csv(file.open("list_attr_celeba.txt"), sep=r"\s+", skiprows=1)
    partition = pd.read_csv(DATA / "celeba_attributes" / "list_eval_partition.csv.gz")
    return frame, partition["partition"].to_numpy(np.int64)
