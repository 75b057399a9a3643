"""Fairness gaps as targets: rates of groups on held-out data, compared.

Every rate is a mean over the samples of one cell (a group, within a stratum of the control features, among the positive or negative samples), and
every comparison is linear in the rates; cell sizes are constants of the data. A gap is therefore the largest absolute value of some contrasts
C · means, and its gradient at the parameters that of the contrast which is largest there, with its sign: two-sided, and exact under streaming.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from typing import Any, Literal

import numpy as np
import torch
from scipy.linalg import block_diag
from torch import Tensor

from robust_if.data import Samples, as_samples
from robust_if.fairness.cells import Cell, cells_of, columns_of
from robust_if.fairness.groups import Groups, at_least_two
from robust_if.fairness.leaks import same_samples
from robust_if.fairness.notions import NOTIONS, Method
from robust_if.targets import Functional
from robust_if.task import Batch, Params, Task


@dataclass(frozen=True, eq=False)
class FairnessGap(Functional):
    """How far a rate differs between groups, 0 if it does not; on the scale of the rate.

    Args:
        data: held-out ``(x, y, s)``, or ``(x, y, s, c)``, with the group s and the stratum c of every sample as whole numbers; :func:`fairness_gap`
            makes them from columns.
        notion: one of :data:`~robust_if.fairness.notions.NOTIONS`.
        positive: the class whose prediction is the benefit; ``None`` compares every class among the labels.
        temperature: of the soft threshold: decisions are softmax(logits / temperature), which is the predicted probability at 1 and the hard
            decision at 0. At 0.25 soft and hard gaps agree to a few thousandths, and still many samples carry a gradient.
        method: groups are compared with each other, or with the rate of all (fairlearn's words).
        agg: of several rates, classes and strata the largest gap or the mean (fairlearn's words).
        smallest: cells with fewer samples are refused, unless ``shrink`` is given.
        shrink: m > 0 draws the rate of a cell of n samples to that of all, (n · own + m · all) / (n + m); cells without a sample are left out.
        groups: names of the groups.
        strata: names of the strata.

    Raises:
        ValueError: if the notion is unknown, fewer than two groups are there to compare, a cell is too small, or the notion asks for classes and
            ``positive`` is none of the labels, or these are no classes.

    Source: relaxed gaps as in Li and Liu 2022 (arXiv 2202.00787) and Yang et al. 2026 (arXiv 2405.17490), there signed, on probabilities and for two
    groups; covariance Zafar et al. 2017 (arXiv 1507.05259), equation 2; loss gap Donini et al. 2018 (arXiv 1802.08626), section 2.
    """

    notion: str = field(default="demographic_parity", kw_only=True)
    positive: int | None = field(default=1, kw_only=True)
    temperature: float = field(default=0.25, kw_only=True)
    method: Method = field(default="between_groups", kw_only=True)
    agg: Literal["worst_case", "mean"] = field(default="worst_case", kw_only=True)
    smallest: int = field(default=10, kw_only=True)
    shrink: float = field(default=0.0, kw_only=True)
    groups: tuple[str, ...] = field(default=(), kw_only=True)
    strata: tuple[str, ...] = field(default=(), kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, known in (("notion", tuple(NOTIONS)), ("method", ("between_groups", "to_overall")), ("agg", ("worst_case", "mean"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: expected one of {', '.join(known)}, got {getattr(self, name)!r}")
        if not 0 < self.temperature < np.inf or not 0 <= self.shrink < np.inf or self.smallest < 1:
            got = f"{self.temperature}, {self.shrink} and {self.smallest}"
            raise ValueError(f"temperature, shrink, smallest: expected numbers above 0, from 0 on, and from 1 on, got {got}")
        if self.positive is not None and (not isinstance(self.positive, (int, np.integer)) or self.positive < 0):
            raise ValueError(f"positive: expected the number of a class, or None for every class, got {self.positive!r}")
        if not self.contrast_names:
            raise ValueError("data: expected two groups with samples in some cell, got none")

    @property
    def name(self) -> str:
        return self.notion

    def check(self, train: Samples) -> None:
        if same_samples(self.data, train):
            raise ValueError(
                f"target: the validation data of {self.notion} are the training data; a gap must be measured on samples that nothing was trained on"
            )

    def moments(self, task: Task, params: Params, batch: Batch) -> Tensor:
        rate = NOTIONS[self.notion].rates[0]
        given = task.losses(params, batch) if rate.statistic == "loss" else task.outputs(params, batch)
        values = {cell.positive: given for cell in self.cells}
        if rate.statistic != "loss":
            values = {positive: rate.of_outputs(given, batch[1], positive, self.temperature) for positive in values}
        return torch.stack([values[cell.positive] * cell.holds(*batch[1:]) for cell in self.cells], 1)

    def reduce(self, means: Tensor) -> Tensor:
        gaps = self.contrasts(means)
        if NOTIONS[self.notion].compare != "highest":
            gaps = gaps.abs()
        largest = torch.stack([block.amax() for block in torch.split(gaps, self._comparisons[2])])
        return largest.amax() if self.agg == "worst_case" else largest.mean()

    def contrasts(self, means: Tensor) -> Tensor:
        """The signed comparisons ``(m,)``, named in ``contrast_names``, from the means of the moments."""
        return self._comparisons[1].to(means) @ means

    @property
    def contrast_names(self) -> tuple[str, ...]:
        """Names of the signed comparisons, such as ``"sex=Male − sex=Female"``."""
        return self._comparisons[0]

    def signed(self) -> tuple[Contrast, ...]:
        """Every comparison as a target of its own, with its sign: what a repair keeps within bounds on both sides."""
        return tuple(Contrast(self.data, gap=self, row=row, batch_size=self.batch_size) for row in range(len(self.contrast_names)))

    def minibatch(self, size: int, generator: torch.Generator) -> Functional:
        """As many draws from every cell, so that no minibatch lacks one; each cell counts as much as among all samples."""
        return self if size >= len(self.data) else Draw.of(self, self, size, generator)

    @cached_property
    def cells(self) -> tuple[Cell, ...]:
        """The cells that hold samples, in the order of the moments."""
        settings: dict[str, Any] = {name: getattr(self, name) for name in ("smallest", "shrink", "groups", "strata")}
        return cells_of(self._columns, NOTIONS[self.notion], self.positive, **settings)

    @cached_property
    def _columns(self) -> tuple[Tensor, ...]:
        return columns_of(self.data, NOTIONS[self.notion])

    @cached_property
    def _comparisons(self) -> tuple[tuple[str, ...], Tensor, list[int]]:
        """Names of the contrasts, the matrix ``(m, cells)`` that makes them from the means of the moments, and how many belong together."""
        notion, names, matrices, counts = NOTIONS[self.notion], [], [], []
        for _, together in groupby(self.cells, lambda cell: (cell.rate, cell.positive, cell.stratum)):
            block = list(together)
            sizes = np.array([cell.n for cell in block])
            pairs, matrix = notion.comparisons(sizes, self.method, self.shrink)
            matrices.append(matrix * len(self.data) / sizes)
            counts += [len(pairs)] if pairs else []
            for at, other in pairs:
                against = "" if notion.compare == "highest" else f" − {'all' if other is None else block[other].who}"
                names.append(block[at].who + against + block[at].where)
        return tuple(names), torch.from_numpy(block_diag(*matrices)), counts


@dataclass(frozen=True, eq=False)
class Contrast(Functional):
    """One signed comparison of a :class:`FairnessGap`, the one with number ``row``; made by :meth:`FairnessGap.signed`."""

    gap: FairnessGap = field(kw_only=True)
    row: int = field(kw_only=True)

    @property
    def name(self) -> str:
        return f"{self.gap.notion}: {self.gap.contrast_names[self.row]}"

    @property
    def cells(self) -> tuple[Cell, ...]:
        """The cells of the gap, in the order of the moments."""
        return self.gap.cells

    def check(self, train: Samples) -> None:
        self.gap.check(train)

    def moments(self, task: Task, params: Params, batch: Batch) -> Tensor:
        return self.gap.moments(task, params, batch)

    def reduce(self, means: Tensor) -> Tensor:
        return self.gap.contrasts(means)[self.row]

    def minibatch(self, size: int, generator: torch.Generator) -> Functional:
        return self if size >= len(self.data) else Draw.of(self, self.gap, size, generator)


@dataclass(frozen=True, eq=False)
class Draw(Functional):
    """A gap or contrast on some of its samples, whose means are scaled so that every cell counts as much as among all samples."""

    whole: Functional = field(kw_only=True)
    scale: Tensor = field(kw_only=True)

    @classmethod
    def of(cls, whole: Functional, gap: FairnessGap, size: int, generator: torch.Generator) -> Draw:
        """As many samples from every cell of the gap, at least one."""
        share = max(1, size // len(gap.cells))
        inside = [torch.nonzero(cell.holds(*gap._columns))[:, 0] for cell in gap.cells]
        rows = torch.unique(torch.cat([each[torch.randperm(len(each), generator=generator)[:share]] for each in inside]))
        drawn = torch.stack([torch.isin(rows, each).sum() for each in inside])
        scale = torch.tensor([cell.n for cell in gap.cells]).double() / len(gap.data) * len(rows) / drawn
        return cls(whole.data.take(rows.numpy()), whole=whole, scale=scale, batch_size=whole.batch_size)

    @property
    def name(self) -> str:
        return self.whole.name

    def moments(self, task: Task, params: Params, batch: Batch) -> Tensor:
        return self.whole.moments(task, params, batch)

    def reduce(self, means: Tensor) -> Tensor:
        return self.whole.reduce(means * self.scale.to(means))

    def minibatch(self, size: int, generator: torch.Generator) -> Functional:
        return self if size >= len(self.data) else self.whole.minibatch(size, generator)


def fairness_gap(
    notion: str,
    valid: Any,
    sensitive_features: Any,
    *,
    control_features: Any = None,
    **settings: Any,
) -> FairnessGap:
    """The gap of a notion on validation data, from columns.

    Args:
        notion: one of :data:`~robust_if.fairness.notions.NOTIONS`, for example ``"equal_opportunity"``.
        valid: held-out ``(x, y)``, with classes as whole numbers; a floating-point y is the outcome of a regression.
        sensitive_features: ``(n,)`` or ``(n, k)`` categories of the same samples; several columns mean their intersections. Or :class:`Groups`.
        control_features: the same for strata within which groups are compared.
        **settings: further arguments of :class:`FairnessGap`.

    Raises:
        ValueError: if a feature is constant, has missing values or measurements, or is of another length, or a cell is too small.
    """
    samples = as_samples(valid)
    given = {"sensitive_features": sensitive_features} | ({} if control_features is None else {"control_features": control_features})
    found = {name: Groups.of(features, name=name) for name, features in given.items()}
    for name, each in found.items():
        if len(each) != len(samples):
            raise ValueError(f"{name}: expected one value for each of the {len(samples)} validation samples, got {len(each)}")
    at_least_two(found["sensitive_features"])
    whole = samples.batch(slice(None))
    if not isinstance(whole, (tuple, list)) or len(whole) < 2:
        raise ValueError("valid: expected (x, y)")
    held_out = Samples((*whole[:2], *(torch.from_numpy(each.codes) for each in found.values())), samples.ids)
    strata = found["control_features"].names if "control_features" in found else ()
    return FairnessGap(held_out, notion=notion, groups=found["sensitive_features"].names, strata=strata, **settings)
