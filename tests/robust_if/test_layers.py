"""layers.py: per-sample gradients from layer inputs and output gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from cases import CLASSIFIERS, NAMES, Case, case, relative
from oracles import matrix, sample_gradients
from robust_if import Samples, Task, pieces
from robust_if import layers as module
from robust_if.layers import LayerGradients
from robust_if.preconditioners.diagonal_fisher import diagonal_fisher
from robust_if.task import Params


def squares(outputs: Tensor, batch: tuple[Tensor, ...]) -> Tensor:
    return torch.sin(outputs).flatten(1).cumsum(1).square().sum(1)


def draw(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(7, *shape, dtype=torch.float64)


def tokens() -> Tensor:
    return torch.randint(6, (7, 5))


#: One row per configuration: the layer, its input, and whether a layer rule (not the fallback) must serve it.
LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], bool]] = {
    "linear": (lambda: nn.Linear(4, 3), draw(4), True),
    "linear without bias": (lambda: nn.Linear(4, 3, bias=False), draw(4), True),
    "linear over positions": (lambda: nn.Linear(4, 3), draw(6, 4), True),
    "linear over a grid": (lambda: nn.Linear(4, 3), draw(2, 3, 4), True),
    "conv": (lambda: nn.Conv2d(2, 3, 3), draw(2, 6, 7), True),
    "conv to one position": (lambda: nn.Conv2d(2, 3, (6, 7)), draw(2, 6, 7), True),
    "conv stride padding": (lambda: nn.Conv2d(2, 3, (3, 2), stride=(2, 3), padding=(1, 0), bias=False), draw(2, 6, 7), True),
    "conv dilation": (lambda: nn.Conv2d(2, 3, 2, dilation=(2, 3), padding=1), draw(2, 6, 7), True),
    "conv groups": (lambda: nn.Conv2d(4, 6, 3, groups=2), draw(4, 6, 7), False),
    "conv same padding": (lambda: nn.Conv2d(2, 3, 3, padding="same"), draw(2, 6, 7), False),
    "conv reflected": (lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), draw(2, 6, 7), False),
    "conv in one dimension": (lambda: nn.Conv1d(2, 3, 3), draw(2, 6), False),
    "batch norm": (lambda: nn.BatchNorm1d(4), draw(4), True),
    "batch norm over positions": (lambda: nn.BatchNorm1d(4), draw(4, 5), True),
    "batch norm over images": (lambda: nn.BatchNorm2d(4), draw(4, 3, 2), True),
    "batch norm over volumes": (lambda: nn.BatchNorm3d(4), draw(4, 3, 2, 2), True),
    "layer norm": (lambda: nn.LayerNorm(4), draw(4), True),
    "layer norm over positions": (lambda: nn.LayerNorm((3, 4)), draw(5, 3, 4), True),
    "layer norm without bias": (lambda: nn.LayerNorm(4, bias=False), draw(5, 4), True),
    "group norm": (lambda: nn.GroupNorm(2, 4), draw(4, 3, 2), True),
    "group norm of vectors": (lambda: nn.GroupNorm(2, 4), draw(4), True),
    "embedding": (lambda: nn.Embedding(6, 4), tokens, True),
    "embedding with padding": (lambda: nn.Embedding(6, 4, padding_idx=2), tokens, True),
    "embedding by frequency": (lambda: nn.Embedding(6, 4, scale_grad_by_freq=True), tokens, False),
    "recurrent cell": (lambda: nn.GRUCell(4, 3), draw(4), False),
}


def layer_case(name: str) -> Case:
    make, inputs, _ = LAYERS[name]
    layer = make().double().eval()
    for entry, value in layer.state_dict().items():
        if value.is_floating_point():  # a fresh normalisation is the identity, on which a wrong rule could pass
            value.uniform_(0.5, 2) if entry == "running_var" else value.normal_()
    samples = Samples((inputs(),))
    return Case(Task(layer, squares), samples, samples)


CASES: dict[str, Callable[[], Case]] = {f"layer: {name}": lambda name=name: layer_case(name) for name in LAYERS} | {
    f"model: {name}": lambda name=name: case(name) for name in NAMES
}
EVERY = pytest.mark.parametrize("name", CASES)


def ready(name: str) -> tuple[Case, LayerGradients, dict[str, Tensor], Params]:
    """The case, its layer gradients, the oracle's per-sample gradients, and random positive weights like the parameters."""
    c = CASES[name]()
    gradients = LayerGradients(c.task, c.task.params(), c.train.batch(slice(0, 4)))
    metric = {key: torch.rand_like(value) + 0.1 for key, value in c.task.params().items()}
    return c, gradients, sample_gradients(c.task, c.train), metric


@EVERY
def test_dense_gradients_are_those_of_single_backward_passes(name: str) -> None:
    c, gradients, exact, _ = ready(name)
    got = dict(gradients.dense(c.train.batch(slice(None))))
    assert set(got) == set(exact)
    for key, value in exact.items():
        assert relative(got[key], value) <= 1e-10, key


@EVERY
@pytest.mark.parametrize("chunk", [pieces.CHUNK, 1])
def test_what_follows_from_the_pieces_is_what_follows_from_single_gradients(name: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "CHUNK", chunk)
    c, gradients, exact, metric = ready(name)
    queries = dict(gradients.pieces(c.train.batch(slice(0, 3))))
    directions = {key: torch.randn(2, *value.shape[1:]).double() for key, value in exact.items()}
    for key, each in gradients.pieces(c.train.batch(slice(None))):
        g, m, weights = exact[key].flatten(1), metric[key].flatten(), torch.randn(len(exact[key])).double()
        for form in (each, pieces.compact(each)):
            assert relative(pieces.dense(form), g) <= 1e-10, key
            assert relative(pieces.products(form, directions[key]), g @ directions[key].flatten(1).T) <= 1e-10, key
            assert relative(pieces.products(form, metric[key][None]), (g @ m)[:, None]) <= 1e-10, key
            assert relative(pieces.squares(form), (g**2).sum(1)) <= 1e-10, key
            assert relative(pieces.squares(form, metric[key]), g**2 @ m) <= 1e-10, key
            assert relative(pieces.second_moment(form), (g**2).sum(0)) <= 1e-10, key
            assert relative(pieces.weighted_sum(form, weights), weights @ g) <= 1e-10, key
            assert relative(pieces.gram(form, queries[key]), g @ g[:3].T) <= 1e-10, key


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_rule_serves_the_layers_it_claims(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    c, gradients, _, _ = ready(f"layer: {name}")
    assert gradients.uncovered == ([] if LAYERS[name][2] else list(c.task.params()))


def test_a_parameter_used_behind_its_layer_is_found_out_and_the_log_names_it(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    gradients = ready("model: bare")[1]
    assert gradients.uncovered == ["scale", "inner.weight"]
    assert "no layer rule for scale, inner.weight" in caplog.text


def test_layers_whose_first_axis_is_not_the_sample_are_found_out_though_lengths_agree() -> None:
    gradients = ready("model: positions-first")[1]
    assert gradients.uncovered == ["inner.weight", "inner.bias"]


def test_a_wrong_layer_rule_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    right = module._RULES[nn.Linear]
    monkeypatch.setitem(module._RULES, nn.Linear, lambda layer, a, b: right(layer, a, -b))
    _, gradients, _, _ = ready("model: mlp")
    assert len(gradients.uncovered) == 6


@pytest.mark.parametrize("name", NAMES)
def test_diagonal_fisher_is_the_mean_of_squared_gradients(name: str) -> None:
    c = case(name)
    got = diagonal_fisher(c.task, c.task.params(), [c.train, c.valid], batch_size=5)
    exact = [sample_gradients(c.task, part) for part in (c.train, c.valid)]
    for key, value in got.items():
        assert relative(value, torch.cat([grads[key] for grads in exact]).square().mean(0)) <= 1e-10, key


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_restricted_parameters_have_the_same_gradients(name: str) -> None:
    c = case(name)
    chosen = list(c.task.params())[::2]
    task = Task(c.task.model, parameters=tuple(chosen))
    got = dict(LayerGradients(task, task.params(), c.train.batch(slice(0, 4))).dense(c.train.batch(slice(None))))
    exact = sample_gradients(c.task, c.train)
    assert set(got) == set(chosen)
    assert relative(matrix({key: got[key].detach() for key in chosen}), matrix({key: exact[key] for key in chosen})) <= 1e-10
    assert not any(value.requires_grad for value in got.values())
