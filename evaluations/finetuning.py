"""Whether a choice of texts is a good one: fine-tunings on it and on others of the same size, by one recipe from one state."""

from __future__ import annotations

import copy
import json
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from robust_if.data import Samples, batches
from robust_if.evaluations.baselines import predict
from robust_if.evaluations.texts import Loaded
from robust_if.fairness.perturbation import fair_score
from robust_if.formats.parts import require
from robust_if.language.models import load
from robust_if.sweep import Progress, silent
from robust_if.task import Task
from robust_if.token_losses import NOT_LEARNT
from robust_if.training import Recipe, fit
from robust_if.writing import write_json


@dataclass(frozen=True)
class Verification:
    """How a choice is verified: fine-tunings on it, and on others of the same size.

    Args:
        test: file of texts that nothing else saw.
        start: folder of the model before fine-tuning; that of the scores by default.
        recipe: of every fine-tuning; its seed is the first one.
        seeds: fine-tunings on each choice.
        lora_rank: of a fresh adapter that alone is trained; 0 for all parameters, or those of the adapter that the model already is.
    """

    test: Path
    start: Path | None = None
    recipe: Recipe = field(default_factory=lambda: Recipe(epochs=3, lr=5e-5, optimizer="adamw", weight_decay=0.01, batch_size=8))
    seeds: int = 3
    lora_rank: int = 0


def started(loaded: Loaded, verification: Verification, samples: Samples) -> Task:
    """The model before fine-tuning: the one to start from where there is one, otherwise the model that scored; with a fresh adapter if asked for.

    Raises:
        ImportError: if peft is needed and not installed.
        ValueError: if the model does not fit the tokenizer or ``samples``, or a model that shall get an adapter is one already.
    """
    source, rank = loaded.source, verification.lora_rank
    model: Any = loaded.task.model
    if verification.start is not None:
        model, _ = load(verification.start, source.kind, dtype=source.dtype, device=source.device)
        replace(loaded, task=Task.from_transformers(model, loaded.tokenizer, source.kind)).check(samples)
    if rank:
        peft = require("peft", "an adapter", "'robust-if[hf]'")
        if hasattr(model, "peft_config"):
            raise ValueError("lora-rank: the model is an adapter already; give its base model with --base, where --verify then starts")
        kind = "SEQ_CLS" if source.kind == "classification" else "CAUSAL_LM"
        settings = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type=kind)
        with torch.random.fork_rng(), warnings.catch_warnings(action="ignore"):  # of what concerns peft and transformers alone
            torch.manual_seed(verification.recipe.seed)
            model = peft.get_peft_model(copy.deepcopy(model), settings).eval()  # it is changed in place
    return Task.from_transformers(model, loaded.tokenizer, source.kind)


def measured(task: Task, test: Samples, batch_size: int = 8, pairs: tuple[Samples, Samples] | None = None) -> dict[str, float]:
    """``loss`` on the test texts, of a language model per token; of a classifier also the ``accuracy``, and the ``fair_score`` on pairs of texts."""
    labels = test.labels
    if labels.ndim == 1:
        probabilities = predict(task, test, batch_size)
        right = probabilities[np.arange(len(test)), labels.numpy()]
        found = {"loss": float(-np.log(np.maximum(right, 1e-30)).mean()), "accuracy": float((probabilities.argmax(1) == labels.numpy()).mean())}
        return found if pairs is None else {**found, "fair_score": fair_score(task, *pairs, batch_size=batch_size)}
    params = task.params()
    with torch.no_grad():
        total = sum(float(task.losses(params, batch).sum()) for batch in batches(test, batch_size, next(iter(params.values()))))
    return {"loss": total / int((labels[:, 1:] != NOT_LEARNT).sum())}


def verify(
    start: Task,
    train: Samples,
    test: Samples,
    choices: Mapping[str, Callable[[int], NDArray[Any]]],
    recipe: Recipe,
    seeds: int,
    *,
    pairs: tuple[Samples, Samples] | None = None,
    directory: Path | None = None,
    progress: Progress = silent,
) -> dict[str, list[dict[str, float]]]:
    """Fine-tune on every choice with every seed, and measure each model on the test texts.

    Args:
        start: the model before fine-tuning; only the parameters that it counts are trained.
        choices: weights ``(n,)`` by the name of the choice and the seed.
        seeds: how many, from that of the recipe on.
        pairs: test texts, and the same about other people.
        directory: where models that are being trained, and what finished ones gave, are kept, so that the same call resumes.

    Returns:
        What :func:`measured` gives, by choice, one for every seed.
    """
    kept = None if directory is None else directory / "measured.json"
    found: dict[str, list[dict[str, float]]] = {name: [] for name in choices}
    if kept is not None and kept.is_file():
        found = json.loads(kept.read_text(encoding="utf-8"))
    left = [(name, k) for k in range(seeds) for name in choices if k >= len(found[name])]
    for name, k in progress(left, "fine-tune"):
        work = None if directory is None else directory / f"{name}-{k}"
        seed = recipe.seed + k
        task = fit(start, train, replace(recipe, seed=seed), weights=choices[name](seed), directory=work)
        found[name].append(measured(task, test, recipe.batch_size, pairs))
        if kept is not None and work is not None:
            write_json(kept, found)
            shutil.rmtree(work)
    return found
