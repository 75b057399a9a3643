"""Any page made anew from the results beside it."""

from __future__ import annotations

import json
from pathlib import Path

from robust_if.evaluations.report import render
from robust_if.evaluations.report.audit import render_audit
from robust_if.evaluations.report.explanation import render_explanation
from robust_if.evaluations.report.repair import render_repair


def remake(directory: Path) -> Path:
    """The path of the page, made anew from what ``robust-if detect``, ``explain``, ``audit`` or ``repair`` wrote into ``directory``.

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
    if said.get("repair") is True:
        return render_repair(directory)
    return render_explanation(directory) if said.get("explanation") is True else render(directory)
