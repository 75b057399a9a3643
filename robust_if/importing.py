"""The user's own functions, found by ``module:function``."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterable
from typing import Any


def imported(name: str, argument: str, known: Iterable[str] = ()) -> Callable[..., Any]:
    """The function that ``module:function`` names; the working directory is searched too.

    Args:
        name: such as ``mine:model`` for ``model`` of mine.py, or ``package.mine:model``.
        argument: what the name was given for; error messages begin with it.
        known: shipped names that would have done as well, for the error message.

    Raises:
        ValueError: if the name is not of that form, the module cannot be imported, or what it holds by that name cannot be called.
    """
    module, _, function = name.partition(":")
    if not module or not function:
        instead = f"one of {', '.join(known)}, or " if known else ""
        raise ValueError(f"{argument}: unknown name {name!r}; expected {instead}module:function")
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{argument}: cannot import {name!r}: {error}") from error
    except Exception as error:  # whatever somebody's module does when it is loaded
        raise ValueError(f"{argument}: cannot import {name!r}: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(here)
    if not callable(found):
        raise ValueError(f"{argument}: expected a function, {name!r} is {type(found).__name__}")
    return found  # type: ignore[no-any-return]
