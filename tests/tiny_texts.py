"""A tiny language model with its tokenizer, and texts for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from robust_if.evaluations.texts import Loaded, Source
from robust_if.language import small
from robust_if.task import Task

datasets = pytest.importorskip("datasets")
pytest.importorskip("transformers")

NOUNS = ["apple", "stone", "river", "cloud", "tiger", "paper"]


def rows(n: int, seed: int = 0) -> Any:
    """n prompts with completions, ids ``a0``, ``a1``, …"""
    draw = np.random.default_rng(seed)
    words = [draw.choice(NOUNS, 2).tolist() for _ in range(n)]
    return datasets.Dataset.from_list([{"id": f"a{i}", "prompt": f"say {a} {b}:", "completion": f" {b} {a} {i}"} for i, (a, b) in enumerate(words)])


TOKENIZER = small.tokenizer([row["prompt"] + row["completion"] for row in rows(30)], vocabulary=300, positions=48)
MODEL = small.language_model(TOKENIZER, layers=1, width=8, heads=2).double()


def loaded(**source: Any) -> Loaded:
    """The model in float64, as if it came from a folder."""
    return Loaded(Source(Path("nowhere"), **source), Task.from_transformers(MODEL, TOKENIZER), TOKENIZER)
