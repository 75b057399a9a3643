"""Options of a part against the function that takes them, before any work."""

from __future__ import annotations

import hashlib
import inspect
import types
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

Plain = bool | int | float | str


def completed(function: Callable[..., Any], options: Mapping[str, Plain], positional: int, where: str) -> dict[str, Any]:
    """``options`` with the function's own defaults where none is given, and whole numbers as floats where the function takes floats.

    Args:
        function: a part of a suite: ``positional`` arguments, ``seed``, and options by keyword.
        options: as a suite file gives them.
        positional: how many arguments come before the options.
        where: begins every error message.

    Raises:
        ValueError: if the function takes no ``seed`` or not these options, one without a default is missing, or a value is of another type.
    """
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: cannot read what it takes: {error}") from error
    parameters = list(signature.parameters.values())
    before = [each for each in parameters if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)][:positional]
    kinds = {each.kind for each in parameters}
    if len(before) < positional and inspect.Parameter.VAR_POSITIONAL not in kinds:
        raise ValueError(f"{where}: expected a function of {positional} positional arguments and options by keyword, got one of {signature}")
    takes = {each.name: each for each in parameters if each not in before and each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)}
    anything = inspect.Parameter.VAR_KEYWORD in kinds
    if "seed" not in takes and not anything:
        raise ValueError(f"{where}: expected a function that takes 'seed' by keyword, got one of {signature}")
    takes.pop("seed", None)
    if not anything and (unknown := [name for name in options if name not in takes]):
        raise ValueError(f"{where}: unknown option {unknown[0]!r}; expected some of {', '.join(takes) or 'none'}")
    if missing := [name for name, each in takes.items() if each.default is each.empty and name not in options]:
        raise ValueError(f"{where}: the option {missing[0]!r} is missing; it has no default")
    hints = _hints(function)
    for name, value in options.items():
        if not _fits(value, hints.get(name, Any)):
            raise ValueError(f"{where}: {name}: expected {_said(hints[name])}, got {value!r}")
    defaults = {name: each.default for name, each in takes.items() if each.default is not each.empty}
    return {name: _as(value, hints.get(name, Any)) for name, value in {**defaults, **options}.items()}


def source(function: Callable[..., Any]) -> str | None:
    """A digest of the file in which somebody's own function stands; ``None`` for what has no file."""
    try:
        path = inspect.getsourcefile(inspect.unwrap(function))
    except TypeError:
        return None
    return None if path is None or not Path(path).is_file() else digest(Path(path))


def files(options: Mapping[str, Any]) -> dict[str, str]:
    """Digests of the files that options name, such as ``path = "data.csv"``."""
    named = {name: Path(value) for name, value in options.items() if isinstance(value, str) and Path(value).suffix}
    return {name: digest(path) for name, path in named.items() if path.is_file()}


def digest(path: Path) -> str:
    """SHA-256 of a file, read once for every state of it."""
    state = path.stat()
    return _digest(path.resolve(), state.st_mtime_ns, state.st_size)


@cache
def _digest(path: Path, *_: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    """Types of the arguments; none where they cannot be told, for instance from names that only a type checker knows."""
    target = function if inspect.isroutine(function) else getattr(function, "func", type(function).__call__)
    try:
        return get_type_hints(target)
    except (NameError, TypeError, AttributeError):
        return {}


def _fits(value: object, kind: Any) -> bool:
    if get_origin(kind) is Literal:
        return any(value == each and type(value) is type(each) for each in get_args(kind))
    if get_origin(kind) in (Union, types.UnionType):
        return any(_fits(value, each) for each in get_args(kind))
    if kind in (int, float):
        return isinstance(value, (int, float) if kind is float else int) and not isinstance(value, bool)
    return not isinstance(kind, type) or kind not in (bool, str, type(None)) or isinstance(value, kind)


def _as(value: Any, kind: Any) -> Any:
    """1 as 1.0 where only a float is meant, so that both are one setting."""
    among = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
    return float(value) if type(value) is int and float in among and int not in among else value


def _said(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(repr(each) for each in get_args(kind))
    words = {int: "a whole number", float: "a number", str: "a string", bool: "true or false", type(None): "nothing"}
    if get_origin(kind) in (Union, types.UnionType):
        return " or ".join(_said(each) for each in get_args(kind) if each is not type(None))
    return words.get(kind, str(kind))
