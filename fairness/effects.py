"""What leaving out or doubling whole groups of training samples does to a target, for thousands of groups at once.

For logistic regression, let H = Σ wᵢqᵢ xᵢxᵢᵀ + Λ with qᵢ = pᵢ(1 − pᵢ) be the curvature of the training objective, H₀ = H − Λ the part of the data,
and g = Σ_U wᵢ(pᵢ − yᵢ)xᵢ, H_U = Σ_U wᵢqᵢ xᵢxᵢᵀ the gradient and curvature of a group U. When the weights in U are multiplied by 1 + c (c = −1: left
out, c = 1: doubled) the optimum moves by the Newton step −c (H + cH_U)⁻¹ g. The expansion around "U looks like the data", H_U = ρH₀ with ρ the
share of U in all weights, is, with A = H + cρH₀,

    Δ = −c A⁻¹ g + A⁻¹ (H_U − ρH₀) A⁻¹ g      (c² = 1),

for c = −1 and Λ = 0 the second-order group influence of Basu, You and Feizi 2020 (arXiv 1911.00418). The penalty Λ is that of the whole objective,
so it stays when samples leave. A depends on the group only through ρ: in the basis Z with ZᵀHZ = 1 and ZᵀH₀Z = diag μ it is diagonal, 1 + cρμ, and a
group costs O(n p) without a single solve. The expansion fails for a group that holds nearly all samples of a feature, whose coefficient falls to zero
with it; there the Newton step itself is taken, which knows that, and the target, which is bounded, evaluated where it leads.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve, eigh

from robust_if.fairness.logistic import FittedLogistic
from robust_if.targets import Target

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]

#: A feature counts as emptied if a group takes all but this share of its variance with it,
LEFT = 0.05
#: and had been shown by this many samples.
SHOWN = 10
#: Numbers held at once, groups times samples.
BLOCK = 8_000_000


class Effects(Protocol):
    """Predicted decreases of a target for groups of training samples."""

    def many(self, groups: Mask) -> Array:
        """For masks ``(m, n)``, ``(m,)``; cheap, for a search."""

    def few(self, groups: Mask) -> Array:
        """The same as well as can be predicted, for the best of a search."""

    def emptied(self, group: Mask) -> NDArray[np.int64]:
        """Positions of the features that the rest of the samples would hardly show, for a mask ``(n,)``."""


@dataclass(frozen=True, eq=False)
class LogisticEffects:
    """Effects for logistic regression in closed form; the formulas stand at the top of this file.

    Args:
        fitted: the optimum.
        target: what should become lower.
        change: −1 leaves the groups out, 1 doubles them.
    """

    fitted: FittedLogistic = field(repr=False)
    target: Target
    change: int = -1

    def __post_init__(self) -> None:
        if self.change not in (-1, 1):
            raise ValueError(f"change: expected -1 (left out) or 1 (doubled), got {self.change}")
        fitted = self.fitted
        design, p = fitted.learner.design, fitted.probabilities
        curvature = fitted.weights * p * (1 - p)
        shares, basis = eigh((design * curvature[:, None]).T @ design, fitted.curvature)
        x = design @ basis
        gradients = (fitted.weights * (p - fitted.labels))[:, None] * x
        slope = basis.T @ fitted.gradients([self.target])[:, 0]
        found = {"x": x, "basis": basis, "shares": shares.clip(0, 1), "curvature": curvature, "gradients": gradients, "slope": slope}
        for name, value in found.items():
            object.__setattr__(self, f"_{name}", value)

    _x: Array = field(init=False, repr=False)
    _basis: Array = field(init=False, repr=False)
    _shares: Array = field(init=False, repr=False)
    _curvature: Array = field(init=False, repr=False)
    _gradients: Array = field(init=False, repr=False)
    _slope: Array = field(init=False, repr=False)

    def many(self, groups: Mask) -> Array:
        """To second order, the target taken as linear; groups that empty a feature as by :meth:`few`."""
        effects = self.second_order(groups)
        if self.change < 0:
            bad = np.flatnonzero(self._lost(groups).any(1))
            effects[bad] = self.few(groups[bad])
        return effects

    def second_order(self, groups: Mask) -> Array:
        """∇T · −Δ for masks ``(m, n)``, ``(m,)``."""
        rows = max(1, BLOCK // groups.shape[1])
        return np.concatenate([np.zeros(0), *(self._second_order(groups[at : at + rows]) for at in range(0, len(groups), rows))])

    def few(self, groups: Mask) -> Array:
        """T − T(θ + Δ) with the Newton step Δ of every group ``(m, n)``, ``(m,)``."""
        (before,) = self.fitted.values([self.target])
        return np.array([before - self._value(self.newton(group)) for group in groups], dtype=np.float64)

    def newton(self, group: Mask) -> Array:
        """The Newton step ``(p,)`` of the parameters for a mask ``(n,)``, the intercept last."""
        x = self._x[group]
        curvature = np.eye(x.shape[1]) + self.change * (x * self._curvature[group, None]).T @ x
        return np.asarray(self._basis @ (-self.change * cho_solve(cho_factor(curvature), self._gradients[group].sum(0))))

    def emptied(self, group: Mask) -> NDArray[np.int64]:
        """Features of which the group holds nearly all the variance."""
        return np.flatnonzero(self._lost(group[None])[0]) if self.change < 0 else np.empty(0, dtype=np.int64)

    def _second_order(self, groups: Mask) -> Array:
        inside = groups.astype(np.float64)
        share = (inside @ self.fitted.weights / self.fitted.weights.sum())[:, None]
        scale = 1 / (1 + self.change * share * self._shares)
        first, seen = scale * (inside @ self._gradients), scale * self._slope
        inside *= self._curvature
        inside *= first @ self._x.T
        inside *= seen @ self._x.T
        return np.asarray(self.change * (first @ self._slope) - inside.sum(1) + (share * self._shares * first * seen).sum(1))

    def _lost(self, groups: Mask) -> Mask:
        """Which features ``(d,)`` each group ``(m, n)`` empties, ``(m, d)``."""
        moments, shown = self._moments
        rows = max(1, BLOCK // groups.shape[1])
        found = [np.zeros((0, len(shown)), dtype=bool)]
        for at in range(0, len(groups), rows):
            left = moments.sum(0) - groups[at : at + rows].astype(np.float64) @ moments
            weight, (mean, square) = left[:, -1:].clip(1e-12), np.split(left[:, :-1], 2, axis=1)
            found.append((square - mean**2 / weight <= LEFT * self._variation) & shown)
        return np.concatenate(found)

    @cached_property
    def _moments(self) -> tuple[Array, Mask]:
        """Columns wx, wx² and w of the centred features, and which features enough samples show."""
        x, w = self.fitted.learner.x, self.fitted.weights
        centred = x - np.average(x, axis=0, weights=w)
        shown = (x[w > 0] != np.median(x[w > 0], axis=0)).sum(0) >= SHOWN
        return np.column_stack([centred * w[:, None], centred**2 * w[:, None], w]), shown

    @cached_property
    def _variation(self) -> Array:
        return np.asarray(np.split(self._moments[0].sum(0)[:-1], 2)[1])

    def _value(self, step: Array) -> float:
        own = self.fitted
        bias = float(step[-1]) if own.learner.intercept else 0.0
        moved = replace(own, coef=own.coef + step[: len(own.coef)], intercept=own.intercept + bias)
        return float(moved.values([self.target])[0])


@dataclass(frozen=True, eq=False)
class SummedScores:
    """Effects of any model as sums of the scores of single samples, to first order.

    Args:
        scores: ``(n,)`` predicted decrease of the target when the sample is left out.
        change: −1 leaves the groups out, 1 doubles them.
    """

    scores: Array
    change: int = -1

    def many(self, groups: Mask) -> Array:
        """See :meth:`Effects.many`."""
        return np.asarray(-self.change * (groups @ self.scores))

    def few(self, groups: Mask) -> Array:
        """See :meth:`Effects.few`."""
        return self.many(groups)

    def emptied(self, group: Mask) -> NDArray[np.int64]:
        """Nothing is known of the features here."""
        return np.empty(0, dtype=np.int64)
