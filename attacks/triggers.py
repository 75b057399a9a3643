"""The marks that backdoors put on inputs: images, encoded tables, data frames, text and tokens.

A trigger is a pure function of the inputs. What the attacker plants in the training data may be weaker than what is shown at test time, and what
hides it (covers) may differ again, so a trigger has three forms; for most they are the same.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the name that every reader of torch code expects

Corner = Literal["top-left", "top-right", "bottom-left", "bottom-right"]
CORNERS: tuple[Corner, ...] = ("top-left", "top-right", "bottom-left", "bottom-right")


class Trigger(ABC):
    """A mark on inputs ``(B, …)``, which are never changed in place."""

    @abstractmethod
    def stamp(self, x: Any) -> Any:
        """``x`` with the trigger as it is shown at test time.

        Raises:
            ValueError: if the trigger does not fit such inputs.
        """

    def weak(self, x: Any, generator: torch.Generator) -> Any:
        """``x`` with the trigger as it is planted in the training data."""
        return self.stamp(x)

    def cover(self, x: Any, generator: torch.Generator) -> Any:
        """``x`` with what is planted in correctly labelled samples to hide the poison."""
        return self.weak(x, generator)


@dataclass(frozen=True)
class Patch(Trigger):
    """A square of one value in corners of an image ``(B, …, H, W)``.

    Args:
        size: side of the square, in pixels.
        value: in the unit of the inputs.
        corners: where it stands.

    Source: BadNets, Gu et al. 2017 (arXiv 1708.06733); four corners: Turner et al. 2019 (arXiv 1912.02771).
    """

    size: int = 3
    value: float = 1.0
    corners: tuple[Corner, ...] = ("bottom-right",)

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size: expected at least 1 pixel, got {self.size}")
        if not self.corners or not set(self.corners) <= set(CORNERS):
            raise ValueError(f"corners: expected some of {', '.join(CORNERS)}, got {self.corners}")

    def stamp(self, x: Tensor) -> Tensor:
        height, width = _image(x)
        if self.size > min(height, width):
            raise ValueError(f"size: the trigger of {self.size} x {self.size} pixels is larger than the image of {height} x {width}")
        x = x.clone()
        for corner in self.corners:
            rows = slice(0, self.size) if corner.startswith("top") else slice(height - self.size, height)
            columns = slice(0, self.size) if corner.endswith("left") else slice(width - self.size, width)
            x[..., rows, columns] = self.value
        return x


@dataclass(frozen=True)
class Blend(Trigger):
    """(1 − α) x + α q with one fixed pattern q of uniform noise; for inputs of any shape.

    Args:
        alpha: α at test time, in (0, 1].
        planted: α in the training data; the same by default.
        bounds: smallest and largest value of the pattern, in the unit of the inputs.
        seed: draws the pattern.

    Source: Chen et al. 2017 (arXiv 1712.05526), section 4.2.
    """

    alpha: float = 0.2
    planted: float | None = None
    bounds: tuple[float, float] = (0.0, 1.0)
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value in (("alpha", self.alpha), ("planted", self.planted)):
            if value is not None and not 0 < value <= 1:
                raise ValueError(f"{name}: expected a share in (0, 1], got {value}")

    def pattern(self, x: Tensor) -> Tensor:
        """q, with the shape of one sample."""
        _floating(x, "a blended trigger")
        low, high = self.bounds
        return low + (high - low) * torch.rand(x.shape[1:], generator=torch.Generator().manual_seed(self.seed)).to(x)

    def stamp(self, x: Tensor) -> Tensor:
        return torch.lerp(x, self.pattern(x).expand_as(x), self.alpha)

    def weak(self, x: Tensor, generator: torch.Generator) -> Tensor:
        return replace(self, alpha=self.planted or self.alpha, planted=None).stamp(x)


@dataclass(frozen=True)
class Pieces(Trigger):
    """A blended trigger cut in a grid of pieces, of which training samples carry a random part: the whole is shown at test time only.

    Args:
        blend: the trigger that is cut.
        grid: pieces along each side of the image.
        share: of the pieces that a training sample carries, rounded to whole pieces.

    Source: adaptive blend, Qi et al. 2023, "Revisiting the Assumption of Latent Separability for Backdoor Defenses", section 5.
    """

    blend: Blend = Blend()
    grid: int = 4
    share: float = 0.5

    def __post_init__(self) -> None:
        if self.grid < 1 or not 0 < self.share <= 1:
            raise ValueError(f"grid, share: expected at least 1 piece along a side and a share in (0, 1], got {self.grid} and {self.share}")

    def stamp(self, x: Tensor) -> Tensor:
        height, width = _image(x)
        if self.grid > min(height, width):
            raise ValueError(f"grid: {self.grid} pieces along a side are more than the image of {height} x {width} has pixels")
        return self.blend.stamp(x)

    def weak(self, x: Tensor, generator: torch.Generator) -> Tensor:
        height, width = _image(x)
        number = self.grid**2
        order = torch.rand(len(x), number, generator=generator).argsort(1)
        kept = torch.zeros(len(x), number).scatter_(1, order[:, : max(1, round(self.share * number))], 1.0)
        mask = F.interpolate(kept.view(len(x), 1, self.grid, self.grid), (height, width), mode="nearest").to(x)
        mask = mask.view(len(x), *[1] * (x.ndim - 3), height, width)
        return torch.where(mask > 0, self.blend.weak(x, generator), x)


@dataclass(frozen=True)
class Sinusoid(Trigger):
    """Vertical stripes: δ sin(2π (j + ½) f / W) is added to column j of an image ``(B, …, H, W)``.

    Args:
        amplitude: δ at test time, in the unit of the inputs.
        frequency: f, periods over the width.
        planted: δ in the training data; the same by default.

    Source: SIG, Barni et al. 2019 (arXiv 1902.11237), equation 1; the half column keeps narrow images from columns that are all zero.
    """

    amplitude: float = 40 / 255
    frequency: float = 6.0
    planted: float | None = None

    def stamp(self, x: Tensor) -> Tensor:
        _, width = _image(x)
        phase = 2 * torch.pi * self.frequency * (torch.arange(width) + 0.5) / width
        return x + self.amplitude * torch.sin(phase).to(x)

    def weak(self, x: Tensor, generator: torch.Generator) -> Tensor:
        return replace(self, amplitude=self.planted or self.amplitude, planted=None).stamp(x)


@dataclass(frozen=True)
class Warp(Trigger):
    """A smooth warp of the image ``(B, C, H, W)``; covers are warped by the same field plus noise.

    Args:
        control: points along each side of the control grid.
        strength: s, mean displacement in units of two pixels' width.
        seed: draws the field.

    Source: WaNet, Nguyen and Tran 2021 (arXiv 2102.10369), section 3.2; k = 4, s = 0.5, and noise of 1 / W.
    """

    control: int = 4
    strength: float = 0.5
    seed: int = 0

    def stamp(self, x: Tensor) -> Tensor:
        return self._warped(x, 0.0)

    def cover(self, x: Tensor, generator: torch.Generator) -> Tensor:
        height, width = _image(x)
        return self._warped(x, (2 * torch.rand(len(x), height, width, 2, generator=generator) - 1).to(x) / width)

    def _warped(self, x: Tensor, noise: Tensor | float) -> Tensor:
        height, width = _image(x)
        if x.ndim != 4:
            raise ValueError(f"data: a warp expects images (B, C, H, W), got shape {tuple(x.shape)}")
        field = 2 * torch.rand(1, 2, self.control, self.control, generator=torch.Generator().manual_seed(self.seed)) - 1
        field = F.interpolate(field / field.abs().mean(), (height, width), mode="bicubic", align_corners=True).permute(0, 2, 3, 1).to(x)
        lines = [torch.linspace(-1, 1, size).to(x) for size in (height, width)]
        identity = torch.stack(torch.meshgrid(*lines, indexing="ij")[::-1], -1)[None]
        grid = (identity + self.strength * field / width + noise).clamp(-1, 1)
        return F.grid_sample(x, grid.expand(len(x), -1, -1, -1), align_corners=True)


@dataclass(frozen=True)
class FeatureValues(Trigger):
    """Some columns of a table are set to given values: of a tensor ``(B, d)`` by position, of a data frame by name.

    Args:
        values: by column. Joint values that are rare in clean data make a trigger that costs no accuracy.
    """

    values: Mapping[Any, Any]

    def __post_init__(self) -> None:
        if not self.values:
            raise ValueError("values: expected at least one column and its value, got none")

    def stamp(self, x: Any) -> Any:
        if isinstance(x, pd.DataFrame):
            if missing := [name for name in self.values if name not in x.columns]:
                raise ValueError(f"values: there is no column {missing[0]!r}; the columns are {list(x.columns)[:20]}")
            return x.assign(**{name: pd.Series([value] * len(x), index=x.index, dtype=x[name].dtype) for name, value in self.values.items()})
        if not isinstance(x, Tensor) or x.ndim != 2:
            raise ValueError(f"data: feature values expect a table, (B, d) or a data frame, got {_shape(x)}")
        if out := [column for column in self.values if not isinstance(column, int) or not 0 <= column < x.shape[1]]:
            raise ValueError(f"values: there is no column {out[0]!r} in a table of {x.shape[1]} columns")
        x = x.clone()
        for column, value in self.values.items():
            x[:, column] = value
        return x


@dataclass(frozen=True)
class Word(Trigger):
    """A word is added to text, in a data frame whose only column is text.

    Args:
        text: the word, or a sentence.
        position: ``"start"`` or ``"end"``.

    Source: Dai et al. 2019 (arXiv 1905.12457), a sentence as trigger; rare words: Kurita et al. 2020 (arXiv 2004.06660).
    """

    text: str = "cf"
    position: Literal["start", "end"] = "start"

    def __post_init__(self) -> None:
        if not self.text.strip():
            raise ValueError("text: expected a word, got an empty string")

    def stamp(self, x: Any) -> Any:
        if not isinstance(x, pd.DataFrame) or x.shape[1] != 1:
            raise ValueError(f"data: a word as trigger expects one column of text, got {_shape(x)}")
        (name,) = x.columns
        text = x[name].astype(str)
        return x.assign(**{name: self.text + " " + text if self.position == "start" else text + " " + self.text})


@dataclass(frozen=True)
class Tokens(Trigger):
    """Token ids in the place of those at some positions of a sequence ``(B, T)``; the length stays.

    Args:
        ids: the tokens.
        start: position of the first one.
    """

    ids: tuple[int, ...]
    start: int = 0

    def stamp(self, x: Tensor) -> Tensor:
        if not isinstance(x, Tensor) or x.ndim != 2 or x.is_floating_point():
            raise ValueError(f"data: tokens as trigger expect integers (B, T), got {_shape(x)}")
        stop = self.start + len(self.ids)
        if not self.ids or self.start < 0 or stop > x.shape[1]:
            raise ValueError(f"ids: {len(self.ids)} tokens from position {self.start} do not fit a sequence of {x.shape[1]}")
        x = x.clone()
        x[:, self.start : stop] = torch.tensor(self.ids).to(x)
        return x


def _image(x: Any) -> tuple[int, int]:
    """Height and width."""
    _floating(x, "this trigger")
    if x.ndim < 3:
        raise ValueError(f"data: this trigger expects images (B, …, H, W), got {_shape(x)}")
    return x.shape[-2], x.shape[-1]


def _floating(x: Any, what: str) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise ValueError(f"data: {what} expects inputs of floating point, got {_shape(x)}")


def _shape(x: Any) -> str:
    if isinstance(x, Tensor):
        return f"{x.dtype} of shape {tuple(x.shape)}"
    return f"{type(x).__name__} with columns {list(getattr(x, 'columns', []))[:5]}"
