"""Label noise: the mask tells exactly what changed, and nothing else changes."""

import numpy as np
import pytest
import torch

from robust_if import Exact, InnerProduct, Samples, Task, Utility
from robust_if.attacks import labels as noise
from robust_if.fairness.targets import FairnessGap
from robust_if.models import logistic_regression

N, K = 600, 5


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, 7, generator=generator, dtype=torch.float64)
    return Samples((x, torch.randint(0, K, (N,), generator=generator), torch.arange(N) % 2), np.arange(100, 100 + N))


def task(classes=K, seed=0):
    torch.manual_seed(seed)
    return Task(logistic_regression((7,), classes).double().eval())


def other(data):
    return Utility(data.take(np.arange(0, N, 7)))


SEEDED = {
    "uniform": lambda data, seed: noise.uniform(data, 0.3, seed=seed),
    "pair": lambda data, seed: noise.pair(data, 0.3, seed=seed),
    "targeted": lambda data, seed: noise.targeted(data, 4, 1, 0.5, seed=seed),
    "instance": lambda data, seed: noise.instance_dependent(data, 0.3, seed=seed),
}
POISONS = SEEDED | {
    "boundary": lambda data, _: noise.boundary(data, 0.3, task()),
    "influence": lambda data, _: noise.influence_chosen(data, 0.3, task(), other(data)),
}


@pytest.mark.parametrize("poison", POISONS.values(), ids=POISONS)
def test_the_mask_is_what_changed_and_the_rest_stays(data, poison):
    before = data.labels.clone()
    poisoned = poison(data, 0)
    changed = poisoned.data.labels != before
    assert np.array_equal(poisoned.mask, changed.numpy()) and not poisoned.covers.any()
    for position in (0, 2):
        assert torch.equal(poisoned.data.batch(slice(None))[position], data.batch(slice(None))[position])
    assert np.array_equal(poisoned.data.ids, data.ids)
    assert torch.equal(data.labels, before)
    assert 0 <= poisoned.data.labels.min()
    assert poisoned.data.labels.max() < K


@pytest.mark.parametrize("poison", SEEDED.values(), ids=SEEDED)
def test_a_seed_reproduces_and_another_one_differs(data, poison):
    assert torch.equal(poison(data, 3).data.labels, poison(data, 3).data.labels)
    assert not torch.equal(poison(data, 3).data.labels, poison(data, 4).data.labels)


@pytest.mark.parametrize("rate", [0.001, 0.1, 0.4, 0.999])
@pytest.mark.parametrize(
    "function",
    [
        lambda data, rate: noise.uniform(data, rate, seed=0),
        lambda data, rate: noise.pair(data, rate, seed=0),
        lambda data, rate: noise.boundary(data, rate, task()),
        lambda data, rate: noise.influence_chosen(data, rate, task(), other(data)),
    ],
)
def test_the_rate_is_exact(data, function, rate):
    if round(rate * N) == N:
        with pytest.raises(ValueError, match="is all of them"):
            function(data, rate)
    else:
        assert function(data, rate).mask.sum() == round(rate * N)


def test_uniform_noise_spreads_evenly_over_the_other_classes():
    everything = Samples((torch.zeros(20000, 1), torch.zeros(20000, dtype=torch.long)))
    poisoned = noise.uniform(everything, 0.9, seed=0, classes=K)
    counts = torch.bincount(poisoned.data.labels[torch.from_numpy(poisoned.mask)], minlength=K)
    assert counts[0] == 0
    assert counts[1:].min() > 4200


def test_pair_noise_goes_to_the_next_class(data):
    poisoned = noise.pair(data, 0.5, seed=0)
    mask = torch.from_numpy(poisoned.mask)
    assert torch.equal(poisoned.data.labels[mask], (data.labels[mask] + 1) % K)


def test_targeted_noise_counts_in_the_class_unless_told_otherwise(data):
    size = int((data.labels == 2).sum())
    of_class = noise.targeted(data, 2, 0, 0.25, seed=0)
    of_all = noise.targeted(data, 2, 0, 0.1, seed=0, rate_of="dataset")
    assert (of_class.mask.sum(), of_all.mask.sum()) == (round(0.25 * size), round(0.1 * N))
    for poisoned in (of_class, of_all):
        assert set(data.labels[torch.from_numpy(poisoned.mask)].tolist()) == {2}
        assert set(poisoned.data.labels[torch.from_numpy(poisoned.mask)].tolist()) == {0}


def test_boundary_flips_are_the_easiest_to_take_for_another_class(data):
    p = task().model(data.batch(slice(None))[0]).softmax(1).detach().numpy()
    poisoned = noise.boundary(data, 0.2, p)
    y, new = data.labels.numpy(), poisoned.data.labels.numpy()
    p[np.arange(N), y] = -1  # the label itself is no other class
    assert np.array_equal(new[poisoned.mask], p.argmax(1)[poisoned.mask])
    assert p.max(1)[poisoned.mask].min() >= p.max(1)[~poisoned.mask].max()
    assert np.array_equal(noise.boundary(data, 0.2, task()).mask, poisoned.mask)


def test_of_equal_gains_the_first_samples_are_flipped(data):
    poisoned = noise.boundary(data, 0.1, np.full((N, K), 1 / K))
    assert poisoned.mask[: N // 10].all() and not poisoned.mask[N // 10 :].any()


def test_influence_chosen_flips_have_the_largest_gain_by_hand(data):
    t, target = task(), other(data)
    x, y, _ = data.batch(slice(None))
    p = t.model(x).softmax(1).detach()
    slope = target.gradient(t, t.params())
    direction = torch.cat([slope["1.weight"], slope["1.bias"][:, None]], 1)  # with P = I
    inputs = torch.cat([x, torch.ones(N, 1).double()], 1)
    gradients = (p[:, None] - torch.eye(K).double())[..., None] * inputs[:, None, None]  # (n, given label, class, d)
    influence = -(gradients * direction).sum((2, 3)) / N
    gains = influence - influence[torch.arange(N), y][:, None]
    gains[torch.arange(N), y] = -torch.inf
    chosen = gains.max(1).values.argsort(descending=True)[: round(0.2 * N)]
    poisoned = noise.influence_chosen(data, 0.2, t, target, estimator=InnerProduct())
    assert set(np.flatnonzero(poisoned.mask)) == set(chosen.tolist())
    assert torch.equal(poisoned.data.labels[chosen], gains[chosen].argmax(1))


@pytest.mark.parametrize(("kind", "factor"), [(Utility, 1.3), (lambda data: FairnessGap(data, temperature=1.0), 1.15)])
def test_influence_chosen_flips_raise_the_target_more_than_random_ones(kind, factor):
    draw = np.random.default_rng(0)
    s = np.arange(300) % 2
    x = draw.normal(size=(300, 7)) + 0.5 * s[:, None]
    y = (x.sum(1) + draw.normal(size=300) > 1.5).astype(int)
    whole = Samples((torch.from_numpy(x), torch.from_numpy(y), torch.from_numpy(s)))
    train, target = whole.take(np.arange(150)), kind(whole.take(np.arange(150, 300)))

    def trained(samples):
        t = task(2)
        optimizer = torch.optim.LBFGS(t.model.parameters(), max_iter=50)

        def closure():
            optimizer.zero_grad()
            loss = t.losses(dict(t.model.named_parameters()), samples.batch(slice(None))).mean() + 0.01 * t.model[1].weight.square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        return t

    clean = trained(train)
    chosen = trained(noise.influence_chosen(train, 0.1, clean, target, estimator=InnerProduct(Exact(damping=0.02))).data)
    random = trained(noise.uniform(train, 0.1, seed=0).data)
    values = [float(target.value(t, t.params()).detach()) for t in (clean, random, chosen)]
    assert values[2] > factor * max(values[:2])


def test_instance_dependent_noise_has_about_the_rate_and_depends_on_the_features(data):
    poisoned = noise.instance_dependent(data, 0.3, seed=0)
    assert 0.2 < poisoned.mask.mean() < 0.4
    twins = Samples((torch.cat([data.batch(slice(0, 1))[0]] * 4000), torch.zeros(4000, dtype=torch.long)))
    spread = torch.bincount(noise.instance_dependent(twins, 0.5, seed=1, classes=K).data.labels, minlength=K)[1:]
    assert spread.min() > 0  # identical features carry no information, so every other class is drawn


def test_given_labels_are_compared_with_the_truth(data, tmp_path):
    noisy = data.labels.numpy().copy()
    noisy[:10] = (noisy[:10] + 1) % K
    np.savez(tmp_path / "labels.npz", worse=noisy)
    poisoned = noise.given(data, noise.read_labels(tmp_path / "labels.npz", "worse"))
    assert poisoned.mask.sum() == 10
    assert poisoned.mask[:10].all()


@pytest.mark.parametrize("rate", [0.0, 1.0, -0.1, 1.5, float("nan")])
@pytest.mark.parametrize("function", [
    lambda data, rate: noise.uniform(data, rate, seed=0),
    lambda data, rate: noise.pair(data, rate, seed=0),
    lambda data, rate: noise.targeted(data, 0, 1, rate, seed=0),
    lambda data, rate: noise.boundary(data, rate, task()),
    lambda data, rate: noise.influence_chosen(data, rate, task(), other(data)),
    lambda data, rate: noise.instance_dependent(data, rate, seed=0),
])  # fmt: skip
def test_a_rate_outside_0_and_1_is_refused(data, function, rate):
    with pytest.raises(ValueError, match="rate: expected a share strictly between 0 and 1"):
        function(data, rate)


def test_a_rate_of_no_sample_is_refused(data):
    with pytest.raises(ValueError, match="rate: .* is none of them"):
        noise.uniform(data, 0.0005, seed=0)
    with pytest.raises(ValueError, match="samples of class 2 is none of them"):
        noise.targeted(data, 2, 0, 0.001, seed=0)
    with pytest.raises(ValueError, match="at least one poisoned sample, got none"):
        noise.given(data, data.labels)


def test_bad_arguments_are_named(data, tmp_path):
    with pytest.raises(ValueError, match="classes: expected labels from 0 to 2"):
        noise.pair(data, 0.1, seed=0, classes=3)
    with pytest.raises(ValueError, match="at least 2 classes"):
        noise.uniform(Samples((torch.zeros(3, 1), torch.zeros(3, dtype=torch.long))), 0.5, seed=0)
    with pytest.raises(ValueError, match="source: no sample has the label 9"):
        noise.targeted(data, 9, 0, 0.5, seed=0)
    with pytest.raises(ValueError, match="goal: no sample has the label 9"):
        noise.targeted(data, 0, 9, 0.5, seed=0)
    with pytest.raises(ValueError, match="goal: expected another class"):
        noise.targeted(data, 1, 1, 0.5, seed=0)
    with pytest.raises(ValueError, match="rate_of: expected 'class' or 'dataset'"):
        noise.targeted(data, 1, 2, 0.5, seed=0, rate_of="all")
    with pytest.raises(ValueError, match="rate: 0.9 of the data set is 540 samples, but class 1 has"):
        noise.targeted(data, 1, 2, 0.9, seed=0, rate_of="dataset")
    with pytest.raises(ValueError, match="surrogate: expected finite probabilities"):
        noise.boundary(data, 0.1, np.ones((N - 1, K)))
    with pytest.raises(ValueError, match="surrogate: expected finite probabilities"):
        noise.boundary(data, 0.1, np.full((N, K), np.nan))
    with pytest.raises(ValueError, match="task: expected one output per class"):
        noise.boundary(data, 0.1, task(1))
    with pytest.raises(ValueError, match="classes: expected labels from 0 to 2"):
        noise.influence_chosen(data, 0.1, task(3), other(data))
    with pytest.raises(ValueError, match="one label per sample"):
        noise.given(data, [1, 2, 3])
    np.savez(tmp_path / "a.npz", a=np.zeros(3))
    with pytest.raises(ValueError, match="no array 'b'; it has a"):
        noise.read_labels(tmp_path / "a.npz", "b")
