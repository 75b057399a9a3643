"""What metrics and the perfect filter know, and no other defence looks at: which training samples are bad, and which labels are right."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from robust_if.evaluations.suites.parts import Attacked, Scene


@dataclass(frozen=True, eq=False)
class Known(Scene):
    """A scene whose right labels are known.

    Args:
        right: ``(n,)`` labels of the training samples; an attack that adds samples adds theirs.
    """

    right: NDArray[np.int64] = field(kw_only=True)


def wrong(attacked: Attacked) -> NDArray[np.bool_] | None:
    """The training samples, ``(n,)``, that the attacker changed or put in or that were mislabelled before; ``None`` where neither is known."""
    known = [mask for mask in (attacked.bad, attacked.scene.mislabelled) if mask is not None]
    return np.asarray(np.logical_or.reduce(known), dtype=bool) if known else None


def right_labels(attacked: Attacked) -> NDArray[np.int64] | None:
    """The right labels of the training samples, ``(n,)``; ``None`` where they are unknown."""
    scene = attacked.scene
    return scene.right if isinstance(scene, Known) and len(scene.right) == len(scene.train) else None
