"""The page of ``robust-if explain``: one prediction, and the training samples for and against it. It has no scripts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from robust_if.evaluations.report import HERE, card, charts, words
from robust_if.evaluations.report.contents import shown
from robust_if.writing import write_whole


def render_explanation(directory: Path) -> Path:
    """The path of ``report.html``, written into ``directory`` in one step.

    Args:
        directory: holds ``result.json`` as ``robust-if explain`` writes it.

    Raises:
        FileNotFoundError: if the file is missing.
        ValueError: if it is malformed; nothing is written then.
    """
    source = directory / "result.json"
    try:
        result = json.loads(source.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"result.json: cannot be read: {error}") from error
    page = html(result)
    path = directory / "report.html"
    write_whole(path, page.encode("utf-8", errors="replace"))
    return path


def html(result: dict[str, Any]) -> str:
    """The whole page; every value from the data is escaped by the template.

    Raises:
        ValueError: if a field is missing, or an image is not a PNG.
    """
    needed = ("id", "among", "true", "predicted", "probability", "sample", "for", "against", "estimator", "kind", "command")
    missing = [name for name in needed if name not in result] if isinstance(result, dict) else list(needed)
    if missing:
        raise ValueError(f"result.json: missing the fields {missing}; expected what `robust-if explain` writes")
    asked = {"id": result["id"], "label": result["true"], "score": 0.0, **result["sample"]}
    sides = {name: [card(shown(entry, f"result.json: {name}[{i}]", ())) for i, entry in enumerate(result[name])] for name in ("for", "against")}
    environment = Environment(loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"number": words.number}
    said, chance = words.number(result["predicted"]), words.percent(result["probability"])
    return environment.get_template("explanation.html.j2").render(
        result=result,
        title=f"Why the model says {said}",
        headline=f"The model says “{said}” with a probability of {chance}{_verdict(result)}",
        sample=card(shown(asked, "result.json: sample", ())),
        sides=sides,
        colours=charts.COLOURS,
        style=Markup((HERE / "page.css").read_text(encoding="utf-8")),  # noqa: S704  (this package's own file)
    )


def _verdict(result: dict[str, Any]) -> str:
    if result["true"] in ("", None):
        return "."
    return ", and so says its label." if result["true"] == result["predicted"] else f"; its label is “{words.number(result['true'])}”."
