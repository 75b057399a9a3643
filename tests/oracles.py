"""Slow and plain computations to compare with: loops over single samples, autograd on a copy of the model, dense Hessians."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from robust_if import Samples, Task
from robust_if.data import to
from robust_if.task import Params


def flat(params: Params) -> Tensor:
    """All parameters as one vector ``(p,)``."""
    return torch.cat([value.flatten() for value in params.values()])


def unflat(vector: Tensor, like: Params) -> Params:
    """The inverse of :func:`flat`."""
    parts = vector.split([value.numel() for value in like.values()])
    return {name: part.view_as(value) for part, (name, value) in zip(parts, like.items(), strict=True)}


def sample_gradients(task: Task, samples: Samples, params: Params | None = None) -> dict[str, Tensor]:
    """Gradient of every sample's loss by name, ``(n, *shape)``: one ordinary backward pass per sample through a copy of the module."""
    model = copy.deepcopy(task.model)
    for name, value in model.named_parameters():
        value.requires_grad_()
        if params is not None and name in params:
            value.data.copy_(params[name])
    found: dict[str, list[Tensor]] = {name: [] for name in task.params()}
    for i in range(len(samples)):
        batch = to(samples.batch(slice(i, i + 1)), next(model.parameters()))
        model.zero_grad(set_to_none=True)
        task.loss(task.forward(model, batch), batch).sum().backward()
        for name, value in model.named_parameters():
            if name in found:
                found[name].append(torch.zeros_like(value) if value.grad is None else value.grad.clone())
    return {name: torch.stack(parts) for name, parts in found.items()}


def matrix(grads: dict[str, Tensor]) -> np.ndarray:
    """Per-sample gradients as a matrix ``(n, p)``."""
    return torch.cat([value.flatten(1) for value in grads.values()], 1).numpy()


def full_gradient(function: Callable[[Params], Tensor], params: Params) -> np.ndarray:
    """Gradient of a function of the parameters, evaluated at once, ``(p,)``."""
    leaves = {name: value.clone().requires_grad_() for name, value in params.items()}
    return flat(dict(zip(leaves, torch.autograd.grad(function(leaves), list(leaves.values())), strict=True))).numpy()


def hessian(function: Callable[[Params], Tensor], params: Params) -> Tensor:
    """Hessian of a function of the parameters, ``(p, p)``."""
    return torch.autograd.functional.hessian(lambda vector: function(unflat(vector, params)), flat(params))


def minimise(function: Callable[[Params], Tensor], params: Params, steps: int = 20) -> Params:
    """The minimum of a smooth convex function by Newton steps."""
    vector = flat(params)
    for _ in range(steps):
        step = torch.linalg.solve(hessian(function, unflat(vector, params)), torch.from_numpy(full_gradient(function, unflat(vector, params))))
        vector = vector - step
        if step.norm() < 1e-14:
            break
    return unflat(vector, params)
