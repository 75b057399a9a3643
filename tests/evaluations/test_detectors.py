"""detectors/: each against a dense reference or data whose answer is known, and what holds for all of them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.stats import multivariate_normal
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits
from sklearn.decomposition import FastICA
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from cases import CLASSIFIERS, blobs, case, relative
from robust_if import Estimator, Recipe, Samples, Store, Sweep, Task, Utility, fit, train
from robust_if.attacks.backdoors import badnets
from robust_if.evaluations.detectors import (
    AUM,
    SPECTRE,
    STRIP,
    ActivationClustering,
    DeepKNN,
    EarlyLoss,
    FeatureDetector,
    GradientForest,
    SCAn,
    SpectralSignatures,
    features,
)
from robust_if.evaluations.detectors.activations import two_means
from robust_if.evaluations.detectors.dynamics import margin
from robust_if.evaluations.detectors.features import class_logits, principal
from robust_if.evaluations.detectors.scan import decomposition
from robust_if.evaluations.detectors.spectre import que
from robust_if.models import build, logistic_regression
from unchanged import untouched

SHORT = Recipe(epochs=3, lr=0.1, batch_size=5, keep=3)
ON_FEATURES: dict[str, FeatureDetector] = {
    "activation-clustering": ActivationClustering(),
    "activation-clustering-ica": ActivationClustering(reduction="ica"),
    "spectral": SpectralSignatures(),
    "spectre": SPECTRE(),
    "scan": SCAn(),
    "scan-clean": SCAn(clean=True),
    "deep-knn": DeepKNN(5),
}
TRAINED: dict[str, Estimator] = {"aum": AUM(SHORT), "early-loss": EarlyLoss(SHORT)}
DETECTORS: dict[str, Estimator] = {
    **ON_FEATURES, "strip": STRIP(5, bounds=None), "gradient-forest": GradientForest(size=64, trees=20), **TRAINED,
}  # fmt: skip


def outlying(n: int = 200, share: float = 0.05, d: int = 8, distance: float = 12.0, seed: int = 0) -> tuple[NDArray, NDArray, NDArray]:
    """Features of three Gaussian classes far from the origin, of which class 0 holds a share of outliers: features, labels, and who they are."""
    draw = np.random.default_rng(seed)
    labels = np.repeat([0, 1, 2], n)
    rows = draw.normal(size=(3 * n, d)) + 30 * np.eye(d)[labels] + 20
    mask = np.arange(3 * n) < round(share * n)
    rows[mask, 3] += distance
    order = draw.permutation(3 * n)
    return rows[order], labels[order], mask[order]


# Features


def by_hand(task: Task, x: Tensor) -> Tensor:
    """The input of the layer ``out``; of a sequence what all but its last module give."""
    if isinstance(task.model, nn.Sequential):
        return task.model[:-1](x)
    seen: list[Tensor] = []
    handle = task.model.get_submodule("out").register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    task.model(x)
    handle.remove()
    return seen[-1]


@pytest.mark.parametrize("batch_size", [2, 100])
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_features_are_the_input_of_the_last_linear_layer(name: str, batch_size: int) -> None:
    c = case(name)
    with untouched(c.task.model):
        got = features(c.task, c.train, batch_size)
    assert relative(got, by_hand(c.task, c.train.batch(slice(None))[0]).detach()) <= 1e-12
    assert got.dtype == np.float64 and got.ndim == 2


def test_features_take_the_mean_over_positions_and_any_layer() -> None:
    x = torch.randn(6, 3, 5, dtype=torch.float64)
    images = case("cnn")
    tokens = case("attention")
    convolved, embedded = images.task.model.get_submodule("second"), tokens.task.model.get_submodule("embed")
    assert features(images.task, images.train, layer="second").shape == (13, convolved.out_channels)
    assert features(tokens.task, tokens.train, layer="embed").shape == (13, embedded.embedding_dim)
    sequence = Task(nn.Sequential(nn.Conv1d(3, 4, 2), nn.Flatten(), nn.Linear(16, 2)).double().eval())
    expected = sequence.model[0](x).mean(2).detach()
    assert relative(features(sequence, Samples((x, torch.zeros(6).long())), layer="0"), expected) <= 1e-12
    expected = tokens.task.model.embed(tokens.train.batch(slice(None))[0]).mean(1).detach()
    assert relative(features(tokens.task, tokens.train, layer="embed"), expected) <= 1e-12


def test_features_need_no_labels_and_serve_any_batch() -> None:
    c = case("regression")
    assert features(c.task, c.train).shape == (13, 6)


@pytest.mark.parametrize(
    ("name", "layer", "message"),
    [
        ("mlp", "nowhere", r"layer: the model has no module 'nowhere'; it has 0, 1"),
        ("recurrent", "layer", r"layer: expected a tensor \(2, …\), one row per sample, got tuple at layer"),
        ("positions-first", "inner", r"layer: expected a tensor \(2, …\), one row per sample, got shape \(4, 2, 6\) at inner"),
    ],
)
def test_a_layer_that_does_not_serve_is_refused(name: str, layer: str | None, message: str) -> None:
    c = case(name)
    for call in (lambda: features(c.task, c.train, layer=layer), lambda: SpectralSignatures(layer=layer).score(c.task, c.train)):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("batch_size", [3, 4])
def test_positions_are_not_taken_for_samples_where_there_are_as_many(batch_size: int) -> None:
    c = case("positions-first")
    with pytest.raises(ValueError, match="one row per sample"):
        DeepKNN(2, layer="inner").score(c.task, c.train.take(range(12)), sweep=Sweep(batch_size=batch_size))


def test_a_model_without_a_linear_layer_needs_a_named_one() -> None:
    task = Task(nn.Sequential(nn.Conv2d(1, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval())
    data = Samples((torch.randn(4, 1, 5, 5), torch.tensor([0, 1, 0, 1])))
    with pytest.raises(ValueError, match="layer: the model does not call any linear layer"):
        SpectralSignatures().score(task, data)
    assert SpectralSignatures(layer="0").score(task, data).values.shape == (4,)


@pytest.mark.parametrize(("n", "d"), [(30, 6), (6, 30)])
@pytest.mark.parametrize("whiten", [False, True])
def test_principal_components_are_those_of_a_singular_value_decomposition(n: int, d: int, whiten: bool) -> None:
    rows = np.random.default_rng(0).normal(size=(n, d)) + 5
    left, lengths, _ = np.linalg.svd(rows - rows.mean(0), full_matrices=False)
    expected = left[:, :3] * (np.sqrt(n) if whiten else lengths[:3])
    assert np.allclose(np.abs(principal(rows, 3, whiten)), np.abs(expected))
    order = np.random.default_rng(1).permutation(n)
    assert np.allclose(principal(rows[order], 3, whiten), principal(rows, 3, whiten)[order])


def test_directions_without_variance_are_left_out() -> None:
    rows = np.random.default_rng(0).normal(size=(20, 2)) @ np.random.default_rng(1).normal(size=(2, 7))
    assert principal(rows, 5).shape == (20, 2)
    assert principal(np.ones((4, 3)), 2).shape == (4, 0)


# Activation clustering and spectral signatures


def test_two_means_reach_the_best_of_many_random_starts() -> None:
    for seed in range(3):
        rows = np.random.default_rng(seed).standard_t(3, size=(80, 4))
        rows[:9, seed] += 6
        split = two_means(principal(rows, 4))
        assert split is not None
        best = KMeans(2, n_init=50, random_state=0).fit(rows)
        total = ((rows - rows.mean(0)) ** 2).sum()
        assert split[2] >= 0.999 * (total - best.inertia_)
        assert (split[1] == (best.labels_ == np.bincount(best.labels_).argmin())).mean() >= 0.95


def test_a_small_cluster_scores_by_its_size_and_every_sample_by_its_distances() -> None:
    rows = np.array([[0.0, 0], [1, 0], [0, 1], [1, 1], [10, 10], [10, 11]])
    got = ActivationClustering().scores(rows, np.zeros(6, dtype=int))
    centres = np.array([[0.5, 0.5], [10, 10.5]])
    big, small = np.linalg.norm(rows[:, None] - centres, axis=2).T
    assert np.allclose(got, big / (big + small) + (1 - 2 / 6) * np.array([0, 0, 0, 0, 1, 1]))
    without = ActivationClustering(small=0.2).scores(rows, np.zeros(6, dtype=int))
    assert np.allclose(without, big / (big + small))


def test_independent_components_are_a_rotation_of_the_whitened_principal_ones() -> None:
    rows = np.random.default_rng(0).laplace(size=(300, 6)) @ np.random.default_rng(1).normal(size=(6, 6))
    ica = FastICA(3, whiten="unit-variance", random_state=0, max_iter=1000).fit_transform(rows)
    pca = principal(rows, 3, whiten=True)
    between = [np.linalg.norm(each[:, None] - each, axis=2) for each in (ica, pca)]
    assert np.allclose(*between, rtol=1e-6)


def test_spectral_signatures_are_centred_projections() -> None:
    rows, labels, _ = outlying(n=40)
    got = SpectralSignatures().scores(rows, labels)
    for label in range(3):
        own = rows[labels == label] - rows[labels == label].mean(0)
        axis = np.linalg.svd(own)[2][0]
        assert np.allclose(got[labels == label], (own @ axis) ** 2)


def test_uncentred_projections_would_miss_what_centred_ones_find() -> None:
    rows, labels, mask = outlying()
    rows[mask] -= 2 * (rows[mask] - rows[mask].mean(0)) + 5  # nearer to the origin than the class is
    own = labels == 0
    axis = np.linalg.svd(rows[own] - rows[own].mean(0))[2][0]
    assert roc_auc_score(mask[own], SpectralSignatures().scores(rows, labels)[own]) == 1
    assert roc_auc_score(mask[own], (rows[own] @ axis) ** 2) < 0.5


@pytest.mark.parametrize("detector", [*ON_FEATURES.values()], ids=[*ON_FEATURES])
def test_detectors_on_features_find_a_few_outliers_of_one_class(detector: FeatureDetector) -> None:
    if isinstance(detector, DeepKNN):
        pytest.skip("outliers that are near each other are their own neighbours")
    rows, labels, mask = outlying()
    if isinstance(detector, SCAn) and detector.clean:
        clean, known, _ = outlying(share=0.0, seed=1)
        assert roc_auc_score(mask, detector.scores(rows, labels, clean, known)) >= 0.999
    else:
        assert roc_auc_score(mask, detector.scores(rows, labels)) >= 0.999


# SPECTRE


def test_quantum_entropy_score_by_its_definition() -> None:
    rows = np.random.default_rng(0).normal(size=(50, 3)) * [1, 2, 3]
    excess = rows.T @ rows / 50 - np.eye(3)
    values, axes = np.linalg.eigh(excess)
    weights = axes @ np.diag(np.exp(2.0 * values / values.max())) @ axes.T
    assert np.allclose(que(rows, 2.0), [row @ weights @ row / np.trace(weights) for row in rows])
    assert np.allclose(que(rows, 0.0), (rows**2).sum(1) / 3)
    assert np.allclose(que(rows, 200.0), (rows @ axes[:, -1]) ** 2)
    assert np.allclose(que(rows / 10, 4.0), (rows**2).sum(1) / 300)  # no direction varies more than it should


@pytest.mark.parametrize("poison", [24, 120])
def test_spectre_finds_poison_along_a_direction_of_little_variance(poison: int) -> None:
    draw = np.random.default_rng(0)
    rows = draw.normal(size=(400, 6)) * [8, 7, 6, 1, 1, 1]
    mask = np.arange(400) < poison
    rows[mask, 4] += 6
    labels = np.zeros(400, dtype=int)
    assert roc_auc_score(mask, SpectralSignatures().scores(rows, labels)) < 0.6
    got = SPECTRE(rank=6).scores(rows, labels)
    assert roc_auc_score(mask, got) >= 0.99
    assert got[~mask].mean() == pytest.approx(1, abs=0.3)


# SCAn


def log_likelihood(rows: NDArray, labels: NDArray, between: NDArray, within: NDArray) -> float:
    total = 0.0
    for label in np.unique(labels):
        own = rows[labels == label]
        covariance = np.kron(np.ones((len(own), len(own))), between) + np.kron(np.eye(len(own)), within)
        total += multivariate_normal(np.zeros(own.size), covariance).logpdf(own.ravel())
    return total


def test_every_em_step_raises_the_likelihood_of_the_two_covariances() -> None:
    draw = np.random.default_rng(0)
    labels = np.repeat(np.arange(6), [1, 2, 3, 4, 5, 6])
    rows = (draw.normal(size=(6, 2)) @ [[2, 1], [0, 1]])[labels] + draw.normal(size=(21, 2)) @ [[1, 0], [0.5, 0.3]]
    rows -= rows.mean(0)
    found = [log_likelihood(rows, labels, *decomposition(rows, labels, steps)) for steps in (0, 1, 2, 5, 20)]
    assert np.all(np.diff(found) > 0)


def test_the_two_covariances_are_recovered() -> None:
    draw = np.random.default_rng(0)
    labels = np.repeat(np.arange(500), 4)
    mix, spread = np.array([[2.0, 0], [1, 1]]), np.array([[1.0, 0.5], [0, 0.5]])
    rows = (draw.normal(size=(500, 2)) @ mix)[labels] + draw.normal(size=(2000, 2)) @ spread
    between, within = decomposition(rows, labels, 50)
    assert relative(between, mix.T @ mix) <= 0.1
    assert relative(within, spread.T @ spread) <= 0.05


def test_scan_adds_the_evidence_of_a_class_to_its_smaller_population_alone() -> None:
    rows, labels, mask = outlying()
    got = SCAn().scores(rows, labels)
    assert got[mask].min() > np.e**2
    assert got[(labels == 0) & ~mask].max() <= 0.5


def test_scan_needs_other_classes_or_clean_data() -> None:
    rows, _, _ = outlying(n=20)
    one = np.zeros(len(rows), dtype=int)
    with pytest.raises(ValueError, match=r"clean: with one class \(0\)"):
        SCAn().scores(rows, one)
    assert np.isfinite(SCAn(clean=True).scores(rows, one, rows, one)).all()


# Neighbours, STRIP


def test_deep_knn_by_hand() -> None:
    rows = np.array([[0.0], [1.0], [2.5], [10.0], [11.5]])
    assert DeepKNN(2).scores(rows, np.array([0, 0, 1, 1, 1])).tolist() == [0.5, 0.5, 1, 0, 0]
    assert DeepKNN(50).scores(rows, np.array([0, 0, 1, 1, 1])).tolist() == [0.75, 0.75, 0.5, 0.5, 0.5]


@pytest.mark.parametrize("bounds", [None, (0.0, 1.0), (-1.0, 2.0)])
def test_strip_is_the_negative_mean_entropy_of_mixtures(bounds: tuple[float, float] | None) -> None:
    torch.manual_seed(0)
    task = Task(nn.Linear(4, 3).double().eval())
    x, clean = torch.rand(7, 4).double(), torch.rand(3, 4).double()
    got = STRIP(10, bounds).score(task, (x, torch.zeros(7).long()), target=Utility((clean, torch.zeros(3).long()))).values
    expected = []
    for row in x:
        low, high = bounds or (None, None)
        mixed = [(row + other) / 2 if bounds is None else torch.clamp(row + other - low, low, high) for other in clean]
        p = [task.model(each).softmax(0).detach() for each in mixed]
        expected.append(sum(float((each * each.log()).sum()) for each in p) / 3)
    assert np.allclose(got, expected)


def test_strip_draws_the_same_held_out_samples_for_everyone_and_repeats_with_its_seed() -> None:
    c = case("mlp")
    target = Utility(c.valid)
    one, same, other = (STRIP(3, None, seed=seed).score(c.task, c.train, target=target).values for seed in (0, 0, 1))
    assert np.array_equal(one, same) and not np.array_equal(one, other)


@pytest.mark.parametrize(
    ("x", "clean", "message"),
    [
        (torch.zeros(5, 4).long(), torch.rand(5, 4), "data: strip mixes inputs, .* got torch.int64"),
        (torch.rand(5, 4) * 2, torch.rand(5, 4), r"bounds: expected inputs within \(0.0, 1.0\), got some from"),
        (torch.rand(5, 4), torch.rand(5, 4) - 1, "bounds: expected inputs within"),
        (torch.rand(5, 4), torch.rand(5, 3), r"target: expected held-out inputs of shape \(4,\) as in the data, got \(3,\)"),
    ],
)
def test_strip_refuses_inputs_that_cannot_be_mixed(x: Tensor, clean: Tensor, message: str) -> None:
    y = torch.zeros(5).long()
    with pytest.raises(ValueError, match=message):
        STRIP().score(Task(nn.Linear(4, 3).eval()), (x, y), target=Utility((clean, y)))


# Training dynamics


def test_margins_by_hand() -> None:
    logits = torch.tensor([[3.0, 1.0, 2.0], [0.0, 4.0, -1.0]])
    assert margin(logits, torch.tensor([2, 1])).tolist() == [-1.0, 4.0]
    assert margin(torch.tensor([[0.0, 2.0], [0.0, 2.0]]), torch.tensor([-1, 1])).tolist() == [-2.0, 2.0]


def test_area_under_the_margin_is_the_mean_over_the_checkpoints() -> None:
    c = case("mlp")
    states = train(c.task.reset(4), c.train, SHORT)
    assert len(states) == 3
    expected = np.zeros(len(c.train))
    for each in states:
        with torch.no_grad():
            logits = c.task.at(each.state).model(c.train.batch(slice(None))[0]).numpy()
        for i, label in enumerate(c.train.labels.tolist()):
            expected[i] -= (logits[i, label] - np.delete(logits[i], label).max()) / 3
    assert relative(AUM(SHORT, seed=4).score(c.task, c.train).values, expected) <= 1e-12


def test_area_under_the_margin_serves_a_single_logit() -> None:
    data, mask = blobs(120, seed=0, flipped=15, distance=6)
    task = Task(nn.Linear(2, 1).double().eval(), lambda outputs, batch: nn.functional.softplus((1 - 2 * batch[1]) * outputs[:, 0]))
    got = AUM(Recipe(epochs=6, keep=6)).score(task, data)
    assert roc_auc_score(mask, got.values) >= 0.97


def test_early_loss_takes_steps_down_above_gamma_and_up_below_it() -> None:
    torch.manual_seed(0)
    task, y = Task(logistic_regression((2,), 2).double().eval()), torch.tensor([0, 1, 1, 0, 1, 0])
    x = torch.randn(6, 2).double() * 3
    recipe = Recipe(epochs=1, lr=0.3, momentum=0.0, weight_decay=0.0, batch_size=6, schedule="constant")
    start = task.reset(2)
    gamma = float(start.losses(start.params(), (x, y)).median()) + 1e-3
    moved = {}
    model = start.model
    losses = nn.functional.cross_entropy(model(x), y, reduction="none")
    signs = torch.tensor([1.0 if loss > gamma else -1.0 for loss in losses])
    assert set(signs.tolist()) == {-1.0, 1.0}
    grads = torch.autograd.grad((signs * losses).mean(), list(model.parameters()))
    for (name, value), grad in zip(model.named_parameters(), grads, strict=True):
        moved[name] = value.detach() - 0.3 * grad
    expected = -task.losses(moved, (x, y)).detach()
    assert relative(EarlyLoss(recipe, gamma, seed=2).score(task, (x, y)).values, expected) <= 1e-12


def test_early_loss_with_gamma_zero_is_the_loss_after_a_plain_training() -> None:
    c = case("cnn")
    fitted = fit(c.task.reset(0), c.train, SHORT)
    expected = -fitted.losses(fitted.params(), c.train.batch(slice(None))).detach()
    assert relative(EarlyLoss(SHORT, gamma=0.0).score(c.task, c.train).values, expected) <= 1e-10


# Isolation forest


def test_the_forest_finds_large_gradients_and_repeats_with_its_seed() -> None:
    data, mask = blobs(200, seed=0, flipped=10, distance=8)
    task = fit(Task(logistic_regression((2,), 2).double().eval()), data, Recipe(epochs=5))
    one, same, other = (GradientForest(seed=seed).score(task, data).values for seed in (0, 0, 1))
    assert roc_auc_score(mask, one) >= 0.99
    assert np.array_equal(one, same) and not np.array_equal(one, other)
    assert 0 <= one.min() and one.max() <= 1


def test_the_forest_does_not_depend_on_the_order_of_more_samples_than_a_tree_draws() -> None:
    data, _ = blobs(300, seed=0)
    task, order = Task(logistic_regression((2,), 2).double().eval()), np.random.default_rng(0).permutation(300)
    one, other = (GradientForest(trees=10).score(task, each).values for each in (data, data.take(order)))
    assert relative(other, one[order]) <= 1e-10


def test_the_forest_takes_its_gradients_from_the_index_or_from_chosen_parameters(tmp_path: object) -> None:
    c = case("mlp")
    store = Store.build(c.task, c.train, tmp_path)
    estimator = GradientForest(size=40, trees=10)
    assert np.allclose(estimator.score(c.task, c.train, index=store).values, estimator.score(c.task, c.train).values)
    last = replace(c.task, parameters="5.*")
    assert not np.allclose(estimator.score(last, c.train).values, estimator.score(c.task, c.train).values)
    with pytest.raises(ValueError, match="size: expected at least one number for each of the 6 parameter tensors, got 3"):
        GradientForest(size=3).score(c.task, c.train)


# All of them


@pytest.mark.parametrize("name", ["logistic", "cnn", "attention", "recurrent"])
@pytest.mark.parametrize("kind", DETECTORS)
def test_a_detector_gives_one_finite_score_and_leaves_everything_as_it_was(kind: str, name: str) -> None:
    c, detector = case(name), DETECTORS[kind]
    if kind == "strip" and name in ("attention", "recurrent"):
        pytest.skip("tokens cannot be mixed")
    with untouched(c.task.model):
        got = detector.score(c.task, c.train, target=Utility(c.valid))
    assert got.values.shape == (13,) and np.isfinite(got.values).all() and got.units == "rank"
    assert got.name.split(":")[0] == kind.removesuffix("-ica")
    assert np.array_equal(got.values, detector.score(c.task, c.train, target=Utility(c.valid)).values)


@pytest.mark.parametrize("kind", DETECTORS)
def test_scores_do_not_depend_on_the_batch_size_or_the_order_of_the_samples(kind: str) -> None:
    c, detector = case("cnn", train=60), DETECTORS[kind]
    whole = detector.score(c.task, c.train, target=Utility(c.valid)).values
    for size in (1, 7):
        assert relative(detector.score(c.task, c.train, target=Utility(c.valid), sweep=Sweep(batch_size=size)).values, whole) <= 1e-8
    if kind in TRAINED:  # the order of the samples is that of the training
        return
    order = np.random.default_rng(0).permutation(60)
    got = detector.score(c.task, c.train.take(order), target=Utility(c.valid)).values
    assert relative(got, whole[order]) <= 1e-8


@pytest.mark.parametrize("kind", ON_FEATURES)
def test_classes_of_one_sample_or_without_variance_are_served(kind: str) -> None:
    detector, clean = ON_FEATURES[kind], outlying(n=10)
    rows = np.ones((9, 8))
    rows[5] = 2.0
    labels = np.array([0, 0, 0, 0, 1, 2, 2, 1, 1])
    extra = clean[:2] if kind == "scan-clean" else ()
    with np.errstate(divide="raise", invalid="raise"):
        assert np.isfinite(detector.scores(rows, labels, *extra)).all()


@pytest.mark.parametrize("kind", ON_FEATURES)
def test_classes_that_are_mostly_copies_of_one_sample_are_served(kind: str) -> None:
    draw = np.random.default_rng(0)
    rows = draw.integers(0, 2, size=(120, 8)).astype(float)
    rows[draw.random(120) < 0.8] = 1.0
    extra = outlying(n=10)[:2] if kind == "scan-clean" else ()
    assert np.isfinite(ON_FEATURES[kind].scores(rows, np.arange(120) % 3, *extra)).all()


@pytest.mark.parametrize("kind", ON_FEATURES)
def test_detectors_that_compare_classes_refuse_other_labels(kind: str) -> None:
    c = case("regression")
    with pytest.raises(ValueError, match="data: this detector compares classes; expected samples"):
        ON_FEATURES[kind].score(c.task, c.train, target=Utility(c.valid))
    table = case("logistic")
    fractions = Samples((table.train.tensors[0], torch.rand(13)))
    with pytest.raises(ValueError, match="expected one whole number per sample, got torch.float32"):
        ON_FEATURES[kind].score(table.task, fractions, target=Utility(table.valid))


def test_logits_of_a_classifier() -> None:
    batch = (torch.tensor([[1.0], [2.0]]), torch.tensor([0, 1]))
    one = Task(nn.Linear(1, 1).eval())
    z = one.model(batch[0])[:, 0]
    assert torch.equal(class_logits(one, one.params(), batch), torch.stack([torch.zeros(2), z], 1))
    with pytest.raises(ValueError, match=r"model: this detector needs a classifier's logits, shape \(2, K\), got \(2, 3, 1\)"):
        class_logits(Task(nn.Sequential(nn.Linear(1, 3), nn.Unflatten(1, (3, 1))).eval()), {}, batch)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ActivationClustering(size=0), "size: expected at least 1, got 0"),
        (lambda: ActivationClustering(reduction="nmf"), "reduction: expected 'pca' or 'ica', got 'nmf'"),
        (lambda: ActivationClustering(small=0.6), "small: expected a share from 0 to 0.5, got 0.6"),
        (lambda: SPECTRE(rank=0), "rank: expected at least 1, got 0"),
        (lambda: SPECTRE(alpha=-1.0), "alpha: expected at least 0, got -1.0"),
        (lambda: SCAn(size=0), "size: expected at least 1, got 0"),
        (lambda: SCAn(iterations=0), "iterations: expected at least 1, got 0"),
        (lambda: DeepKNN(0), "k: expected at least 1, got 0"),
        (lambda: STRIP(count=0), "count: expected at least 1, got 0"),
        (lambda: STRIP(bounds=(1.0, 0.0)), "bounds: expected .low, high. with low < high"),
        (lambda: EarlyLoss(gamma=-0.1), "gamma: expected at least 0, got -0.1"),
        (lambda: GradientForest(size=0), "size: expected at least 1, got 0"),
        (lambda: GradientForest(trees=0), "trees: expected at least 1, got 0"),
    ],
)
def test_settings_out_of_range_are_refused(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]


def test_a_patch_on_digits_is_found() -> None:
    images, labels = load_digits(return_X_y=True)
    data = Samples((torch.from_numpy(images / 16).float().view(-1, 1, 8, 8), torch.from_numpy(labels)))
    poisoned, held_out = badnets(0, 0.05, size=2)(data.take(range(1200)), seed=0), data.take(range(1200, 1440))
    task = fit(Task(build("cnn", (1, 8, 8), 10)), poisoned.data, Recipe(epochs=20))
    for detector, least in ((STRIP(), 0.99), (SCAn(), 0.95), (SCAn(clean=True), 0.95), (SPECTRE(), 0.9), (ActivationClustering(), 0.75)):
        assert roc_auc_score(poisoned.mask, detector.score(task, poisoned.data, target=Utility(held_out)).values) >= least, detector
