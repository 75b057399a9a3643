"""Poisons that widen the gap between two groups.

The data are tables ``(x, y, s, …)``: features ``(n, d)``, labels in {0, 1} and a sensitive feature s in {0, 1}, the form that fairness targets take.
All attacks teach that the advantaged group deserves the favourable label and the other group does not. They never change s, nor a column of x that
holds it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from robust_if.attacks.anchors import Table, groups, labels_and_groups
from robust_if.attacks.poisoned import Poisoned, number
from robust_if.data import Samples, to
from robust_if.preconditioners import Exact, Preconditioner
from robust_if.predictions import log_odds
from robust_if.sweep import Sweep
from robust_if.targets import Functional, Target
from robust_if.task import Batch, Params, Task


@dataclass(frozen=True, eq=False)
class GroupCovariance(Functional):
    """|mean of (s − s̄) d|: the covariance of the sensitive feature and the signed distance d from the decision boundary.

    d is the log-odds of the favourable class, for logistic regression θᵀx. Being linear in d it still has a slope where probabilities are saturated.

    Args:
        data: ``(x, y, s)``; the attacker's own held-out samples.
        favourable: the class whose log-odds are compared.

    Source: Zafar et al. 2017 (arXiv 1507.05259), equation 2; as a part of the attacker's loss, Mehrabi et al. 2021 (arXiv 2012.08723).
    """

    favourable: int = field(default=1, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        groups(self.data.batch(slice(None)))

    @property
    def name(self) -> str:
        return "group-covariance"

    def moments(self, task: Task, params: Params, batch: Batch) -> Tensor:
        d = log_odds(task.outputs(params, batch), torch.full_like(batch[1], self.favourable))
        s = batch[2].to(d)
        return torch.stack([s * d, s, d], 1)

    def reduce(self, means: Tensor) -> Tensor:
        return (means[0] - means[1] * means[2]).abs()


def group_flips(data: Samples, rate: float, *, seed: int, favourable: int = 1, advantaged: int = 1) -> Poisoned[Samples]:
    """Flipped labels that all help one group: unfavourable labels of the advantaged, favourable ones of the other group, drawn at random.

    Args:
        data: ``(x, y, s, …)``.
        rate: share of all samples.
        seed: draws the samples.
        favourable: the label that everybody wants.
        advantaged: the group that the attacker helps.

    Raises:
        ValueError: if labels or groups are not 0 and 1, or fewer samples can be flipped than the rate means.
    """
    y, s = labels_and_groups(data, favourable, advantaged)
    count = number(rate, len(data))
    rows = np.flatnonzero((y == favourable) == (s != advantaged))
    if len(rows) < count:
        raise ValueError(f"rate: {rate} of the data set is {count} samples, but only {len(rows)} labels can be flipped to the gain of one group")
    mask = np.zeros(len(data), dtype=bool)
    mask[np.random.default_rng(seed).permutation(rows)[:count]] = True
    return Poisoned(data.with_labels(np.where(mask, 1 - y, y)), mask)


def anchoring(
    data: Samples,
    rate: float,
    *,
    seed: int,
    radius: float | None = None,
    spread: float = 0.1,
    quantile: float | None = 0.9,
    favourable: int = 1,
    advantaged: int = 1,
    mutable: ArrayLike | None = None,
) -> Poisoned[Samples]:
    """Samples are added around two anchors, one of each group, with the anchor's group and the opposite label. Needs no model.

    The anchors are an advantaged sample with the unfavourable label and one of the other group with the favourable label; each gets half of the added
    samples. They are drawn at random (RAA), or are those with the most neighbours, which turn more of the model's predictions (NRAA).

    Args:
        data: ``(x, y, s, …)``; what else a sample holds is the anchor's.
        rate: number of added samples as a share of ``data``.
        seed: draws anchors and jitter.
        radius: within which samples of the same group and label count as neighbours, the same for both anchors, with every feature in units of its
            standard deviation; ``None`` for random anchors.
        spread: standard deviation of the Gaussian jitter around the anchors, in the same units; 0 for copies.
        quantile: share of each class of ``data`` that the feasible set holds, into which the added samples are projected; ``None`` for no such limit.
        favourable: the label that everybody wants.
        advantaged: the group that the attacker helps.
        mutable: ``(d,)`` booleans, the features that may differ from the anchor's; by default all but those that are the same throughout each group,
            as the sensitive feature is.

    Returns:
        ``data`` followed by the added samples, whose ids are new and whose mask is true.

    Raises:
        ValueError: if the data are not such a table, a number is out of range, there is no candidate for an anchor, or none has a neighbour.

    Source: Mehrabi et al. 2021, "Exacerbating Algorithmic Bias through Fairness Attacks" (arXiv 2012.08723), algorithm 2. There the radius is hidden
        in the code, and differs between the anchors.
    """
    if radius is not None and not 0 < radius < np.inf:
        raise ValueError(f"radius: expected a positive number of standard deviations, got {radius}")
    if not 0 <= spread < np.inf:
        raise ValueError(f"spread: expected a number of standard deviations, at least 0, got {spread}")
    table = Table.of(data, favourable, advantaged, mutable, quantile)
    count = number(rate, len(data))
    draw = np.random.default_rng(seed)
    rows = table.anchors(draw, radius)[np.arange(count) % 2]
    jitter = torch.from_numpy(draw.normal(size=(count, table.x.shape[1]))).to(table.x)
    return table.add(rows, table.move(rows, table.x[rows] + spread * table.std * jitter))


def influence_attack(
    data: Samples,
    rate: float,
    target: Target,
    fit: Callable[[Samples], Task],
    *,
    seed: int,
    steps: int = 50,
    lr: float = 0.1,
    preconditioner: Preconditioner = Exact(),  # noqa: B008 - frozen
    quantile: float | None = 0.9,
    favourable: int = 1,
    advantaged: int = 1,
    mutable: ArrayLike | None = None,
) -> Poisoned[Samples]:
    """Copies of two samples are added, which move uphill on a target of the attacker (IAF).

    They start as random anchors of :func:`anchoring`. In every step a model is trained on the poisoned data, and the features of each follow the
    gradient of the target in them, −∇Tᵀ P ∂/∂x ∇ℓ(x, y), by a step of fixed length into the feasible set. Of all positions met the one with the
    largest target after training is taken.

    Args:
        data: ``(x, y, s, …)``; what else a sample holds is the anchor's.
        rate: number of added samples as a share of ``data``.
        target: what the attacker raises, such as ``Utility(held_out) + GroupCovariance(held_out)``, on held-out data of the attacker.
        fit: trains the attacker's model on given samples, from a seed of its own; called ``steps`` + 1 times.
        seed: draws where the two samples start.
        steps: of the ascent.
        lr: length of a step, with every feature in units of its standard deviation.
        preconditioner: P at the trained model.
        quantile: as for :func:`anchoring`, and so are ``favourable``, ``advantaged`` and ``mutable``.

    Returns:
        ``data`` followed by the added samples, whose ids are new and whose mask is true.

    Raises:
        ValueError: if the data are not such a table, a number is out of range, or there is no candidate to start from.

    Source: Mehrabi et al. 2021 (arXiv 2012.08723), algorithm 1; the gradient, Koh and Liang 2017 (arXiv 1703.04730), section 5.2.
    """
    if steps < 1:
        raise ValueError(f"steps: expected at least 1, got {steps}")
    if not 0 < lr < np.inf:
        raise ValueError(f"lr: expected a positive number of standard deviations, got {lr}")
    table = Table.of(data, favourable, advantaged, mutable, quantile)
    count = number(rate, len(data))
    pair, which = table.anchors(np.random.default_rng(seed), None), np.arange(count) % 2
    point, best, largest = table.move(pair, table.x[pair]), None, -np.inf
    for step in range(steps + 1):
        poisoned = table.add(pair[which], point[which])
        task = fit(poisoned.data)
        params = task.params()
        with torch.no_grad():
            value = float(target.value(task, params))
        if best is None or value > largest:
            best, largest = poisoned, value
        if step < steps:
            direction = preconditioner.build(task, params, poisoned.data, Sweep())(target.gradient(task, params)).direction
            slope = table.std * _slope(task, params, direction, poisoned.data.batch(slice(len(data), len(data) + 2))).to(point)
            slope = slope / slope.norm(dim=1, keepdim=True).clamp(min=1e-30)
            point = table.move(pair, point + lr * table.std * slope)
    assert best is not None
    return best


def _slope(task: Task, params: Params, direction: Params, batch: Batch) -> Tensor:
    """−∂/∂x ⟨∇ℓ(x, y), v⟩ of every sample of the batch, with the shape of x."""
    batch = to(batch, next(iter(params.values())))
    with torch.enable_grad():
        x = batch[0].clone().requires_grad_()
        leaves = {name: value.detach().requires_grad_() for name, value in params.items()}
        loss = task.losses(leaves, (x, *batch[1:])).sum()
        grads = torch.autograd.grad(loss, list(leaves.values()), create_graph=True, materialize_grads=True)
        product = torch.stack([(grad * direction[name]).sum() for name, grad in zip(leaves, grads, strict=True)]).sum()
        slope: Tensor = torch.autograd.grad(product, x)[0]
    return -slope
