"""The HTML report: one self-contained page, made from the directory that ``robust-if detect`` wrote. It opens offline."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup
from plotly.offline import get_plotlyjs

from robust_if.evaluations.report import charts, words
from robust_if.evaluations.report.contents import Contents, read
from robust_if.evaluations.report.pages import HERE, filled
from robust_if.writing import write_whole

__all__ = ["render"]

SHOWN = 24
FIELDS = 10
LONG_TEXT = 420


def render(directory: Path) -> Path:
    """The path of ``report.html``, written into ``directory`` in one step, so that a reader never sees half a page.

    Args:
        directory: holds ``result.json``, ``scores.parquet``, ``samples.parquet`` and ``worst.json``, as ``robust-if detect`` writes them.

    Raises:
        FileNotFoundError: if the directory or one of the files is missing.
        ValueError: if a file is malformed or contradicts another; nothing is written then.
    """
    directory = Path(directory)
    page = html(read(directory))
    path = directory / "report.html"
    write_whole(path, page.encode("utf-8", errors="replace"))
    return path


def html(contents: Contents) -> str:
    """The whole page. Every value from the data is escaped by the template; only this package's own styles and scripts and plotly.js are not."""
    scripts = [get_plotlyjs().replace("\r\n", "\n"), (HERE / "page.js").read_text(encoding="utf-8")]
    figures = _charts(contents)
    return filled(
        "page.html.j2",
        **{name: value for name, value in contents.result.items() if name not in ("attack", "filter")},
        headline=words.headline(contents),
        findings=words.findings(contents),
        sampling=words.sampling(contents),
        accuracies=words.accuracies(contents),
        metrics=list(words.METRICS.values()),
        successes=words.successes(contents),
        verdicts=words.verdicts(contents),
        bias=words.bias(contents),
        bad=words.bad(contents),
        deciding=contents.deciding,
        known=contents.truth is not None,
        wrong=0 if contents.truth is None else int(contents.truth.sum()),
        names=[str(name) for name in contents.scores],
        worst=[card(entry) for entry in contents.worst],
        harmful=[card(entry) for entry in contents.harmful[:SHOWN]],
        shown=SHOWN,
        series=[{"colour": f"series-{i % 6}", "dash": _dashes(charts.DASHES[(i + i // 6) % 6])} for i in range(contents.scores.shape[1])],
        charts=figures,
        embedded={
            "figures": {name: chart.figure for name, chart in figures.items()},
            "alts": {name: chart.alt for name, chart in figures.items()},
            "notes": {name: chart.note for name, chart in figures.items()},
            "colours": list(charts.COLOURS.values()),
        },
        scripts=[Markup(script) for script in scripts],  # noqa: S704  (plotly.js and this package's own file)
        script_hashes=[_hash(script) for script in scripts],
    )


def _charts(contents: Contents) -> dict[str, charts.Chart]:
    checking, success = charts.checking(contents), charts.success(contents)
    return {
        "accuracy": charts.accuracy(contents),
        **({} if success is None else {"success": success}),
        **{f"scores-{i}": charts.scores(contents, str(name)) for i, name in enumerate(contents.scores)},
        **({} if checking is None else {"precision": checking[0], "recall": checking[1]}),
    }


def card(entry: Mapping[str, Any]) -> dict[str, Any]:
    """One of the worst samples, with its row split into the fields shown at once and those behind a click."""
    row: Sequence[tuple[str, Any]] = list((entry["row"] or {}).items())
    text = entry["text"] or ""
    return {**entry, "first": row[:FIELDS], "rest": row[FIELDS:], "text": text, "long": len(text) > LONG_TEXT, "opening": text[:LONG_TEXT].rstrip()}


def _hash(script: str) -> str:
    """What the page's content security policy calls the script by: only scripts named so may run."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _dashes(dash: str) -> str:
    return "" if dash == "solid" else dash.replace("px", "")
