"""Several objectives at once: which samples help one and hurt another, and which removals are worth considering.

Everything here is told the scores of one estimator for several targets, so to first order: leaving out a set of samples is predicted to lower each
target by the sum of their scores. Of sets of k samples, one is dominated if another promises no less for any target and more for one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations_with_replacement

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import linprog
from scipy.stats import rankdata

from robust_if.decisions import Weights, remove_top
from robust_if.scores import Scores

Array = NDArray[np.float64]

#: Steps from one corner to another of the usual grid of mixes, shared among the targets.
STEPS = 12
#: Predictions that differ by less, as a share of the most that so many removals can change, count as equal.
SAME = 1e-9


@dataclass(frozen=True, eq=False)
class Conflicts:
    """How far targets agree on which samples are harmful; made by :func:`conflicts`.

    Args:
        names: of the t targets.
        harm: ``(n, t)`` their scores.
        correlations: ``(t, t)`` Spearman's rank correlations of the scores; NaN with a target whose scores are all equal.
        together: ``(t, t)`` share of samples that harm both.
        against: ``(t, t)`` share of samples that harm the target of the row and help that of the column.
    """

    names: tuple[str, ...]
    harm: Array = field(repr=False)
    correlations: Array
    together: Array
    against: Array

    def sharpest(self, harmed: str, helped: str, k: int) -> NDArray[np.int64]:
        """Positions of the ``k`` samples, or as many as there are, that harm one target and help another most, the sharpest conflict first.

        A score counts in units of the target's mean absolute score, and a conflict is as sharp as the weaker of its two sides.

        Raises:
            ValueError: if a target is not known.
        """
        one, other = (self.harm[:, _at(self.names, name)] for name in (harmed, helped))
        sharpness = np.minimum(one / (np.abs(one).mean() or 1.0), -other / (np.abs(other).mean() or 1.0))
        order = np.argsort(-sharpness, kind="stable")[:k]
        return order[sharpness[order] > 0]


@dataclass(frozen=True, eq=False)
class Choice:
    """One way to weight the training samples, and what it promises.

    Args:
        mix: by target, what it counts in the trade-off; the values sum to 1.
        weights: ``(n,)`` for training: 1 keep, 0 remove; :func:`harmless` may leave a few in between.
        predicted: by target, the predicted decrease: the sum of the scores of what is removed. It is in units of the target if the scores are, and
            otherwise orders choices only.
    """

    mix: Mapping[str, float]
    weights: Weights = field(repr=False)
    predicted: Mapping[str, float]

    @property
    def removed(self) -> float:
        """How many samples are removed, parts of them included."""
        return float(len(self.weights) - self.weights.sum())


def conflicts(scores: Sequence[Scores]) -> Conflicts:
    """Rank correlations between targets, and the shares of samples on which they agree and disagree.

    Args:
        scores: of one estimator for t targets.

    Raises:
        ValueError: if there are none, or they are not of the same samples, one estimator and different targets.
    """
    names, harm = _matrix(scores)
    ranks = rankdata(harm, axis=0)
    ranks -= ranks.mean(0)
    with np.errstate(invalid="ignore"):
        unit = ranks / np.linalg.norm(ranks, axis=0)
    bad, good = (harm > 0).astype(float), (harm < 0).astype(float)
    return Conflicts(names, harm, np.clip(unit.T @ unit, -1, 1), bad.T @ bad / len(harm), bad.T @ good / len(harm))


def fronts(scores: Sequence[Scores]) -> NDArray[np.int64]:
    """The front of every sample, ``(n,)``: 0 where no other sample is at least as harmful to all targets and more to one, 1 without those, and so on.

    It needs no weights and no units; a sample of a low front is among the worst for some mix of the targets.

    Raises:
        ValueError: as :func:`conflicts`.

    Source: non-dominated sorting of Deb et al. 2002 (NSGA-II), section III; one sample after another with a binary search over the fronts so far, as
    Zhang et al. 2015 (ENS-BS, doi 10.1109/TEVC.2014.2308305) do.
    """
    _, harm = _matrix(scores)
    found = np.zeros(len(harm), dtype=np.int64)
    members: list[Array] = []
    sizes: list[int] = []
    for at in np.lexsort(-harm.T[::-1]):  # by the first target, then the second, …: nothing is dominated by what comes later
        point = harm[at]
        low, high = 0, len(members)
        while low < high:  # what a front dominates, all fronts before it dominate too
            middle = (low + high) // 2
            others = members[middle][: sizes[middle]]
            if ((others >= point).all(1) & (others > point).any(1)).any():
                low = middle + 1
            else:
                high = middle
        if low == len(members):
            members.append(np.empty((1, len(point))))
            sizes.append(0)
        if sizes[low] == len(members[low]):
            members[low] = np.concatenate([members[low], np.empty_like(members[low])])
        members[low][sizes[low]] = point
        sizes[low] += 1
        found[at] = low
    return found


def pareto(scores: Sequence[Scores], *, k: int | None = None, fraction: float | None = None, weightings: ArrayLike | None = None) -> list[Choice]:
    """Removals of ``k`` samples that trade the targets off: for every mix the set whose mixed scores are largest; dominated ones are left out.

    Before they are mixed, scores are divided by the sum of the target's k largest absolute scores, the most that k removals can change, so that no
    unit matters. Ties are broken by the even mix, and then by the order of the data; a single target gives what
    :func:`~robust_if.decisions.remove_top` gives.

    Args:
        scores: of one estimator for t targets.
        k: how many samples every choice removes; or
        fraction: the share of all, rounded down.
        weightings: ``(m, t)`` what each target counts, at least 0 and not all 0; by default the corners and the even mix with a grid between them.

    Returns:
        At most m choices with different weights, in the order of ``weightings``. A set that lies inside the hull of others is best for no mix and not
        among them.

    Raises:
        ValueError: as :func:`conflicts`, if not exactly one of ``k`` and ``fraction`` is given, or weightings are malformed.
    """
    names, harm = _matrix(scores)
    size = _size(scores[0], k, fraction)
    mixes = _mixes(len(names)) if weightings is None else _checked(weightings, names)
    unit = harm / _reach(harm, size)
    even = unit.mean(1)
    removals: dict[bytes, tuple[Array, NDArray[np.int64]]] = {}
    for mix in mixes:
        # one target alone is not divided by anything: rounding may not change its order
        mixed = unit @ mix if np.count_nonzero(mix) > 1 else harm @ mix
        rows = np.sort(np.lexsort((-even, -mixed))[:size])
        removals.setdefault(rows.tobytes(), (mix, rows))
    gains = np.stack([unit[rows].sum(0) for _, rows in removals.values()])
    return [_choice(names, harm, mix, rows) for at, (mix, rows) in enumerate(removals.values()) if not _dominated(gains[at], gains)]


def harmless(scores: Sequence[Scores], best: str, *, k: int | None = None, fraction: float | None = None) -> Choice:
    """The removal that is predicted to lower one target most and to raise no other.

    maximise  Σ s_best,ᵢ xᵢ   subject to  Σ s_j,ᵢ xᵢ ≥ 0 for every other target j,  Σ xᵢ ≤ k,  0 ≤ x ≤ 1,

    with the scores s; weights are 1 − x. At most t of them are neither 0 nor 1, since a vertex has no more fractional entries than there are rows.
    Removing nothing fulfils the demands, so there always is a solution.

    Args:
        scores: of one estimator for t targets.
        best: name of the target that is to fall.
        k: the most samples that are removed; or
        fraction: the share of all, rounded down.

    Raises:
        ValueError: as :func:`pareto`, if ``best`` is not among the targets, or the solver fails.
    """
    names, harm = _matrix(scores)
    at, size = _at(names, best), _size(scores[0], k, fraction)
    unit = harm / _reach(harm, size)
    others = np.delete(unit, at, axis=1)
    rows, most = np.vstack([-others.T, np.ones(len(harm))]), np.append(np.zeros(others.shape[1]), size)
    found = linprog(-unit[:, at], A_ub=rows, b_ub=most, bounds=(0, 1), method="highs")
    if found.x is None:
        raise ValueError(f"scores: the linear programme of {len(harm)} samples and {len(names)} targets was not solved: {found.message}")
    weights = 1 - np.where(np.abs(found.x - np.rint(found.x)) < SAME, np.rint(found.x), found.x)
    mix = {name: float(name == best) for name in names}
    return Choice(mix, weights, dict(zip(names, ((1 - weights) @ harm).tolist(), strict=True)))


def _choice(names: tuple[str, ...], harm: Array, mix: Array, rows: NDArray[np.int64]) -> Choice:
    weights = np.ones(len(harm))
    weights[rows] = 0.0
    return Choice(dict(zip(names, mix.tolist(), strict=True)), weights, dict(zip(names, harm[rows].sum(0).tolist(), strict=True)))


def _matrix(scores: Sequence[Scores]) -> tuple[tuple[str, ...], Array]:
    """Names of the targets, and their scores ``(n, t)``, checked."""
    if not scores:
        raise ValueError("scores: expected those of at least one target, got none")
    first, names = scores[0], tuple(each.target for each in scores)
    for each in scores:
        if (each.estimator, each.units) != (first.estimator, first.units):
            raise ValueError(
                f"scores: expected one estimator, got {first.name} in units {first.units!r} and {each.name} in units {each.units!r}"
            )  # fmt: skip
        if not np.array_equal(each.ids, first.ids):
            raise ValueError(f"scores: {each.name} and {first.name} are of different samples, or in a different order")
    if len(set(names)) < len(names):
        raise ValueError(f"scores: expected different targets, got {', '.join(names)}")
    return names, np.stack([each.values for each in scores], axis=1)


def _at(names: tuple[str, ...], name: str) -> int:
    if name not in names:
        raise ValueError(f"target: expected one of {', '.join(names)}, got {name!r}")
    return names.index(name)


def _size(scores: Scores, k: int | None, fraction: float | None) -> int:
    return int(np.count_nonzero(remove_top(scores, k=k, fraction=fraction) == 0))


def _reach(harm: Array, size: int) -> Array:
    """By target the most that ``size`` removals can change, ``(t,)``; 1 where that is nothing."""
    reach = np.sort(np.abs(harm), axis=0)[::-1][: max(size, 1)].sum(0)
    return np.where(reach > 0, reach, 1.0)


def _mixes(targets: int) -> Array:
    """Corners, even mix, and the points between them that a lattice on the simplex has."""
    steps = max(2, STEPS // targets)
    counts = [np.bincount(each, minlength=targets) for each in combinations_with_replacement(range(targets), steps)]
    return np.unique(np.vstack([np.stack(counts) / steps, np.full(targets, 1 / targets)]), axis=0)[::-1]


def _checked(weightings: ArrayLike, names: tuple[str, ...]) -> Array:
    mixes = np.asarray(weightings, dtype=np.float64)
    if mixes.ndim != 2 or mixes.shape[1] != len(names) or not len(mixes):
        raise ValueError(f"weightings: expected shape (m, {len(names)}), a column for each of {', '.join(names)}, got {mixes.shape}")
    if not np.isfinite(mixes).all() or (mixes < 0).any() or not mixes.any(1).all():
        raise ValueError("weightings: expected finite numbers of at least 0, one of every row above 0")
    return np.asarray(mixes / mixes.sum(1, keepdims=True))


def _dominated(gain: Array, others: Array) -> bool:
    return bool(((others >= gain).all(1) & (others > gain + SAME).any(1)).any())
