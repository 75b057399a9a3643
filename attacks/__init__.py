"""Attacks on training data and on models; what they return carries the truth apart from the data."""
