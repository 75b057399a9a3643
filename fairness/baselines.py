"""What to compare a repair with: two ways of weighting the training samples that look at groups and labels, and not at single samples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from robust_if.fairness.groups import Groups, at_least_two

Array = NDArray[np.float64]
Sampled = Literal["demographic_parity", "equal_opportunity", "equalized_odds"]
#: The classes in which :func:`fair_batch` changes the shares of the groups.
CLASSES: dict[str, tuple[int, ...]] = {"demographic_parity": (1, 0), "equal_opportunity": (1,), "equalized_odds": (1, 0)}


def kamiran_calders(y: Any, sensitive_features: Any, sample_weight: ArrayLike | None = None) -> Array:
    """Weights P(s) P(y) / P(s, y) ``(n,)``, under which the label does not depend on the group.

    Every group and every class keeps its total weight. Combinations that no sample has stay empty, so that with one of them independence cannot be
    had in full.

    Args:
        y: ``(n,)`` classes, any number of them.
        sensitive_features: ``(n,)`` or ``(n, k)`` categories; several columns mean their intersections.
        sample_weight: ``(n,)`` weights from 0 on that the samples have already; the probabilities are weighted with them, and the result takes their
            place.

    Raises:
        ValueError: if the lengths differ, a value is missing, a column holds measurements, all samples are of one group, or the weights are negative
            or all zero.

    Source: reweighing of Kamiran and Calders 2012, "Data preprocessing techniques for classification without discrimination", section 4.2.
    """
    classes, groups = Groups.of(y, name="y"), at_least_two(Groups.of(sensitive_features))
    _same_length(len(classes), groups)
    given = np.ones(len(groups)) if sample_weight is None else np.asarray(sample_weight, dtype=np.float64)
    if given.shape != (len(groups),) or not (np.isfinite(given).all() and (given >= 0).all() and given.any()):
        raise ValueError(f"sample_weight: expected {len(groups)} finite numbers from 0 on that are not all 0, got shape {given.shape}")
    joint = np.zeros((len(groups.values), len(classes.values)))
    np.add.at(joint, (groups.codes, classes.codes), given)
    expected = joint.sum(1, keepdims=True) * joint.sum(0) / joint.sum()
    factor = np.divide(expected, joint, out=np.zeros_like(joint), where=joint > 0)
    return np.asarray(given * factor[groups.codes, classes.codes])


@dataclass(frozen=True, eq=False)
class FairBatch:
    """What :func:`fair_batch` has found.

    Args:
        weights: ``(n,)`` to train the model with; their mean is 1.
        shares: ``(2, groups)`` share of every group among the samples of a class, as the batches would have it.
        gaps: ``(steps,)`` gap of the training samples' predictions before each step.
    """

    weights: Array
    shares: Array
    gaps: Array


def fair_batch(
    fit: Callable[[Array], ArrayLike], y: ArrayLike, sensitive_features: Any, notion: Sampled, *, steps: int = 50, rate: float = 0.005
) -> FairBatch:
    """Shares of the groups in a batch that make the model fair on its training samples, found step by step while it is trained.

    Each class keeps its share of a batch. Within a class, each step moves ``rate`` from one group to another: among the positive from the group with
    the highest rate of positive predictions to that with the lowest, among the negative the other way round. By notion, that rate is the true
    positive rate (``"equal_opportunity"``), the true positive or the false positive rate, whichever differs more (``"equalized_odds"``), or the rate
    of all samples, which moves both classes (``"demographic_parity"``).

    The original changes the sampler of a network's minibatches between epochs. Here weights in the full batch stand for it, which is the same in
    expectation and serves every model that takes sample weights, and every step trains the model. Groups are compared by decisions, the 0-1 loss,
    where the original takes the training loss; with two groups the steps are otherwise its own for equal opportunity and equalized odds, while for
    demographic parity the gap itself decides in place of its two parts.

    Args:
        fit: trains the model with weights ``(n,)`` and returns its predictions 0 or 1 for the training samples, ``(n,)``.
        y: ``(n,)`` labels, 0 or 1.
        sensitive_features: ``(n,)`` or ``(n, k)`` categories; several columns mean their intersections.
        notion: of fairness.
        steps: how often the model is trained; the weights are those after the last step.
        rate: share of a class that moves in one step.

    Raises:
        ValueError: if the notion is unknown, a label is neither 0 nor 1, a group lacks samples of a class whose shares change, ``steps`` or ``rate``
            is out of range, or the predictions are not 0 and 1.

    Source: Roh, Lee, Whang and Suh 2021, FairBatch (arXiv 2012.01696), algorithm 1.
    """
    labels, groups = np.asarray(y), at_least_two(Groups.of(sensitive_features))
    _same_length(len(labels), groups)
    if notion not in CLASSES:
        raise ValueError(f"notion: expected one of {', '.join(CLASSES)}, got {notion!r}")
    if labels.ndim != 1 or not np.isin(labels, (0, 1)).all():
        raise ValueError(f"y: expected one label 0 or 1 per sample, got shape {labels.shape} with the values {np.unique(labels)[:5].tolist()}")
    if steps < 1 or not 0 < rate < 1:
        raise ValueError(f"steps, rate: expected a whole number from 1 on and a number between 0 and 1, got {steps} and {rate}")
    labels = labels.astype(np.int64)
    present = np.flatnonzero(groups.sizes)
    codes = np.searchsorted(present, groups.codes)
    sizes = np.zeros((2, len(present)))
    np.add.at(sizes, (labels, codes), 1)
    for label in CLASSES[notion]:
        lacking = [groups.names[present[at]] for at in np.flatnonzero(sizes[label] == 0)]
        if lacking:
            raise ValueError(f"sensitive_features: expected samples of label {label} in every group, but {lacking[:5]} have none")
    start = sizes / np.maximum(sizes.sum(1, keepdims=True), 1)
    shares, gaps = start.copy(), []
    for _ in range(steps):
        rates = _rates(_decisions(fit(_weights(shares, start, labels, codes)), len(labels)), labels, codes, sizes, notion)
        spread = {label: float(np.ptp(rates[label])) for label in CLASSES[notion]}
        gaps.append(max(spread.values()))
        if not gaps[-1]:
            continue
        worst = max(spread, key=lambda label: spread[label])
        for label in (worst,) if notion == "equalized_odds" else CLASSES[notion]:
            low, high = int(rates[label].argmin()), int(rates[label].argmax())
            more, less = (low, high) if label else (high, low)
            moved = min(rate, shares[label, less])
            shares[label, more] += moved
            shares[label, less] -= moved
    return FairBatch(_weights(shares, start, labels, codes), shares, np.array(gaps))


def _weights(shares: Array, start: Array, labels: NDArray[np.int64], codes: NDArray[np.int64]) -> Array:
    ratio = np.divide(shares, start, out=np.zeros_like(start), where=start > 0)
    return np.asarray(ratio[labels, codes])


def _rates(decisions: Array, labels: NDArray[np.int64], codes: NDArray[np.int64], sizes: Array, notion: str) -> Array:
    """Rate of positive predictions by class and group ``(2, groups)``; for demographic parity that of the whole group in both rows."""
    positive = np.zeros_like(sizes)
    np.add.at(positive, (labels, codes), decisions)
    if notion == "demographic_parity":
        return np.tile(positive.sum(0) / sizes.sum(0), (2, 1))
    return np.divide(positive, sizes, out=np.zeros_like(sizes), where=sizes > 0)


def _decisions(predictions: ArrayLike, n: int) -> Array:
    found = np.asarray(predictions)
    if found.shape != (n,) or not np.isin(found, (0, 1)).all():
        raise ValueError(
            f"fit: expected it to return {n} predictions 0 or 1, got shape {found.shape} with the values {np.unique(found)[:5].tolist()}"
        )
    return found.astype(np.float64)


def _same_length(n: int, groups: Groups) -> None:
    if n != len(groups):
        raise ValueError(f"sensitive_features: expected one value for each of the {n} samples, got {len(groups)}")
