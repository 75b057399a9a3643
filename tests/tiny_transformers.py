"""Tiny transformers of many families with random weights, with adapters and without, and texts for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from robust_if import (
    Samples,
    Task,
)
from robust_if.task import Params
from robust_if.token_losses import Kind

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
