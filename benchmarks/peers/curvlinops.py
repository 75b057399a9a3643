"""Curvlinops: inverse curvature times the target's gradient; it gives no scores, so forward mode of plain torch turns the vector into them."""

from __future__ import annotations

from collections.abc import Callable

from curvlinops import CGInverseLinearOperator, EKFACLinearOperator, GGNLinearOperator, KFACInverseLinearOperator, KFACLinearOperator
from curvlinops.examples import IdentityLinearOperator
from torch import Tensor, nn

from peers.workload import Run, Workload

Inverse = Callable[[list[Tensor]], list[Tensor]]


def _run(work: Workload, inverse: Callable[[], Inverse]) -> Run:
    def run() -> Tensor:
        target = work.target_gradient()
        direction = inverse()(list(target.values()))
        return -work.directional({name: value.detach() for name, value in zip(target, direction, strict=True)})

    return run


def _kfac(work: Workload, operator: type[KFACLinearOperator], **damping: object) -> Run:
    def inverse() -> Inverse:
        curvature = operator(
            work.model, nn.CrossEntropyLoss(), list(work.model.parameters()), list(work.batches(work.train)), check_deterministic=False,
            num_data=len(work.train[1]),
        )  # fmt: skip
        return KFACInverseLinearOperator(curvature, damping=1e-3, **damping).__matmul__

    return _run(work, inverse)


def kfac(work: Workload) -> Run:
    return _kfac(work, KFACLinearOperator, use_heuristic_damping=True)


def ekfac(work: Workload) -> Run:
    return _kfac(work, EKFACLinearOperator, use_exact_damping=True)


def cg(work: Workload) -> Run:
    def inverse() -> Inverse:
        params = list(work.model.parameters())
        curvature = GGNLinearOperator(
            work.model, nn.CrossEntropyLoss(), params, list(work.batches(work.train)), check_deterministic=False, num_data=len(work.train[1])
        )
        damped = curvature + 0.01 * IdentityLinearOperator([value.shape for value in params], params[0].device, params[0].dtype)
        return CGInverseLinearOperator(damped, max_iter=10, max_tridiag_iter=10, tolerance=0.0).__matmul__

    return _run(work, inverse)
