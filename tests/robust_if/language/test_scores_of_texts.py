"""Scores, pairs and stores of texts, and trainings of transformers: against dense algebra, and whatever the batches are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr
from torch import Tensor

from cases import SHORT, relative
from oracles import flat, full_gradient, matrix, sample_gradients, unflat
from robust_if import (
    EKFAC,
    LESS,
    Arnoldi,
    ConjugateGradient,
    DataInf,
    Estimator,
    FlatMinima,
    InnerProduct,
    LabelOdds,
    Recipe,
    Samples,
    Store,
    Task,
    Utility,
    fit,
    pairwise,
    score,
    train,
)
from robust_if import gradients as gradients_module
from robust_if.fisher import SampledLoss
from robust_if.token_losses import NextToken
from tiny_transformers import ADAPTED, FAMILIES, TOKENS, TRAIN, VALID, Words, data, model, task_of, whole
from unchanged import untouched

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")


def scores(task: Task, samples: Samples, valid: Samples, **options: Any) -> np.ndarray:
    return score(task, samples, target=Utility(valid), **options).values


@pytest.mark.parametrize("name", ["gpt2", "qwen2", "gpt2-classes", "bert-classes"])
@ADAPTED
def test_batches_order_and_padding_do_not_matter(name: str, lora: bool) -> None:
    task, samples, valid = task_of(name, lora), data(name), data(name, VALID, 4)
    with untouched(task.model):
        expected = scores(task, samples, valid)
    grads = sample_gradients(task, samples)
    slope = matrix(sample_gradients(task, valid)).mean(0)
    assert relative(expected, -matrix(grads) @ slope / TRAIN) <= FAMILIES[name].exact
    order = np.random.default_rng(0).permutation(TRAIN)
    wide = Samples(tuple(torch.nn.functional.pad(value, (0, 6), value=fill) if value.ndim == 2 else value for value, fill in padded(samples)))
    for same in (
        scores(task, samples, valid, batch_size=2),
        scores(task, samples.take(order), valid)[np.argsort(order)],
        scores(task, wide, valid, batch_size=4),
    ):
        assert relative(same, expected) <= FAMILIES[name].exact


def padded(samples: Samples) -> list[tuple[Tensor, int]]:
    assert isinstance(samples.tensors, tuple)
    return list(zip(samples.tensors, (-1, -100), strict=True))


@given(batch_size=st.integers(1, TRAIN + 1), order=st.permutations(range(TRAIN)))
def test_layers_give_the_same_whatever_is_in_the_batch(batch_size: int, order: list[int]) -> None:
    task, samples, valid = task_of("gpt2", lora=True), data("gpt2"), data("gpt2", VALID, 4)
    expected, got = (
        scores(task, each, valid, estimator=InnerProduct(normalise="layer"), batch_size=size)
        for each, size in ((samples, 128), (samples.take(order), batch_size))
    )
    assert relative(got, expected[order]) <= 1e-11


def test_the_base_in_bfloat16_hardly_changes_the_order() -> None:
    exact, low = (task_of("qwen2", lora=True, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    assert {value.dtype for value in low.params().values()} == {torch.float32}
    assert low.model.get_input_embeddings().weight.dtype == torch.bfloat16  # type: ignore[operator, union-attr]
    low.model.load_state_dict(exact.model.state_dict())
    samples, valid = data("qwen2", 60), data("qwen2", 20, 4)
    for estimator in (InnerProduct(), InnerProduct(normalise="layer")):
        got, expected = (scores(task, samples, valid, estimator=estimator) for task in (low, exact))
        assert spearmanr(got, expected).statistic > 0.98


@pytest.mark.parametrize("name", ["gpt2", "qwen2", "bert-classes"])
@ADAPTED
def test_a_model_with_gradient_checkpointing_gives_the_same(
    name: str, lora: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gradients_module, "_said", set())
    plain, samples, valid = task_of(name, lora), data(name), data(name, VALID, 4)
    made = model(name, lora)
    made.gradient_checkpointing_enable()
    saving = Task.from_transformers(made, Words(), FAMILIES[name].kind)
    for estimator in (InnerProduct(), InnerProduct(normalise="layer")):
        with untouched(made):
            got = scores(saving, samples, valid, estimator=estimator)
        assert relative(got, scores(plain, samples, valid, estimator=estimator)) <= 1e-6
    assert "no forward-mode rule" not in caplog.text


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert-classes"])
@ADAPTED
def test_a_store_of_texts_of_several_lengths_gives_the_same(name: str, lora: bool, tmp_path: Path) -> None:
    task, samples, valid = task_of(name, lora), data(name), data(name, VALID, 4)
    store = Store.build(task, samples, tmp_path)
    for estimator in (InnerProduct(), InnerProduct(normalise="cosine"), InnerProduct(DataInf())):
        got = scores(task, samples, valid, estimator=estimator, index=store)
        assert relative(got, scores(task, samples, valid, estimator=estimator)) <= FAMILIES[name].exact
    queries = pairwise(task, samples, valid, index=store)
    assert relative(queries, -matrix(sample_gradients(task, samples)) @ matrix(sample_gradients(task, valid)).T / TRAIN) <= FAMILIES[name].exact


def by_layer(grads: dict[str, Tensor]) -> dict[str, Tensor]:
    layers: dict[str, list[Tensor]] = {}
    for name, value in grads.items():
        layers.setdefault(name.rpartition(".")[0], []).append(value.flatten(1))
    return {layer: torch.cat(parts, 1) for layer, parts in layers.items()}


@pytest.mark.parametrize("name", ["gpt2", "distilbert-classes"])
@ADAPTED
def test_pairs_in_every_form(name: str, lora: bool) -> None:
    task, samples, valid = task_of(name, lora), data(name), data(name, VALID, 4)
    a, b = (sample_gradients(task, each) for each in (samples, valid))

    def cosine(x: Tensor, y: Tensor) -> np.ndarray:
        return np.asarray(torch.nn.functional.cosine_similarity(x[:, None], y[None], dim=2))

    x, y = torch.from_numpy(matrix(a)), torch.from_numpy(matrix(b))
    live = [(u, v) for u, v in zip(by_layer(a).values(), by_layer(b).values(), strict=True)]
    expected = {"none": (x @ y.T).numpy() / TRAIN, "cosine": cosine(x, y), "layer": np.mean([cosine(u, v) for u, v in live], 0)}
    for how, values in expected.items():
        assert relative(pairwise(task, samples, valid, normalise=how), -values) <= 1e-8, how  # type: ignore[arg-type]


def gauss_newton(task: Task, samples: Samples) -> np.ndarray:
    """(1/n) Σ Jᵀ H J of single samples, by autograd."""
    params, total = task.params(), torch.zeros(())
    for i in range(len(samples)):
        batch = samples.batch(slice(i, i + 1))

        def outputs(vector: Tensor, batch: Any = batch) -> Tensor:
            return task.outputs(unflat(vector, params), batch).flatten()  # type: ignore[no-any-return]

        at = flat(params)
        jacobian = torch.autograd.functional.jacobian(outputs, at)
        shape = task.outputs(params, batch).shape
        bend = torch.autograd.functional.hessian(lambda z: task.loss(z.view(shape), batch).sum(), outputs(at))  # noqa: B023
        total = total + jacobian.T @ bend @ jacobian / len(samples)
    return total.numpy()


@pytest.mark.parametrize("name", ["gpt2", "bert-classes"])
def test_solvers_agree_with_dense_algebra(name: str) -> None:
    task, samples, valid = task_of(name, lora=True), data(name), data(name, VALID, 4)
    grads = sample_gradients(task, samples)
    slope = full_gradient(lambda p: task.losses(p, whole(valid)).mean(), task.params())
    damped = gauss_newton(task, samples) + 0.2 * np.eye(len(slope))
    expected = -matrix(grads) @ np.linalg.solve(damped, slope) / TRAIN
    for solver in (ConjugateGradient(damping=0.2, iterations=400, tolerance=1e-9), Arnoldi(rank=1000, curvature="ggn", damping=0.2)):
        assert relative(scores(task, samples, valid, estimator=InnerProduct(solver)), expected) <= 1e-5
    v, solved = unflat(torch.from_numpy(slope), task.params()), []
    for key, value in grads.items():
        g = value.flatten(1)
        inverses = torch.linalg.solve(g[:, :, None] * g[:, None, :] + 0.2 * torch.eye(g.shape[1], dtype=g.dtype), v[key].flatten()[:, None])
        solved.append(inverses.mean(0)[:, 0])
    expected = -matrix(grads) @ torch.cat(solved).numpy() / TRAIN
    assert relative(scores(task, samples, valid, estimator=InnerProduct(DataInf(0.2))), expected) <= 1e-9


ESTIMATORS: dict[str, Estimator] = {
    "ekfac": InnerProduct(EKFAC()),
    "ekfac-cosine": InnerProduct(EKFAC(fisher="empirical"), normalise="cosine"),
    "arnoldi": InnerProduct(Arnoldi(rank=4, curvature="ggn")),
    "fvm": FlatMinima(SHORT),
}


@pytest.mark.parametrize("name", ["gpt2", "qwen2", "gpt2-classes", "bert-classes"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_other_estimators_run_and_do_not_depend_on_batches(name: str, estimator: str) -> None:
    task, samples, valid = task_of(name, lora=True), data(name), data(name, VALID, 4)
    with untouched(task.model):
        values = scores(task, samples, valid, estimator=ESTIMATORS[estimator])
    assert np.isfinite(values).all() and len(set(values)) == TRAIN
    assert relative(scores(task, samples, valid, estimator=ESTIMATORS[estimator], batch_size=4), values) <= 1e-4


class Signs:
    """In place of a random generator: numbers below one half, but at one position."""

    def __init__(self, position: int) -> None:
        self.position = position

    def random(self, shape: tuple[int, int], dtype: Any) -> np.ndarray:
        drawn = np.zeros(shape[0] * shape[1], dtype)
        drawn[self.position :][:1] = 1
        return drawn.reshape(shape)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_signs_give_the_hessian_of_a_language_models_loss(reduction: Any) -> None:
    logits, labels = torch.randn(1, 4, 3, dtype=torch.float64), torch.tensor([[2, -100, 1, 0, 2]])
    loss, batch = NextToken(reduction), (None, labels)  # two tokens are learnt, those at 2 and 3; the last one is beyond the logits

    def slope(position: int) -> Tensor:
        at = logits.clone().requires_grad_()
        return torch.autograd.grad(SampledLoss(loss, Signs(position))(at, batch).sum(), at)[0].flatten()  # type: ignore[arg-type]

    root = torch.stack([(slope(k) - slope(99)) / 2 for k in range(2 * 3)], 1)
    expected = torch.autograd.functional.hessian(lambda at: loss(at.view(1, 4, 3), batch).sum(), logits.flatten())
    assert relative(root @ root.T, expected) <= 1e-12 and expected.any()


ADAM = Recipe(optimizer="adamw", lr=1e-2, epochs=2, batch_size=4, weight_decay=0.0, keep=2)


@pytest.mark.parametrize("name", ["gpt2", "qwen2-classes"])
def test_training_changes_the_adapter_alone_and_leaves_what_less_needs(name: str) -> None:
    task, samples, valid = task_of(name, lora=True), data(name), data(name, VALID, 4)
    before = {key: value.clone() for key, value in task.model.state_dict().items()}
    with untouched(task.model):
        tuned = fit(task, samples, ADAM)
        kept = train(task, samples, ADAM)
    own = task.params().keys()
    changed = {key for key, value in tuned.model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == set(own)
    assert float(tuned.losses(tuned.params(), whole(samples)).mean()) < float(task.losses(task.params(), whole(samples)).mean())
    values = scores(task, samples, valid, estimator=LESS(), checkpoints=kept)
    single = [scores(task.at(each.state), samples, valid, estimator=LESS(), checkpoints=[each]) for each in kept]
    assert relative(values, np.sum(single, 0)) <= 1e-9 and len(set(values)) == TRAIN


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_flipped_labels_of_texts_have_the_highest_odds(lora: bool) -> None:
    """A token that tells the class; six of forty labels are wrong."""
    generator = torch.Generator().manual_seed(0)
    classes = torch.arange(40) % 2
    tokens = torch.randint(8, TOKENS, (40, 5), generator=generator)
    tokens[:, 2] = 2 + classes
    wrong = torch.arange(40) < 6
    samples = Samples((tokens, torch.where(wrong, 1 - classes, classes)))
    task = task_of("bert-classes", lora, dtype=torch.float32)
    recipe = Recipe(epochs=40 if lora else 12, lr=1e-2, optimizer="adamw", weight_decay=0.0, batch_size=8)
    odds = LabelOdds(rounds=1, folds=2, starts=1, recipe=recipe, start_recipe=recipe)
    with untouched(task.model):
        found = odds.score(task, samples, target=Utility(Samples((tokens[6:], classes[6:])))).values
    assert set(np.argsort(-found)[:6]) == set(range(6))


def test_a_training_from_the_beginning_starts_from_the_given_state() -> None:
    made = model("gpt2-classes")
    before = {name: torch.full_like(value, 0.5) for name, value in made.state_dict().items()}
    with pytest.raises(ValueError, match=r"has parameters but no reset_parameters\(\).*give the task the state before the training, start=state"):
        Task.from_transformers(made, Words(), "classification").reset(0)
    again = Task.from_transformers(made, Words(), "classification", start=before).reset(0)
    assert all((value == 0.5).all() for value in again.params().values()) and not (made.state_dict()["score.weight"] == 0.5).any()


def test_an_adapter_starts_afresh_and_changes_nothing_at_first() -> None:
    made = peft.get_peft_model(model("gpt2"), peft.LoraConfig(r=2, target_modules=["wte", "c_attn"], fan_in_fan_out=True)).double().eval()
    task, samples = Task.from_transformers(made, Words()), data("gpt2")
    for value in task.params().values():
        value.fill_(1.0)
    one, other = (task.reset(seed) for seed in (0, 1))
    moved = {name: float((value - other.params()[name]).norm()) for name, value in one.params().items()}
    assert {name.split(".")[-3 if name.endswith("weight") else -2] for name, by in moved.items() if by > 0} == {"lora_A", "lora_embedding_B"}
    losses = [each.losses(each.params(), whole(samples)) for each in (one, other)]
    assert torch.equal(*losses) and not torch.equal(losses[0], task.losses(task.params(), whole(samples)))
