"""Label noise: the mask tells exactly what changed, and nothing else changes."""

import numpy as np
import pytest
import torch

from robust_if.attacks import labels as noise
from robust_if.data import Samples

N, K = 600, 5


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(0)
    return Samples((torch.randn(N, 7, generator=generator), torch.randint(0, K, (N,), generator=generator)), np.arange(100, 100 + N))


POISONS = {
    "symmetric": lambda data, seed: noise.symmetric(data, 0.3, seed=seed),
    "pair": lambda data, seed: noise.pair(data, 0.3, seed=seed),
    "instance": lambda data, seed: noise.instance_dependent(data, 0.3, seed=seed),
}


@pytest.mark.parametrize("poison", POISONS.values(), ids=POISONS)
def test_the_mask_is_what_changed_and_features_and_ids_stay(data, poison):
    before = data.labels.clone()
    poisoned = poison(data, 0)
    changed = poisoned.data.labels != before
    assert np.array_equal(poisoned.mask, changed.numpy())
    assert torch.equal(poisoned.data.batch(slice(None))[0], data.batch(slice(None))[0])
    assert np.array_equal(poisoned.data.ids, data.ids)
    assert torch.equal(data.labels, before)
    assert 0 <= poisoned.data.labels.min()
    assert poisoned.data.labels.max() < K


@pytest.mark.parametrize("poison", POISONS.values(), ids=POISONS)
def test_a_seed_reproduces_and_another_one_differs(data, poison):
    assert torch.equal(poison(data, 3).data.labels, poison(data, 3).data.labels)
    assert not torch.equal(poison(data, 3).data.labels, poison(data, 4).data.labels)


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.4, 1.0])
@pytest.mark.parametrize("function", [noise.symmetric, noise.pair])
def test_the_rate_is_exact(data, function, rate):
    assert function(data, rate, seed=0).mask.sum() == round(rate * N)


def test_symmetric_noise_spreads_evenly_over_the_other_classes(data):
    everything = Samples((torch.zeros(20000, 1), torch.zeros(20000, dtype=torch.long)))
    labels = noise.symmetric(everything, 1.0, seed=0, classes=K).data.labels
    counts = torch.bincount(labels, minlength=K)
    assert counts[0] == 0
    assert counts[1:].min() > 4700


def test_pair_noise_goes_to_the_next_class(data):
    poisoned = noise.pair(data, 0.5, seed=0)
    mask = torch.from_numpy(poisoned.mask)
    assert torch.equal(poisoned.data.labels[mask], (data.labels[mask] + 1) % K)


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


def test_bad_arguments_are_named(data, tmp_path):
    with pytest.raises(ValueError, match="rate: expected a share"):
        noise.symmetric(data, 1.5, seed=0)
    with pytest.raises(ValueError, match="classes: expected labels from 0 to 2"):
        noise.pair(data, 0.1, seed=0, classes=3)
    with pytest.raises(ValueError, match="at least 2 classes"):
        noise.symmetric(Samples((torch.zeros(3, 1), torch.zeros(3, dtype=torch.long))), 0.5, seed=0)
    with pytest.raises(ValueError, match="one label per sample"):
        noise.given(data, [1, 2, 3])
    np.savez(tmp_path / "a.npz", a=np.zeros(3))
    with pytest.raises(ValueError, match="no array 'b'; it has a"):
        noise.read_labels(tmp_path / "a.npz", "b")
