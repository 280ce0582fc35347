"""The difference of the groups' medians."""

from __future__ import annotations

import obliteratus as ob


@ob.extractors.register("median_diff", needs=("rows",))
def median_difference(acts: ob.Activations, previous: ob.Directions | None) -> ob.Directions:
    """Find the direction from the control median to the target median, coordinate by coordinate.

    raw: its length, in the stream's own units. Needs every prompt's activations (``probe.keep = "rows"``).
    """
    target, control = (acts[group].rows.median(dim=0).values for group in ("target", "control"))
    return ob.Directions.from_vectors(target - control)
