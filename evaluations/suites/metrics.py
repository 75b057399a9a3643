"""The metrics of suites by name; each gives one or more columns, and none where it has no meaning for the row."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from robust_if.evaluations.baselines import predict
from robust_if.evaluations.detection import detection as detected
from robust_if.evaluations.poisoning import filter_bias
from robust_if.evaluations.suites import published
from robust_if.evaluations.suites.parts import Attacked, Defended
from robust_if.evaluations.suites.robust import attacked_again
from robust_if.evaluations.suites.truth import right_labels, wrong
from robust_if.fairness.metrics import gap


def accuracy(attacked: Attacked, defended: Defended, *, seed: int) -> Mapping[str, float]:
    """``accuracy`` on the clean test samples, and that of the class where it is lowest."""
    right, labels = _right(attacked, defended)
    return {"accuracy": float(right.mean()), "worst_class_accuracy": min(float(right[labels == label].mean()) for label in np.unique(labels))}


def attack_success(attacked: Attacked, defended: Defended, *, seed: int) -> Mapping[str, float]:
    """``attack_success``: what the attacker gains from the defended model, from 0 to 1."""
    return {} if attacked.success is None else {"attack_success": float(attacked.success(defended.task))}


def detection(attacked: Attacked, defended: Defended, *, seed: int) -> Mapping[str, float]:
    """How well the scores tell bad samples from good ones, see :class:`robust_if.evaluations.detection.Detection`."""
    bad = wrong(attacked)
    if defended.scores is None or bad is None or not 0 < bad.sum() < len(bad):
        return {}
    found = detected(defended.scores, bad, replicates=0)
    return {name: float(getattr(found, name)) for name in ("auroc", "average_precision", "precision_at_k", "tpr_at_1_fpr", "tpr_at_5_fpr")}


def robust_accuracy(attacked: Attacked, defended: Defended, *, seed: int, preset: str = "lite", points: int = 200) -> Mapping[str, float]:
    """``robust_accuracy`` of the first ``points`` test samples, all for 0, attacked at the defended model within the scene's threat.

    Args:
        preset: ``"standard"``, ``"lite"``, or ``"pgd-20"`` for so many steps of projected gradient ascent.
        points: test samples that are attacked.
    """
    threat = attacked.scene.threat
    if threat is None:
        return {}
    return {"robust_accuracy": attacked_again(defended.task, attacked.scene.test, threat, preset, points=points).accuracy}


def fairness(attacked: Attacked, defended: Defended, *, seed: int) -> Mapping[str, float]:
    """Gaps of decisions between the groups of the test samples by fairlearn's names, and the accuracy of the group where it is lowest."""
    groups = attacked.scene.groups.get("test")
    if groups is None:
        return {}
    y, decisions = attacked.scene.test.labels.numpy(), predict(defended.task, attacked.scene.test).argmax(1)
    notions = ("demographic_parity", "equal_opportunity", "equalized_odds")
    gaps = {f"{notion}_difference": gap(notion, y, decisions, groups) for notion in notions}
    right = decisions == y
    worst = min(float(right[groups.codes == code].mean()) for code in np.unique(groups.codes))
    return {**{name: value for name, value in gaps.items() if np.isfinite(value)}, "worst_group_accuracy": worst}


def removed(attacked: Attacked, defended: Defended, *, seed: int) -> Mapping[str, float]:
    """``removed_share`` and ``relabelled_share`` of the training samples, and ``bad_kept``: the share of the bad that still teach what they did."""
    given, bad = attacked.scene.train.labels.numpy(), wrong(attacked)
    changed = np.zeros(len(given), dtype=bool) if defended.labels is None else defended.labels != given
    gone = np.zeros(len(given), dtype=bool) if defended.weights is None else defended.weights == 0
    found = {"removed_share": float(gone.mean()), "relabelled_share": float(changed.mean())}
    if bad is not None and bad.any():
        found["bad_kept"] = float((~gone & ~changed)[bad].mean())
    return found


def bias(attacked: Attacked, defended: Defended, *, seed: int) -> Mapping[str, float]:
    """Whom a filter removed by mistake: the share of the good samples, and that of the class and of the group that it hit most.

    See :func:`robust_if.evaluations.poisoning.filter_bias`.
    """
    bad = wrong(attacked)
    if bad is None or defended.weights is None:
        return {}
    groups = attacked.scene.groups.get("train")
    table = filter_bias(bad, defended.weights == 0, attacked.scene.train.labels.numpy(), None if groups is None else groups.codes)
    worst = table.groupby("by")["false_positive_rate"].max()
    names = {"all": "false_positive_rate", "class": "worst_class_false_positive_rate", "group": "worst_group_false_positive_rate"}
    return {name: float(worst[by]) for by, name in names.items() if by in worst and np.isfinite(worst[by])}


def relabelling(attacked: Attacked, defended: Defended, *, seed: int) -> Mapping[str, float]:
    """``relabel_accuracy``: share of the training samples whose label is right in the end, and ``relabel_accuracy_of_bad`` among the bad ones."""
    right, bad = right_labels(attacked), wrong(attacked)
    if right is None or defended.labels is None:
        return {}
    hit = defended.labels == right
    found = {"relabel_accuracy": float(hit.mean())}
    return found if bad is None or not bad.any() else {**found, "relabel_accuracy_of_bad": float(hit[bad].mean())}


def _right(attacked: Attacked, defended: Defended) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """Which test samples the model gets right, and their labels."""
    test = attacked.scene.test
    labels = test.labels.numpy()
    return predict(defended.task, test).argmax(1) == labels, labels


#: By name: ``(attacked, defended, *, seed, options) -> numbers by column``.
METRICS: Mapping[str, Callable[..., Mapping[str, float]]] = {
    "accuracy": accuracy,
    "attack-success": attack_success,
    "detection": detection,
    "robust-accuracy": robust_accuracy,
    "fairness": fairness,
    "removed": removed,
    "filter-bias": bias,
    "relabelling": relabelling,
    **published.METRICS,
}

#: Of every column, whether more is better; for shares that were removed or relabelled that is not known.
HIGHER_IS_BETTER: Mapping[str, bool] = {
    **dict.fromkeys(("accuracy", "worst_class_accuracy", "robust_accuracy", "worst_group_accuracy"), True),
    **dict.fromkeys(("accuracy_stored", "accuracy_untouched", "accuracy_attacked_again"), True),
    **dict.fromkeys(("auroc", "average_precision", "precision_at_k", "tpr_at_1_fpr", "tpr_at_5_fpr"), True),
    **dict.fromkeys(("relabel_accuracy", "relabel_accuracy_of_bad"), True),
    **dict.fromkeys(("attack_success", "bad_kept"), False),
    **dict.fromkeys(("demographic_parity_difference", "equal_opportunity_difference", "equalized_odds_difference"), False),
    **dict.fromkeys(("false_positive_rate", "worst_class_false_positive_rate", "worst_group_false_positive_rate"), False),
}
