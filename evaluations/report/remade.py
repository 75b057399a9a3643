"""Any page made anew from the results beside it."""

from __future__ import annotations

import json
from pathlib import Path

from robust_if.evaluations.report import render
from robust_if.evaluations.report.audit import render_audit
from robust_if.evaluations.report.explanation import render_explanation
from robust_if.evaluations.report.repair import render_repair
from robust_if.evaluations.report.suite import render_suite
from robust_if.evaluations.report.trace import render_trace
from robust_if.evaluations.report.tradeoffs import render_tradeoffs

#: By the entry of ``result.json`` that only this kind of run has.
_PAGES = {"repair": render_repair, "explanation": render_explanation, "tradeoffs": render_tradeoffs, "suite": render_suite, "trace": render_trace}


def remake(directory: Path) -> Path:
    """The path of the page, made anew from what ``robust-if`` wrote into ``directory``.

    Raises:
        FileNotFoundError: if the directory or one of its files is missing.
        ValueError: if a file is malformed.
    """
    if (directory / "audit.json").is_file():
        return render_audit(directory)
    try:
        result = json.loads((directory / "result.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return render(directory)  # which says what is wrong
    said = result if isinstance(result, dict) else {}
    return next((page for entry, page in _PAGES.items() if said.get(entry)), render)(directory)
