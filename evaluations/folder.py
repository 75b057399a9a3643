"""The folder that a detection run writes: whose it is, and what lies in it."""

from __future__ import annotations

import json
import logging
import platform
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from robust_if.evaluations.detection import detection
from robust_if.evaluations.plan import Outcome, Plan
from robust_if.evaluations.previews import preview
from robust_if.evaluations.report import render
from robust_if.scores import Scores, table
from robust_if.writing import write_json

logger = logging.getLogger(__name__)

#: Samples that the report shows.
SHOWN = 60
#: The entry of manifest.json by which an output folder is known as ours.
MARK = "robust-if run"


def claim(directory: Path, mark: str, overwrite: bool) -> dict[str, Any] | None:
    """Make the directory ours; the result if this very run has already finished there."""
    manifest, result = directory / "manifest.json", directory / "result.json"
    ours = _mark(manifest)
    if overwrite and ours is not None:
        shutil.rmtree(directory)
    elif ours == mark:
        if result.is_file() and not (directory / "work").exists():
            logger.warning("%s holds the finished result of this very run; --overwrite runs it again", directory)
            finished: dict[str, Any] = json.loads(result.read_text())
            return finished
        logger.warning("resuming the run in %s", directory)
        return None
    if directory.exists() and any(directory.iterdir()):
        raise ValueError(f"out: {directory} is not empty; choose another folder, or pass --overwrite if it holds an earlier run")
    directory.mkdir(parents=True, exist_ok=True)
    write_json(manifest, {MARK: mark})
    return None


def _mark(manifest: Path) -> str | None:
    """The mark of the run whose folder this is; ``None`` for somebody else's folder."""
    try:
        found = json.loads(manifest.read_text())
    except (OSError, ValueError):
        return None
    return found.get(MARK) if isinstance(found, dict) else None


def write(directory: Path, plan: Plan, outcome: Outcome) -> dict[str, Any]:
    """Write scores, samples, the copies of the data, ``result.json`` and the report; what ``result.json`` says."""
    data, scores, removed, suggested = plan.train, outcome.scores, outcome.weights == 0, outcome.suggested
    samples = pd.DataFrame({"id": data.ids, "label": data.labels, "suggested_label": suggested, "removed": removed})
    if data.mislabelled is not None:
        samples["mislabelled"] = data.mislabelled
    table(scores).to_parquet(directory / "scores.parquet", index=False)
    samples.to_parquet(directory / "samples.parquet", index=False)
    worst = scores[0].order()[:SHOWN]
    shown = [
        {**_plain(samples.iloc[i].to_dict()), "suggested": _plain(suggested[i]), "score": float(scores[0].values[i]), **preview(data, int(i))}
        for i in worst
    ]
    write_json(directory / "worst.json", shown, _plain)
    cleaned, relabelled = _copies(directory, plan, outcome)
    accuracies: dict[str, float | None] = {name: float(np.mean(values)) for name, values in outcome.accuracies.items()}
    result = {
        "title": plan.title,
        "data": str(data.path),
        "kind": data.kind,
        "model": plan.model,
        "n_train": len(plan.train),
        "n_valid": len(plan.valid),
        "n_test": len(plan.test),
        "decided_by": scores[0].name,
        "decision": outcome.decision,
        "threshold": outcome.threshold,
        "detection": [_judged(column, data.mislabelled) for column in scores],
        "accuracy": {"oracle": None, **accuracies},
        "accuracy_runs": {name: list(values) for name, values in outcome.accuracies.items()},
        "removed": int(removed.sum()),
        "warnings": list(plan.warnings),
        "settings": {"recipe": repr(plan.recipe), "remove": plan.remove, "seed": plan.seed, "repeats": plan.repeats}
        | {column.estimator: column.provenance["estimator"] for column in scores},
        "versions": {name: version(name) for name in ("torch", "numpy", "scikit-learn")} | {"python": platform.python_version()},
        "command": plan.command,
        "files": {
            "scores": str(directory / "scores.parquet"),
            "samples": str(directory / "samples.parquet"),
            "cleaned": str(cleaned),
            "relabelled": str(relabelled),
            "model": str(directory / "model.safetensors"),
            "report": str(directory / "report.html"),
        },
    }
    write_json(directory / "result.json", result, _plain)
    render(directory)
    shutil.rmtree(directory / "work", ignore_errors=True)
    return result


def _copies(directory: Path, plan: Plan, outcome: Outcome) -> tuple[Path, Path]:
    """Two copies of the data in their own format: without the removed samples, and with these under their suggested labels."""
    for copy in ("cleaned", "relabelled"):  # left by an interruption at this very place
        shutil.rmtree(directory / copy, ignore_errors=True)
    whole = plan.train if plan.whole is None else plan.whole
    removed = outcome.weights == 0
    new = dict(zip(plan.train.rows[removed].tolist(), outcome.suggested[removed], strict=True))
    gone = np.array([row in new for row in whole.rows.tolist()])
    corrected = np.array([new.get(row, label) for row, label in zip(whole.rows.tolist(), whole.labels, strict=True)])
    cleaned = whole.write(directory / "cleaned", ~gone, whole.labels)
    return cleaned, whole.write(directory / "relabelled", np.ones(len(whole), dtype=bool), corrected)


def _judged(scores: Scores, mask: NDArray[np.bool_] | None) -> dict[str, Any]:
    row: dict[str, Any] = {"estimator": scores.estimator, "target": scores.target, "seconds": scores.provenance["seconds"]}
    names = ("auroc", "average_precision", "precision_at_k", "tpr_at_1_fpr", "tpr_at_5_fpr")
    if mask is None or not 0 < mask.sum() < len(mask):
        return row | dict.fromkeys(names)
    found = detection(scores, mask)
    return row | {name: getattr(found, name) for name in names} | {"auroc_interval": list(found.intervals["auroc"])}


def _plain(value: Any) -> Any:
    """NumPy scalars as Python ones, for JSON."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    return value.item() if isinstance(value, np.generic) else value
