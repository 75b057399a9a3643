"""preconditioners/: the quadratic forms of single gradients, and RelatIF, which divides by them."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cases import NAMES, TARGETS, Case, case, relative
from oracles import flat, matrix, sample_gradients, unflat
from robust_if import InnerProduct, Store, Sweep, Task, Utility
from robust_if.layers import Live
from robust_if.pieces import Pieces, compact
from robust_if.preconditioners import (
    EKFAC,
    KFAC,
    Arnoldi,
    ConjugateGradient,
    DataInf,
    DiagonalFisher,
    Exact,
    Identity,
    LiSSA,
    Preconditioner,
    Quadratic,
    RandomProjection,
    exact,
    spectra,
)

#: Every preconditioner that measures single samples.
FORMS: dict[str, Preconditioner] = {
    "ip": Identity(),
    "diagonal-fisher": DiagonalFisher(),
    "trak": RandomProjection(size=40),
    "trak-exact": RandomProjection(size=10_000),
    "kfac": KFAC(fisher="empirical"),
    "ekfac": EKFAC(0.02, fisher="empirical"),
    "arnoldi": Arnoldi(rank=4, curvature="ggn", damping=0.1),
    "arnoldi-exact": Arnoldi(rank=10_000, curvature="ggn", damping=0.1),
    "exact": Exact(damping=0.1),
}
#: Those that cannot.
OTHERS: list[Preconditioner] = [DataInf(), ConjugateGradient(), ConjugateGradient(preconditioner=EKFAC()), LiSSA()]
EVERY_FORM = pytest.mark.parametrize("kind", FORMS)
POWERS = pytest.mark.parametrize("power", [1, 2])
#: Those whose form depends on the kinds of the layers.
LAYERWISE = pytest.mark.parametrize("kind", ["ip", "diagonal-fisher", "trak", "kfac", "ekfac"])


@cache
def built(kind: str, name: str) -> Quadratic:
    c = case(name)
    inverse = FORMS[kind].build(c.task, c.task.params(), c.train, Sweep(5))
    assert isinstance(inverse, Quadratic)
    return inverse


def dense(inverse: Quadratic, task: Task) -> np.ndarray:
    """P as a matrix, column by column."""
    units = torch.eye(flat(task.params()).numel(), dtype=torch.float64)
    return np.stack([flat(inverse(unflat(unit, task.params())).direction).numpy() for unit in units], 1)


def measured(inverse: Quadratic, c: Case, power: int, batch_size: int = 5) -> np.ndarray:
    live = Live.of(c.task, c.task.params(), c.train, batch_size)
    return torch.cat([inverse.quadratic(pieces, power) for _, pieces in live.blocks()]).numpy()


@POWERS
@EVERY_FORM
@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_a_quadratic_form_is_that_of_the_dense_matrix(name: str, kind: str, power: int) -> None:
    c = case(name)
    inverse, grads = built(kind, name), matrix(sample_gradients(c.task, c.train))
    p = dense(inverse, c.task)
    assert relative(p, p.T) <= 1e-10
    assert relative(measured(inverse, c, power), ((grads @ np.linalg.matrix_power(p, power)) * grads).sum(1)) <= 1e-10


@LAYERWISE
@pytest.mark.parametrize("name", NAMES)
def test_quadratic_forms_follow_from_the_solutions_for_single_gradients(name: str, kind: str) -> None:
    c = case(name)
    inverse, grads = built(kind, name), matrix(sample_gradients(c.task, c.train))
    solved = np.stack([flat(inverse(unflat(torch.from_numpy(row), c.task.params())).direction).numpy() for row in grads])
    assert relative(measured(inverse, c, 1), (grads * solved).sum(1)) <= 1e-10
    assert relative(measured(inverse, c, 2), (solved**2).sum(1)) <= 1e-10


@EVERY_FORM
@given(batch_size=st.integers(1, 14), name=st.sampled_from(["cnn", "bare"]), power=st.sampled_from([1, 2]))
def test_neither_batch_size_nor_the_form_of_the_gradients_matters(kind: str, batch_size: int, name: str, power: int) -> None:
    c = case(name)
    inverse = built(kind, name)
    once = measured(inverse, c, power, 13)

    def kept(pieces: Pieces) -> Pieces:
        return ((key, compact(each)) for key, each in pieces)

    blocks = Live.of(c.task, c.task.params(), c.train, batch_size).blocks()
    assert relative(torch.cat([inverse.quadratic(kept(pieces), power) for _, pieces in blocks]), once) <= 1e-10
    assert relative(measured(inverse, c, power, batch_size), once) <= 1e-10


@pytest.mark.parametrize("kind", ["kfac", "exact"])
@pytest.mark.parametrize("name", ["cnn", "positions-first"])
def test_gradients_are_formed_for_as_many_samples_as_fit(monkeypatch: pytest.MonkeyPatch, kind: str, name: str) -> None:
    c = case(name)
    inverse = built(kind, name)
    once = measured(inverse, c, 1, 13)
    monkeypatch.setattr(spectra, "CHUNK", 300)
    monkeypatch.setattr(exact, "CHUNK", 1000)
    assert relative(measured(inverse, c, 1, 13), once) <= 1e-12


@pytest.mark.parametrize("method", [*FORMS.values(), *OTHERS], ids=lambda each: each.name)
def test_a_preconditioner_says_whether_it_measures_single_samples(method: Preconditioner) -> None:
    c = case("mlp")
    assert isinstance(method.build(c.task, c.task.params(), c.train, Sweep()), Quadratic) == method.has_quadratic


@pytest.mark.parametrize("normalise", ["relatif", "theta-relatif"])
@pytest.mark.parametrize("method", OTHERS, ids=lambda each: each.name)
def test_relatif_refuses_a_preconditioner_that_cannot_before_any_work(method: Preconditioner, normalise: Any) -> None:
    with pytest.raises(
        ValueError, match=f"normalise: {normalise!r} needs gᵀ P g of every single sample, which {type(method).__name__} does not give"
    ):
        InnerProduct(method, normalise=normalise)


@POWERS
@EVERY_FORM
def test_relatif_is_its_definition_for_every_target(kind: str, power: int, tmp_path: Path) -> None:
    c = case("mlp")
    targets = {name: make(c.valid, 4) for name, make in TARGETS.items()}
    p, grads = dense(built(kind, "mlp"), c.task), matrix(sample_gradients(c.task, c.train))
    lengths = np.sqrt(((grads @ np.linalg.matrix_power(p, power)) * grads).sum(1))
    estimator = InnerProduct(FORMS[kind], normalise="relatif" if power == 1 else "theta-relatif")
    index = Store.build(c.task, c.train, tmp_path)
    for each in (estimator.score(c.task, c.train, target=targets), estimator.score(c.task, c.train, target=targets, index=index)):
        for got, target in zip(each, targets.values(), strict=True):
            slope = flat(target.gradient(c.task, c.task.params())).numpy()
            assert relative(got.values, -grads @ p @ slope / lengths) <= 1e-9
            assert got.units == "rank" and got.estimator == f"{FORMS[kind].name}-{estimator.normalise}"


@pytest.mark.parametrize("kind", ["kfac", "ekfac", "diagonal-fisher", "trak"])
@pytest.mark.parametrize("name", ["cnn", "attention"])
def test_an_index_gives_the_same_relatif(kind: str, name: str, tmp_path: Path) -> None:
    c, estimator = case(name), InnerProduct(FORMS[kind], normalise="relatif")
    live, kept = (
        estimator.score(c.task, c.train, target=Utility(c.valid), index=index).values for index in (None, Store.build(c.task, c.train, tmp_path))
    )
    assert relative(kept, live) <= 1e-9


def test_without_curvature_both_are_the_cosine_up_to_the_targets_length() -> None:
    c, target = case("mlp"), Utility(case("mlp").valid)
    length = flat(target.gradient(c.task, c.task.params())).norm().item()
    cosine, *others = (InnerProduct(normalise=each).score(c.task, c.train, target=target).values for each in ("cosine", "relatif", "theta-relatif"))
    for each in others:
        assert relative(each, cosine * length) <= 1e-12
