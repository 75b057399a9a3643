"""fisher.py and preconditioners/kronecker.py: sampled Gauss-Newton gradients, K-FAC and EK-FAC."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the name that every reader of torch code expects

from cases import Case, case, relative
from oracles import flat, sample_gradients, unflat
from robust_if import Samples, Sweep, Task
from robust_if import fisher as module
from robust_if.data import to
from robust_if.fisher import fisher_gradients
from robust_if.layers import Live
from robust_if.preconditioners import spectra
from robust_if.preconditioners.kronecker import EKFAC, KFAC
from robust_if.preconditioners.spectra import Block, turned_squares
from robust_if.task import Params
from unchanged import untouched

#: By case, the layers that have Kronecker structure and the parameters that have no layer rule; all other parameters are small.
LAYERS = {
    "logistic": (["1"], []),
    "mlp": (["1", "3", "5"], []),
    "cnn": (["first", "third", "out"], ["second.weight", "second.bias"]),
    "attention": (["qkv", "project", "up", "down", "out"], []),
    "tied": ([], []),
    "bare": (["out"], ["scale", "inner.weight"]),
    "regression": (["0", "2"], []),
}
EVERY = pytest.mark.parametrize("name", LAYERS)
METHODS = pytest.mark.parametrize("method", [KFAC, EKFAC])
#: The bias of ``inner`` has a rule though its weight has not: a layer of its own.
ALONE = {"bare": ["inner.bias"]}


def direction(task: Task, seed: int = 3) -> Params:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(value.shape, generator=generator).to(value) for name, value in task.params().items()}


def identity(like: Tensor) -> Tensor:
    return torch.eye(len(like), dtype=like.dtype)


def inputs_and_slopes(task: Task, samples: Samples, layer: str) -> list[tuple[Tensor, Tensor]]:
    """For every sample the layer's inputs ``(T, in)`` and the gradients at its outputs ``(T, out)``, by one backward pass each."""
    model, found = copy.deepcopy(task.model), []

    def keep(_: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        output.retain_grad()
        found.append((args[0].detach(), output))

    chosen = model.get_submodule(layer)
    chosen.register_forward_hook(keep)
    for i in range(len(samples)):
        batch = to(samples.batch(slice(i, i + 1)), next(model.parameters()))
        task.loss(task.forward(model, batch), batch).sum().backward()
    pairs = []
    for a, output in found:
        b = output.grad
        if isinstance(chosen, nn.Conv2d):
            a, b = F.unfold(a, chosen.kernel_size, chosen.dilation, chosen.padding, chosen.stride).mT, b.flatten(2).mT
        pairs.append((a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1])))
    return pairs


def joined(values: Params, names: list[str]) -> Tensor:
    """Weight and bias of every sample as one matrix, ``(n, out, in + 1)``."""
    rows = values[names[0]].shape[1]
    return torch.cat([values[name].reshape(len(values[name]), rows, -1) for name in names], 2)


def kronecker_reference(pairs: list[tuple[Tensor, Tensor]], grads: Tensor, corrected: bool) -> Tensor:
    """The layer's curvature as a dense matrix."""
    n, columns = len(pairs), grads.shape[2]
    pairs = [(torch.cat([a, torch.ones(len(a), 1).to(a)], 1)[:, :columns], b) for a, b in pairs]
    inputs = sum(torch.einsum("ti,tj->ij", a, a) for a, _ in pairs) / n
    slopes = sum(torch.einsum("ti,tj->ij", b, b) for _, b in pairs) / sum(len(b) for _, b in pairs)
    if not corrected:
        return torch.kron(slopes, inputs)
    left, right = torch.linalg.eigh(slopes)[1], torch.linalg.eigh(inputs)[1]
    basis = torch.kron(left, right)
    return basis @ torch.diag(((grads.flatten(1) @ basis) ** 2).mean(0)) @ basis.mT


def reference(name: str, c: Case, v: Params, damping: float | None, corrected: bool) -> Params:
    """(C + λI)⁻¹ v by dense matrices, block by block."""
    grads = sample_gradients(c.task, c.train)
    solved: Params = {}

    def solve(names: list[str], curvature: Tensor) -> None:
        lam = 0.1 * curvature.trace() / len(curvature) if damping is None else damping
        matrix = joined({key: value[None] for key, value in v.items()}, names)[0]
        x = torch.linalg.solve(curvature + lam * identity(curvature), matrix.flatten()).view(matrix.shape)
        bias = [x[:, -1]] if len(names) > 1 else []
        solved.update(zip(names, [x[:, : x.shape[1] - len(bias)].reshape(v[names[0]].shape), *bias], strict=True))

    for layer in LAYERS[name][0]:
        names = [key for key in (f"{layer}.weight", f"{layer}.bias") if key in grads]
        solve(names, kronecker_reference(inputs_and_slopes(c.task, c.train, layer), joined(grads, names), corrected))
    for key in ALONE.get(name, []):
        pairs = inputs_and_slopes(c.task, c.train, key.rpartition(".")[0])
        solve([key], kronecker_reference([(a[:, :0], b) for a, b in pairs], grads[key][:, :, None], corrected))
    for key in set(grads) - set(solved):
        rows = grads[key].flatten(1)
        moment = rows.mT @ rows / len(rows)
        solve([key], torch.diag(moment.diagonal()) if key in LAYERS[name][1] else moment)
    return solved


@EVERY
@METHODS
@pytest.mark.parametrize("damping", [None, 0.03])
def test_the_direction_is_that_of_dense_matrices(name: str, method: type[KFAC], damping: float | None) -> None:
    c = case(name)
    v = direction(c.task)
    with untouched(c.task.model):
        got = method(damping, "empirical").build(c.task, c.task.params(), c.train, Sweep(5))(v)
    expected = reference(name, c, v, damping, method is EKFAC)
    assert list(got.direction) == list(v)
    for key in v:
        assert relative(got.direction[key], expected[key]) <= 1e-8, key
    kinds = got.notes["blocks"]
    assert sorted(kinds.get("empirical diagonal", [])) == sorted(LAYERS[name][1])
    assert sorted(key for names in kinds.values() for key in names) == sorted(v)
    layers = {key.rpartition(".")[0] for key in set(kinds.get("kronecker", [])) - set(ALONE.get(name, []))}
    assert layers == set(LAYERS[name][0])


@METHODS
def test_restricted_parameters_have_the_same_blocks(method: type[KFAC]) -> None:
    c = case("attention")
    v = direction(c.task)
    whole = method(0.01, "empirical").build(c.task, c.task.params(), c.train, Sweep())(v).direction
    task = Task(c.task.model, parameters=("up.*", "out.*", "embed.weight"))
    part = method(0.01, "empirical").build(task, task.params(), c.train, Sweep())({name: v[name] for name in task.params()}).direction
    assert set(part) == {"up.weight", "up.bias", "out.weight", "out.bias", "embed.weight"}
    for key, value in part.items():
        assert relative(value, whole[key]) <= 1e-10, key


def test_large_parameters_without_structure_are_taken_by_their_diagonal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spectra, "LARGEST_DENSE", 20)
    monkeypatch.setattr(spectra, "LARGEST_SIDE", 16)
    c = case("attention")
    v = direction(c.task)
    got = KFAC(0.01, "empirical").build(c.task, c.task.params(), c.train, Sweep())(v)
    grads = sample_gradients(c.task, c.train)
    assert got.notes["blocks"]["diagonal"] == ["embed.weight", "qkv.weight", "qkv.bias", "up.weight", "up.bias", "down.weight"]
    assert "down.bias" in got.notes["blocks"]["kronecker"]
    for key in got.notes["blocks"]["diagonal"]:
        assert relative(got.direction[key], v[key] / ((grads[key] ** 2).mean(0) + 0.01)) <= 1e-10, key


class EverySign:
    """Stands in for random numbers: consecutive rows run through all patterns of signs."""

    def random(self, shape: tuple[int, int]) -> np.ndarray:
        rows, columns = shape
        first = getattr(self, "at", 0)
        self.at = first + rows
        return (np.arange(first, self.at)[:, None] >> np.arange(columns)) & 1


def repeated(c: Case, index: np.ndarray) -> Samples:
    """The samples at ``index``, which may name one several times."""
    tensors = [leaf[index] for leaf in c.train.tensors] if isinstance(c.train.tensors, tuple) else None
    if tensors is not None:
        return Samples(tuple(tensors))
    items = [c.train.tensors[int(i)] for i in index]
    rows = type(c.train.tensors)
    return Samples(rows(torch.stack([item["features"] for item in items]), torch.stack([item["goal"] for item in items])))


def gauss_newton(c: Case, names: list[str]) -> Tensor:
    """(1/n) Σ Jᵀ H J over the parameters ``names``, dense."""
    params = {name: c.task.params()[name] for name in names}
    total = torch.zeros(())
    for i in range(len(c.train)):
        batch = to(c.train.batch(slice(i, i + 1)), flat(params))

        def outputs(vector: Tensor, batch: Any = batch) -> Tensor:
            return c.task.outputs(c.task.params() | unflat(vector, params), batch)[0]

        jacobian = torch.autograd.functional.jacobian(outputs, flat(params))
        curvature = torch.autograd.functional.hessian(lambda out, batch=batch: c.task.loss(out[None], batch)[0], outputs(flat(params)))
        total = total + jacobian.mT @ curvature @ jacobian
    return total / len(c.train)


def sampled(c: Case, samples: Samples, seed: int = 0, size: int = 64) -> tuple[list[str], Tensor]:
    """The sampled gradients of all parameters with a layer rule: names, and ``(n, p)``."""
    live = Live(fisher_gradients(Live.of(c.task, c.task.params(), samples, 4).gradients, "sampled", seed), samples, size)
    rows = [torch.cat([dense for _, dense in ((n, sum(p.dense() for p in each)) for n, each in pieces)], 1) for _, pieces in live.blocks()]
    return list(live.gradients.params), torch.cat(rows)


def mean_of_losses(outputs: Tensor, batch: Any) -> Tensor:
    """A convex loss that has no closed form of its own here: cross-entropy and a square."""
    return F.cross_entropy(outputs, batch[1], reduction="none") + 0.3 * (outputs**2).sum(1)


@EVERY
@pytest.mark.parametrize("own_loss", [False, True])
def test_over_all_signs_the_sampled_gradients_have_the_gauss_newton_matrix(name: str, own_loss: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    c = case(name, train=3)
    if own_loss and name != "regression":
        c = Case(Task(c.task.model, mean_of_losses), c.train, c.valid)
    patterns = 2 if name == "regression" else 8
    samples = repeated(c, np.repeat(np.arange(3), patterns))
    monkeypatch.setattr(module.np.random, "default_rng", lambda _: EverySign())
    names, grads = sampled(c, samples, size=5)
    assert set(names) == set(c.task.params()) - set(LAYERS[name][1])
    assert relative(grads.mT @ grads / len(grads), gauss_newton(c, names)) <= 1e-9


def test_sampled_gradients_converge_to_the_gauss_newton_matrix() -> None:
    c = case("mlp", train=4)
    names, grads = sampled(c, repeated(c, np.repeat(np.arange(4), 4000)), size=2000)
    assert relative(grads.mT @ grads / len(grads), gauss_newton(c, names)) <= 0.03
    few = grads[::400]
    assert relative(few.mT @ few / len(few), gauss_newton(c, names)) > 0.03  # so that the bound says something


@given(st.integers(1, 14), st.sampled_from([KFAC, EKFAC]), st.sampled_from(list(LAYERS)))
def test_the_batch_size_does_not_matter(size: int, method: type[KFAC], name: str) -> None:
    c = case(name)
    v = direction(c.task)
    once, parts = (method(seed=4).build(c.task, c.task.params(), c.train, Sweep(each))(v).direction for each in (64, size))
    for key in v:
        assert relative(parts[key], once[key]) <= 1e-8, key


@METHODS
def test_a_layer_whose_fisher_matrix_factorises_is_exact(method: type[KFAC], monkeypatch: pytest.MonkeyPatch) -> None:
    """With weights of 0 all outputs are alike, so that the curvature of the loss is independent of the input."""
    c = case("logistic", train=6)
    for value in c.task.model.parameters():
        value.data.zero_()
    samples = repeated(c, np.repeat(np.arange(6), 8))
    monkeypatch.setattr(module.np.random, "default_rng", lambda _: EverySign())
    v = direction(c.task)
    got = method(0.02, samples=None).build(c.task, c.task.params(), samples, Sweep(5))(v).direction
    curvature = gauss_newton(c, list(v))
    assert relative(flat(got), torch.linalg.solve(curvature + 0.02 * identity(curvature), flat(v))) <= 1e-9


@pytest.mark.parametrize("name", ["logistic", "mlp", "attention"])
def test_corrected_eigenvalues_bring_every_layer_closer_to_its_fisher_matrix(name: str) -> None:
    c = case(name)
    grads, params = sample_gradients(c.task, c.train), c.task.params()
    for layer in LAYERS[name][0]:
        task = Task(c.task.model, parameters=f"{layer}.*")
        names = list(task.params())
        rows = torch.cat([grads[key].flatten(1) for key in names], 1)
        exact = rows.mT @ rows / len(rows)
        unit = identity(exact)
        errors = []
        for method in (KFAC, EKFAC):
            inverse = method(1.0, "empirical").build(task, task.params(), c.train, Sweep())
            like = {key: params[key] for key in names}
            applied = torch.stack([flat(inverse(unflat(row, like)).direction) for row in unit])
            errors.append(relative(torch.linalg.inv(applied) - unit, exact))
        assert errors[1] <= errors[0] + 1e-9, layer
        assert errors[1] < 1


def test_eigenvalues_are_the_same_whichever_product_comes_first() -> None:
    from robust_if.pieces import Outer

    generator = torch.Generator().manual_seed(0)
    for positions, rows, columns in ((2, 5, 4), (9, 2, 3), (1, 3, 4)):
        a, b = (torch.randn(6, positions, k, generator=generator, dtype=torch.float64) for k in (columns, rows))
        left, right = (torch.linalg.qr(torch.randn(k, k, generator=generator, dtype=torch.float64))[0] for k in (rows, columns + 1))
        grads = torch.einsum("nto,nti->noi", b, torch.cat([a, torch.ones_like(a[:, :, :1])], 2))
        block = Block(("weight", "bias"), "kronecker", (rows, columns + 1))
        assert relative(turned_squares(block, [Outer(a, b)], (left, right)), ((left.mT @ grads @ right) ** 2).sum(0)) <= 1e-12


def test_few_samples_are_a_draw_without_replacement() -> None:
    c = case("mlp")
    v, params = direction(c.task), c.task.params()
    some = KFAC(0.01, "empirical", samples=5, seed=2).build(c.task, params, c.train, Sweep())(v)
    rows = np.sort(np.random.default_rng(2).permutation(len(c.train))[:5])
    expected = KFAC(0.01, "empirical").build(c.task, params, c.train.take(rows), Sweep())(v)
    assert some.notes["samples"] == expected.notes["samples"] == 5
    assert relative(flat(some.direction), flat(expected.direction)) <= 1e-12


def test_eigenvalues_come_from_other_samples_than_the_eigenvectors() -> None:
    c = case("logistic")
    v, params = direction(c.task), c.task.params()
    got = EKFAC(0.01, "empirical", samples=6, seed=2).build(c.task, params, c.train, Sweep())(v).direction
    rows = np.random.default_rng(2).permutation(len(c.train))
    first, last = c.train.take(np.sort(rows[:6])), c.train.take(np.sort(rows[-6:]))
    grads = joined(sample_gradients(c.task, last), list(v))
    curvature = kronecker_reference(inputs_and_slopes(c.task, first, "1"), grads, corrected=True)
    solved = torch.linalg.solve(curvature + 0.01 * identity(curvature), joined({key: value[None] for key, value in v.items()}, list(v)).flatten())
    assert relative(joined({key: value[None] for key, value in got.items()}, list(v)).flatten(), solved) <= 1e-8


def test_parameters_that_are_not_the_models_own_are_those_at_which_curvature_is_taken() -> None:
    for name in ("mlp", "bare"):
        c = case(name)
        moved = {key: value + 0.3 for key, value in c.task.params().items()}
        v = direction(c.task)
        got = EKFAC(0.01).build(c.task, moved, c.train, Sweep())(v).direction
        other = c.task.at(moved)
        expected = EKFAC(0.01).build(other, other.params(), c.train, Sweep())(v).direction
        assert relative(flat(got), flat(expected)) <= 1e-10


@METHODS
def test_a_layer_that_no_sample_reaches_gets_no_direction(method: type[KFAC]) -> None:
    c = case("mlp")
    c.task.model[3].bias.data.fill_(-1e6)  # no unit of the second hidden layer is ever active
    got = method().build(c.task, c.task.params(), c.train, Sweep())(direction(c.task)).direction
    assert all(torch.isfinite(value).all() for value in got.values())
    assert not got["1.weight"].any() and got["5.bias"].any()


@METHODS
def test_single_precision_is_close_to_double(method: type[KFAC]) -> None:
    double, single = case("mlp"), case("mlp", torch.float32)
    v = direction(double.task)
    expected = method().build(double.task, double.task.params(), double.train, Sweep())(v).direction
    got = method().build(single.task, single.task.params(), single.train, Sweep())({key: value.float() for key, value in v.items()}).direction
    assert all(value.dtype == torch.float32 for value in got.values())
    assert relative(flat(got), flat(expected)) <= 1e-4


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: KFAC(damping=0.0), "damping: expected a positive number"),
        (lambda: EKFAC(damping=float("nan")), "damping: expected a positive number"),
        (lambda: KFAC(fisher="true"), "fisher: expected 'sampled' or 'empirical', got 'true'"),
        (lambda: EKFAC(samples=0), "samples: expected at least 1"),
    ],
)
def test_bad_settings_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_model_whose_outputs_cannot_be_sampled_is_sent_to_the_empirical_fisher(monkeypatch: pytest.MonkeyPatch) -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(5, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.layer(x), x

    c = case("logistic")
    task = Task(Pair().double().eval(), lambda outputs, batch: F.cross_entropy(outputs[0], batch[1], reduction="none"))
    with pytest.raises(ValueError, match="outputs are one tensor, got tuple; use fisher='empirical'"):
        KFAC().build(task, task.params(), c.train, Sweep())
    assert KFAC(fisher="empirical").build(task, task.params(), c.train, Sweep())(direction(task)).notes["blocks"]
    monkeypatch.setattr(module, "MOST_OUTPUTS", 2)
    general = Task(c.task.model, mean_of_losses)
    with pytest.raises(ValueError, match="3 outputs, at most 2 are allowed"):
        KFAC().build(general, general.params(), c.train, Sweep())


def test_a_decomposition_that_fails_in_single_precision_is_done_in_double(monkeypatch: pytest.MonkeyPatch) -> None:
    """LAPACK's divide and conquer returned NaN, without an error, for a finite 785 x 785 matrix of float32."""
    exact = torch.linalg.eigh

    def failing(matrix: Tensor, **options: str) -> tuple[Tensor, Tensor]:
        values, vectors = exact(matrix, **options)
        return (values, vectors) if matrix.dtype == torch.float64 else (values * torch.nan, vectors * torch.nan)

    monkeypatch.setattr(torch.linalg, "eigh", failing)
    root = torch.randn(5, 5, generator=torch.Generator().manual_seed(0))
    matrix = root @ root.mT
    values, vectors = spectra._eigen(matrix.triu())
    assert values.dtype == vectors.dtype == torch.float32
    assert torch.allclose(vectors @ values.diag() @ vectors.mT, matrix, atol=1e-4)
