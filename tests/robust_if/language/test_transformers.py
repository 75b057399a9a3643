"""Task.from_transformers: losses and derivatives of transformers against Hugging Face's own loss and plain loops."""

from __future__ import annotations

import pytest
import torch

from cases import relative
from oracles import flat, matrix, sample_gradients
from robust_if import (
    Task,
)
from robust_if import gradients as gradients_module
from robust_if.gradients import directional, per_sample
from robust_if.layers import LayerGradients
from tiny_transformers import ADAPTED, EVERY_FAMILY, FAMILIES, Words, data, direction, model, own_losses, task_of, whole
from unchanged import untouched

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")


@EVERY_FAMILY
@ADAPTED
def test_losses_are_those_of_hugging_face(name: str, lora: bool) -> None:
    task, samples = task_of(name, lora), data(name)
    got = task.losses(task.params(), whole(samples)).detach().numpy()
    # which computes a language model's loss in float32
    assert relative(got, own_losses(task.model, samples)) <= (1e-12 if FAMILIES[name].kind == "classification" else 1e-6)


@EVERY_FAMILY
@ADAPTED
def test_every_derivative_is_that_of_single_backward_passes(name: str, lora: bool) -> None:
    task, samples, exact = task_of(name, lora), data(name), FAMILIES[name].exact
    params, batch = task.params(), whole(samples)
    assert lora == all("lora_" in each or "modules_to_save" in each for each in params)
    expected = sample_gradients(task, samples)
    v = direction(params)
    with untouched(task.model):
        got = directional(task, params, batch, v)
        rules = LayerGradients(task, params, batch)
        found = dict(rules.dense(batch))
    assert relative(got, matrix(expected) @ flat(v).numpy()) <= exact
    assert not rules.uncovered
    largest = max(float(value.norm()) for value in expected.values())
    for each, value in expected.items():
        assert float((found[each] - value).norm()) <= exact * largest, each


@pytest.mark.parametrize("name", ["gpt2", "qwen2-classes", "bert-classes", "distilbert-classes"])
def test_attention_may_be_computed_either_way(name: str) -> None:
    samples = data(name)
    tasks = [task_of(name, attention=attention) for attention in ("eager", "sdpa")]
    v = direction(tasks[0].params())
    first, second = (directional(task, task.params(), whole(samples), v) for task in tasks)
    assert relative(first, second) <= FAMILIES[name].exact
    rules = LayerGradients(tasks[0], tasks[0].params(), whole(samples))
    assert not rules.uncovered


def test_the_mean_over_tokens_may_be_asked_for() -> None:
    made, samples = model("gpt2"), data("gpt2")
    total, mean = (Task.from_transformers(made, Words(), reduction=how) for how in ("sum", "mean"))  # type: ignore[arg-type]
    learnt = (samples.labels[:, 1:] != -100).sum(1)
    losses = [task.losses(task.params(), whole(samples)) for task in (total, mean)]
    assert torch.allclose(losses[0] / learnt, losses[1])


@pytest.mark.parametrize("name", ["gpt2", "bert-classes"])
def test_where_torch_has_no_rule_single_passes_are_taken_and_that_is_said_once(
    name: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gradients_module, "_said", set())
    task, samples = task_of(name), data(name)
    for _ in range(2):
        got = per_sample(task, task.params(), whole(samples))
    expected = sample_gradients(task, samples)
    assert relative(matrix(got), matrix(expected)) <= 1e-11
    assert sum("rule" in record.getMessage() for record in caplog.records) <= 1
