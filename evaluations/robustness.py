"""Robust accuracy with everything that is needed to believe it: who attacked, how hard, how sure the number is, and what speaks against it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from robust_if.attacks.evasion import Attack, Ensemble, Square, Threat, lite, standard
from robust_if.attacks.evasion.ball import Ball
from robust_if.data import Samples, as_samples, to
from robust_if.evaluations import checks as checking
from robust_if.evaluations.checks import Check, Subject
from robust_if.fairness.intervals import wilson
from robust_if.predictions import class_logits
from robust_if.sweep import Progress, Sweep, fingerprint, silent
from robust_if.task import Batch, Params, Task

Preset = Literal["standard", "lite"]

#: In :attr:`RobustAccuracy.broken_by`: the model is wrong without attack.
CLEAN = "no attack"
_LEVEL = 0.95


@dataclass(frozen=True)
class Member:
    """One attack of an evaluation; it saw only the samples that those before it had left.

    Args:
        name: of the attack.
        budget: its steps, queries and so on, in words.
        broke: samples that it was the first to break.
        accuracy: robust accuracy after it.
        interval: of that accuracy, 95 %.
        seconds: it took.
    """

    name: str
    budget: str
    broke: int
    accuracy: float
    interval: tuple[float, float]
    seconds: float


@dataclass(frozen=True, eq=False)
class RobustAccuracy:
    """What :func:`robust_accuracy` found; printed, it tells the number with its interval, its budget, and the checks that failed.

    Args:
        ids: ``(n,)`` of the samples.
        right: ``(n,)`` where the model is right without attack.
        robust: ``(n,)`` where it is right without attack and under every one of them.
        broken_by: ``(n,)`` name of the first attack that broke a sample, ``"no attack"`` where none was needed, empty where the sample is robust.
        threat: what the attacker may do, in words.
        preset: name of the attack.
        members: the attacks in their order; those that had nothing left to attack are there too.
        checks: empty if they were switched off.
        checked: samples that the checks looked at.
        seconds: attacks and checks.
        points: ``(n, …)`` the inputs that broke a sample, clean ones elsewhere; ``None`` unless asked for.
    """

    ids: NDArray[Any] = field(repr=False)
    right: NDArray[np.bool_] = field(repr=False)
    robust: NDArray[np.bool_] = field(repr=False)
    broken_by: NDArray[np.str_] = field(repr=False)
    threat: str
    preset: str
    members: tuple[Member, ...]
    checks: tuple[Check, ...]
    checked: int
    seconds: float
    points: Tensor | None = field(default=None, repr=False)

    @property
    def n(self) -> int:
        """Number of samples."""
        return len(self.ids)

    @property
    def clean_accuracy(self) -> float:
        """Share of samples that the model gets right without attack."""
        return float(self.right.mean())

    @property
    def clean_interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of the clean accuracy."""
        return _interval(self.right)

    @property
    def accuracy(self) -> float:
        """Robust accuracy: share of samples that the model gets right without attack and under every one of them."""
        return float(self.robust.mean())

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of the robust accuracy: how far other samples may move it, not how far a stronger attack may."""
        return _interval(self.robust)

    @property
    def failed(self) -> tuple[Check, ...]:
        """The checks for which the robust accuracy is not to be believed."""
        return tuple(each for each in self.checks if each.passed is False)

    @property
    def believable(self) -> bool | None:
        """Whether no check failed; ``None`` if they were switched off."""
        return not self.failed if self.checks else None

    @property
    def budget(self) -> str:
        """Radius, norm and what else the attacker may do, and every attack with its steps."""
        attacks = ", ".join(f"{each.name} ({each.budget})" if each.budget else each.name for each in self.members)
        return f"{self.threat}; {self.preset}: {attacks}"

    @property
    def verdict(self) -> str:
        """What the checks say, in one sentence."""
        if not self.checks:
            return "Unchecked: the checks were switched off."
        if not self.failed:
            return f"No check speaks against it ({len(self.checks)} on {self.checked} samples)."
        return "DO NOT BELIEVE this number. " + "; ".join(f"{each.name}: {each.said}" for each in self.failed) + "."

    def __str__(self) -> str:
        shares = [_percent(*pair) for pair in ((self.accuracy, self.interval), (self.clean_accuracy, self.clean_interval))]
        return f"robust accuracy {shares[0]} of {self.n} samples, clean {shares[1]}\nagainst {self.budget}\n{self.verdict}"

    def record(self) -> dict[str, Any]:
        """Everything but the samples as plain values, for JSON."""
        numbers = {name: getattr(self, name) for name in ("n", "clean_accuracy", "accuracy", "believable", "verdict", "budget")}
        intervals = {name: list(getattr(self, name)) for name in ("clean_interval", "interval")}
        settings = {name: getattr(self, name) for name in ("threat", "preset", "checked", "seconds")}
        return {**numbers, **intervals, **settings, "members": [asdict(each) for each in self.members], "checks": [asdict(c) for c in self.checks]}


def robust_accuracy(
    task: Task, data: Any, threat: Threat, *, preset: Preset | Attack = "standard", batch_size: int = 256, checks: bool = True,
    points: bool = False, radius: str | None = None, progress: Progress = silent, directory: Path | None = None,
) -> RobustAccuracy:  # fmt: skip
    """The share of samples that a classifier gets right without attack and under every attack, with the checks of :mod:`~.checks`.

    Attacks come one after another, each on the samples that are left; what counts is the model's answer to the attacked input, evaluated again. It is
    an upper bound: a stronger attack may break more.

    Args:
        task: the model, whose outputs are logits ``(B, K)`` or one logit, in evaluation mode.
        data: ``(x, y)`` with inputs in the unit of the threat and labels from 0.
        threat: what the attacker may do.
        preset: ``"standard"``, ``"lite"``, or an attack whose threat is this one.
        batch_size: samples at a time; it changes nothing beyond rounding.
        checks: whether to look for signs that the number is too high, on :data:`~robust_if.evaluations.checks.SAMPLES` samples.
        points: whether to keep the inputs that broke a sample.
        radius: the radius in words, such as ``"8/255 of the pixel range"``, for the text.
        progress: wraps the loop over the batches of an attack.
        directory: where finished batches are kept, so that the same call resumes there.

    Raises:
        ValueError: before any attack, if the samples do not fit the threat, labels are no classes of the model, the preset is unknown or has another
            threat, or ``directory`` holds parts of another evaluation; and as the attacks do.
    """
    data = as_samples(data)
    name, attacks = check(task, data, threat, preset)
    params = task.params()
    like = next(iter(params.values()))
    settings = (str(task.model), task.forward, name, attacks, points)
    mark = "" if directory is None else fingerprint(task.model.state_dict(), data, *settings)
    sweep = Sweep(batch_size=batch_size, rows_per_part=batch_size, progress=progress, directory=directory)
    wrong = sweep.map(partial(checking.errors, task, params), data, like, name="clean", fingerprint=mark)
    broken_by = np.where(wrong > 0, CLEAN, "").astype(object)
    kept = data.batch(slice(None))[0].clone() if points else None
    members, outside = [], [torch.zeros(1, dtype=torch.float64)]
    for k, attack in enumerate(attacks):
        rows, seconds = np.flatnonzero(broken_by == ""), 0.0
        if len(rows):
            tried = partial(_tried, task, params, attack, points)
            found = sweep.map(tried, data.take(rows), like, name=f"{k}-{attack.name}", fingerprint=mark)
            hit, seconds = found[:, 0].numpy() > 0, float(found[:, 2].sum())
            outside.append(found[:, 1])
            broken_by[rows[hit]] = attack.name
            if kept is not None:
                kept[rows[hit]] = found[hit, 3:].reshape(-1, *kept.shape[1:]).to(kept)
        robust = broken_by == ""
        members.append(Member(attack.name, spoken(attack), len(rows) - int(robust.sum()), float(robust.mean()), _interval(robust), seconds))
    right, robust = broken_by != CLEAN, broken_by == ""
    begin = time.perf_counter()
    judged, looked = _judged(task, params, data, threat, attacks, members, right, robust, torch.cat(outside)) if checks else ((), 0)
    seconds = sum(each.seconds for each in members) + time.perf_counter() - begin
    words = said(threat, data.batch(slice(0, 1))[0].to(like), radius)
    return RobustAccuracy(data.ids, right, robust, broken_by.astype(str), words, name, tuple(members), judged, looked, seconds, kept)


def said(threat: Threat, x: Tensor, radius: str | None = None) -> str:
    """What the attacker may do in words, for inputs like ``x`` ``(1, …)``; ``radius`` replaces the bare number."""
    lengths = Ball.around(x.detach(), threat).radius
    moving = lengths[lengths > 0]
    least, most = (float(moving.min()), float(moving.max())) if len(moving) else (0.0, 0.0)
    number = radius or (f"{least:.4g}" if np.isclose(least, most, rtol=1e-5) else f"{least:.4g} to {most:.4g} by feature")
    parts = [f"{'L∞' if threat.norm == 'linf' else 'L2'} radius {number}"]
    if len(moving) < lengths.numel():
        parts.append(f"{len(moving)} of {lengths.numel()} features may move")
    if threat.bounds is None:
        parts.append("inputs have no bounds")
    elif all(np.ndim(bound) == 0 for bound in threat.bounds):
        parts.append(f"inputs from {float(threat.bounds[0]):g} to {float(threat.bounds[1]):g}")
    else:
        parts.append("inputs within the bounds of each feature")
    return ", ".join([*parts, *(["valid values only"] if threat.project else [])])


def spoken(attack: Attack) -> str:
    """The steps, queries and so on of an attack in words."""
    settings = {name: getattr(attack, name) for name in ("steps", "queries", "classes") if hasattr(attack, name)}
    return ", ".join(f"{value} {name}" for name, value in {**settings, **getattr(attack, "options", {})}.items())


def check(task: Task, data: Samples, threat: Threat, preset: Preset | Attack) -> tuple[str, tuple[Attack, ...]]:
    """The name of a preset and its attacks, after every check that needs no attack; arguments and errors are those of :func:`robust_accuracy`."""
    presets: Mapping[str, Callable[[Threat], Attack]] = {"standard": standard, "lite": lite}
    if isinstance(preset, str):
        if preset not in presets:
            raise ValueError(f"preset: expected {' or '.join(map(repr, presets))}, or an attack, got {preset!r}")
        preset = presets[preset](threat)
    attacks = preset.attacks if isinstance(preset, Ensemble) else (preset,)
    if any(each.threat is not threat for each in attacks):
        raise ValueError("preset: expected attacks with the threat that is asked about; make them of the very same object")
    params = task.params()
    like = next(iter(params.values()))
    batch = to(data.batch(slice(0, 2)), like)
    if not isinstance(batch, (tuple, list)) or len(batch) < 2 or not all(isinstance(each, Tensor) for each in batch[:2]):
        raise ValueError("data: expected (x, y), inputs with their labels")
    # a map-style data set is not read whole for this; its other inputs are checked as they come
    threat.check(to(data.tensors[0], like) if isinstance(data.tensors, tuple) else batch[0], "data")
    with torch.no_grad():
        classes = class_logits(task.outputs(params, batch)).shape[1]
    labels = data.labels
    if not ((labels == labels.long()) & (labels >= 0) & (labels < classes)).all():
        span = f"{float(labels.min()):g} to {float(labels.max()):g}"
        raise ValueError(f"data: expected labels from 0 to {classes - 1}, the model's classes, got some from {span}")
    return preset.name, attacks


def _tried(task: Task, params: Params, attack: Attack, points: bool, batch: Batch) -> Tensor:
    """Per sample: whether the attack broke it, how far its input lies outside the threat, seconds, and the input where it is wanted."""
    begin = time.perf_counter()
    found = attack.first_error(task, params, batch)
    seconds = (time.perf_counter() - begin) / len(found)
    hit = checking.errors(task, params, (found, *batch[1:]))
    outside = checking.excess(attack.threat, batch[0], found).double().cpu()
    columns = torch.stack([hit.double(), outside, torch.full_like(outside, seconds)], 1)
    return torch.cat([columns, found.double().cpu().flatten(1)], 1) if points else columns


def _judged(
    task: Task, params: Params, data: Samples, threat: Threat, attacks: tuple[Attack, ...], members: list[Member], right: NDArray[np.bool_],
    robust: NDArray[np.bool_], outside: Tensor,
) -> tuple[tuple[Check, ...], int]:  # fmt: skip
    """The checks, on samples that are right without attack where there are any, and the number of these samples."""
    among = np.flatnonzero(right) if right.any() else np.arange(len(data))
    rows = among[np.linspace(0, len(among) - 1, min(checking.SAMPLES, len(among))).round().astype(int)]
    batch = to(data.batch(torch.from_numpy(rows)), next(iter(params.values())))
    subject = Subject(task, params, batch, threat, torch.from_numpy(robust[rows]))
    found = [checking.allowed(outside), *checking.of_model(subject)]
    if right.any():
        found += checking.of_attack(subject)
        last = isinstance(attacks[-1], Square) and len(attacks) > 1  # its samples are those that no gradient led to
        found.append(checking.black_box(members[-1].broke, int(right.sum()), members[-1].name) if last else checking.searched(subject))
    return tuple(found), len(rows)


def _interval(which: NDArray[np.bool_]) -> tuple[float, float]:
    low, high = wilson(np.asarray(float(which.sum())), np.asarray(float(len(which))), _LEVEL)
    return float(low), float(high)


def _percent(share: float, ends: tuple[float, float]) -> str:
    return f"{100 * share:.1f} % ({100 * ends[0]:.1f} to {100 * ends[1]:.1f})"
