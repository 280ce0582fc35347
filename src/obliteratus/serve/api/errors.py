"""Errors in OpenAI's format: one line each, and a status that says who can mend it."""

from __future__ import annotations

from typing import Any

from obliteratus.serve.worker import Ending, Reason


class ApiError(Exception):
    """An error that a client is answered with."""

    def __init__(self, status: int, message: str, code: str = "", param: str = "") -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param

    def to_dict(self) -> dict[str, Any]:
        """Return the body of the answer."""
        kind = KINDS.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        error = {"message": self.message, "type": kind, "param": self.param or None, "code": self.code or None}
        return {"error": error}

    def headers(self) -> dict[str, str]:
        """Return headers that tell clients whether to try again: OpenAI's try each 429 and 5xx twice by themselves."""
        if self.status in (429, 503):
            return {"retry-after": "1"}
        return {"x-should-retry": "false"}


KINDS = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
# Status and code of an answer that failed.
FAILURES: dict[Reason, tuple[int, str]] = {
    "late": (504, "time_limit"),
    "stopping": (503, "stopping"),
    "failed": (400, "model_failed"),
    "memory": (503, "out_of_memory"),
    "bug": (500, "bug"),
}


def from_ending(ending: Ending) -> ApiError:
    """Return the error of an answer that failed."""
    status, code = FAILURES[ending.reason]
    return ApiError(status, ending.message, code)
