"""Triggered inputs at hand: read from a file, encoded, and split into those the target sees and those the attack's success is measured on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from robust_if.attacks.success import AttackSuccess
from robust_if.data import Samples
from robust_if.decisions import threshold_at
from robust_if.encoding import Encoder
from robust_if.estimators import Estimator, LossChange
from robust_if.evaluations.calibration import RATES, calibrated, thresholds
from robust_if.evaluations.plan import Suspicion
from robust_if.formats.parts import Kind
from robust_if.scores import Scores
from robust_if.sweep import Sweep
from robust_if.targets import Utility
from robust_if.task import Task
from robust_if.tuning import Plain, Tuning

#: Gives the scores of the verdict "poisoned": what the model forgets when it unlearns the attack. A model of sparse inputs, such as words, first
#: forgets clean samples too; 300 steps are enough to bring these back, and change nothing where 100 already are.
ESTIMATOR: Estimator = LossChange(Tuning(steps=300, flatness=Plain()))
#: So many triggered inputs are split into two halves; fewer serve for both.
ENOUGH = 10


@dataclass(frozen=True, eq=False)
class Suspected:
    """Encoded triggered inputs and the goal class.

    Args:
        seen: what the target looks at.
        held_out: what success is measured on, with true labels.
        goal: the goal class, as the model numbers it.
        false_positives: share of clean samples that may be flagged; as small as can be promised from 1 % on by default.
        shared: whether both are the same inputs.
        warnings: what a reader should know of them.
    """

    seen: Samples
    held_out: Samples
    goal: int
    false_positives: float | None
    shared: bool
    warnings: tuple[str, ...]

    def scores(self, task: Task, train: Samples, valid: Samples, sweep: Sweep) -> Scores:
        """Of every training sample, how much its loss rises when the model unlearns the attack and keeps what it says of validation samples.

        Samples that carry the goal class stand above all others. One half of the validation samples holds the model, the other one calibrates the
        threshold, which the provenance keeps with the share of false positives that it promises; and those of larger shares as ``thresholds``.
        """
        held, clean = _halves(valid)
        target = AttackSuccess(self.seen, goal_class=self.goal) + Utility(held)
        found, known = calibrated(ESTIMATOR, task, train, target=target, clean=clean, goal_class=self.goal, sweep=sweep)
        return _promising(replace(found, target="attack-success"), known, self.rates(valid))

    def rates(self, valid: Samples) -> tuple[float, ...]:
        """The shares of false positives that are tried one after another: the one asked for alone, or those from the smallest on."""
        least = self.promised(valid)
        return (least, *(rate for rate in RATES if rate > least)) if self.false_positives is None else (least,)

    def promised(self, valid: Samples) -> float:
        """The share of false positives that the threshold promises: the one asked for, or as close to 1 % as the validation samples allow.

        Raises:
            ValueError: if these are too few for what was asked.
        """
        _, clean = _halves(valid)
        if self.false_positives is None:
            return _smallest(clean)
        try:
            threshold_at(Scores(np.zeros(len(clean)), clean.ids, "check"), self.false_positives)
        except ValueError as error:
            hint = "" if "strictly" in str(error) else "; half of the validation samples calibrate: give more, or allow a larger share"
            raise ValueError(f"max-false-positives: {str(error).partition(': ')[2]}{hint}") from None
        return self.false_positives

    @classmethod
    def of(cls, suspicion: Suspicion, encoder: Encoder, train: Samples, seed: int) -> Suspected:
        """The triggered inputs of a suspicion.

        Args:
            encoder: the one learnt from the training data.
            train: the encoded training data, none of which may be among the inputs.
            seed: draws the two halves.

        Raises:
            ValueError: if the goal class is no class of the data, the inputs have other columns or another size, or they are training samples.
        """
        classes = [str(each) for each in encoder.classes.tolist()]
        if suspicion.goal_class not in classes:
            raise ValueError(f"goal-class: expected a class of the training data, {', '.join(classes[:20])}, got {suspicion.goal_class!r}")
        goal, given = classes.index(suspicion.goal_class), suspicion.inputs
        try:
            x = encoder.samples(replace(given, labels=np.full(len(given), encoder.classes[goal]))).batch(slice(None))[0]
        except ValueError as error:
            raise ValueError(f"attack-inputs: {error}") from None
        true = np.array([classes.index(str(label)) if str(label) in classes else -1 for label in given.labels.tolist()])
        warnings = []
        if (true == goal).all():
            warnings.append("All attack inputs are labelled with the goal class; that is taken for the attacker's label and not for the true one.")
            true = np.full(len(true), -1)
        elif (true == goal).any():
            warnings.append(f"{(true == goal).sum()} attack inputs are truly of the goal class, so they cannot show an attack and were left out.")
        inputs = Samples((x, torch.from_numpy(true)), given.ids)
        known = _known(inputs, train, given.kind)
        if known.any():
            warnings.append(f"{known.sum()} attack inputs are alike with a training sample in all columns, and were left out.")
        useful = (true != goal) & ~known
        if not useful.any():
            raise ValueError("attack-inputs: expected one that is not of the goal class and not in the training data, got none")
        return cls._split(inputs.take(useful), goal, suspicion.false_positives, seed, warnings)

    @classmethod
    def _split(cls, inputs: Samples, goal: int, false_positives: float | None, seed: int, warnings: list[str]) -> Suspected:
        n = len(inputs)
        if n < ENOUGH:
            given = "one attack input was" if n == 1 else f"{n} attack inputs were"
            warnings.append(
                f"Only {given} given, too few to split: attack success was measured on the very inputs that the scores had seen, "
                f"so it may fall more than on others, and so few show little of what makes the attack work, above all in text. Give {ENOUGH} or more."
            )
            return cls(inputs, inputs, goal, false_positives, True, tuple(warnings))
        order = np.random.default_rng([seed, n]).permutation(n)
        return cls(inputs.take(np.sort(order[: n // 2])), inputs.take(np.sort(order[n // 2 :])), goal, false_positives, False, tuple(warnings))


def blind_scores(estimator: Estimator, task: Task, train: Samples, valid: Samples, sweep: Sweep) -> Scores:
    """Scores from clean validation samples alone, with a threshold for estimators whose scores are ranks and show no gap between good and bad.

    One half of the validation samples is the target, the other one calibrates the threshold, as :meth:`Suspected.scores` does it.
    """
    held, clean = _halves(valid)
    found, known = calibrated(estimator, task, train, target=Utility(held), clean=clean, sweep=sweep)
    return _promising(found, known, (_smallest(clean),))


def _promising(scores: Scores, clean: Scores, rates: Sequence[float]) -> Scores:
    known = thresholds(clean, rates)
    return promising(replace(scores, provenance={**scores.provenance, "thresholds": known}), *known[0])


def promising(scores: Scores, rate: float, threshold: float) -> Scores:
    """The scores with the threshold that decides, and the share of false positives that it promises, in the provenance."""
    return replace(scores, provenance={**scores.provenance, "false_positives": rate, "threshold": threshold})


def _smallest(clean: Samples) -> float:
    """The share of false positives that is promised where none was asked for."""
    return max(RATES[0], 1 / (len(clean) + 1))


def _halves(valid: Samples) -> tuple[Samples, Samples]:
    """What the target holds fast, and what calibrates; drawn, since a file may be sorted by class."""
    order = np.random.default_rng(len(valid)).permutation(len(valid))
    return valid.take(np.sort(order[: len(valid) // 2])), valid.take(np.sort(order[len(valid) // 2 :]))


def _known(inputs: Samples, train: Samples, kind: Kind) -> NDArray[np.bool_]:
    """Which inputs have the content of a training sample, ``(n,)``: it would be found by being itself, and its success says nothing of the attack.

    Raises:
        ValueError: if there are any; among the rows of a table, where some may be alike by chance, if they are half or more.
    """
    contents = {row.tobytes(): name for row, name in zip(train.batch(slice(None))[0].numpy(), train.ids.tolist(), strict=True)}
    twins = [contents.get(row.tobytes()) for row in inputs.batch(slice(None))[0].numpy()]
    known = np.array([twin is not None for twin in twins])
    if known.any() and (kind != "table" or known.mean() >= 0.5):
        first = int(known.argmax())
        raise ValueError(
            f"attack-inputs: {known.sum()} of {len(inputs)} have the content of a training sample, first id {inputs.ids[first]} that of "
            f"{twins[first]}; give inputs that are not in the training data"
        )
    return known
