"""Approximations of curvature and of its inverse, one file each."""

from robust_if.preconditioners.base import Identity, Inverse, Preconditioner, Solution
from robust_if.preconditioners.diagonal_fisher import diagonal_fisher

__all__ = ["Identity", "Inverse", "Preconditioner", "Solution", "diagonal_fisher"]
