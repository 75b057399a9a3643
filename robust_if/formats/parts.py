"""What every format shares: the names a caller may give, the parts a reader returns, and the few rules that hold for all of them."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

Kind = Literal["table", "image", "text"]
Features = pd.DataFrame | NDArray[np.float32]

LABELS = ("label", "labels", "target", "targets", "class", "y")


@dataclass(frozen=True)
class Names:
    """Names of the columns or arrays that hold the label, the id and the truth; ``None`` where the caller gave none."""

    label: str | None = None
    id: str | None = None
    truth: str | None = None


@dataclass(frozen=True)
class Columns:
    """The names as they were found in a file, where a label there must be."""

    label: str
    id: str | None
    truth: str | None


@dataclass(frozen=True, eq=False)
class Copy:
    """m samples of a file as they are to be written.

    Args:
        rows: (m,) their positions in the file.
        labels: (m,).
        features: of m samples; only what ``changed`` marks is written, all else is copied from the file.
        changed: (m, columns) true where a cell of a table is not that of the file; (m,) true where an image is not.
    """

    rows: NDArray[np.int64]
    labels: NDArray[Any]
    features: Features
    changed: NDArray[np.bool_]


Save = Callable[[Path, Copy], Path]


@dataclass(frozen=True, eq=False)
class Parts:
    """One file as its reader found it, unchecked.

    ``save(folder, copy)`` writes samples into ``folder``, in the file's own format. ``renamed(copy)`` are the ids that they then have, where the
    format does not carry them over: by default they stay, and row numbers start afresh.
    """

    kind: Kind
    features: Features
    labels: Any
    save: Save
    ids: Any = None
    truth: Any = None
    renamed: Callable[[Copy], NDArray[Any]] | None = None


Reader = Callable[[Path, Names], Parts]
Recogniser = Callable[[Path], bool]


def resolve(names: Names, present: Sequence[str], *, ids: Sequence[str] = ("id",)) -> Columns:
    """The names in the file: those given, else the usual ones.

    Raises:
        ValueError: if a name is not among ``present``, two roles share one, or the label cannot be told.
    """
    given = [name for name in (names.label, names.id, names.truth) if name is not None]
    if len(set(given)) < len(given):
        raise ValueError(f"label, id and truth: expected different names, got {given}")
    for role, name in (("label", names.label), ("id", names.id), ("truth", names.truth)):
        if name is not None and name not in present:
            raise ValueError(f"{role}: there is no {name!r}; the file has {list(present)}")
    free = [name for name in present if name not in given]
    usual_id = one_of("id", free, ids) if any(name.lower() in ids for name in free) else None
    return Columns(names.label or one_of("label", free, LABELS), names.id or usual_id, names.truth)


def one_of(what: str, present: Sequence[str], usual: Sequence[str]) -> str:
    """The one name in ``present`` that is a usual name of ``what``, in any case.

    Raises:
        ValueError: if there is none, or more than one.
    """
    found = [name for name in present if name.lower() in usual]
    if len(found) != 1:
        raise ValueError(
            f"{what}: expected one of {', '.join(usual)}, found {found or 'none of them'}; name the one that holds it, the file has {list(present)}"
        )
    return found[0]


def fresh(path: Path) -> Path:
    """``path``, whose folder now exists and which does not.

    Raises:
        FileExistsError: if something is there already.
    """
    if path.exists():
        raise FileExistsError(f"{path}: it exists already and is never overwritten; choose another folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def require(module: str, purpose: str, install: str) -> Any:
    """The optional ``module``.

    Raises:
        ImportError: if it is not installed; the message says what it is needed for and how to get it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{purpose} needs {module.partition('.')[0]}, which is not installed: pip install {install}") from error


def is_free_text(column: pd.Series[Any]) -> bool:
    """Whether a column holds sentences: strings, most of them distinct, and most with a space between words."""
    values = column.dropna()
    if len(values) == 0 or not all(isinstance(value, str) for value in values):
        return False
    spaced = values.str.strip().str.contains(r"\s", regex=True)
    return bool(spaced.mean() > 0.5 and values.nunique() > 0.5 * len(values))


def kind_of(features: pd.DataFrame) -> Kind:
    """``"text"`` if the only feature is free text, else ``"table"``."""
    return "text" if features.shape[1] == 1 and is_free_text(features.iloc[:, 0]) else "table"
