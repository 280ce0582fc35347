"""Running a model: chat templates, batches, caches, hooks, hidden states, logits, answers.

All results are independent of how prompts are batched and of which cached parts are reused. This package may import
core, report, weights and summon.
"""
