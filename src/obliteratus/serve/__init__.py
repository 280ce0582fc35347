"""Talking to a model while its edit is turned up and down: the dial, conversations, what may be opened, and servers.

May import every package but cli/.
"""
