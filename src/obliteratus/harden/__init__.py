"""Make a behavior, such as a refusal, costly to remove by edits of the weights: a small adapter, trained and measured.

`harden` trains it while edits that were fitted on the model as it is are live. May import all packages of stages, tune,
rebirth and audit.
"""
