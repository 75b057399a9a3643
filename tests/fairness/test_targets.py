"""fairness/targets.py: gaps between groups as targets."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cases import relative
from oracles import flat, full_gradient
from robust_if import Plain, Samples, Task, Tuning, Utility
from robust_if.fairness.targets import DemographicParity
from robust_if.models import mlp

N = 23


def held_out(seed: int = 0, n: int = N) -> Samples:
    draw = np.random.default_rng(seed)
    s = (np.arange(n) % 3 == 0).astype(np.int64)
    x = draw.normal(size=(n, 4)) + s[:, None]
    return Samples((torch.from_numpy(x), torch.from_numpy(draw.integers(3, size=n)), torch.from_numpy(s)))


def task() -> Task:
    torch.manual_seed(0)
    return Task(mlp((4,), 3, width=6).double().eval())


def by_hand(t: Task, params: dict[str, torch.Tensor], data: Samples, positive: int) -> torch.Tensor:
    x, _, s = data.batch(slice(None))
    p = torch.func.functional_call(t.model, params, (x,)).softmax(1)[:, positive]
    return (p[s == 1].mean() - p[s == 0].mean()) ** 2


@pytest.mark.parametrize("positive", [0, 1, 2])
def test_the_value_is_the_squared_difference_of_the_group_means(positive: int) -> None:
    t, data = task(), held_out()
    got = DemographicParity(data, positive=positive).value(t, t.params())
    assert got.shape == () and relative(got, by_hand(t, t.params(), data, positive)) <= 1e-12
    assert DemographicParity(data).positive == 1


@pytest.mark.parametrize("size", [1, 2, 5, N, 100])
@pytest.mark.parametrize("positive", [0, 1])
def test_the_gradient_is_full_batch_autograd_for_any_batch_size(size: int, positive: int) -> None:
    t, data = task(), held_out()
    target, params = DemographicParity(data, batch_size=size, positive=positive), t.params()
    assert relative(flat(target.gradient(t, params)), full_gradient(lambda p: by_hand(t, p, data, positive), params)) <= 1e-12
    both = 2 * Utility(data, batch_size=size) + target
    expected = full_gradient(lambda p: 2 * t.losses(p, data.batch(slice(None))).mean() + by_hand(t, p, data, positive), params)
    assert relative(flat(both.gradient(t, params)), expected) <= 1e-12


@pytest.mark.parametrize("values", [[0, 1, 2], [0], [1], [-1, 1]])
def test_a_sensitive_feature_other_than_0_and_1_is_refused(values: list[int]) -> None:
    x, y, _ = held_out().batch(slice(None))
    with pytest.raises(ValueError, match="data: expected a sensitive feature with the values 0 and 1 as third tensor, got the values"):
        DemographicParity(Samples((x, y, torch.tensor(values).repeat(N)[:N])))


def test_data_without_a_sensitive_feature_are_refused() -> None:
    x, y, _ = held_out().batch(slice(None))
    with pytest.raises(ValueError, match="data: expected a sensitive feature .* third tensor"):
        DemographicParity(Samples((x, y)))


@pytest.mark.parametrize("kind", [torch.float64, torch.int32, torch.bool])
def test_the_sensitive_feature_may_be_of_any_type(kind: torch.dtype) -> None:
    (x, y, s), t = held_out().batch(slice(None)), task()
    got = DemographicParity(Samples((x, y, s.to(kind)))).value(t, t.params())
    assert relative(got, by_hand(t, t.params(), held_out(), 1)) <= 1e-12


@pytest.mark.parametrize("size", [1, 2, 6, 15])
def test_a_minibatch_keeps_both_groups_and_repeats_with_its_generator(size: int) -> None:
    t = task()
    x, y, _ = held_out().batch(slice(None))
    target = DemographicParity(Samples((x, y, (torch.arange(N) == 7).long())), positive=2)  # one sample in one of the groups
    for seed in range(5):
        one, other = (target.minibatch(size, torch.Generator().manual_seed(seed)) for _ in range(2))
        assert set(one.data.batch(slice(None))[2].tolist()) == {0, 1} and one.positive == 2
        assert len(one.data) <= max(2, size) and one.data.ids.tolist() == other.data.ids.tolist()
        assert torch.isfinite(one.value(t, t.params()))


@pytest.mark.parametrize("size", [N, N + 1])
def test_a_minibatch_of_all_is_the_target_itself(size: int) -> None:
    target = DemographicParity(held_out())
    assert target.minibatch(size, torch.Generator()) is target


def test_tuning_lowers_the_gap_alone_and_in_a_sum() -> None:
    t, parity = task(), DemographicParity(held_out(n=60))
    for target in (parity, Utility(parity.data) + 0.5 * parity):
        tuned = Tuning(steps=60, lr=0.1, batch_size=20, flatness=Plain()).run(t, target)
        assert target.value(t, tuned) < target.value(t, t.params())
