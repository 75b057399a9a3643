"""Effects of removing many samples at once, where influences do not add: samples share curvature, and duplicates hide each other.

Training minimises J(θ) = mean of ℓ_i + λ/2 ‖θ‖². Leaving out the u samples of U keeps a mean, over the n − u others, and the same λ, so with A the
curvature of J, λ included, A_U = (1/u) Σ_U ∇²ℓ_i + λI, ḡ the mean gradient of all samples and r = u / (n − u):

    ∇J_kept − ∇J = −b,  b = Σ_U (∇ℓ_i − ḡ) / (n − u);      A_kept = A + r (A − A_U).

The gradients are centred because the mean of the others is: at the minimum ḡ = −λθ, and without damping ḡ = 0. The optimum moves by the Newton step
Δ = A_kept⁻¹ b. With P = A⁻¹ its expansion around "U looks like the data", A_U = A, is

    Δ₁ = P b,      Δ_{j+1} = Δ₁ + r (P A_U − I) Δ_j,

whose first term is the sum of the influences up to centring and n / (n − u). The second, (1 − 2p) / (1 − p) Δ₁ + p / (1 − p) P A_U Δ₁ with p = u / n,
is that of Basu, You and Feizi 2020, "On Second-Order Group Influence Functions for Black-Box Predictions" (arXiv 1911.00418); here the L2 penalty is
part of it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from robust_if.curvature import Curvature
from robust_if.data import Samples, as_samples, batches
from robust_if.gradients import directional, gradient
from robust_if.preconditioners.base import Preconditioner, Solution
from robust_if.sweep import Sweep
from robust_if.targets import Target
from robust_if.task import Params, Task

logger = logging.getLogger(__name__)


def group_effect(
    task: Task,
    train: Any,
    groups: Sequence[ArrayLike],
    *,
    target: Target,
    preconditioner: Preconditioner,
    order: int = 2,
    sweep: Sweep = Sweep(),  # noqa: B008 - frozen
) -> NDArray[np.float64]:
    """The predicted decrease of the target, T(θ) − T(θ + Δ), when a whole group is left out of training; positive = harmful.

    T is evaluated at θ + Δ, so that its own curvature and bounds count. The formulas for Δ stand at the top of this file. One build of the
    preconditioner serves all groups; each then takes a backward pass over its own samples, one curvature product over them for every order after the
    first, and one evaluation of the target.

    Args:
        task: the trained model. The parameters should be near the minimum of the training loss; where they are not, the effect is that on the
            minimum of the loss tilted to have it there.
        train: the n training samples.
        groups: g groups, each by positions or as a boolean mask ``(n,)``; they may overlap.
        target: what should become lower.
        preconditioner: P. Its damping is λ: pass the L2 penalty of the training where there was one.
        order: terms of the expansion; 1 is the sum of single influences. Later terms use the Gauss-Newton curvature of the group, and more than a few
            need not converge for a large group unlike the rest.
        sweep: batch size and progress; nothing is written.

    Returns:
        ``(g,)`` in the unit of the target.

    Raises:
        ValueError: if a group is empty, holds all samples, a sample twice or one that is not there; if ``order`` is less than 1; or, from order 2
            on, if the preconditioner reports no damping that is the same for all parameters.
    """
    samples = as_samples(train)
    chosen = [_positions(group, len(samples), f"groups[{g}]") for g, group in enumerate(groups)]
    if order < 1:
        raise ValueError(f"order: expected at least 1, got {order}")
    params, n = task.params(), len(samples)
    inverse = preconditioner.build(task, params, samples, sweep)
    mean = _mean_gradient(task, params, samples, sweep)
    before = _value(target, task, params)
    effects = []
    for rows in sweep.progress(chosen, "groups"):
        part = samples.take(rows)
        share = len(rows) / (n - len(rows))
        own = _mean_gradient(task, params, part, sweep)
        solution = _checked(inverse({name: share * (own[name] - mean[name]) for name in params}), preconditioner)
        first = step = solution.direction
        if order > 1:
            damping = _damping(solution, preconditioner)
            curvature = Curvature(task, params, part, batch_size=sweep.batch_size)
        for _ in range(order - 1):
            product = curvature(step)
            turned = inverse({name: product[name] + damping * step[name] for name in params}).direction
            step = {name: first[name] + share * (turned[name] - step[name]) for name in params}
        effects.append(before - _value(target, task, _moved(params, step)))
    return np.array(effects)


@dataclass(frozen=True, eq=False)
class Removal:
    """Samples in the order in which they were removed, and where the target was predicted to go.

    Args:
        positions: ``(k,)`` of the removed samples in the training data.
        ids: ``(k,)`` their ids.
        targets: ``(rounds + 1,)`` the target at the trained parameters, and as predicted after every round.
    """

    positions: NDArray[np.int64]
    ids: NDArray[Any] = field(repr=False)
    targets: NDArray[np.float64]


def greedy(
    task: Task,
    train: Any,
    k: int,
    *,
    target: Target,
    preconditioner: Preconditioner,
    at_once: int = 1,
    sweep: Sweep = Sweep(),  # noqa: B008 - frozen
) -> Removal:
    """Remove the ``k`` samples that lower the target most, ``at_once`` in a round, and score the others again after every round.

    A round removes the samples with the largest −⟨P ∇T, ∇ℓ_i⟩, builds the preconditioner P anew on those that are left, and moves the parameters by
    the Newton step θ ← θ − P (ḡ_kept(θ) − ḡ(θ₀) + λ (θ − θ₀)), with θ₀ the trained parameters and ḡ(θ₀) their mean gradient over all samples. Since
    the gradient of the samples that are left is taken anew, a round corrects the errors of those before it; with exact curvature the prediction is
    exact for squared losses of linear models. ``targets`` says where the prediction turns, and with it the use of removing more.

    Args:
        task: the trained model; see :func:`group_effect` for what is asked of it, and of the damping.
        train: the n training samples.
        k: how many to remove, fewer than n.
        target: what should become lower.
        preconditioner: P, with its damping λ given: the default one would be another in every round.
        at_once: samples in a round. A round costs a build, a pass for the scores and one for the mean gradient.
        sweep: batch size and progress; nothing is written.

    Raises:
        ValueError: if ``k`` or ``at_once`` is out of range, or the preconditioner reports no damping that is the same for all parameters.

    Source: re-scoring after each removal, as an answer to the failures of one-shot selection: Hu et al. 2024, "Most Influential Subset Selection:
    Challenges, Promises, and Beyond" (NeurIPS 2024, arXiv 2409.18153).
    """
    samples = as_samples(train)
    if not 1 <= k < len(samples):
        raise ValueError(f"k: expected a number from 1 to {len(samples) - 1}, got {k}")
    if at_once < 1:
        raise ValueError(f"at_once: expected at least 1, got {at_once}")
    start = params = task.params()
    mean = _mean_gradient(task, start, samples, sweep)
    left, removed = np.arange(len(samples)), np.empty(0, dtype=np.int64)
    targets = [_value(target, task, start)]
    inverse = preconditioner.build(task, params, samples, sweep)
    for done in sweep.progress(range(0, k, at_once), "greedy removal"):
        solution = _checked(inverse(target.gradient(task, params)), preconditioner)
        damping = _damping(solution, preconditioner)
        scores = _products(task, params, samples.take(left), solution.direction, sweep)
        worst = np.argsort(scores, kind="stable")[: min(at_once, k - done)]
        removed, left = np.append(removed, left[worst]), np.delete(left, worst)
        kept = samples.take(left)
        slope = _mean_gradient(task, params, kept, sweep)
        slope = {name: slope[name] - mean[name] + damping * (params[name] - start[name]) for name in params}
        inverse = preconditioner.build(task, params, kept, sweep)
        step = inverse(slope).direction
        params = _moved(params, {name: -value for name, value in step.items()})
        targets.append(_value(target, task, params))
    return Removal(removed, samples.ids[removed], np.array(targets))


def _positions(group: ArrayLike, n: int, name: str) -> NDArray[np.int64]:
    """A group as positions, checked."""
    rows = np.asarray(group)
    if rows.dtype == bool:
        if rows.shape != (n,):
            raise ValueError(f"{name}: expected a mask of shape ({n},), got {rows.shape}")
        rows = np.flatnonzero(rows)
    if rows.ndim != 1 or not 0 < len(rows) < n:
        raise ValueError(f"{name}: expected from 1 to {n - 1} samples, got shape {rows.shape}")
    if not np.issubdtype(rows.dtype, np.integer) or rows.min() < 0 or rows.max() >= n:
        raise ValueError(f"{name}: expected positions from 0 to {n - 1}, got {rows[:5]}")
    if len(np.unique(rows)) < len(rows):
        raise ValueError(f"{name}: expected every sample once, but {len(rows) - len(np.unique(rows))} stand in it again")
    return rows.astype(np.int64)


def _checked(solution: Solution, preconditioner: Preconditioner) -> Solution:
    if not solution.notes.get("converged", True):
        logger.warning(
            "%s: the solver did not converge (residual %.2g); raise damping or the number of iterations",
            preconditioner.name,
            solution.notes["residual"],
        )
    return solution


def _damping(solution: Solution, preconditioner: Preconditioner) -> float:
    """λ of a solution."""
    damping = solution.notes.get("damping")
    if not isinstance(damping, (int, float)):
        raise ValueError(
            f"preconditioner: expected an inverse of the curvature with one damping for all parameters, got {preconditioner!r}; pass damping=..., "
            "the L2 penalty of the training if there was one"
        )
    return float(damping)


def _mean_gradient(task: Task, params: Params, samples: Samples, sweep: Sweep) -> Params:
    total = {name: torch.zeros_like(value) for name, value in params.items()}
    for batch in batches(samples, sweep.batch_size, next(iter(params.values()))):
        for name, part in gradient(lambda p, batch=batch: task.losses(p, batch).sum() / len(samples), params).items():  # type: ignore[misc]
            total[name] += part
    return total


def _products(task: Task, params: Params, samples: Samples, direction: Params, sweep: Sweep) -> NDArray[np.float64]:
    """⟨direction, ∇ℓ_i⟩ for every sample, ``(n,)``."""
    sweep = replace(sweep, directory=None)
    like = next(iter(params.values()))
    return sweep.map(lambda batch: directional(task, params, batch, direction), samples, like, name="greedy").numpy()


def _moved(params: Params, step: Params) -> Params:
    return {name: value + step[name] for name, value in params.items()}


def _value(target: Target, task: Task, params: Params) -> float:
    with torch.no_grad():
        return float(target.value(task, params))
