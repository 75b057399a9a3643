"""preconditioners/: exact, conjugate gradients, LiSSA and Arnoldi against dense algebra, and what their influence functions predict."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.sparse.linalg import ArpackNoConvergence
from scipy.stats import spearmanr
from torch import Tensor, nn

from cases import NAMES, Case, blobs, case, relative
from oracles import flat, matrix, minimise, sample_gradients, unflat
from robust_if import InnerProduct, Samples, Sweep, Task, Utility
from robust_if.curvature import Curvature, Kind
from robust_if.models import logistic_regression
from robust_if.preconditioners import Preconditioner
from robust_if.preconditioners.arnoldi import Arnoldi
from robust_if.preconditioners.conjugate_gradient import ConjugateGradient
from robust_if.preconditioners.exact import Exact
from robust_if.preconditioners.lissa import LiSSA, largest_eigenvalue
from robust_if.task import Params
from unchanged import untouched

DAMPING = 0.2
KINDS: tuple[Kind, ...] = ("ggn", "fisher", "hessian")

#: Every solver, run until it has the solution, and how near it then is.
SOLVERS: dict[str, tuple[Preconditioner, float]] = {
    "exact": (Exact(damping=DAMPING), 1e-10),
    "cg": (ConjugateGradient(damping=DAMPING, iterations=300, tolerance=1e-9), 1e-6),
    "lissa": (LiSSA(damping=DAMPING, iterations=400, tolerance=1e-3), 1e-3),
    "arnoldi": (Arnoldi(rank=1000, curvature="ggn", damping=DAMPING), 1e-10),
}
EVERY_SOLVER = pytest.mark.parametrize("solver", SOLVERS)
#: The same with few steps, where only the path counts and not the end.
QUICK: dict[str, Preconditioner] = {
    "exact": Exact(damping=DAMPING),
    "cg": ConjugateGradient(damping=DAMPING, iterations=3, samples=8),
    "lissa": LiSSA(damping=DAMPING, iterations=5, batch_size=4, repeats=2, samples=8),
    "arnoldi": Arnoldi(rank=2, curvature="ggn", damping=DAMPING, samples=8),
}
EVERY_QUICK = pytest.mark.parametrize("solver", QUICK)


def solve(solver: Preconditioner, c: Case, v: np.ndarray, sweep: Sweep = Sweep()) -> tuple[np.ndarray, Any]:  # noqa: B008
    params = c.task.params()
    solution = solver.build(c.task, params, c.train, sweep)(unflat(torch.from_numpy(v), params))
    return flat(solution.direction).numpy(), solution.notes


def damped(c: Case, kind: Kind = "ggn", damping: float = DAMPING) -> np.ndarray:
    """C + λI; that the dense curvature is right is shown in test_curvature.py."""
    dense = Curvature(c.task, c.task.params(), c.train, kind).dense().numpy()
    return dense + damping * np.eye(len(dense))


def random(c: Case, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=flat(c.task.params()).numel())


# Against dense algebra


@EVERY_SOLVER
@pytest.mark.parametrize("name", ["logistic", "mlp", "tied", "regression"])
def test_a_solver_run_to_the_end_is_the_dense_solution(name: str, solver: str) -> None:
    c = case(name)
    v, (method, near) = random(c), SOLVERS[solver]
    got, notes = solve(method, c, v)
    assert relative(got, np.linalg.solve(damped(c), v)) <= near
    assert notes["converged"] and notes["damping"] == DAMPING and notes["residual"] <= near and isinstance(notes["iterations"], int)


@pytest.mark.parametrize("name", NAMES)
def test_conjugate_gradients_solve_every_model(name: str) -> None:
    c = case(name, train=6)
    v = random(c)
    got, notes = solve(ConjugateGradient(damping=0.5, iterations=300, tolerance=1e-8), c, v, Sweep(batch_size=4))
    curvature = Curvature(c.task, c.task.params(), c.train)
    assert relative(curvature.flat(got) + 0.5 * got, v) <= 1e-8 and notes["converged"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_solver_takes_every_curvature(kind: Kind) -> None:
    c = case("mlp")
    v, exact = random(c), damped(c, kind, 1.0)
    for method in (
        Exact(kind, 1.0),
        ConjugateGradient(kind, 1.0, iterations=200, tolerance=1e-9),
        LiSSA(kind, 1.0, iterations=80),
        Arnoldi(1000, kind, 1.0),
    ):
        assert relative(solve(method, c, v)[0], np.linalg.solve(exact, v)) <= 1e-6


@EVERY_QUICK
def test_patterns_restrict_the_solution(solver: str) -> None:
    c = case("mlp")
    last = replace(c, task=Task(c.task.model, parameters="5.*"))
    method, near = SOLVERS[solver]
    got, _ = solve(method, last, random(last))
    assert relative(got, np.linalg.solve(damped(last), random(last))) <= near


@EVERY_QUICK
@given(batch_size=st.integers(1, 15))
def test_the_batch_size_of_the_sweep_does_not_matter(solver: str, batch_size: int) -> None:
    c = case("cnn" if solver != "exact" else "logistic")
    whole, parts = (solve(QUICK[solver], c, random(c), sweep)[0] for sweep in (Sweep(), Sweep(batch_size=batch_size)))
    assert relative(parts, whole) <= 1e-8


@EVERY_QUICK
def test_solving_repeats_and_leaves_model_and_random_state_as_they_were(solver: str) -> None:
    c = case("attention")
    with untouched(c.task.model):
        first = solve(QUICK[solver], c, random(c))
    assert np.array_equal(first[0], solve(QUICK[solver], c, random(c))[0])


@EVERY_QUICK
def test_the_inverse_of_nothing_is_nothing(solver: str) -> None:
    c = case("logistic")
    got, notes = solve(QUICK[solver], c, 0 * random(c))
    assert not got.any() and notes["residual"] == 0 and notes["converged"]


@EVERY_QUICK
def test_single_precision_is_close_to_double(solver: str) -> None:
    params = case("mlp", torch.float32).task.params()
    v = random(case("mlp"))
    single = QUICK[solver].build(case("mlp", torch.float32).task, params, case("mlp").train, Sweep())(unflat(torch.from_numpy(v).float(), params))
    assert all(value.dtype == torch.float32 for value in single.direction.values())
    assert relative(flat(single.direction), solve(QUICK[solver], case("mlp"), v)[0]) <= 1e-3


@EVERY_SOLVER
def test_the_automatic_damping_is_a_tenth_of_the_mean_eigenvalue(solver: str) -> None:
    c = case("mlp")
    notes = solve(replace(QUICK[solver], damping=None, **({} if solver == "exact" else {"samples": None})), c, random(c))[1]  # type: ignore[call-arg]
    mean = np.trace(damped(c, damping=0.0)) / len(random(c))
    assert notes["damping"] == pytest.approx(0.1 * mean, rel=1e-10 if solver == "exact" else 0.5)


# What is reported


def test_conjugate_gradients_cut_short_say_so() -> None:
    c = case("mlp")
    v = random(c)
    got, notes = solve(ConjugateGradient(damping=1e-3, iterations=3, tolerance=1e-6), c, v)
    assert notes["iterations"] == 3 and not notes["converged"]
    assert notes["residual"] == pytest.approx(np.linalg.norm(damped(c, damping=1e-3) @ got - v) / np.linalg.norm(v), rel=1e-9)


def test_conjugate_gradients_stop_at_negative_curvature() -> None:
    c = case("mlp")
    exact, v = damped(c, "hessian", 0.0), random(c)
    values, vectors = np.linalg.eigh(exact)
    assert values[0] < -1e-3
    got, notes = solve(ConjugateGradient("hessian", 1e-4, iterations=300), c, v)
    assert notes["negative_curvature"] and not notes["converged"] and notes["residual"] > 1e-2
    assert v @ got > 0
    at_once, notes = solve(ConjugateGradient("hessian", 1e-4), c, vectors[:, 0])
    assert notes["iterations"] == 0 and not notes["converged"] and np.array_equal(at_once, vectors[:, 0])


def test_a_preconditioner_saves_iterations_and_does_not_change_the_solution() -> None:
    c = case("mlp", train=60)
    plain = ConjugateGradient(damping=1e-3, iterations=500, tolerance=1e-9)
    near, exact = (replace(plain, preconditioner=Exact(damping=damping)) for damping in (2e-3, 1e-3))
    expected = np.linalg.solve(damped(c, damping=1e-3), random(c))
    counts = []
    for method in (exact, near, plain):
        got, notes = solve(method, c, random(c))
        assert relative(got, expected) <= 1e-6 and notes["converged"]
        counts.append(notes["iterations"])
    assert counts[0] <= 2 < counts[1] < counts[2] / 2
    assert (plain.name, near.name, near.reads_factors) == ("cg", "exact-ggn-cg", False)


def test_lissa_has_the_damping_with_its_sign_and_averages_batches() -> None:
    c = case("mlp")
    v = random(c)
    expected = np.linalg.solve(damped(c, damping=0.5), v)
    got, notes = solve(LiSSA(damping=0.5, iterations=60), c, v)
    assert relative(got, expected) <= 1e-5 and notes["scale"] > 1
    noisy = LiSSA(damping=0.5, iterations=40, batch_size=4)
    singles = [relative(solve(replace(noisy, seed=seed), c, v)[0], expected) for seed in range(6)]
    averaged = solve(replace(noisy, repeats=12), c, v)
    assert relative(averaged[0], expected) < np.mean(singles) < 0.02 and averaged[1]["iterations"] == 480


def test_lissa_cut_short_or_diverging_says_so() -> None:
    c = case("mlp")
    assert not solve(LiSSA(damping=1e-3, iterations=5), c, random(c))[1]["converged"]
    with pytest.raises(ValueError, match="scale: the series of LiSSA diverged at 0.01; pass a larger scale, larger batches or a larger damping"):
        solve(LiSSA(damping=1e-3, scale=0.01, iterations=1000), c, random(c))


def test_the_largest_eigenvalue_is_near_from_below() -> None:
    c = case("cnn")
    curvature = Curvature(c.task, c.task.params(), c.train)
    largest = np.linalg.eigvalsh(curvature.dense().numpy())[-1]
    assert 0.8 * largest <= largest_eigenvalue(curvature) <= largest * (1 + 1e-12)


@pytest.mark.parametrize("kind", ["ggn", "hessian"])
def test_arnoldi_is_the_inverse_on_the_leading_eigenvectors(kind: Kind) -> None:
    c = case("cnn")
    v = random(c)
    values, vectors = np.linalg.eigh(damped(c, kind, 0.0))
    got, notes = solve(Arnoldi(5, kind, DAMPING), c, v)
    inside = vectors[:, -5:].T @ v
    assert relative(got, vectors[:, -5:] @ (inside / (values[-5:] + DAMPING))) <= 1e-6
    assert notes["rank"] == 5 and notes["converged"] and notes["captured"] == pytest.approx(inside @ inside / (v @ v))
    assert notes["residual"] == pytest.approx(math.sqrt(1 - notes["captured"])) and notes["iterations"] > 5


def test_arnoldi_without_all_eigenpairs_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    c = case("cnn", train=40)
    v, values = random(c), np.linalg.eigh(damped(c, "hessian", 0.0))
    got, notes = solve(Arnoldi(30, damping=1.0, restarts=1), c, v)
    assert 0 < notes["rank"] < 30 and not notes["converged"]
    found = values[1][:, -notes["rank"] :]
    assert relative(got, found @ (found.T @ v / (values[0][-notes["rank"] :] + 1))) <= 1e-5
    monkeypatch.setattr("robust_if.preconditioners.arnoldi.eigsh", _nothing)
    with pytest.raises(ValueError, match=r"restarts: no eigenpair was found in 7 restarts; raise restarts, or lower rank \(2\)"):
        solve(Arnoldi(2, damping=1.0, restarts=7), c, v)


def _nothing(matrix: Any, **_: Any) -> None:
    raise ArpackNoConvergence("no", np.zeros(0), np.zeros((len(matrix @ np.ones(matrix.shape[1])), 0)))


def test_what_did_not_converge_is_in_the_scores_and_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    c = case("mlp")
    got = InnerProduct(preconditioner=ConjugateGradient(damping=1e-4, iterations=2)).score(c.task, c.train, target=Utility(c.valid))
    assert got.provenance["converged"] is False and got.provenance["residual"] > 0.01 and got.provenance["damping"] == 1e-4
    assert (got.name, got.units) == ("cg:utility", "target")
    assert "the solver did not converge for utility" in caplog.text


# What it means


class Direction(Utility):
    """A target with a given gradient."""

    direction: Params

    def gradient(self, task: Task, params: Params) -> Params:
        return self.direction


@pytest.mark.parametrize(("name", "parameters"), [("logistic", "*"), ("mlp", "*"), ("tied", "*"), ("mlp", "5.*")])
def test_influence_along_h_times_a_vector_is_the_inner_product_with_it(name: str, parameters: str) -> None:
    c = case(name)
    c = replace(c, task=Task(c.task.model, parameters=parameters))
    target, v = Direction(c.valid), random(c)
    for solver, (method, near) in SOLVERS.items():
        object.__setattr__(target, "direction", unflat(torch.from_numpy(v), c.task.params()))
        plain = InnerProduct().score(c.task, c.train, target=target).values
        object.__setattr__(target, "direction", unflat(torch.from_numpy(damped(c) @ v), c.task.params()))
        got = InnerProduct(preconditioner=method).score(c.task, c.train, target=target).values
        assert relative(got, plain) <= (1e-12 if solver == "exact" else 10 * near)


PENALTY = 0.01


def zero() -> Task:
    """Binary logistic regression in the plane with parameters 0, from where Newton's method converges."""
    task = Task(logistic_regression((2,), 2).double().eval())
    return task.at({name: torch.zeros_like(value) for name, value in task.params().items()})


def regularised(data: Samples, start: Task, kept: np.ndarray | None = None) -> Task:
    """Logistic regression at the minimum of (1/n) Σ kept losses + λ/2 ‖θ‖², with the n of all data."""
    weights = torch.ones(len(data)).double() if kept is None else torch.from_numpy(kept.astype(float))
    whole = data.batch(slice(None))

    def risk(params: Params) -> Tensor:
        penalty = sum((value**2).sum() for value in params.values())
        return (start.losses(params, whole) * weights).mean() + PENALTY / 2 * penalty

    return start.at(minimise(risk, start.params(), steps=20 if kept is None else 3))


def test_the_exact_influence_is_the_effect_of_leaving_one_out() -> None:
    train, _ = blobs(80, 0, flipped=6)
    valid, _ = blobs(200, 1, distance=4)
    target = Utility(valid)
    task = regularised(train, zero())

    def value(trained: Task) -> float:
        return target.value(trained, trained.params()).item()

    lowered = np.array([value(task) - value(regularised(train, task, np.arange(80) != i)) for i in range(80)])
    got = InnerProduct(preconditioner=Exact("hessian", PENALTY)).score(task, train, target=target)
    assert got.units == "target" and got.name == "exact-hessian:utility"
    assert np.corrcoef(got.values, lowered)[0, 1] >= 0.999
    assert got.values @ lowered / (got.values @ got.values) == pytest.approx(1, abs=0.05)
    iterative = InnerProduct(preconditioner=ConjugateGradient("ggn", PENALTY, tolerance=1e-6)).score(task, train, target=target)
    assert relative(iterative.values, got.values) <= 1e-5


@pytest.mark.parametrize("seed", [0, 2, 4])
def test_on_a_linear_toy_the_inner_product_orders_like_the_influence_function(seed: int) -> None:
    """As Yang et al. 2026 report for 150 points and the utility (arXiv 2405.17490); with classes further apart the two part."""
    train, _ = blobs(150, seed, distance=1)
    valid, _ = blobs(100, seed + 1, distance=1)
    task = regularised(train, zero())
    plain, influence = (
        InnerProduct(preconditioner=each).score(task, train, target=Utility(valid)).values
        for each in (InnerProduct().preconditioner, Exact("hessian", PENALTY))
    )
    assert spearmanr(plain, influence).statistic > 0.99


# Bad input


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Exact("kfac"), "curvature: expected 'ggn', 'hessian' or 'fisher', got 'kfac'"),  # type: ignore[arg-type]
        (lambda: Exact(damping=-1), "damping: expected a number of at least 0, or None for a tenth of the mean eigenvalue, got -1"),
        (lambda: ConjugateGradient(damping=math.nan), "damping: expected a number of at least 0"),
        (lambda: ConjugateGradient(iterations=0), "iterations: expected at least 1, got 0"),
        (lambda: ConjugateGradient(tolerance=0), "tolerance: expected a number between 0 and 1, got 0"),
        (lambda: ConjugateGradient(samples=0), "samples: expected at least 1, or None for all, got 0"),
        (lambda: LiSSA(repeats=0), "repeats: expected at least 1, got 0"),
        (lambda: LiSSA(scale=0), "scale: expected a positive number, got 0"),
        (lambda: LiSSA(tolerance=1), "tolerance: expected a number between 0 and 1, got 1"),
        (lambda: Arnoldi(rank=0), "rank: expected at least 1, got 0"),
    ],
)
def test_a_setting_out_of_range_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_matrix_that_is_not_positive_definite_is_refused_and_the_damping_that_suffices_named() -> None:
    c = case("mlp")
    lowest = np.linalg.eigvalsh(damped(c, "hessian", 0.0))[0]
    for method in (Exact("hessian", 1e-4), Arnoldi(1000, "hessian", 1e-4)):
        with pytest.raises(ValueError, match=f"raise damping above {-lowest:.3g}"):
            solve(method, c, random(c))
    assert solve(Exact("hessian", -1.01 * lowest), c, random(c))[1]["converged"]


def test_a_model_that_is_too_large_is_refused() -> None:
    task = Task(nn.Linear(100, 100).eval())
    train = Samples((torch.zeros(2, 100), torch.zeros(2).long()))
    with pytest.raises(ValueError, match="task: the exact inverse is for up to 10,000 parameters, this task has 10,100; use 'cg' or 'ekfac'"):
        Exact().build(task, task.params(), train, Sweep())


def test_scores_follow_their_formula() -> None:
    c = case("mlp")
    slope = flat(Utility(c.valid).gradient(c.task, c.task.params())).numpy()
    expected = -matrix(sample_gradients(c.task, c.train)) @ np.linalg.solve(damped(c), slope) / len(c.train)
    got = InnerProduct(preconditioner=Exact(damping=DAMPING)).score(c.task, c.train, target=Utility(c.valid))
    assert relative(got.values, expected) <= 1e-10
