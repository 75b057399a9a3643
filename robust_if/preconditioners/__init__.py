"""Approximations of curvature."""

from robust_if.preconditioners.diagonal_fisher import diagonal_fisher

__all__ = ["diagonal_fisher"]
