"""Where poison passes a filter that looks at distances."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class FeasibleSet:
    """For each of two classes, the points near its mean: in a sphere around it, and in a slab across the line through both means.

    Args:
        means: ``(2, d)``.
        axis: ``(d,)``, the direction of that line, of length 1; zero where both means are the same.
        radius: ``(2,)``, of the spheres.
        width: ``(2,)``, from the mean to either side of the slab; no larger than the radius.

    Source: Koh, Steinhardt and Liang 2018, "Stronger Data Poisoning Attacks Break Data Sanitization Defenses" (arXiv 1811.00741).
    """

    means: Tensor
    axis: Tensor
    radius: Tensor
    width: Tensor

    @classmethod
    def of(cls, x: Tensor, y: Tensor, quantile: float) -> FeasibleSet:
        """The smallest spheres and the smallest slabs that hold the share ``quantile`` of each class of clean ``x (n, d)``, ``y (n,)``."""
        means = torch.stack([x[y == label].mean(0) for label in (0, 1)])
        apart = means[1] - means[0]
        axis = apart / apart.norm() if apart.any() else apart
        away = x - means[y]
        distances, along = away.norm(dim=1), (away @ axis).abs()
        radius, width = (torch.stack([values[y == label].quantile(quantile) for label in (0, 1)]) for values in (distances, along))
        return cls(means, axis, radius, torch.minimum(width, radius))

    def project(self, x: Tensor, y: Tensor) -> Tensor:
        """The nearest feasible points, ``(m, d)``, for points ``x`` of classes ``y``."""
        away, radius, width = x - self.means[y], self.radius[y][:, None], self.width[y][:, None]
        inside = _shortened(away, radius)
        along = (away @ self.axis)[:, None]
        across = _shortened(away - along * self.axis, (radius**2 - width**2).clamp(min=0).sqrt())
        edge = along.clamp(-width, width) * self.axis + across
        return self.means[y] + torch.where((inside @ self.axis)[:, None].abs() <= width, inside, edge)


def _shortened(vectors: Tensor, length: Tensor) -> Tensor:
    """Vectors ``(m, d)``, the longer ones shortened to ``length (m, 1)``."""
    lengths = vectors.norm(dim=1, keepdim=True).clamp(min=torch.finfo(vectors.dtype).tiny)
    shorter: Tensor = vectors * (length / lengths).clamp(max=1)
    return shorter
