"""memory.py: what a pass takes, and the batch size that fits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

from cases import NAMES, case
from robust_if import Sweep, Task, gradients
from robust_if.layers import LayerGradients
from robust_if.memory import Footprint, footprint, plan
from robust_if.models import cnn
from robust_if.sweep import parse_bytes
from unchanged import untouched

KINDS: list[Any] = ["forward", "directional", "layerwise"]
# 10 -> 40 -> 20 -> 2, in bytes of float32
WIDE = Task(nn.Sequential(nn.Linear(10, 40), nn.Tanh(), nn.Linear(40, 20), nn.Tanh(), nn.Linear(20, 2)).eval())
COUNT = 4 * (11 * 40 + 41 * 20 + 21 * 2)


def rows(n: int, *shape: int) -> Any:
    return torch.randn(n, *shape), torch.randint(2, (n,))


def of(kind: Any, **options: Any) -> Footprint:
    return footprint(WIDE, WIDE.params(), rows(4, 10), kind, **options)


def test_a_network_of_linear_layers_takes_what_a_count_by_hand_says() -> None:
    assert of("forward") == Footprint(COUNT, 8 + 4 * (10 + 40 + 40))  # the batch, and the hidden layer before and after its activation
    # with tangents: of the hidden layer before its activation the two terms and their sum
    moving = of("directional")
    assert moving.parameters == 2 * COUNT and 8 + 4 * (10 + 4 * 40) <= moving.per_sample <= 8 + 4 * (10 + 6 * 40)
    # one direction after the other
    assert of("directional", directions=3) == replace(moving, parameters=4 * COUNT)
    # inputs and outputs of the layers, what the loss saves, and the output gradients
    layers = 4 * (10 + 40 + 40 + 20 + 20 + 2 + (40 + 20 + 2))
    got = of("layerwise")
    assert got.parameters == 2 * COUNT and layers <= got.per_sample <= layers + 4 * 2 + 8 + 8 and got.gradients == 0 and got.uncovered == ()


def test_convolutions_add_their_patches_and_their_gradients() -> None:
    task = Task(cnn((1, 8, 8), 2, width=4).eval())
    got, bare = (footprint(task, task.params(), rows(4, 1, 8, 8), kind) for kind in ("layerwise", "forward"))
    patches = 4 * max(64 * 9, 16 * 4 * 9)
    assert got.per_sample > patches + bare.per_sample
    assert got.gradients == 2 * 4 * max(4 * 9, 8 * 4 * 9)


def test_what_the_loss_makes_of_a_large_vocabulary_counts() -> None:
    task, words = Task(nn.Linear(4, 5000).eval()), 4 * 5000
    forward, moving = (footprint(task, task.params(), rows(4, 4), kind).per_sample for kind in ("forward", "directional"))
    assert 2 * words <= forward <= 2.1 * words  # the outputs and their logarithms
    assert 4 * words <= moving <= 7 * words


def test_what_attention_makes_counts_and_a_part_of_the_model_that_is_frozen_is_no_reason_for_single_gradients(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gradients, "_said", set())
    attention = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).eval()

    def forward(model: Any, batch: Any) -> torch.Tensor:
        hidden = model(batch[0])
        return nn.functional.scaled_dot_product_attention(hidden, hidden, hidden).sum(1)

    task = Task(attention, forward=forward, parameters="0.*")
    got = footprint(task, task.params(), rows(4, 128, 4), "directional").per_sample
    assert 2 * 4 * 128**2 <= got <= 8 * 4 * 128**2  # the weights of all pairs, and their tangents
    assert not caplog.records


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_every_model_has_a_footprint_that_does_not_depend_on_the_probe_nor_change_the_model(name: str, kind: Any) -> None:
    c = case(name)
    with untouched(c.task.model):
        few, many = (footprint(c.task, c.task.params(), c.train.batch(slice(0, n)), kind) for n in (4, 12))
    assert few == many
    assert few.parameters > 0 and few.per_sample > 0
    if kind == "layerwise":
        uncovered = LayerGradients(c.task, c.task.params(), c.train.batch(slice(0, 4))).uncovered
        assert few.uncovered == tuple(uncovered)
        assert all(parameter in few.describe(8) for parameter in uncovered[:3])


@given(st.integers(0, 10**6), st.integers(0, 10**4), st.integers(0, 10**4), st.integers(0, 10**6), st.integers(1, 10**7), st.integers(1, 5000))
def test_the_plan_is_the_largest_batch_that_fits(fixed: int, per_sample: int, gradients: int, chunk: int, limit: int, most: int) -> None:
    needs = Footprint(fixed, per_sample, gradients, chunk)
    assume(needs.total(1) <= limit)
    size = plan(needs, Sweep(batch_size=most, max_memory=limit)).batch_size
    assert 1 <= size <= most and needs.total(size) <= limit
    assert size == most or needs.total(size + 1) > limit


def test_the_plan_is_said_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    sweep = Sweep(batch_size=1000, max_memory="780 MB", rows_per_part=7)
    with caplog.at_level("INFO"):
        assert plan(Footprint(800_000, 3_100_000), sweep) == replace(sweep, batch_size=251)
    assert [record.message for record in caplog.records] == ["memory: parameters 800 kB + 3.1 MB a sample x 251 = 779 MB"]
    assert Footprint(0, 10, 4, 100).describe(50) == "parameters 0 B + 10 B a sample x 50 + gradients 100 B = 600 B"
    assert plan(Footprint(800_000, 3_100_000), Sweep()) == Sweep()


def test_a_sample_that_does_not_fit_is_an_error_with_the_numbers() -> None:
    with pytest.raises(
        ValueError, match=r"max_memory: one sample needs 3.9 MB \(parameters 800 kB \+ 3.1 MB a sample x 1 = 3.9 MB\), more than the 2 MB"
    ):
        plan(Footprint(800_000, 3_100_000), Sweep(max_memory="2MB"))


def test_what_is_asked_wrongly_is_refused() -> None:
    with pytest.raises(ValueError, match="kind: expected one of 'forward', 'directional', 'layerwise', got 'backward'"):
        of("backward")
    with pytest.raises(ValueError, match="directions: expected at least 1, got 0"):
        of("directional", directions=0)


@pytest.mark.parametrize(
    ("text", "size"), [(7, 7), ("7", 7), ("500MB", 500 * 10**6), ("2 gb", 2 * 10**9), ("1.5GiB", 3 * 2**29), ("1kB", 1000), (" 3 B ", 3)]
)
def test_sizes_are_read(text: int | str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GB", "2 XB", "-1", -1, 0, "0 MB", "1e9", 2.5, True, None])
def test_what_is_no_size_is_refused(text: Any) -> None:
    with pytest.raises(ValueError, match="max_memory: expected bytes, or text such as '500MB' or '2GB', got"):
        parse_bytes(text)
