"""What no page may show: absolute paths, credentials and the queries of addresses."""

from __future__ import annotations

import re

# A path of at least two parts that begins at the root, at home, or at a drive; of an address, what follows the host is
# not one. The last part stays, since it is the name that people know a file by.
PATHS = re.compile(r"(?<![\w:/.~])(?:~|[A-Za-z]:)?(?:[/\\][^\s\"'/\\,;)\]]+)+[/\\]([^\s\"'/\\,;)\]]+)")
ADDRESSES = re.compile(r"(\w+://)(?:[^\s/@\"']+@)?([^\s?#\"']*)(?:[?#][^\s\"']*)?")
# Tokens of model hubs and hosts: a short prefix, then at least 16 letters, digits, dashes or underscores.
TOKENS = re.compile(r"\b(?:hf|sk|pk|gh[opsu]|xox[abp]|glpat)[-_][A-Za-z0-9_-]{16,}")
HIDDEN = "…"


def hide_private(text: str) -> str:
    """Return a text with absolute paths cut to their last part, and without what gives access to anything."""
    without = TOKENS.sub(HIDDEN, ADDRESSES.sub(r"\1\2", text))
    return PATHS.sub(rf"{HIDDEN}/\1", without)
