"""fairness/metrics.py, fairness/confusion.py: rates and gaps of hard predictions, against fairlearn and loops over samples."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adultlike import N, adult_like
from robust_if import Samples, Task
from robust_if.fairness.confusion import Confusion, labels
from robust_if.fairness.groups import Groups
from robust_if.fairness.metrics import COMPARED, RATES, gap, regression, signed_gaps, spread
from robust_if.fairness.targets import FairnessGap


def test_rates_are_those_of_fairlearn() -> None:
    metrics = pytest.importorskip("fairlearn.metrics")
    from sklearn.metrics import accuracy_score, precision_score

    y, predicted, frame = adult_like()
    weight = np.random.default_rng(1).uniform(0.1, 2, N)
    theirs = {
        "selection_rate": metrics.selection_rate, "true_positive_rate": metrics.true_positive_rate, "accuracy": accuracy_score,
        "false_positive_rate": metrics.false_positive_rate, "true_negative_rate": metrics.true_negative_rate,
        "false_negative_rate": metrics.false_negative_rate, "precision": precision_score,
    }  # fmt: skip
    by_group = metrics.MetricFrame(
        metrics=theirs, y_true=y, y_pred=predicted, sensitive_features=frame, sample_params={name: {"sample_weight": weight} for name in theirs}
    )  # fmt: skip
    groups = Groups.of(frame)
    ours = Confusion.of(y, predicted, groups, sample_weight=weight)
    for name in theirs:
        assert np.allclose(ours.rate(name), [by_group.by_group.loc[value, name] for value in groups.values], atol=1e-12), name
        assert np.isclose(ours.overall().rate(name)[0], by_group.overall[name], atol=1e-12), name


@pytest.mark.parametrize("method", ["between_groups", "to_overall"])
def test_gaps_are_those_of_fairlearn(method: Any) -> None:
    metrics = pytest.importorskip("fairlearn.metrics")
    y, predicted, frame = adult_like()
    weight = np.random.default_rng(1).uniform(0.1, 2, N)
    for notion in ("demographic_parity", "equal_opportunity", "equalized_odds"):
        for kind in ("difference", "ratio"):
            theirs = getattr(metrics, f"{notion}_{kind}")
            for extra in ({}, {"agg": "mean"}) if notion == "equalized_odds" else ({},):
                got = gap(notion, y, predicted, frame, method=method, ratio=kind == "ratio", sample_weight=weight, **extra)
                expected = theirs(y, predicted, sensitive_features=frame, method=method, sample_weight=weight, **extra)
                assert np.isclose(got, expected, atol=1e-12), (notion, kind)
    expected = metrics.MetricFrame(metrics=metrics.false_positive_rate, y_true=y, y_pred=predicted, sensitive_features=frame).difference(
        method=method
    )
    assert np.isclose(gap("false_positive_rate_parity", y, predicted, frame, method=method), expected, atol=1e-12)


@pytest.mark.parametrize("classes", [2, 4])
def test_every_rate_is_what_counting_samples_gives(classes: int) -> None:
    y, predicted, frame = adult_like(classes=classes)
    groups = Groups.of(frame)
    cells = Confusion.of(y, predicted, groups)
    for k in range(classes):
        for g, name in enumerate(groups.names):
            inside = groups.codes == g
            t, p, right = (y == k)[inside], (predicted == k)[inside], (y == predicted)[inside]
            expected = {
                "base_rate": t.mean(), "selection_rate": p.mean(), "accuracy": right.mean(), "error_rate": 1 - right.mean(),
                "true_positive_rate": p[t].mean(), "false_negative_rate": 1 - p[t].mean(), "false_positive_rate": p[~t].mean(),
                "true_negative_rate": 1 - p[~t].mean(), "precision": t[p].mean(), "negative_predictive_value": 1 - t[~p].mean(),
            }  # fmt: skip
            assert set(expected) == set(RATES)
            assert all(np.isclose(cells.rate(rate, k)[g], value, atol=1e-12) for rate, value in expected.items()), name


def test_a_rate_of_nothing_is_nan_and_no_gap_is_made_of_it(caplog: pytest.LogCaptureFixture) -> None:
    """Where fairlearn takes a missing true positive rate for 0, and reports a gap of one half."""
    metrics = pytest.importorskip("fairlearn.metrics")
    y, predicted, s = np.array([1, 1, 0, 0, 0, 0]), np.array([1, 0, 1, 0, 1, 0]), np.array(["a", "a", "a", "a", "b", "b"])
    assert metrics.equal_opportunity_difference(y, predicted, sensitive_features=s) == 0.5
    with caplog.at_level(logging.WARNING):
        assert np.isnan(gap("equal_opportunity", y, predicted, s)) and np.isnan(gap("equalized_odds", y, predicted, s))
    assert "left out where there is no true positive rate: sensitive_feature_0=b" in caplog.text
    rates = Confusion.of(y, predicted, Groups.of(s)).rate("true_positive_rate")
    assert rates[0] == 0.5 and np.isnan(rates[1])
    y3, p3, s3 = np.append(y, [1, 1]), np.append(predicted, [1, 1]), np.append(s, ["c", "c"])
    assert gap("equal_opportunity", y3, p3, s3) == 0.5  # of a and c
    crossed = Groups.of({"u": ["a", "a", "b"], "v": ["x", "y", "x"]})
    assert np.isnan(Confusion.of([1, 0, 1], [1, 0, 1], crossed).rate("selection_rate")).tolist() == [False, False, False, True]


def test_spread_leaves_nan_out() -> None:
    nan = np.nan
    rates = np.array([[0.2, nan, 0.5], [nan, nan, 0.5], [0.0, 0.0, 0.0]])
    assert np.allclose(spread(rates), [0.3, nan, 0], equal_nan=True) and np.allclose(spread(rates, ratio=True), [0.4, nan, nan], equal_nan=True)
    assert np.allclose(spread(rates, np.array([0.4, 0.5, 0.0])), [0.2, nan, 0], equal_nan=True)


class Fixed(torch.nn.Module):
    """Logits that stand in the inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.shift


@pytest.mark.parametrize("notion", COMPARED)
@pytest.mark.parametrize("method", ["between_groups", "to_overall"])
@pytest.mark.parametrize(("positive", "strata", "shrink"), [(1, False, 0.0), (2, True, 0.0), (None, True, 0.0), (None, False, 5.0)])
def test_signed_gaps_are_the_contrasts_of_the_target_as_the_temperature_goes_to_0(
    notion: str, method: Any, positive: int | None, strata: bool, shrink: float
) -> None:
    y, predicted, frame = adult_like(classes=3)
    groups, control = Groups.of(frame["race"]), Groups.of(frame["sex"])
    x = torch.nn.functional.one_hot(torch.from_numpy(predicted), 3).double()
    columns = [torch.from_numpy(each) for each in (y, groups.codes, *([control.codes] if strata else []))]
    task = Task(Fixed().eval())
    target = FairnessGap(
        Samples((x, *columns)), notion=notion, positive=positive, temperature=1e-3, method=method, smallest=1, shrink=shrink
    )  # fmt: skip
    expected = [float(each.value(task, task.params())) for each in target.signed()]
    got = signed_gaps(notion, y, predicted, groups, strata=control if strata else None, positive=positive, method=method, shrink=shrink)
    assert got.shape == (len(target.contrast_names),) and np.ptp(got) > 0
    assert np.allclose(got, expected, atol=1e-12)
    if not shrink:
        largest = gap(notion, y, predicted, groups, control_features=control if strata else None, positive=positive, method=method)
        assert np.isclose(largest, np.abs(got).max(), atol=1e-12)
        assert np.isclose(largest, float(target.value(task, task.params())), atol=1e-12)


@given(st.integers(0, 2**32 - 1), st.integers(1, 9))
def test_order_and_scale_of_weights_do_not_matter_and_whole_weights_repeat_samples(seed: int, factor: int) -> None:
    y, predicted, frame = adult_like(seed, n=200)
    draw = np.random.default_rng(seed)
    order, weight = draw.permutation(200), draw.integers(0, 4, 200)
    for notion in COMPARED:
        whole = gap(notion, y, predicted, frame, sample_weight=weight)
        moved = gap(notion, y[order], predicted[order], frame.iloc[order], sample_weight=factor * weight[order] / 7)
        copied = gap(notion, np.repeat(y, weight), np.repeat(predicted, weight), frame.loc[frame.index.repeat(weight)])
        assert np.isclose(whole, moved, atol=1e-12, equal_nan=True) and np.isclose(whole, copied, atol=1e-12, equal_nan=True)


def test_labels_may_be_strings_booleans_whole_floats_and_columns() -> None:
    y, predicted, frame = adult_like()
    expected = gap("equalized_odds", y, predicted, frame)
    words = np.array(["<=50K", ">50K"])
    assert gap("equalized_odds", words[y], pd.Series(words[predicted], dtype=object), frame, positive=">50K") == expected
    assert gap("equalized_odds", y == 1, predicted.astype(float)[:, None], frame, positive=True) == expected
    assert gap("equalized_odds", torch.from_numpy(y), list(predicted), frame) == expected
    assert gap("demographic_parity", np.ones(4, dtype=int), [0, 1, 1, 1], list("aabb")) == 0.5  # labels that show one class of two
    assert labels(pd.Series([True, False], dtype=object), "y").tolist() == [1, 0]


BAD: list[tuple[dict[str, Any], str]] = [
    ({"y_pred": [0.3, 0.7, 0.2, 0.9]}, "y_pred: expected labels, got numbers such as 0.3; decide first"),
    ({"y_pred": [[0.3, 0.7]] * 4}, r"y_pred: expected labels of shape \(n,\), got \(4, 2\)"),
    ({"y_pred": [0, 1, 1]}, "y_pred: expected one value for each of the 4 samples of y_true, got 3"),
    ({"y_pred": [0, 1, 2, 1]}, r"y_pred: \[2\] are not among the labels \[0, 1\]"),
    ({"y_pred": list("abba")}, "y_pred: expected labels as in y_true, such as 0, got 'a'"),
    ({"y_pred": np.array([0, 1, None, 1], dtype=object)}, "y_pred: 1 of 4 are missing"),
    ({"y_pred": np.array([0, 1, "a", 1], dtype=object)}, "y_pred: expected labels of one kind, got 1 strings among 4"),
    ({"y_true": [], "y_pred": []}, "y_true: expected labels of shape"),
    ({"sensitive_features": list("aab")}, "sensitive_features: expected one value for each of the 4 samples of y_true, got 3"),
    ({"control_features": list("aab")}, "control_features: expected one value for each of the 4 samples"),
    ({"positive": 3}, r"positive: expected one of the labels \[0, 1\], or None for each against the rest; got 3"),
    ({"positive": "1"}, "positive: expected one of the labels"),
    ({"sample_weight": [1, 1, 1]}, r"sample_weight: expected shape \(4,\), got \(3,\)"),
    ({"sample_weight": [1, 1, -1, 1]}, "sample_weight: expected finite numbers from 0 on"),
    ({"sample_weight": [0, 0, 0, 0]}, "sample_weight: expected finite numbers from 0 on, not all of them 0"),
    ({"notion": "loss_gap"}, "'loss_gap' compares losses or scores, which hard predictions do not have"),
    ({"notion": "parity"}, "notion: expected one of demographic_parity, .*; 'parity' is not known"),
    ({"method": "both"}, "method: expected 'between_groups' or 'to_overall', got 'both'"),
    ({"agg": "best"}, "agg: expected 'worst_case' or 'mean', got 'best'"),
]  # fmt: skip


@pytest.mark.parametrize(("bad", "message"), BAD)
def test_what_does_not_fit_is_refused(bad: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {"notion": "equalized_odds", "y_true": [0, 1, 0, 1], "y_pred": [0, 1, 1, 1], "sensitive_features": list("aabb")}
    assert gap(**good) == 1  # the negatives of b are taken for positive, those of a are not
    with pytest.raises(ValueError, match=message):
        gap(**{**good, **bad})


def test_errors_of_a_regression_by_group() -> None:
    groups = Groups.of({"u": ["a", "a", "b"], "v": ["x", "x", "y"]})
    found = regression([1.0, 2.0, 5.0], [2.0, 4.0, 5.5], groups, sample_weight=[1, 3, 2])
    expected = {"mean_outcome": [1.75, 5], "mean_prediction": [3.5, 5.5], "mae": [1.75, 0.5], "rmse": [np.sqrt(13 / 4), 0.5]}
    assert set(found) == set(expected)
    for name, values in expected.items():
        assert np.allclose(found[name][[0, 3]], values) and np.isnan(found[name][[1, 2]]).all()
    with pytest.raises(ValueError, match="y_pred: expected 3 finite numbers"):
        regression([1.0, 2.0, 5.0], [2.0, np.nan, 5.5], groups)
