"""SUMMON: what a model is. Architectures, editable sites, loading, self-test, coverage, summary and digest.

May import core, report and weights.
"""
