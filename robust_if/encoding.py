"""Features and labels as numbers, by rules learnt from the training data alone.

Images are normalised per channel. Of a table, numbers are imputed by the median and standardised, categories become indicators, and free text
becomes TF-IDF weights; every rule that looks at values (median, categories, vocabulary) looks at the training set only.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import ArrayLike, NDArray
from pandas.api import types
from sklearn.compose import ColumnTransformer
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.impute import SimpleImputer
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler

from robust_if.data import Samples
from robust_if.formats.parts import Features, is_free_text
from robust_if.loading import Dataset

logger = logging.getLogger(__name__)

# Below this many rows, distinct values say nothing about a column being an id or a label being a measurement.
FEW = 20


@dataclass(frozen=True, eq=False)
class Encoder:
    """Turns a :class:`~robust_if.loading.Dataset` into :class:`~robust_if.data.Samples` of (x float32, y int64); made by :meth:`fit`.

    Args:
        classes: (k,) the training labels, sorted; label j of the samples is ``classes[j]``.
        shape: of one encoded input: (channels, height, width), or (d,).
        dropped: columns of the training set that are not used, with the reason.
    """

    classes: NDArray[Any]
    shape: tuple[int, ...]
    dropped: Mapping[str, str]
    _transform: Callable[[Features], NDArray[np.float32]] = field(repr=False)

    @classmethod
    def fit(cls, dataset: Dataset, *, max_words: int = 2000) -> Encoder:
        """The encoder learnt from the training set.

        Args:
            dataset: the training samples.
            max_words: largest vocabulary of a column of free text.

        Raises:
            ValueError: if there are fewer than two classes, nearly as many classes as samples, no usable column, or a column holds infinite values
                or none at all.
        """
        classes = np.unique(dataset.labels)
        if len(classes) < 2:
            raise ValueError(f"labels: expected at least two classes in the training set, got {classes.tolist()}")
        if len(dataset) >= FEW and len(classes) > len(dataset) / 2:
            raise ValueError(f"labels: expected classes, got {len(classes)} different values in {len(dataset)} samples; name another column")
        if isinstance(dataset.features, pd.DataFrame):
            roles, dropped = _roles(dataset.features)
            transform = _fit_table(dataset.features, roles, max_words)
            shape = transform(dataset.features.iloc[:1]).shape[1:]
        else:
            transform, dropped, shape = _fit_images(dataset.features), {}, dataset.features.shape[1:]
        return cls(classes, shape, dropped, transform)

    def samples(self, dataset: Dataset) -> Samples:
        """``dataset`` encoded, with its ids.

        Raises:
            ValueError: if a label is not among the training classes, a column is missing or of another type, or images have another size.
        """
        return Samples((torch.from_numpy(self._transform(dataset.features)), torch.from_numpy(self._codes(dataset.labels))), dataset.ids)

    def decode(self, labels: ArrayLike | torch.Tensor) -> NDArray[Any]:
        """The original labels of encoded ones.

        Raises:
            ValueError: if one is not from 0 to k - 1.
        """
        codes = np.asarray(labels)
        if codes.size and not (codes.min() >= 0 and codes.max() < len(self.classes)):
            raise ValueError(f"labels: expected 0 to {len(self.classes) - 1}, got {codes.min()} to {codes.max()}")
        original: NDArray[Any] = self.classes[codes]
        return original

    def _codes(self, labels: NDArray[Any]) -> NDArray[np.int64]:
        unknown = sorted(set(labels.tolist()) - set(self.classes.tolist()), key=str)
        if unknown:
            raise ValueError(f"labels out of range: {unknown[:5]}; the training set has the classes {self.classes.tolist()[:20]}")
        return np.searchsorted(self.classes, labels).astype(np.int64)


def check_split(train: Dataset, valid: Dataset) -> None:
    """Raise unless ``valid`` can validate what is learnt from ``train``.

    Raises:
        ValueError: if the validation set is empty, shares samples of the same file with the training set, or their classes differ.
    """
    check_apart(train, valid, "validation")
    classes, present = set(train.labels.tolist()), set(valid.labels.tolist())
    if classes - present:
        raise ValueError(f"validation: the training classes {sorted(classes - present, key=str)[:5]} do not occur in it")
    if present - classes:
        raise ValueError(f"validation: its classes {sorted(present - classes, key=str)[:5]} do not occur in the training set")


def check_apart(train: Dataset, other: Dataset, name: str) -> None:
    """Raise a ``ValueError`` if ``other``, called ``name``, is empty or shares samples of the same file with the training set."""
    if len(other) == 0:
        raise ValueError(f"{name}: expected at least one sample, got none")
    if train.path.resolve() == other.path.resolve():
        shared = np.isin(other.rows, train.rows)
        if shared.any():
            names = other.ids[shared][:5].tolist()
            raise ValueError(f"{name}: {shared.sum()} samples are also in the training set, ids {names}; keep the two apart")


def _fit_images(images: NDArray[np.float32]) -> Callable[[Features], NDArray[np.float32]]:
    mean = images.mean((0, 2, 3), dtype=np.float64, keepdims=True)[0]
    std = images.std((0, 2, 3), dtype=np.float64, keepdims=True)[0]
    # A channel of one colour is centred and left at that.
    return partial(_normalise, mean.astype(np.float32), np.where(std > 1e-6, std, 1).astype(np.float32), images.shape[1:])


def _normalise(mean: NDArray[np.float32], std: NDArray[np.float32], shape: tuple[int, ...], images: Features) -> NDArray[np.float32]:
    if isinstance(images, pd.DataFrame):
        raise ValueError("features: expected images as in training, got a table")
    if images.shape[1:] != shape:
        raise ValueError(f"images: expected (channels, height, width) = {shape} as in training, got {images.shape[1:]}")
    normal: NDArray[np.float32] = (images - mean) / std
    return normal


def _fit_table(frame: pd.DataFrame, roles: Mapping[str, str], max_words: int) -> Callable[[Features], NDArray[np.float32]]:
    empty = [name for name in roles if frame[name].isna().all()]
    if empty:
        raise ValueError(f"column {empty[0]!r}: all its values are missing in the training set; drop it")
    by_role = {role: [name for name in roles if roles[name] == role] for role in ("number", "category", "text")}
    # A category seen in fewer than about 1 % of the rows, at most 10, shares one indicator with all that are unknown later.
    categories = OneHotEncoder(handle_unknown="infrequent_if_exist", min_frequency=min(10, 1 + len(frame) // 100), max_categories=100)
    transformer = ColumnTransformer(
        [
            ("numbers", make_pipeline(SimpleImputer(strategy="median", add_indicator=True), StandardScaler()), by_role["number"]),
            ("categories", categories, by_role["category"]),
            *((f"text {name}", TfidfVectorizer(max_features=max_words, token_pattern=r"(?u)\b\w+\b"), name) for name in by_role["text"]),
        ],
        sparse_threshold=0,
    ).fit(_prepare(roles, frame))
    return partial(_encode_table, roles, transformer)


def _encode_table(roles: Mapping[str, str], transformer: ColumnTransformer, frame: Features) -> NDArray[np.float32]:
    if not isinstance(frame, pd.DataFrame):
        raise ValueError("features: expected a table as in training, got images")
    lacking = [name for name in roles if name not in frame]
    if lacking:
        raise ValueError(f"features: the columns {lacking[:5]} of the training set are missing; there are {list(frame.columns)[:20]}")
    return np.asarray(transformer.transform(_prepare(roles, frame)), dtype=np.float32)


def _roles(frame: pd.DataFrame) -> tuple[dict[str, str], dict[str, str]]:
    """The role of every column (number, category or text), and the reason of those that are dropped."""
    roles = {str(name): _role(frame[name]) for name in frame}
    dropped = {name: reason for name, role in roles.items() if (reason := _useless(frame[name], role))}
    if dropped:
        logger.warning("columns not used: %s", ", ".join(f"{name} ({reason})" for name, reason in dropped.items()))
    if len(dropped) == len(roles):
        raise ValueError(f"features: no column can be used: {dropped}")
    return {name: role for name, role in roles.items() if name not in dropped}, dropped


def _role(column: pd.Series[Any]) -> str:
    if types.is_datetime64_any_dtype(column) or (types.is_numeric_dtype(column) and not types.is_bool_dtype(column)):
        return "number"
    nested = next((value for value in column if isinstance(value, (list, tuple, dict, set, np.ndarray))), None)
    if nested is not None:
        kind = type(nested).__name__
        raise ValueError(f"column {column.name!r}: expected numbers, categories or text, got {kind} values; give each entry a column of its own")
    return "text" if is_free_text(column) else "category"


def _useless(column: pd.Series[Any], role: str) -> str:
    """Why a column tells nothing about the label; empty if it may."""
    distinct = column.nunique(dropna=False)
    if distinct == 1 and not column.isna().all():
        return "constant"
    if len(column) < FEW or distinct < len(column):
        return ""
    if role == "category":
        return "a different value in every row"
    counts = types.is_integer_dtype(column) and int(column.max()) - int(column.min()) == len(column) - 1
    return "a row number" if counts else ""


def _prepare(roles: Mapping[str, str], frame: pd.DataFrame) -> pd.DataFrame:
    return pd.DataFrame({name: _PREPARE[role](frame[name]) for name, role in roles.items()})


def _numbers(column: pd.Series[Any]) -> pd.Series[Any]:
    """Floats, NaN where missing; dates as days since 1970."""
    if types.is_datetime64_any_dtype(column):
        column = (column - pd.Timestamp(0, tz=column.dt.tz)) / pd.Timedelta(days=1)
    try:
        numbers = pd.Series(pd.to_numeric(column).to_numpy(dtype=np.float64, na_value=np.nan), name=column.name)
    except (ValueError, TypeError) as error:
        raise ValueError(f"column {column.name!r}: expected numbers as in training, but {error}") from error
    infinite = np.isinf(numbers.to_numpy())
    if infinite.any():
        first = int(infinite.argmax())
        raise ValueError(f"column {column.name!r}: {infinite.sum()} of its values are infinite, first in row {first}; replace or drop them")
    return numbers


def _categories(column: pd.Series[Any]) -> pd.Series[Any]:
    """Strings, ``"missing"`` where missing; whole numbers alike whether a missing value has made them floats or not."""
    values = [("missing" if missing else str(_whole(value))) for value, missing in zip(column.tolist(), column.isna(), strict=True)]
    return pd.Series(values, name=column.name, dtype=object)


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _text(column: pd.Series[Any]) -> pd.Series[Any]:
    values = ["" if missing else str(value) for value, missing in zip(column.tolist(), column.isna(), strict=True)]
    return pd.Series(values, name=column.name, dtype=object)


_PREPARE = {"number": _numbers, "category": _categories, "text": _text}
