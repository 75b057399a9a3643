"""Every estimator of the core by name."""

from __future__ import annotations

from dataclasses import replace

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
from robust_if.estimators.train_on_validation import LossChange
from robust_if.estimators.unlearning import Unlearning
from robust_if.preconditioners import (
    EKFAC,
    KFAC,
    Arnoldi,
    ConjugateGradient,
    DataInf,
    DiagonalFisher,
    Exact,
    LiSSA,
    Preconditioner,
    RandomProjection,
)
from robust_if.tuning import Plain, Tuning


def preconditioners(seed: int = 0, damping: float | None = None) -> list[Preconditioner]:
    """One of each kind of curvature, cheapest first."""
    return [
        DiagonalFisher(damping), DataInf(damping), RandomProjection(damping=damping, seed=seed), KFAC(damping, seed=seed), EKFAC(damping, seed=seed),
        Arnoldi(damping=damping, seed=seed), LiSSA(damping=damping, seed=seed), ConjugateGradient(damping=damping, seed=seed),
        ConjugateGradient(damping=damping, seed=seed, iterations=10, preconditioner=EKFAC(damping, seed=seed)),
        Exact("ggn", damping), Exact("hessian", damping),
    ]  # fmt: skip


def named(seed: int = 0, damping: float | None = None) -> dict[str, Estimator]:
    """The estimators with their published defaults, by the name that tables and the command line use.

    Args:
        damping: λ of those with curvature; each has its own default.
    """
    plain = Tuning(flatness=Plain(), seed=seed)
    found: list[Estimator] = [
        LabelOdds(seed=seed), FlatMinima(plain), FlatMinima(replace(plain, flatness=Tuning().flatness)),
        InnerProduct(), InnerProduct(normalise="cosine"), InnerProduct(normalise="layer"),
        Combined((InnerProduct(), InnerProduct(normalise="cosine"))), Ensemble(seed=seed), LESS(),
        *(InnerProduct(each) for each in preconditioners(seed, damping)), InnerProduct(EKFAC(damping, seed=seed), normalise="relatif"),
        GradNorm(), SelfInfluence(), Loss(), LossChange(replace(LossChange().tuning, seed=seed)), TunedLoss(Tuning(seed=seed)),
        ValidationLoss(seed=seed), Joined(ValidationLoss(seed=seed)),
        Unlearning(ValidationLoss(seed=seed), tuning=replace(LossChange().tuning, seed=seed)), Random(seed),
    ]  # fmt: skip
    return {estimator.name: estimator for estimator in found}
