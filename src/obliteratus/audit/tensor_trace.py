"""What is found out about one tensor that differs, and the classes that it may have."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from obliteratus.core.norms import NormRule
from obliteratus.core.types import Change, Site

ROUNDING, REQUANTIZATION, NOISE, SCALING = "rounding", "requantization", "noise", "scaling"
PROJECTION, LOW_RANK, FULL_RANK = "projection", "low rank", "full rank"
ZEROED, VECTOR, UNKNOWN = "zeroed", "vector", "unknown"


@dataclass(frozen=True)
class TensorTrace:
    """What was found out about one tensor that differs."""

    name: str
    part: str
    """Part of the site, as `Site.part`, or ``other``."""
    layer: int
    shape: tuple[int, ...]
    kind: str
    """The class."""
    energy: float
    """‖D‖², the squared Frobenius norm of the difference."""
    size: float
    """‖D‖ ÷ ‖W‖."""
    rounding: float
    """Squared length that storing in the two dtypes is expected to have given the difference."""
    rank: int = 0
    """Singular values that stand out of noise."""
    spectrum: tuple[float, ...] = ()
    """The largest singular values as shares of ‖D‖."""
    stable_rank: float = 0.0
    exact: bool = True
    """Whether all singular values were computed; otherwise a randomized method found the largest."""
    noise: float = 0.0
    """Share (0–1) of ‖D‖² that is like noise."""
    kept: tuple[str, ...] = ()
    """Lengths that stayed: of ``columns``, ``rows`` and the ``whole``."""
    rule: NormRule = "none"
    side: str = ""
    """``left`` (of the output) or ``right`` (of the input), for projections."""
    oblique: bool = False
    strength: float = 0.0
    factor: float = 1.0
    """Of a scaling."""
    grid: str = ""
    rest: float = 1.0
    """Share (0–1) of ‖D‖² that the changes leave, rounding and noise included."""
    changes: tuple[Change, ...] = ()
    site: Site | None = None
    directions: Tensor | None = None
    """What is removed, as orthonormal rows [k, width] in the coordinates of the residual stream; strongest first."""
    parts_edited: float = 1.0
    """Share of the columns that changed."""
    rows_reachable: float = 0.0
    """Share of a low-rank difference that some left projection could make."""

    @property
    def explained(self) -> float:
        """Share (0–1) of what is beyond rounding that the changes explain."""
        whole = max(self.energy - self.rounding, 0.0)
        left_over = max(self.rest * self.energy - self.rounding, 0.0)
        return 1 - left_over / whole if whole > 0 else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers as plain data for JSON."""
        left_out = ("changes", "site", "directions")
        plain = {key: value for key, value in vars(self).items() if key not in left_out}
        return plain | {"explained": self.explained, "shape": list(self.shape)}
