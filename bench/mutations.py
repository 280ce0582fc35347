"""Seeded mutations of valid inputs: of their bytes, and of the values in JSON and TOML."""

from __future__ import annotations

import json
import random
import tomllib
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import tomli_w

Mutate = Callable[[bytes, random.Random], bytes]

BYTES = (
    *(b"\0", b"\n", b"\r", b'"', b"'", b",", b";", b"\t", b"{", b"}", b"[", b"]", b"\\", b"\xff", b"\xef\xbb\xbf"),
    *("\u2028".encode(), "\u0085".encode(), b"\xed\xa0\x80", b"\\ud800", b"\\u0000", b"-1", b"1e999", b"null", b"="),
    *(b"(?:a+)+$", b"[[[[", b"{%", b"{{", b"=" * 300, "é".encode(), b"\xff\xff\xff\xff\xff\xff\xff\x7f", b"\x00" * 8),
)
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2**31, 2**63, 2**70, 0.5, -0.0, 1e308, float("inf"), float("nan")),
    *("", " ", "\0", "\ud800", "x" * 5000, "(a+)+$", "[", "{{ x", "../../etc", "organism:none", "hub:a/b", "ü"),
    *([], {}, [[]], [{}], {"": 0}, {"use": "svd"}, [1, "a", None], {"a": {"b": {"c": []}}}),
)


def mutate_bytes(data: bytes, draw: random.Random) -> bytes:
    """Insert, remove, repeat or replace a few bytes, or cut the end off."""
    changed = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 4, 16))):
        start = draw.randrange(len(changed) + 1)
        stop = min(len(changed), start + draw.choice((0, 1, 2, 8, 64)))
        kind = draw.randrange(5)
        if kind == 0:
            changed[start:start] = draw.choice(BYTES)
        elif kind == 1:
            del changed[start:stop]
        elif kind == 2:
            changed[start:start] = changed[start:stop] * draw.choice((1, 2, 20))
        elif kind == 3:
            changed[start:stop] = draw.randbytes(stop - start)
        elif draw.random() < 0.2:
            del changed[start:]
    return bytes(changed)


def mutate_json(data: bytes, draw: random.Random) -> bytes:
    """Replace, remove, rename or add values in a JSON document; sometimes its bytes."""
    if draw.random() < 0.2:
        return mutate_bytes(data, draw)
    return json.dumps(_mutate_values(json.loads(data), draw)).encode("utf-8", "surrogatepass")


def mutate_toml(data: bytes, draw: random.Random) -> bytes:
    """Replace, remove, rename or add values in a TOML document; sometimes its bytes."""
    if draw.random() < 0.4:
        return mutate_bytes(data, draw)
    changed = _mutate_values(tomllib.loads(data.decode()), draw)
    try:
        return tomli_w.dumps(changed).encode("utf-8", "surrogatepass")
    except (TypeError, ValueError, AttributeError):  # a value that TOML does not have
        return mutate_bytes(data, draw)


def _mutate_values(value: Any, draw: random.Random) -> Any:
    for _ in range(draw.choice((1, 1, 2, 3))):
        value = _mutate_one(value, draw)
    return value


def _mutate_one(value: Any, draw: random.Random) -> Any:
    """Walk down at random, and change what is found there."""
    if not isinstance(value, dict | list) or not value or draw.random() < 0.15:
        return deepcopy(draw.choice(VALUES))
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    key = draw.choice(keys)
    kind = draw.random()
    if kind < 0.1:
        del value[key]
    elif kind < 0.2 and isinstance(value, dict):
        value[draw.choice((f"{key}x", str(key).upper(), "", "ü"))] = value.pop(key)
    elif kind < 0.3 and isinstance(value, dict):
        value[draw.choice(("extra", "use", "0"))] = deepcopy(draw.choice(VALUES))
    elif kind < 0.3 and isinstance(value, list):
        value.insert(int(key), deepcopy(draw.choice(VALUES)))
    else:
        value[key] = _mutate_one(value[key], draw)
    return value
