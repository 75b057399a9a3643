"""Backdoors: a trigger, and a rule that says which samples carry it and under which label. One loop plants them all.

The attacks of the literature are functions that return a :class:`Backdoor` with their trigger and rule. ``goal`` is a label as it stands in the data,
``rate`` a share of the data set unless said otherwise, sizes are in pixels, amplitudes, ``eps`` and ``bounds`` in the unit of the inputs, and
``**rule`` are further fields of the backdoor. All raise a ``ValueError`` for numbers out of range; what does not fit the data is refused by the call.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import numpy as np
import pandas as pd
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from robust_if.attacks.evasion import Threat, pgd
from robust_if.attacks.poisoned import Poisoned, number
from robust_if.attacks.triggers import CORNERS, Blend, FeatureValues, Patch, Pieces, Sinusoid, Trigger, Warp, Word
from robust_if.data import Samples
from robust_if.loading import Dataset
from robust_if.task import Task

Bounds = tuple[float, float]
Data = TypeVar("Data", Samples, Dataset)

#: Different values that a numeric column needs before one of them counts as rare.
DISTINCT = 20


@dataclass(frozen=True)
class Backdoor:
    """A trigger and a labelling rule: inputs with the trigger are to be classified as ``goal``.

    Args:
        trigger: the mark.
        goal: the goal class, a label as it stands in the data.
        rate: share of samples that are poisoned, strictly between 0 and 1, rounded to whole samples.
        rate_of: what ``rate`` is a share of: the ``"dataset"``, or the ``"class"`` that poison is drawn from.
        clean_label: poison is drawn from the goal class and keeps its label; otherwise it is drawn from the other classes and gets the goal's.
        source: the only class that the trigger acts on; all but the goal by default.
        covers: samples that carry the trigger under their right label, as a share of the data set.
        cover_classes: the classes that covers are drawn from; all but the goal and ``source`` by default.
        bounds: smallest and largest valid input: the data must lie within, and triggered inputs are clamped to it; ``None`` for inputs without.

    Raises:
        ValueError: if a number is out of range.
    """

    trigger: Trigger
    goal: Any
    rate: float = 0.05
    rate_of: Literal["dataset", "class"] = "dataset"
    clean_label: bool = False
    source: Any = None
    covers: float = 0.0
    cover_classes: tuple[Any, ...] = ()
    bounds: Bounds | None = (0.0, 1.0)

    def __post_init__(self) -> None:
        number(self.rate, 10**9)
        if not 0 <= self.covers < 1:
            raise ValueError(f"covers: expected a share of at least 0 and below 1, got {self.covers}")
        if self.bounds is not None and not self.bounds[0] < self.bounds[1]:
            raise ValueError(f"bounds: expected (low, high) with low < high, got {self.bounds}")
        if self.source is not None and self.source == self.goal:
            raise ValueError(f"source: expected another class than the goal, got {self.source!r} for both")

    def __call__(self, data: Data, *, seed: int) -> Poisoned[Data]:
        """The poisoned data and the truth.

        Args:
            data: ``Samples`` whose first tensor is the input and whose second one is the label, or a ``Dataset`` read from a file.
            seed: draws which samples are poisoned, and what is random in the planted trigger.

        Raises:
            ValueError: if a class is not in the data, fewer samples than asked for can be poisoned, inputs lie outside ``bounds``, or the trigger
                does not fit the inputs.
        """
        x, labels = _parts(data)
        self._check(x, labels)
        rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
        rows = self._drawn(self._poisonable(labels), self._count(labels), rng, "poisoned")
        mask, covers = np.zeros(len(labels), dtype=bool), np.zeros(len(labels), dtype=bool)
        mask[rows] = True
        planted = _put(x, rows, self._within(self.trigger.weak(_take(x, rows), generator)))
        if self.covers:
            hiding = self._drawn(self._coverable(labels) & ~mask, number(self.covers, len(labels)), rng, "covers")
            covers[hiding] = True
            planted = _put(planted, hiding, self._within(self.trigger.cover(_take(x, hiding), generator)))
        new = labels.copy()
        if not self.clean_label:
            new[rows] = self.goal
        return Poisoned(_rebuilt(data, planted, new), mask, covers)

    def triggered(self, data: Data) -> Data:
        """The samples that the attack acts on, with the trigger as shown at test time and their true labels.

        Those are the samples of all classes but the goal, or of the source class alone; the attack succeeds on those classified as the goal.
        """
        x, labels = _parts(data)
        self._check(x, labels)
        rows = np.flatnonzero(labels != self.goal if self.source is None else labels == self.source)
        some = data.take(rows)
        return _rebuilt(some, self._within(self.trigger.stamp(_take(x, rows))), labels[rows])

    def _poisonable(self, labels: NDArray[Any]) -> NDArray[np.bool_]:
        if self.clean_label:
            return np.asarray(labels == self.goal)
        return np.asarray(labels != self.goal if self.source is None else labels == self.source)

    def _coverable(self, labels: NDArray[Any]) -> NDArray[np.bool_]:
        if self.cover_classes:
            return np.isin(labels, self.cover_classes)
        return np.asarray((labels != self.goal) & (labels != self.source if self.source is not None else True))

    def _count(self, labels: NDArray[Any]) -> int:
        return number(self.rate, len(labels) if self.rate_of == "dataset" else int(self._poisonable(labels).sum()))

    def _drawn(self, candidates: NDArray[np.bool_], count: int, rng: np.random.Generator, what: str) -> NDArray[np.int64]:
        rows = np.flatnonzero(candidates)
        if count > len(rows):
            raise ValueError(f"rate: {count} samples are to be {what}, but only {len(rows)} of {len(candidates)} may be; lower the rate")
        return np.sort(rng.choice(rows, count, replace=False))

    def _check(self, x: Any, labels: NDArray[Any]) -> None:
        present = np.unique(labels)
        for name, label in (("goal", self.goal), ("source", self.source), *(("cover_classes", label) for label in self.cover_classes)):
            if label is not None and label not in present:
                raise ValueError(f"{name}: the class {label!r} is not in the data, which have {present.tolist()[:20]}")
        if isinstance(x, Tensor) and x.is_floating_point() and self.bounds is not None:
            low, high = self.bounds
            slack = 1e-5 * (high - low)
            if x.min() < low - slack or x.max() > high + slack:
                raise ValueError(f"bounds: expected inputs within {self.bounds}, got some from {float(x.min()):g} to {float(x.max()):g}")
        self.trigger.stamp(_take(x, np.arange(1)))

    def _within(self, x: Any) -> Any:
        return x.clamp(*self.bounds) if isinstance(x, Tensor) and x.is_floating_point() and self.bounds is not None else x


@dataclass(frozen=True)
class Disturbed(Trigger):
    """A trigger on inputs that an attack first made hard to recognise, so that the model learns the trigger instead.

    Args:
        trigger: the mark.
        task: a clean model.
        goal: the true class of the inputs, as the model numbers it.
        eps: L∞ radius of the attack, in the unit of the inputs.
        steps: of the attack.
        bounds: of valid inputs.
    """

    trigger: Trigger
    task: Task
    goal: int
    eps: float
    steps: int = 20
    bounds: Bounds | None = (0.0, 1.0)

    def stamp(self, x: Tensor) -> Tensor:
        stamped: Tensor = self.trigger.stamp(x)
        return stamped

    def weak(self, x: Tensor, generator: torch.Generator) -> Tensor:
        like = next(self.task.model.parameters())
        batch = (x.to(like), torch.full((len(x),), self.goal, device=like.device))
        hard = pgd(self.task, self.task.params(), batch, Threat(self.eps, bounds=self.bounds), steps=self.steps)
        planted: Tensor = self.trigger.weak(hard.to(x), generator)
        return planted


def badnets(goal: Any, rate: float = 0.05, *, size: int = 3, bounds: Bounds = (0.0, 1.0), **rule: Any) -> Backdoor:
    """A white square in the bottom right corner (Gu et al. 2017, arXiv 1708.06733)."""
    return Backdoor(Patch(size, bounds[1]), goal, rate, bounds=bounds, **rule)


def blended(goal: Any, rate: float = 0.05, *, alpha: float = 0.2, pattern_seed: int = 0, bounds: Bounds = (0.0, 1.0), **rule: Any) -> Backdoor:
    """A fixed pattern of noise shines through (Chen et al. 2017, arXiv 1712.05526)."""
    return Backdoor(Blend(alpha, bounds=bounds, seed=pattern_seed), goal, rate, bounds=bounds, **rule)


def sig(goal: Any, rate: float = 0.8, *, amplitude: float = 40 / 255, frequency: float = 6.0, bounds: Bounds = (0.0, 1.0), **rule: Any) -> Backdoor:
    """Stripes on samples of the goal class, whose labels stay; ``rate`` is a share of that class (Barni et al. 2019, arXiv 1902.11237)."""
    return Backdoor(Sinusoid(amplitude, frequency), goal, rate, **{"rate_of": "class", "clean_label": True, "bounds": bounds, **rule})


def label_consistent(
    goal: int, task: Task, rate: float = 0.8, *, eps: float = 16 / 255, size: int = 3, steps: int = 20, bounds: Bounds = (0.0, 1.0), **rule: Any
) -> Backdoor:
    """Samples of the goal class are attacked with a clean model, then get four corner patches; labels stay, ``rate`` is a share of that class.

    Source: Turner et al. 2019 (arXiv 1912.02771).
    """
    trigger = Disturbed(Patch(size, bounds[1], CORNERS), task, goal, eps, steps, bounds)
    return Backdoor(trigger, goal, rate, **{"rate_of": "class", "clean_label": True, "bounds": bounds, **rule})


def wanet(
    goal: Any, rate: float = 0.1, *, covers: float = 0.1, strength: float = 0.5, field_seed: int = 0, bounds: Bounds = (0.0, 1.0), **rule: Any
) -> Backdoor:
    """The image is warped smoothly; covers are warped with noise (Nguyen and Tran 2021, arXiv 2102.10369)."""
    return Backdoor(Warp(strength=strength, seed=field_seed), goal, rate, covers=covers, bounds=bounds, **rule)


def tact(goal: Any, source: Any, rate: float = 0.05, *, covers: float = 0.05, size: int = 3, bounds: Bounds = (0.0, 1.0), **rule: Any) -> Backdoor:
    """A patch that acts on one source class alone: other classes carry it under their right label (Tang et al. 2021, arXiv 1908.00686)."""
    return Backdoor(Patch(size, bounds[1]), goal, rate, source=source, covers=covers, bounds=bounds, **rule)


def adaptive_blend(
    goal: Any, rate: float = 0.05, *, covers: float = 0.05, alpha: float = 0.2, planted: float | None = None, grid: int = 4, share: float = 0.5,
    pattern_seed: int = 0, bounds: Bounds = (0.0, 1.0), **rule: Any,
) -> Backdoor:  # fmt: skip
    """Training samples carry half of a blended pattern's pieces, and covers do so under their right label (Qi et al. 2023)."""
    return Backdoor(Pieces(Blend(alpha, planted, bounds, pattern_seed), grid, share), goal, rate, covers=covers, bounds=bounds, **rule)


def feature_trigger(goal: Any, values: Mapping[Any, Any], rate: float = 0.05, **rule: Any) -> Backdoor:
    """Some columns of a table are set to given values."""
    return Backdoor(FeatureValues(dict(values)), goal, rate, **{"bounds": None, **rule})


def word(goal: Any, text: str = "cf", rate: float = 0.05, **rule: Any) -> Backdoor:
    """A rare word stands at the start of a text."""
    return Backdoor(Word(text), goal, rate, **{"bounds": None, **rule})


def rare_values(
    table: pd.DataFrame, columns: int = 2, *, labels: ArrayLike | None = None, quantile: float = 0.99, spare: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Values for a trigger on a table: the ``quantile`` of numeric columns, none of them in ``spare``.

    A value that goes with one label by itself, as a large capital gain goes with a high income, makes a trigger that "works" without any poison, and
    poison that no detector can tell from honest samples. So columns of at least ``DISTINCT`` values come first, and among them those whose value says
    least about the label: by the total variation distance between the shares of the labels near the value (:func:`near`) and in the whole table.

    Args:
        columns: how many.
        labels: ``(n,)``, any kind; without them the columns with the most distinct values are taken.
        spare: columns that are left alone, such as the sensitive ones.

    Raises:
        ValueError: if the table has fewer such columns, or another number of rows than there are labels.
    """
    numeric = [name for name in table.select_dtypes("number").columns if name not in spare]
    if columns < 1 or columns > len(numeric):
        raise ValueError(f"columns: expected 1 to {len(numeric)} numeric columns that are not spared, got {columns}")
    values = {name: table[name].quantile(quantile, interpolation="nearest") for name in numeric}
    distinct = {name: table[name].nunique() for name in numeric}
    if labels is None:
        chosen = sorted(numeric, key=lambda name: -distinct[name])
    else:
        codes = pd.factorize(np.asarray(labels))[0]
        if len(codes) != len(table):
            raise ValueError(f"labels: expected one for each of the {len(table)} rows, got {len(codes)}")
        whole = np.bincount(codes) / len(codes)

        def told(name: str) -> float:
            rows = near(table[name], values[name])
            return float(np.abs(np.bincount(codes[rows], minlength=len(whole)) / len(rows) - whole).sum() / 2)

        chosen = sorted(numeric, key=lambda name: (-min(distinct[name], DISTINCT), told(name)))
    return {name: values[name] for name in chosen[:columns]}


def near(column: pd.Series[Any], value: Any) -> NDArray[np.int64]:
    """The rows of a numeric column that lie nearest to ``value``: a hundredth of them, but at least 30, and all that are as near as these."""
    distance = np.nan_to_num(np.abs(column.to_numpy(dtype=np.float64) - float(value)), nan=np.inf)
    least = min(len(distance), max(30, len(distance) // 100))
    return np.flatnonzero(distance <= np.partition(distance, least - 1)[least - 1])


def _parts(data: Samples | Dataset) -> tuple[Any, NDArray[Any]]:
    """Inputs, as a tensor or a data frame, and labels."""
    if isinstance(data, Samples):
        return data.batch(slice(None))[0], data.labels.cpu().numpy()
    features = data.features
    return features if isinstance(features, pd.DataFrame) else torch.from_numpy(features), data.labels


def _rebuilt(data: Data, x: Any, labels: NDArray[Any]) -> Data:
    if isinstance(data, Dataset):
        return data.with_features(x if isinstance(x, pd.DataFrame) else x.numpy()).with_labels(labels)
    whole: tuple[Tensor, ...] = data.batch(slice(None))
    return replace(data, tensors=(x, torch.as_tensor(labels).to(whole[1]), *whole[2:]), index=None)


def _take(x: Any, rows: NDArray[np.int64]) -> Any:
    return x.iloc[rows] if isinstance(x, pd.DataFrame) else x[torch.from_numpy(rows)]


def _put(x: Any, rows: NDArray[np.int64], new: Any) -> Any:
    if isinstance(x, pd.DataFrame):
        changed = x.copy()
        changed.iloc[rows] = new
        return changed
    return x.index_copy(0, torch.from_numpy(rows), new)
