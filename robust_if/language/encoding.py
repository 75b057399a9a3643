"""Texts as tokens: a data set with columns of text becomes samples of ``(tokens, labels)``."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from robust_if.data import Samples
from robust_if.token_losses import NO_TOKEN, NOT_LEARNT, Kind


def encode(
    data: Any, tokenizer: Any, *, kind: Kind = "causal-lm", prompt: str = "prompt", completion: str = "completion", text: str = "text",
    label: str = "label", max_length: int | None = None,
) -> Samples:  # fmt: skip
    """Samples of ``(tokens, labels)`` for :meth:`robust_if.Task.from_transformers`."""
    rows = len(data)
    tokens, labels = [], []
    for i in range(rows):
        row = {name: data[name].iloc[i] if hasattr(data[name], "iloc") else data[name][i] for name in (prompt, completion, text, label) if name in _columns(data)}
        if kind == "causal-lm" and prompt in row:
            before = tokenizer(row[prompt])["input_ids"]
            whole = tokenizer(row[prompt] + row[completion])["input_ids"] + [tokenizer.eos_token_id]
            shared = next((k for k, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b), min(len(before), len(whole)))
            tokens.append(whole)
            labels.append([NOT_LEARNT] * shared + whole[shared:])
        else:
            whole = tokenizer(row[text])["input_ids"] + ([tokenizer.eos_token_id] if kind == "causal-lm" else [])
            tokens.append(whole)
            labels.append(whole if kind == "causal-lm" else row[label])
    longest = max(map(len, tokens))
    x = torch.tensor([each + [NO_TOKEN] * (longest - len(each)) for each in tokens])
    y = torch.tensor([each + [NOT_LEARNT] * (longest - len(each)) for each in labels] if kind == "causal-lm" else np.asarray(labels).tolist())
    return Samples((x, y))


def _columns(data: Any) -> list[str]:
    return list(data.column_names if hasattr(data, "column_names") else data.columns)
