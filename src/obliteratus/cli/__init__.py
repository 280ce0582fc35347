"""The commands. Each parses its options, calls the library, and shows the result.

May import every other package. Heavy libraries are imported inside the commands, so that ``--help`` is fast.
"""
