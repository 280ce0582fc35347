"""TUNE: fit a plan's strengths and directions by gradient descent through live edits.

It may import core, inference, excise, verify and causal, and is run by pipeline.
"""
