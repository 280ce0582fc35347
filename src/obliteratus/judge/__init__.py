"""Verdicts on answers: behaviors, phrases by language, own words, classifiers, endpoints; reasoning cut away.

May import core.
"""
