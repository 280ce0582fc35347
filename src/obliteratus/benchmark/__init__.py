"""Benchmarks: tasks of EleutherAI's lm-evaluation-harness, run on our engine, and two small ones of our own.

Only the modules that run tasks import the harness (extra `bench`). May import what verify/ may, except verify/ itself.
"""
