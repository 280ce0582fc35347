"""How the page's events reach the server."""

from __future__ import annotations

from typing import Any

AT_ONCE: dict[str, Any] = {"show_progress": "hidden", "queue": False}
"""A plain request and its answer. Through Gradio's queue, whose answers come over a stream that all events of a page
share, a look at the jobs once stayed without an answer on a busy machine, and the strip stood still from then on."""
STREAMED: dict[str, Any] = {"show_progress": "hidden", "concurrency_limit": None, "trigger_mode": "multiple"}
"""An answer in pieces, while others may be asked for."""
