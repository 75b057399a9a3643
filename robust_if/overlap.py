"""Which training samples use the same parts of a model as a query: gradients compared without their signs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the name that every reader of torch code expects

from robust_if.data import as_samples
from robust_if.pieces import dense
from robust_if.store import factors_of
from robust_if.sweep import Sweep
from robust_if.task import Params, Task

#: The smaller side of a weight up to which two gradients are compared: it enters the cost by its square.
LARGEST = 64
#: Numbers that the comparison of one block of samples with all queries may hold.
CHUNK = 2**24


@dataclass(frozen=True)
class Overlap:
    """Σ_l ‖G_i W G_qᵀ‖²_F / (‖G_i W G_iᵀ‖_F ‖G_q W G_qᵀ‖_F) over the parameters l, of samples i and queries q: large is related.

    G is a sample's gradient as a matrix, the smaller side first: of the matrices of LoRA the rank, so that its rows lie among the inputs of A, and
    the outputs of B. Two samples are alike where they use the same inputs and move the same outputs, whatever the adapter's own axes do and
    whichever way the loss goes. W = (C + λ)⁻¹ takes away what all samples share: C is the mean of GᵀG / ‖G‖² over the training samples, λ is
    ``damping`` times its mean eigenvalue.

    Signed products answer another question, whether a sample lowered the loss of a query. In a model that has learnt a task its samples do so, or
    the opposite, by chance, and stand at both ends of the ranking. This form finds them.

    Args:
        damping: λ in units of the mean eigenvalue of C.

    Raises:
        ValueError: for a damping that is not positive.

    Source: this project.
    """

    damping: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.damping < np.inf:
            raise ValueError(f"damping: expected a positive number, got {self.damping}")

    @property
    def name(self) -> str:
        """Short name for tables and files."""
        return "overlap"

    def check(self, task: Task) -> None:
        """Raise a ``ValueError`` unless all parameters that count are matrices with a side of up to 64; called before any long work."""
        for name, value in task.params().items():
            if value.ndim != 2 or min(value.shape) > LARGEST:
                raise ValueError(
                    f"parameters: the overlap compares matrices with a side of up to {LARGEST}, such as an adapter's; "
                    f"{name} has shape {tuple(value.shape)}"
                )

    def pairs(self, task: Task, train: Any, queries: Any, *, sweep: Sweep = Sweep()) -> NDArray[Any]:  # noqa: B008 - frozen
        """The overlap of every training sample (row) with every query (column), ``(n, q)``, from 0 to the number of parameters that count.

        Two passes over the gradients of the training samples, which are kept where they fit in memory. Memory for the queries: theirs whole.

        Raises:
            ValueError: if a parameter is no matrix, or one with both sides longer than 64; name others by ``Task.parameters``.
        """
        self.check(task)
        params = task.params()
        rows, columns = (factors_of(task, params, as_samples(data), sweep) for data in (train, queries))
        asked = {name: torch.cat(parts) for name, parts in _by_name(columns.blocks(), params).items()}
        totals: Params = {}
        for _, pieces in sweep.progress(rows.blocks(), "overlap: what all share"):
            for name, each in pieces:
                unit = F.normalize(_matrices(dense(each), params[name]).flatten(1)).view(len(each[0]), *_shape(params[name])).flatten(0, 1)
                totals[name] = totals.get(name, 0) + unit.mT @ unit
        roots = {name: self._root(total) for name, total in totals.items()}
        asked = {name: each @ roots[name] for name, each in asked.items()}
        found = []
        for _, pieces in sweep.progress(rows.blocks(), "overlap"):
            parts = [_overlap(_matrices(dense(each), params[name]) @ roots[name], asked[name]) for name, each in pieces]
            found.append(torch.stack(parts).sum(0).cpu())
        matrix: NDArray[Any] = torch.cat(found).numpy()
        return matrix

    def _root(self, total: Tensor) -> Tensor:
        """The root of W, up to a factor, which no quotient sees."""
        values, vectors = torch.linalg.eigh(total)
        damped = (values.clamp(min=0) + self.damping * values.mean()).clamp(min=torch.finfo(values.dtype).tiny)
        root: Tensor = vectors / damped.sqrt() @ vectors.mT
        return root


def _shape(parameter: Tensor) -> tuple[int, int]:
    small, large = sorted(parameter.shape)
    return small, large


def _matrices(grads: Tensor, parameter: Tensor) -> Tensor:
    """Gradients ``(B, size)`` as ``(B, smaller side, larger side)``."""
    matrices = grads.reshape(-1, *parameter.shape)
    return matrices if parameter.shape[0] <= parameter.shape[1] else matrices.mT


def _by_name(blocks: Iterable[tuple[slice, Any]], params: Params) -> dict[str, list[Tensor]]:
    found: dict[str, list[Tensor]] = {name: [] for name in params}
    for _, pieces in blocks:
        for name, each in pieces:
            found[name].append(_matrices(dense(each), params[name]))
    return found


def _overlap(rows: Tensor, columns: Tensor) -> Tensor:
    """‖G_i G_qᵀ‖²_F of ``(B, r, d)`` and ``(Q, r, d)``, scaled to 1 for a gradient and itself, ``(B, Q)``; a gradient of 0 overlaps with none."""
    count, side = len(columns), rows.shape[1]
    step = max(1, CHUNK // (count * side**2))
    parts = [
        (some.flatten(0, 1) @ columns.flatten(0, 1).mT).view(len(some), side, count, side).square().sum((1, 3)) for some in torch.split(rows, step)
    ]
    scales = [torch.linalg.matrix_norm(each @ each.mT) for each in (rows, columns)]
    scale = scales[0][:, None] * scales[1]
    return torch.where(scale > 0, torch.cat(parts) / scale, 0.0)
