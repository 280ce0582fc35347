"""Talking to a model while its edit is turned up and down: the dial, conversations, and what a chat may open.

May import every package but cli/.
"""
