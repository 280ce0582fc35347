"""Verdicts on answers: phrases by language, reasoning cut away, loops found.

May import core.
"""
