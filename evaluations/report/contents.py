"""What ``robust-if detect`` wrote, read back and checked, so that nothing is rendered from files that contradict each other."""

from __future__ import annotations

import base64
import binascii
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

FILES = ("result.json", "scores.parquet", "samples.parquet", "worst.json")
ACCURACIES = ("before", "after", "random", "oracle", "relabelled")

_RESULT: dict[str, type | tuple[type, ...]] = {
    "title": str, "data": str, "kind": str, "model": str, "n_train": int, "n_valid": int, "n_test": int, "decided_by": str, "decision": str,
    "detection": list, "accuracy": dict, "removed": int, "warnings": list, "settings": dict, "versions": dict, "command": str,
}  # fmt: skip
_PNG = re.compile(r"data:image/png;base64,([A-Za-z0-9+/]+={0,2})")


@dataclass(frozen=True, eq=False)
class Contents:
    """The files of one run.

    Args:
        result: ``result.json``; the five accuracies are present, ``None`` where not measured; ``threshold``, ``accuracy_runs``, ``attack`` and
            ``filter`` are present.
        samples: one row per training sample.
        scores: ``(n, estimators)``, float, in the order of ``samples``, higher = more harmful.
        worst: the most harmful samples, most harmful first.
        harmful: of a run with attack inputs, those of the second verdict.
    """

    result: Mapping[str, Any]
    samples: pd.DataFrame
    scores: pd.DataFrame
    worst: list[dict[str, Any]]
    harmful: list[dict[str, Any]]

    @property
    def removed(self) -> NDArray[np.bool_]:
        """Which samples were removed, ``(n,)``."""
        return self.samples["removed"].to_numpy(dtype=bool)

    @property
    def attack(self) -> Mapping[str, Any] | None:
        """What the run says of the suspected attack; ``None`` where none was suspected."""
        found: Mapping[str, Any] | None = self.result["attack"]
        return found

    @property
    def truth(self) -> NDArray[np.bool_] | None:
        """Which samples are truly bad, ``(n,)``: poisoned where an attack was suspected, else mislabelled; ``None`` where that is not known."""
        name = _truth(self.result)
        return self.samples[name].to_numpy(dtype=bool) if name in self.samples else None

    @property
    def deciding(self) -> list[str]:
        """The scores that the deciding verdict rests on or could rest on: those about the attack where one was suspected, else all."""
        return [str(name) for name in self.scores] if self.attack is None else [self.result["decided_by"]]


def read(directory: Path) -> Contents:
    """The checked contents of a directory that ``robust-if detect`` wrote.

    Raises:
        FileNotFoundError: if the directory or one of its files is missing; all missing files are named.
        ValueError: if a file cannot be read, lacks a field, or contradicts another; the file and the field are named.
    """
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory}: no such directory; expected one that `robust-if detect --out` wrote")
    missing = [name for name in FILES if not (directory / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{directory}: missing {', '.join(missing)}; run `robust-if detect ... --out {directory}` first")
    result = _result(_load(directory / "result.json", _json))
    samples = _samples(_load(directory / "samples.parquet", pd.read_parquet), result)
    scores = _scores(_load(directory / "scores.parquet", pd.read_parquet), samples, result)
    worst = _worst(_load(directory / "worst.json", _json), "worst.json", _truth(result))
    harmful = directory / "harmful.json"
    second = _worst(_load(harmful, _json), harmful.name, _truth(result)) if result["attack"] is not None and harmful.is_file() else []
    return Contents(result, samples, scores, worst, second)


def _truth(result: Mapping[str, Any]) -> str:
    return "mislabelled" if result["attack"] is None else "truly_poisoned"


def _load(path: Path, reader: Callable[[Path], Any]) -> Any:
    try:
        return reader(path)
    except (ValueError, OSError) as error:  # pyarrow's and json's errors are ValueErrors
        raise ValueError(f"{path.name}: cannot be read: {error}") from error


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_share(value: Any) -> bool:
    return _is_number(value) and 0 <= value <= 1


def _result(result: Any) -> dict[str, Any]:
    _check(isinstance(result, dict), f"result.json: expected an object, got {type(result).__name__}")
    for field, kind in _RESULT.items():
        _check(field in result, f"result.json: missing the field {field!r}")
        fits = isinstance(result[field], kind) and not isinstance(result[field], bool)
        _check(fits, f"result.json: {field}: expected {getattr(kind, '__name__', kind)}, got {result[field]!r}")
    _check(result["kind"] in ("image", "table", "text"), f"result.json: kind: expected image, table or text, got {result['kind']!r}")
    for field in ("n_train", "n_test"):
        _check(result[field] > 0, f"result.json: {field}: expected at least one sample, got {result[field]}")
    threshold = result.get("threshold")
    _check(threshold is None or _is_number(threshold), f"result.json: threshold: expected a finite number or null, got {threshold!r}")
    detection = [_detection(i, entry) for i, entry in enumerate(result["detection"])]
    attack, bias = _attack(result.get("attack")), result.get("filter") or []
    fits = isinstance(bias, list) and all(isinstance(row, dict) and {"by", "value", "n", "removed"} <= set(row) for row in bias)
    _check(fits, f"result.json: filter: expected a list of objects, got {bias!r}")
    return {**result, "threshold": threshold, "detection": detection, "attack": attack, "filter": bias, **_accuracies(result)}


_ATTACK: dict[str, type] = {
    "goal_class": str, "seen": int, "measured": int, "shared": bool, "failed": bool, "poisoned": int, "harms_utility": int, "both": int,
    "harms_by": str, "success": dict, "success_runs": dict,
}  # fmt: skip


def _attack(attack: Any) -> dict[str, Any] | None:
    if attack is None:
        return None
    _check(isinstance(attack, dict), f"result.json: attack: expected an object or null, got {type(attack).__name__}")
    for field, kind in _ATTACK.items():
        _check(isinstance(attack.get(field), kind), f"result.json: attack.{field}: expected {kind.__name__}, got {attack.get(field)!r}")
    success = {key: attack["success"].get(key) for key in (*ACCURACIES, "scored")}
    for key, value in success.items():
        _check(
            (value is None and key == "oracle") or _is_share(value), f"result.json: attack.success.{key}: expected a share from 0 to 1, got {value!r}"
        )
    for key, values in attack["success_runs"].items():
        _check(isinstance(values, list) and all(map(_is_share, values)), f"result.json: attack.success_runs.{key}: expected shares, got {values!r}")
    return {**attack, "success": success, "max_false_positives": attack.get("max_false_positives")}


def _accuracies(result: dict[str, Any]) -> dict[str, Any]:
    accuracy = {key: result["accuracy"].get(key) for key in ACCURACIES}
    for key, value in accuracy.items():
        optional = value is None and key not in ("before", "after")
        _check(optional or _is_share(value), f"result.json: accuracy.{key}: expected a share from 0 to 1, got {value!r}")
    runs = result.get("accuracy_runs") or {}
    _check(isinstance(runs, dict), f"result.json: accuracy_runs: expected an object, got {runs!r}")
    runs = {key: values or [] for key, values in runs.items() if key in ACCURACIES}
    for key, values in runs.items():
        fits = isinstance(values, list) and all(map(_is_share, values))
        _check(fits, f"result.json: accuracy_runs.{key}: expected shares from 0 to 1, got {values!r}")
    return {"accuracy": accuracy, "accuracy_runs": runs}


def _detection(i: int, entry: Any) -> dict[str, Any]:
    where = f"result.json: detection[{i}]"
    named = isinstance(entry, dict) and isinstance(entry.get("estimator"), str)
    _check(named, f"{where}: expected an object with the field 'estimator', got {entry!r}")
    clean = {"estimator": entry["estimator"], "target": entry.get("target") or ""}
    for field in ("auroc", "average_precision", "precision_at_k", "tpr_at_1_fpr", "tpr_at_5_fpr", "seconds"):
        value = entry.get(field)
        _check(value is None or isinstance(value, int | float), f"{where}: {field}: expected a number or null, got {value!r}")
        clean[field] = value if _is_number(value) else None
    interval = entry.get("auroc_interval")
    fits = interval is None or (isinstance(interval, list) and len(interval) == 2)
    _check(fits, f"{where}: auroc_interval: expected [low, high] or null, got {interval!r}")
    return {**clean, "auroc_interval": interval if interval and all(map(_is_number, interval)) else None}


def _samples(samples: pd.DataFrame, result: Mapping[str, Any]) -> pd.DataFrame:
    for name in ("id", "label", "suggested_label", "removed"):
        _check(name in samples, f"samples.parquet: missing the column {name!r}")
    _check(samples["id"].is_unique, f"samples.parquet: id: repeated ids, {list(samples['id'][samples['id'].duplicated()][:5])}")
    truth = _truth(result)
    if truth in samples and samples[truth].isna().all():
        samples = samples.drop(columns=truth)
    for name in {"removed", truth} & set(samples):
        _check(bool(samples[name].isin([True, False]).all()), f"samples.parquet: {name}: expected true or false for every sample")
    n, removed = len(samples), int(samples["removed"].astype(bool).sum())
    _check(n == result["n_train"], f"samples.parquet: expected {result['n_train']} rows (n_train in result.json), got {n}")
    _check(removed == result["removed"], f"samples.parquet: expected {result['removed']} removed samples (removed in result.json), got {removed}")
    return samples.reset_index(drop=True)


def _scores(scores: pd.DataFrame, samples: pd.DataFrame, result: Mapping[str, Any]) -> pd.DataFrame:
    _check("id" in scores, "scores.parquet: missing the column 'id'")
    table = scores.set_index("id")
    _check(table.index.is_unique and set(table.index) == set(samples["id"]), "scores.parquet: expected the ids of samples.parquet, each once")
    _check(result["decided_by"] in table, f"scores.parquet: missing the column {result['decided_by']!r} (decided_by in result.json)")
    for name in table:
        finite = pd.api.types.is_numeric_dtype(table[name]) and bool(np.isfinite(table[name].to_numpy(dtype=np.float64)).all())
        _check(finite, f"scores.parquet: {name}: expected finite numbers")
    return table.loc[samples["id"]].astype(np.float64)


def _worst(worst: Any, name: str, truth: str) -> list[dict[str, Any]]:
    _check(isinstance(worst, list), f"{name}: expected a list, got {type(worst).__name__}")
    return [shown(entry, f"{name}: [{i}]") | {"bad": entry.get(truth)} for i, entry in enumerate(worst)]


def shown(entry: Any, where: str, fields: Sequence[str] = ("removed",)) -> dict[str, Any]:
    """One sample as a page shows it, checked; an image must be a PNG inside the page.

    Raises:
        ValueError: if a field is missing or malformed; the message begins with ``where``.
    """
    _check(isinstance(entry, dict), f"{where}: expected an object, got {type(entry).__name__}")
    for field in ("id", "label", "score", *fields):
        _check(field in entry, f"{where}: missing the field {field!r}")
    _check(_is_number(entry["score"]), f"{where}: score: expected a finite number, got {entry['score']!r}")
    row, text, image = entry.get("row"), entry.get("text"), entry.get("image")
    _check(row is None or isinstance(row, dict), f"{where}: row: expected an object or null, got {type(row).__name__}")
    _check(text is None or isinstance(text, str), f"{where}: text: expected a string or null, got {type(text).__name__}")
    size = None if image is None else _png_size(where, image)
    return {"suggested": None, "bad": None, **entry, "row": row, "text": text, "image": image, "size": size}


def _png_size(where: str, image: Any) -> tuple[int, int]:
    # An image becomes the address of an <img>, so nothing but a PNG inside the page may pass.
    match = _PNG.fullmatch(image) if isinstance(image, str) else None
    _check(match is not None, f"{where}: image: expected data:image/png;base64,... with base64 characters only, got {str(image)[:40]!r}")
    assert match is not None
    try:
        head = base64.b64decode(match[1], validate=True)[:24]
    except binascii.Error as error:
        raise ValueError(f"{where}: image: not valid base64: {error}") from error
    _check(head[:8] == b"\x89PNG\r\n\x1a\n" and len(head) == 24, f"{where}: image: the data are not a PNG image")
    return int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")
