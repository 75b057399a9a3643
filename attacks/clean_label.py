"""Targeted clean-label poison: samples of one class are changed a little, labels stay, and one test input is to be taken for that class.

Each attack is an objective over the poisoned inputs; one projected descent minimises them all. The crafting model is trained by the caller, from a
seed of its own; the seed here says which samples are poisoned, and where a restart begins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the name that every reader of torch code expects

from robust_if.attacks.crafting import Region, adam, descend, forward_backward, of_sum
from robust_if.attacks.evasion import Bounds, Limit
from robust_if.attacks.poisoned import Poisoned, number
from robust_if.data import Samples, as_samples
from robust_if.features import penultimate
from robust_if.gradients import differentiable
from robust_if.task import Params, Task
from robust_if.training import Augment


def gradient_matching(
    task: Task, data: Samples, *, target_input: Tensor, goal: int, rate: float, eps: Limit, bounds: Bounds | None = (0.0, 1.0), steps: int = 250,
    restarts: int = 8, lr: float = 1 / 3, seed: int, augment: Augment | None = None, batch_size: int = 256,
) -> Poisoned[Samples]:  # fmt: skip
    """Poison whose training gradient points where the gradient of the attacker's loss does (Witches' Brew).

    Minimises 1 − cos(∇θ ℓ(x_t, ``goal``), Σ ∇θ ℓ(x_i + δ_i, ``goal``)) over |δ| ≤ ``eps`` at the crafting model's parameters, by Adam on the sign of
    the gradient from random starts, its rate times 0.1 after 3/8, 5/8 and 7/8 of the steps. The best point that was met counts.

    Args:
        task: the crafting model, trained on ``data``; the gradients are in the parameters that it counts.
        data: ``(input, label)`` samples, the input of floating point and any shape.
        target_input: x_t, the shape of one input.
        goal: the class that x_t is to be taken for; the poison is drawn from it.
        rate: share of the data set that is poisoned, strictly between 0 and 1.
        eps: largest change of an input, one number or one per feature, in the unit of the inputs.
        bounds: smallest and largest valid input, numbers or one per feature; ``None`` for inputs without.
        steps: of each descent.
        restarts: how many descents; the one of least value counts.
        lr: Adam's rate at the start, as a share of ``eps``; a third is 0.1 in normalised units at 16/255, the original's.
        seed: draws the poisoned samples, the starts and the augmentation.
        augment: a differentiable augmentation ``(batch, generator) -> batch`` that the victim is expected to use, drawn anew in every step.
        batch_size: how many poisoned samples are differentiated at a time; without ``augment`` it does not change the result beyond rounding.

    Raises:
        ValueError: if the class is absent or smaller than the poison, a number is out of range, a shape does not fit, inputs lie outside
            ``bounds``, or the target's gradient is zero.

    Source: Geiping et al. 2021 (arXiv 2009.02276), algorithm 1.
    """
    poison = _drawn(task, data, target_input, goal, rate, eps, bounds, seed, steps=steps, restarts=restarts, lr=lr, batch_size=batch_size)
    params, generator = task.params(), torch.Generator().manual_seed(seed)

    def gradient(x: Tensor) -> Tensor:
        batch = _batch(x, goal)
        return _gradient(task, params, batch if augment is None else augment(batch, generator))

    with differentiable(task.model):
        wanted = _gradient(task, params, _batch(poison.target[None], goal))
        if not wanted.any():
            raise ValueError("target_input: the gradient of its loss is zero, so there is nothing to match; the model is certain of the goal")
        objective = of_sum(gradient, lambda total: 1 - F.cosine_similarity(wanted, total, dim=0), batch_size, generator)
        found = [
            descend(objective, poison.region.random(generator), adam(poison.region, eps, steps, lr, signed=True), steps) for _ in range(restarts)
        ]
    return poison.planted(min(found, key=lambda each: float(each[1]))[0])


def feature_collision(
    task: Task, data: Samples, *, target_input: Tensor, goal: int, rate: float, eps: Limit | None = None, bounds: Bounds | None = (0.0, 1.0),
    beta: float = 0.25, steps: int = 200, seed: int, layer: str | None = None, batch_size: int = 256,
) -> Poisoned[Samples]:  # fmt: skip
    """Poison that looks like its class and has the target's features.

    Every poisoned input b_i becomes the minimum of ‖φ(x) − φ(x_t)‖² + β (F/d)² ‖x − b_i‖², with F features and d input dimensions, by
    forward-backward splitting: a gradient step on the first term, the proximal map of the second. The step halves where the value rose and grows
    where it fell.

    Args:
        task: the crafting model; φ are the inputs of its last linear layer.
        eps: largest change of an input, or none.
        beta: weight of staying close to the original.
        layer: the name of a module whose output is φ instead.

    The other arguments and the errors are those of :func:`gradient_matching`. Expect it to work on a victim that is fine-tuned from the crafting
    model, and to fail on one trained from scratch.

    Source: Shafahi et al. 2018 (arXiv 1804.00792), equation 1 and algorithm 1; β in terms of the dimensions as in its experiments.
    """
    poison = _drawn(task, data, target_input, goal, rate, eps, bounds, seed, beta=beta, steps=steps, batch_size=batch_size)

    def features(x: Tensor) -> Tensor:
        return penultimate(task, task.params(), _batch(x, goal), layer=layer)

    with torch.no_grad():
        wanted = features(poison.target[None])
    weight = beta * (wanted.shape[1] / poison.target.numel()) ** 2

    def objective(x: Tensor) -> tuple[Tensor, Tensor]:
        """Distances and pulls, and the gradient of the distances alone."""
        distances, slopes = [], []
        for part in torch.split(x, batch_size):
            leaf = part.clone().requires_grad_()
            with torch.enable_grad():
                distance = (features(leaf) - wanted).square().sum(1)
                slopes.append(torch.autograd.grad(distance.sum(), leaf)[0])
            distances.append(distance.detach())
        return torch.cat(distances) + weight * (x - poison.region.base).flatten(1).square().sum(1), torch.cat(slopes)

    return poison.planted(descend(objective, poison.region.base, forward_backward(poison.region, weight), steps)[0])


def bullseye_polytope(
    tasks: Task | Sequence[Task], data: Samples, *, target_input: Tensor, goal: int, rate: float, eps: Limit, bounds: Bounds | None = (0.0, 1.0),
    steps: int = 800, lr: float = 0.1, seed: int, layer: str | None = None, batch_size: int = 256,
) -> Poisoned[Samples]:  # fmt: skip
    """Poison whose mean feature is the target's, in every crafting model at once.

    Minimises the mean over models m of ½ ‖φ_m(x_t) − mean_i φ_m(x_i + δ_i)‖² / ‖φ_m(x_t)‖² over |δ| ≤ ``eps``, by Adam from the clean inputs.
    The target then lies in the middle of the polytope that the poison spans, not on its edge, which carries over better to a victim that differs.

    Args:
        tasks: one or several crafting models.
        lr: Adam's rate at the start, as a share of ``eps``; it falls as in :func:`gradient_matching`.
        layer: the name of a module whose output is φ instead.

    The other arguments and the errors are those of :func:`gradient_matching`.

    Source: Aghakhani et al. 2021 (arXiv 2005.00191).
    """
    tasks = [tasks] if isinstance(tasks, Task) else list(tasks)
    if not tasks:
        raise ValueError("tasks: expected at least one crafting model, got none")
    poison = _drawn(tasks[0], data, target_input, goal, rate, eps, bounds, seed, steps=steps, lr=lr, batch_size=batch_size)

    def features(x: Tensor) -> list[Tensor]:
        return [penultimate(task, task.params(), _batch(x, goal), layer=layer) for task in tasks]

    with torch.no_grad():
        target = features(poison.target[None])
    if not all(each.any() for each in target):
        raise ValueError("target_input: all its features are zero in a crafting model, so no distance can be taken relative to them")
    wanted = torch.cat([each[0] / each.norm() for each in target])

    def total(x: Tensor) -> Tensor:
        return torch.cat([each.sum(0) / own.norm() for each, own in zip(features(x), target, strict=True)])

    def distance(summed: Tensor) -> Tensor:
        return (wanted - summed / len(poison.rows)).square().sum() / (2 * len(tasks))

    objective = of_sum(total, distance, batch_size, torch.Generator())
    return poison.planted(descend(objective, poison.region.base, adam(poison.region, eps, steps, lr, signed=False), steps)[0])


@dataclass(frozen=True, eq=False)
class _Poison:
    """The samples drawn; ``region`` and ``target`` are on the device and in the type of the crafting model, ``own`` is in those of the data."""

    data: Samples
    rows: Tensor
    own: Region
    region: Region
    target: Tensor

    def planted(self, x: Tensor) -> Poisoned[Samples]:
        """The data with the inputs ``x`` in the place of those drawn."""
        inputs, *rest = self.data.batch(slice(None))
        mask = np.zeros(len(inputs), dtype=bool)
        mask[self.rows.cpu().numpy()] = True
        # projected again, since the model may compute in another type than the data have
        return Poisoned(Samples((inputs.index_copy(0, self.rows, self.own.project(x.to(inputs))), *rest), self.data.ids), mask)


def _drawn(
    task: Task, data: Samples, target: Tensor, goal: int, rate: float, eps: Limit | None, bounds: Bounds | None, seed: int, **positive: float
) -> _Poison:
    """Check everything, and draw the samples."""
    data = as_samples(data)
    x, labels = data.batch(slice(None))[0], data.labels.cpu().numpy()
    candidates, count = np.flatnonzero(labels == goal), number(rate, len(data))
    if not len(candidates):
        raise ValueError(f"goal: the class {goal!r} is not in the data, which have {np.unique(labels).tolist()[:20]}")
    if count > len(candidates):
        raise ValueError(f"rate: {rate} of {len(data)} samples are {count}, but only {len(candidates)} are of class {goal!r}; lower the rate")
    if target.shape != x.shape[1:]:
        raise ValueError(f"target_input: expected the shape of one input, {tuple(x.shape[1:])}, got {tuple(target.shape)}")
    for name, value in positive.items():
        if not 0 < value < inf:
            raise ValueError(f"{name}: expected a positive number, got {value}")
    radius = inf if eps is None else eps
    numbers = torch.as_tensor(radius)
    if not numbers.any() or (eps is not None and not numbers.isfinite().all()):
        raise ValueError(f"eps: expected finite numbers, some of them above 0, got {eps}")
    Region.around(target[None], inf, bounds, "target_input")
    Region.around(x, radius, bounds, "data")
    rows = torch.from_numpy(np.sort(np.random.default_rng(seed).choice(candidates, count, replace=False))).to(x.device)
    like = next(task.model.parameters())
    return _Poison(data, rows, Region.around(x[rows], radius, bounds), Region.around(x[rows].to(like), radius, bounds), target.to(like))


def _batch(x: Tensor, goal: int) -> tuple[Tensor, Tensor]:
    return x, torch.full((len(x),), goal, device=x.device)


def _gradient(task: Task, params: Params, batch: tuple[Tensor, Tensor]) -> Tensor:
    """∇θ Σ ℓ over the batch as one vector; differentiable in the inputs if these require a gradient."""
    leaves = {name: value.detach().requires_grad_() for name, value in params.items()}
    with torch.enable_grad():
        total = task.losses(leaves, batch).sum()
        parts = torch.autograd.grad(total, list(leaves.values()), create_graph=batch[0].requires_grad, materialize_grads=True)
    return torch.cat([part.flatten() for part in parts])
