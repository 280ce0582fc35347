"""The sites that write into the stream, and the modules whose outputs are added to it."""

from __future__ import annotations

from collections.abc import Mapping

from obliteratus.core.types import Site, Subject


def writers_in_order(subject: Subject) -> list[Site]:
    """Return every site that writes into the stream: the embeddings, then block by block."""
    return [site for site in subject.sites if site.role == "writes"]


def is_mixer(site: Site) -> bool:
    """Return whether the site is the output of attention or of what replaces it, and not of an MLP or experts."""
    return site.part == "attn.out"


def block_output_modules(subject: Subject, layer: int) -> Mapping[str, list[str]]:
    """Return, under ``attention`` and ``mlp``, the modules of a block whose outputs are added to the stream.

    Either list may be empty.
    """
    writers = [site for site in writers_in_order(subject) if site.layer == layer]
    parts = {"attention": [s for s in writers if is_mixer(s)], "mlp": [s for s in writers if not is_mixer(s)]}
    return {part: list(dict.fromkeys(s.gain or s.path for s in sites)) for part, sites in parts.items()}
