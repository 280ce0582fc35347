"""Models side by side on the same prompts: runs, saved models and models as published.

May import all packages of stages, and rebirth.
"""
