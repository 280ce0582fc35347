"""Define which lengths an edit may keep."""

from __future__ import annotations

from typing import Literal

NormRule = Literal["none", "columns", "rows", "unit_rows", "unit_rows_rank_3", "whole"]
"""See `settings.Excise.norm`."""
