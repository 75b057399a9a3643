"""The page of ``robust-if trace``: every query with the training texts behind it and against it. It has no scripts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from robust_if.evaluations.report import words
from robust_if.evaluations.report.pages import filled, require, write_page
from robust_if.overlap import Overlap

#: Characters of a text, and of the prompt before it, that are shown at once.
LONG = {"text": 420, "prompt": 240}
SIDES = ("behind", "against")


def render_trace(directory: Path) -> Path:
    """The path of ``report.html``, written into ``directory`` in one step.

    Args:
        directory: holds ``result.json`` as ``robust-if trace`` writes it.

    Raises:
        FileNotFoundError: if the file is missing.
        ValueError: if it is malformed; nothing is written then.
    """
    return write_page(directory, html)


def html(result: dict[str, Any]) -> str:
    """The whole page; every value from the data is escaped by the template.

    Raises:
        ValueError: if a field is missing.
    """
    needed = ("data", "n_train", "asked", "n_queries", "model", "kind", "estimator", "checkpoints", "queries", "warnings", "command")
    require(result, needed, "result.json", "trace")
    queries = []
    for each in result["queries"]:
        require(each, ("id", "prompt", "text", "label", "own", *SIDES), "result.json: queries", "trace")
        for side in SIDES:
            for entry in each[side]:
                require(entry, ("id", "prompt", "text", "label", "score"), f"result.json: {side}", "trace")
        queries.append({**_cut(each), **{side: [{**_cut(entry), "shown": _score(entry["score"])} for entry in each[side]] for side in SIDES}})
    images = result["kind"] == "denoiser"
    things = "images" if images else "texts"
    asked = things
    if not images and result["kind"] == "classification":
        asked = "predictions"
    elif not images and any(each["own"] for each in queries):
        asked = "generations"
    return filled(
        "trace.html.j2",
        result=result,
        signed=result["estimator"] != Overlap().name,
        title=f"Training {things} behind what a {'diffusion model makes' if images else 'language model says'}",
        things=things,
        thing="an image" if images else "a text",
        headline=f"The training {things} behind {words.count(result['n_queries'], asked[:-1])}",
        queries=queries,
    )


def _score(value: float) -> str:
    return f"{value:#.3g}".replace("-", words.MINUS)


def _cut(entry: dict[str, Any]) -> dict[str, Any]:
    """A text with its openings: of the text itself, and of the prompt its end, which stands next to the text."""
    text, prompt = entry["text"], entry["prompt"]
    opening = text if len(text) <= LONG["text"] else text[: LONG["text"]].rstrip() + "…"
    ending = prompt if len(prompt) <= LONG["prompt"] else "…" + prompt[-LONG["prompt"] :].lstrip()
    return {**entry, "text": text, "prompt": prompt, "opening": opening, "ending": ending, "long": (opening, ending) != (text, prompt)}
