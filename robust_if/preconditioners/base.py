"""What every preconditioner shares: (task, parameters, data) -> an approximate inverse of the damped curvature."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from robust_if.data import Samples
from robust_if.layers import Factors
from robust_if.pieces import Pieces, squares
from robust_if.sweep import Sweep
from robust_if.task import Params, Task


@dataclass(frozen=True, eq=False)
class Solution:
    """(C + λI)⁻¹ v, exactly or nearly.

    Args:
        direction: with the shapes of the parameters.
        notes: what a reader needs to distrust it: ``damping``; of an iterative solver also ``iterations``, ``residual`` (‖(C + λI) x − v‖ / ‖v‖) and
            ``converged``.
    """

    direction: Params
    notes: Mapping[str, Any] = field(default_factory=dict)


#: v -> (C + λI)⁻¹ v.
Inverse = Callable[[Params], Solution]


@runtime_checkable
class Quadratic(Protocol):
    """An inverse P that also measures the gradients of single samples, without a solution for each of them."""

    def __call__(self, vector: Params, /) -> Solution:
        """P v."""
        ...

    def quadratic(self, pieces: Pieces, power: int = 1) -> Tensor:
        """gᵢᵀ P gᵢ of every sample, ``(B,)``; with ``power`` 2 gᵢᵀ P² gᵢ, the squared length of P gᵢ."""
        ...


@runtime_checkable
class Several(Protocol):
    """An inverse P that takes many vectors at once, for less than one after another."""

    def several(self, vectors: Params) -> Params:
        """P v of every row of ``vectors``, ``(k, *shape)`` by name, in the same shapes."""
        ...


class Preconditioner(ABC):
    """How the curvature C of the mean training loss is approximated and inverted. Subclasses are frozen dataclasses.

    The damping λ means the same for all: it is added to the curvature of the mean loss, like an L2 penalty of λ/2 ‖θ‖². By default it is a tenth of
    the mean eigenvalue of C (of each layer's block, for layer-wise approximations), and the number that was used is reported.
    """

    #: Whether ``build`` passes over the per-sample gradients, so that keeping them in memory saves passes.
    reads_factors: ClassVar[bool] = False
    #: Whether (C + λI)⁻¹ v comes out in its own scale, so that a score predicts a change of the target; else it only ranks.
    to_scale: ClassVar[bool] = True
    #: Whether what ``build`` returns is :class:`Quadratic`.
    has_quadratic: ClassVar[bool] = False

    @property
    @abstractmethod
    def name(self) -> str:
        """Short name for tables and files, such as ``"ekfac"``."""

    def check(self, params: Params) -> None:
        """Raise a ``ValueError`` if the curvature of so many parameters cannot be had this way; called before any long work."""
        return

    @abstractmethod
    def build(self, task: Task, params: Params, data: Samples, sweep: Sweep, factors: Factors | None = None) -> Inverse:
        """The inverse at ``params``, ready to be applied to any number of directions.

        Args:
            data: the training data, over which the curvature is averaged.
            sweep: batch size and progress.
            factors: the per-sample gradients of ``data`` at ``params``, if they are at hand.
        """


@dataclass(frozen=True)
class Identity(Preconditioner):
    """No curvature: (C + λI)⁻¹ is replaced by I, which makes influence the inner product (IP, TracIn)."""

    to_scale: ClassVar[bool] = False
    has_quadratic: ClassVar[bool] = True

    @property
    def name(self) -> str:
        return "ip"

    def build(self, task: Task, params: Params, data: Samples, sweep: Sweep, factors: Factors | None = None) -> Inverse:
        return Unchanged()


@dataclass(frozen=True)
class Unchanged:
    """v -> v."""

    def __call__(self, vector: Params) -> Solution:
        return Solution(vector)

    def quadratic(self, pieces: Pieces, power: int = 1) -> Tensor:
        """‖gᵢ‖² of every sample, ``(B,)``, whatever the power."""
        return torch.stack([squares(each) for _, each in pieces]).sum(0)


def inverted(damped: Tensor, power: int = 1) -> Tensor:
    """Eigenvalues of C + λI to the power of −``power``; a direction with neither curvature nor damping is left out."""
    return torch.where(damped > 0, damped**-power, 0.0)
