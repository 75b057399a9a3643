"""Approximations of curvature and of its inverse, one file each."""

from robust_if.preconditioners.arnoldi import Arnoldi
from robust_if.preconditioners.base import Identity, Inverse, Preconditioner, Quadratic, Solution
from robust_if.preconditioners.conjugate_gradient import ConjugateGradient
from robust_if.preconditioners.datainf import DataInf
from robust_if.preconditioners.diagonal_fisher import DiagonalFisher
from robust_if.preconditioners.exact import Exact
from robust_if.preconditioners.kronecker import EKFAC, KFAC
from robust_if.preconditioners.lissa import LiSSA
from robust_if.preconditioners.random_projection import RandomProjection

__all__ = [
    "EKFAC", "KFAC", "Arnoldi", "ConjugateGradient", "DataInf", "DiagonalFisher", "Exact", "Identity", "Inverse", "LiSSA", "Preconditioner",
    "Quadratic", "RandomProjection", "Solution",
]  # fmt: skip
