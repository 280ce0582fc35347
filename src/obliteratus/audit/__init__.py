"""What was done to a model: differences of weights, streamed, classed, and written as a plan.

May import all packages of stages, pipeline and rebirth.
"""
