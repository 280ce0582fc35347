"""TUNE: fit a plan's strengths and directions by gradient descent through live edits.

The answers that it trains on come from the model itself.
It may import core, summon, inference, prompts, excise, judge, verify and causal, and is run by pipeline.
"""
