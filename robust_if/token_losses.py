"""How a transformer reads a batch of tokens, and what it loses per sample; the parts of :meth:`robust_if.Task.from_transformers`.

A batch is ``(tokens, labels)``: tokens ``(B, T)``, −1 where there is none, always at the end; labels ``(B, T)`` of a language model, −100 where a
token is not learnt, or ``(B,)`` of a classifier.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the name that every reader of torch code expects

#: A place without a token, and a token that is not learnt (the convention of Hugging Face).
NO_TOKEN, NOT_LEARNT = -1, -100

Kind = Literal["causal-lm", "classification"]
Reduction = Literal["sum", "mean"]


@dataclass(frozen=True)
class Reading:
    """The logits of a transformer for a batch of tokens, whose columns that are empty in the whole batch are left out.

    Args:
        padding: the token that stands for none, in a model that is told where that is.
        mask: whether it is. A causal model needs no mask, since no token looks at those after it; the attention is then
            computed without one, which is faster.
        longest: tokens that the model has positions for; ``None`` if it has no limit.
    """

    padding: int
    mask: bool
    longest: int | None = None

    def __call__(self, model: Callable[..., Any], batch: Any) -> Tensor:
        tokens = trimmed(batch[0])
        if self.longest is not None and tokens.shape[1] > self.longest:
            raise ValueError(f"tokens: the model takes up to {self.longest}, got {tokens.shape[1]}; encode with max_length={self.longest}")
        there = tokens != NO_TOKEN
        logits: Tensor
        if self.mask:
            logits = model(input_ids=torch.where(there, tokens, self.padding), attention_mask=there.long()).logits
        else:  # any token will do where there is none, and transformers warn of padding without a mask
            logits = model(input_ids=torch.where(there, tokens, tokens[:, :1]), use_cache=False).logits
        return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits


@dataclass(frozen=True)
class NextToken:
    """Cross-entropy of the tokens that are learnt, each predicted from those before it: their sum for every sample, or their mean.

    The sum is what a sample adds to the loss that a ``Trainer`` of Hugging Face lowers, whose batches are averaged over tokens and not over samples.
    """

    reduction: Reduction = "sum"

    def __call__(self, logits: Tensor, batch: Any) -> Tensor:
        labels = batch[1][:, 1 : logits.shape[1]]
        losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), labels, ignore_index=NOT_LEARNT, reduction="none").sum(1)
        return losses if self.reduction == "sum" else losses / (labels != NOT_LEARNT).sum(1).clamp(min=1)


def trimmed(tokens: Tensor) -> Tensor:
    """``tokens (B, T)`` without the last columns that hold none; all of them where the values cannot be looked at, inside ``torch.func.vmap``."""
    try:
        return tokens[:, : max(1, int((tokens != NO_TOKEN).sum(1).max()))]
    except RuntimeError:
        return tokens


def is_tokens(x: Tensor) -> bool:
    """Whether these are tokens ``(n, T)``, as :func:`robust_if.language.encode` makes them."""
    return x.ndim == 2 and x.dtype == torch.int64


def reading(model: Any, tokenizer: Any, kind: Kind) -> Reading:
    """How ``model`` reads what ``tokenizer`` makes.

    Raises:
        ValueError: if the tokenizer has no padding token or more tokens than the model, or the model is quantised, has no head for ``kind``, or is a
            classifier that cannot tell padding.
    """
    if kind not in get_args(Kind):
        raise ValueError(f"kind: expected 'causal-lm' or 'classification', got {kind!r}")
    config = model.config
    if tokenizer.pad_token_id is None:
        raise ValueError(
            "tokenizer: it has no padding token, which batches of several lengths need; set tokenizer.pad_token = tokenizer.eos_token"
            + (" and model.config.pad_token_id = tokenizer.pad_token_id" if kind == "classification" else "")
        )
    held = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > held:
        raise ValueError(f"tokenizer: it has {len(tokenizer)} tokens, the model {held}; expected the model's own tokenizer")
    if getattr(model, "is_quantized", False) or any(not value.is_floating_point() for value in model.parameters()):
        raise ValueError("model: its weights are quantised, and gradients through them are not those of the model; load it in bfloat16 instead")
    if kind == "causal-lm" and model.get_output_embeddings() is None:
        raise ValueError(f"model: {type(model).__name__} has no head for the next token; load it with AutoModelForCausalLM")
    if kind == "classification":
        if getattr(config, "problem_type", None) not in (None, "single_label_classification"):
            raise ValueError(f"model: expected one label per sample, got the problem type {config.problem_type!r}")
        if config.pad_token_id != tokenizer.pad_token_id:
            raise ValueError(
                f"model: its padding token is {config.pad_token_id}, the tokenizer's {tokenizer.pad_token_id}; "
                "set model.config.pad_token_id = tokenizer.pad_token_id"
            )
    return Reading(tokenizer.pad_token_id, kind == "classification", getattr(config, "max_position_embeddings", None))


def adapter(model: nn.Module) -> tuple[str, ...] | str:
    """The patterns of the parameters that count: an adapter's of PEFT, with what is trained beside it, otherwise all.

    Raises:
        ValueError: if the model is one of PEFT and none of its parameters belongs to an adapter.
    """
    if not hasattr(model, "peft_config"):
        return "*"
    prefix = getattr(getattr(model, "base_model", None), "prefix", None) or "lora_"
    own = tuple(pattern for pattern in (f"*{prefix}*", "*modules_to_save*") if any(_matches(name, pattern) for name, _ in model.named_parameters()))
    if not own:
        raise ValueError(f"model: none of its parameters is an adapter's ({prefix}…); its target modules match nothing")
    return own


def _matches(name: str, pattern: str) -> bool:
    return pattern.strip("*") in name
