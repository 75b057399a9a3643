"""Small transformers made from scratch, where no checkpoint is at hand: for trials, tests and benchmarks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from robust_if.formats.parts import require

#: Tokens with a meaning of their own: no token, a word that is not in the vocabulary, the end of a text.
PAD, UNKNOWN, END = "<pad>", "<unk>", "<end>"


def tokenizer(texts: Iterable[str], *, vocabulary: int = 4000, positions: int = 256) -> Any:
    """A tokenizer of Hugging Face whose pieces of words are learnt from ``texts`` (byte-pair encoding, so that every text can be written).

    Args:
        vocabulary: tokens at most.
        positions: tokens of a text at most.

    Raises:
        ImportError: if transformers is not installed.
    """
    transformers, tokenizers = require("transformers", "a tokenizer", "'robust-if[hf]'"), require("tokenizers", "a tokenizer", "'robust-if[hf]'")
    made = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token=UNKNOWN))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        texts,
        tokenizers.trainers.BpeTrainer(
            vocab_size=vocabulary, special_tokens=[PAD, UNKNOWN, END], initial_alphabet=alphabet, min_frequency=2, show_progress=False
        ),
    )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, pad_token=PAD, unk_token=UNKNOWN, eos_token=END, model_max_length=positions)


def language_model(tokenizer: Any, *, layers: int = 4, width: int = 128, heads: int = 4, seed: int = 0) -> Any:
    """A model of the shape of GPT-2 with random weights, in evaluation mode."""
    return _gpt2("GPT2LMHeadModel", tokenizer, seed, n_layer=layers, n_embd=width, n_head=heads)


def classifier(tokenizer: Any, classes: int, *, layers: int = 4, width: int = 128, heads: int = 4, seed: int = 0, body: Any = None) -> Any:
    """A classifier of the shape of GPT-2 in evaluation mode, which reads the class off the last token.

    Args:
        body: a language model of the same shape, whose parameters it starts from; only the head is random then.
    """
    model = _gpt2("GPT2ForSequenceClassification", tokenizer, seed, n_layer=layers, n_embd=width, n_head=heads, num_labels=classes)
    if body is not None:
        model.transformer.load_state_dict(body.transformer.state_dict())
    return model


def _gpt2(name: str, tokenizer: Any, seed: int, **shape: int) -> Any:
    transformers = require("transformers", "a transformer", "'robust-if[hf]'")
    ids = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = transformers.GPT2Config(vocab_size=len(tokenizer), n_positions=tokenizer.model_max_length, **shape, **ids)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return getattr(transformers, name)(config).eval()
