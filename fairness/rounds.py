"""What a round of a repair is judged by: the targets on validation data, softly and by hard decisions."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from robust_if.data import Samples, batches
from robust_if.fairness.leaks import same_samples
from robust_if.fairness.learners import Fitted, Learner
from robust_if.fairness.notions import Rate
from robust_if.fairness.targets import Contrast, FairnessGap
from robust_if.predictions import class_logits
from robust_if.targets import Functional, Target
from robust_if.task import Batch, Params, Task

logger = logging.getLogger(__name__)

Array = NDArray[np.float64]
Labels = NDArray[np.int64]

#: (weights, labels) -> hard decisions for the validation samples, of a model that the learner stands in for.
Judge = Callable[[Array, Labels], Labels]

#: What every round reports besides the gaps that are repaired: repairing one notion may harm another.
WATCHED = ("demographic_parity", "true_positive_rate_parity", "false_positive_rate_parity", "equalized_odds", "error_rate_parity")


@dataclass(frozen=True, eq=False)
class SoftError(Functional):
    """Share of wrong decisions with a soft threshold: accuracy with a gradient.

    Args:
        data: ``(x, y)``.
        temperature: of the soft threshold, as of :class:`~robust_if.fairness.targets.FairnessGap`; warmer, so that more samples carry a gradient.
    """

    is_mean = True
    temperature: float = field(default=0.5, kw_only=True)

    @property
    def name(self) -> str:
        return "soft_error"

    def moments(self, task: Task, params: Params, batch: Batch) -> Tensor:
        return Rate("error").of(task, params, batch, 0, self.temperature)[:, None]

    def reduce(self, means: Tensor) -> Tensor:
        return means[0]


@dataclass(frozen=True, eq=False)
class Round:
    """Training data after a round, and what the model says then on validation data.

    Args:
        weights: ``(n,)``.
        labels: ``(n,)``.
        predicted: soft value of every contrast and watched notion, and of ``"utility"``, as the scores of the round before predicted it.
        verified: the same by the refitted model.
        hard: contrasts and watched notions by hard decisions, signed where two groups are compared.
        accuracy: of hard decisions.
        decisions: hard decisions for the validation samples.
        fitted: the model.
    """

    weights: Array = field(repr=False)
    labels: Labels = field(repr=False)
    predicted: Mapping[str, float]
    verified: Mapping[str, float]
    hard: Mapping[str, float]
    accuracy: float
    decisions: Labels = field(repr=False)
    fitted: Fitted = field(repr=False)


@dataclass(frozen=True, eq=False)
class Validation:
    """The targets of a repair on validation data.

    Args:
        gaps: what should become fair.
        utility: what should stay low.
        samples: ``(x, y)`` on which decisions are judged.
        judge: decides in place of the fitted model.
    """

    gaps: tuple[FairnessGap, ...]
    utility: Target
    samples: Samples
    judge: Judge | None = None

    @classmethod
    def of(cls, learner: Learner, gaps: Sequence[FairnessGap], utility: Target | None, judge: Judge | None) -> Self:
        """With the soft error on training and validation data as utility unless another one is given.

        Raises:
            ValueError: if there is neither a gap nor a utility with validation data of its own, or these are the training data.
        """
        held_out = gaps[0].data if gaps else utility.data if isinstance(utility, Functional) else None
        if held_out is None:
            raise ValueError("gaps: expected at least one, or a utility on validation data, got none")
        if not gaps and same_samples(held_out, learner.train):
            raise ValueError("utility: its validation data are the training data; a repair must be judged on samples that nothing was trained on")
        x, y = held_out.batch(slice(None))[:2]
        mine, labels = learner.train.batch(slice(None))[:2]
        both = Samples((torch.cat([mine, x.to(mine)]), torch.cat([labels, y.to(labels)])))
        return cls(tuple(gaps), utility or SoftError(both), Samples((x, y)), judge)

    @cached_property
    def contrasts(self) -> dict[str, Functional]:
        """Every signed comparison that should become 0, by name."""
        return {contrast.name: contrast for gap in self.gaps for contrast in gap.signed()}

    @cached_property
    def watched(self) -> dict[str, Functional]:
        """The notions of :data:`WATCHED` between the groups of the first gap, signed where there are two."""
        if not self.gaps:
            return {}
        found: dict[str, Functional] = {}
        for notion in WATCHED:
            try:
                gap = replace(self.gaps[0], notion=notion, smallest=1)
            except ValueError as error:  # a group without positive samples has no true positive rate
                logger.warning("%s is not watched: %s", notion, error)
            else:
                found[notion] = gap.signed()[0] if len(gap.contrast_names) == 1 else gap
        return found

    @cached_property
    def targets(self) -> dict[str, Target]:
        """All of them: the contrasts first, then the watched notions, then ``"utility"``."""
        return {**self.contrasts, **self.watched, "utility": self.utility}

    def present(self, found: Round) -> Array:
        """The contrasts ``(m,)`` that a step has to bring to 0: the larger of soft and hard, or those of the judge, which has no soft ones."""
        hard, soft = (np.array([values[name] for name in self.contrasts]) for values in (found.hard, found.verified))
        return hard if self.judge else np.where(np.abs(hard) > np.abs(soft), hard, soft)

    def look(self, fitted: Fitted, weights: Array, labels: Labels, predicted: Mapping[str, float] | None = None) -> Round:
        """The round of a fitted model."""
        verified = dict(zip(self.targets, fitted.values(list(self.targets.values())), strict=True))
        decided = torch.from_numpy(self.judge(weights, labels)) if self.judge else decisions(fitted.task, self.samples)
        hard = {name: _hard(target, decided, verified[name]) for name, target in {**self.contrasts, **self.watched}.items()}
        accuracy = float((decided == self.samples.batch(slice(None))[1]).double().mean())
        return Round(weights, labels, predicted or verified, verified, hard, accuracy, decided.numpy(), fitted)


def decisions(task: Task, samples: Samples, batch_size: int = 4096) -> Tensor:
    """The class that the model decides for, ``(n,)``, on the CPU."""
    params = task.params()
    like = next(iter(params.values()))
    with torch.no_grad():
        return torch.cat([class_logits(task.outputs(params, batch)).argmax(1).cpu() for batch in batches(samples, batch_size, like)])


def _hard(target: Functional, decided: Tensor, soft: float) -> float:
    """A gap or contrast of hard decisions; its soft value where it compares something else."""
    gap = target.gap if isinstance(target, Contrast) else target
    assert isinstance(gap, FairnessGap)
    y, *columns = gap.data.batch(slice(None))[1:]
    means = []
    for cell in gap.cells:
        if cell.rate.statistic not in ("selection", "error"):
            return soft
        counted = decided == cell.positive if cell.rate.statistic == "selection" else decided != y
        means.append((counted & cell.holds(y, *columns)).double().mean())
    return float(target.reduce(torch.stack(means)))
