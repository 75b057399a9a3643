"""The page of ``robust-if explain``: one prediction, and the training samples for and against it. It has no scripts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from robust_if.evaluations.report import card, words
from robust_if.evaluations.report.contents import shown
from robust_if.evaluations.report.pages import filled, require, write_page


def render_explanation(directory: Path) -> Path:
    """The path of ``report.html``, written into ``directory`` in one step.

    Args:
        directory: holds ``result.json`` as ``robust-if explain`` writes it.

    Raises:
        FileNotFoundError: if the file is missing.
        ValueError: if it is malformed; nothing is written then.
    """
    return write_page(directory, html)


def html(result: dict[str, Any]) -> str:
    """The whole page; every value from the data is escaped by the template.

    Raises:
        ValueError: if a field is missing, or an image is not a PNG.
    """
    needed = ("id", "among", "true", "predicted", "probability", "sample", "for", "against", "estimator", "kind", "command")
    require(result, needed, "result.json", "explain")
    asked = {"id": result["id"], "label": result["true"], "score": 0.0, **result["sample"]}
    sides = {name: [card(shown(entry, f"result.json: {name}[{i}]", ())) for i, entry in enumerate(result[name])] for name in ("for", "against")}
    said, chance = words.number(result["predicted"]), words.percent(result["probability"])
    return filled(
        "explanation.html.j2",
        result=result,
        title=f"Why the model says {said}",
        headline=f"The model says “{said}” with a probability of {chance}{_verdict(result)}",
        sample=card(shown(asked, "result.json: sample", ())),
        sides=sides,
    )


def _verdict(result: dict[str, Any]) -> str:
    if result["true"] in ("", None):
        return "."
    return ", and so says its label." if result["true"] == result["predicted"] else f"; its label is “{words.number(result['true'])}”."
