"""What a repair of a file is asked."""

from __future__ import annotations

from dataclasses import dataclass, field

from robust_if.estimators import Estimator
from robust_if.fairness.metrics import COMPARED
from robust_if.fairness.steps import ACTIONS, Action
from robust_if.loading import Dataset
from robust_if.training import Recipe

#: The model that is fitted in closed form where there are two classes.
CLOSED_FORM = "logistic-regression"


@dataclass(frozen=True)
class RepairPlan:
    """What is repaired and how.

    Args:
        train: what is changed.
        valid: decides what is changed, and when to stop.
        test: looked at once, at the end.
        sensitive: columns of a table, or ``column<number`` (also ``<=``, ``>``, ``>=``); of several the intersections are compared.
        targets: notions of fairness that hard decisions have, see :data:`robust_if.fairness.metrics.COMPARED`.
        action: ``"reweigh"``, ``"remove"`` or ``"relabel"``.
        bound: of the absolute value of every gap, on validation data.
        max_accuracy_loss: on validation data, from 0 to 1.
        control: columns like ``sensitive``, within whose values groups are compared.
        positive: the label whose prediction is the benefit, as text; by default the last of two labels, and each of more.
        without_sensitive: whether the sensitive columns are kept from the model.
        model: name of a ready model or ``module:function``; :data:`CLOSED_FORM` is fitted in closed form where there are two classes.
        recipe: how any other model is trained.
        estimator: scores the samples; the exact inverse Hessian in closed form, and the inner product of gradients elsewhere, by default.
        penalty: L2 penalty of the closed form, the inverse of scikit-learn's ``C``.
        rounds: steps that are tried at most.
        cost: price of changing every weight by one, in units of utility: the higher, the fewer samples are changed.
        repeats: trainings from scratch with different seeds that confirm another model.
        smallest: groups with fewer samples are warned of.
        seed: of everything random.
        title, command: what the report is called, and what repeats the run.
        warnings: what the reader should know.
        whole: the data that ``train`` was split from, if it was; the repaired copy keeps the samples that were split off.
    """

    train: Dataset
    valid: Dataset
    test: Dataset
    sensitive: tuple[str, ...]
    targets: tuple[str, ...]
    action: Action = "reweigh"
    bound: float = 0.005
    max_accuracy_loss: float | None = None
    control: tuple[str, ...] = ()
    positive: str | None = None
    without_sensitive: bool = False
    model: str = CLOSED_FORM
    recipe: Recipe = field(default_factory=Recipe)
    estimator: Estimator | None = None
    penalty: float = 1.0
    rounds: int = 10
    cost: float = 0.05
    repeats: int = 3
    smallest: int = 30
    seed: int = 0
    title: str = "A repair of training data"
    command: str = ""
    warnings: tuple[str, ...] = ()
    whole: Dataset | None = None

    def check(self) -> None:
        """Look at every setting that needs no data.

        Raises:
            ValueError: if one is out of range, or unknown.
        """
        unknown = [name for name in self.targets if name not in COMPARED]
        if unknown or not self.targets or len(set(self.targets)) < len(self.targets):
            raise ValueError(f"target: expected some of {', '.join(COMPARED)}, each once, got {', '.join(unknown or self.targets) or 'none'}")
        if self.action not in ACTIONS:
            raise ValueError(f"action: expected one of {', '.join(ACTIONS)}, got {self.action!r}")
        if not self.bound >= 0:
            raise ValueError(f"bound: expected a number from 0 on, got {self.bound}")
        if self.max_accuracy_loss is not None and not 0 <= self.max_accuracy_loss <= 1:
            raise ValueError(f"max-accuracy-loss: expected a share from 0 to 1, got {self.max_accuracy_loss}")
        for name in ("rounds", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if not self.penalty > 0:
            raise ValueError(f"penalty: expected a number above 0, got {self.penalty}")
