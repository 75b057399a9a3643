"""A poisoned copy of somebody's own data, in its own format, with the truth beside it: to see whether a detector would find it."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from robust_if.attacks.backdoors import Backdoor
from robust_if.attacks.poisoned import Poisoned
from robust_if.data import Samples
from robust_if.encoding import check_apart
from robust_if.evaluations.folder import check_holds_none, claim
from robust_if.evaluations.named_attacks import Options, Plant, goal_shares, ready
from robust_if.evaluations.splits import split_off
from robust_if.loading import Dataset
from robust_if.sweep import fingerprint
from robust_if.writing import write_json

#: A part of a trigger speaks for the goal class by itself if the goal's share is so much larger where clean samples carry it.
SPEAKS = 0.3


def tamper(
    data: Dataset, attack: str, options: Options, directory: Path, *, test: Dataset | None = None, test_fraction: float = 0.1, overwrite: bool = False
) -> dict[str, Any]:
    """Write a poisoned copy of ``data`` and the truth about it into ``directory``.

    ``poisoned/NAME`` is the copy, in the format of the data. ``truth.parquet`` has its ids in its order, with ``poisoned``, ``cover``, ``label``,
    ``original_label`` and ``original_id`` (an image that moves to the folder of another class gets another id). A backdoor also gets
    ``triggered/NAME``: samples of the classes it acts on, with the trigger and their true labels, for ``detect --attack-inputs``. They are never
    training samples: they are made of ``test``, or else of a share of the data that the poisoned copy then lacks and that lies unchanged in
    ``test/NAME``. ``attack.json`` says how to do it again.

    Args:
        attack: one of :data:`~robust_if.evaluations.named_attacks.ATTACKS`.
        directory: made; it must be empty, or hold an earlier run if ``overwrite`` is set.
        test: held-out samples of the same kind; for backdoors.
        test_fraction: without ``test``, the share of the data that is held out, by class.

    Returns:
        The content of ``result.json``: how many samples are poisoned, covers and triggered, the ``files``, and ``goal_shares``, see
        :func:`~robust_if.evaluations.named_attacks.goal_shares`.

    Raises:
        ValueError: before anything is written, if the attack is unknown, does not fit the kind of data or takes no such option, a class is not in the
            data, the trigger does not fit the inputs, or nothing would be poisoned.
    """
    check_holds_none(directory, [data.path, *([test.path] if test else [])])
    plant = ready(attack, options, data)
    train, held, warnings = data, test, []
    if isinstance(plant, Backdoor) and test is None:
        train, held, warning = split_off(data, test_fraction, options.seed, "test")
        warnings += [warning] if warning else []
    if test is not None:
        _check_test(attack, plant, data, test)
    poisoned, shares = plant(train, seed=options.seed), goal_shares(plant, train)
    warnings += _speaking(shares, options.goal_class)
    copies = {"poisoned": poisoned.data}
    if isinstance(plant, Backdoor):
        assert held is not None
        copies["triggered"] = _triggered(plant, held)
        copies |= {"test": held} if test is None else {}
    mark = fingerprint({}, _digest(data), data.path.resolve(), attack, options, fingerprint({}, _digest(test)) if test else test_fraction)
    finished = claim(directory, mark, overwrite)
    if finished is not None:
        return finished
    files = {name: _copied(directory / name, copy) for name, copy in copies.items()}
    _truth(train, poisoned).to_parquet(directory / "truth.parquet", index=False)
    settings = {"attack": attack, "data": str(data.path), "test": str(test.path) if test else test_fraction, **asdict(options)}
    if isinstance(plant, Backdoor):
        trigger: Any = plant.trigger
        settings["backdoor"] = {**asdict(plant), "trigger": {"name": type(trigger).__name__, **asdict(trigger)}}
        settings["goal_shares"] = shares
    write_json(directory / "attack.json", settings, _plain)
    files |= {"truth": directory / "truth.parquet", "settings": directory / "attack.json"}
    result = {
        "attack": attack,
        "kind": data.kind,
        "goal_class": options.goal_class,
        "n": len(poisoned.data),
        "poisoned": int(poisoned.mask.sum()),
        "covers": int(poisoned.covers.sum()),
        "triggered": len(copies["triggered"]) if "triggered" in copies else 0,
        "goal_shares": shares,
        "files": {name: str(path) for name, path in files.items()},
        "warnings": warnings,
    }
    write_json(directory / "result.json", result, _plain)
    return result


def _check_test(attack: str, plant: Plant, data: Dataset, test: Dataset) -> None:
    if not isinstance(plant, Backdoor):
        raise ValueError(f"test: {attack} flips labels and has no trigger to stamp on test data; leave them out")
    check_apart(data, test, "test")
    if isinstance(data.features, pd.DataFrame) and isinstance(test.features, pd.DataFrame):
        expected, got = list(data.features.columns), list(test.features.columns)
    else:
        expected, got = list(data.features.shape[1:]), list(test.features.shape[1:])
    if test.kind != data.kind or expected != got:
        raise ValueError(f"test: expected {data.kind} data with {expected[:20]} as in the data, got {test.kind} data with {got[:20]}")


def _speaking(shares: dict[str, dict[str, Any]], goal: str | None) -> list[str]:
    usual = shares.get("all samples", {}).get("goal_share", 0)
    loud = {name: found["goal_share"] for name, found in shares.items() if found["goal_share"] is not None and found["goal_share"] >= usual + SPEAKS}
    if not loud:
        return []
    said = ", ".join(f"{'all of it ' if name == 'at once' else ''}{name} of {100 * share:.0f} %" for name, share in loud.items())
    text = (
        f"The trigger speaks for the goal class without any poison: {goal} is the label of {100 * usual:.0f} % of the clean samples, but where they "
        f"have {said}. No detector can tell such poison from honest samples; choose other columns or values."
    )
    return [text]


def _triggered(backdoor: Backdoor, held: Dataset) -> Dataset:
    try:
        triggered = backdoor.triggered(held)
    except ValueError as error:
        raise ValueError(f"test: {error}") from None
    if len(triggered) == 0:
        raise ValueError(f"test: the trigger acts on samples of other classes than {backdoor.goal!r}, and the held-out data have none")
    return triggered


def _digest(data: Dataset) -> Samples:
    """The data as numbers, to tell one run from another."""
    x = data.features
    numbers = pd.util.hash_pandas_object(x.astype(str), index=False).to_numpy(np.int64, copy=True) if isinstance(x, pd.DataFrame) else x
    codes = pd.util.hash_array(data.labels.astype(str).astype(object)).view(np.int64)
    return Samples((torch.from_numpy(numbers), torch.from_numpy(codes)), data.ids)


def _copied(folder: Path, data: Dataset) -> Path:
    shutil.rmtree(folder, ignore_errors=True)  # left by an interruption at this very place
    return data.write(folder, np.ones(len(data), dtype=bool), data.labels)


def _truth(train: Dataset, poisoned: Poisoned[Dataset]) -> pd.DataFrame:
    data = poisoned.data
    return pd.DataFrame(
        {
            "id": data.renamed(np.ones(len(data), dtype=bool), data.labels),
            "poisoned": poisoned.mask,
            "cover": poisoned.covers,
            "label": data.labels,
            "original_label": train.labels,
            "original_id": train.ids,
        }
    )


def _plain(value: Any) -> Any:
    """NumPy scalars as Python ones, for JSON."""
    return value.item() if isinstance(value, np.generic) else str(value)
