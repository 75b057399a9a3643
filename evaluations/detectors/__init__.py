"""Detectors of tampered training samples: estimators that look at the model, the data and at most clean held-out samples, never at the truth.

Each gives one score per sample, high = suspicious, and no verdict. Statistics are those of the samples that are scored; models are trained on the
training data. ``robust_if`` itself has the loss and the self-influence, ``robust_if.evaluations.baselines`` confident learning.
"""

from __future__ import annotations

from dataclasses import replace

from robust_if.estimators import Estimator
from robust_if.evaluations.detectors.activations import ActivationClustering, SpectralSignatures
from robust_if.evaluations.detectors.dynamics import AUM, EarlyLoss
from robust_if.evaluations.detectors.features import FeatureDetector, features
from robust_if.evaluations.detectors.isolation import GradientForest
from robust_if.evaluations.detectors.neighbours import DeepKNN
from robust_if.evaluations.detectors.scan import SCAn
from robust_if.evaluations.detectors.spectre import SPECTRE
from robust_if.evaluations.detectors.strip import STRIP
from robust_if.training import Recipe

__all__ = [
    "AUM", "SPECTRE", "STRIP", "ActivationClustering", "DeepKNN", "EarlyLoss", "FeatureDetector", "GradientForest", "SCAn", "SpectralSignatures",
    "features", "poison_detectors",
]  # fmt: skip


def poison_detectors(recipe: Recipe, seed: int = 0) -> list[Estimator]:
    """One of each, for inputs that are encoded and so have no bounds.

    Args:
        recipe: how the detectors train that watch a training of their own.
        seed: of what is drawn.
    """
    recipe = replace(recipe, keep=1)
    early = replace(recipe, epochs=min(recipe.epochs, 2))
    return [
        ActivationClustering(), SpectralSignatures(), SPECTRE(seed=seed), SCAn(), SCAn(clean=True), DeepKNN(), STRIP(bounds=None, seed=seed),
        AUM(recipe, seed=seed), EarlyLoss(early, seed=seed), GradientForest(seed=seed),
    ]  # fmt: skip
