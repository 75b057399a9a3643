"""BackPACK: per-sample gradients by its extension BatchGrad, then the product with the target's gradient."""

from __future__ import annotations

import torch
from backpack import backpack, extend
from backpack.extensions import BatchGrad
from torch import Tensor, nn

from peers.workload import Run, Workload


def aggregate(work: Workload) -> Run:
    model, loss = extend(work.model), extend(nn.CrossEntropyLoss(reduction="sum"))

    def run() -> Tensor:
        target, parts = work.target_gradient(), []
        for x, y in work.batches(work.train):
            model.zero_grad()
            with backpack(BatchGrad()):
                loss(model(x), y).backward()
            products = [value.grad_batch.flatten(1) @ target[name].flatten() for name, value in model.named_parameters()]
            parts.append(torch.stack(products).sum(0))
            for value in model.parameters():
                del value.grad_batch
        return -torch.cat(parts)

    return run
