"""Detection metrics, the before/after proof by retraining, and the report."""
