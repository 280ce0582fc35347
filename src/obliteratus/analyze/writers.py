"""The sites that write into the stream, and the modules whose outputs are added to it."""

from __future__ import annotations

from collections.abc import Mapping

from obliteratus.core.types import Site, Subject
from obliteratus.summon.sites import find_architecture, has_heads
from obliteratus.weights.matrices import count_inputs


def block_output_modules(subject: Subject, layer: int) -> Mapping[str, list[str]]:
    """Return, under ``attention`` and ``mlp``, the modules of a block whose outputs are added to the stream.

    Attention includes what replaces it, an MLP includes experts; either list may be empty. A writer with a norm behind
    it is represented by that norm.
    """
    writers = [site for site in subject.sites if site.role == "writes" and site.layer == layer]
    mixers = [site for site in writers if site.part == "attn.out"]
    parts = {"attention": mixers, "mlp": [site for site in writers if site not in mixers]}
    return {part: list(dict.fromkeys(site.gain or site.path for site in sites)) for part, sites in parts.items()}


def attention_outputs(subject: Subject) -> list[tuple[Site, int]]:
    """Return the output matrix and head size of each block's attention, where all heads read equally many inputs."""
    architecture = find_architecture(subject.model.config)
    n = int(subject.model.config.get_text_config().num_attention_heads)
    sites = [s for s in subject.sites if s.role == "writes" and s.layer >= 0 and has_heads(architecture, s)]
    widths = [count_inputs(subject.module(site.path), site) for site in sites]
    return [(site, width // n) for site, width in zip(sites, widths, strict=True) if width % n == 0]
