"""Labels, predictions and sensitive features that look like those of Adult."""

from __future__ import annotations

import numpy as np
import pandas as pd

N = 1500


def adult_like(seed: int = 0, n: int = N, classes: int = 2) -> tuple[np.ndarray, np.ndarray, pd.DataFrame]:
    """Labels, predictions that err in one of five, and two features on which both depend."""
    draw = np.random.default_rng(seed)
    frame = pd.DataFrame({"sex": draw.choice(["Female", "Male"], n), "race": draw.choice(["Black", "Other", "White"], n, p=[0.2, 0.1, 0.7])})
    score = draw.normal(size=n) + (frame["sex"] == "Male") - 0.5 * (frame["race"] == "Black")
    y = np.digitize(score, np.linspace(0.2, 1.0, classes - 1))
    return y, np.where(draw.uniform(size=n) < 0.2, draw.integers(classes, size=n), y), frame
