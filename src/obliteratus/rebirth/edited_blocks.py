"""Which blocks and parts a plan edits and how strongly, as plain data for a page."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from obliteratus.core.types import Edit, Mask, Plan, Shift

PARTS = {"embed": "embeddings", "attn.out": "attention", "mlp.out": "MLP", "expert.out": "experts"}
"""Names of parts as people read them; others, such as those of readers, keep their own."""


def describe_blocks(plan: Plan, n_blocks: int) -> dict[str, Any]:
    """Return what the template draws: ``parts`` with a cell per edited block, ``numbers`` of blocks, ``strengths`` as a
    table, ``others`` (changes that are no edits along a direction) and whether any edit ``amplifies``."""
    found: dict[str, dict[int, list[Edit]]] = defaultdict(lambda: defaultdict(list))
    for edit in (e for e in plan.edits if isinstance(e, Edit)):
        found[PARTS.get(edit.site.part, edit.site.part)][edit.site.layer].append(edit)
    parts = {part: {n: _cell(edits) for n, edits in blocks.items()} for part, blocks in found.items()}
    seen = {n for blocks in parts.values() for n in blocks}
    rows = [[part, str(n), cell["text"]] for part, blocks in parts.items() for n, cell in sorted(blocks.items())]
    return {
        "parts": parts,
        "numbers": sorted(seen | set(range(n_blocks))),  # embeddings count as block −1
        "strengths": rows,
        "others": _describe_others(plan),
        "amplifies": any(isinstance(e, Edit) and e.strength < 0 for e in plan.edits),
    }


def _cell(edits: Sequence[Edit]) -> dict[str, Any]:
    """Return the mean strength of a block's edits, and a text with their number."""
    strength = sum(e.strength for e in edits) / len(edits)
    rank = max(len(e.basis) for e in edits)
    text = f"{strength:.2f}, {rank} direction{'s' if rank > 1 else ''}"
    heads, experts = (len({getattr(e.site, key) for e in edits} - {None}) for key in ("span", "expert"))
    text += f", {heads} heads" if heads else ""
    return {"strength": strength, "text": text + (f", {experts} experts" if experts else "")}


def _describe_others(plan: Plan) -> str:
    masked = sum(len(c.neurons) for c in plan.edits if isinstance(c, Mask))
    shifted = len({c.site.layer for c in plan.edits if isinstance(c, Shift)})
    found = [f"{masked} neurons are set to zero"] if masked else []
    found += [f"a constant vector is added in {shifted} blocks"] if shifted else []
    return f"Beside these edits {' and '.join(found)}." if found else ""
