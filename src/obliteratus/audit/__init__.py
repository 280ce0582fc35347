"""For those who defend: what was done to a model's weights, and how firm its refusal is against edits of them.

`trace` compares two checkpoints: differences of weights, streamed, classed, and written as a plan. `firmness` measures
what the removal of a behavior costs, what carries it and where it returns. May import all packages of stages, analyze,
pipeline and rebirth.
"""
