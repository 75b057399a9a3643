"""The attacks of suites by name: none, wrong labels, poison against fairness, and evasion at test time; planted behaviours stand beside.

``rate`` is a share of the training samples unless said otherwise. Attackers who need a model train one of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from robust_if.attacks import backdoors, fairness, labels
from robust_if.attacks.evasion import Norm, Threat
from robust_if.attacks.poisoned import Poisoned
from robust_if.data import Samples
from robust_if.evaluations.baselines import predict
from robust_if.evaluations.suites import planted, published
from robust_if.evaluations.suites.parts import Change, Scene
from robust_if.evaluations.suites.planted import own_model
from robust_if.evaluations.suites.robust import attacked_again, search
from robust_if.evaluations.suites.truth import Known
from robust_if.fairness.groups import Groups
from robust_if.fairness.metrics import gap
from robust_if.fairness.targets import fairness_gap
from robust_if.task import Task


def none(scene: Scene, *, seed: int, seen: int = 0, goal: int = 0, size: int = 3) -> Change:
    """Nothing is wrong: what a defence costs where there is no attack.

    Args:
        seen: so many stamped test images are nevertheless reported to the defender as an attack with that ``goal``: a false alarm.
        size: of the square on them.
    """
    clean = np.zeros(len(scene.train), dtype=bool)
    if not seen:
        return Change(scene, clean)
    alarm = backdoors.badnets(goal, size=size, bounds=planted.bounds(scene))
    return Change(scene, clean, seen=planted.triggered(scene, alarm, seed, seen)[0])


def uniform(scene: Scene, *, seed: int, rate: float = 0.2) -> Change:
    """Labels of other classes at random, see :func:`robust_if.attacks.labels.uniform`."""
    return _noisy(scene, labels.uniform(scene.train, rate, seed=seed))


def pair(scene: Scene, *, seed: int, rate: float = 0.2) -> Change:
    """Labels of the next class, see :func:`robust_if.attacks.labels.pair`."""
    return _noisy(scene, labels.pair(scene.train, rate, seed=seed))


def targeted(scene: Scene, *, seed: int, source: int = 4, goal: int = 9, rate: float = 0.4) -> Change:
    """A share ``rate`` of the class ``source`` gets the label ``goal``; success is the share of its test samples that are taken for that class."""
    aims = scene.test.take(scene.test.labels.numpy() == source)

    def success(task: Task) -> float:
        return float((predict(task, aims).argmax(1) == goal).mean())

    return replace(_noisy(scene, labels.targeted(scene.train, source, goal, rate, seed=seed)), success=success)


def boundary(scene: Scene, *, seed: int, rate: float = 0.1) -> Change:
    """The labels that a model of the attacker's own finds most plausible besides the right ones, see :func:`robust_if.attacks.labels.boundary`."""
    return _noisy(scene, labels.boundary(scene.train, rate, own_model(scene, seed)))


def instance_dependent(scene: Scene, *, seed: int, rate: float = 0.2) -> Change:
    """Labels that flip as the features say, see :func:`robust_if.attacks.labels.instance_dependent`."""
    return _noisy(scene, labels.instance_dependent(scene.train, rate, seed=seed))


def group_flips(scene: Scene, *, seed: int, rate: float = 0.1, group: str = "") -> Change:
    """Labels flipped to the gain of one group, see :func:`robust_if.attacks.fairness.group_flips`.

    Args:
        group: its name; the one with the higher share of label 1 by default. Success is the gap of demographic parity on the test samples.
    """
    data = _with_groups(scene, group)
    return _unfair(scene, fairness.group_flips(data, rate, seed=seed), data)


def anchoring(
    scene: Scene, *, seed: int, rate: float = 0.1, radius: float = 0.0, spread: float = 0.1, quantile: float = 0.9, group: str = ""
) -> Change:
    """Samples added around two anchors, see :func:`robust_if.attacks.fairness.anchoring`; ``group`` as of the flips.

    Args:
        radius: within which neighbours count; 0 for anchors drawn at random.
    """
    data = _with_groups(scene, group)
    poisoned = fairness.anchoring(data, rate, seed=seed, radius=radius or None, spread=spread, quantile=quantile)
    return _unfair(scene, poisoned, data)


def influence_flips(scene: Scene, *, seed: int, rate: float = 0.1, notion: str = "demographic_parity") -> Change:
    """The flips that are predicted to raise a gap most, see :func:`robust_if.attacks.labels.influence_chosen`.

    The attacker knows the recipe and the validation samples, which is the worst case.
    """
    data = _with_groups(scene, "")
    target = fairness_gap(notion, scene.valid, scene.groups["valid"], smallest=1)
    flipped = labels.influence_chosen(scene.train, rate, own_model(scene, seed), target)
    return _unfair(scene, Poisoned(data.with_labels(flipped.data.labels), flipped.mask), data)


def evasion(scene: Scene, *, seed: int, eps: float = 0.1, norm: Norm = "linf", preset: str = "lite", points: int = 200) -> Change:
    """The defended model is attacked at test time, and every metric of robustness uses the same radius.

    Args:
        eps: radius, in the unit of the scene's inputs.
        norm: ``"linf"`` or ``"l2"``.
        preset: of the search, see :func:`robust_if.evaluations.robustness.robust_accuracy`. Success is the share of test samples that are right and
            become wrong, at the model that is judged.
        points: test samples that are attacked, the first ones; 0 for all.
    """
    if norm not in ("linf", "l2"):
        raise ValueError(f"norm: expected 'linf' or 'l2', got {norm!r}")
    if not 0 < eps < np.inf:
        raise ValueError(f"eps: expected a positive number, got {eps}")
    threat = Threat(eps, norm) if scene.threat is None else replace(scene.threat, eps=eps, norm=norm)
    search(threat, preset)

    def success(task: Task) -> float:
        found = attacked_again(task, scene.test, threat, preset, points=points)
        return found.clean_accuracy - found.accuracy

    return Change(replace(scene, threat=threat), np.zeros(len(scene.train), dtype=bool), success)


def _noisy(scene: Scene, poisoned: Poisoned[Samples]) -> Change:
    return Change(replace(scene, train=poisoned.data), poisoned.mask)


def _with_groups(scene: Scene, group: str) -> Samples:
    """The training samples with their group, 1 for the favoured one, as third tensor."""
    if "train" not in scene.groups:
        raise ValueError("data: this attack needs sensitive groups, and the data set has none")
    groups, y = scene.groups["train"], scene.train.labels.numpy()
    names = [name for name, size in zip(groups.names, groups.sizes, strict=True) if size]
    if len(names) != 2:
        raise ValueError(f"data: this attack needs two groups, got {names[:10]}")
    favoured = _position(groups, group) if group else max(np.unique(groups.codes), key=lambda code: y[groups.codes == code].mean())
    x, labelled = scene.train.batch(slice(None))[:2]
    return Samples((x, labelled, torch.from_numpy((groups.codes == favoured).astype(np.int64))), scene.train.ids)


def _position(groups: Groups, name: str) -> int:
    for at, (words, values) in enumerate(zip(groups.names, groups.values, strict=True)):
        if name in (words, *values):
            return at
    raise ValueError(f"group: expected one of {', '.join(groups.names)}, got {name!r}")


def _unfair(scene: Scene, poisoned: Poisoned[Samples], before: Samples) -> Change:
    """The scene with the poisoned table; added samples get a group, and count as right in their anchor's label."""
    x, y, s = poisoned.data.batch(slice(None))
    old, favoured = scene.groups["train"], before.batch(slice(None))[2].numpy()
    code = [int(old.codes[favoured == each][0]) for each in (0, 1)]
    n, total = len(before), len(y)
    codes = np.where(s.numpy() == 1, code[1], code[0])
    groups = {**scene.groups, "train": Groups(codes, old.features, old.values)}
    fields: dict[str, Any] = {"train": Samples((x, y), poisoned.data.ids), "groups": groups}
    if scene.mislabelled is not None:
        fields["mislabelled"] = np.r_[scene.mislabelled, np.zeros(total - n, dtype=bool)]
    if isinstance(scene, Known):
        fields["right"] = np.r_[scene.right, 1 - y.numpy()[n:]]
    return Change(replace(scene, **fields), poisoned.mask, lambda task: _gap(task, scene))


def _gap(task: Task, scene: Scene) -> float:
    decisions: NDArray[np.int64] = predict(task, scene.test).argmax(1)
    return gap("demographic_parity", scene.test.labels.numpy(), decisions, scene.groups["test"])


#: By name: ``(scene, *, seed, options) -> Change``.
ATTACKS: Mapping[str, Callable[..., Change]] = {
    "none": none,
    "label-uniform": uniform,
    "label-pair": pair,
    "label-targeted": targeted,
    "label-boundary": boundary,
    "label-instance-dependent": instance_dependent,
    "badnets": planted.badnets,
    "blended": planted.blended,
    "sig": planted.sig,
    "label-consistent": planted.label_consistent,
    "wanet": planted.wanet,
    "tact": planted.tact,
    "adaptive-blend": planted.adaptive_blend,
    "feature-trigger": planted.feature_trigger,
    "split-backdoor": planted.splitting,
    "easy-backdoor": planted.easy,
    "flooded-backdoor": planted.flooding,
    "gradient-matching": planted.gradient_matching,
    "bullseye-polytope": planted.bullseye_polytope,
    "feature-collision": planted.feature_collision,
    "group-flips": group_flips,
    "anchoring": anchoring,
    "influence-flips": influence_flips,
    "evasion": evasion,
    **published.ATTACKS,
}
