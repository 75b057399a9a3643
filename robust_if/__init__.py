"""Which training samples hurt what you care about, proven by retraining."""

from importlib.metadata import PackageNotFoundError, version

from robust_if.checkpoints import Checkpoint, load_checkpoint
from robust_if.data import Samples, as_samples
from robust_if.decisions import automatic_threshold, relabel, remove_above, remove_automatic, remove_top, threshold_at
from robust_if.diagnostics import Prediction, predicted_correlation
from robust_if.estimators import (
    LESS,
    Combined,
    Ensemble,
    Estimator,
    FlatMinima,
    GradNorm,
    InnerProduct,
    Joined,
    LabelOdds,
    Loss,
    LossChange,
    Random,
    Retraining,
    SelfInfluence,
    TunedLoss,
    Unlearning,
    ValidationLoss,
)
from robust_if.groups import Removal, greedy, group_effect
from robust_if.pairs import pairwise
from robust_if.preconditioners import (
    EKFAC,
    KFAC,
    Arnoldi,
    ConjugateGradient,
    DataInf,
    DiagonalFisher,
    Exact,
    Identity,
    LiSSA,
    Preconditioner,
    RandomProjection,
)
from robust_if.predictions import Certainty, PredictionMargin
from robust_if.scores import Scores
from robust_if.scoring import score
from robust_if.store import Store
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
    "EKFAC", "KFAC", "LESS", "SAM", "Arnoldi", "Certainty", "Checkpoint", "Combined", "ConjugateGradient", "DataInf", "DiagonalFisher",
    "Ensemble", "Estimator", "Exact", "FlatMinima", "FriendlySAM", "Functional", "GradNorm", "Identity", "InnerProduct", "Joined", "LabelOdds",
    "LiSSA", "Loss", "LossChange", "LowPass", "Plain", "Preconditioner", "Prediction", "PredictionMargin", "Random", "RandomProjection", "Recipe",
    "Removal", "Retraining", "Samples", "Scores", "SelfInfluence", "Store", "Sweep", "Target", "Task", "TunedLoss", "Tuning", "Unlearning",
    "Utility", "ValidationLoss", "as_samples", "automatic_threshold", "fit", "greedy", "group_effect", "load_checkpoint", "pairwise",
    "predicted_correlation", "relabel", "remove_above", "remove_automatic", "remove_top", "score", "threshold_at", "train",
]  # fmt: skip
