"""Signs that a robust accuracy is too good to be true.

An attack only ever bounds robust accuracy from above, and it fails silently where gradients lead nowhere: a model may look robust because its outputs
are rounded, saturated, random, or no logits at all. What a sound evaluation looks like, whatever the model, is known: more steps and a larger radius
never help the defender, a ball that holds every valid input leaves no accuracy, and a search without gradients finds no more than one with them. Each
check asks for one of these on a few samples that the model gets right without attack.

Source: the list of Carlini et al. 2019 (arXiv 1902.06705), section 5; zero gradients, random models, probabilities in place of logits, and Square
beating the other attacks are what AutoAttack warns of too (Croce and Hein 2020, arXiv 2003.01690). The thresholds are ours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the name that every reader of torch code expects

from robust_if.attacks.evasion import APGD, Attack, Square, TargetedAPGD, Threat, margin
from robust_if.attacks.evasion.ball import Ball, fit
from robust_if.attacks.evasion.losses import take
from robust_if.predictions import class_logits
from robust_if.task import Batch, Params, Task

#: Samples that the checks look at, at most.
SAMPLES = 64
#: Share of the samples, and always one of them, that may contradict a check by accident.
TOLERATED = 0.02
#: Share of the samples that may have no gradient at all.
BLIND = 0.05
#: How far two evaluations of one input may lie apart, relative to the largest output: other batch sizes round differently.
ROUNDING = 1e-4
#: Steps of the searches that are compared, and of those in larger balls.
FEW, MANY, USUAL = 10, 200, 50
#: Classes towards which the longest search goes.
RIVALS = 3
#: Queries of the search without gradients, where the attack holds none itself.
QUERIES = 1000
#: Radii relative to the threat's; no smaller one, within which a category could not change any more.
RADII = (1.0, 1.5, 2.0)
#: Where inputs have no bounds, so many times the radius stand for everywhere.
EVERYWHERE = 1000.0
#: Factors of the logits at which gradients are looked at.
SCALES = (1.0, 1e-2, 1e-4, 1e-6)


@dataclass(frozen=True)
class Check:
    """What one check found.

    Args:
        name: short, for tables.
        passed: ``None`` where there is nothing to judge.
        said: one sentence for a reader.
        numbers: what it was judged by.
    """

    name: str
    passed: bool | None
    said: str
    numbers: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Subject:
    """Samples, which a model gets right without attack, and what an evaluation said of them.

    Args:
        task: the model.
        params: the parameters at which it is judged.
        batch: ``(x, y)`` of m samples.
        threat: what the attacker may do.
        robust: boolean ``(m,)``, true where the attack failed.
    """

    task: Task
    params: Params
    batch: Batch
    threat: Threat
    robust: Tensor

    def __len__(self) -> int:
        return len(self.robust)

    @property
    def radius(self) -> Tensor:
        """With the shape of one sample, 0 where a feature may not move."""
        return Ball.around(self.batch[0], self.threat).radius

    def outputs(self, batch: Batch | None = None) -> Tensor:
        with torch.no_grad():
            found: Tensor = self.task.outputs(self.params, self.batch if batch is None else batch)
        return found

    def broken(self, *attacks: Attack, among: Tensor | None = None) -> Tensor:
        """Which of the samples ``among``, all by default, one of the attacks breaks, ``(m,)``."""
        left = torch.ones(len(self), dtype=torch.bool) if among is None else among.clone()
        found = torch.zeros(len(self), dtype=torch.bool)
        for attack in attacks:
            if not left.any():
                break
            rows = left.nonzero()[:, 0]
            part = take(self.batch, rows)
            moved = (attack.first_error(self.task, self.params, part), *part[1:])
            found[rows] = errors(self.task, self.params, moved)
            left &= ~found
        return found


def of_model(subject: Subject) -> list[Check]:
    """What can be seen without an attack; right or wrong, any samples will do."""
    return [logits(subject), repeatable(subject), gradients(subject), saturation(subject), classes(subject)]


def of_attack(subject: Subject) -> list[Check]:
    """What searches find; none where no feature may move."""
    return [*steps(subject), larger(subject), everywhere(subject)] if subject.radius.any() else []


def errors(task: Task, params: Params, batch: Batch) -> Tensor:
    """Which samples the model gets wrong, ``(B,)`` on the CPU.

    Raises:
        ValueError: if the outputs are no logits, or not finite.
    """
    with torch.no_grad():
        found = class_logits(task.outputs(params, batch))
    if not found.isfinite().all():
        raise ValueError(f"model: expected finite logits, got NaN or infinity in sample {int((~found.isfinite()).nonzero()[0, 0])} of the batch")
    wrong: Tensor = found.argmax(1) != batch[1].reshape(-1).to(found.device)
    return wrong.cpu()


def excess(threat: Threat, clean: Tensor, points: Tensor) -> Tensor:
    """How far each of the points ``(B, …)`` lies outside what the threat allows, the largest distance of its features, ``(B,)``."""
    nearest = Ball.around(clean, threat).clip(points)
    return (nearest - points).abs().flatten(1).amax(1)


def allowed(outside: Tensor) -> Check:
    """Whether every attacked input is one that the threat allows; a millionth of the unit is rounding."""
    worst, count = float(outside.max()), int((outside > 1e-5).sum())
    said = f"{count} attacked inputs lie outside the ball or the bounds, by up to {worst:g}" if count else "every attacked input keeps to the threat"
    return Check("inside the ball", count == 0, said, {"outside": count, "furthest": worst})


def logits(subject: Subject) -> Check:
    """Whether the model returns logits and not probabilities, whose cross-entropy is nearly flat."""
    outputs = subject.outputs().double()
    outputs = outputs.reshape(len(outputs), -1)
    between, sums = bool(((outputs >= 0) & (outputs <= 1)).all()), outputs.sum(1)
    passed = not (between and (outputs.shape[1] == 1 or bool(((sums - 1).abs() < 1e-4).all())))
    said = "the outputs are not those of a softmax" if passed else "the outputs look like probabilities; attack the logits, before the softmax"
    return Check("logits", passed, said, {"least": float(outputs.min()), "most": float(outputs.max())})


def repeatable(subject: Subject) -> Check:
    """Whether a second evaluation, and one of each half of the samples, give the same outputs."""
    first, half = subject.outputs(), (len(subject) + 1) // 2
    halves = [subject.outputs(take(subject.batch, rows)) for rows in torch.split(torch.arange(len(subject)), max(half, 1))]
    largest = float(first.abs().max().clamp(min=1e-30))
    again, apart = (float((first - other).abs().max()) / largest for other in (subject.outputs(), torch.cat(halves)))
    numbers = {"again": again, "in halves": apart}
    if again > ROUNDING:
        return Check("deterministic", False, f"two evaluations differ by {again:.2g} of the largest output: the model is random", numbers)
    if apart > ROUNDING:
        return Check("deterministic", False, f"outputs change by {apart:.2g} with the other samples of a batch", numbers)
    return Check("deterministic", True, "evaluated again, and in other batches, the outputs are the same", numbers)


def gradients(subject: Subject) -> Check:
    """Whether the margin of the logits has a gradient in the features that may move."""
    blind = _blind(subject, margin)
    said = f"{100 * blind:.0f} % of the samples have a margin without any gradient" + ("" if blind <= BLIND else ": no attack by gradients sees them")
    return Check("gradients", _judged(subject, blind <= BLIND), said, {"share": blind})


def saturation(subject: Subject) -> Check:
    """Whether the cross-entropy has a gradient too; very large logits leave it none in finite precision, so that attacks on it stand still."""
    shares = {f"logits x {scale:g}": _blind(subject, _scaled(scale)) for scale in SCALES}
    blind, best = next(iter(shares.values())), min(shares, key=lambda name: shares[name])
    said = f"{100 * blind:.0f} % of the samples have a cross-entropy without any gradient"
    if shares[best] <= BLIND < blind:
        said += f" ({100 * shares[best]:.0f} % at {best}); attack the model with smaller logits"
    return Check("saturation", _judged(subject, blind <= BLIND), said, shares)


def steps(subject: Subject) -> tuple[Check, Check]:
    """Whether more steps do not help the defender, and break nothing that was counted as robust."""
    few, many = (subject.broken(APGD(subject.threat, steps=number, loss="margin")) for number in (FEW, MANY))
    numbers = {f"{FEW} steps": _left(few), f"{MANY} steps": _left(many)}
    towards = subject.broken(TargetedAPGD(subject.threat, steps=MANY, classes=RIVALS), among=subject.robust & ~many)
    lost, new = int(few.sum() - many.sum()), int(((many | towards) & subject.robust).sum())
    told = f"accuracy is {100 * _left(few):.0f} % under {FEW} steps and {100 * _left(many):.0f} % under {MANY}"
    told += "" if _accident(lost, subject) else ": the search does not work on this model"
    said = f"{MANY} steps break {new} of {int(subject.robust.sum())} samples that count as robust"
    said += "" if _accident(new, subject) else ": the attack is too weak for a robust accuracy"
    return (
        Check("more steps", _accident(lost, subject), told, numbers),
        Check("converged", _accident(new, subject), said, {"broken": new, "robust": int(subject.robust.sum())}),
    )


def larger(subject: Subject) -> Check:
    """Whether accuracy does not rise with the radius."""
    broken = [int(subject.broken(APGD(subject.threat.scaled(factor), steps=USUAL, loss="margin")).sum()) for factor in RADII]
    fall = max(less - more for less, more in pairwise(broken))
    shares = {f"radius x {factor:g}": 1 - count / len(subject) for factor, count in zip(RADII, broken, strict=True)}
    said = "accuracy is " + ", ".join(f"{100 * share:.0f} % at {name}" for name, share in shares.items())
    return Check("larger radius", _accident(fall, subject), said + ("" if _accident(fall, subject) else ": it must not rise"), shares)


def everywhere(subject: Subject) -> Check:
    """Whether the bounds alone, or a very large radius where there are none, leave no more accuracy than chance.

    A failure where some features may not move, or only some values are valid, may be the model's own: it is told and not judged.
    """
    radius, threat = subject.radius, subject.threat
    span = torch.full_like(radius, torch.inf)
    if threat.bounds is not None:
        low, high = (fit("bounds", bound, subject.batch[0]) for bound in threat.bounds)
        span = high - low
    # an L2 ball that holds the box has the length of its diagonal
    reach = torch.where(span.isfinite(), span * (radius.numel() ** 0.5 if threat.norm == "l2" else 1), EVERYWHERE * radius)
    whole = replace(threat, eps=torch.where(radius > 0, reach, 0))
    count = class_logits(subject.outputs()).shape[1]
    try:
        left = _left(subject.broken(*(APGD(whole, steps=USUAL, loss=loss) for loss in ("margin", "ce"))))
    except ValueError as error:
        return Check("whole range", None, f"it could not be tried: {error}")
    passed = left <= max(1 / count, 1 / len(subject))
    said = f"accuracy is {100 * left:.0f} % where the attack may move inputs anywhere"
    if not passed and (not (radius > 0).all() or threat.project):
        return Check("whole range", None, said + ", within the values and features that may change", {"accuracy": left})
    return Check("whole range", passed, said + ("" if passed else f", more than chance ({100 / count:.0f} %)"), {"accuracy": left})


def searched(subject: Subject) -> Check:
    """Whether a search without gradients breaks nothing that counts as robust."""
    if subject.threat.norm != "linf":
        return Check("black box", None, f"not tried: there is no search without gradients in {subject.threat.norm}")
    new = int(subject.broken(Square(subject.threat, queries=QUERIES), among=subject.robust).sum())
    return black_box(new, len(subject), f"Square, {QUERIES} queries,")


def black_box(new: int, n: int, who: str) -> Check:
    """The judgement on a search without gradients that broke ``new`` of ``n`` samples which attacks by gradients had not broken."""
    passed = new <= max(1, TOLERATED * n)
    said = f"{who} breaks {new} of {n} samples that gradients did not" + ("" if passed else ": gradients are masked, or the attack is too weak")
    return Check("black box", passed, said, {"broken": new, "n": n})


def classes(subject: Subject) -> Check:
    """How many classes there are: attacks towards each other class need four for the ratio of logits, and take the margin otherwise."""
    count = class_logits(subject.outputs()).shape[1]
    few = "; with fewer than 4 targeted attacks raise a margin in place of the ratio of logits" if count < 4 else ""
    return Check("classes", None, f"{count} classes{few}", {"classes": count})


def _blind(subject: Subject, loss: Callable[[Any, Batch], Tensor]) -> float:
    """Share of the samples whose loss has a gradient of exactly 0 in all features that may move."""
    leaf = subject.batch[0].clone().requires_grad_()
    batch = (leaf, *subject.batch[1:])
    losses = loss(subject.task.outputs(subject.params, batch), batch)
    if not losses.requires_grad:
        return 1.0
    (slope,) = torch.autograd.grad(losses.sum(), leaf, allow_unused=True)
    if slope is None:
        return 1.0
    return float(((slope == 0) | (subject.radius == 0)).flatten(1).all(1).double().mean())


def _scaled(scale: float) -> Callable[[Any, Batch], Tensor]:
    return lambda outputs, batch: F.cross_entropy(scale * class_logits(outputs), batch[1].reshape(-1).long(), reduction="none")


def _judged(subject: Subject, passed: bool) -> bool | None:
    return passed if subject.radius.any() else None


def _accident(count: int, subject: Subject) -> bool:
    return count <= max(1, TOLERATED * len(subject))


def _left(broken: Tensor) -> float:
    return 1 - float(broken.double().mean())
