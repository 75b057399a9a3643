"""Which training samples hurt what you care about, proven by retraining."""

from importlib.metadata import PackageNotFoundError, version

from robust_if.checkpoints import Checkpoint, load_checkpoint
from robust_if.data import Samples, as_samples
from robust_if.decisions import automatic_threshold, relabel, remove_above, remove_automatic, remove_top
from robust_if.estimators import (
    Ensemble,
    Estimator,
    FlatMinima,
    GradNorm,
    InnerProduct,
    LabelOdds,
    Loss,
    Random,
    Retraining,
    SelfInfluence,
    TunedLoss,
    ValidationLoss,
)
from robust_if.scores import Scores
from robust_if.sweep import Sweep
from robust_if.targets import Functional, Target, Utility
from robust_if.task import Task
from robust_if.training import Recipe, fit, train
from robust_if.tuning import SAM, FriendlySAM, LowPass, Plain, Tuning

try:
    __version__ = version("robust-if")
except PackageNotFoundError:  # a source tree that was not installed
    __version__ = "0.0.0"

__all__ = [
    "SAM", "Checkpoint", "Ensemble", "Estimator", "FlatMinima", "FriendlySAM", "Functional", "GradNorm", "InnerProduct", "LabelOdds", "Loss",
    "LowPass",
    "Plain", "Random", "Recipe", "Retraining", "Samples", "Scores", "SelfInfluence", "Sweep", "Target", "Task", "TunedLoss", "Tuning",
    "Utility",     "ValidationLoss",
    "as_samples", "automatic_threshold", "fit", "load_checkpoint", "relabel", "remove_above", "remove_automatic", "remove_top", "train",
]  # fmt: skip
