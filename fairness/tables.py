"""A table as numbers that a linear model can use: the features of the logistic regression that stands in for a scikit-learn model."""

# ruff: noqa: N803, N806 - X is scikit-learn's name
from __future__ import annotations

from typing import Any, Self

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pandas.api import types
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.compose import ColumnTransformer
from sklearn.impute import SimpleImputer
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler
from sklearn.utils import check_array
from sklearn.utils.validation import check_is_fitted

#: Categories of one column beyond so many share one indicator, the rarest first.
CATEGORIES = 100


class TableEncoder(TransformerMixin, BaseEstimator):  # type: ignore[misc]
    """Numbers imputed by the median and standardised, with an indicator where one was missing; categories as indicators.

    Takes data frames (pandas, polars, pyarrow) and arrays. What is not a number is a category, a missing one too; later ones that are unknown have
    no indicator.

    Attributes:
        numbers_: names of the columns of numbers and booleans.
        categories_: names of the others.
        encoder_: the fitted ``ColumnTransformer``.
    """

    def fit(self, X: Any, y: Any = None) -> Self:
        """Learn medians, scales and categories of a table ``(n, d)``.

        Raises:
            ValueError: if it is not a table, a column holds dates or infinite values, or a name occurs twice.
        """
        frame = _frame(X)
        self.numbers_ = [name for name in frame if types.is_numeric_dtype(frame[name])]
        self.categories_ = [name for name in frame if name not in self.numbers_]
        numbers = make_pipeline(SimpleImputer(strategy="median", add_indicator=True, keep_empty_features=True), StandardScaler())
        categories = OneHotEncoder(handle_unknown="infrequent_if_exist", max_categories=CATEGORIES)
        parts = [("numbers", numbers, self.numbers_), ("categories", categories, self.categories_)]
        self.encoder_ = ColumnTransformer(parts, sparse_threshold=0).fit(self._typed(frame))
        return self

    def transform(self, X: Any) -> NDArray[np.float64]:
        """The table as numbers ``(n, p)``.

        Raises:
            ValueError: if a column is missing, holds something else than in training, or infinite values.
        """
        check_is_fitted(self)
        return np.asarray(self.encoder_.transform(self._typed(_frame(X))), dtype=np.float64)

    def get_feature_names_out(self, input_features: Any = None) -> NDArray[np.object_]:
        """Names of the p numbers."""
        check_is_fitted(self)
        return np.asarray(self.encoder_.get_feature_names_out(), dtype=object)

    def _typed(self, frame: pd.DataFrame) -> pd.DataFrame:
        lacking = [name for name in [*self.numbers_, *self.categories_] if name not in frame]
        if lacking:
            raise ValueError(f"X: the columns {lacking[:5]} of the training data are missing; there are {list(frame)[:20]}")
        numbers = {name: _numbers(frame[name]) for name in self.numbers_}
        return pd.DataFrame({**numbers, **{name: _categories(frame[name]) for name in self.categories_}})


def _frame(X: Any) -> pd.DataFrame:
    """Columns with names, ``"0"``, ``"1"`` and so on for an array."""
    if hasattr(X, "to_pandas"):
        X = X.to_pandas()
    if isinstance(X, pd.DataFrame):
        frame = X.infer_objects()
    else:
        frame = pd.DataFrame(check_array(X, dtype=None, ensure_all_finite=False, input_name="X")).infer_objects()
    if frame.shape[1] == 0:
        raise ValueError(f"X: found 0 feature(s) (shape={frame.shape}) while a minimum of 1 is required.")
    frame.columns = frame.columns.map(str)
    if not frame.columns.is_unique:
        raise ValueError(f"X: the column {frame.columns[frame.columns.duplicated()][0]!r} occurs twice; expected a name for each")
    for name in frame:
        if types.is_datetime64_any_dtype(frame[name]) or types.is_timedelta64_dtype(frame[name]) or types.is_complex_dtype(frame[name]):
            raise ValueError(f"X: expected numbers or categories in the column {name!r}, got {frame[name].dtype}; turn it into one of them first")
    return frame


def _numbers(column: pd.Series[Any]) -> NDArray[np.float64]:
    try:
        values = pd.to_numeric(column).to_numpy(dtype=np.float64, na_value=np.nan)
    except (ValueError, TypeError) as error:
        raise ValueError(f"X: expected numbers in the column {column.name!r} as in training, but {error}") from error
    infinite = np.isinf(values)
    if infinite.any():
        raise ValueError(f"X: {infinite.sum()} values of the column {column.name!r} are infinite, first in row {infinite.argmax()}")
    return np.asarray(values)


def _categories(column: pd.Series[Any]) -> NDArray[np.object_]:
    return np.array([("missing" if missing else str(value)) for value, missing in zip(column.tolist(), column.isna(), strict=True)], dtype=object)
