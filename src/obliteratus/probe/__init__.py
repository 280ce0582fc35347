"""PROBE: prompts to activations, the cache of activations on disk, and Frequent Directions.

This package may import core, report, weights, summon and inference.
"""
