"""suites: what the rows of an evaluation say together, against numbers worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from scipy.stats import t, ttest_rel

from robust_if.evaluations.suites.summary import FIRST, Block, blocks, ordered


def row(defence: str = "none", seed: int = 0, attack: str = "flips", **more: Any) -> dict[str, Any]:
    """A row of ``result.json``, with its options and metrics as keywords."""
    known = {
        "data": "blobs", "attack": attack, "defence": defence, "seed": seed, "family": defence.partition(" ")[0], "error": None, "seconds": 1.0,
        "peak_bytes": 100, "metrics": {"accuracy": 0.5},
    }  # fmt: skip
    options = {"data": {}, "attack": {}, "defence": more.pop("options", {})}
    return {**known, "options": options, **more}


def runs(defence: str, values: Mapping[str, list[float | None]], **more: Any) -> list[dict[str, Any]]:
    """A row per seed, from metrics with a value per seed."""
    count = len(next(iter(values.values())))
    return [row(defence, seed, metrics={name: each[seed] for name, each in values.items()}, **more) for seed in range(count)]


def block(rows: list[dict[str, Any]]) -> Block:
    (found,) = blocks(rows)
    return found


def test_a_cell_is_the_mean_over_the_seeds_with_students_interval() -> None:
    values = [0.5, 0.7, 0.9, 0.6]
    cell = block(runs("filter", {"accuracy": values})).cells["filter"]["accuracy"]
    half = t.ppf(0.975, 3) * np.std(values, ddof=1) / 2
    assert (cell.mean, cell.low, cell.high) == pytest.approx((0.675, 0.675 - half, 0.675 + half)) and cell.seeds == 4
    assert cell.change is None and cell.verdict == ""  # there is nothing to compare with


def test_one_seed_has_no_interval_and_no_verdict() -> None:
    found = block([row("none", metrics={"accuracy": 0.1}), row("filter", metrics={"accuracy": 0.9})])
    cell = found.cells["filter"]["accuracy"]
    assert cell.mean == 0.9 and math.isnan(cell.low) and math.isnan(cell.high) and cell.seeds == 1
    assert cell.change == pytest.approx(0.8) and cell.verdict == ""


@pytest.mark.parametrize(
    ("metric", "shift", "verdict"),
    [
        ("accuracy", 0.1, "better"),
        ("accuracy", -0.1, "worse"),
        ("accuracy (again)", 0.1, "better"),
        ("attack_success", 0.1, "worse"),
        ("attack_success", -0.1, "better"),
        ("removed_share", 0.1, ""),
        ("somebodys_own", 0.1, ""),
        ("accuracy", 0.0, ""),
    ],
)
def test_a_verdict_compares_seed_by_seed_in_the_direction_of_the_metric(metric: str, shift: float, verdict: str) -> None:
    none = np.array([0.2, 0.5, 0.8, 0.4])  # seeds differ by much more than the defence changes
    noise = np.array([0.01, -0.01, 0.005, -0.005])
    found = block(runs("none", {metric: list(none)}) + runs("filter", {metric: list(none + shift + noise)}))
    cell = found.cells["filter"][metric]
    assert cell.change == pytest.approx(shift, abs=1e-12) and cell.verdict == verdict
    assert cell.low < found.cells["none"][metric].mean < cell.high  # unpaired, nothing could be told
    assert found.cells["none"][metric].change is None and found.cells["none"][metric].verdict == ""


@pytest.mark.parametrize("seed", range(20))
def test_a_verdict_is_that_of_the_paired_t_test(seed: int) -> None:
    none, filtered = np.random.default_rng(seed).normal(0.5, 0.1, (2, 5)) + np.array([[0.0], [0.12]])
    cell = block(runs("none", {"accuracy": list(none)}) + runs("filter", {"accuracy": list(filtered)})).cells["filter"]["accuracy"]
    assert (cell.verdict != "") == (ttest_rel(filtered, none).pvalue < 0.05)


def test_only_seeds_that_both_have_are_compared() -> None:
    rows = runs("none", {"accuracy": [0.1, 0.2, 0.3]}) + runs("filter", {"accuracy": [0.4, 0.5, None, 9.0]})
    cell = block(rows).cells["filter"]["accuracy"]
    assert cell.seeds == 3 and cell.mean == pytest.approx(3.3) and cell.change == pytest.approx(0.3)


def test_rows_that_failed_count_nowhere() -> None:
    fine = runs("none", {"accuracy": [0.5, 0.6]}) + runs("filter", {"accuracy": [0.7, 0.9]})
    failed = [row("filter", 2, metrics={}, error="broken", seconds=None, peak_bytes=None), row("other", 0, metrics={"accuracy": 0.0}, error="broken")]
    assert blocks([failed[1], *fine, failed[0], row(attack="deadly", error="broken")]) == blocks(fine)
    assert blocks([failed[0]]) == [] == blocks([])


def test_a_metric_that_no_seed_has_is_no_cell() -> None:
    found = block(runs("none", {"accuracy": [0.5, 0.5], "auroc": [None, None]}) + runs("filter", {"accuracy": [0.5, 0.5], "auroc": [0.9, 0.7]}))
    assert set(found.cells["none"]) == {"accuracy"} and found.cells["filter"]["auroc"].mean == pytest.approx(0.8)
    assert found.cells["filter"]["auroc"].change is None and found.metrics == ("accuracy", "auroc")


def test_blocks_are_attacks_on_data_in_the_order_of_the_rows() -> None:
    rows = [row(attack="b"), row("filter", attack="a"), row(attack="a"), row("filter", attack="b"), row(attack="a", data="other")]
    assert [(each.data, each.attack, list(each.cells)) for each in blocks(rows)] == [
        ("blobs", "b", ["none", "filter"]), ("blobs", "a", ["filter", "none"]), ("other", "a", ["none"]),
    ]  # fmt: skip
    assert blocks(rows)[0].families == {"none": "none", "filter": "filter"}


def test_metrics_that_say_most_come_first_and_the_others_stay_in_order() -> None:
    assert ordered(["zeta", "auroc", "alpha", "accuracy", "robust_accuracy (pgd-10)", "attack_success", "zeta"]) == [
        "attack_success", "accuracy", "robust_accuracy (pgd-10)", "auroc", "zeta", "alpha",
    ]  # fmt: skip
    assert ordered(reversed(FIRST)) == list(FIRST)


def test_costs_are_the_mean_time_and_the_largest_peak() -> None:
    rows = [row("none", 0, seconds=1.0, peak_bytes=5), row("none", 1, seconds=2.0, peak_bytes=9), row("old", seconds=None, peak_bytes=None)]
    assert block(rows).costs == {"none": (1.5, 9), "old": (None, None)}


def grid(values: list[Any], estimator: str = "loss", label: str = "filter", **options: Any) -> list[dict[str, Any]]:
    """Rows of a defence over its option ``remove``, as a suite file labels them."""
    return [
        each
        for k, value in enumerate(values)
        for each in runs(
            f"{label} estimator={estimator} remove={value}", {"accuracy": [0.1 * k, 0.1 * k + 0.05]}, family=label,
            options={"estimator": estimator, "remove": value, "keep": True, "limit": None, **options},
        )
    ]  # fmt: skip


def test_an_option_that_takes_three_numbers_makes_curves() -> None:
    found = block(runs("none", {"accuracy": [0.0, 0.1]}) + grid([0.3, 0.1, 0.2]) + grid([1, 2, 3], "knn") + grid([0.1, 0.2], "ip"))
    (curves,) = found.curves
    assert (curves.metric, curves.option, curves.baseline) == ("accuracy", "remove", found.cells["none"]["accuracy"])
    assert [(line.label, line.at) for line in curves.lines] == [("filter estimator=loss", (0.1, 0.2, 0.3)), ("filter estimator=knn", (1.0, 2.0, 3.0))]
    assert [cell.mean for cell in curves.lines[0].cells] == pytest.approx([0.125, 0.225, 0.025])
    assert curves.lines[0].cells[2] is found.cells["filter estimator=loss remove=0.3"]["accuracy"]


def test_two_values_are_no_curve_and_two_tables_are_not_one() -> None:
    assert block(grid([0.1, 0.2])).curves == ()
    assert block(grid([0.1, 0.2]) + grid([0.3], label="other")).curves == ()
    assert block(grid([0.1, 0.2], limit=1) + grid([0.3], limit=2)).curves == ()


def test_a_value_that_is_no_number_is_no_point_of_a_curve() -> None:
    (curves,) = block(grid(["auto", 0.1, True, 0.2, None, 0.3])).curves
    assert [(line.label, line.at) for line in curves.lines] == [("filter estimator=loss", (0.1, 0.2, 0.3))] and curves.baseline is None
    assert block(grid(["auto", "all", "none"])).curves == ()


def test_options_without_the_one_that_varies_are_left_alone() -> None:
    """A table of the same label whose function has no such option."""
    (curves,) = block(grid([0.1, 0.2, 0.3]) + runs("filter", {"accuracy": [0.5]}, options={"estimator": "loss", "keep": True, "limit": None})).curves
    assert curves.lines[0].at == (0.1, 0.2, 0.3)


def test_the_label_says_2_where_the_option_is_a_float() -> None:
    rows = [row(f"filter scale={k}", options={"scale": float(k)}) for k in (1, 2, 3)]
    (curves,) = block(rows).curves
    assert [line.label for line in curves.lines] == ["filter"] and len(curves.lines) == 1


def test_points_without_the_metric_are_left_out_of_its_curve() -> None:
    rows = grid([0.1, 0.2, 0.3, 0.4])
    for each in rows:
        each["metrics"] |= {"auroc": None if each["options"]["defence"]["remove"] == 0.2 else 0.7}
        each["metrics"] |= {"bad_kept": None if each["options"]["defence"]["remove"] < 0.3 else 0.7}
    found = {curves.metric: curves.lines[0].at for curves in block(rows).curves}
    assert found == {"accuracy": (0.1, 0.2, 0.3, 0.4), "auroc": (0.1, 0.3, 0.4)}


def test_a_grid_of_two_numbers_has_curves_over_both() -> None:
    rows = [row(f"filter a={a} b={b}", options={"a": a, "b": b}) for a in (1, 2, 3) for b in (10, 20, 30)]
    found = {curves.option: [line.label for line in curves.lines] for curves in block(rows).curves}
    assert found == {"a": ["filter b=10", "filter b=20", "filter b=30"], "b": ["filter a=1", "filter a=2", "filter a=3"]}
