"""What Inspect finds through its entry point: models named ``obliteratus/…``.

It is imported whenever Inspect looks for extensions, so it imports nothing heavy itself.
"""

from __future__ import annotations

from typing import Any

from inspect_ai.model import modelapi


@modelapi(name="obliteratus")
def obliteratus() -> Any:
    """Return the class that answers Inspect."""
    from obliteratus.serve.inspect_model import ObliteratusModel

    return ObliteratusModel
