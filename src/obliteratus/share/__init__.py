"""SHARE: write down all that a run depends on, do it again elsewhere and compare, and put its result on a hub.

May import rebirth, search and everything below them.
"""
