"""How a transformer reads a batch of tokens, and what it loses per sample; the parts of :meth:`robust_if.Task.from_transformers`.

A batch is ``(tokens, labels)``: tokens ``(B, T)``, −1 where there is none, always at the end; labels ``(B, T)`` of a language model, −100 where a
token is not learnt, or ``(B,)`` of a classifier.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the name that every reader of torch code expects

#: A place without a token, and a token that is not learnt (the convention of Hugging Face).
NO_TOKEN, NOT_LEARNT = -1, -100

_HALF = (torch.bfloat16, torch.float16)
_PLAIN = (*_HALF, torch.float32, torch.float64)

#: What is trained beside an adapter, by the setting ``bias`` of PEFT.
_BIASES = {"all": ("*bias*",), "lora_only": ("*.base_layer.bias",)}

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
        return logits.float() if logits.dtype in _HALF else logits


@dataclass(frozen=True)
class NextToken:
    """Cross-entropy of the tokens that are learnt, each predicted from those before it: their sum for every sample, or their mean.

    The sum is what a sample adds to the loss that a ``Trainer`` of Hugging Face lowers, whose batches are averaged over tokens and not over samples.
    """

    reduction: Reduction = "sum"

    def __call__(self, logits: Tensor, batch: Any) -> Tensor:
        # the label of a position is the next token; logits in one piece are not copied for it, and are large
        labels = F.pad(batch[1][:, 1 : logits.shape[1]], (0, 1), value=NOT_LEARNT)
        each = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=NOT_LEARNT, reduction="none")
        losses = each.view(labels.shape).sum(1)
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
    """How ``model`` reads what ``tokenizer`` makes; tried on two samples of two tokens.

    Raises:
        TypeError: if the model is none of transformers.
        ValueError: if the tokenizer has no padding token or more tokens than the model; or the model is quantised, spread over devices, an encoder
            with a decoder, has no head for ``kind``, or is a language model that sees later tokens or a classifier that cannot tell padding.
    """
    if kind not in get_args(Kind):
        raise ValueError(f"kind: expected 'causal-lm' or 'classification', got {kind!r}")
    if not (isinstance(model, nn.Module) and hasattr(model, "config") and hasattr(model, "get_input_embeddings")):
        raise TypeError(f"model: expected one of transformers, as AutoModelForCausalLM loads them, got {type(model).__name__}")
    config: Any = model.config
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"model: {type(model).__name__} is an encoder with a decoder; expected a causal language model or a classifier")
    if tokenizer.pad_token_id is None:
        raise ValueError(
            "tokenizer: it has no padding token, which batches of several lengths need; set tokenizer.pad_token = tokenizer.eos_token"
            + (" and model.config.pad_token_id = tokenizer.pad_token_id" if kind == "classification" else "")
        )
    held = _embedding(model).weight.shape[0]
    if len(tokenizer) > held:
        raise ValueError(f"tokenizer: it has {len(tokenizer)} tokens, the model {held}; expected the model's own tokenizer")
    if getattr(model, "is_quantized", False) or any(value.dtype not in _PLAIN for value in model.parameters()):
        raise ValueError("model: its weights are quantised, and gradients through them are not those of the model; load it in bfloat16 instead")
    places = {str(value.device) for value in model.parameters()}
    if len(places) > 1 or "meta" in places:
        raise ValueError(f"model: its weights are on {', '.join(sorted(places))}; expected them on one device, without device_map or offloading")
    head: Any = getattr(model, "get_output_embeddings", None)
    if kind == "causal-lm" and (head is None or head() is None):
        raise ValueError(f"model: {type(model).__name__} has no head for the next token; load it with AutoModelForCausalLM")
    if kind == "classification":
        if getattr(config, "problem_type", None) not in (None, "single_label_classification"):
            raise ValueError(f"model: expected one label per sample, got the problem type {config.problem_type!r}")
        if config.num_labels < 2:
            raise ValueError(f"model: expected at least 2 classes, got num_labels={config.num_labels}, which is regression")
        if config.pad_token_id != tokenizer.pad_token_id:
            raise ValueError(
                f"model: its padding token is {config.pad_token_id}, the tokenizer's {tokenizer.pad_token_id}; "
                "set model.config.pad_token_id = tokenizer.pad_token_id"
            )
    if not any(module.training for module in model.modules()):  # a task of one in training mode is refused, and here dropout would draw
        _try(model, kind, [token for token in range(4) if token != tokenizer.pad_token_id][:3])
    return Reading(tokenizer.pad_token_id, kind == "classification", _longest(model))


def _try(model: Any, kind: Kind, tokens: list[int]) -> None:
    """Whether the model gives the logits that are expected, and a language model the same ones for a token whatever comes after it."""
    first, second, third = tokens
    device = _embedding(model).weight.device
    with torch.no_grad():
        logits = getattr(model(input_ids=torch.tensor([[first, second], [first, third]], device=device)), "logits", None)
    shape = None if logits is None else tuple(logits.shape)
    if kind == "classification":
        if shape != (2, model.config.num_labels):
            raise ValueError(
                f"model: {type(model).__name__} gives logits of shape {shape} for 2 samples, expected (2, {model.config.num_labels}), one for each "
                "class; load it with AutoModelForSequenceClassification"
            )
        return
    if logits is None or shape is None or shape[:2] != (2, 2):
        raise ValueError(f"model: {type(model).__name__} gives logits of shape {shape} for 2 samples of 2 tokens, expected (2, 2, tokens)")
    before, after = (logits[0] - logits[1]).double().norm(dim=-1).tolist()
    if before > (0.03 if logits.dtype in _HALF else 1e-3) * after:
        raise ValueError(f"model: {type(model).__name__} lets a token see those after it; expected a causal language model")


def _embedding(model: Any) -> Any:
    return model.get_input_embeddings()


def _longest(model: Any) -> int | None:
    """Tokens that the model has positions for. Those of RoBERTa and its kin begin after the one of padding."""
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    positions: int | None = getattr(config, "max_position_embeddings", None)
    tables = [module for name, module in model.named_modules() if name.endswith("position_embeddings") and isinstance(module, nn.Embedding)]
    if positions is None or not tables or tables[0].padding_idx is None:
        return positions
    return positions - tables[0].padding_idx - 1


def adapter(model: nn.Module) -> tuple[str, ...] | str:
    """The patterns of the parameters that count: an adapter's of PEFT, with what is trained beside it, otherwise all.

    Raises:
        ValueError: if the model is one of PEFT and none of its parameters belongs to an adapter, or it holds several, or one that is merged into the
            weights or switched off.
    """
    known: Any = getattr(model, "peft_config", None)
    if known is None:
        return "*"
    if len(known) > 1:
        raise ValueError(f"model: it holds the adapters {', '.join(map(repr, known))}; expected one, or parameters=(...) that name those that count")
    prefix = getattr(getattr(model, "base_model", None), "prefix", None) or "lora_"
    patterns = [f"*{prefix}*", "*modules_to_save*", *_BIASES.get(getattr(next(iter(known.values()), None), "bias", "none"), ())]
    names = [name for name, _ in model.named_parameters()]
    if not any(prefix in name for name in names):
        raise ValueError(f"model: none of its parameters is an adapter's ({prefix}…); its target modules match nothing")
    states = ((name, getattr(module, state, None)) for name, module in model.named_modules() for state in ("merged", "disable_adapters"))
    idle = next((name for name, found in states if found is True), None)
    if idle is not None:
        raise ValueError(
            f"model: the adapter of {idle} is merged into its weights or switched off, so that its own parameters do nothing; "
            "call unmerge_adapter() or enable_adapter_layers()"
        )
    return tuple(pattern for pattern in patterns if any(fnmatchcase(name, pattern) for name in names))
