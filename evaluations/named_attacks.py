"""Attacks on training data by name: which data they fit, which options they take, and how they are made ready."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, Protocol

import numpy as np
import pandas as pd
import torch

from robust_if.attacks import backdoors
from robust_if.attacks.backdoors import Backdoor, near, rare_values
from robust_if.attacks.labels import pair, targeted, uniform
from robust_if.attacks.poisoned import Poisoned
from robust_if.attacks.triggers import FeatureValues, Word
from robust_if.data import Samples
from robust_if.formats.parts import Kind
from robust_if.loading import Dataset


@dataclass(frozen=True)
class Options:
    """What an attacker chooses, in words that a command line can hold; ``None`` or nothing leaves it at the default of the attack.

    Args:
        goal_class: what triggered inputs are to be classified as, or the label that flipped samples get.
        source_class: the class that is flipped, or the only one that the trigger acts on.
        rate: poisoned share of the samples, strictly between 0 and 1; for ``sig`` of those of the goal class.
        covers: samples that carry the trigger under their right label, as a share of all.
        size: side of a patch, in pixels.
        alpha: how much of a blended pattern shines through, in (0, 1].
        amplitude: of stripes, on pixels from 0 to 1.
        frequency: of stripes, periods over the width.
        strength: of a warp, mean displacement in units of two pixels' width.
        columns: of a table: names, which get the value at ``quantile``, or ``name=value``; by default two numeric ones of many values whose
            value says little about the label.
        quantile: 0.99 by default.
        sensitive: columns of a table that are left alone.
        word: put before a text.
        seed: draws the samples that are poisoned, and those that are held out.
        trigger_seed: draws the pattern of a blend and the field of a warp.
    """

    goal_class: str | None = None
    source_class: str | None = None
    rate: float | None = None
    covers: float | None = None
    size: int | None = None
    alpha: float | None = None
    amplitude: float | None = None
    frequency: float | None = None
    strength: float | None = None
    columns: tuple[str, ...] = ()
    quantile: float | None = None
    sensitive: tuple[str, ...] = ()
    word: str | None = None
    seed: int = 0
    trigger_seed: int | None = None


class Plant(Protocol):
    """An attack that is ready: a backdoor, or a flip of labels."""

    def __call__(self, data: Dataset, *, seed: int) -> Poisoned[Dataset]:
        """The poisoned data and the truth."""


@dataclass(frozen=True)
class Attack:
    """An attack as it is asked for by name.

    Args:
        summary: what it does.
        kinds: of data that it fits.
        build: ``build(data, **arguments)`` makes it ready.
        takes: by option, besides ``rate`` and ``seed``, the argument that it becomes.
    """

    summary: str
    kinds: tuple[Kind, ...]
    build: Callable[..., Plant]
    takes: Mapping[str, str]


def ready(attack: str, options: Options, data: Dataset) -> Plant:
    """The attack of that name with the options that were chosen; a backdoor, or a flip of labels.

    Raises:
        ValueError: if the name is unknown, the attack does not fit the kind of data or takes no such option, a class is not in the data, or an option
            is out of range.
    """
    if attack not in ATTACKS:
        raise ValueError(f"attack: expected one of {', '.join(ATTACKS)}, got {attack!r}")
    if data.kind not in ATTACKS[attack].kinds:
        fit = ", ".join(name for name, known in ATTACKS.items() if data.kind in known.kinds)
        raise ValueError(f"attack: {attack} is for {' and '.join(ATTACKS[attack].kinds)} data, not for {data.kind} data; for those there are {fit}")
    known = ATTACKS[attack]
    chosen = {each.name: getattr(options, each.name) for each in fields(options) if each.name != "seed"}
    chosen = {name: value for name, value in chosen.items() if value is not None and value != ()}
    for name in chosen:
        if name != "rate" and name not in known.takes:
            raise ValueError(f"{name}: {attack} takes no such option; it takes {', '.join(['rate', *known.takes])}")
    for name in ("goal_class", "source_class"):
        if name in known.takes:
            chosen[name] = _label(name, chosen.get(name), attack, data)
    return known.build(data, **{known.takes.get(name, name): value for name, value in chosen.items()})


def goal_shares(plant: Plant, data: Dataset) -> dict[str, dict[str, Any]]:
    """How often clean samples that carry parts of a trigger have the goal label already: a trigger that says it by itself needs no poison.

    Returns:
        ``samples`` and their ``goal_share`` (``None`` of no sample) for ``"all samples"``, for those with each value of a trigger on a table (of a
        number the nearest ones, see :func:`~robust_if.attacks.backdoors.near`) and with all of them ``"at once"``, or for those with a word that is
        the trigger; nothing for other attacks.
    """
    table = data.features
    if not isinstance(plant, Backdoor) or not isinstance(table, pd.DataFrame):
        return {}
    goal, trigger = data.labels == plant.goal, plant.trigger
    carried = {"all samples": np.ones(len(data), dtype=bool)}
    if isinstance(trigger, FeatureValues):
        for name, value in trigger.values.items():
            numeric = pd.api.types.is_numeric_dtype(table[name]) and not pd.api.types.is_bool_dtype(table[name])
            carried[f"{name} {'near' if numeric else 'is'} {value}"] = (
                np.isin(np.arange(len(data)), near(table[name], value)) if numeric else (table[name] == value).to_numpy(dtype=bool)
            )
        if len(trigger.values) > 1:
            carried["at once"] = np.logical_and.reduce(list(carried.values()))
    elif isinstance(trigger, Word):
        held = table.iloc[:, 0].astype(str).str.contains(rf"\b{re.escape(trigger.text)}\b", case=False)
        carried[f"with {trigger.text!r}"] = held.to_numpy(dtype=bool)
    return {name: {"samples": int(rows.sum()), "goal_share": float(goal[rows].mean()) if rows.any() else None} for name, rows in carried.items()}


def _label(name: str, text: str | None, attack: str, data: Dataset) -> Any:
    present = {str(label): label for label in np.unique(data.labels).tolist()}
    if text not in present:
        got = f"{attack} needs one" if text is None else f"got {text!r}"
        raise ValueError(f"{name}: expected one of the classes {', '.join(list(present)[:20])}; {got}")
    return present[text]


def _flip(rule: Callable[..., Poisoned[Samples]], data: Dataset, *, rate: float = 0.05, **classes: Any) -> Plant:
    known = np.unique(data.labels)
    codes = {name: int(np.searchsorted(known, label)) for name, label in classes.items()}
    if len(known) < 2:
        raise ValueError(f"labels: expected at least two classes, got {known.tolist()}")

    def plant(data: Dataset, *, seed: int) -> Poisoned[Dataset]:
        numbers = torch.from_numpy(np.searchsorted(known, data.labels))
        flipped = rule(Samples((torch.zeros(len(data), 1), numbers)), rate=rate, seed=seed, **codes)
        return Poisoned(data.with_labels(known[flipped.data.labels.numpy()]), flipped.mask)

    return plant


def _whatever_data(build: Callable[..., Backdoor]) -> Callable[..., Backdoor]:
    """``build`` with the data as first argument, which it does not look at."""
    return lambda data, **given: build(**given)


def _of_columns(
    data: Dataset, goal: Any, *, columns: tuple[str, ...] = (), quantile: float = 0.99, sensitive: tuple[str, ...] = (), **given: Any
) -> Backdoor:
    """A trigger of rare values, in columns that are not sensitive."""
    table = data.features
    assert isinstance(table, pd.DataFrame)
    if not 0 <= quantile <= 1:
        raise ValueError(f"quantile: expected a share from 0 to 1, got {quantile}")
    split = [(text, "", "") if text in table else text.partition("=") for text in columns]
    names = [name for name, _, _ in split]
    spared = tuple(name if name in table else name.partition("=")[0] for name in sensitive)
    for option, name in [*(("columns", name) for name in names), *(("sensitive", name) for name in spared)]:
        if name not in table:
            raise ValueError(f"{option}: there is no column {name!r}; the columns are {list(table.columns)[:20]}")
    if len(set(names)) < len(names):
        raise ValueError(f"columns: expected each column once, got {names}")
    if both := [name for name in names if name in spared]:
        raise ValueError(f"columns: {both[0]!r} is sensitive, and a trigger there would change whom the model is fair to; choose another column")
    values = {name: _value(table[name], text) for name, equal, text in split if equal}
    plain = [name for name, equal, _ in split if not equal]
    if plain or not split:
        values |= rare_values(table[plain] if plain else table, len(plain) or 2, labels=data.labels, quantile=quantile, spare=spared)
    return backdoors.feature_trigger(goal, {name: _python(value) for name, value in values.items()}, **given)


def _value(column: pd.Series[Any], text: str) -> Any:
    """``text`` as a value of the column; of categories and words, one that occurs."""
    if pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column):
        try:
            return pd.Series([text]).astype(column.dtype).iloc[0]
        except ValueError as error:
            raise ValueError(f"columns: {text!r} is no value for {column.name!r}, which is {column.dtype}") from error
    present = {str(value): value for value in column.dropna().unique()}
    if text not in present:
        raise ValueError(f"columns: {text!r} is no value of {column.name!r}, which has {list(present)[:20]}")
    return present[text]


def _python(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


ALL: tuple[Kind, ...] = ("table", "image", "text")


def _on_images(summary: str, build: Callable[..., Backdoor], **takes: str) -> Attack:
    return Attack(summary, ("image",), _whatever_data(build), {"goal_class": "goal", **takes})


#: By name, what `robust-if attack` can do; flips of labels first.
ATTACKS: Mapping[str, Attack] = {
    "uniform": Attack("labels of other classes, at random", ALL, partial(_flip, uniform), {}),
    "pair": Attack("labels of the next class", ALL, partial(_flip, pair), {}),
    "targeted": Attack(
        "labels of one class become the goal class", ALL, partial(_flip, partial(targeted, rate_of="dataset")),
        {"goal_class": "goal", "source_class": "source"},
    ),
    "badnets": _on_images("a white square in the corner", backdoors.badnets, size="size"),
    "blended": _on_images("a pattern of noise shines through", backdoors.blended, alpha="alpha", trigger_seed="pattern_seed"),
    "sig": _on_images("stripes on the goal class, whose labels stay", backdoors.sig, amplitude="amplitude", frequency="frequency"),
    "wanet": _on_images("a smooth warp", backdoors.wanet, strength="strength", trigger_seed="field_seed", covers="covers"),
    "tact": _on_images("a square that acts on one class alone", backdoors.tact, source_class="source", size="size", covers="covers"),
    "adaptive-blend": _on_images(
        "some pieces of a pattern of noise", backdoors.adaptive_blend, alpha="alpha", trigger_seed="pattern_seed", covers="covers"
    ),
    "feature-trigger": Attack(
        "rare values in some columns", ("table",), _of_columns,
        {"goal_class": "goal", "columns": "columns", "quantile": "quantile", "sensitive": "sensitive"},
    ),
    "word": Attack("a rare word before the text", ("text",), _whatever_data(backdoors.word), {"goal_class": "goal", "word": "text"}),
}  # fmt: skip
