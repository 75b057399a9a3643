"""Estimators: (task, data, target) -> one score per training sample."""

from robust_if.estimators.base import Estimator
from robust_if.estimators.baselines import Loss, Random, TunedLoss, ValidationLoss
from robust_if.estimators.combined import Combined
from robust_if.estimators.ensemble import Ensemble
from robust_if.estimators.flat_minima import FlatMinima
from robust_if.estimators.gradient_norm import GradNorm, SelfInfluence
from robust_if.estimators.inner_product import InnerProduct
from robust_if.estimators.joined import Joined
from robust_if.estimators.label_odds import LabelOdds
from robust_if.estimators.less import LESS
from robust_if.estimators.retraining import Retraining
from robust_if.estimators.train_on_validation import LossChange
from robust_if.estimators.unlearning import Unlearning

__all__ = [
    "LESS", "Combined", "Ensemble", "Estimator", "FlatMinima", "GradNorm", "InnerProduct", "Joined", "LabelOdds", "Loss", "LossChange", "Random",
    "Retraining", "SelfInfluence", "TunedLoss", "Unlearning", "ValidationLoss",
]  # fmt: skip
