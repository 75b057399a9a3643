"""evaluations/selecting.py and evaluations/finetuning.py."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from robust_if.data import Samples
from robust_if.estimators import InnerProduct, Loss
from robust_if.evaluations.finetuning import Verification, measured, started, verify
from robust_if.evaluations.selecting import select
from robust_if.evaluations.tracing import influences
from robust_if.language import small
from robust_if.selection import cover
from robust_if.sweep import Sweep
from robust_if.targets import Utility
from robust_if.task import Task
from robust_if.training import Recipe
from tiny_texts import MODEL, TOKENIZER, loaded, rows


@pytest.fixture(scope="module")
def train() -> Samples:
    return loaded().texts(rows(12), "data").samples


@pytest.fixture(scope="module")
def target() -> Samples:
    return loaded().texts(rows(3, 1), "target").samples


def test_the_best_are_kept(train: Samples, target: Samples) -> None:
    task = loaded().task
    found = select(task, train, target, keep=0.5, estimator=InnerProduct())
    expected = InnerProduct().score(task, train, target=Utility(target))
    np.testing.assert_allclose(found.scores.values, expected.values, rtol=1e-9)
    assert found.weights is not None and found.weights.sum() == 6
    assert found.scores.values[found.weights == 1].max() <= found.scores.values[found.weights == 0].min()
    table = found.table()
    assert table["score"].is_monotonic_decreasing and table["id"].iloc[0] == expected.top(1)[0] and table["weight"].sum() == 6


def test_the_same_share_of_every_group_is_kept(train: Samples, target: Samples) -> None:
    groups = np.array(["a"] * 4 + ["b"] * 8)
    weights = select(loaded().task, train, target, keep=0.5, groups=groups).weights
    assert weights is not None and [weights[groups == each].sum() for each in "ab"] == [2, 4]


def test_covering_takes_turns_between_target_texts(train: Samples, target: Samples) -> None:
    task, estimator = loaded().task, InnerProduct(normalise="cosine")
    found = select(task, train, target, keep=0.25, estimator=estimator, covering=True)
    matrix = influences(task, train, target, estimator=estimator, checkpoints=(), directory=None, sweep=Sweep(batch_size=5))
    assert found.weights is not None
    np.testing.assert_array_equal(found.weights, cover(matrix, 0.25))
    np.testing.assert_allclose(found.scores.values, matrix.mean(1))


def test_without_a_share_nothing_is_chosen(train: Samples, target: Samples) -> None:
    found = select(loaded().task, train, target, keep=None, estimator=Loss())
    assert found.weights is None and "weight" not in found.table()


def test_a_share_makes_no_sense_with_some_settings(train: Samples, target: Samples) -> None:
    for settings, message in (
        ({"keep": 0.0}, "keep: expected a share above 0"), ({"keep": None, "covering": True}, "give --keep"),
        ({"keep": 0.5, "covering": True, "estimator": Loss()}, "compares no single pairs"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            select(loaded().task, train, target, **settings)  # type: ignore[arg-type]


def test_the_loss_is_that_of_a_token(train: Samples) -> None:
    tokens, labels = train.batch(slice(None))
    total, count = 0.0, 0
    for row, learnt in zip(tokens, labels, strict=True):
        logits = torch.log_softmax(MODEL(input_ids=row[row >= 0][None]).logits[0].detach(), 1)
        for place in range(1, int((row >= 0).sum())):
            if learnt[place] != -100:
                total, count = total - float(logits[place - 1, learnt[place]]), count + 1
    assert measured(loaded().task, train, 5) == {"loss": pytest.approx(total / count, rel=1e-9)}


def test_a_classifier_is_measured_by_loss_and_accuracy() -> None:
    model = small.classifier(TOKENIZER, 2, layers=1, width=8, heads=1).double()
    task = Task.from_transformers(model, TOKENIZER, "classification")
    tokens = loaded().texts(rows(4), "data").samples.batch(slice(None))[0]
    logits = torch.cat([model(input_ids=row[row >= 0][None]).logits for row in tokens])
    labels = logits.argmax(1)
    labels[0] = 1 - labels[0]
    expected = torch.nn.functional.cross_entropy(logits, labels).item()
    assert measured(task, Samples((tokens, labels))) == {"loss": pytest.approx(expected, rel=1e-6), "accuracy": 0.75}


def test_every_choice_is_trained_with_every_seed_and_kept(train: Samples, target: Samples, tmp_path: Path) -> None:
    asked: list[tuple[str, int]] = []

    def choice(name: str, count: int) -> object:
        def weights(seed: int) -> np.ndarray:
            asked.append((name, seed))
            return (np.arange(12) < count).astype(float)

        return weights

    choices = {"all": choice("all", 12), "few": choice("few", 3)}
    recipe = Recipe(epochs=1, lr=1e-2, optimizer="adamw", batch_size=4, seed=5)
    found = verify(loaded().task, train, target, choices, recipe, 2, directory=tmp_path)  # type: ignore[arg-type]
    assert asked == [("all", 5), ("few", 5), ("all", 6), ("few", 6)]
    losses = [run["loss"] for name in choices for run in found[name]]
    assert len(set(losses)) == 4 and all(math.isfinite(each) for each in losses)
    assert losses[0] < measured(loaded().task, target)["loss"]
    assert [each.name for each in tmp_path.iterdir()] == ["measured.json"]
    assert verify(loaded().task, train, target, choices, recipe, 2, directory=tmp_path) == found and len(asked) == 4  # type: ignore[arg-type]


def test_an_adapter_is_fresh_and_leaves_the_model_alone(train: Samples) -> None:
    pytest.importorskip("peft")
    before, source = {name: value.clone() for name, value in MODEL.state_dict().items()}, loaded()
    start = started(source, Verification(Path("none"), lora_rank=2), train)
    assert start.params() and all("lora_" in name for name in start.params())
    params = source.task.params()
    batch = train.batch(slice(0, 4))
    assert torch.allclose(start.losses(start.params(), batch), source.task.losses(params, batch))
    assert MODEL.state_dict().keys() == before.keys() and not any("lora_" in name for name in params)
    with pytest.raises(ValueError, match="lora-rank: the model is an adapter already"):
        started(type(source)(source.source, start, TOKENIZER), Verification(Path("none"), lora_rank=2), train)
