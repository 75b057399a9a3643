"""Where an attack may go: what a threat allows, as a ball around the clean inputs that is cut by their bounds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, Self

import torch
from torch import Tensor

from robust_if.task import Batch

#: A number, or a tensor that broadcasts to one sample, so that features may differ.
Limit = float | Tensor

#: Smallest and largest valid input.
Bounds = tuple[Limit, Limit]

Norm = Literal["linf", "l2"]

#: ``(point, slope, low, high) -> a valid input`` near ``point``, from ``low`` to ``high``; all ``(B, …)``, and ``slope`` is the last gradient.
Projection = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Threat:
    """What an attacker may do to an input: the threat model.

    Args:
        eps: radius of the ball around the clean input, in the unit of the inputs: a number, or a tensor that broadcasts to one sample.
        norm: ``"linf"`` or ``"l2"``.
        bounds: ``(low, high)``, the smallest and the largest valid input, given like ``eps``; none by default.
        mutable: boolean tensor that broadcasts to one sample, false where a feature must not move; all may by default.
        project: for inputs that are not valid everywhere, such as :class:`~robust_if.attacks.evasion.WholeNumbers`; L∞ only.
    """

    eps: Limit
    norm: Norm = "linf"
    bounds: Bounds | None = None
    mutable: Tensor | None = None
    project: tuple[Projection, ...] = ()

    def check(self, x: Tensor, name: str = "inputs") -> None:
        """Raise a ``ValueError`` if the threat does not fit the clean inputs ``x`` ``(B, …)``, see :func:`robust_if.attacks.evasion.box`."""
        box(x, self.eps, self.bounds, name, mutable=self.mutable)

    def scaled(self, factor: float) -> Threat:
        """The same with another radius; ``inf`` leaves the bounds alone."""
        return replace(self, eps=self.eps * factor)


def box(x: Tensor, eps: Limit, bounds: Bounds | None, name: str = "inputs", *, mutable: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The smallest and the largest input within ``eps`` of ``x`` in every feature and within ``bounds``, both with the shape of ``x``.

    Args:
        x: clean inputs ``(B, …)``.
        eps: at least 0, may be infinite.
        bounds: none if ``None``; an input just outside, by rounding, widens them for itself.
        name: what messages call ``x``.
        mutable: boolean, false where a feature must not move.

    Raises:
        ValueError: if ``x`` is not floating point, not finite or outside ``bounds``, a number is out of range, or a shape does not fit one sample.
    """
    if not x.is_floating_point():
        raise ValueError(f"{name}: an attack expects inputs of floating point, got {x.dtype}; tokens and whole numbers have no such neighbourhood")
    if not x.isfinite().all():
        raise ValueError(f"{name}: expected finite numbers, got NaN or infinity in sample {int((~x.isfinite()).nonzero()[0, 0])}")
    radius = _radius(x, eps, mutable)
    low, high = x - radius, x + radius
    if bounds is None:
        return low, high
    if not isinstance(bounds, (tuple, list)) or len(bounds) != 2:
        raise ValueError(f"bounds: expected (low, high), got {bounds}")
    least, most = (fit("bounds", bound, x) for bound in bounds)
    if not (least <= most).all():
        raise ValueError(f"bounds: expected (low, high) with low <= high, got {bounds}")
    span = most - least
    slack = 1e-5 * torch.where(span.isfinite(), span, x.abs())
    outside = ((x < least - slack) | (x > most + slack)).nonzero()
    if len(outside):
        sample, *feature = outside[0].tolist()
        limits, value = (float(least[tuple(feature)]), float(most[tuple(feature)])), float(x[(sample, *feature)])
        raise ValueError(f"bounds: expected {name} within {limits}, got {value:g} in sample {sample}, feature {tuple(feature)}")
    return low.maximum(least).minimum(x), high.minimum(most).maximum(x)


@dataclass(frozen=True, eq=False)
class Ball:
    """The inputs within the radius of the clean ones and within the bounds.

    Args:
        clean: ``(B, …)``.
        radius: with the shape of one sample, 0 where a feature must not move.
        low: the box of the ball and the bounds, ``(B, …)``.
        high: the same.
        norm: of the change, relative to the radius.
    """

    clean: Tensor
    radius: Tensor
    low: Tensor
    high: Tensor
    norm: Norm

    @classmethod
    def around(cls, clean: Tensor, threat: Threat) -> Self:
        """The ball that the threat allows around clean inputs ``(B, …)``.

        Raises:
            ValueError: as :func:`box`, if the norm is unknown, or the radius is infinite.
        """
        if threat.norm not in ("linf", "l2"):
            raise ValueError(f"norm: expected 'linf' or 'l2', got {threat.norm!r}")
        low, high = box(clean, threat.eps, threat.bounds, mutable=threat.mutable)
        radius = _radius(clean, threat.eps, threat.mutable)
        if not radius.isfinite().all():
            raise ValueError("eps: expected finite numbers, in the unit of the inputs, got an infinite one")
        return cls(clean, radius, low, high, threat.norm)

    def take(self, rows: Tensor) -> Ball:
        """The ball of the samples at the positions ``rows``."""
        return replace(self, clean=self.clean[rows], low=self.low[rows], high=self.high[rows])

    def step(self, slope: Tensor, length: Tensor) -> Tensor:
        """The step s of largest ⟨``slope``, s⟩ with ‖s / ``length``‖ ≤ 1, over the features that may move."""
        length = torch.where(self.radius > 0, length, 0)
        if self.norm == "linf":
            return length * slope.sign()
        scaled = length * slope
        return length * scaled / _norms(scaled).clamp(min=torch.finfo(slope.dtype).tiny)

    def clip(self, point: Tensor) -> Tensor:
        """The nearest input allowed, distances being relative to the radius."""
        if self.norm == "linf":
            return point.clamp(self.low, self.high)
        change, least, most = point - self.clean, self.low - self.clean, self.high - self.clean
        scale = torch.where(self.radius > 0, 1 / self.radius, 0)
        # The nearest is the change times a share, cut by the box, with the largest share that the ball leaves room for. Each round takes the entries
        # that are cut as given and finds the share of the others; it only grows, and with it the set that is cut, so this ends.
        share = (1 / _norms(scale * change)).clamp(max=1)
        while True:
            cut = (share * change).clamp(least, most)
            given = cut != share * change
            room = (1 - _norms(scale * cut * given) ** 2).clamp(min=0).sqrt()
            wider = (room / _norms(scale * change * ~given)).nan_to_num(nan=1.0).clamp(max=1).maximum(share)
            cut = (wider * change).clamp(least, most)
            if torch.equal(cut != wider * change, given):
                return (self.clean + cut).clamp(self.low, self.high)
            share = wider

    def random(self, generator: torch.Generator) -> Tensor:
        """Inputs drawn uniformly from the ball, then brought within the bounds; row by row, so that no batch size changes the draws."""
        moving = (self.radius > 0).reshape(1, -1)
        drawn = torch.rand(len(self.clean), moving.numel() + 1, generator=generator, dtype=torch.float64, device=generator.device).to(moving.device)
        if self.norm == "linf":
            change = 2 * drawn[:, 1:] - 1
        else:
            normal = torch.special.ndtri(drawn[:, 1:].clamp(min=1e-16)) * moving
            change = normal / _norms(normal) * drawn[:, :1] ** (1 / moving.sum())
        return self.clip(self.clean + self.radius * change.to(self.clean).view_as(self.clean).nan_to_num())


def check_input(batch: Batch, name: str = "batch") -> None:
    """Raise a ``ValueError`` unless the batch is ``(input, …)``; ``name`` is what the message calls it."""
    if not isinstance(batch, (tuple, list)) or not batch or not isinstance(batch[0], Tensor):
        raise ValueError(f"{name}: an attack expects batches (input, …) with the input as first tensor, got {type(batch).__name__}")


def fit(name: str, value: Limit, x: Tensor) -> Tensor:
    """``value`` with the shape of one sample of ``x``, on its device and in its type.

    Raises:
        ValueError: if it does not broadcast to that shape; the message calls it ``name``.
    """
    tensor = value if isinstance(value, Tensor) else torch.as_tensor(value, dtype=torch.float64)
    try:
        return tensor.to(x).expand(x.shape[1:])
    except RuntimeError as error:
        shapes = f"{tuple(x.shape[1:])}, got {tuple(tensor.shape)}"
        raise ValueError(f"{name}: expected a number, or a tensor that broadcasts to the shape of one sample, {shapes}") from error


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """One value per sample ``(B,)`` as ``(B, 1, …)``, with as many axes as ``like``."""
    return values.view(-1, *[1] * (like.ndim - 1))


def _radius(x: Tensor, eps: Limit, mutable: Tensor | None) -> Tensor:
    radius = fit("eps", eps, x)
    if not (radius >= 0).all():
        raise ValueError(f"eps: expected numbers of at least 0, in the unit of the inputs, got {float(radius.min()):g}")
    if mutable is None:
        return radius
    if torch.as_tensor(mutable).dtype != torch.bool:
        raise ValueError(f"mutable: expected a boolean tensor, got {torch.as_tensor(mutable).dtype}")
    return torch.where(fit("mutable", mutable, x) > 0, radius, 0)


def _norms(vectors: Tensor) -> Tensor:
    """The L2 norm of every sample, ``(B, 1, …)``, relative to its largest entry, since squares of small gradients vanish."""
    rows = vectors.reshape(len(vectors), -1)
    largest = rows.abs().amax(1, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny)
    return per_sample((largest * (rows / largest).norm(dim=1, keepdim=True))[:, 0], vectors)
