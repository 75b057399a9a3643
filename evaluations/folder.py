"""The folder that a detection run writes: whose it is, and what lies in it."""

from __future__ import annotations

import json
import logging
import platform
import shutil
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from robust_if.evaluations.detection import detection
from robust_if.evaluations.plan import Outcome, Plan, Verdicts
from robust_if.evaluations.poisoning import WORKS, filter_bias
from robust_if.evaluations.previews import preview
from robust_if.evaluations.report import render
from robust_if.scores import Scores, table
from robust_if.writing import plain, write_json

logger = logging.getLogger(__name__)

#: Samples that the report shows.
SHOWN = 60
#: Values that a sensitive column may have at most.
GROUPS = 50
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


def check_holds_none(directory: Path, paths: Iterable[Path]) -> None:
    """Raise a ``ValueError`` if the data at one of ``paths`` lie in the output folder, where an earlier run would be replaced and they with it."""
    for path in paths:
        if directory.resolve() in [path.resolve(), *path.resolve().parents]:
            raise ValueError(f"out: {directory} holds the data {path}; choose another folder")


def _mark(manifest: Path) -> str | None:
    """The mark of the run whose folder this is; ``None`` for somebody else's folder."""
    try:
        found = json.loads(manifest.read_text())
    except (OSError, ValueError):
        return None
    return found.get(MARK) if isinstance(found, dict) else None


def write(directory: Path, plan: Plan, outcome: Outcome) -> dict[str, Any]:
    """Write scores, samples, the copies of the data, ``result.json`` and the report; what ``result.json`` says."""
    data, scores, removed = plan.train, outcome.scores, outcome.weights == 0
    samples = _samples(plan, outcome)
    table(scores).to_parquet(directory / "scores.parquet", index=False)
    samples.to_parquet(directory / "samples.parquet", index=False)
    write_json(directory / "worst.json", _shown(plan, outcome, samples, scores[0]), plain)
    if outcome.verdicts is not None:
        write_json(directory / "harmful.json", _shown(plan, outcome, samples, scores[1]), plain)
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
        "warnings": [*plan.warnings, *outcome.warnings],
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
    if outcome.verdicts is not None:
        result["attack"] = _attack(plan, outcome.verdicts, scores[0], scores[1])
    if outcome.verdicts is not None or plan.sensitive is not None:
        bias = filter_bias(data.mislabelled, removed, data.labels, groups(plan), name=plan.sensitive or "group")
        result["filter"] = bias.astype(object).where(bias.notna(), None).to_dict("records")
    write_json(directory / "result.json", result, plain)
    render(directory)
    shutil.rmtree(directory / "work", ignore_errors=True)
    return result


def groups(plan: Plan) -> NDArray[Any] | None:
    """The sensitive group of every training sample, ``(n,)``; ``None`` where no column was named.

    Raises:
        ValueError: if there is no such column, or it has too many values to be one of groups.
    """
    if plan.sensitive is None:
        return None
    features = plan.train.features
    if not isinstance(features, pd.DataFrame) or plan.sensitive not in features:
        known = list(features.columns)[:20] if isinstance(features, pd.DataFrame) else "none, they are images"
        raise ValueError(f"sensitive: there is no column {plan.sensitive!r} in the training data; the columns are {known}")
    values = features[plan.sensitive].astype(str).str.strip().to_numpy(dtype=object)
    found = len(np.unique(values))
    if found > GROUPS:
        raise ValueError(f"sensitive: expected a column of at most {GROUPS} groups, {plan.sensitive!r} has {found} values")
    return np.asarray(values)


def _samples(plan: Plan, outcome: Outcome) -> pd.DataFrame:
    """One row per training sample; the truth of a run with a suspicion says what is poison, of any other which labels are wrong."""
    data, verdicts = plan.train, outcome.verdicts
    samples = pd.DataFrame({"id": data.ids, "label": data.labels, "suggested_label": outcome.suggested, "removed": outcome.weights == 0})
    if verdicts is not None:
        samples["poisoned"], samples["harms_utility"] = verdicts.poisoned, verdicts.harms_utility
    if data.mislabelled is not None:
        samples["mislabelled" if verdicts is None else "truly_poisoned"] = data.mislabelled
    return samples


def _shown(plan: Plan, outcome: Outcome, samples: pd.DataFrame, scores: Scores) -> list[dict[str, Any]]:
    """The samples with the highest scores, as the report shows them."""
    return [
        {
            **plain(samples.iloc[i].to_dict()), "suggested": plain(outcome.suggested[i]), "score": float(scores.values[i]),
            **preview(plan.train, int(i)),
        }
        for i in scores.order()[:SHOWN]
    ]  # fmt: skip


def _attack(plan: Plan, verdicts: Verdicts, accused: Scores, harms: Scores) -> dict[str, Any]:
    assert plan.suspicion is not None
    means = {name: float(np.mean(values)) for name, values in verdicts.successes.items()}
    return {
        "inputs": str(plan.suspicion.inputs.path),
        "goal_class": plan.suspicion.goal_class,
        "seen": verdicts.seen,
        "measured": verdicts.measured,
        "shared": verdicts.shared,
        "failed": means["scored"] < WORKS,
        "success": {"oracle": None, **means},
        "success_runs": {name: list(values) for name, values in verdicts.successes.items()},
        "max_false_positives": accused.provenance["false_positives"] if plan.remove == "auto" else None,
        "poisoned": int(verdicts.poisoned.sum()),
        "harms_utility": int(verdicts.harms_utility.sum()),
        "both": int((verdicts.poisoned & verdicts.harms_utility).sum()),
        "harms_by": harms.name,
    }


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
