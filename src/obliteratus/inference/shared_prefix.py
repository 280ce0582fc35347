"""Prompts prepared for passes: the prefix that all of them share (a template's head) is run once for all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from obliteratus.core.probing import ProbeRequest
from obliteratus.core.shapes import Float
from obliteratus.core.types import Subject
from obliteratus.inference.batching import pad_rows
from obliteratus.inference.chat_template import Ids
from obliteratus.inference.hooks import StreamCapture
from obliteratus.inference.kv_cache import KeyValues, cache_arguments, expand_variants, prefix_cache, prefix_states
from obliteratus.inference.resume import ResumePoint, pass_inputs
from obliteratus.inference.row_plans import assign_pass_variants, prompt_variants
from obliteratus.summon.sites import find_architecture

# A shorter prefix saves less than its own pass and the longer attention cost.
MIN_PREFIX = 4


@dataclass(frozen=True)
class PreparedPrompts:
    """Token rows without their shared prefix, and what is known of that prefix and of the lower blocks."""

    rows: Ids
    prefix_length: int
    """Tokens of the prefix that was taken off."""
    prefix: KeyValues | None
    """Keys and values of the prefix, [variants, heads, tokens, head] for each layer."""
    resume_from: ResumePoint | None = None
    """Results of the lower blocks from an earlier pass, where these blocks need not run."""
    variants: tuple[int, ...] | None = None
    """Variant (plan) of each row; None if all are under the same plan."""

    def make_cache(self, rows: Sequence[int]) -> Any:
        """Return a cache for one pass over these rows, or None without a prefix."""
        return prefix_cache(self.expand_prefix(rows)) if self.prefix else None

    def expand_prefix(self, rows: Sequence[int]) -> KeyValues:
        """Return the prefix's keys and values for these rows, [rows, heads, tokens, head]."""
        return expand_variants(self.prefix or [], self.select_variants(rows) or [0] * len(rows))

    def select_variants(self, rows: Sequence[int]) -> list[int] | None:
        return None if self.variants is None else [self.variants[i] for i in rows]

    @contextmanager
    def pass_over(self, rows: Sequence[int]) -> Iterator[None]:
        """Around a pass over these rows, skip the blocks below the resume point and tell hooks the rows' variants."""
        resumed = self.resume_from.resume(rows) if self.resume_from else nullcontext()
        with assign_pass_variants(self.select_variants(rows)), resumed:
            yield

    def shortest_and_longest(self) -> list[int]:
        """Return the numbers of the shortest and the longest row."""
        return sorted(range(len(self.rows)), key=lambda i: len(self.rows[i]))[:: max(1, len(self.rows) - 1)]

    def select(self, rows: Sequence[int]) -> PreparedPrompts:
        """Return these rows alone, in this order; a row may come several times."""
        variants = self.select_variants(rows)
        return replace(
            self,
            rows=[self.rows[i] for i in rows],
            resume_from=self.resume_from.select(rows) if self.resume_from else None,
            variants=None if variants is None else tuple(variants),
        )


def common_prefix_length(ids: Ids, leave: int = 1) -> int:
    """Return how many leading tokens all rows share, so that at least ``leave`` tokens of each row remain."""
    first, last = min(ids), max(ids)
    limit = max(0, min(len(row) for row in ids) - leave)
    same = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), limit)
    return min(same, limit)


def shared_prefix_length(ids: Ids, leave: int = 1) -> int:
    """Return `common_prefix_length`, or 0 if that is too short to be worth a pass of its own."""
    n = common_prefix_length(ids, leave) if len(ids) > 1 else 0
    return n if n >= MIN_PREFIX else 0


def prepare_prompts(subject: Subject, ids: Ids, reuse: bool = True, leave: int = 1) -> PreparedPrompts:
    """Run the shared prefix once and take it off the rows, if that changes no result.

    reuse: False leaves the rows whole. leave: tokens of each row that the prefix may not take.
    """
    n = shared_prefix_length(ids, leave) if reuse else 0
    whole = PreparedPrompts(ids, 0, None, variants=prompt_variants(len(ids)))
    if not n or is_recurrent(subject):
        return whole
    prompts = replace(whole, rows=[row[n:] for row in ids], prefix_length=n, prefix=prefix_states(subject, ids[0][:n]))
    return prompts if has_full_attention(subject) or _matches_without_prefix(subject, whole, prompts) else whole


def is_recurrent(subject: Subject) -> bool:
    """Return whether anything but attention carries states between tokens. Then keys and values do not describe a
    prefix, and padding would enter the states of the tokens behind it."""
    return find_architecture(subject.model.config).recurrent


def has_full_attention(subject: Subject) -> bool:
    """Return whether every layer has full attention, which makes a cached prefix exact by construction."""
    config = subject.model.config.get_text_config().to_dict()
    kinds = set(config.get("layer_types") or ["full_attention"])
    return kinds == {"full_attention"} and not config.get("sliding_window")


def _matches_without_prefix(subject: Subject, whole: PreparedPrompts, prompts: PreparedPrompts) -> bool:
    """Check a model with attention windows: the shortest and the longest row must come out equal either way."""
    rows = whole.shortest_and_longest()
    states, expected = (torch.cat([_last_token_stream(subject, p, i) for i in rows]) for p in (prompts, whole))
    return bool(torch.allclose(states, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max())))


def _last_token_stream(subject: Subject, prompts: PreparedPrompts, row: int) -> Float[Tensor, "1 streams width"]:
    ids, lengths = pad_rows([prompts.rows[row]], subject.device)
    capture = StreamCapture(subject, lengths - 1, ProbeRequest(), subject.n_layers)
    with capture.attach(), prompts.pass_over([row]):
        run_backbone(subject, ids, prompts.prefix_length, prompts.make_cache([row]))
    return capture.stack()[0].detach()


def run_backbone(subject: Subject, ids: Tensor, start: int, cache: Any, resume_from: ResumePoint | None = None) -> Any:
    """Run one pass, without the LM head, over tokens whose positions begin at ``start``."""
    positions = torch.arange(start, start + ids.shape[1], device=ids.device)[None]
    inputs = pass_inputs(subject, ids, resume_from)
    backbone = subject.model.base_model
    return backbone(**inputs, position_ids=positions, **cache_arguments(backbone, cache))
