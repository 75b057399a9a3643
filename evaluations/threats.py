"""What an attacker may do to encoded data: a change of the data as a user knows them, in the units that a model gets."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
from pandas.api import types
from torch import Tensor

from robust_if.attacks.evasion import Norm, OneHot, Projection, Threat, WholeNumbers
from robust_if.encoding import Encoder
from robust_if.formats.parts import Features, is_free_text
from robust_if.loading import Dataset

#: Smallest step of whole numbers, relative to the largest encoded value, that single precision tells from none.
FINE = 3e-6


def threat_of(
    encoder: Encoder, train: Dataset, *held_out: Dataset, eps: float, norm: Norm = "linf", immutable: Collection[str] = (), categories: bool = False
) -> Threat:
    """What an attacker may do to the inputs that ``encoder`` makes of images or tables.

    Pixels of images move by ``eps``, a share of their range, and stay within it.

    Of a table, numbers and dates move by ``eps`` standard deviations of the training data, within the range that their column has in all data given.
    Whole numbers and days stay whole, so a column whose step is larger than ``eps`` does not move; where a step is too small for single precision
    they move freely. A missing cell stays missing, and no other becomes so. A missing cell of a column that has none in training cannot be told from
    the median, and moves as if it had been measured. Free text stays, since word weights near those of a text belong to no text. Numbers that are an
    embedding of something else cannot be told from measurements, and move, though nothing need have the embedding that results.

    Categories stay too: no distance between two of them could be compared with ``eps``, and to change one is a large move. With ``categories`` each
    may become any other of training, however small ``eps`` is; but a missing one stays, a rare one stays where it shares the indicator of unknown
    ones, and none becomes either.

    Args:
        encoder: fitted to ``train``.
        train: the training data.
        held_out: other data whose values count as valid, those that are attacked first of all; an input out of range is an error of the attack.
        eps: of images a share of the pixel range; of tables in standard deviations.
        norm: ``"linf"``, each feature on its own; ``"l2"``, all together, where nothing has to be whole, missing or a category.
        immutable: columns of a table that stay as they are.
        categories: whether categories may change.

    Raises:
        ValueError: if ``eps`` is not a positive number, a column is unknown, the data are text, a category that may change is unknown to training,
            nothing can move, or ``norm`` does not suit the data.
    """
    if not 0 < eps < np.inf:
        raise ValueError(f"eps: expected a positive number, got {eps}")
    if train.kind == "text":
        raise ValueError("data: expected images or a table; texts have no neighbourhood, since word weights near those of a text belong to no text")
    if isinstance(train.features, pd.DataFrame):
        unknown = [name for name in immutable if name not in train.features]
        if unknown:
            raise ValueError(f"immutable: there is no column {unknown[0]!r}; the columns are {list(train.features)[:20]}")
        return _of_table(encoder, (train, *held_out), eps, norm, immutable, categories)
    if eps > 1:
        raise ValueError(f"eps: of images it is a share of the pixel range, such as {8 / 255:.3f} for 8 of 255 grey levels; got {eps:g}")
    if immutable or categories:
        raise ValueError(f"{'immutable' if immutable else 'categories'}: expected none, since images have no columns")
    ends = np.ones((2, *encoder.shape), dtype=np.float32)
    ends[0] = 0
    black, white = _encoded(encoder, train, ends).unbind()
    return Threat(eps * (white - black), norm, (black, white))


@dataclass(frozen=True)
class Kept:
    """Features that stay as they are in the samples where an indicator, which must not move itself, has a given value.

    Args:
        indicator: position on the last axis of the inputs; it says that a cell is missing, or that its category is rare.
        on: its value where it says so.
        at: positions of the features.
        values: what they have there, the same in all such samples.
    """

    indicator: int
    on: float
    at: tuple[int, ...]
    values: tuple[float, ...]

    def __call__(self, point: Tensor, slope: Tensor, low: Tensor, high: Tensor) -> Tensor:
        columns, found = list(self.at), point.clone()
        kept = torch.tensor(self.values).to(point).clamp(low[..., columns], high[..., columns])
        stays = (point[..., self.indicator, None] - self.on).abs() < 1e-3
        found[..., columns] = torch.where(stays, kept, point[..., columns])
        return found


def _of_table(encoder: Encoder, data: Sequence[Dataset], eps: float, norm: Norm, immutable: Collection[str], categories: bool) -> Threat:
    train = data[0]
    assert isinstance(train.features, pd.DataFrame)
    x = torch.cat([encoder.samples(each).batch(slice(None))[0] for each in data])
    radius, kept, groups, whole = torch.zeros(x.shape[1]), list[Kept](), list[tuple[int, ...]](), dict[int, tuple[float, float]]()
    steps: dict[str, float] = {}
    for name in train.features.columns.difference([*immutable, *encoder.dropped], sort=False):
        column = train.features[name]
        if types.is_datetime64_any_dtype(column) or (types.is_numeric_dtype(column) and not types.is_bool_dtype(column)):
            number = _number(encoder, train, name)
            if number is None or (number.step or 0) * (1 - 1e-3) > eps:
                steps |= {} if number is None or number.step is None else {name: number.step}
                continue
            radius[number.at] = eps
            kept += number.kept
            if number.step is not None and number.step > FINE * float(x[:, number.at].abs().max()):
                whole[number.at] = (number.step, number.least)
        elif categories and not is_free_text(column):
            group, rare = _category(encoder, train, name)
            none = (x[:, group + rare].sum(1) == 0).nonzero()[:, 0].tolist()
            if none:
                value = pd.concat([pd.DataFrame(each.features)[name] for each in data]).iloc[none[0]]
                raise ValueError(f"categories: training does not know {value!r} of column {name!r}; name the column as immutable")
            if len(group) < 2:
                continue
            radius[list(group)] = 1
            groups.append(group)
            kept += [Kept(at, 1.0, group, (0.0,) * len(group)) for at in rare]
    if not radius.any():
        finest = min(steps, key=lambda name: steps[name], default=None)
        why = "no column may" if finest is None else f"the finest column of whole numbers, {finest!r}, has steps of {steps[finest]:.3g}"
        raise ValueError(f"eps: nothing can move by {eps:g} standard deviations; {why}")
    projections: list[Projection] = []
    if whole:
        unit, origin = (torch.tensor(each) for each in zip(*whole.values(), strict=True))
        projections.append(WholeNumbers(tuple(whole), unit, origin))
    projections += [OneHot(groups)] if groups else []
    projections += kept
    if norm != "linf" and projections:
        raise ValueError(f"norm: whole numbers, missing cells and categories need 'linf', got {norm!r}; or name their columns as immutable")
    return Threat(radius, norm, (x.amin(0), x.amax(0)), radius > 0, tuple(projections))


@dataclass(frozen=True)
class _Number:
    """How a column of numbers is encoded.

    Args:
        at: its position.
        least: its smallest value there.
        step: what one is there, if all values are whole.
        kept: what keeps its missing cells.
    """

    at: int
    least: float
    step: float | None
    kept: tuple[Kept, ...]


def _number(encoder: Encoder, train: Dataset, name: str) -> _Number | None:
    """Asked of the encoder itself; ``None`` if all values are the same."""
    assert isinstance(train.features, pd.DataFrame)
    column = train.features[name].reset_index(drop=True)
    smallest, largest, gone = _probed(encoder, train, name, [int(column.argmin()), int(column.argmax()), -1]).unbind()
    at = int((largest - smallest).argmax())
    span = float(largest[at] - smallest[at])
    if span == 0:
        return None
    away = column.dropna() - column.min()
    counts = (away / pd.Timedelta(days=1) if types.is_timedelta64_dtype(away) else away).to_numpy(dtype=np.float64)
    indicators = [each for each in (gone != smallest).nonzero()[:, 0].tolist() if each != at]
    kept = tuple(Kept(each, float(gone[each]), (at,), (float(gone[at]),)) for each in indicators)
    return _Number(at, float(smallest[at]), span / float(counts.max()) if (counts % 1 == 0).all() else None, kept)


def _category(encoder: Encoder, train: Dataset, name: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The positions of a column's categories, and that of the indicator which rare, unknown or missing ones have, if there is one.

    Asked of the encoder itself.
    """
    assert isinstance(train.features, pd.DataFrame)
    column = train.features[name].reset_index(drop=True)
    *known, gone = _probed(encoder, train, name, [*column.dropna().drop_duplicates().index.tolist(), -1])
    differ = torch.stack(known).ne(gone).any(0)
    return tuple((differ & (gone == 0)).nonzero()[:, 0].tolist()), tuple((differ & (gone == 1)).nonzero()[:, 0].tolist())


def _probed(encoder: Encoder, train: Dataset, name: str, rows: list[int]) -> Tensor:
    """The first training sample, encoded with the values that ``rows`` have in one column, ``(rows, d)``; −1 stands for a missing cell."""
    assert isinstance(train.features, pd.DataFrame)
    cells = train.features[name].reset_index(drop=True).reindex(rows).reset_index(drop=True)
    same = train.features.iloc[np.zeros(len(rows), dtype=np.int64)].reset_index(drop=True)
    return _encoded(encoder, train, same.assign(**{name: cells}))


def _encoded(encoder: Encoder, train: Dataset, features: Features) -> Tensor:
    """Any features, encoded, ``(n, …)``."""
    first = train.take(np.zeros(len(features), dtype=np.int64))
    x: Tensor = encoder.samples(replace(first, features=features, ids=np.arange(len(first)))).batch(slice(None))[0]
    return x
