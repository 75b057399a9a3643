"""fairness/targets.py, notions.py, cells.py, leaks.py: gaps between groups as targets, against slow references."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from fairlearn import metrics as fairlearn
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import softmax
from torch import Tensor, nn

from cases import relative
from oracles import flat, full_gradient
from robust_if import InnerProduct, Loss, Plain, Samples, Task, Tuning, Utility
from robust_if.fairness.notions import NOTIONS
from robust_if.fairness.targets import Contrast, FairnessGap, fairness_gap
from robust_if.models import mlp
from robust_if.sweep import fingerprint
from robust_if.task import Batch

N = 90
CLASSIFIER = [name for name in NOTIONS if name != "mean_prediction_gap"]


def table(seed: int = 0, n: int = N, classes: int = 3) -> tuple[Tensor, Tensor, np.ndarray, np.ndarray]:
    """Features, labels, three groups and two strata; the rarest cell has a few samples."""
    draw = np.random.default_rng(seed)
    s, c = draw.choice(["a", "b", "c"], n, p=[0.5, 0.3, 0.2]), draw.choice(["u", "v"], n)
    x = draw.normal(size=(n, 4)) + (s == "b")[:, None] - 0.5 * (c == "u")[:, None]
    return torch.from_numpy(x), torch.from_numpy(np.arange(n) % classes), s, c


def task(classes: int = 3, seed: int = 0) -> Task:
    torch.manual_seed(seed)
    return Task(mlp((4,), classes, width=6).double().eval())


def made(notion: str, *, control: bool = False, smallest: int = 1, **settings: Any) -> FairnessGap:
    x, y, s, c = table()
    return fairness_gap(notion, (x, y), s, control_features=c if control else None, smallest=smallest, **settings)


def logits(t: Task, x: Tensor) -> np.ndarray:
    return t.model(x).detach().numpy()


#: (statistic, labels that count) of every notion, written down a second time.
RATES: dict[str, list[tuple[str, str]]] = {
    "demographic_parity": [("selection", "all")],
    "true_positive_rate_parity": [("selection", "positive")],
    "false_positive_rate_parity": [("selection", "negative")],
    "false_negative_rate_parity": [("refusal", "positive")],
    "true_negative_rate_parity": [("refusal", "negative")],
    "equal_opportunity": [("selection", "positive")],
    "equalized_odds": [("selection", "positive"), ("selection", "negative")],
    "error_rate_parity": [("error", "all")],
    "covariance": [("score", "all")],
    "loss_gap": [("loss", "all")],
    "positive_loss_gap": [("loss", "positive")],
    "calibration_gap": [("residual", "all")],
    "worst_group_loss": [("loss", "all")],
}


def statistic(kind: str, z: np.ndarray, y: np.ndarray, k: int, temperature: float) -> np.ndarray:
    p, decided = softmax(z, axis=1), softmax(z / temperature, axis=1)
    own = np.arange(len(y)), y
    return {
        "selection": decided[:, k], "refusal": 1 - decided[:, k], "error": 1 - decided[own], "loss": -np.log(p[own]),
        "score": np.log(p[:, k] / (1 - p[:, k])), "residual": (y == k) - p[:, k],
    }[kind]  # fmt: skip


def by_hand(
    notion: str, z: np.ndarray, y: np.ndarray, s: np.ndarray, c: np.ndarray | None = None, *, positive: int | None = 1, temperature: float = 0.25,
    method: str = "between_groups", agg: str = "worst_case", shrink: float = 0.0,
) -> float:  # fmt: skip
    """One number per (rate, class, stratum), sample by sample."""
    found = []
    strata = np.zeros(len(y)) if c is None else c
    for (kind, among), k, stratum in product(RATES[notion], np.unique(y) if positive is None else [positive], np.unique(strata)):
        counts = {"all": y == y, "positive": y == k, "negative": y != k}[among] & (strata == stratum)
        values = statistic(kind, z, y, k, temperature)
        overall, rates, shares = values[counts].mean(), [], []
        for group in np.unique(s):
            own = values[counts & (s == group)]
            rates.append((own.sum() + shrink * overall) / (len(own) + shrink))
            shares.append(len(own) / counts.sum())
        away = np.array(rates) - overall
        if notion == "worst_group_loss":
            found.append(max(rates))
        elif notion == "covariance":
            found.append(np.abs(np.array(shares) * away).max())
        else:
            found.append(np.ptp(rates) if method == "between_groups" else np.abs(away).max())
    return float(max(found) if agg == "worst_case" else np.mean(found))


SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "probabilities": {"temperature": 1.0, "positive": 2},
    "of every class": {"positive": None},
    "to overall": {"method": "to_overall"},
    "mean of classes": {"positive": None, "agg": "mean", "temperature": 0.5},
    "shrunk": {"shrink": 3.0},
    "shrunk to overall": {"shrink": 3.0, "method": "to_overall", "agg": "mean"},
}


@pytest.mark.parametrize("control", [False, True])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("notion", CLASSIFIER)
def test_the_value_and_its_gradient_are_those_of_slow_references(notion: str, settings: dict[str, Any], control: bool) -> None:
    t, (x, y, s, c) = task(), table()
    target, params = made(notion, control=control, batch_size=17, **settings), t.params()
    expected = by_hand(notion, logits(t, x), y.numpy(), s, c if control else None, **settings)
    assert expected > 1e-4 and relative(target.value(t, params), expected) <= 1e-10
    assert relative(flat(target.gradient(t, params)), full_gradient(lambda p: replace(target, batch_size=N).value(t, p), params)) <= 1e-10
    contrasts = np.array([float(each.value(t, params)) for each in target.signed()])
    if settings.get("agg") != "mean":
        assert relative(np.abs(contrasts).max(), expected) <= 1e-10


def test_every_notion_has_a_row_in_the_reference() -> None:
    assert list(RATES) == CLASSIFIER


@given(size=st.integers(1, 100), seed=st.integers(0, 99), notion=st.sampled_from(CLASSIFIER))
def test_neither_the_batch_size_nor_the_order_of_samples_matters(size: int, seed: int, notion: str) -> None:
    t, target = task(), made(notion, control=True)
    other = replace(target, data=target.data.take(np.random.default_rng(seed).permutation(N)), batch_size=size)
    assert relative(other.value(t, t.params()), target.value(t, t.params())) <= 1e-10
    assert relative(flat(other.gradient(t, t.params())), flat(target.gradient(t, t.params()))) <= 1e-9


@pytest.mark.parametrize("notion", CLASSIFIER)
def test_a_gap_has_no_favourite_group(notion: str) -> None:
    t, (x, y, s, _) = task(), table()
    pair = np.where(s == "a", "a", "b")
    one, other = (fairness_gap(notion, (x, y), each, smallest=1) for each in (pair, np.where(pair == "a", "z", "b")))
    assert relative(other.value(t, t.params()), one.value(t, t.params())) <= 1e-12
    assert relative(flat(other.gradient(t, t.params())), flat(one.gradient(t, t.params()))) <= 1e-12
    if NOTIONS[notion].compare == "difference" and len(NOTIONS[notion].rates) == 1:
        (first,), (second,) = one.signed(), other.signed()
        assert relative(first.value(t, t.params()), -second.value(t, t.params())) <= 1e-12  # the sign is that of the order of the names


def linear() -> Task:
    """Two classes, of which both are decided for."""
    return Task(nn.Linear(4, 2).double().eval())


def test_a_contrast_is_the_first_named_group_minus_the_second() -> None:
    t, (x, y, s, _) = task(), table()
    rates = {group: statistic("selection", logits(t, x), y.numpy(), 1, 0.25)[s == group].mean() for group in "abc"}
    expected = {f"demographic_parity: race={one} − race={two}": rates[one] - rates[two] for one, two in ("ba", "ca", "cb")}
    target = fairness_gap("demographic_parity", (x, y), {"race": s})
    assert {each.name: float(each.value(t, t.params())) for each in target.signed()} == pytest.approx(expected, rel=1e-10)


HARD: dict[str, Callable[..., float]] = {
    "demographic_parity": fairlearn.demographic_parity_difference,
    "equal_opportunity": fairlearn.equal_opportunity_difference,
    "equalized_odds": fairlearn.equalized_odds_difference,
}


@pytest.mark.parametrize("method", ["between_groups", "to_overall"])
@pytest.mark.parametrize("notion", HARD)
def test_a_cold_gap_is_the_difference_of_fairlearn(notion: str, method: Any) -> None:
    t, (x, y, s, _) = linear(), table(classes=2)
    decided = logits(t, x).argmax(1)
    for agg in ("worst_case", "mean"):
        expected = HARD[notion](y.numpy(), decided, sensitive_features=s, method=method, **({"agg": agg} if notion == "equalized_odds" else {}))
        got = fairness_gap(notion, (x, y), s, smallest=1, temperature=1e-5, method=method, agg=agg).value(t, t.params())
        assert expected > 0.01 and abs(float(got) - expected) <= 1e-6


def test_a_cold_gap_within_strata_is_the_difference_of_a_metric_frame() -> None:
    t, (x, y, s, c) = linear(), table(classes=2)
    decided = logits(t, x).argmax(1)
    frame = fairlearn.MetricFrame(metrics=fairlearn.false_negative_rate, y_true=y, y_pred=decided, sensitive_features=s, control_features=c)
    for agg, expected in (("worst_case", frame.difference().max()), ("mean", frame.difference().mean())):
        target = fairness_gap("false_negative_rate_parity", (x, y), s, control_features=c, smallest=1, temperature=1e-5, agg=agg)
        assert expected > 0.01 and abs(float(target.value(t, t.params())) - expected) <= 1e-6


class OneLogit(nn.Module):
    """The difference of two logits, as ``(B,)`` or ``(B, 1)``."""

    def __init__(self, two: nn.Module, keep: bool) -> None:
        super().__init__()
        self.two, self.keep = two, keep

    def forward(self, x: Tensor) -> Tensor:
        z = self.two(x)
        return z[:, 1:] - z[:, :1] if self.keep else z[:, 1] - z[:, 0]


def one_loss(outputs: Tensor, batch: Batch) -> Tensor:
    z = outputs.reshape(len(outputs))
    return nn.functional.binary_cross_entropy_with_logits(z, batch[1].to(z), reduction="none")


@pytest.mark.parametrize("notion", CLASSIFIER)
def test_one_logit_means_what_two_logits_mean(notion: str) -> None:
    two, (x, y, s, _) = task(2), table(classes=2)
    for positive in (0, 1):
        target = fairness_gap(notion, (x, y), s, smallest=1, positive=positive)
        expected = target.value(two, two.params())
        for keep in (False, True):
            t = Task(OneLogit(two.model, keep).eval(), one_loss)
            assert relative(target.value(t, t.params()), expected) <= 1e-12
            assert relative(flat(target.gradient(t, t.params())), flat(target.gradient(two, two.params()))) <= 1e-9


@pytest.mark.parametrize("notion", ["loss_gap", "mean_prediction_gap", "worst_group_loss", "calibration_gap"])
@pytest.mark.parametrize("keep", [False, True])
def test_gaps_of_a_regression(notion: str, keep: bool) -> None:
    x, _, s, _ = table()
    y = x.sum(1) ** 2
    t = Task(OneLogit(task(2).model, keep).eval(), lambda outputs, batch: (outputs.reshape(len(outputs)) - batch[1]) ** 2)
    found = t.model(x).detach().reshape(-1)
    values = {"loss_gap": (found - y) ** 2, "mean_prediction_gap": found, "worst_group_loss": (found - y) ** 2, "calibration_gap": y - found}[notion]
    rates = [float(values[torch.from_numpy(s == group)].mean()) for group in "abc"]
    target = fairness_gap(notion, (x, y), s, batch_size=7)
    assert relative(target.value(t, t.params()), max(rates) if notion == "worst_group_loss" else max(rates) - min(rates)) <= 1e-12
    whole = replace(target, batch_size=N, positive=None)
    assert relative(flat(target.gradient(t, t.params())), full_gradient(lambda p: whole.value(t, p), t.params())) <= 1e-10
    assert "class" not in str(whole.contrast_names)


def test_the_covariance_is_that_of_zafar_for_two_groups() -> None:
    t, (x, y, s, _) = task(2), table(classes=2)
    a, z = (s == "a").astype(float), logits(t, x)
    expected = np.mean((a - a.mean()) * (z[:, 1] - z[:, 0]))  # the boundary of two classes is where the logits are equal
    target = fairness_gap("covariance", (x, y), s == "a")
    assert relative(target.value(t, t.params()), abs(expected)) <= 1e-12
    signed = {each.name: float(each.value(t, t.params())) for each in target.signed()}
    assert signed["covariance: sensitive_feature_0=True − all"] == pytest.approx(expected)
    assert signed["covariance: sensitive_feature_0=False − all"] == pytest.approx(-expected)


# Names, sums, minibatches


def test_cells_and_contrasts_are_named_after_the_columns() -> None:
    x, y, s, c = table()
    plain = fairness_gap("demographic_parity", (x, y), pd.Series(s, name="race"))
    assert plain.contrast_names == ("race=b − race=a", "race=c − race=a", "race=c − race=b") and plain.name == "demographic_parity"
    assert [cell.n for cell in plain.cells] == [int((s == group).sum()) for group in "abc"]
    within = fairness_gap("equalized_odds", (x, y), {"race": s}, control_features={"job": c}, smallest=1, positive=None, method="to_overall")
    assert "race=b − all, negative samples, class 2, job=v" in within.contrast_names and len(within.contrast_names) == 2 * 3 * 2 * 3
    assert fairness_gap("worst_group_loss", (x, y), {"race": s}).contrast_names == ("race=a", "race=b", "race=c")
    codes = Samples((x, y, torch.from_numpy((s == "a").astype(np.float32))))  # whole numbers of any type
    assert FairnessGap(codes).contrast_names == ("group 1 − group 0",)
    assert [each.name for each in FairnessGap(codes).signed()] == ["demographic_parity: group 1 − group 0"]
    both = fairness_gap("demographic_parity", (x, y), {"race": s, "job": c}, smallest=1)
    assert len(both.cells) == 6 and both.groups[0] == "race=a, job=u"


def test_a_sum_with_the_utility_has_the_sum_of_gradients() -> None:
    t, gap = task(), made("equalized_odds")
    both, params = 2 * Utility(gap.data) + 0.5 * gap, t.params()
    expected = 2 * flat(Utility(gap.data).gradient(t, params)) + 0.5 * flat(gap.gradient(t, params))
    assert both.name == "2*utility+0.5*equalized_odds" and relative(flat(both.gradient(t, params)), expected) <= 1e-12


def test_a_score_is_that_of_the_contrast_that_is_largest_with_its_sign() -> None:
    t, target = task(), made("demographic_parity")
    x, y, _, _ = table(1)
    contrasts = target.signed()
    values = [float(each.value(t, t.params())) for each in contrasts]
    worst = int(np.abs(values).argmax())
    got = InnerProduct().score(t, (x, y), target=target).values
    assert relative(got, np.sign(values[worst]) * InnerProduct().score(t, (x, y), target=contrasts[worst]).values) <= 1e-12


@pytest.mark.parametrize("size", [1, 2, 12, 45])
@pytest.mark.parametrize("notion", ["demographic_parity", "equalized_odds", "covariance"])
def test_a_minibatch_holds_every_cell_and_repeats_with_its_generator(notion: str, size: int) -> None:
    t, target = task(), made(notion, control=True)
    for whole in (target, target.signed()[2]):
        for seed in range(3):
            one, other = (whole.minibatch(size, torch.Generator().manual_seed(seed)) for _ in range(2))
            columns = one.data.batch(slice(None))[1:]
            assert all(cell.holds(*columns).any() for cell in target.cells) and len(one.data) <= max(len(target.cells), size)
            assert one.data.ids.tolist() == other.data.ids.tolist() and one.name == whole.name
            assert torch.isfinite(one.value(t, t.params())) and one.minibatch(N, torch.Generator()) is one
    assert all(each.minibatch(N, torch.Generator()) is each for each in (target, target.signed()[0]))


@pytest.mark.parametrize("notion", ["equal_opportunity", "covariance"])
def test_contrasts_of_minibatches_are_right_on_average(notion: str) -> None:
    t, target = task(), made(notion, method="to_overall", shrink=5.0)
    for contrast in target.signed():
        drawn = [contrast.minibatch(30, torch.Generator().manual_seed(seed)) for seed in range(150)]
        values = np.array([float(each.value(t, t.params()).detach()) for each in drawn])
        assert abs(values.mean() - float(contrast.value(t, t.params()))) <= 4 * values.std() / np.sqrt(150)


def test_a_minibatch_of_a_minibatch_is_one_of_the_whole() -> None:
    target = made("covariance")
    part = target.minibatch(30, torch.Generator().manual_seed(0))
    assert len(part.minibatch(9, torch.Generator().manual_seed(0)).data) == 9


def test_tuning_lowers_the_gap_alone_and_in_a_sum() -> None:
    t, gap = task(), made("demographic_parity")
    for target in (gap, Utility(gap.data) + 0.5 * gap):
        tuned = Tuning(steps=60, lr=0.1, batch_size=20, flatness=Plain()).run(t, target)
        assert target.value(t, tuned) < target.value(t, t.params())


def test_settings_and_rows_are_part_of_the_fingerprint() -> None:
    gap = made("demographic_parity")
    others = [made("covariance"), replace(gap, positive=2), replace(gap, temperature=0.5), replace(gap, shrink=1.0), replace(gap, agg="mean")]
    marks = {fingerprint({}, gap.data, [each]) for each in (gap, *others, *gap.signed())}
    assert len(marks) == 1 + len(others) + 3 and fingerprint({}, gap.data, [gap]) == fingerprint({}, gap.data, [made("demographic_parity")])


# Bad input


def test_small_cells_are_refused_unless_they_are_shrunk(caplog: pytest.LogCaptureFixture) -> None:
    x, y, s, c = table()
    few = s.copy()
    few[np.flatnonzero((s == "c") & (y.numpy() == 1))] = "a"
    with pytest.raises(ValueError, match="data: expected at least 10 validation samples in every cell, but 3 of 3 have fewer: race=a, positive"):
        fairness_gap("equal_opportunity", (x[:25], y[:25]), {"race": few[:25]})
    with pytest.raises(ValueError, match=r"at least 2 .* 1 of 3 have fewer: race=c, positive samples \(0\); join groups, give more .* shrink=10"):
        fairness_gap("equal_opportunity", (x, y), {"race": few}, smallest=2)
    with caplog.at_level(logging.WARNING):
        target = fairness_gap("equal_opportunity", (x, y), {"race": few}, shrink=10)
    assert caplog.messages == ["true positive rate: cells without a sample are left out: race=c, positive samples"]
    assert target.contrast_names == ("race=b − race=a, positive samples",)
    caplog.clear()
    target.minibatch(10, torch.Generator())
    assert not caplog.messages
    lonely = np.where((y == 1).numpy(), "a", s)
    with pytest.raises(ValueError, match="data: expected two groups with samples in some cell, got none"):
        fairness_gap("equal_opportunity", (x, y), lonely, shrink=10)
    within = fairness_gap("demographic_parity", (x, y), {"race": np.where(c == "u", "a", s)}, control_features={"job": c}, shrink=1, agg="mean")
    assert {name.rpartition(", ")[2] for name in within.contrast_names} == {"job=v"}  # in the other stratum there is one group only


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"notion": "fame"}, "notion: expected one of demographic_parity, .*worst_group_loss, got 'fame'"),
        ({"method": "ratio"}, "method: expected one of between_groups, to_overall, got 'ratio'"),
        ({"agg": "sum"}, "agg: expected one of worst_case, mean, got 'sum'"),
        ({"temperature": 0.0}, "temperature, shrink, smallest: expected numbers above 0, .* got 0.0"),
        ({"temperature": float("nan")}, "temperature, shrink, smallest: expected"),
        ({"shrink": -1.0}, "temperature, shrink, smallest: expected"),
        ({"smallest": 0}, "temperature, shrink, smallest: expected"),
        ({"positive": -1}, "positive: expected the number of a class, or None for every class, got -1"),
        ({"positive": "cat"}, "positive: expected the number of a class, or None for every class, got 'cat'"),
        ({"notion": "equal_opportunity", "positive": 3}, r"positive: expected one of the labels of the validation data, \[0, 1, 2\], got 3"),
        ({"notion": "positive_loss_gap", "positive": 7}, "positive: expected one of the labels"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made(**({"notion": "demographic_parity"} | settings))


@pytest.mark.parametrize("notion", [name for name in CLASSIFIER if NOTIONS[name].rates[0].statistic != "loss"])
def test_classes_that_the_model_does_not_have_are_refused(notion: str) -> None:
    t = task(2)
    with pytest.raises(ValueError, match="positive, labels: expected classes from 0 to 1, which the model has, got 2"):
        made(notion, positive=2).value(t, t.params())


def test_several_outputs_are_no_prediction_of_a_number() -> None:
    t, (x, y, s, _) = task(2), table()
    for notion, outcome in (("mean_prediction_gap", y), ("calibration_gap", y.double())):
        with pytest.raises(ValueError, match=r"model: expected one prediction per sample, \(B,\) or \(B, 1\), got shape \(90, 2\)"):
            fairness_gap(notion, (x, outcome), s).value(t, t.params())


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (lambda x, y, s: (x, y), r"data: expected \(x, y, s\) or \(x, y, s, c\) with whole numbers .* see fairness_gap"),
        (lambda x, y, s: (x,), r"data: expected \(x, y, s\)"),
        (lambda x, y, s: (x, y, x), r"data: expected \(x, y, s\)"),
        (lambda x, y, s: (x, y, s + 0.5), r"data: expected \(x, y, s\)"),
        (lambda x, y, s: (x, y, s, s, s), r"data: expected \(x, y, s\)"),
        (lambda x, y, s: (x, y, 0 * s), r"data: expected at least two groups to compare, got \['group 0'\]"),
        (lambda x, y, s: (x, y[:, None], s), r"data: expected labels of shape \(n,\), got \(90, 1\)"),
        (lambda x, y, s: (x, y.double(), s), "data: a gap in the share of positive predictions expects classes as labels, whole numbers, got"),
    ],
)
def test_data_that_are_no_labelled_groups_are_refused(data: Callable[..., Any], message: str) -> None:
    x, y, s, _ = table()
    with pytest.raises(ValueError, match=message):
        FairnessGap(Samples(data(x, y, torch.from_numpy(np.unique(s, return_inverse=True)[1]))))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sensitive_features": ["a"] * N}, "sensitive_features: expected at least two groups, but all 90 samples are sensitive_feature_0=a"),
        ({"sensitive_features": [None, *"b" * (N - 1)]}, "sensitive_features: 1 of 90 values of 'sensitive_feature_0' are missing"),
        ({"sensitive_features": np.linspace(0, 1, N)}, "sensitive_features: 'sensitive_feature_0' holds measurements"),
        ({"sensitive_features": ["a", "b"]}, "sensitive_features: expected one value for each of the 90 validation samples, got 2"),
        ({"control_features": ["a", "b"]}, "control_features: expected one value for each of the 90 validation samples, got 2"),
        ({"control_features": np.linspace(0, 1, N)}, "control_features: 'control_feature_0' holds measurements"),
        ({"valid": (torch.zeros(N, 2),)}, r"valid: expected \(x, y\)"),
    ],
)
def test_columns_that_are_no_groups_are_refused(changes: dict[str, Any], message: str) -> None:
    x, y, s, _ = table()
    with pytest.raises(ValueError, match=message):
        fairness_gap(**({"notion": "loss_gap", "valid": (x, y), "sensitive_features": s} | changes))


# Held-out data only


def never(*_: Any) -> Any:
    raise AssertionError("the model was run")


class Rows(torch.utils.data.Dataset[Any]):
    """A map-style data set of (x, y)."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> Any:
        return self.x[i], int(self.y[i])


SAME: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "itself": lambda x, y: (x, y),
    "another order": lambda x, y: (x.flip(0), y.flip(0)),
    "single precision": lambda x, y: (x.float(), y.int()),
    "with groups": lambda x, y: (x, y, y),
    "map-style": lambda x, y: Rows(x, y),
}


@pytest.mark.parametrize("kind", SAME)
def test_training_data_are_refused_before_the_model_is_run(kind: str) -> None:
    t, (x, y, _, _), gap = Task(task().model, never, never), table(), made("equal_opportunity")
    for target in (gap, gap.signed()[0], Utility(gap.data) + 2 * gap):
        with pytest.raises(ValueError, match="target: the validation data of equal_opportunity are the training data; a gap must be measured"):
            InnerProduct().score(t, SAME[kind](x, y), target=target)


OTHER: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "fewer": lambda x, y: (x[:-1], y[:-1]),
    "another feature": lambda x, y: (torch.cat([x[:, :3], x[:, 3:] + (torch.arange(N) == 5)[:, None]], 1), y),
    "another label": lambda x, y: (x, torch.where(torch.arange(N) == 0, 2, y)),
    "labels in another order": lambda x, y: (x, y.flip(0)),
    "another shape": lambda x, y: (x[:, :3], y),
    "without labels": lambda x, y: (x,),
}


@pytest.mark.parametrize("kind", OTHER)
def test_other_data_are_not(kind: str) -> None:
    x, y, _, _ = table()
    made("equal_opportunity").check(Samples(OTHER[kind](x, y)))


def test_estimators_without_a_target_do_not_look_at_it() -> None:
    gap = made("equal_opportunity")
    assert len(Loss().score(task(), gap.data, target=gap).values) == N


def test_contrasts_stand_alone() -> None:
    gap = made("equalized_odds")
    contrast = gap.signed()[1]
    assert isinstance(contrast, Contrast) and contrast.cells == gap.cells and contrast.held_out == (gap.data,)
    t = task()
    assert relative(flat(replace(contrast, batch_size=4).gradient(t, t.params())), flat(contrast.gradient(t, t.params()))) <= 1e-10
