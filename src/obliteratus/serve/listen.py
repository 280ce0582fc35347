"""Where a server listens, and who may reach it."""

from __future__ import annotations

import hmac
import ipaddress
import socket

from obliteratus.core.errors import UserError

LAST_PORT = 65535
LOOPBACK = ("localhost", "127.0.0.1", "[::1]")


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach a server on that address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def names_loopback(host: str) -> bool:
    """Return whether a request's ``Host`` is a loopback name. A web page that reaches the server has its own."""
    name = host if host.endswith("]") else host.rpartition(":")[0] or host
    return name in LOOPBACK


def open_socket(host: str, port: int) -> socket.socket:
    """Return a socket that listens there. Raises UserError if it cannot."""
    if not 0 <= port <= LAST_PORT:  # the system would take the rest of a division
        raise UserError(f"--port {port}: give one from 0 to {LAST_PORT}; 0 takes a free one")
    try:
        family = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)[0]
        made = socket.socket(family[0], socket.SOCK_STREAM)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(family[4])
    except OSError as error:
        why = f"cannot listen there ({error.strerror})"
        raise UserError(f"{host}:{port}: {why}; give another --host or --port") from error
    return made


def matches(offered: str, token: str) -> bool:
    """Return whether two tokens are equal, in a time that tells nothing about where they differ."""
    return hmac.compare_digest(offered.encode(), token.encode())
