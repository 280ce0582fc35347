"""What all prompts begin with, a template's head, is run once and its keys and values shared."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from obliteratus.core.shapes import Float
from obliteratus.core.types import ProbeRequest, Subject
from obliteratus.inference.batching import pad_rows
from obliteratus.inference.chat_template import Ids
from obliteratus.inference.hooks import StreamCapture
from obliteratus.inference.kv_cache import KeyValues, cache_arguments, expand_variants, prefix_cache, prefix_states
from obliteratus.inference.resume import ResumePoint, pass_inputs
from obliteratus.inference.row_plans import rows_in_pass, variants_of
from obliteratus.summon.sites import find_architecture

# A shared prefix shorter than this saves less than its own pass and the longer attention cost.
MIN_PREFIX = 4


@dataclass(frozen=True)
class PreparedPrompts:
    """Token rows with their shared prefix taken off and computed."""

    rows: Ids
    skipped: int
    """Length of the prefix that was taken off."""
    prefix: KeyValues | None
    lower: ResumePoint | None = None
    """What the lower blocks gave before, where they need not run."""
    variants: tuple[int, ...] | None = None
    """Under which of several edits each row is; None where all are under the same."""

    def cache(self, rows: Sequence[int]) -> Any:
        """For a pass over these rows; None without a prefix."""
        return prefix_cache(self.prefix_of(rows)) if self.prefix else None

    def prefix_of(self, rows: Sequence[int]) -> KeyValues:
        """The prefix's states for these rows, [rows, heads, tokens, head]."""
        return expand_variants(self.prefix or [], self.variants_of(rows) or [0] * len(rows))

    def variants_of(self, rows: Sequence[int]) -> list[int] | None:
        return None if self.variants is None else [self.variants[i] for i in rows]

    @contextmanager
    def around(self, rows: Sequence[int]) -> Iterator[None]:
        """Around a pass over these rows: known blocks do not run, and hooks know under which edits each row is."""
        with rows_in_pass(self.variants_of(rows)), self.lower.entering(rows) if self.lower else nullcontext():
            yield

    def ends(self) -> list[int]:
        """The shortest and the longest row."""
        return sorted(range(len(self.rows)), key=lambda i: len(self.rows[i]))[:: max(1, len(self.rows) - 1)]

    def of(self, rows: Sequence[int]) -> PreparedPrompts:
        """These rows alone, in this order; one may come several times."""
        chosen, kinds = [self.rows[i] for i in rows], self.variants_of(rows)
        lower = self.lower.of(rows) if self.lower else None
        return replace(self, rows=chosen, lower=lower, variants=None if kinds is None else tuple(kinds))


def common_prefix_length(ids: Ids, leave: int = 1) -> int:
    """Number of leading tokens that all rows share; at least ``leave`` tokens of each row are left."""
    first, last = min(ids), max(ids)
    limit = max(0, min(len(row) for row in ids) - leave)
    same = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), limit)
    return min(same, limit)


def shared_prefix_length(ids: Ids, leave: int = 1) -> int:
    """`common_prefix_length`, where it is long enough to be worth a pass of its own; else 0."""
    n = common_prefix_length(ids, leave) if len(ids) > 1 else 0
    return n if n >= MIN_PREFIX else 0


def prepare_prompts(subject: Subject, ids: Ids, reuse: bool = True, leave: int = 1) -> PreparedPrompts:
    """Compute the shared prefix once, where that gives the same result."""
    n = shared_prefix_length(ids, leave) if reuse else 0
    whole = PreparedPrompts(ids, 0, None, variants=variants_of(len(ids)))
    if not n or is_recurrent(subject):
        return whole
    prompts = replace(whole, rows=[row[n:] for row in ids], skipped=n, prefix=prefix_states(subject, ids[0][:n]))
    return prompts if has_full_attention(subject) or _equal(subject, whole, prompts) else whole


def is_recurrent(subject: Subject) -> bool:
    """Whether anything but attention keeps states between tokens: there is no prefix of keys and values to share, and
    padding would enter the states of what comes after it."""
    return find_architecture(subject.model.config).recurrent


def has_full_attention(subject: Subject) -> bool:
    """Full attention in every layer: then a cached prefix is exact by construction."""
    config = subject.model.config.get_text_config().to_dict()
    kinds = set(config.get("layer_types") or ["full_attention"])
    return kinds == {"full_attention"} and not config.get("sliding_window")


def _equal(subject: Subject, whole: PreparedPrompts, prompts: PreparedPrompts) -> bool:
    """Windows: reuse only if the shortest and the longest row come out equal."""
    ends = whole.ends()
    found, known = (torch.cat([_last(subject, trial, i) for i in ends]) for trial in (prompts, whole))
    return bool(torch.allclose(found, known, rtol=1e-4, atol=1e-4 * float(known.abs().max())))


def _last(subject: Subject, prompts: PreparedPrompts, row: int) -> Float[Tensor, "1 streams width"]:
    """The stream at a row's last token."""
    ids, lengths = pad_rows([prompts.rows[row]], subject.device)
    capture = StreamCapture(subject, lengths - 1, ProbeRequest(), subject.n_layers)
    with capture.watching(), prompts.around([row]):
        run_backbone(subject, ids, prompts.skipped, prompts.cache([row]))
    return capture.stacked()[0].detach()


def run_backbone(subject: Subject, ids: Tensor, start: int, cache: Any, lower: ResumePoint | None = None) -> Any:
    """One pass without the LM head over tokens whose positions begin at ``start``."""
    positions = torch.arange(start, start + ids.shape[1], device=ids.device)[None]
    given = pass_inputs(subject, ids, lower)
    trunk = subject.model.base_model
    return trunk(**given, position_ids=positions, **cache_arguments(trunk, cache))
