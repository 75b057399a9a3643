"""Texts as tokens: a data set with columns of texts, conversations or tokens becomes samples of ``(tokens, labels)``."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from robust_if.data import Samples
from robust_if.language.datasets import Array, Rows, is_missing, refuse
from robust_if.token_losses import NO_TOKEN, NOT_LEARNT, Kind

logger = logging.getLogger(__name__)

Learn = Literal["completion", "all"]

#: A tokenizer that knows of no limit has one of 1e30 tokens.
_SENSIBLE = 1_000_000

#: Columns of 0 and 1 that say which tokens of ``input_ids`` are learnt, as TRL names them.
_LEARNT_MASKS = ("completion_mask", "assistant_masks")


def encode(
    data: Any, tokenizer: Any, *, kind: Kind = "causal-lm", prompt: str = "prompt", completion: str = "completion", text: str = "text",
    label: str = "label", max_length: int | None = None, learn: Learn = "completion",
) -> Samples:  # fmt: skip
    """Samples of ``(tokens, labels)`` for :meth:`robust_if.Task.from_transformers`.

    What a row is, is told by the columns, in this order:

    - ``input_ids``: tokens, with ``attention_mask``, ``labels`` (the tokens themselves, not shifted, −100 where one is not learnt),
      ``completion_mask`` or ``assistant_masks`` beside them, if there are such columns. Padding at either end is taken off: by the mask, else where
      the padding token stands. ``seq_lengths`` splits a packed row into its samples, whose ids are ``"row:k"``.
    - ``messages``: turns ``{"role": ..., "content": ...}``, written by the tokenizer's chat template. The last one, the assistant's, is learnt.
      Only what the template writes is read: no other token is put around it.
    - ``prompt`` and ``completion``: the completion is learnt, and the token that ends a text, which is put behind it if the tokenizer has one.
      The two are read as one text; it is learnt from the first token in which it differs from the prompt alone, so a token that spans both is learnt.
    - ``text``: all of it is learnt, with the token that ends it; in a classification, its label is.

    The first token of a sample is never learnt, since nothing comes before it. The ids are those of a column ``id``, if there is one.

    Args:
        data: a ``datasets.Dataset`` or a pandas data frame of n rows.
        tokenizer: the model's own, of Hugging Face.
        kind: ``"causal-lm"``; or ``"classification"``, of ``input_ids`` or ``text``.
        prompt, completion, text, label: names of the columns. Labels are numbers from 0.
        max_length: tokens of a sample at most, what is longer is cut at its end, except for the special tokens that close a text to be classified.
            By default nothing is cut, and the tokenizer's ``model_max_length`` is the limit.
        learn: ``"all"`` learns the prompt too, and all tokens that are given, whatever the other columns say.

    Returns:
        Tokens ``(n, T)`` with −1 at the end where there is none; labels ``(n, T)`` with −100 where nothing is learnt, or ``(n,)`` class numbers.

    Raises:
        TypeError: if ``data`` is neither of the two.
        ValueError: if it has no row or none of the columns above, or rows (named by their ids) lack a value, have an empty or too long text, nothing
            to learn, or a label that is no class number; or the chat template does not fit.
    """
    _check_options(kind, learn, max_length)
    rows = Rows.of(data)
    if kind == "classification":
        classes = _classes(rows, label)
        sequences = _of_classification(rows, tokenizer, text)
    else:
        classes = None
        sequences = _of_language(rows, tokenizer, prompt, completion, text, learn)
    sequences = _limited(sequences, tokenizer, max_length, keep=sequences.closing if kind == "classification" else 0)
    refuse(sequences.ids, (len(each) == 0 for each in sequences.tokens), "data: expected at least one token per sample, got none")
    if classes is not None:
        return Samples((_padded(sequences.tokens, NO_TOKEN), torch.from_numpy(classes)), sequences.ids)
    cut = "" if max_length is None else f" within max_length={max_length}"
    refuse(sequences.ids, ((each[1:] == NOT_LEARNT).all() for each in sequences.labels), f"data: no token{cut} is learnt")
    return Samples((_padded(sequences.tokens, NO_TOKEN), _padded(sequences.labels, NOT_LEARNT)), sequences.ids)


@dataclass(frozen=True, eq=False)
class _Sequences:
    """n samples; ``closing`` special tokens stand at the end of each."""

    ids: Array
    tokens: list[Array]
    labels: list[Array]
    closing: int = 0


def _check_options(kind: str, learn: str, max_length: int | None) -> None:
    if kind not in get_args(Kind):
        raise ValueError(f"kind: expected 'causal-lm' or 'classification', got {kind!r}")
    if learn not in get_args(Learn):
        raise ValueError(f"learn: expected 'completion' or 'all', got {learn!r}")
    if max_length is not None and (isinstance(max_length, bool) or not isinstance(max_length, (int, np.integer)) or max_length < 1):
        raise ValueError(f"max_length: expected a number of tokens from 1, or None, got {max_length!r}")


def _classes(rows: Rows, label: str) -> NDArray[np.int64]:
    if label not in rows.names:
        raise ValueError(f"data: expected the label in a column {label!r}, it has {rows.names}; name it by label=")
    values = rows.column(label)
    if any(isinstance(value, str) for value in values):
        raise ValueError(f"{label}: expected class numbers from 0, got texts; data.class_encode_column({label!r}) of a datasets.Dataset numbers them")
    absent = [is_missing(value) or value == -1 for value in values]
    refuse(rows.ids, absent, f"{label}: expected a class number in every row, got none or -1")
    wrong = [not isinstance(value, (int, np.integer)) or value < 0 for value in values]
    refuse(rows.ids, wrong, f"{label}: expected class numbers from 0, got others")
    return np.asarray(values, dtype=np.int64)


def _of_classification(rows: Rows, tokenizer: Any, text: str) -> _Sequences:
    if "input_ids" in rows.names:
        if "seq_lengths" in rows.names:
            raise ValueError("seq_lengths: a packed row holds several samples, but only one label; expected one sample per row")
        return _given(rows, tokenizer, "all")
    if text not in rows.names:
        raise ValueError(f"data: expected a column 'input_ids' or {text!r}, it has {rows.names}; name it by text=")
    tokens, closing = _tokenise(tokenizer, rows.texts(text))
    return _Sequences(rows.ids, tokens, tokens, closing)


def _of_language(rows: Rows, tokenizer: Any, prompt: str, completion: str, text: str, learn: Learn) -> _Sequences:
    if "input_ids" in rows.names:
        return _given(rows, tokenizer, learn)
    if "messages" in rows.names:
        return _continued(rows.ids, tokenizer, *_conversations(rows, tokenizer), learn, special=False)
    if {prompt, completion} <= set(rows.names):
        before, after = rows.texts(prompt, empty=True), rows.texts(completion)
        return _continued(rows.ids, tokenizer, before, [a + b for a, b in zip(before, after, strict=True)], learn)
    if text in rows.names:
        tokens = [_ended(each, tokenizer.eos_token_id) for each in _tokenise(tokenizer, rows.texts(text))[0]]
        return _Sequences(rows.ids, tokens, tokens)
    raise ValueError(
        f"data: expected the column 'input_ids', 'messages' or {text!r}, or {prompt!r} and {completion!r}, it has {rows.names}; "
        "name them by prompt=, completion= or text="
    )


def _tokenise(tokenizer: Any, texts: list[str], *, special: bool = True) -> tuple[list[Array], int]:
    """The tokens of every text, and how many special ones the tokenizer puts at the end of a text."""
    options = {"padding": False, "truncation": False, "return_attention_mask": False, "return_special_tokens_mask": True, "verbose": False}
    made = tokenizer(texts, add_special_tokens=special, **options)
    closing = min(next((k for k, put in enumerate(reversed(mask)) if not put), len(mask)) for mask in made["special_tokens_mask"])
    return [np.asarray(each, dtype=np.int64) for each in made["input_ids"]], closing


def _ended(tokens: Array, end: int | None) -> Array:
    return tokens if end is None or (len(tokens) > 0 and tokens[-1] == end) else np.append(tokens, end)


def _continued(ids: Array, tokenizer: Any, before: list[str], whole: list[str], learn: Learn, *, special: bool = True) -> _Sequences:
    """Texts of which what comes after ``before`` is learnt."""
    tokens, closing = _tokenise(tokenizer, whole, special=special)
    if special:
        tokens = [_ended(each, tokenizer.eos_token_id) for each in tokens]
    if learn == "all":
        return _Sequences(ids, tokens, tokens)
    labels = []
    for prompt, each in zip(_tokenise(tokenizer, before, special=special)[0], tokens, strict=True):
        prompt = prompt[: max(0, len(prompt) - closing)]
        shorter = min(len(prompt), len(each))
        differing = np.flatnonzero(prompt[:shorter] != each[:shorter])
        shared = differing[0] if len(differing) else shorter
        labels.append(np.where(np.arange(len(each)) < shared, NOT_LEARNT, each))
    return _Sequences(ids, tokens, labels)


def _conversations(rows: Rows, tokenizer: Any) -> tuple[list[str], list[str]]:
    """What the chat template writes for all turns but the last, up to where the assistant begins, and for all."""
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("tokenizer: it has no chat template, which the column 'messages' needs; set one, or give prompt and completion")
    before, whole = [], []
    for i, given in zip(rows.ids, rows.present("messages"), strict=True):
        # A table gives every turn the keys of all turns, with nothing in them.
        turns = [{k: v for k, v in turn.items() if v is not None} if isinstance(turn, dict) else {} for turn in np.atleast_1d(given)]
        if len(turns) < 2 or not all(isinstance(turn.get(key), str) for turn in turns for key in ("role", "content")):
            raise ValueError(f"messages: expected two or more turns {{'role': text, 'content': text}}, got {given!s:.200} (id {i})")
        if turns[-1]["role"] != "assistant" or turns[-1]["content"] == "":
            raise ValueError(f"messages: expected the last turn to be the assistant's, with a text, got {turns[-1]} (id {i})")
        try:
            before.append(tokenizer.apply_chat_template(turns[:-1], tokenize=False, add_generation_prompt=True))
            whole.append(tokenizer.apply_chat_template(turns, tokenize=False))
        except Exception as error:  # a template raises what it likes
            raise ValueError(f"messages: the tokenizer's chat template does not take those of id {i}: {error}") from error
    continued = [a.startswith(b) and len(a) > len(b) for b, a in zip(before, whole, strict=True)]
    refuse(rows.ids, (not each for each in continued), "messages: what the chat template writes for all turns does not go on from all but the last")
    return before, whole


def _given(rows: Rows, tokenizer: Any, learn: Learn) -> _Sequences:
    """Tokens that are given, without padding, every packed row as its samples."""
    tokens, labels, there = columns = _columns(rows, tokenizer, learn)
    ids: Array = rows.ids
    if "seq_lengths" in rows.names:
        lengths = rows.integers("seq_lengths")
        wrong = [(each < 1).any() or each.sum() != len(row) for each, row in zip(lengths, tokens, strict=True)]
        refuse(ids, wrong, "seq_lengths: expected numbers from 1 whose sum is that of the row's input_ids")
        ids = np.asarray([f"{i}:{k}" for i, each in zip(ids, lengths, strict=True) for k in range(len(each))])
        tokens, labels, there = ([part for row, each in zip(column, lengths, strict=True) for part in _split(row, each)] for column in columns)
    holes = (len(np.unique(np.flatnonzero(each) - np.arange(each.sum()))) > 1 for each in there)
    refuse(ids, holes, "attention_mask: expected padding at the ends, got it between tokens")
    tokens, labels = ([row[mask] for row, mask in zip(column, there, strict=True)] for column in (tokens, labels))
    known = len(tokenizer)
    unknown = (((each < 0) | (each >= known)).any() for each in tokens)
    refuse(ids, unknown, f"input_ids: expected tokens from 0 to {known - 1}, got others")
    shifted = (((y != NOT_LEARNT) & (y != x)).any() for x, y in zip(tokens, labels, strict=True))
    refuse(ids, shifted, f"labels: expected {NOT_LEARNT}, or the token at the same place (they are not shifted), got others")
    return _Sequences(ids, tokens, labels)


def _split(row: Array, lengths: Array) -> list[Array]:
    return np.split(row, np.cumsum(lengths)[:-1])


def _columns(rows: Rows, tokenizer: Any, learn: Learn) -> tuple[list[Array], list[Array], list[Array]]:
    """Tokens, labels, and where there is a token, of every row, all of one length."""
    tokens = rows.integers("input_ids")

    def beside(name: str, *, binary: bool = True) -> list[Array]:
        columns = rows.integers(name)
        refuse(rows.ids, (len(a) != len(b) for a, b in zip(columns, tokens, strict=True)), f"{name}: expected as many values as input_ids")
        if binary:
            refuse(rows.ids, (not np.isin(each, (0, 1)).all() for each in columns), f"{name}: expected 0 and 1, got others")
        return columns

    labels = beside("labels", binary=False) if learn == "completion" and "labels" in rows.names else tokens
    for name in _LEARNT_MASKS if learn == "completion" else ():
        if name in rows.names:
            labels = [np.where(mask == 1, each, NOT_LEARNT) for mask, each in zip(beside(name), labels, strict=True)]
    if "attention_mask" in rows.names:
        return tokens, labels, [each == 1 for each in beside("attention_mask")]
    return tokens, labels, _without_padding(rows.ids, tokens, tokenizer)


def _without_padding(ids: Array, tokens: list[Array], tokenizer: Any) -> list[Array]:
    """Where a token stands between runs of the padding token at the ends."""
    pad = tokenizer.pad_token_id
    if pad is None:
        return [np.ones(len(each), dtype=bool) for each in tokens]
    if pad == tokenizer.eos_token_id:
        repeated = (len(each) > 1 and ((each[:2] == pad).all() or (each[-2:] == pad).all()) for each in tokens)
        refuse(ids, repeated, "input_ids: the padding token also ends a text, so the two cannot be told apart; add a column 'attention_mask'")
        return [np.ones(len(each), dtype=bool) for each in tokens]
    is_token = [each != pad for each in tokens]
    return [np.logical_or.accumulate(each) & np.logical_or.accumulate(each[::-1])[::-1] for each in is_token]


def _limited(sequences: _Sequences, tokenizer: Any, max_length: int | None, *, keep: int) -> _Sequences:
    """The samples, none longer than the limit; the last ``keep`` tokens of one that is cut stay."""
    limit = int(min(tokenizer.model_max_length, _SENSIBLE)) if max_length is None else int(max_length)
    lengths = [len(each) for each in sequences.tokens]
    longer = [length > limit for length in lengths]
    if max_length is None:
        named = [f"{i} ({length} tokens)" for i, length in zip(sequences.ids, lengths, strict=True)]
        if limit < _SENSIBLE:
            refuse(named, longer, f"data: the tokenizer takes up to {limit} tokens; pass max_length={limit} to cut what is longer")
        return sequences
    if not any(longer):
        return sequences
    logger.warning("encode: %d of %d samples have more than %d tokens and were cut at the end", sum(longer), len(longer), limit)
    keep = min(keep, limit)

    def cut(each: Array) -> Array:
        return each if len(each) <= limit else np.concatenate([each[: limit - keep], each[len(each) - keep :]])

    return replace(sequences, tokens=[cut(each) for each in sequences.tokens], labels=[cut(each) for each in sequences.labels])


def _padded(rows: list[Array], filler: int) -> Tensor:
    lengths = np.asarray([len(each) for each in rows])
    padded = np.full((len(rows), lengths.max()), filler, dtype=np.int64)
    padded[np.arange(lengths.max()) < lengths[:, None]] = np.concatenate(rows)
    return torch.from_numpy(padded)
