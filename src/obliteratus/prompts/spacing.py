"""Choose some of many prompts."""


def evenly_spaced(n: int, most: int) -> list[int]:
    """Return at most ``most`` of n indices, evenly spaced from 0, since prompts often come sorted by topic."""
    return [i * n // most for i in range(most)] if n > most else list(range(n))
