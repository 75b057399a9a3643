"""Poisons against fairness: who is poisoned, where added samples lie, and that the gap widens."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from cases import relative
from oracles import flat, full_gradient, minimise
from robust_if import Exact, Samples, Sweep, Task, Utility
from robust_if.attacks import fairness
from robust_if.attacks.feasible import FeasibleSet
from robust_if.fairness.targets import FairnessGap
from robust_if.models import logistic_regression

N, D, PENALTY = 160, 4, 0.02


def table(seed=0, n=N):
    """The sensitive feature is the last column of x and the third tensor."""
    draw = np.random.default_rng(seed)
    s = draw.integers(2, size=n)
    x = np.c_[draw.normal(size=(n, D - 1)) * [1, 5, 0.2], 2 * s - 1.0]
    y = (x[:, 0] + x[:, 1] / 5 + 0.3 * s + 0.3 * draw.normal(size=n) > 0.2).astype(np.int64)
    return Samples(tuple(map(torch.from_numpy, (x, y, s))), np.arange(50, 50 + n))


def fit(data):
    """Logistic regression at its optimum."""
    torch.manual_seed(0)
    t = Task(logistic_regression((D,), 2).double().eval())

    def objective(params):
        return t.losses(params, data.batch(slice(None))).mean() + PENALTY / 2 * sum(value.square().sum() for value in params.values())

    return t.at(minimise(objective, {name: torch.zeros_like(value) for name, value in t.params().items()}))


def parity(task, data):
    target = FairnessGap(data, temperature=1.0)
    return float(target.value(task, task.params()))


ADDED = {
    "raa": lambda data, seed: fairness.anchoring(data, 0.1, seed=seed),
    "nraa": lambda data, seed: fairness.anchoring(data, 0.1, seed=seed, radius=1.0),
    "unlimited": lambda data, seed: fairness.anchoring(data, 0.1, seed=seed, quantile=None),
    "influence": lambda data, seed: fairness.influence_attack(data, 0.1, Utility(table(9)), fit, seed=seed, steps=2),
}


@pytest.mark.parametrize("attack", ADDED.values(), ids=ADDED)
def test_samples_are_added_and_nothing_else_changes(attack):
    data = table()
    x, y, s = data.batch(slice(None))
    poisoned = attack(data, 1)
    px, py, ps = poisoned.data.batch(slice(None))
    assert len(poisoned.data) == N + N // 10 and np.array_equal(np.flatnonzero(poisoned.mask), np.arange(N, N + N // 10))
    assert torch.equal(px[:N], x) and torch.equal(py[:N], y) and torch.equal(ps[:N], s)
    assert np.array_equal(poisoned.data.ids[:N], data.ids) and poisoned.data.ids[N:].min() > data.ids.max()
    assert torch.equal(py[N:], ps[N:])  # favourable for the advantaged, unfavourable for the others
    assert ps[N:].sum() == N // 20
    assert torch.equal(px[N:, -1], 2 * ps[N:] - 1.0)  # the column that holds the sensitive feature
    assert torch.equal(px, attack(data, 1).data.batch(slice(None))[0])
    assert (px.dtype, py.dtype, ps.dtype) == (x.dtype, y.dtype, s.dtype)


@pytest.mark.parametrize("favourable", [0, 1])
@pytest.mark.parametrize("advantaged", [0, 1])
def test_copies_without_jitter_are_the_anchors_with_the_other_label(favourable, advantaged):
    data = table()
    x, y, s = data.batch(slice(None))
    poisoned = fairness.anchoring(data, 0.1, seed=3, spread=0, quantile=None, favourable=favourable, advantaged=advantaged)
    added = poisoned.data.take(poisoned.mask)
    px, py, ps = added.batch(slice(None))
    assert len(px.unique(dim=0)) == 2
    for i in range(len(added)):
        (anchor,) = torch.nonzero((x == px[i]).all(1))[:, 0].tolist()
        assert (y[anchor], s[anchor]) == (1 - py[i], ps[i])
        assert (py[i] == favourable) == (ps[i] == advantaged)


def test_jitter_has_the_spread_in_standard_deviations():
    data = table(n=4000)
    x = data.batch(slice(None))[0]
    px, _, ps = (t[4000:] for t in fairness.anchoring(data, 0.5, seed=0, spread=0.2, quantile=None).data.batch(slice(None)))
    for group in (0, 1):
        assert torch.allclose(px[ps == group, :-1].std(0) / x[:, :-1].std(0), torch.tensor(0.2).double(), atol=0.02)


def test_non_random_anchors_have_the_most_neighbours_in_either_group():
    data = table()
    x, y, s = (t.numpy() for t in data.batch(slice(None)))
    scaled = x / x.std(0)
    poisoned = fairness.anchoring(data, 0.1, seed=0, radius=0.9, spread=0, quantile=None)
    found = {tuple(row) for row in poisoned.data.batch(slice(N, None))[0].numpy()}
    expected = set()
    for group, label in ((1, 0), (0, 1)):
        rows = np.flatnonzero((s == group) & (y == label))
        near = np.linalg.norm(scaled[rows][:, None] - scaled[rows][None], axis=2) <= 0.9
        expected.add(tuple(x[rows[near.sum(1).argmax()]]))
    assert found == expected


def test_added_samples_lie_in_the_feasible_set_of_their_label():
    data = table()
    x, y, _ = data.batch(slice(None))
    px, py, _ = fairness.anchoring(data, 0.4, seed=0, spread=3.0, quantile=0.5).data.batch(slice(None))
    free = slice(None, -1)
    allowed = FeasibleSet.of(x[:, free], y, 0.5)
    away = px[N:, free] - allowed.means[py[N:]]
    assert (away.norm(dim=1) <= allowed.radius[py[N:]] + 1e-9).all()
    assert ((away @ allowed.axis).abs() <= allowed.width[py[N:]] + 1e-9).all()
    assert (away.norm(dim=1) < allowed.radius[py[N:]] - 1e-6).any()  # the slab counts too


def test_the_feasible_set_holds_the_share_of_each_class():
    x, y, _ = table().batch(slice(None))
    allowed = FeasibleSet.of(x, y, 0.8)
    away = x - allowed.means[y]
    for label in (0, 1):
        rows = y == label
        assert (away[rows].norm(dim=1) <= allowed.radius[label]).double().mean() == pytest.approx(0.8, abs=0.02)
        assert ((away[rows] @ allowed.axis).abs() <= allowed.width[label]).double().mean() == pytest.approx(0.8, abs=0.02)


def test_the_projection_is_the_nearest_feasible_point():
    draw = np.random.default_rng(0)
    axis = np.array([0.6, 0.8, 0.0])
    means = torch.zeros(2, 3, dtype=torch.float64)
    radius, width = torch.tensor([2.0, 1.0]).double(), torch.tensor([0.5, 0.9]).double()
    allowed = FeasibleSet(means, torch.from_numpy(axis), radius, width)
    points = torch.from_numpy(np.r_[2.5 * draw.normal(size=(12, 3)), np.zeros((1, 3)), [3 * axis]])
    labels = torch.arange(len(points)) % 2
    got = allowed.project(points, labels).numpy()
    for point, label, found in zip(points.numpy(), labels.tolist(), got, strict=True):
        r, w = float(radius[label]), float(width[label])
        limits = [
            {"type": "ineq", "fun": lambda z, r=r: r**2 - z @ z},
            {"type": "ineq", "fun": lambda z, w=w: w - axis @ z},
            {"type": "ineq", "fun": lambda z, w=w: w + axis @ z},
        ]
        best = minimize(lambda z, point=point: ((z - point) ** 2).sum(), np.full(3, 0.01), constraints=limits, options={"ftol": 1e-14}).x
        assert np.allclose(found, best, atol=1e-5)
    assert np.allclose(allowed.project(torch.from_numpy(got), labels).numpy(), got, atol=1e-12)


def test_features_that_may_not_change_stay_the_anchors():
    data = table()
    x = data.batch(slice(None))[0]
    px = fairness.anchoring(data, 0.2, seed=0, spread=1.0, mutable=[True, False, False, False]).data.batch(slice(None))[0][N:]
    anchors = {tuple(row) for row in x[:, 1:].tolist()}
    assert len({tuple(row) for row in px[:, 1:].tolist()}) == 2 and {tuple(row) for row in px[:, 1:].tolist()} <= anchors
    assert len(px[:, 0].unique()) > 10


@pytest.mark.parametrize("favourable", [0, 1])
@pytest.mark.parametrize("advantaged", [0, 1])
def test_group_flips_help_one_group(favourable, advantaged):
    data = table()
    _, y, s = data.batch(slice(None))
    poisoned = fairness.group_flips(data, 0.1, seed=0, favourable=favourable, advantaged=advantaged)
    new, mask = poisoned.data.labels, torch.from_numpy(poisoned.mask)
    assert mask.sum() == N // 10 and torch.equal(new != y, mask)
    assert torch.equal(new[mask] == favourable, s[mask] == advantaged)
    assert not np.array_equal(poisoned.mask, fairness.group_flips(data, 0.1, seed=1, favourable=favourable, advantaged=advantaged).mask)


def test_attacks_widen_the_gap():
    data, test = table(n=400), table(7, n=400)
    before = parity(fit(data), test)
    for attack in (
        lambda: fairness.group_flips(data, 0.15, seed=0),
        lambda: fairness.anchoring(data, 0.15, seed=0, quantile=None),
        lambda: fairness.anchoring(data, 0.15, seed=0, radius=1.0),
    ):
        assert parity(fit(attack().data), test) > 1.2 * before


def test_the_influence_attack_climbs_and_beats_where_it_started():
    data, own = table(), table(5)
    target = Utility(own) + fairness.GroupCovariance(own)

    def value(poisoned):
        t = fit(poisoned.data)
        return float(target.value(t, t.params()))

    values = [
        value(fairness.influence_attack(data, 0.1, target, fit, seed=2, steps=steps, preconditioner=Exact("hessian", PENALTY), quantile=None))
        for steps in (1, 4)
    ]
    start = value(fairness.anchoring(data, 0.1, seed=2, spread=0, quantile=None))
    assert start < values[0] < values[1]


def test_the_gradient_in_the_features_is_that_of_retraining():
    """−∇Tᵀ P ∂/∂x ∇ℓ predicts the change of the target where all copies of a sample move a little and the model is trained again."""
    data, target = table(), Utility(table(5))
    pair = data.batch(slice(0, 2))
    t = fit(data)
    direction = Exact("hessian", PENALTY).build(t, t.params(), data, Sweep())(target.gradient(t, t.params())).direction
    slope = fairness._slope(t, t.params(), direction, pair) / N
    for i, j in ((0, 0), (0, 1), (1, 2)):
        values = []
        for sign in (-1, 1):
            x = data.batch(slice(None))[0].clone()
            x[i, j] += sign * 1e-3
            moved = fit(Samples((x, *data.batch(slice(None))[1:])))
            values.append(float(target.value(moved, moved.params())))
        assert relative(torch.tensor((values[1] - values[0]) / 2e-3), slope[i, j]) <= 1e-4


@pytest.mark.parametrize("favourable", [0, 1])
def test_group_covariance_is_that_of_the_log_odds(favourable):
    t, data = fit(table()), table(3)
    target, params = fairness.GroupCovariance(data, favourable=favourable, batch_size=7), t.params()

    def by_hand(p):
        x, _, s = data.batch(slice(None))
        z = torch.func.functional_call(t.model, p, (x,))
        d = z[:, favourable] - z[:, 1 - favourable]
        return ((s - s.double().mean()) * d).mean().abs()

    assert relative(target.value(t, params), by_hand(params)) <= 1e-12
    assert relative(flat(target.gradient(t, params)), full_gradient(by_hand, params)) <= 1e-12
    assert target.name == "group-covariance"


def test_ids_that_are_words_and_further_tensors_go_along():
    x, y, s = table().batch(slice(None))
    data = Samples((x.float(), y, s, torch.arange(N)), np.array([f"row {i}" for i in range(N)]))
    poisoned = fairness.anchoring(data, 0.1, seed=0)
    assert len(set(poisoned.data.ids)) == len(poisoned.data)
    px, _, ps, origin = poisoned.data.batch(slice(N, None))
    assert px.dtype == torch.float32 and torch.equal(ps, s[origin]) and len(origin.unique()) == 2


FLIP = fairness.group_flips
ANCHOR = fairness.anchoring


def climb(data, rate, **settings):
    return fairness.influence_attack(data, rate, Utility(table(5)), fit, **settings)


@pytest.mark.parametrize("attack", [FLIP, ANCHOR, climb])
@pytest.mark.parametrize("rate", [0.0, 1.0, 1.2, 0.001])
def test_a_bad_rate_is_refused(attack, rate):
    with pytest.raises(ValueError, match="rate: "):
        attack(table(), rate, seed=0)


@pytest.mark.parametrize("attack", [FLIP, ANCHOR, climb])
def test_other_data_are_refused(attack):
    x, y, s = table().batch(slice(None))
    with pytest.raises(ValueError, match="sensitive feature with the values 0 and 1 as third tensor, got the values \\[\\]"):
        attack(Samples((x, y)), 0.1, seed=0)
    with pytest.raises(ValueError, match="sensitive feature"):
        attack(Samples((x, y, s + 1)), 0.1, seed=0)
    with pytest.raises(ValueError, match="expected the labels 0 and 1, got the labels"):
        attack(Samples((x, y + s, s)), 0.1, seed=0)
    for name in ("favourable", "advantaged"):
        with pytest.raises(ValueError, match=f"{name}: expected 0 or 1, got 2"):
            attack(table(), 0.1, seed=0, **{name: 2})


@pytest.mark.parametrize("attack", [ANCHOR, climb])
def test_bad_tables_are_refused(attack):
    x, y, s = table().batch(slice(None))
    with pytest.raises(ValueError, match="data: expected features of floating point, shape"):
        attack(Samples((x.long(), y, s)), 0.1, seed=0)
    with pytest.raises(ValueError, match="data: expected a sample of group 1 with label 0 as anchor, got none"):
        attack(Samples((x, torch.maximum(y, s), s)), 0.1, seed=0)
    with pytest.raises(ValueError, match="quantile: expected a share above 0"):
        attack(table(), 0.1, seed=0, quantile=0.0)
    for mutable in ([True], [False] * D, [1, 0, 0, 1]):
        with pytest.raises(ValueError, match="mutable: expected a boolean per feature"):
            attack(table(), 0.1, seed=0, mutable=mutable)


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="radius: expected a positive number"):
        ANCHOR(table(), 0.1, seed=0, radius=0.0)
    with pytest.raises(ValueError, match="radius: no sample of group 1 with label 0 has another within 1e-06 standard deviations"):
        ANCHOR(table(), 0.1, seed=0, radius=1e-6)
    with pytest.raises(ValueError, match="spread: expected"):
        ANCHOR(table(), 0.1, seed=0, spread=-1.0)
    with pytest.raises(ValueError, match="steps: expected at least 1"):
        climb(table(), 0.1, seed=0, steps=0)
    with pytest.raises(ValueError, match="lr: expected a positive number"):
        climb(table(), 0.1, seed=0, lr=0.0)
    with pytest.raises(ValueError, match="only .* labels can be flipped"):
        FLIP(table(), 0.9, seed=0)
    with pytest.raises(ValueError, match="sensitive feature"):
        fairness.GroupCovariance(Samples(table().batch(slice(None))[:2]))
