"""Task.from_transformers: losses, derivatives and scores of transformers against Hugging Face's own loss and plain loops, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
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
from robust_if.gradients import directional, per_sample
from robust_if.layers import LayerGradients
from robust_if.task import Params
from robust_if.token_losses import Kind, NextToken
from unchanged import untouched

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

TOKENS, LONGEST, CLASSES, TRAIN, VALID = 24, 16, 3, 9, 5

_GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": LONGEST}
_DISTILBERT = {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 20, "max_position_embeddings": LONGEST}
_BERT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 20, "max_position_embeddings": LONGEST}
_LLAMA = {**_BERT, "num_key_value_heads": 1}


@dataclass(frozen=True)
class Family:
    """How a family of models is called and shaped, what its adapters are put on, and how exact it is: some compute a part in float32 always."""

    model: str
    shape: dict[str, Any]
    targets: list[str]
    exact: float = 1e-11

    @property
    def kind(self) -> Kind:
        return "classification" if "Classification" in self.model else "causal-lm"


FAMILIES = {
    "gpt2": Family("GPT2LMHeadModel", _GPT2, ["c_attn"]),
    "llama": Family("LlamaForCausalLM", _LLAMA, ["q_proj", "v_proj"], 5e-6),
    "qwen2": Family("Qwen2ForCausalLM", {**_LLAMA, "tie_word_embeddings": True}, ["q_proj", "v_proj"], 5e-6),
    "mistral": Family("MistralForCausalLM", {**_LLAMA, "sliding_window": 3}, ["q_proj", "v_proj"], 5e-6),
    "gemma2": Family("Gemma2ForCausalLM", {**_LLAMA, "head_dim": 8, "sliding_window": 3}, ["q_proj", "v_proj"], 5e-6),
    "gpt2-classes": Family("GPT2ForSequenceClassification", _GPT2, ["c_attn"]),
    "qwen2-classes": Family("Qwen2ForSequenceClassification", _LLAMA, ["q_proj", "v_proj"], 5e-6),
    "bert-classes": Family("BertForSequenceClassification", _BERT, ["query", "value"]),
    "distilbert-classes": Family("DistilBertForSequenceClassification", _DISTILBERT, ["q_lin", "v_lin"]),
    "roberta-classes": Family("RobertaForSequenceClassification", _BERT, ["query", "value"]),
}
EVERY_FAMILY = pytest.mark.parametrize("name", FAMILIES)
ADAPTED = pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])


class Words:
    """As much of a tokenizer as a task looks at."""

    pad_token_id = 0

    def __len__(self) -> int:
        return TOKENS


def model(name: str, lora: bool = False, attention: str = "", dtype: torch.dtype = torch.float64, **settings: Any) -> Any:
    family = FAMILIES[name]
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1, **({"num_labels": CLASSES} if family.kind == "classification" else {})}
    of = getattr(transformers, family.model)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = of(of.config_class(vocab_size=TOKENS, attn_implementation=attention or None, **family.shape, **ids, **settings))
        for value in made.parameters():  # large enough that no part of the model is idle
            value.data.add_(0.2 * torch.randn_like(value))
        made = made.to(dtype)
        if lora:
            made = adapted(made, name)
    return made.to(dtype if dtype == torch.float64 else None).eval()


def adapted(made: Any, name: str, **settings: Any) -> Any:
    family = FAMILIES[name]
    kind = "SEQ_CLS" if family.kind == "classification" else "CAUSAL_LM"
    made = peft.get_peft_model(
        made, peft.LoraConfig(r=2, target_modules=family.targets, task_type=kind, fan_in_fan_out=name.startswith("gpt2"), **settings)
    )
    for parameter, value in made.named_parameters():
        if "lora_B" in parameter:
            value.data.add_(0.2 * torch.randn_like(value))
    return made


def task_of(name: str, lora: bool = False, **settings: Any) -> Task:
    return Task.from_transformers(model(name, lora, **settings), Words(), FAMILIES[name].kind)


def data(name: str, n: int = TRAIN, seed: int = 3) -> Samples:
    """Texts of three to seven tokens; of a language model those after the second are learnt."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 8, (n, 1), generator=generator)
    lengths[n // 2] = 7
    drawn = torch.randint(2, TOKENS, (n, 7), generator=generator)
    there = torch.arange(7) < lengths
    if FAMILIES[name].kind == "classification":
        return Samples((torch.where(there, drawn, -1), torch.randint(CLASSES, (n,), generator=generator)))
    return Samples((torch.where(there, drawn, -1), torch.where(there & (torch.arange(7) >= 2), drawn, -100)))


def whole(samples: Samples) -> Any:
    return samples.batch(slice(None))


def direction(params: Params) -> Params:
    generator = torch.Generator().manual_seed(5)
    return {name: torch.randn(value.shape, generator=generator).to(value) for name, value in params.items()}


def own_losses(made: Any, samples: Samples) -> list[float]:
    """Hugging Face's loss of every sample alone, without padding; that of a language model is a mean over the tokens learnt."""
    found = []
    for i in range(len(samples)):
        tokens, labels = samples.batch(slice(i, i + 1))
        length = int((tokens >= 0).sum())
        labels = labels if labels.ndim == 1 else labels[:, :length]
        with torch.no_grad():
            mean = made(input_ids=tokens[:, :length], labels=labels).loss.item()
        found.append(mean * (1 if labels.ndim == 1 else int((labels[:, 1:] != -100).sum())))
    return found


# Losses and their derivatives


@EVERY_FAMILY
@ADAPTED
def test_losses_are_those_of_hugging_face(name: str, lora: bool) -> None:
    task, samples = task_of(name, lora), data(name)
    got = task.losses(task.params(), whole(samples)).detach().numpy()
    # which computes a language model's loss in float32
    assert relative(got, own_losses(task.model, samples)) <= (1e-12 if FAMILIES[name].kind == "classification" else 1e-6)


@EVERY_FAMILY
@ADAPTED
def test_every_derivative_is_that_of_single_backward_passes(name: str, lora: bool) -> None:
    task, samples, exact = task_of(name, lora), data(name), FAMILIES[name].exact
    params, batch = task.params(), whole(samples)
    assert lora == all("lora_" in each or "modules_to_save" in each for each in params)
    expected = sample_gradients(task, samples)
    v = direction(params)
    with untouched(task.model):
        got = directional(task, params, batch, v)
        rules = LayerGradients(task, params, batch)
        found = dict(rules.dense(batch))
    assert relative(got, matrix(expected) @ flat(v).numpy()) <= exact
    assert not rules.uncovered
    largest = max(float(value.norm()) for value in expected.values())
    for each, value in expected.items():
        assert float((found[each] - value).norm()) <= exact * largest, each


@pytest.mark.parametrize("name", ["gpt2", "qwen2-classes", "bert-classes", "distilbert-classes"])
def test_attention_may_be_computed_either_way(name: str) -> None:
    samples = data(name)
    tasks = [task_of(name, attention=attention) for attention in ("eager", "sdpa")]
    v = direction(tasks[0].params())
    first, second = (directional(task, task.params(), whole(samples), v) for task in tasks)
    assert relative(first, second) <= FAMILIES[name].exact
    rules = LayerGradients(tasks[0], tasks[0].params(), whole(samples))
    assert not rules.uncovered


def test_the_mean_over_tokens_may_be_asked_for() -> None:
    made, samples = model("gpt2"), data("gpt2")
    total, mean = (Task.from_transformers(made, Words(), reduction=how) for how in ("sum", "mean"))  # type: ignore[arg-type]
    learnt = (samples.labels[:, 1:] != -100).sum(1)
    losses = [task.losses(task.params(), whole(samples)) for task in (total, mean)]
    assert torch.allclose(losses[0] / learnt, losses[1])


@pytest.mark.parametrize("name", ["gpt2", "bert-classes"])
def test_where_torch_has_no_rule_single_passes_are_taken_and_that_is_said_once(
    name: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gradients_module, "_said", set())
    task, samples = task_of(name), data(name)
    for _ in range(2):
        got = per_sample(task, task.params(), whole(samples))
    expected = sample_gradients(task, samples)
    assert relative(matrix(got), matrix(expected)) <= 1e-11
    assert sum("rule" in record.getMessage() for record in caplog.records) <= 1


# Scores


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


# What is refused


def refuse(
    message: str, made: Any = None, tokenizer: Any = None, kind: Any = "causal-lm", error: type[Exception] = ValueError, **options: Any
) -> None:
    with pytest.raises(error, match=message):
        Task.from_transformers(model("gpt2") if made is None else made, tokenizer or Words(), kind, **options)


class Padless(Words):
    pad_token_id = None  # type: ignore[assignment]


class Many(Words):
    def __len__(self) -> int:
        return TOKENS + 1


def with_(made: Any, change: Callable[[Any], Any]) -> Any:
    change(made)
    return made


def test_tokenizers_that_do_not_fit() -> None:
    refuse("tokenizer: it has no padding token, .* set tokenizer.pad_token = tokenizer.eos_token$", tokenizer=Padless())
    refuse("= tokenizer.eos_token and model.config.pad_token_id = tokenizer.pad", model("gpt2-classes"), Padless(), "classification")
    refuse("tokenizer: it has 25 tokens, the model 24; expected the model's own tokenizer", tokenizer=Many())
    made = with_(model("gpt2-classes"), lambda each: setattr(each.config, "pad_token_id", None))
    refuse("model: its padding token is None, the tokenizer's 0; set model.config.pad_token_id = ", made, kind="classification")


def test_models_that_do_not_fit_the_kind() -> None:
    refuse("kind: expected 'causal-lm' or 'classification', got 'masked'", kind="masked")
    refuse("reduction: expected 'sum' or 'mean', got 'max'", reduction="max")
    refuse("model: GPT2ForSequenceClassification has no head for the next token; load it with AutoModelForCausalLM", model("gpt2-classes"))
    refuse("model: GPT2Model has no head for the next token", model("gpt2").transformer)
    refuse("model: GPT2LMHeadModel gives logits of shape .2, 2, 24. for 2 samples, expected .2, 2., .*AutoModelForSequenceC", kind="classification")
    refuse("model: GPT2Model gives logits of shape None for 2 samples", model("gpt2").transformer, kind="classification")
    refuse("model: expected one of transformers, as AutoModelForCausalLM loads them, got Linear", torch.nn.Linear(2, 2), error=TypeError)


@pytest.mark.parametrize("name", ["BertLMHeadModel", "BertForMaskedLM"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_sees_later_tokens_is_no_causal_one(name: str, dtype: torch.dtype) -> None:
    config = transformers.BertConfig(vocab_size=TOKENS, **_BERT)
    made = getattr(transformers, name)(config)
    for value in made.parameters():
        value.data.add_(0.2 * torch.randn_like(value))
    refuse(f"model: {name} lets a token see those after it; expected a causal language model", made.to(dtype).eval())


def test_encoders_with_a_decoder_are_refused() -> None:
    made = transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=TOKENS, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))
    refuse("model: T5ForConditionalGeneration is an encoder with a decoder; expected a causal language model or a class", made.eval())
    made = transformers.T5ForSequenceClassification(transformers.T5Config(vocab_size=TOKENS, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))
    refuse("model: T5ForSequenceClassification is an encoder with a decoder", made.eval(), kind="classification")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"problem_type": "regression"}, "expected one label per sample, got the problem type 'regression'"),
        ({"problem_type": "multi_label_classification"}, "expected one label per sample, got the problem type 'multi_label_classification'"),
        ({"num_labels": 1}, "expected at least 2 classes, got num_labels=1, which is regression"),
    ],
)
def test_other_problems_are_refused(settings: dict[str, Any], message: str) -> None:
    made = with_(model("bert-classes"), lambda each: [setattr(each.config, key, value) for key, value in settings.items()])
    refuse(f"model: {message}", made, kind="classification")


def test_quantised_and_scattered_weights_are_refused() -> None:
    message = "model: its weights are quantised, and gradients through them are not those of the model; load it in bfloat16 instead"
    refuse(message, with_(model("gpt2"), lambda each: setattr(each, "is_quantized", True)))
    for dtype in (torch.int8, torch.float8_e4m3fn):
        weight = torch.nn.Parameter(torch.zeros(2).to(dtype), requires_grad=False)
        refuse(message, with_(model("gpt2"), lambda each, weight=weight: setattr(each, "packed", weight)))  # type: ignore[misc]
    refuse(message, adapted(with_(model("gpt2"), lambda each: setattr(each, "is_quantized", True)), "gpt2").eval())
    refuse("model: its weights are on cpu, meta; expected them on one device", with_(model("gpt2"), lambda each: each.lm_head.to("meta")))


def test_adapters_that_match_nothing_are_refused() -> None:
    refuse(r"parameters: the pattern '\*lora_\*' matches none of the model's 28 parameters, such as", parameters=("*lora_*",))
    empty = with_(model("gpt2"), lambda each: setattr(each, "peft_config", {"default": SimpleNamespace(bias="none")}))
    refuse("model: none of its parameters is an adapter's .lora_….; its target modules match nothing", empty)


def test_adapters_that_do_nothing_are_refused() -> None:
    made = model("gpt2", lora=True)
    made.merge_adapter()
    refuse("model: the adapter of .*c_attn is merged into its weights or switched off, .* call unmerge_adapter", made)
    made.unmerge_adapter()
    assert Task.from_transformers(made, Words())
    made.base_model.disable_adapter_layers()
    refuse("is merged into its weights or switched off", made)
    two = model("gpt2", lora=True)
    two.add_adapter("other", peft.LoraConfig(r=2, target_modules=["c_attn"], task_type="CAUSAL_LM", fan_in_fan_out=True))
    refuse("model: it holds the adapters 'default', 'other'; expected one, or parameters=", two.eval())
    assert len(Task.from_transformers(two, Words(), parameters="*lora_?.default*").params()) == 4


def test_prompts_that_are_learnt_shift_the_logits_and_are_refused() -> None:
    made = peft.get_peft_model(model("gpt2", dtype=torch.float32), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    refuse(r"model: PeftModelForCausalLM gives logits of shape \(2, 5, 24\) for 2 samples of 2 tokens, expected \(2, 2, tokens\)", made.eval())


def test_biases_that_are_trained_beside_an_adapter_count() -> None:
    for bias, count in (("none", 4), ("lora_only", 6), ("all", 4 + 13)):
        made = adapted(model("gpt2"), "gpt2", bias=bias)
        task = Task.from_transformers(made.eval(), Words())
        assert len(task.params()) == count and task.params().keys() == {name for name, value in made.named_parameters() if value.requires_grad}


def test_training_mode_is_refused_and_nothing_is_drawn() -> None:
    before = torch.random.get_rng_state()
    refuse("model: expected a module in evaluation mode", model("gpt2").train())
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    ("name", "longest"), [("gpt2", 16), ("qwen2", 16), ("bert-classes", 16), ("distilbert-classes", 16), ("roberta-classes", 15)]
)
def test_texts_longer_than_the_model_are_refused(name: str, longest: int) -> None:
    task = task_of(name)
    tokens = torch.full((2, longest + 1), 3)
    labels = tokens if FAMILIES[name].kind == "causal-lm" else torch.zeros(2).long()
    with pytest.raises(ValueError, match=f"tokens: the model takes up to {longest}, got {longest + 1}; encode with max_length={longest}"):
        score(task, Samples((tokens, labels)), target=Utility(data(name)))
    fits = tokens[:, :longest], labels[..., :longest]
    assert torch.isfinite(task.losses(task.params(), fits)).all()
    empty = torch.full((2, 9), -1)
    wide = torch.cat([fits[0], empty], 1), fits[1] if labels.ndim == 1 else torch.cat([fits[1], empty - 99], 1)
    assert torch.equal(task.losses(task.params(), wide), task.losses(task.params(), fits))
