"""How one sample is shown to a person: a thumbnail, a row or a text."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from robust_if.loading import Dataset

#: Side of a thumbnail in pixels, to which small images are enlarged by whole factors and large ones reduced.
SIDE = 96


def preview(data: Dataset, i: int) -> dict[str, Any]:
    """``image`` (a PNG as data URI), ``row`` (column to value) or ``text`` of sample ``i``; the other two are ``None``."""
    empty: dict[str, Any] = {"image": None, "row": None, "text": None}
    if not isinstance(data.features, pd.DataFrame):
        return empty | {"image": thumbnail(data.features[i])}
    row = {str(name): None if pd.isna(value) else str(value) for name, value in data.features.iloc[i].items()}
    if data.kind == "text":
        return empty | {"text": "\n".join(value for value in row.values() if value is not None)}
    return empty | {"row": row}


def thumbnail(pixels: np.ndarray) -> str:
    """A PNG data URI of an image ``(C, H, W)`` with values from 0 to 1; one channel is grey, of more than three the first three are shown."""
    levels = np.clip(np.rint(np.asarray(pixels) * 255), 0, 255).astype(np.uint8)
    image = Image.fromarray(levels[0] if len(levels) < 3 else np.moveaxis(levels[:3], 0, -1))
    longest = max(image.size)
    if longest < SIDE:
        factor = SIDE // longest
        image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    else:
        image.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
