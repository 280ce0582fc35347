"""Forecasts: what a method, a model or a run will cost, before anything runs.

May import every package but cli.
"""
