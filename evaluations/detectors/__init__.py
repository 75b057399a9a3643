"""Detectors of tampered training samples: estimators that look at the model, the data and at most clean held-out samples, never at the truth.

Each gives one score per sample, high = suspicious, and no verdict. Statistics are those of the samples that are scored; models are trained on the
training data. ``robust_if`` itself has the loss and the self-influence, ``robust_if.evaluations.baselines`` confident learning.
"""

from robust_if.evaluations.detectors.activations import ActivationClustering, SpectralSignatures
from robust_if.evaluations.detectors.dynamics import AUM, EarlyLoss
from robust_if.evaluations.detectors.features import FeatureDetector, features
from robust_if.evaluations.detectors.isolation import GradientForest
from robust_if.evaluations.detectors.neighbours import DeepKNN
from robust_if.evaluations.detectors.scan import SCAn
from robust_if.evaluations.detectors.spectre import SPECTRE
from robust_if.evaluations.detectors.strip import STRIP

__all__ = [
    "AUM", "SPECTRE", "STRIP", "ActivationClustering", "DeepKNN", "EarlyLoss", "FeatureDetector", "GradientForest", "SCAn", "SpectralSignatures",
    "features",
]  # fmt: skip
