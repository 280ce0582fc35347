"""REBIRTH: save the edited model, reload it, score it again, and write its model card.

May import pipeline and everything below it.
"""
