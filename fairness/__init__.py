"""Fairness functionals as targets."""
