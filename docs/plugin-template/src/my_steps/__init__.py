"""Importing this package registers its steps."""

from my_steps.median import median_difference

__all__ = ["median_difference"]
