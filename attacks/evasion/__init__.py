"""Evasion: inputs moved within a ball so that a fixed model errs. FGSM, PGD and APGD share one search that keeps the best point met.

Inputs may have any shape, unit and bounds. The radius of the ball may differ by feature and is 0 where a feature must not move. Some inputs are
valid only on a grid, or as one of several categories; the search then moves a free point and tries the valid one that it projects to.

The functions search once; an :class:`Attack` holds what they are given, so that a target, a training or an evaluation can attack again and again.
:class:`TargetedAPGD`, :class:`FAB` and :class:`Square` look for errors alone, and an :class:`Ensemble` takes the worst of several attacks.
"""

from robust_if.attacks.evasion.ascent import apgd, fgsm, pgd, step_length
from robust_if.attacks.evasion.attack import APGD, FGSM, PGD, Attack
from robust_if.attacks.evasion.ball import Bounds, Limit, Norm, Projection, Threat, box
from robust_if.attacks.evasion.ensemble import Broken, Ensemble, lite, standard
from robust_if.attacks.evasion.fab import FAB
from robust_if.attacks.evasion.losses import Loss, dlr, margin
from robust_if.attacks.evasion.projections import OneHot, WholeNumbers
from robust_if.attacks.evasion.square import Square
from robust_if.attacks.evasion.targeted import TargetedAPGD
from robust_if.attacks.evasion.wrapped import TorchAttacks

__all__ = [
    "APGD", "FAB", "FGSM", "PGD", "Attack", "Bounds", "Broken", "Ensemble", "Limit", "Loss", "Norm", "OneHot", "Projection", "Square",
    "TargetedAPGD", "Threat", "TorchAttacks", "WholeNumbers", "apgd", "box", "dlr", "fgsm", "lite", "margin", "pgd", "standard", "step_length",
]  # fmt: skip
