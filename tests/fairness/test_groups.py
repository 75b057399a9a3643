"""fairness/groups.py: groups from columns of any kind."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch

from robust_if.fairness.groups import Groups, at_least_two

SEX = ["F", "M", "M", "F", "M"]
RACE = ["b", "a", "c", "a", "a"]


def of_samples(groups: Groups) -> list[str]:
    return [groups.names[code] for code in groups.codes]


@pytest.mark.parametrize(
    ("features", "name"),
    [
        (SEX, "sensitive_feature_0"),
        (np.array(SEX), "sensitive_feature_0"),
        (np.array(SEX, dtype=object)[:, None], "sensitive_feature_0"),
        (pd.Series(SEX), "sensitive_feature_0"),
        (pd.Series(SEX, name="sex"), "sex"),
        (pd.Series(SEX, name="sex", dtype="category"), "sex"),
        (pd.DataFrame({"sex": SEX}, index=[3, 1, 4, 1, 5]), "sex"),
        ({"sex": SEX}, "sex"),
        (pa.table({"sex": SEX}), "sex"),
        (pa.chunked_array([SEX]), "sensitive_feature_0"),
    ],
)
def test_one_column_of_any_kind(features: Any, name: str) -> None:
    groups = Groups.of(features)
    assert groups.features == (name,) and groups.values == (("F",), ("M",)) and groups.sizes.tolist() == [2, 3]
    assert of_samples(groups) == [f"{name}={each}" for each in SEX] and len(groups) == 5
    assert Groups.of(groups) is groups


@pytest.mark.parametrize(
    "values", [[0, 1, 1], [0.0, 1.0, 1.0], np.array([0, 1, 1], dtype=object), torch.tensor([0, 1, 1]), pd.Series([0, 1, 1], dtype="Int8"),
               pd.Series([0.0, 1.0, 1.0], dtype="category"), ["0", " 1", "1 "]]
)  # fmt: skip
def test_whole_numbers_are_the_same_groups_however_they_are_stored(values: Any) -> None:
    groups = Groups.of(values)
    assert groups.values == (("0",), ("1",)) and groups.codes.tolist() == [0, 1, 1]


def test_booleans_and_intervals_are_groups() -> None:
    assert Groups.of([True, False]).values == (("False",), ("True",))
    assert Groups.of(pd.cut(pd.Series([18.5, 40.2, 70.1], name="age"), [0, 30, 99])).names == ("age=(0, 30]", "age=(30, 99]")


def test_several_columns_mean_all_intersections_and_empty_ones_have_no_sample() -> None:
    groups = Groups.of(pd.DataFrame({"sex": SEX, "race": RACE}))
    assert groups.names == tuple(f"sex={sex}, race={race}" for sex in "FM" for race in "abc")
    assert groups.sizes.tolist() == [1, 1, 0, 2, 0, 1]
    assert of_samples(groups) == [f"sex={sex}, race={race}" for sex, race in zip(SEX, RACE, strict=True)]


def test_other_samples_get_the_same_groups() -> None:
    groups = Groups.of({"sex": SEX, "race": RACE})
    others = groups.of_others({"sex": ["M", "F"], "race": ["c", "b"]})
    assert of_samples(others) == ["sex=M, race=c", "sex=F, race=b"] and others.values == groups.values
    assert others.sizes.tolist() == [0, 1, 0, 0, 0, 1]
    assert of_samples(groups.of_others(np.array([["M", "c"]]))) == ["sex=M, race=c"]


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ({"sex": ["M"], "race": ["b"]}, r"test: the groups \['sex=M, race=b'\] have not been seen before; known are \['sex=F, race=a'"),
        ({"sex": ["M", "X"], "race": ["a", "a"]}, r"the groups \['sex=X, race=a'\] have not"),
        (["M"], r"test: expected the features \['sex', 'race'\], got \['test_0'\]"),
        ({"race": ["a"], "sex": ["M"]}, r"test: expected the features \['sex', 'race'\], got \['race', 'sex'\]"),
    ],
)
def test_unseen_groups_and_other_features_are_refused(features: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Groups.of({"sex": SEX, "race": RACE}).of_others(features, name="test")


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (["a", None, "b"], "sensitive_features: 1 of 3 values of 'sensitive_feature_0' are missing; drop these samples or give them a group"),
        (pd.Series([1, np.nan, np.nan], name="race"), "2 of 3 values of 'race' are missing"),
        ([0.5, 1.0, 2.0], "'sensitive_feature_0' holds measurements .3 different floats., expected groups; cut it"),
        (np.arange(21.0), "holds measurements .21 different floats."),
        ([1.0, np.inf], "holds measurements"),
        (pd.DataFrame({"age": pd.array([0.5, 1.5], dtype="Float64")}), "'age' holds measurements"),
        ([], "expected at least one sample"),
        (np.zeros((0, 2)), "expected at least one sample"),
        (pd.DataFrame(index=[1, 2]), r"at least one sample and one feature, got shape \(2, 0\)"),
        ("F", r"expected shape \(n,\) or \(n, k\), got \(\)"),
        (np.zeros((2, 2, 2)), r"expected shape \(n,\) or \(n, k\), got \(2, 2, 2\)"),
        ([1j, 2j], "expected categories in 'sensitive_feature_0', got complex"),
        (pd.to_datetime(["2020-01-01", "2021-01-01"]).to_series(name="day"), "expected categories in 'day', got datetime"),
        ({"sex": ["F", "M"], "race": ["a"]}, "expected columns of one length .n,., got shapes"),
        ({at: np.arange(400) for at in "ab"}, r"at most 100,000 intersections, got 160,000 of the features \{'a': 400, 'b': 400\}"),
    ],
)
def test_what_is_no_group_is_refused(features: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Groups.of(features)


def test_twenty_codes_as_floats_are_groups() -> None:
    assert len(Groups.of(np.arange(20.0)).values) == 20


def test_a_constant_feature_leaves_nothing_to_compare() -> None:
    groups = Groups.of({"sex": SEX})
    assert at_least_two(groups) is groups
    with pytest.raises(ValueError, match="sex: expected at least two groups, but all 3 samples are sex=F; a gap needs two"):
        at_least_two(Groups.of({"sex": ["F"] * 3}), "sex")
    with pytest.raises(ValueError, match="sensitive_features: expected at least two"):
        at_least_two(groups.of_others({"sex": ["M", "M"]}))
