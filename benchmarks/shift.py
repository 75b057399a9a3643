"""Does a repair survive a change of time and place? Incomes in California 2014, judged in California 2018, Michigan 2014 and Michigan 2018.

    python benchmarks/shift.py --splits 5            all rows, then the tables
    python benchmarks/shift.py sex unseen            some of them
    python benchmarks/shift.py --markdown            the tables of all rows that have been run

Logistic regression with an intercept on three quarters of California 2014, drawn by the seed; the last quarter is the validation data of a repair.
ExponentiatedGradient is fairlearn's, on the training samples alone and with its default bound of .01. Levels of a category with fewer than 30 samples
in California are one level. Rows: ``sex``; ``sex-race``, all 18 intersections with the census codes of race, each compared with everybody and shrunk
towards them by 30 samples; ``unseen``, where nobody of one race is among the training and validation samples, but in the tests they are.

The data (a sample of the ACS) are read from the folder that ROBUST_IF_DATA names. Results go to ``benchmarks/results/shift.jsonl``; seeds that are
there are not run again.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from fairlearn.reductions import DemographicParity, EqualizedOdds, ExponentiatedGradient, TruePositiveRateParity
from fairness_data import DATA
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split

from robust_if.fairness.audit import audit
from robust_if.fairness.groups import Groups
from robust_if.fairness.logistic import Logistic
from robust_if.fairness.metrics import gap, signed_gaps
from robust_if.fairness.repair import repair
from robust_if.fairness.targets import fairness_gap

PATH = Path(__file__).parent / "results" / "shift.jsonl"
FILES = {"CA-2014": "train_CA_2014", "CA-2018": "test_CA_2018", "MI-2014": "test_MI_2014", "MI-2018": "test_MI_2018"}
COLUMNS = ["AGEP", "COW", "SCHL", "MAR", "OCCP", "POBP", "RELP", "WKHP", "SEX", "RAC1P", "PINCP"]
RACES = ("White", "Black", "American Indian", "Alaska Native", "other tribes", "Asian", "Pacific Islander", "other race", "two or more")
NOTIONS = ("demographic_parity", "equal_opportunity", "equalized_odds")
CONSTRAINTS = {"demographic_parity": DemographicParity, "equal_opportunity": TruePositiveRateParity, "equalized_odds": EqualizedOdds}
METHODS = ("reweigh", "remove", "ExponentiatedGradient")
RARE, SHRINK, L2 = 30, 30.0, 1.5
UNSEEN = "Asian"
Labels = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Part:
    """Samples of one place and year with their sexes and races."""

    x: NDArray[np.float64]
    y: Labels
    features: pd.DataFrame

    def take(self, rows: Labels) -> Part:
        return Part(self.x[rows], self.y[rows], self.features.iloc[rows])


@cache
def places() -> dict[str, Part]:
    """All samples, with one column per level; of levels that are rare in California one for all."""
    joined = pd.concat([pd.read_csv(DATA / "acs_income_shift" / f"{file}.csv", header=None, names=COLUMNS) for file in FILES.values()], keys=FILES)
    where = joined.index.get_level_values(0)
    columns = [joined[name].to_numpy(np.float64)[:, None] for name in ("AGEP", "WKHP")]
    for name in [name for name in COLUMNS[:-1] if name not in ("AGEP", "WKHP")]:
        values = joined[name].astype(str)
        common = values[where == "CA-2014"].value_counts()
        values = values.where(values.isin(common.index[common >= RARE]), "rare")
        columns.append(pd.get_dummies(values, drop_first=values.nunique() == 2).to_numpy(np.float64))
    x, y = np.hstack(columns), (joined["PINCP"] == "Y").to_numpy().astype(np.int64)
    features = pd.DataFrame({"sex": joined["SEX"], "race": joined["RAC1P"].astype(int).map(lambda code: RACES[code - 1])}).reset_index(drop=True)
    whole = Part(x, y, features)
    return {name: whole.take(np.flatnonzero(where == name)) for name in FILES}


def divided(seed: int, without: str = "") -> tuple[Part, Part, dict[str, Part]]:
    """Training, validation and test samples, standardised; nobody of the race ``without`` among the first two."""
    ours, *_ = places().values()
    rows = np.flatnonzero(ours.features["race"] != without)
    train, valid = train_test_split(rows, test_size=0.25, random_state=seed, stratify=ours.y[rows])
    mean, scale = ours.x[train].mean(0), ours.x[train].std(0)
    scale[scale == 0] = np.inf  # a level that nobody in training has says nothing

    def scaled(part: Part) -> Part:
        return Part((part.x - mean) / scale, part.y, part.features)

    tests = {name: scaled(part) for name, part in places().items() if name != "CA-2014"}
    return scaled(ours.take(train)), scaled(ours.take(valid)), tests


def measure(part: Part, decided: Labels, notion: str, columns: list[str]) -> dict[str, float]:
    """Accuracy; the gap between all groups, between those with 30 samples of either label, and of every group, shrunk, to everybody."""
    groups = Groups.of(part.features[columns])
    found = {"accuracy": float(np.mean(decided == part.y)), "gap": gap(notion, part.y, decided, groups)}
    if len(columns) > 1:
        fewest = np.minimum(*(np.bincount(groups.codes[part.y == label], minlength=len(groups.values)) for label in (0, 1)))
        large = fewest[groups.codes] >= 30
        found["of large groups"] = gap(notion, part.y[large], decided[large], part.features.loc[large, columns])
        found["shrunk"] = float(np.abs(signed_gaps(notion, part.y, decided, groups, method="to_overall", shrink=SHRINK)).max())
    return {name: round(value, 5) for name, value in found.items()}


def fitted(method: str, notion: str, train: Part, valid: Part, columns: list[str], seed: int) -> tuple[Callable[[Any], Labels], dict[str, Any]]:
    """Predictions, and what there is to say about a fit."""
    if method == "ExponentiatedGradient":
        model = ExponentiatedGradient(LogisticRegression(C=1 / L2, max_iter=1000), CONSTRAINTS[notion](difference_bound=0.01))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.fit(train.x, train.y, sensitive_features=train.features[columns].agg(", ".join, axis=1))
        return lambda x: np.asarray(model.predict(x, random_state=seed), dtype=np.int64), {}
    learner = Logistic(train.x, train.y, L2)
    if method == "none":
        return learner.fit().predict, {}
    settings: dict[str, Any] = {"method": "to_overall", "shrink": SHRINK} if len(columns) > 1 else {}
    target = fairness_gap(notion, (torch.from_numpy(valid.x), torch.from_numpy(valid.y)), valid.features[columns], **settings)
    found = repair(learner, target, method)  # type: ignore[arg-type]
    return found.fitted.predict, {"touched": float(np.mean(found.touched)), "unmet": found.unmet}  # type: ignore[attr-defined]


def compared(seed: int, columns: list[str]) -> Iterator[dict[str, Any]]:
    train, valid, tests = divided(seed)
    base = fitted("none", "", train, valid, columns, seed)[0]
    for notion in NOTIONS:
        for method in ("none", *METHODS):
            began = time.process_time()
            predict, notes = (base, {}) if method == "none" else fitted(method, notion, train, valid, columns, seed)
            notes["seconds"] = round(time.process_time() - began, 2)
            for place, part in {"valid": valid, **tests}.items():
                yield {"notion": notion, "method": method, "place": place, **measure(part, predict(part.x), notion, columns), **notes}


def unseen(seed: int) -> Iterator[dict[str, Any]]:
    """One race is nowhere among training and validation samples; what the model decides about it, and what it would with it among them."""
    for trained, without in (("without", UNSEEN), ("with", "")):
        train, valid, tests = divided(seed, without)
        for method in ("none", "reweigh"):
            predict, notes = fitted(method, "demographic_parity", train, valid, ["sex"], seed)
            for place, part in tests.items():
                decided = predict(part.x)
                rates = audit(part.y, decided, part.features[["race"]], seed=seed).rates
                mine = rates[rates["group"] == f"race={UNSEEN}"].set_index("metric")
                values = mine["value"].astype(float).to_dict()
                found = {name: round(values[name], 5) for name in ("accuracy", "selection_rate", "true_positive_rate")}
                found["base_rate"] = round(float(part.y[part.features["race"] == UNSEEN].mean()), 5)
                yield {"method": method, "trained": trained, "place": place, "n": int(mine["size"].iloc[0]), **found, "notes": notes.get("unmet", "")}
        if without and seed == 0:
            try:
                Groups.of(train.features[["race"]]).of_others(tests["CA-2018"].features[["race"]])
            except ValueError as error:
                yield {"said": str(error)}


def small(seed: int) -> Iterator[dict[str, Any]]:
    """What is said of groups that are small or empty; sizes of all intersections."""
    train, valid, tests = divided(seed)
    columns = ["sex", "race"]
    known = Groups.of(pd.concat([part.features[columns] for part in places().values()]))  # so that audits know of groups that are absent
    try:
        fairness_gap("demographic_parity", (torch.from_numpy(valid.x), torch.from_numpy(valid.y)), valid.features[columns])
    except ValueError as error:
        yield {"said": f"fairness_gap, shrink=0: {error}"}
    predict = Logistic(train.x, train.y, L2).fit().predict
    for place, part in {"train": train, "valid": valid, **tests}.items():
        groups = known.of_others(part.features[columns])
        yield {"place": place, "sizes": dict(zip(groups.names, groups.sizes.tolist(), strict=True))}
        if place in tests:
            yield from ({"place": place, "said": f"{place}: {text}"} for text in audit(part.y, predict(part.x), groups).warnings)
            try:
                Groups.of(train.features[columns]).of_others(part.features[columns])
            except ValueError as error:
                yield {"place": place, "said": f"{place}, groups of the training samples: {error}"}


ROWS: dict[str, Callable[[int], Iterator[dict[str, Any]]]] = {
    "sex": lambda seed: compared(seed, ["sex"]),
    "sex-race": lambda seed: compared(seed, ["sex", "race"]),
    "unseen": unseen,
    "small": small,
}


def tables() -> str:
    """Markdown: means and standard errors over the splits; what was said of small groups at the first."""
    found = [json.loads(line) for line in PATH.read_text().splitlines()]
    lines = []
    for row, measures in (("sex", ["gap"]), ("sex-race", ["shrunk", "of large groups", "gap"])):
        frame = pd.DataFrame([each for each in found if each["row"] == row])
        if frame.empty:
            continue
        for measure_ in measures:
            shown = list(dict.fromkeys(frame["place"]))
            title = f"{row}: accuracy / {'gap' if measure_ == 'gap' else 'gap, ' + measure_}, {frame['seed'].nunique()} splits"
            lines += [f"\n{title}\n", f"| notion | method | {' | '.join(shown)} | touched | seconds |", "|---" * (len(shown) + 4) + "|"]
            for (notion, method), some in frame.groupby(["notion", "method"], sort=False):
                cells = []
                for place in shown:
                    at = some[some["place"] == place][["accuracy", measure_]]
                    (a, g), (da, dg) = at.mean(), at.sem()
                    cells.append(f"{a:.3f}±{da:.3f} / {g:.3f}±{dg:.3f}")
                touched = "" if some["touched"].isna().all() else f"{some['touched'].mean():.1%}"
                lines.append(f"| {notion} | {method} | {' | '.join(cells)} | {touched} | {some['seconds'].mean():.1f} |")
    frame = pd.DataFrame([each for each in found if each["row"] == "unseen" and "place" in each])
    if not frame.empty:
        names = ["n", "base_rate", "selection_rate", "true_positive_rate", "accuracy"]
        mean, error = (getattr(frame.groupby(["place", "method", "trained"])[names], kind)() for kind in ("mean", "sem"))
        lines += [
            f"\n{UNSEEN} at prediction, trained without and with them\n",
            "| place | method | trained | " + " | ".join(names) + " |",
            "|---" * 8 + "|",
        ]
        for at in mean.index:
            cells = [f"{mean.loc[at, 'n']:.0f}", *(f"{mean.loc[at, name]:.3f}±{error.loc[at, name]:.3f}" for name in names[1:])]
            lines.append(f"| {' | '.join(at)} | {' | '.join(cells)} |")
    sizes = {each["place"]: each["sizes"] for each in found if each["row"] == "small" and each["seed"] == 0 and "sizes" in each}
    if sizes:
        lines += ["\nSamples\n", "| group | " + " | ".join(sizes) + " |", "|---" * (len(sizes) + 1) + "|"]
        lines += [f"| {name} | " + " | ".join(str(each[name]) for each in sizes.values()) + " |" for name in next(iter(sizes.values()))]
    said = [each["said"] for each in found if each["seed"] == 0 and "said" in each]
    return "\n".join([*lines, "\nSaid\n", *(f"- {text}" for text in said)])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("row", nargs="*", choices=[*ROWS, []], help="rows to run; all by default")
    parser.add_argument("--splits", type=int, default=5)
    parser.add_argument("--table", "--markdown", action="store_true", help="only print the tables of all results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("robust_if").setLevel(logging.ERROR)  # what is left out is in the table of sizes
    known = {(each["row"], each["seed"]) for each in map(json.loads, PATH.read_text().splitlines())} if PATH.is_file() else set()
    for seed in range(0 if args.table else args.splits):
        for row in args.row or ROWS:
            if (row, seed) not in known and not (row == "small" and seed):
                records = [{"row": row, "seed": seed, **record} for record in ROWS[row](seed)]
                PATH.parent.mkdir(exist_ok=True)
                with PATH.open("a") as file:
                    file.writelines(json.dumps(record) + "\n" for record in records)
                print(f"{row} seed {seed}", flush=True)
    print(tables())
