"""Linear programmes that turn scores into weights: the published one, and the step of a repair in rounds."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import linprog

Array = NDArray[np.float64]

#: Price of violating a gap by one, in units of utility: closing a gap comes first, but not at any price.
_ELASTIC = 10.0


def li_liu(
    gap: float, fairness: ArrayLike, utility: ArrayLike, *, alpha: float = 0.1, beta: float = 0.5, gamma: float = 0.2, time_limit: float = 60.0
) -> Array:
    """The weights ``(n,)`` in [0, 1] of Li and Liu's programme.

    If the gap can be closed by removals, as few samples as possible are removed so that its prediction falls by ``beta`` · gap and the validation
    loss by ``gamma`` of what removals can gain; else the gap is lowered as far as removing a share ``alpha`` can, without a loss of utility. The
    gap is signed: one that is not positive is left as it is.

    Args:
        gap: f, the signed gap.
        fairness: ``(n,)`` scores of the gap: its predicted decrease when a sample is removed.
        utility: ``(n,)`` scores of the validation loss.
        alpha: largest share that is removed in the second case.
        beta: share of the gap that is to be closed. The paper's β is 1 minus this one, which is that of its code.
        gamma: share of the possible gain in utility that is demanded.
        time_limit: seconds for the solver.

    Raises:
        ValueError: if the scores are not two arrays of one length, or the programme has no solution; the error says which demand cannot be met.

    Source: Li and Liu 2022, "Achieving Fairness at No Utility Cost via Data Reweighing with Influence" (arXiv 2202.00787), equations 7 and 8.
    """
    f, u = np.asarray(fairness, dtype=np.float64), np.asarray(utility, dtype=np.float64)
    if f.ndim != 1 or f.shape != u.shape:
        raise ValueError(f"fairness, utility: expected two arrays of shape (n,), got {f.shape} and {u.shape}")
    possible, gain = f[f > 0].sum(), u[u > 0].sum()
    if gap > possible:
        removed = _solve(-f, np.stack([-u, np.ones_like(u)]), np.array([0.0, alpha * len(f)]), time_limit)
    else:
        removed = _solve(np.ones_like(f), np.stack([-f, -u]), np.array([-beta * gap, -gamma * gain]), time_limit)
    if removed is None:
        raise ValueError(
            f"beta, gamma: no weights close {beta:g} of the gap {gap:.4g} (at most {possible:.4g} can be closed) and gain {gamma:g} of the utility "
            f"({gamma * gain:.4g} of {gain:.4g}) at once; lower one of them"
        )
    return 1 - removed


@dataclass(frozen=True, eq=False)
class Step:
    """A solution of :func:`reweigh`: changes of the weights ``(n,)``, and by how much the gaps are predicted to stay outside their bound."""

    change: Array
    excess: float


def reweigh(
    weights: ArrayLike,
    gaps: ArrayLike,
    scores: ArrayLike,
    utility: ArrayLike,
    *,
    bound: float = 0.0,
    cost: float = 0.0,
    budget: float = np.inf,
    max_weight: float = 2.0,
    radius: float = 0.6,
    time_limit: float = 20.0,
) -> Step:
    """The change of weights that brings every gap within ±``bound`` at the lowest predicted target of utility, to first order.

    minimise  Σ uᵢ Δᵢ + cost · Σ |wᵢ + Δᵢ − 1|
    subject to  |gapₖ + Σ sₖᵢ Δᵢ| ≤ bound,  0 ≤ w + Δ ≤ max_weight,  |Δᵢ| ≤ radius,  Σ |Δᵢ| ≤ budget,

    the gaps elastically: what the trust region does not allow, or only at more than ten times the gain, is left as ``excess``.

    Args:
        weights: ``(n,)`` present weights.
        gaps: ``(k,)`` signed gaps.
        scores: ``(n, k)`` predicted decrease of each gap when a weight falls by one.
        utility: ``(n,)`` the same of the target of utility.
        bound: of the absolute value of each gap.
        cost: per unit of weight that differs from 1.
        budget: trust region of all changes together.
        max_weight: largest weight.
        radius: trust region of one weight.
        time_limit: seconds for the solver.

    Raises:
        ValueError: if the solver finds nothing in time.

    Source: two-sided and in rounds, after Li and Liu 2022 (arXiv 2202.00787), equation 8, with weights that may also grow.
    """
    w, s, u, g = (np.asarray(each, dtype=np.float64) for each in (weights, scores, utility, gaps))
    low, high = np.minimum(w, radius), np.minimum(max_weight - w, radius)
    # moves towards 1 give the cost back, moves away from it pay it: four kinds of moves, most of them of width 0
    back_up, back_down = np.clip(1 - w, 0, high), np.clip(w - 1, 0, low)
    widths = np.stack([back_up, high - back_up, back_down, low - back_down])
    kind, at = np.nonzero(widths > 0)
    sign, pays = np.array([1.0, 1.0, -1.0, -1.0])[kind], np.array([-1.0, 1.0, -1.0, 1.0])[kind]
    moved = sign[:, None] * s[at]
    found, excess = _elastic(sign * u[at] + cost * pays, moved, g, bound, budget, widths[kind, at], time_limit)
    return Step(np.asarray(np.bincount(at, sign * found, len(w)), dtype=np.float64), excess)


def choose(
    gaps: ArrayLike, scores: ArrayLike, price: ArrayLike, *, bound: float = 0.0, budget: float = np.inf, time_limit: float = 20.0
) -> NDArray[np.bool_]:
    """Which samples to change wholly, ``(n,)``, so that every gap comes within ±``bound`` at the lowest price, to first order.

    minimise  Σ priceᵢ xᵢ   subject to  |gapₖ − Σ sₖᵢ xᵢ| ≤ bound,  0 ≤ x ≤ 1,  Σ xᵢ ≤ budget,

    the gaps as elastically as in :func:`reweigh`, and rounded: a vertex has no more fractional x than there are rows.

    Args:
        gaps: ``(k,)`` signed gaps; none at all takes the samples of the lowest price below 0.
        scores: ``(n, k)`` predicted decrease of each gap when a sample is changed.
        price: ``(n,)`` of changing a sample, in units of utility; below 0 where the change is a gain.
        bound: of the absolute value of each gap.
        budget: largest number of samples.
        time_limit: seconds for the solver.

    Raises:
        ValueError: if the solver finds nothing in time.
    """
    g, s, each = (np.asarray(given, dtype=np.float64) for given in (gaps, scores, price))
    found, _ = _elastic(each, -s, g, bound, min(budget, len(s)), np.ones(len(s)), time_limit)
    return found > 0.5


def _elastic(price: Array, slopes: Array, gaps: Array, bound: float, budget: float, widths: Array, time_limit: float) -> tuple[Array, float]:
    """Minimise price · x + excess, at its price, subject to |gaps + slopesᵀ x| ≤ bound + excess, Σ x ≤ budget, 0 ≤ x ≤ widths; x and the excess."""
    slack = -np.ones(len(gaps))
    rows = np.column_stack([np.concatenate([slopes.T, -slopes.T]), np.concatenate([slack, slack])])
    limits = np.concatenate([bound - gaps, bound + gaps])
    if np.isfinite(budget):
        rows, limits = np.vstack([rows, np.append(np.ones(len(price)), 0.0)]), np.append(limits, budget)
    found = _solve(np.append(price, _ELASTIC), rows, limits, time_limit, np.append(widths, np.inf))
    if found is None:
        raise ValueError(
            f"time_limit: the linear programme of {len(price)} changes and {len(gaps)} gaps was not solved in {time_limit:g} s; give more time"
        )
    return found[:-1], float(found[-1])


def _solve(price: Array, rows: Array, limits: Array, time_limit: float, widths: Array | float = 1.0) -> Array | None:
    """Minimise price · x subject to rows x ≤ limits, 0 ≤ x ≤ widths; ``None`` without a solution.

    Few of the many variables leave 0, so those are left out that would not pay at the prices of the rows, until none is left out wrongly: the
    optimum is that of the whole programme.
    """
    widths = np.broadcast_to(widths, price.shape)
    strength = np.abs(rows).max(0, initial=0) + np.abs(price)
    used = strength >= np.quantile(strength, 0.75)
    used[-1] = True
    while True:
        bounds = np.column_stack([np.zeros(used.sum()), widths[used]])
        found = linprog(price[used], A_ub=rows[:, used], b_ub=limits, bounds=bounds, method="highs", options={"time_limit": time_limit})
        if found.x is None and used.all():
            return None
        pays = price - found.ineqlin.marginals @ rows < -1e-12 if found.status == 0 else np.ones_like(used)
        if not (pays & ~used).any():
            x = np.zeros_like(price)
            x[used] = found.x
            return x
        used |= pays.astype(bool)
