"""Cosines between the gradients of samples and directions, of whole gradients or layer by layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from robust_if.layout import smallest
from robust_if.pieces import Piece, Pieces, products, squares
from robust_if.task import Params


class Directions(Protocol):
    """What the gradients of B samples are multiplied with: Q directions, such as the gradients of Q queries, preconditioned or not."""

    def products(self, name: str, pieces: list[Piece]) -> Tensor:
        """The products of one parameter's gradients, ``(B, Q)``."""
        ...

    def squares(self, name: str) -> Tensor:
        """Σ_j v²_qj of the parameter's entries j, ``(Q,)``."""
        ...


@dataclass(frozen=True, eq=False)
class Stacked:
    """Directions that are held whole: ``(Q, *shape)`` by name."""

    directions: Params

    def products(self, name: str, pieces: list[Piece]) -> Tensor:
        """The products of one parameter's gradients, ``(B, Q)``."""
        return products(pieces, self.directions[name])

    def squares(self, name: str) -> Tensor:
        """Σ_j v²_qj of the parameter's entries j, ``(Q,)``."""
        return (self.directions[name].flatten(1) ** 2).sum(1)


def cosines(pieces: Pieces, directions: Directions, by_layer: bool) -> Tensor:
    """Cosines between every sample's gradient and every direction, ``(B, Q)``: of the whole gradients, or averaged over the layers.

    A layer is a module, its weight and bias together. A gradient of 0 points nowhere: its cosine counts as 0.
    """
    dots: dict[str, Tensor] = {}
    norms: dict[str, Tensor] = {}
    lengths: dict[str, Tensor] = {}
    for name, found in pieces:
        # a gradient that has to be formed is formed once
        layer, form = name.rpartition(".")[0] if by_layer else "", [smallest(found)]
        dots[layer] = dots.get(layer, 0) + directions.products(name, form)
        norms[layer] = norms.get(layer, 0) + squares(form)
        lengths[layer] = lengths.get(layer, 0) + directions.squares(name)
    scales = {layer: norms[layer].sqrt()[:, None] * lengths[layer].sqrt() for layer in dots}
    return torch.stack([torch.where(scales[layer] > 0, dot / scales[layer], 0.0) for layer, dot in dots.items()]).mean(0)
