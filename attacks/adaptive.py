"""Attackers who know how they will be looked for, and spend strength, samples or access to hide.

Every function is built on a :class:`~robust_if.attacks.backdoors.Backdoor`. Two attacks of this kind are only settings and have no function here:
covers, which turn the gradients of the poison, are a backdoor's ``covers`` and ``cover_classes``; poison that shows a part of the trigger is
:func:`~robust_if.attacks.backdoors.adaptive_blend`. What hiding costs is attack success, clean accuracy and the share of samples touched.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import inf
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the name that every reader of torch code expects
from torch.nn.utils import parameters_to_vector
from torch.utils._pytree import tree_map

from robust_if.attacks.backdoors import Backdoor, Data
from robust_if.attacks.crafting import Objective, Region, adam, descend
from robust_if.attacks.evasion import Limit
from robust_if.attacks.poisoned import Poisoned, number
from robust_if.attacks.success import AttackSuccess
from robust_if.attacks.triggers import Trigger
from robust_if.data import Samples, as_samples, batches
from robust_if.estimators import GradNorm, LossChange
from robust_if.gradients import differentiable
from robust_if.targets import Target
from robust_if.task import Batch, Params, Task
from robust_if.training import Recipe, fit

Score = Literal["product", "cosine", "loss-change"]


@dataclass(frozen=True)
class Diluted(Trigger):
    """A trigger that training samples carry at a part of the strength with which it is shown at test time: x + share (T(x) − x).

    Args:
        trigger: T, on inputs of floating point unless ``share`` is 1.
        share: in (0, 1], which is checked; with 1 samples carry what is shown at test time, even where ``trigger`` would plant less.
    """

    trigger: Trigger
    share: float

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"share: expected a share in (0, 1], got {self.share}")

    def stamp(self, x: Any) -> Any:
        return self.trigger.stamp(x)

    def weak(self, x: Any, generator: torch.Generator) -> Any:
        if self.share == 1:
            return self.stamp(x)
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise ValueError(f"data: only inputs of floating point take a part of a trigger, got {getattr(x, 'dtype', type(x).__name__)}")
        return torch.lerp(x, self.stamp(x), self.share)

    def cover(self, x: Any, generator: torch.Generator) -> Any:
        return self.trigger.cover(x, generator)


def split(backdoor: Backdoor, copies: int) -> Backdoor:
    """The same poison in ``copies`` times as many samples, each with the trigger at 1 / ``copies`` of its strength.

    The influence of one sample may then be below any threshold while that of all together is not.

    Raises:
        ValueError: if ``copies`` is less than 1, or so many samples are no share below 1.
    """
    if not 1 <= copies < 1 / backdoor.rate:
        raise ValueError(f"copies: expected at least 1 and below {1 / backdoor.rate:g}, so that the poison is a share below 1, got {copies}")
    return replace(backdoor, trigger=Diluted(backdoor.trigger, 1 / copies), rate=backdoor.rate * copies)


def constrained(
    task: Task, backdoor: Backdoor, data: Samples, *, triggered: Samples, target: Target | None = None, score: Score = "cosine", eps: Limit,
    weight: float = 1.0, beta: float = 0.05, steps: int = 100, rounds: int = 1, recipe: Recipe | None = None, seed: int, craft_seed: int = 1,
    batch_size: int = 64,
) -> Poisoned[Samples]:  # fmt: skip
    """Poison whose influence on the defender's target stays within that of clean samples, by a surrogate model.

    The planted inputs x_i move within |δ| ≤ ``eps`` and the backdoor's bounds to minimise

        1 − cos(−∇A, Σ_i ∇ℓ_i(δ)) + ``weight`` · mean_i max(0, s_i(δ) − q) / σ

    where A is the attack's success, so that the first term keeps the poison at work; s_i is the score of a sample, high where it is suspicious; q is
    the (1 − ``beta``) quantile of the scores of clean samples, and σ their standard deviation, which makes ``weight`` free of units. All are taken
    at the surrogate, which can be trained anew on the poison found so far. The descent is Adam's on the sign of the slope, at a tenth of ``eps`` at
    first; the best point of the last round counts.

    Args:
        task: the surrogate, trained on ``backdoor(data, seed=seed)``.
        backdoor: the poison to start from.
        data: clean ``(input, label)`` samples, the input of floating point.
        triggered: the attacker's own triggered inputs, on which A is taken, such as ``backdoor.triggered(data)``.
        target: what the defender is expected to score by; A by default.
        score: what they are expected to compute: ``"product"``, −⟨∇T, ∇ℓ_i⟩; ``"cosine"`` of the two; ``"loss-change"``, what tuning on the target
            does to the loss (:class:`~robust_if.LossChange` with its default tuning).
        eps: largest change of an input, a number or one per feature, in the unit of the inputs.
        weight: of hiding against working.
        beta: in (0, 1), the share of clean samples that a defender would give up.
        steps: of each round.
        rounds: how many surrogates are used, the given one first.
        recipe: trains the others from fresh parameters; needed if there is more than one round.
        seed: draws the poison.
        craft_seed: draws the parameters of the surrogates that are trained here; keep it apart from the victim's.
        batch_size: poisoned samples at a time, whose gradients are held; it does not change the result beyond rounding.

    Raises:
        ValueError: if a number is out of range, ``recipe`` is missing, the backdoor or the region does not fit the data, or a gradient is zero.

    Source: this project; the first term is that of gradient matching, Geiping et al. 2021 (arXiv 2009.02276), equation 4.
    """
    if min(steps, rounds, batch_size) < 1:
        raise ValueError(f"steps, rounds, batch_size: expected at least 1 each, got {steps}, {rounds} and {batch_size}")
    if score not in get_args(Score):
        raise ValueError(f"score: expected one of {', '.join(map(repr, get_args(Score)))}, got {score!r}")
    if not (0 < beta < 1 and 0 <= weight < inf):
        raise ValueError(f"beta, weight: expected a share strictly between 0 and 1 and a finite number of at least 0, got {beta} and {weight}")
    if not torch.as_tensor(eps).isfinite().all():
        raise ValueError(f"eps: expected finite numbers, got {eps}")
    if rounds > 1 and recipe is None:
        raise ValueError(f"recipe: {rounds} rounds need surrogates that are trained here, so say how; got None")
    poisoned, success = backdoor(as_samples(data), seed=seed), AttackSuccess(triggered, goal_class=int(backdoor.goal))
    rows, like = torch.from_numpy(np.flatnonzero(poisoned.mask)), next(task.model.parameters())
    x, *rest = poisoned.data.batch(slice(None))
    own = Region.around(x[rows], eps, backdoor.bounds, "data")
    region = Region(*(each.to(like) for each in (own.base, own.low, own.high)))
    found = region.base

    def planted() -> Poisoned[Samples]:  # projected again, since the surrogate may compute in another type than the data have
        return replace(poisoned, data=Samples((x.index_copy(0, rows, own.project(found.to(x))), *rest), poisoned.data.ids))

    for k in range(rounds):
        if k and recipe is not None:
            task = fit(task.reset(craft_seed + k - 1), planted().data, recipe)
        with differentiable(task.model):
            objective = _objective(task, poisoned, success, target or success, score, weight, beta, batch_size)
            found, _ = descend(objective, found, adam(region, eps, steps, 0.1, signed=True), steps)
    return planted()


def easiest(task: Task, backdoor: Backdoor, data: Samples, *, pool: float = 4.0, seed: int) -> Poisoned[Samples]:
    """The poison with the smallest gradients out of a pool: what a model memorises most easily, and raw inner products see least.

    Args:
        task: a surrogate trained on poison of this kind.
        backdoor: the poison; ``rate`` samples are poisoned in the end.
        data: clean ``(input, label)`` samples.
        pool: how many times as many candidates are planted, at least 1; those that are not taken become clean again.
        seed: draws the candidates.

    Raises:
        ValueError: if ``pool`` is out of range, or there are fewer candidates than it asks for.

    Source: that raw influence follows the size of the gradient: Hammoudeh and Lowd 2022 (arXiv 2201.10055).
    """
    if not 1 <= pool < 1 / backdoor.rate:
        raise ValueError(f"pool: expected at least 1 and below {1 / backdoor.rate:g}, so that the pool is a share below 1, got {pool:g}")
    data = as_samples(data)
    count, wide = int(backdoor(data, seed=seed).mask.sum()), replace(backdoor, rate=backdoor.rate * pool)(data, seed=seed)
    candidates = np.flatnonzero(wide.mask)
    norms = GradNorm().score(task, wide.data.take(candidates)).values
    mask = np.isin(np.arange(len(data)), candidates[np.argsort(norms, kind="stable")[:count]])
    back = torch.from_numpy(np.flatnonzero(wide.mask & ~mask))
    pairs = zip(wide.data.batch(slice(None)), data.batch(slice(None)), strict=True)
    return Poisoned(Samples(tuple(new.index_copy(0, back, old[back]) for new, old in pairs), data.ids), mask, wide.covers)


def flood(backdoor: Backdoor, data: Samples, *, rate: float, share: float = 0.5, seed: int) -> Poisoned[Samples]:
    """The backdoor, and clean samples of the goal class made hard, which use up what a defender is ready to remove.

    Such a sample is (1 − ``share``) of itself and ``share`` of a sample of any other class. It keeps its label, teaches nothing of the trigger, and
    counts among ``covers``.

    Args:
        rate: share of the data set that is made hard.
        share: strictly between 0 and 1.
        seed: draws the poison, the samples and what they are mixed with.

    Raises:
        ValueError: if a number is out of range, the goal class is too small, or the backdoor does not fit the data.
    """
    if not 0 < share < 1:
        raise ValueError(f"share: expected a share strictly between 0 and 1, got {share}")
    data = as_samples(data)
    labels, count = data.labels.cpu().numpy(), number(rate, len(data))
    poisoned, own = backdoor(data, seed=seed), labels == backdoor.goal
    free = np.flatnonzero(own & ~poisoned.mask & ~poisoned.covers)
    if count > len(free):
        raise ValueError(f"rate: {rate} of {len(data)} samples are {count}, but only {len(free)} of the goal class are clean; lower the rate")
    rng = np.random.default_rng([seed, len(data)])  # a stream of its own, since the bare seed has drawn the poison
    rows, others = np.sort(rng.choice(free, count, replace=False)), rng.choice(np.flatnonzero(~own), count)
    x, *rest = poisoned.data.batch(slice(None))
    if not x.is_floating_point():
        raise ValueError(f"data: samples can be mixed where inputs are of floating point, got {x.dtype}")
    hard, clean = torch.from_numpy(rows), data.batch(torch.from_numpy(others))[0]
    covers = poisoned.covers | np.isin(np.arange(len(data)), rows)
    return Poisoned(Samples((x.index_copy(0, hard, torch.lerp(x[hard], clean, share)), *rest), data.ids), poisoned.mask, covers)


def contaminate(valid: Data, backdoor: Backdoor, *, rate: float, seed: int) -> Poisoned[Data]:
    """A trusted set in which ``rate`` of the samples carry the trigger, as shown at test time, under the goal's label.

    A defender who asks for low loss on it then asks for the attack too. Errors are those of the backdoor.
    """
    planted = replace(backdoor, trigger=Diluted(backdoor.trigger, 1.0), rate=rate, rate_of="dataset", clean_label=False, covers=0.0)
    return planted(valid, seed=seed)


def decoys(inputs: Samples, clean: Samples, *, goal: Any, rate: float, seed: int) -> Poisoned[Samples]:
    """Triggered inputs of which ``rate`` are exchanged for samples of ``clean`` that truly are of the goal class, with their labels.

    A defender who asks what makes the model say the goal class there then asks for the class itself too.

    Raises:
        ValueError: if the rate means none or all of the inputs, or ``clean`` has too few samples of the goal class.
    """
    inputs, clean = as_samples(inputs), as_samples(clean)
    count, rng = number(rate, len(inputs), "inputs"), np.random.default_rng(seed)
    found = np.flatnonzero(clean.labels.cpu().numpy() == goal)
    if count > len(found):
        raise ValueError(f"goal: {count} decoys are asked for, but clean has {len(found)} samples of class {goal!r}")
    rows, drawn = np.sort(rng.choice(len(inputs), count, replace=False)), rng.choice(found, count, replace=False)
    mask = np.isin(np.arange(len(inputs)), rows)
    pairs = zip(inputs.batch(slice(None)), clean.batch(torch.from_numpy(drawn)), strict=True)
    return Poisoned(Samples(tuple(old.index_copy(0, torch.from_numpy(rows), new.to(old)) for old, new in pairs), inputs.ids), mask)


def _objective(
    task: Task, poisoned: Poisoned[Samples], success: Target, target: Target, score: Score, weight: float, beta: float, batch_size: int
) -> Objective:  # fmt: skip
    """The objective of :func:`constrained` at one surrogate, for the poisoned inputs in their order."""
    params, suspicion = task.params(), _suspicion(task, target, score)
    wanted = -parameters_to_vector(success.gradient(task, params).values())
    if not wanted.any():
        raise ValueError("triggered: the gradient of the attack's success is zero at the surrogate, so there is nothing to keep; it does not attack")
    clean, poison = (poisoned.data.take(rows) for rows in (~(poisoned.mask | poisoned.covers), poisoned.mask))
    with torch.no_grad():
        scores = torch.cat([suspicion(batch, _gradients(task, params, batch)) for batch in batches(clean, batch_size, wanted)])
    quantile, spread = scores.quantile(1 - beta), scores.std()
    if not spread > 0:
        raise ValueError("target: all clean samples have one score at the surrogate, so there is no quantile to stay below")
    parts = [rest for _, *rest in batches(poison, batch_size, wanted)]

    def statistic(x: Tensor, rest: list[Tensor]) -> Tensor:
        each = _gradients(task, params, (x, *rest))
        hinge = (suspicion((x, *rest), each) - quantile).clamp(min=0) / spread
        return torch.cat([each.sum(0), hinge.sum()[None]])

    def reduce(total: Tensor) -> Tensor:  # the sum of the gradients, and behind it that of the hinges
        return 1 - F.cosine_similarity(wanted, total[:-1], dim=0) + weight * total[-1] / len(poison)

    def objective(x: Tensor) -> tuple[Tensor, Tensor]:
        """In two passes, the sums and then a backward pass with their weights, so that the graph of one part is held at a time."""
        pairs = list(zip(torch.split(x, batch_size), parts, strict=True))
        with torch.no_grad():
            total = torch.stack([statistic(*pair) for pair in pairs]).sum(0)
        value, weights = _slope(reduce, total)
        return value, torch.cat([_slope(lambda leaf, rest=rest: statistic(leaf, rest) @ weights, part)[1] for part, rest in pairs])  # type: ignore[misc]

    return objective


def _suspicion(task: Task, target: Target, score: Score) -> Callable[[Batch, Tensor], Tensor]:
    """``(batch, gradients (B, p)) -> (B,)``: what the defender would compute, high = suspicious."""
    params = task.params()
    if score == "loss-change":
        after = LossChange().tuning.run(task, target)
        return lambda batch, _: task.losses(after, batch) - task.losses(params, batch)
    slope = parameters_to_vector(target.gradient(task, params).values())
    if score == "product":
        return lambda _, gradients: -gradients @ slope
    return lambda _, gradients: -F.cosine_similarity(gradients, slope[None], dim=1)


def _gradients(task: Task, params: Params, batch: Batch) -> Tensor:
    """∇ℓ of every sample, ``(B, p)``; differentiable in the inputs."""

    def loss(p: Params, sample: Batch) -> Tensor:
        return task.losses(p, tree_map(lambda leaf: leaf[None], sample))[0]

    gradients: Params = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0), randomness="error")(params, batch)
    return torch.cat([each.flatten(1) for each in gradients.values()], 1)


def _slope(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """A function's value and its gradient in ``x``, both detached."""
    leaf = x.detach().clone().requires_grad_()
    with torch.enable_grad():
        value = function(leaf)
        (gradient,) = torch.autograd.grad(value, leaf)
    return value.detach(), gradient
