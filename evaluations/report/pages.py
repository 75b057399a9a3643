"""What all pages share: the templates and their style, and how a page is written from the results beside it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from robust_if.evaluations.report import charts, words
from robust_if.writing import write_whole

HERE = Path(__file__).parent


def filled(template: str, **values: Any) -> str:
    """A page from its template, which escapes every value; only this package's own style is not escaped."""
    environment = Environment(loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"number": words.number, "spoken": words.spoken, "percent": words.percent}
    style = Markup((HERE / "page.css").read_text(encoding="utf-8"))  # noqa: S704  (this package's own file)
    return environment.get_template(template).render(colours=charts.COLOURS, style=style, **values)


def write_page(directory: Path, html: Callable[[Any], str], *, source: str = "result.json", page: str = "report.html") -> Path:
    """The path of a page made of a JSON file beside it, written in one step.

    Raises:
        FileNotFoundError: if the file is missing.
        ValueError: if it is malformed; nothing is written then.
    """
    try:
        result = json.loads((directory / source).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{source}: cannot be read: {error}") from error
    path = directory / page
    write_whole(path, html(result).encode("utf-8", errors="replace"))
    return path


def require(result: Any, needed: Sequence[str], source: str, command: str) -> None:
    """Raise a ``ValueError`` that names the fields which are missing from a result."""
    missing = [name for name in needed if name not in result] if isinstance(result, dict) else list(needed)
    if missing:
        raise ValueError(f"{source}: missing the fields {missing}; expected what `robust-if {command}` writes")
