"""flat_minima.py: influence at a flat minimum, with the exact Hessian, on fairness gaps, and its errors and warnings."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the name that every reader of torch code expects

from cases import case
from oracles import hessian, matrix, minimise, sample_gradients
from robust_if import SAM, FlatMinima, FriendlySAM, LowPass, Plain, Samples, Sweep, Task, Tuning, Utility
from robust_if.fairness.targets import FairnessGap
from robust_if.models import mlp
from robust_if.task import Batch, Params
from unchanged import untouched

RIDGE, EPS, N = 1e-2, 1e-3, 400


def logistic_loss(outputs: Tensor, batch: Batch) -> Tensor:
    return F.softplus(-batch[1] * outputs[:, 0])


def regression() -> tuple[Task, Samples, Samples]:
    """Ridge logistic regression of 400 points in 6 dimensions, and 200 more, the first third with flipped labels."""
    draw = np.random.default_rng(0)
    truth = draw.normal(size=6)

    def sample(n: int) -> tuple[Tensor, Tensor]:
        x = draw.normal(size=(n, 6))
        return torch.from_numpy(x), torch.from_numpy(np.where(draw.uniform(size=n) < 1 / (1 + np.exp(-x @ truth)), 1.0, -1.0))

    valid, (x, y) = Samples(sample(N)), sample(200)
    y[: len(y) // 3] *= -1
    torch.manual_seed(0)
    return Task(nn.Linear(6, 1, bias=False).double().eval(), logistic_loss), valid, Samples((x, y))


EXACT = FlatMinima(Tuning(steps=1500, lr=0.5, batch_size=N, weight_decay=RIDGE, flatness=Plain()), curvature="exact", damping=RIDGE)


def test_the_exact_score_is_the_change_of_the_risk_where_the_minimum_is_found_anew() -> None:
    task, valid, added = regression()
    whole = valid.batch(slice(None))

    def risk(params: Params) -> Tensor:
        return task.losses(params, whole).mean() + RIDGE / 2 * params["weight"].square().sum()

    minimum = minimise(risk, task.params())
    lowest = risk(minimum).item()
    raised = np.array([
        risk(minimise(lambda p, i=i: risk(p) + EPS * task.losses(p, added.batch(slice(i, i + 1)))[0], minimum, steps=3)).item() - lowest
        for i in range(len(added))
    ])  # fmt: skip
    with untouched(task.model):
        got = EXACT.score(task, added, target=Utility(valid))
    assert np.corrcoef(got.values, raised)[0, 1] >= 0.999
    assert np.median(raised / (EPS**2 / 2 * got.values)) == pytest.approx(1, abs=0.02)
    assert got.provenance["target_at_minimum"] == pytest.approx(task.losses(minimum, whole).mean().item(), rel=1e-9)
    assert got.values[: 200 // 3].mean() > 2 * got.values[200 // 3 :].mean()


@pytest.mark.parametrize("batch_size", [1, 7, 1000])
def test_batches_do_not_matter_to_the_exact_score(batch_size: int) -> None:
    task, valid, added = regression()
    estimator = FlatMinima(Tuning(steps=20, lr=0.5, batch_size=N, flatness=Plain()), curvature="exact", damping=RIDGE)
    whole, parts = (estimator.score(task, added, target=Utility(valid), sweep=sweep).values for sweep in (Sweep(), Sweep(batch_size=batch_size)))
    assert np.allclose(whole, parts, rtol=1e-10)


def test_the_exact_score_of_a_network_by_hand() -> None:
    c = case("mlp")
    target, tuning = Utility(c.valid), Tuning(steps=10, flatness=Plain())
    got = FlatMinima(tuning, curvature="exact", damping=5.0).score(c.task, c.train, target=target).values
    params = tuning.run(c.task, target)
    curvature = hessian(lambda p: target.value(c.task, p), params).numpy()
    grads = matrix(sample_gradients(c.task, c.train, params))
    assert np.allclose(got, (grads * np.linalg.solve(curvature + 5 * np.eye(len(curvature)), grads.T).T).sum(1), rtol=1e-9)


def test_too_many_parameters_for_the_exact_hessian_are_refused_before_tuning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tuning, "run", lambda *_: pytest.fail("tuned first"))
    task = Task(nn.Linear(2000, 6).eval())
    data = Samples((torch.randn(4, 2000), torch.tensor([0, 1, 2, 3])))
    with pytest.raises(ValueError, match=r"curvature: the exact Hessian is for up to 10,000 parameters, this task has 12,006; use 'diagonal'"):
        FlatMinima(curvature="exact").score(task, data, target=Utility(data))


def test_a_saddle_is_refused() -> None:
    task = Task(nn.Linear(2, 1, bias=False).double().eval(), lambda outputs, batch: -(outputs[:, 0] ** 2))
    data = Samples((torch.eye(2).double(), torch.zeros(2)))
    estimator = FlatMinima(Tuning(steps=0), curvature="exact", damping=0.5)
    with pytest.raises(ValueError, match=r"curvature: the Hessian of utility plus damping 0.5 is not positive definite; raise the damping"):
        estimator.score(task, data, target=Utility(data))
    assert np.isfinite(FlatMinima(Tuning(steps=0), curvature="exact", damping=1.5).score(task, data, target=Utility(data)).values).all()


def test_pairs_and_candidates_are_for_the_diagonal() -> None:
    c = case("logistic")
    message = "curvature: pairs and candidates are for 'diagonal', got 'exact'"
    with pytest.raises(ValueError, match=message):
        FlatMinima(curvature="exact").pairs(c.task, c.train, target=Utility(c.valid), queries=c.valid)
    with pytest.raises(ValueError, match=message):
        FlatMinima(curvature="exact").candidates(c.task, c.train, target=Utility(c.valid))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"curvature": "full"}, "curvature: expected 'diagonal' or 'exact', got 'full'"),
        ({"fisher": "valid"}, "fisher: expected 'held_out' or 'train', got 'valid'"),
        ({"damping": 0.0}, "damping: expected a positive number, got 0.0"),
        ({"damping": float("nan")}, "damping: expected a positive number, got nan"),
    ],
)
def test_wrong_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FlatMinima(**options)


def groups() -> tuple[Task, Samples, Samples]:
    draw = np.random.default_rng(1)
    torch.manual_seed(0)

    def sample(n: int) -> Samples:
        s = np.arange(n) % 2
        x = draw.normal(size=(n, 3)) + 1.5 * s[:, None]
        y = (x.sum(1) + draw.normal(size=n) > 2).astype(np.int64)
        return Samples((torch.from_numpy(x), torch.from_numpy(y), torch.from_numpy(s)))

    return Task(mlp((3,), 2, width=5).double().eval()), sample(60), sample(40)


RULES = {"plain": Plain(), "low pass": LowPass(), "sam": SAM(), "friendly sam": FriendlySAM()}


@pytest.mark.parametrize("flatness", RULES.values(), ids=RULES)
@pytest.mark.parametrize("kind", ["utility", "parity", "both"])
def test_every_rule_lowers_every_target_and_gives_scores(flatness: Any, kind: str) -> None:
    task, train, held_out = groups()
    utility, parity = Utility(held_out), FairnessGap(held_out)
    target = {"utility": utility, "parity": parity, "both": utility + 0.5 * parity}[kind]
    # SAM ascends by a fixed length, which stops it short of a minimum of 0
    tuning = Tuning(steps=80, lr=0.05, batch_size=20, flatness=flatness)
    before = target.value(task, task.params()).item()
    got = FlatMinima(tuning, damping=1e-3).score(task, train, target=target)
    assert got.provenance["target_at_minimum"] < before
    assert got.target == target.name and (got.values >= 0).all() and got.values.std() > 0


def test_weight_decay_is_a_penalty_of_half_the_squared_norm() -> None:
    task, valid, _ = regression()
    tuned = EXACT.tuning.run(task, Utility(valid))
    slope = Utility(valid).gradient(task, tuned)["weight"] + RIDGE * tuned["weight"]
    assert slope.norm() <= 1e-10


def test_a_damping_that_dominates_is_logged_and_noted(caplog: pytest.LogCaptureFixture) -> None:
    task, train, held_out = groups()
    with caplog.at_level(logging.WARNING):
        strong = FlatMinima(Tuning(steps=3), damping=1e3).score(task, train, target=Utility(held_out))
    assert any("fvm: damping (1000) exceeds the Fisher information of 100 % of the parameters" in message for message in caplog.messages)
    assert strong.provenance["damped_share"] == 1
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        weak = FlatMinima(Tuning(steps=3), damping=1e-12).score(task, train, target=Utility(held_out))
    assert not caplog.messages and weak.provenance["damped_share"] <= 0.5


def test_frozen_parameters_cause_no_warning_of_torch(recwarn: pytest.WarningsRecorder) -> None:
    c = case("mlp")
    FlatMinima(Tuning(steps=2), damping=1e-2).score(Task(c.task.model, parameters="5.*"), c.train, target=Utility(c.valid))
    assert not [each for each in recwarn if "requires_grad" in str(each.message)]
