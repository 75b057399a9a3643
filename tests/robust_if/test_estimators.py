"""estimators/: every score against its formula, and what holds for all of them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from cases import CLASSIFIERS, ESTIMATORS, NAMES, SHORT, TARGETS, TRAIN, VALID, Case, Gap, case, relative
from oracles import flat, hessian, matrix, minimise, sample_gradients
from robust_if import (
    Checkpoint,
    ConjugateGradient,
    DataInf,
    Ensemble,
    FlatMinima,
    GradNorm,
    InnerProduct,
    Loss,
    Random,
    Samples,
    SelfInfluence,
    Sweep,
    Task,
    TunedLoss,
    Tuning,
    Utility,
)
from robust_if.attacks.evasion import PGD, Threat
from robust_if.attacks.targets import AdversarialLoss, RobustGap
from robust_if.estimators import Combined
from robust_if.fairness.targets import FairnessGap
from robust_if.targets import Target
from robust_if.task import Batch, Params
from unchanged import untouched

EVERY_ESTIMATOR = pytest.mark.parametrize("estimator", ESTIMATORS.values(), ids=ESTIMATORS)
#: Without those whose score of a sample is its rank among the others.
OF_SINGLE_SAMPLES = pytest.mark.parametrize(
    "estimator", [each for each in ESTIMATORS.values() if not isinstance(each, Combined)],
    ids=[name for name, each in ESTIMATORS.items() if not isinstance(each, Combined)],
)  # fmt: skip
EVERY_MODEL = pytest.mark.parametrize("name", NAMES)
SOME_MODELS = pytest.mark.parametrize("name", ["cnn", "regression"])
TABLE = pytest.mark.parametrize("kind", TARGETS)


def scores(estimator: Any, c: Case, **changes: Any) -> np.ndarray:
    """The estimator's values for the case, with the utility as target."""
    options = {"target": Utility(c.valid)} | changes
    return estimator.score(c.task, c.train, **options).values


# Each score against its formula


@TABLE
@EVERY_MODEL
def test_ip_is_minus_the_mean_product_with_single_gradients(name: str, kind: str) -> None:
    c = case(name)
    target = TARGETS[kind](c.valid, VALID)
    slope = flat(target.gradient(c.task, c.task.params())).numpy()
    got = InnerProduct().score(c.task, c.train, target=target, sweep=Sweep(batch_size=5))
    assert relative(got.values, -matrix(sample_gradients(c.task, c.train)) @ slope / TRAIN) <= 1e-10
    assert got.ids.tolist() == list(range(TRAIN)) and got.target == target.name


def gap(notion: str) -> Callable[[Samples, int], Target]:
    """The sensitive feature is whether the first number of the input is positive."""

    def made(data: Samples, size: int) -> Target:
        x, y = data.batch(slice(None))
        return FairnessGap(Samples((x, y, (x[:, 0] > 0).long())), notion=notion, smallest=1, shrink=1.0, batch_size=size)

    return made


FAIR: dict[str, Any] = {notion: gap(notion) for notion in ("demographic_parity", "equalized_odds", "worst_group_loss")}
UNDER_ATTACK: dict[str, Any] = {
    "adversarial": lambda data, size: AdversarialLoss(data, PGD(Threat(0.1)), batch_size=size),
    "robust_gap": lambda data, size: RobustGap(data, PGD(Threat(0.1)), batch_size=size),
    "robust_gap at fixed points": lambda data, size: RobustGap(data, PGD(Threat(0.1)), batch_size=size).fixed(case("mlp").task),
}
SHIPPED: dict[str, Any] = TARGETS | FAIR | UNDER_ATTACK


@EVERY_ESTIMATOR
@pytest.mark.parametrize("kind", SHIPPED)
def test_every_estimator_serves_every_target(estimator: Any, kind: str) -> None:
    c = case("mlp")
    target = SHIPPED[kind](c.valid, VALID)
    got = estimator.score(c.task, c.train, target=target)
    assert np.ptp(got.values) > 0
    assert got.target == (target.name if estimator.needs_target else "")


@EVERY_ESTIMATOR
def test_several_targets_at_once_score_as_one_by_one(estimator: Any) -> None:
    c = case("cnn")
    targets = {kind: make(c.valid, 4) for kind, make in TARGETS.items()}
    together = estimator.score(c.task, c.train, target=targets)
    assert [each.target for each in together] == (list(targets) if estimator.needs_target else [""])
    for each in together:
        alone = estimator.score(c.task, c.train, target=targets.get(each.target, next(iter(targets.values()))))
        assert relative(each.values, alone.values) <= 1e-10
        assert each.estimator == alone.estimator and each.units == alone.units


def test_targets_of_one_name_need_names_of_their_own() -> None:
    c = case("mlp")
    both = [Utility(c.valid), Utility(c.valid.take([0, 1]))]
    with pytest.raises(ValueError, match="target: two targets are named 'utility'"):
        InnerProduct().score(c.task, c.train, target=both)
    assert [each.name for each in InnerProduct().score(c.task, c.train, target=dict(zip("ab", both, strict=True)))] == ["ip:a", "ip:b"]


def test_names_of_targets_never_lead_out_of_the_folder(tmp_path: Path) -> None:
    c = case("mlp")
    named = {"../../up": Utility(c.valid), "a/b": Gap(c.valid)}
    InnerProduct().score(c.task, c.train, target=named, sweep=Sweep(directory=tmp_path / "in" / "side"))
    assert [path.name for path in tmp_path.iterdir()] == ["in"] and [path.name for path in (tmp_path / "in").iterdir()] == ["side"]
    assert len(list((tmp_path / "in" / "side").iterdir())) == 1


def test_a_solver_that_failed_at_one_checkpoint_is_said_to_have_failed() -> None:
    c = case("mlp")
    flat = {name: torch.zeros_like(value) for name, value in c.task.params().items()}  # no slope but that of the last bias, solved at once
    estimator = InnerProduct(ConjugateGradient(damping=1e-3, iterations=1, tolerance=1e-6))
    states = [Checkpoint.of(c.task.model), Checkpoint.of(c.task.at(flat).model)]
    alone = [estimator.score(c.task, c.train, target=Utility(c.valid), checkpoints=[state]).provenance["converged"] for state in states]
    got = estimator.score(c.task, c.train, target=Utility(c.valid), checkpoints=states)
    assert alone == [False, True] and got.provenance["converged"] is False


@EVERY_MODEL
def test_cosine_and_layer_forms_are_their_formulas(name: str) -> None:
    c = case(name)
    slope, grads = Utility(c.valid).gradient(c.task, c.task.params()), sample_gradients(c.task, c.train)

    def cosine(names: list[str]) -> np.ndarray:
        g, v = matrix({key: grads[key] for key in names}), flat({key: slope[key] for key in names}).numpy()
        return g @ v / np.maximum(np.linalg.norm(g, axis=1) * np.linalg.norm(v), 1e-300)

    layers = sorted({key.rpartition(".")[0] for key in grads})
    by_layer = [cosine([key for key in grads if key.rpartition(".")[0] == layer]) for layer in layers]
    assert relative(scores(InnerProduct(normalise="cosine"), c), -cosine(list(grads))) <= 1e-10
    assert relative(scores(InnerProduct(normalise="layer"), c), -np.mean(by_layer, axis=0)) <= 1e-10


def layerwise_units(grads: dict[str, Tensor], layers: list[list[str]]) -> np.ndarray:
    """The gradients as rows ``(n, p)``, each layer of each scaled to length 1."""
    parts = [matrix({name: grads[name] for name in names}) for names in layers]
    return np.concatenate([rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-300) for rows in parts], 1)


@pytest.mark.parametrize("normalise", ["cosine", "layer"])
def test_gas_over_three_checkpoints_is_its_definition(normalise: Any) -> None:
    c, weights = case("mlp"), (0.3, 0.1, 0.02)
    checkpoints = [Checkpoint.of(c.task.reset(seed).model, weight) for seed, weight in enumerate(weights)]
    analysed = c.valid.take([4])  # one test instance, whose loss is the target
    names = list(c.task.params())
    layers = [names] if normalise == "cosine" else [names[k : k + 2] for k in range(0, len(names), 2)]
    expected = np.zeros(TRAIN)
    for checkpoint in checkpoints:
        task = c.task.at(checkpoint.state)
        own, other = (layerwise_units(sample_gradients(task, part), layers) for part in (c.train, analysed))
        expected += checkpoint.weight * own @ other[0] / len(layers)
    got = scores(InnerProduct(normalise=normalise), c, target=Utility(analysed), checkpoints=checkpoints)
    assert relative(got, -expected) <= 1e-10  # positive is harmful here, helpful there


@pytest.mark.parametrize("normalise", ["cosine", "relatif", "theta-relatif"])
def test_normalised_score_of_a_sample_without_gradient_is_zero(normalise: Any) -> None:
    c = case("mlp")
    task = Task(c.task.model, lambda outputs, batch: outputs.square().sum(1) * (batch[1] > 0))
    got = scores(InnerProduct(normalise=normalise), replace(c, task=task))
    assert np.array_equal(got == 0, (c.train.labels == 0).numpy())


@EVERY_MODEL
def test_gradient_norms_and_losses_are_those_of_single_samples(name: str) -> None:
    c = case(name)
    exact = matrix(sample_gradients(c.task, c.train))
    assert relative(scores(SelfInfluence(), c), (exact**2).sum(1)) <= 1e-10
    assert relative(scores(GradNorm(), c), np.linalg.norm(exact, axis=1)) <= 1e-10
    assert relative(scores(Loss(), c), c.task.losses(c.task.params(), c.train.batch(slice(None))).detach()) <= 1e-12


def flat_minimum(c: Case, estimator: FlatMinima) -> tuple[Params, Params]:
    """Tuned parameters, and the metric 1 / (F + damping) there from single gradients."""
    tuned = estimator.tuning.run(c.task, Utility(c.valid))
    held = sample_gradients(c.task, c.valid if estimator.fisher == "held_out" else c.train, tuned)
    return tuned, {key: 1 / (value.square().mean(0) + estimator.damping) for key, value in held.items()}


@pytest.mark.parametrize("kind", ["fvm", "fvm-train", "vm"])
@EVERY_MODEL
def test_flat_minimum_score_is_the_diagonal_quadratic_form_of_single_gradients(name: str, kind: str) -> None:
    c, estimator = case(name), ESTIMATORS[kind]
    assert isinstance(estimator, FlatMinima)
    tuned, metric = flat_minimum(c, estimator)
    exact = matrix(sample_gradients(c.task, c.train, tuned))
    assert relative(scores(estimator, c), exact**2 @ flat(metric).numpy()) <= 1e-10
    assert estimator.name == kind.removesuffix("-train")


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_scores_of_all_labels_are_those_of_relabelled_copies(name: str) -> None:
    c, estimator = case(name), FlatMinima(SHORT, damping=1e-2)
    got = estimator.candidates(c.task, c.train, target=Utility(c.valid), sweep=Sweep(batch_size=5))
    for label in range(got.shape[1]):
        copies = c.train.with_labels(np.full(TRAIN, label))
        assert relative(got[:, label], scores(estimator, c, samples=copies)) <= 1e-10


class OneLogitBehind(nn.Module):
    """A layer's weight enters one of the logits a second time, so that its rule serves the others only."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out = nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        extra = nn.functional.linear(x, self.inner.weight).square().sum(1, keepdim=True)
        return self.out(torch.tanh(self.inner(x))) + extra * torch.tensor([0.0, 1.0, 0.0]).to(x)


def test_scores_of_all_labels_are_right_where_layer_rules_serve_some_logits_only() -> None:
    c, estimator = case("mlp"), FlatMinima(Tuning(steps=0), damping=1e-2)
    c = replace(c, task=Task(OneLogitBehind().double().eval()))
    got = estimator.candidates(c.task, c.train, target=Utility(c.valid))
    assert relative(got[:, 1], scores(estimator, c, samples=c.train.with_labels(np.ones(TRAIN)))) <= 1e-10


@EVERY_MODEL
def test_pairs_are_squared_products_in_the_metric(name: str) -> None:
    c, estimator = case(name), FlatMinima(SHORT, damping=1e-2)
    queries = c.valid.take([1, 4, 5])
    tuned, metric = flat_minimum(c, estimator)
    train, asked = (matrix(sample_gradients(c.task, part, tuned)) for part in (c.train, queries))
    got = estimator.pairs(c.task, c.train, target=Utility(c.valid), queries=queries, sweep=Sweep(batch_size=2))
    assert relative(got, (train * flat(metric).numpy() @ asked.T) ** 2) <= 1e-10


@EVERY_MODEL
def test_tuned_loss_is_the_loss_at_the_tuned_parameters(name: str) -> None:
    c = case(name)
    tuned = SHORT.run(c.task, Utility(c.valid))
    assert relative(scores(TunedLoss(SHORT), c), c.task.losses(tuned, c.train.batch(slice(None))).detach()) <= 1e-12


def test_random_scores_repeat_with_their_seed() -> None:
    c = case("logistic")
    assert np.array_equal(scores(Random(3), c), scores(Random(3), c))
    assert not np.array_equal(scores(Random(3), c), scores(Random(4), c))


# What a score means


def test_a_sample_whose_gradient_opposes_the_targets_is_harmful() -> None:
    x = torch.tensor([[1.0], [1.0], [-1.0], [2.0]])
    task = Task(nn.Linear(1, 2, bias=False).eval())
    with torch.no_grad():
        task.model.weight.zero_()  # type: ignore[union-attr,operator]
    valid = Samples((torch.tensor([[1.0]]), torch.tensor([1])))
    got = InnerProduct().score(task, (x, [1, 0, 0, 0]), target=Utility(valid)).values
    assert np.sign(got).tolist() == [-1, 1, -1, 1]
    assert got[3] == pytest.approx(2 * got[1])


def ridge_losses(task: Task, params: Params, batch: Batch) -> Tensor:
    return task.losses(params, batch) + 0.5e-2 * sum(value.square().sum() for value in params.values())


class RidgeUtility(Utility):
    """Mean held-out loss plus 1e-2 / 2 ‖θ‖², so that its minimum exists."""

    def moments(self, task: Task, params: Params, batch: Batch) -> Tensor:
        return ridge_losses(task, params, batch)[:, None]


def logistic_loss(outputs: Tensor, batch: Batch) -> Tensor:
    return nn.functional.softplus(-outputs[:, 0] * batch[1])


@pytest.fixture(scope="module")
def added_points() -> dict[str, Any]:
    """Ridge logistic regression at the minimum of the held-out risk, and how much each of 200 added samples truly raises that risk."""
    draw = np.random.default_rng(0)
    truth = draw.normal(size=6)

    def sample(n: int) -> tuple[Tensor, Tensor]:
        x = draw.normal(size=(n, 6))
        y = np.where(draw.uniform(size=n) < 1 / (1 + np.exp(-x @ truth)), 1.0, -1.0)
        return torch.from_numpy(x), torch.from_numpy(y)

    valid, (x, y) = Samples(sample(400)), sample(200)
    y[: len(y) // 3] *= -1
    added = Samples((x, y))
    task = Task(nn.Linear(6, 1, bias=False).double().eval(), logistic_loss)
    target = RidgeUtility(valid)
    whole, eps = valid.batch(slice(None)), 1e-3

    def risk(params: Params) -> Tensor:
        return ridge_losses(task, params, whole).mean()

    minimum = minimise(risk, task.params())
    lowest = risk(minimum).item()
    raised = [
        risk(minimise(lambda p, i=i: risk(p) + eps * task.losses(p, added.batch(slice(i, i + 1)))[0], minimum, steps=2)).item() - lowest
        for i in range(len(added))
    ]
    return {
        "case": Case(task.at(minimum), added, valid), "target": target, "eps": eps, "raised": np.array(raised),
        "hessian": hessian(risk, minimum), "gradients": matrix(sample_gradients(task, added, minimum)),
    }  # fmt: skip


def test_flat_minimum_influence_with_the_exact_hessian_predicts_the_change_of_the_risk(added_points: dict[str, Any]) -> None:
    grads, raised = added_points["gradients"], added_points["raised"]
    predicted = added_points["eps"] ** 2 / 2 * (grads * np.linalg.solve(added_points["hessian"].numpy(), grads.T).T).sum(1)
    assert (raised > 0).all()
    assert np.corrcoef(predicted, raised)[0, 1] >= 0.999
    assert np.median(raised / predicted) == pytest.approx(1, abs=0.02)


def test_flat_minimum_influence_with_the_diagonal_fisher_still_orders_the_change_of_the_risk(added_points: dict[str, Any]) -> None:
    got = scores(FlatMinima(Tuning(steps=0), fisher="held_out"), added_points["case"], target=added_points["target"])
    assert np.corrcoef(got, added_points["raised"])[0, 1] >= 0.99


# What holds for every estimator


@SOME_MODELS
@EVERY_ESTIMATOR
@given(batch_size=st.integers(1, TRAIN + 3), rows_per_part=st.integers(1, TRAIN + 3))
def test_batches_and_parts_do_not_matter(estimator: Any, name: str, batch_size: int, rows_per_part: int) -> None:
    c = case(name)
    whole, parts = (scores(estimator, c, sweep=sweep) for sweep in (Sweep(), Sweep(batch_size=batch_size, rows_per_part=rows_per_part)))
    assert relative(parts, whole) <= 1e-10


@SOME_MODELS
@EVERY_ESTIMATOR
@given(order=st.permutations(range(TRAIN)))
def test_scores_follow_a_permutation_of_the_data(estimator: Any, name: str, order: list[int]) -> None:
    c = case(name)
    got = estimator.score(c.task, c.train.take(order), target=Utility(c.valid))
    assert got.ids.tolist() == order
    assert relative(got.values, scores(estimator, c)[order]) <= 1e-9


@SOME_MODELS
@OF_SINGLE_SAMPLES
def test_equal_samples_have_equal_scores(estimator: Any, name: str) -> None:
    c = case(name)
    twice = [*range(TRAIN), *range(TRAIN)]
    doubled = replace(c, train=Samples(torch.utils.data.Subset(_Rows(c.train), twice)))
    got = scores(estimator, doubled)
    assert relative(got[:TRAIN], got[TRAIN:]) <= 1e-10


class _Rows(torch.utils.data.Dataset[Any]):
    def __init__(self, samples: Samples) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, i: int) -> Any:
        return torch.utils._pytree.tree_map(lambda leaf: leaf[0], self.samples.batch(slice(i, i + 1)))


@SOME_MODELS
@EVERY_ESTIMATOR
def test_single_precision_is_close_to_double(estimator: Any, name: str) -> None:
    single, double = (scores(estimator, case(name, dtype)) for dtype in (torch.float32, torch.float64))
    assert relative(single, double) <= 1e-3


@OF_SINGLE_SAMPLES
def test_what_is_scored_may_differ_from_the_training_data(estimator: Any) -> None:
    c = case("mlp")
    some = c.train.take([3, 0, 7])
    got = estimator.score(c.task, c.train, target=Utility(c.valid), samples=some)
    assert got.ids.tolist() == [3, 0, 7]
    assert relative(got.values, scores(estimator, c)[[3, 0, 7]]) <= 1e-10


@OF_SINGLE_SAMPLES
def test_scores_over_checkpoints_are_the_weighted_sum(estimator: Any) -> None:
    c = case("mlp")
    tasks = [c.task, c.task.reset(5)]
    checkpoints = [Checkpoint.of(task.model, weight) for task, weight in zip(tasks, (0.3, 0.05), strict=True)]
    singles = [scores(estimator, replace(c, task=task)) for task in tasks]
    got = estimator.score(c.task, c.train, target=Utility(c.valid), checkpoints=checkpoints)
    total = 0.35 if estimator.units == "target" else 1.0  # what has the target's unit is averaged
    assert relative(got.values, (0.3 * singles[0] + 0.05 * singles[1]) / total) <= 1e-12
    if got.members is not None:
        assert relative(got.members.mean(0), got.values) <= 1e-12


@pytest.mark.parametrize("name", ["mlp", "attention"])
@given(factor=st.floats(-5, 5).filter(lambda value: abs(value) > 1e-3))
def test_ip_is_linear_in_the_target(name: str, factor: float) -> None:
    c = case(name)
    utility, gap = Utility(c.valid), Gap(c.valid)
    parts = [scores(InnerProduct(), c, target=target) for target in (utility, gap)]
    assert relative(scores(InnerProduct(), c, target=factor * utility), factor * parts[0]) <= 1e-10
    assert relative(scores(InnerProduct(), c, target=utility + gap * factor), parts[0] + factor * parts[1]) <= 1e-10


# Ensembles


@pytest.mark.parametrize("base", [ESTIMATORS[name] for name in ("ip", "ip-cosine", "self-influence", "loss", "fvm")], ids=lambda base: base.name)
@pytest.mark.parametrize(
    "calm",
    [{"members": 1}, {"members": 3, "std": 0.0, "perturbation": "gaussian"}, {"members": 3, "rate": 0.0, "perturbation": "dropout"}],
    ids=["one member", "no noise", "no dropout"],
)
def test_an_ensemble_of_equal_members_is_its_base(base: Any, calm: dict[str, Any]) -> None:
    c = case("cnn")
    got = Ensemble(base, **calm).score(c.task, c.train, target=Utility(c.valid))
    assert relative(got.values, scores(base, c)) <= 1e-12
    assert got.spread().max() <= 1e-12 * np.abs(got.values).max()
    assert (got.units, got.estimator) == (base.units, f"{base.name}-ensemble")


@pytest.mark.parametrize("options", [{"perturbation": "dropout", "rate": 0.5}, {"perturbation": "gaussian", "std": 0.1}], ids=["dropout", "gaussian"])
def test_an_ensemble_is_the_mean_of_members_that_repeat_with_the_seed(options: dict[str, Any]) -> None:
    c = case("cnn")
    got = [Ensemble(members=4, seed=seed, **options).score(c.task, c.train, target=Utility(c.valid)) for seed in (0, 0, 1)]
    assert relative(got[0].members.mean(0), got[0].values) <= 1e-14
    assert relative(got[0].members[0], scores(InnerProduct(), c)) <= 1e-12
    assert np.array_equal(got[0].values, got[1].values) and not np.array_equal(got[0].values, got[2].values)
    assert (got[0].spread() > 0).all() and len({tuple(member) for member in got[0].members}) == 4


def test_a_gaussian_member_is_the_base_at_noisy_parameters() -> None:
    c = case("logistic")
    got = Ensemble(members=2, std=0.1, seed=3).score(c.task, c.train, target=Utility(c.valid))
    generator = torch.Generator().manual_seed(3)
    noisy = {name: value + 0.1 * torch.randn(value.shape, generator=generator).double() for name, value in c.task.params().items()}
    assert relative(got.members[1], scores(InnerProduct(), replace(c, task=c.task.at(noisy)))) <= 1e-12


def test_a_dropout_member_is_the_base_with_columns_of_the_weights_scaled() -> None:
    c, rate = case("mlp"), 0.5
    got = Ensemble(Loss(), members=2, rate=rate, perturbation="dropout", seed=3).score(c.task, c.train)
    generator = torch.Generator().manual_seed(3)
    drawn = rate * torch.rand((), generator=generator).item()
    scaled = {name: value.clone() for name, value in c.task.model.state_dict().items()}
    for layer in ("3.weight", "5.weight"):
        scaled[layer] *= (torch.rand(7, generator=generator) >= drawn) / (1 - drawn)
    assert relative(got.members[1], scores(Loss(), replace(c, task=c.task.at(scaled)))) <= 1e-12


# The user's model and the global random state are left as they were


@SOME_MODELS
@EVERY_ESTIMATOR
def test_scoring_leaves_model_and_random_state_as_they_were(estimator: Any, name: str) -> None:
    c = case(name)
    next(c.task.model.parameters()).requires_grad_(False)
    with untouched(c.task.model):
        scores(estimator, c)


@pytest.mark.parametrize("calls", [0, 1, 2, 4, 7])
@EVERY_ESTIMATOR
def test_an_exception_leaves_model_and_random_state_as_they_were(estimator: Any, calls: int) -> None:
    c, left = case("cnn"), [calls]

    def loss(outputs: Tensor, batch: Batch) -> Tensor:
        left[0] -= 1
        if left[0] < 0:
            raise ArithmeticError("from the user's loss")
        return nn.functional.cross_entropy(outputs, batch[1], reduction="none")

    def again_and_again() -> None:
        for _ in range(8):  # the cheapest estimators call the loss once
            scores(estimator, replace(c, task=Task(c.task.model, loss)))

    with untouched(c.task.model), pytest.raises(ArithmeticError, match="from the user's loss"):
        again_and_again()


@EVERY_ESTIMATOR
def test_gradients_may_be_switched_off_outside(estimator: Any) -> None:
    c = case("cnn")
    expected = scores(estimator, c)
    with torch.no_grad():
        assert np.array_equal(scores(estimator, c), expected)


@EVERY_ESTIMATOR
def test_frozen_parameters_are_scored_like_others_where_the_task_names_them(estimator: Any) -> None:
    c = case("mlp")
    frozen = copy.deepcopy(c.task.model).requires_grad_(False)
    assert np.array_equal(scores(estimator, replace(c, task=Task(frozen))), scores(estimator, c))


@EVERY_ESTIMATOR
def test_fewer_parameters_are_another_score(estimator: Any) -> None:
    c = case("mlp")
    last = replace(c, task=Task(c.task.model, parameters="5.*"))
    same = np.allclose(scores(estimator, last), scores(estimator, c), rtol=1e-6)
    assert same == (estimator.name == "loss")


# Bad input


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: InnerProduct(normalise="l2"), "normalise: expected one of 'none', 'cosine', 'layer', 'relatif', 'theta-relatif', got 'l2'"),  # type: ignore[arg-type]
        (lambda: InnerProduct(DataInf(), "relatif"), "normalise: 'relatif' needs gᵀ P g of every single sample, which DataInf does not give; use Id"),
        (lambda: FlatMinima(fisher="test"), "fisher: expected 'held_out' or 'train', got 'test'"),  # type: ignore[arg-type]
        (lambda: FlatMinima(damping=0), "damping: expected a positive number, got 0"),
        (lambda: Ensemble(members=0), "members: expected at least 1, got 0"),
        (lambda: Ensemble(perturbation="jitter"), "perturbation: expected 'auto', 'dropout' or 'gaussian', got 'jitter'"),  # type: ignore[arg-type]
        (lambda: Ensemble(rate=1.0), r"rate: expected a number in \[0, 1\), got 1.0"),
    ],
)
def test_a_setting_out_of_range_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("estimator", [one for one in ESTIMATORS.values() if one.needs_target], ids=lambda one: one.name)
def test_an_estimator_that_needs_a_target_says_so(estimator: Any) -> None:
    c = case("mlp")
    with pytest.raises(ValueError, match=r"target: \w+ needs a target, such as Utility\(valid\)"):
        estimator.score(c.task, c.train)


def test_dropout_without_a_second_layer_is_refused() -> None:
    with pytest.raises(ValueError, match="dropout needs a model with at least two linear or convolutional layers; use 'gaussian'"):
        scores(Ensemble(perturbation="dropout"), case("logistic"))


def test_scores_that_are_not_finite_name_their_samples() -> None:
    c = case("logistic")
    task = Task(c.task.model, lambda outputs, batch: outputs.sum(1) / (batch[1] != 2))
    with pytest.raises(ValueError, match=r"scores: loss gave values that are not finite for \d+ of 13 samples, ids \["):
        scores(Loss(), replace(c, task=task))


def test_damping_above_most_of_the_fisher_information_is_said(caplog: pytest.LogCaptureFixture) -> None:
    c = case("mlp")
    scored = FlatMinima(SHORT, damping=1e3).score(c.task, c.train, target=Utility(c.valid))
    assert "the score is close to a plain gradient norm" in caplog.text
    assert scored.provenance["damped_share"] == 1
