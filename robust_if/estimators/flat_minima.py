"""VM and FVM: influence at a (flat) minimum of the target."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from robust_if.data import as_samples, batches, to
from robust_if.estimators.base import Estimator, Job, Result
from robust_if.gradients import hessian
from robust_if.layers import LayerGradients
from robust_if.pieces import CHUNK, squares
from robust_if.preconditioners.diagonal_fisher import diagonal_fisher
from robust_if.sweep import Sweep, fingerprint
from robust_if.targets import Target
from robust_if.task import Batch, Params, Task
from robust_if.tuning import Plain, Tuning

logger = logging.getLogger(__name__)

#: Parameters up to which the Hessian is formed.
LARGEST = 10_000


@dataclass(frozen=True)
class FlatMinima(Estimator):
    """FVM_i = g_iᵀ M g_i at θ̃, a flat minimum of the target; M = diag(1 / (F + damping)), g_i = ∇ℓ_i(θ̃).

    Adding sample i to the target's data moves θ̃ by −ε H⁻¹ g_i and, since the gradient of the target vanishes there, raises the target by
    ε²/2 g_iᵀ H⁻¹ g_i: large means harmful. H is approximated by the diagonal empirical Fisher F. With :class:`~robust_if.tuning.Plain`
    tuning this is VM. The target may be any; what it tunes to is what "harmful" means.

    Args:
        tuning: how θ̃ is found from the trained parameters.
        curvature: ``"diagonal"``, M = diag(1 / (F + damping)) with the empirical Fisher F; or ``"exact"``, M = (∇²T + damping · I)⁻¹, for models of
            up to 10,000 parameters. The damping of the exact form is an L2 penalty; tune with the same ``weight_decay``.
        fisher: whose samples F averages over, the target's held-out data or the training data.
        damping: added to F. Where it exceeds F for most parameters the score is close to a plain gradient norm, and a warning says so.

    Source: Ye et al. 2025, "Towards Robust Influence Functions with Flat Validation Minima" (ICML 2025, arXiv 2505.19097); the diagonal Fisher and
    its damping are from the authors' later work (arXiv 2512.12932).
    """

    tuning: Tuning = field(default_factory=Tuning)
    curvature: Literal["diagonal", "exact"] = "diagonal"
    fisher: Literal["held_out", "train"] = "held_out"
    damping: float = 1e-8

    def __post_init__(self) -> None:
        if self.curvature not in ("diagonal", "exact"):
            raise ValueError(f"curvature: expected 'diagonal' or 'exact', got {self.curvature!r}")
        if self.fisher not in ("held_out", "train"):
            raise ValueError(f"fisher: expected 'held_out' or 'train', got {self.fisher!r}")
        if not self.damping > 0:
            raise ValueError(f"damping: expected a positive number, got {self.damping}")

    @property
    def name(self) -> str:
        return "vm" if isinstance(self.tuning.flatness, Plain) else "fvm"

    @property
    def summary(self) -> str:
        return f"curvature-weighted gradient norm at {'an ordinary' if self.name == 'vm' else 'a flat'} minimum of the target"

    def check(self, task: Task) -> None:
        size = sum(value.numel() for value in task.params().values())
        if self.curvature == "exact" and size > LARGEST:
            raise ValueError(f"curvature: the exact Hessian is for up to {LARGEST:,} parameters, this task has {size:,}; use 'diagonal'")

    def estimate(self, job: Job) -> Result:
        if self.curvature == "exact":
            return self._exact(job, job.target)
        params, metric, notes = self._tuned(job.task, job.train, job.target, job.sweep)
        gradients = LayerGradients(job.task, params, job.probe())
        values = job.map(lambda batch: torch.stack([squares(each, metric[name]) for name, each in gradients.pieces(batch)]).sum(0), kind="layerwise")
        return Result(values, notes=notes)

    def _exact(self, job: Job, target: Target) -> Result:
        params = self.tuning.run(job.task, target, job.sweep.progress)
        curvature = hessian(lambda p: target.value(job.task, p), params)
        factor, failed = torch.linalg.cholesky_ex(curvature + self.damping * torch.eye(len(curvature)).to(curvature))
        if failed:
            raise ValueError(f"curvature: the Hessian of {target.name} plus damping {self.damping} is not positive definite; raise the damping")
        gradients = LayerGradients(job.task, params, job.probe())

        def quadratic(batch: Batch) -> Tensor:
            grads = torch.cat([each.flatten(1) for _, each in gradients.dense(batch)], 1)
            return (grads * torch.cholesky_solve(grads.T, factor).T).sum(1)

        return Result(job.map(quadratic, kind="layerwise"), notes={"target_at_minimum": target.value(job.task, params).item()})

    def pairs(self, task: Task, train: Any, *, target: Target, queries: Any, sweep: Sweep = Sweep()) -> NDArray[np.float64]:  # noqa: B008 - frozen
        """(g_qᵀ M g_i)² for every training sample i and query q, shape ``(n, q)``: which samples matter for which held-out sample.

        The per-pair form of Ye et al. 2025 with the rank-one empirical Fisher of the query as its curvature. Memory q · p for the queries.
        """
        samples, asked = as_samples(train), as_samples(queries)
        params, metric, _ = self._tuned(task, samples, target, sweep)
        like = next(iter(params.values()))
        probe = next(batches(samples, 4, like))
        gradients = LayerGradients(task, params, probe)
        found: dict[str, list[Tensor]] = {name: [] for name in params}
        for batch in batches(asked, sweep.batch_size, like):
            for name, grads in gradients.dense(batch):
                found[name].append(grads.flatten(1) * metric[name].flatten())
        directions = {name: torch.cat(parts) for name, parts in found.items()}

        def products(batch: Batch) -> Tensor:
            return torch.stack([grads.flatten(1) @ directions[name].T for name, grads in gradients.dense(batch)]).sum(0) ** 2

        job = Job(task, samples, samples, (target,), sweep, f"{self.name}-pairs", repr(self))
        return job.map(products, fingerprint({}, asked), kind="layerwise")

    def candidates(self, task: Task, train: Any, *, target: Target, sweep: Sweep = Sweep()) -> NDArray[np.float64]:  # noqa: B008 - frozen
        """The score of every sample under every label, shape ``(n, K)``; the smallest in a row is the label to suggest.

        For cross-entropy, the loss that this assumes, g_c = Jᵀ(p − e_c) with J the Jacobian of the logits, so that A = J M Jᵀ (K x K) gives all K
        scores in one pass: I_c = (p − e_c)ᵀ A (p − e_c). Batches are made small enough for K gradients per sample of the largest parameter.
        """
        samples = as_samples(train)
        params, metric, _ = self._tuned(task, samples, target, sweep)
        classes = task.outputs(params, to(samples.batch(slice(0, 1)), next(iter(params.values())))).shape[1]
        fitting = max(1, CHUNK // (classes * max(value.numel() for value in params.values())))
        sweep = replace(sweep, batch_size=min(sweep.batch_size, fitting))
        job = Job(task, samples, samples, (target,), sweep, f"{self.name}-candidates", repr(self))
        return job.map(lambda batch: _label_scores(task, params, metric, batch))

    def _tuned(self, task: Task, train: Any, target: Target, sweep: Sweep) -> tuple[Params, Params, dict[str, Any]]:
        if self.curvature != "diagonal":
            raise ValueError(f"curvature: pairs and candidates are for 'diagonal', got {self.curvature!r}")
        params = self.tuning.run(task, target, sweep.progress)
        fisher = diagonal_fisher(task, params, target.held_out if self.fisher == "held_out" else [train], sweep.batch_size)
        count = sum(value.numel() for value in fisher.values())
        damped = sum(int((value < self.damping).sum()) for value in fisher.values()) / count
        if damped > 0.5:
            logger.warning(
                "%s: damping (%g) exceeds the Fisher information of %.0f %% of the parameters, so the score is close to a plain gradient norm; "
                "lower damping, or set fisher='train'", self.name, self.damping, 100 * damped,
            )  # fmt: skip
        metric = {name: 1 / (value + self.damping) for name, value in fisher.items()}
        return params, metric, {"damped_share": damped, "target_at_minimum": target.value(task, params).item()}


def _label_scores(task: Task, params: Params, metric: Params, batch: Batch) -> Tensor:
    with torch.no_grad():
        probabilities = torch.softmax(task.outputs(params, batch), 1)
    classes = probabilities.shape[1]
    residuals = probabilities[:, None, :] - torch.eye(classes).to(probabilities)  # (B, c, K): p − e_c
    logits = [LayerGradients(replace(task, loss=_Logit(k)), params, batch).dense(batch) for k in range(classes)]
    quadratic = torch.zeros(len(probabilities), classes, classes).to(probabilities)
    for rows in zip(*logits, strict=True):  # one parameter at a time
        jacobian = torch.stack([grads.flatten(1) for _, grads in rows], 1)
        quadratic += torch.einsum("bkp,blp,p->bkl", jacobian, jacobian, metric[rows[0][0]].flatten())
    return torch.einsum("bck,bkl,bcl->bc", residuals, quadratic, residuals)


@dataclass(frozen=True)
class _Logit:
    """The k-th logit as a loss."""

    k: int

    def __call__(self, outputs: Tensor, _: Batch) -> Tensor:
        return outputs[:, self.k]
