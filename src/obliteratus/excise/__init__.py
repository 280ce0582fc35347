"""EXCISE: plans of edits to a model, the mathematics of an edit, and how strong a plan may be.

live/ applies a plan to a running model, bake/ writes it into weights, files and adapters. May import core, weights,
summon, inference and prompts; linear.py imports no transformers.
"""
