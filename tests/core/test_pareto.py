"""The member of a front nearest to the ideal point."""

from __future__ import annotations

from obliteratus.core.pareto import find_nearest_to_ideal


def test_the_balanced_member_is_nearest_to_the_best_of_every_objective() -> None:
    """Distances by hand, over the front scaled to 0–1; the chord rule would choose another member."""
    front = [(0.0, 10.0), (1.0, 4.4), (4.0, 2.0), (10.0, 0.0)]  # distances 1, 0.45, 0.447, 1
    assert find_nearest_to_ideal(front) == 2
    below_chord = [10 - x - y for x, y in front]
    assert max(range(4), key=lambda i: below_chord[i]) == 1
    assert find_nearest_to_ideal([(1000 * x, y) for x, y in front]) == 2  # units do not matter
    assert find_nearest_to_ideal([(3.0, 5.0)]) == 0
