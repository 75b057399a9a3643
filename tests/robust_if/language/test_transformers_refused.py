"""What Task.from_transformers refuses, and what it says then."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from robust_if import (
    Samples,
    Task,
    Utility,
    score,
)
from tiny_transformers import _BERT, FAMILIES, TOKENS, Words, adapted, data, model, task_of

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")


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
