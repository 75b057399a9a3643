"""Estimators: (task, data, target) -> one score per training sample."""

from robust_if.estimators.base import Estimator
from robust_if.estimators.baselines import Loss, Random, TunedLoss, ValidationLoss
from robust_if.estimators.ensemble import Ensemble
from robust_if.estimators.flat_minima import FlatMinima
from robust_if.estimators.gradient_norm import GradNorm, SelfInfluence
from robust_if.estimators.inner_product import InnerProduct
from robust_if.estimators.label_odds import LabelOdds
from robust_if.estimators.retraining import Retraining

__all__ = [
    "Ensemble", "Estimator", "FlatMinima", "GradNorm", "InnerProduct", "LabelOdds", "Loss", "Random", "Retraining", "SelfInfluence", "TunedLoss",
    "ValidationLoss",
]  # fmt: skip
