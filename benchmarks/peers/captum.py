"""Captum: TracInCP with its summed-loss trick for per-sample gradients, its fast path."""

from __future__ import annotations

import torch
from captum.influence import TracInCP
from torch import nn

from peers.workload import Run, Workload


def _tracin(work: Workload) -> TracInCP:
    def loaded(model: nn.Module, path: str) -> float:
        return 1.0  # the model holds its only checkpoint; captum would read the file again for every batch

    return TracInCP(
        work.model, work.loader(work.train), ["trained"], loaded, loss_fn=nn.CrossEntropyLoss(reduction="sum"), sample_wise_grads_per_batch=True
    )


def aggregate(work: Workload) -> Run:
    return lambda: -_tracin(work).influence(work.loader(work.valid), aggregate=True)[0]


def pairwise(work: Workload) -> Run:
    # all 500 queries as one batch, so that the training gradients are taken once
    return lambda: -_tracin(work).influence(work.valid).T


def self_influence(work: Workload) -> Run:
    return lambda: _tracin(work).self_influence()


def arnoldi(work: Workload) -> Run:
    from captum.influence._core.arnoldi_influence_function import ArnoldiInfluenceFunction

    def loaded(model: nn.Module, path: str) -> float:
        return 1.0

    def run() -> torch.Tensor:
        first = [part[:1000] for part in work.train]
        influence = ArnoldiInfluenceFunction(
            work.model, work.loader(work.train), "trained", loaded, loss_fn=nn.CrossEntropyLoss(reduction="sum"),
            sample_wise_grads_per_batch=True, hessian_dataset=work.loader((first[0], first[1])), projection_dim=30, arnoldi_dim=40, seed=0,
        )  # fmt: skip
        return -influence.influence(work.valid).T

    return run
