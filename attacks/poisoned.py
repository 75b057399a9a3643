"""What every attack on training data returns: the tampered data and, apart from them, the truth.

Estimators and detectors take data alone, so that no truth and no knowledge of the attack can reach them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

D = TypeVar("D")


@dataclass(frozen=True, eq=False)
class Poisoned(Generic[D]):
    """Tampered data and, apart from them, the truth.

    Args:
        data: what the victim trains on; the ids are those of the original, and added samples have ids of their own.
        mask: ``(n,)``, true where the sample is poison: it was changed, and teaches what the attacker wants.
        covers: ``(n,)``, true where the sample was changed but keeps its right label, so that it hides the poison; none by default.

    Raises:
        ValueError: if nothing is poisoned, or a sample is both poison and cover.
    """

    data: D
    mask: NDArray[np.bool_] = field(repr=False)
    covers: NDArray[np.bool_] = field(default=None, repr=False)  # type: ignore[arg-type]

    def __post_init__(self) -> None:
        if self.covers is None:
            object.__setattr__(self, "covers", np.zeros_like(self.mask))
        if not self.mask.any():
            raise ValueError("poison: expected at least one poisoned sample, got none; raise the rate")
        if (self.mask & self.covers).any():
            raise ValueError("covers: a sample is either poison or cover, got both")


def number(rate: float, n: int, of: str = "samples") -> int:
    """How many of ``n`` samples a poisoning rate means, at least one and never all.

    Args:
        of: what the ``n`` samples are, for the message.

    Raises:
        ValueError: if the rate is not strictly between 0 and 1, or rounds to no sample or to all.
    """
    if not 0 < rate < 1:
        raise ValueError(f"rate: expected a share strictly between 0 and 1, got {rate}")
    count = round(rate * n)
    if not 0 < count < n:
        raise ValueError(
            f"rate: {rate} of {n} {of} is {'none' if count == 0 else 'all'} of them; expected at least one poisoned and one clean sample"
        )
    return count
