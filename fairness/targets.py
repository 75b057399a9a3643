"""Fairness gaps as targets."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Self

import torch
from torch import Tensor

from robust_if.targets import Functional
from robust_if.task import Batch, Params, Task


@dataclass(frozen=True, eq=False)
class DemographicParity(Functional):
    """(mean p | s = 1  −  mean p | s = 0)², p the predicted probability of ``positive``; 0 is parity.

    The data are ``(x, y, s)`` with the sensitive feature s in {0, 1} as third tensor. The square makes the gap two-sided; it is computed from
    probabilities, since decisions have no gradient.

    Args:
        data: held-out ``(x, y, s)``.
        positive: the class whose predicted probability is compared.

    Source: Li and Liu 2022 (arXiv 2202.00787), there signed and for logistic regression; Yang et al. 2026 (arXiv 2405.17490).
    """

    positive: int = field(default=1, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        tensors = self.data.batch(slice(None))
        groups = set(tensors[2].unique().tolist()) if len(tensors) > 2 else set()
        if groups != {0, 1}:
            raise ValueError(f"data: expected a sensitive feature with the values 0 and 1 as third tensor, got the values {sorted(groups)[:5]}")

    @property
    def name(self) -> str:
        return "demographic-parity"

    def minibatch(self, size: int, generator: torch.Generator) -> Self:
        """Half of the draws from each group, so that no minibatch lacks one."""
        if size >= len(self.data):
            return self
        sensitive = self.data.batch(slice(None))[2]
        rows = [torch.nonzero(sensitive == group)[:, 0] for group in (0, 1)]
        drawn = [row[torch.randperm(len(row), generator=generator)[: max(1, size // 2)]] for row in rows]
        return replace(self, data=self.data.take(torch.cat(drawn).numpy()))

    def moments(self, task: Task, params: Params, batch: Batch) -> Tensor:
        p = torch.softmax(task.outputs(params, batch), 1)[:, self.positive]
        s = batch[2].to(p)
        return torch.stack([s * p, s, (1 - s) * p, 1 - s], 1)

    def reduce(self, means: Tensor) -> Tensor:
        return (means[0] / means[1] - means[2] / means[3]) ** 2
