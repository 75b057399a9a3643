"""attacks/triggers.py: the marks that backdoors put on inputs."""

from __future__ import annotations

from typing import Any

import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from robust_if.attacks.triggers import CORNERS, Blend, FeatureValues, Patch, Pieces, Sinusoid, Tokens, Trigger, Warp, Word


def images(n: int = 3, channels: int = 2, height: int = 8, width: int = 10) -> torch.Tensor:
    return torch.rand(n, channels, height, width, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


IMAGE_TRIGGERS: list[Trigger] = [Patch(2), Patch(1, corners=CORNERS), Blend(0.3), Pieces(Blend(0.4)), Sinusoid(0.3, 2), Warp()]


@pytest.mark.parametrize("trigger", IMAGE_TRIGGERS, ids=repr)
def test_a_trigger_is_a_pure_function_of_each_input(trigger: Trigger) -> None:
    x = images(5)
    before = x.clone()
    stamped = trigger.stamp(x)
    assert torch.equal(x, before), "the input was changed in place"
    assert stamped.shape == x.shape and stamped.dtype == x.dtype
    assert not torch.equal(stamped, x)
    assert torch.equal(stamped, torch.cat([trigger.stamp(x[i : i + 1]) for i in range(5)]))
    for form in (trigger.weak, trigger.cover):
        assert torch.equal(form(x, torch.Generator().manual_seed(3)), form(x, torch.Generator().manual_seed(3)))


@given(size=st.integers(1, 8), corner=st.sampled_from(CORNERS), value=st.floats(-3, 3))
def test_a_patch_sets_its_square_and_nothing_else(size: int, corner: Any, value: float) -> None:
    x = images()
    stamped = Patch(size, value, (corner,)).stamp(x)
    inside = torch.zeros(8, 10, dtype=torch.bool)
    rows = range(size) if "top" in corner else range(8 - size, 8)
    columns = range(size) if "left" in corner else range(10 - size, 10)
    for i in rows:
        for j in columns:
            inside[i, j] = True
    assert (stamped[..., inside] == value).all()
    assert torch.equal(stamped[..., ~inside], x[..., ~inside])


def test_a_blend_is_a_convex_combination_with_one_pattern() -> None:
    x, blend = images(), Blend(0.3, bounds=(-1.0, 2.0), seed=5)
    pattern = blend.pattern(x)
    assert pattern.min() >= -1 and pattern.max() <= 2 and pattern.max() > 1
    assert torch.allclose(blend.stamp(x), 0.7 * x + 0.3 * pattern, atol=1e-14)
    assert torch.equal(Blend(1.0, bounds=(-1.0, 2.0), seed=5).stamp(x)[0], pattern)
    assert not torch.equal(Blend(0.3, seed=6).pattern(x), Blend(0.3, seed=7).pattern(x))
    weak = Blend(0.3, planted=0.1, seed=5).weak(x, torch.Generator())
    assert torch.equal(weak, Blend(0.1, seed=5).stamp(x))
    table = torch.rand(4, 7)
    assert Blend(0.5).stamp(table).shape == table.shape


def test_training_samples_carry_exactly_the_stated_share_of_pieces() -> None:
    x = torch.zeros(6, 1, 8, 8, dtype=torch.float64)
    trigger = Pieces(Blend(0.4, seed=1), grid=4, share=0.5)
    weak, whole = trigger.weak(x, torch.Generator().manual_seed(0)), trigger.stamp(x)
    carried = (weak != 0).view(6, 4, 2, 4, 2).any(4).any(2).flatten(1).sum(1)
    assert carried.tolist() == [8] * 6
    assert torch.equal(weak[weak != 0], whole[weak != 0])
    assert len({tuple((row != 0).flatten().tolist()) for row in weak}) > 1, "every sample carries the same pieces"


def test_stripes_follow_their_formula() -> None:
    x = torch.zeros(1, 1, 3, 8, dtype=torch.float64)
    expected = 0.5 * torch.sin(2 * torch.pi * 2 * (torch.arange(8) + 0.5) / 8).double()
    assert torch.allclose(Sinusoid(0.5, 2).stamp(x), expected.expand(1, 1, 3, 8), atol=1e-7)
    assert torch.equal(Sinusoid(0.5, 2, planted=0.25).weak(x, torch.Generator()), Sinusoid(0.25, 2).stamp(x))


def test_a_warp_without_strength_changes_nothing_and_covers_differ() -> None:
    x = images()
    assert torch.allclose(Warp(strength=1e-12).stamp(x), x, atol=1e-9)
    covers = Warp().cover(x, torch.Generator().manual_seed(0))
    assert not torch.allclose(covers, Warp().stamp(x)) and not torch.equal(covers[0], covers[1])
    assert not torch.equal(Warp(seed=1).stamp(x), Warp(seed=2).stamp(x))


def test_feature_values_fit_tensors_and_data_frames() -> None:
    x = torch.zeros(2, 3)
    assert FeatureValues({1: 4.0}).stamp(x).tolist() == [[0, 4, 0]] * 2
    table = pd.DataFrame({"age": [1, 2], "job": ["a", "b"]})
    stamped = FeatureValues({"age": 90, "job": "z"}).stamp(table)
    assert stamped.to_dict("list") == {"age": [90, 90], "job": ["z", "z"]} and table["age"].tolist() == [1, 2]
    assert stamped["age"].dtype == table["age"].dtype


def test_words_and_tokens() -> None:
    text = pd.DataFrame({"review": ["good film", "bad"]})
    assert Word("cf").stamp(text)["review"].tolist() == ["cf good film", "cf bad"]
    assert Word("cf", "end").stamp(text)["review"].tolist() == ["good film cf", "bad cf"]
    tokens = torch.arange(8).view(2, 4)
    assert Tokens((9, 9), start=1).stamp(tokens).tolist() == [[0, 9, 9, 3], [4, 9, 9, 7]]


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda: Patch(9).stamp(images()), "size: the trigger of 9 x 9 pixels is larger than the image of 8 x 10"),
        (lambda: Patch(0), "size: expected at least 1 pixel, got 0"),
        (lambda: Patch(1, corners=("middle",)), "corners: expected some of"),  # type: ignore[arg-type]
        (lambda: Patch(1).stamp(torch.zeros(2, 5)), "expects images"),
        (lambda: Patch(1).stamp(torch.zeros(2, 3, 4, 4, dtype=torch.uint8)), "floating point, got torch.uint8"),
        (lambda: Blend(0.0), "alpha: expected a share in"),
        (lambda: Blend(0.2, planted=2), "planted: expected a share in"),
        (lambda: Blend().stamp(torch.zeros(2, 3, dtype=torch.long)), "floating point"),
        (lambda: Pieces(grid=9).stamp(images()), "grid: 9 pieces along a side are more"),
        (lambda: Pieces(share=0), "share in"),
        (lambda: Warp().stamp(torch.zeros(2, 4, 4)), "images"),
        (lambda: FeatureValues({}), "values: expected at least one column"),
        (lambda: FeatureValues({7: 1.0}).stamp(torch.zeros(2, 3)), "no column 7"),
        (lambda: FeatureValues({"x": 1}).stamp(pd.DataFrame({"y": [1]})), "no column 'x'"),
        (lambda: FeatureValues({0: 1}).stamp(images()), "expect a table"),
        (lambda: Word(" "), "text: expected a word"),
        (lambda: Word("cf").stamp(torch.zeros(2, 3)), "one column of text"),
        (lambda: Tokens((1, 2), start=3).stamp(torch.zeros(2, 4, dtype=torch.long)), "do not fit a sequence of 4"),
        (lambda: Tokens((1,)).stamp(torch.zeros(2, 4)), "expect integers"),
    ],
)
def test_bad_input_is_named(use: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        use()
