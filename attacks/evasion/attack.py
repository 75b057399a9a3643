"""An attack as settings: a threat and how it is searched; applied to any model and batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

from torch import Tensor

from robust_if.attacks.evasion.ascent import apgd, fgsm, pgd, step_length
from robust_if.attacks.evasion.ball import Limit, Threat
from robust_if.attacks.evasion.losses import Loss
from robust_if.targets import Functional
from robust_if.task import Batch, Params, Task


@dataclass(frozen=True)
class Attack(ABC):
    """A search for inputs, within a threat model, that a fixed model gets wrong.

    What happens to a sample depends on no other sample, so no batch size changes it beyond rounding. It is the same every time: what is random comes
    from ``seed``. The model's modes, buffers, flags and gradients stay as they are, and the global random state is neither read nor changed.
    """

    threat: Threat

    @property
    @abstractmethod
    def name(self) -> str:
        """Short name for tables, such as ``"pgd-10"``."""

    @abstractmethod
    def __call__(self, task: Task, params: Params, batch: Batch) -> Tensor:
        """The attacked inputs, detached, with the shape of the inputs.

        Args:
            params: the parameters at which the model is attacked.
            batch: ``(input, …)``, the input of shape ``(B, …)`` and floating point; labels come second, where they are needed.

        Raises:
            ValueError: as :func:`robust_if.attacks.evasion.pgd` does.
        """

    def first_error(self, task: Task, params: Params, batch: Batch) -> Tensor:
        """As a call, but the search for a sample may end at the first point that the model gets wrong, which is then returned for it.

        An attack that finds errors on its way, or can save time by it, overrides this.
        """
        return self(task, params, batch)


@dataclass(frozen=True)
class FGSM(Attack):
    """One step, see :func:`robust_if.attacks.evasion.fgsm`."""

    loss: Loss | None = field(default=None, kw_only=True)

    @property
    def name(self) -> str:
        return "fgsm"

    def __call__(self, task: Task, params: Params, batch: Batch) -> Tensor:
        return fgsm(task, params, batch, self.threat, loss=self.loss)


@dataclass(frozen=True)
class PGD(Attack):
    """Projected gradient ascent from the clean input, see :func:`robust_if.attacks.evasion.pgd`.

    Raises:
        ValueError: if ``steps`` or ``alpha`` is out of range.
    """

    steps: int = field(default=10, kw_only=True)
    alpha: Limit | None = field(default=None, kw_only=True)
    loss: Loss | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        step_length(self.alpha, self.threat.eps, self.steps)

    @property
    def name(self) -> str:
        return f"pgd-{self.steps}"

    def __call__(self, task: Task, params: Params, batch: Batch) -> Tensor:
        return pgd(task, params, batch, self.threat, steps=self.steps, alpha=self.alpha, loss=self.loss)


@dataclass(frozen=True)
class APGD(Attack):
    """Auto-PGD from the clean input, see :func:`robust_if.attacks.evasion.apgd`.

    Raises:
        ValueError: if ``steps`` is out of range.
    """

    steps: int = field(default=100, kw_only=True)
    loss: Loss | None = field(default="ce", kw_only=True)

    def __post_init__(self) -> None:
        step_length(None, self.threat.eps, self.steps)

    @property
    def name(self) -> str:
        return f"apgd-{self.loss}" if isinstance(self.loss, str) else "apgd"

    def __call__(self, task: Task, params: Params, batch: Batch) -> Tensor:
        return apgd(task, params, batch, self.threat, steps=self.steps, loss=self.loss)

    def first_error(self, task: Task, params: Params, batch: Batch) -> Tensor:
        counts = not isinstance(self.loss, Functional)  # a target does not tell errors from its value
        return apgd(task, params, batch, self.threat, steps=self.steps, loss=self.loss, first_error=counts)
