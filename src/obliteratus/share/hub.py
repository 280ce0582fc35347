"""Talk to the hub with its own client, and turn what can go wrong into one line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager

import httpx2
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from obliteratus.core.errors import UserError

AGAIN = "; run the same command again later"
STATUS = {
    401: "the hub does not accept the token (401); log in with `hf auth login`, or set HF_TOKEN to a valid one",
    403: "the token may not do this (403); give one with write access to it",
    404: "there is no such repository, or the token may not see it (404); check the name and the token",
    409: "somebody else changed the repository meanwhile (409); run the same command again",
    413: "the hub refuses a file of this size (413)",
    429: "the hub asks for fewer requests (429)" + AGAIN,
}


OUT_OF_REACH = (httpx2.HTTPError, LocalEntryNotFoundError, ConnectionError, TimeoutError)
# The client raises RuntimeError around whatever goes wrong while a file is sent, LocalEntryNotFoundError around what
# goes wrong while files are looked up, and ValueError where what the hub answers is not as it should be.
FAILURES = (HfHubHTTPError, *OUT_OF_REACH, LocalTokenNotFoundError, RuntimeError, ValueError)


@contextmanager
def explain_hub_errors(name: str) -> Iterator[None]:
    """Turn what the client raises for a hub that refuses, fails or is out of reach into a UserError of one line.

    name: what the line is about, such as ``owner/name``.
    """
    try:
        yield
    except FAILURES as error:
        cause = error.__cause__
        wrapped = type(error) in (RuntimeError, LocalEntryNotFoundError) and isinstance(cause, FAILURES)
        raise UserError(f"{name}: {explain_failure(cause if wrapped and cause else error)}") from error


MEANINGS: tuple[tuple[type[BaseException], str], ...] = (
    (LocalTokenNotFoundError, "there is no token; log in with `hf auth login`, or set HF_TOKEN"),
    (OfflineModeIsEnabled, "HF_HUB_OFFLINE forbids to ask the hub; unset it"),
    (RevisionNotFoundError, "the repository has no such revision ({line}); check the name"),
    (RemoteEntryNotFoundError, "the repository has no such file ({line}); check the name"),
    (HFValidationError, "this is no name of a repository ({line}); give owner/name"),
    (
        json.JSONDecodeError,
        "the hub's answer is no JSON, so something else answers at its address; check HF_ENDPOINT",
    ),
)
"""What an error means that is neither a status nor a connection that fails; the first that fits."""


def explain_failure(error: BaseException) -> str:
    """Return what went wrong and what to do, in one line."""
    line = _first_line(error)
    for kind, meaning in MEANINGS:
        if isinstance(error, kind):
            return meaning.replace("{line}", line)
    if isinstance(error, HfHubHTTPError):
        return explain_status(error)
    if isinstance(error, OUT_OF_REACH):
        return f"the hub cannot be reached ({line}){AGAIN}"
    if isinstance(error, ValueError):
        return f"the hub and its client do not agree ({line})"
    return f"sending failed ({line}){AGAIN}"


def explain_status(error: HfHubHTTPError) -> str:
    """Return what a refusal means and what to do, with what the hub says of it."""
    status = 404 if error.response is None else error.response.status_code
    said = f" ({error.server_message[:120]})" if error.server_message else ""
    if isinstance(error, RepositoryNotFoundError) and status != 401:
        return STATUS[404]
    if status in STATUS:
        return STATUS[status]
    if status >= 500:
        return f"the hub fails ({status}){said}{AGAIN}"
    return f"the hub refuses this ({status}){said}"


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:120]
