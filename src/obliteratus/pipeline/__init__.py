"""Run a method: recipe, stages, advice and record.

`run.py` reads top to bottom as the six stages do. May import everything but rebirth, search, study, forecast and cli.
"""
