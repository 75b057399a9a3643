"""Opacus: per-sample gradients by its GradSampleModule, then the product with the target's gradient."""

from __future__ import annotations

import torch
from opacus import GradSampleModule
from torch import Tensor
from torch.nn.functional import cross_entropy

from peers.workload import Run, Workload


def aggregate(work: Workload) -> Run:
    # its hooks record nothing in evaluation mode; this model has no layer that would notice the difference
    model = GradSampleModule(work.model.train(), loss_reduction="sum")

    def run() -> Tensor:
        target, parts = list(work.target_gradient().values()), []
        for x, y in work.batches(work.train):
            model.zero_grad()
            cross_entropy(model(x), y, reduction="sum").backward()
            products = [value.grad_sample.flatten(1) @ v.flatten() for value, v in zip(model.parameters(), target, strict=True)]
            parts.append(torch.stack(products).sum(0))
        model.zero_grad()
        return -torch.cat(parts)

    return run
