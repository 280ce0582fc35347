"""Greedy answers to many prompts: batched, prefix reused, rows leave when they are finished or decided."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from obliteratus.core.progress import progress
from obliteratus.core.types import Subject
from obliteratus.inference.batching import make_batches, run_or_halve, state_bytes, token_budget
from obliteratus.inference.chat_template import Ids
from obliteratus.inference.kv_cache import Filling, GrowingLayer, cache_arguments, fill_rows, growing_cache
from obliteratus.inference.logits import last_logits
from obliteratus.inference.memory import free_memory
from obliteratus.inference.row_plans import rows_in_pass
from obliteratus.inference.shared_prefix import PreparedPrompts, is_recurrent, prepare_prompts

Done = Callable[[list[int]], bool]
First = Callable[[list[int], Tensor], None]
# Compacting moves one row for each finished one, so a few may wait: an eighth of the rows.
COMPACT_AT = 0.875


@dataclass
class DecodingBatch:
    """Rows that are still being written."""

    rows: list[int]
    cache: Any
    tokens: Tensor
    """Last token of each row [rows, 1]."""
    positions: Tensor
    """Its position [rows, 1]."""
    mask: Tensor
    """[rows, slots]: 0 on padding, which stands at the left after alignment."""
    variants: Tensor | None = None
    """Under which of several edits each row is [rows]; None where all are under the same."""
    live: set[int] = field(default_factory=set)
    decided: set[int] = field(default_factory=set)
    """Rows that `Done` ended."""


def generate(
    subject: Subject,
    ids: Ids,
    max_new: int,
    *,
    done: Done | None = None,
    first: First | None = None,
    reuse: bool = True,
    title: str = "answers",
) -> Ids:
    """Greedy continuation of each row, at most ``max_new`` tokens, without the end token.

    done: called with a row's new tokens after each step; True ends the row early (its verdict is certain).
    first: called with row numbers and the logits of their first tokens [rows, vocabulary], for all rows in parts.
    """
    answers: Ids = [[] for _ in ids]
    with torch.inference_mode(), progress(title, len(ids) * max_new) as advance:
        prompts = prepare_prompts(subject, ids, reuse)

        def run(rows: list[int]) -> None:
            batch, logits = prefill(subject, prompts, rows, max_new)
            if first is not None:
                first(rows, logits)
            for tokens in decode(subject, batch, answers, max_new, done):
                advance(tokens)

        for group in group_answers(subject, prompts, range(len(ids)), max_new):
            list(run_or_halve(run, group))
    return answers


def group_answers(subject: Subject, prompts: PreparedPrompts, rows: Sequence[int], max_new: int) -> list[list[int]]:
    """Rows that are written together, within `answer_budget` and `MAX_ROWS`: of equal length where states recur."""
    lengths = [prompts.skipped + len(prompts.rows[row]) + max_new for row in rows]
    kinds = sorted(set(lengths), reverse=True) if is_recurrent(subject) else [0]
    groups = []
    for kind in kinds:
        mine = [i for i, length in enumerate(lengths) if kind in (0, length)]
        parts = make_batches([lengths[i] for i in mine], answer_budget(subject), MAX_ROWS)
        groups += [[rows[mine[i]] for i in part] for part in parts]
    return groups


# On a CPU one more row costs a token's arithmetic, a step its reading of all weights: 42 ms + 1.25 ms a row on
# SmolLM2 (docs/experiments/speed.md, "How many tokens a pass"). At this many rows the reading is an eighth of the step.
MAX_ROWS = 256


def answer_budget(subject: Subject) -> int:
    """Cached tokens of one batch: half of the free memory."""
    return max(1, int(0.5 * free_memory(subject) / kv_bytes(subject)))


def kv_bytes(subject: Subject) -> float:
    """Bytes of cache that one token takes; more than that where some blocks keep no keys and values."""
    config = subject.model.config.get_text_config()
    latent = config.to_dict().get("kv_lora_rank")
    if latent:  # latent attention keeps what keys and values are made of, and the part of keys that knows positions
        return float(subject.n_layers * (latent + config.qk_rope_head_dim) * subject.model.dtype.itemsize)
    heads = config.to_dict().get("num_key_value_heads") or config.num_attention_heads
    size = config.to_dict().get("head_dim") or subject.width // config.num_attention_heads
    return float(2 * subject.n_layers * heads * size * subject.model.dtype.itemsize)


def stop_tokens(subject: Subject) -> set[int]:
    """Token ids that end an answer."""
    ends = subject.model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    return {t for t in [*ends, subject.tokenizer.eos_token_id] if t is not None}


def decode(subject: Subject, batch: DecodingBatch, answers: Ids, max_new: int, done: Done | None) -> Iterator[int]:
    """Write all rows to their end. Gives the tokens that each step settled: written, or no longer needed."""
    stops = stop_tokens(subject)
    for row in batch.rows:
        answers[row] = []  # after running out of memory, rows start again
    for step in range(max_new):
        before = len(batch.live)
        for slot, token in enumerate(batch.tokens[:, 0].tolist()):
            _append(batch, slot, token, answers, stops, done)
        yield before + (before - len(batch.live)) * (max_new - step - 1)
        if not batch.live or step + 1 == max_new:
            return
        if len(batch.live) <= COMPACT_AT * len(batch.rows):
            _compact(batch)
        _advance(subject, batch)


def _append(batch: DecodingBatch, slot: int, token: int, answers: Ids, stops: set[int], done: Done | None) -> None:
    row = batch.rows[slot]
    if row not in batch.live:
        return
    if token in stops:
        batch.live.discard(row)
        return
    answers[row].append(token)
    if done is not None and done(answers[row]):
        batch.live.discard(row)
        batch.decided.add(row)


def prefill(subject: Subject, prompts: PreparedPrompts, rows: list[int], max_new: int) -> tuple[DecodingBatch, Tensor]:
    """Prompts pass in small batches, as in PROBE; their keys and values land side by side, ending together.

    Returns the rows, ready to be written, and the logits of their first tokens [rows, vocabulary].
    """
    if is_recurrent(subject):
        return _prefill_alike(subject, prompts, rows)
    lengths = torch.tensor([len(prompts.rows[i]) for i in rows], device=subject.device)
    longest = int(lengths.max())
    slots = prompts.skipped + longest
    cache = growing_cache(subject, prompts.prefix_of(rows), len(rows), slots, max_new)
    parts, first = [], 0
    for part in make_batches(lengths.tolist(), token_budget(subject, state_bytes(subject))):
        with fill_rows(cache, Filling(slice(first, first + len(part)), lengths[part].max() - lengths[part])):
            parts.append(_filled(subject, prompts, [rows[k] for k in part], cache))
        first += len(part)
    mask = (torch.arange(slots, device=subject.device)[None] >= (longest - lengths)[:, None]).long()
    logits = torch.cat(parts)
    return _begun(prompts, rows, cache, mask, logits), logits


def _prefill_alike(subject: Subject, prompts: PreparedPrompts, rows: list[int]) -> tuple[DecodingBatch, Tensor]:
    """Prompts of one length pass together, unpadded, into the model's own kind of cache."""
    lengths = {len(prompts.rows[i]) for i in rows}
    assert len(lengths) == 1, "padding would enter recurrent states"
    cache = DynamicCache(config=subject.model.config)
    logits = last_logits(subject, prompts, rows, cache)
    return _begun(prompts, rows, cache, torch.ones(len(rows), *lengths, dtype=torch.long), logits), logits


def _begun(prompts: PreparedPrompts, rows: list[int], cache: Any, mask: Tensor, logits: Tensor) -> DecodingBatch:
    lengths = torch.tensor([[prompts.skipped + len(prompts.rows[i])] for i in rows], device=logits.device)
    kinds = prompts.variants_of(rows)
    variants = None if kinds is None else torch.tensor(kinds)
    tokens = logits.argmax(-1, keepdim=True)
    return DecodingBatch(rows, cache, tokens, lengths, mask.to(logits.device), variants, set(rows))


def _filled(subject: Subject, prompts: PreparedPrompts, rows: list[int], cache: Any) -> Tensor:
    logits = last_logits(subject, prompts, rows, cache)
    if prompts.lower is not None:
        prompts.lower.fill(cache, rows)
    return logits


def _compact(batch: DecodingBatch) -> None:
    """The last live rows move into the places of finished ones."""
    n = len(batch.live)
    free = [slot for slot, row in enumerate(batch.rows[:n]) if row not in batch.live]
    moved = [slot for slot, row in enumerate(batch.rows) if slot >= n and row in batch.live]
    index = torch.arange(n, device=batch.tokens.device)
    target, source = (torch.tensor(x, dtype=torch.long, device=index.device) for x in (free, moved))
    index[target] = source
    batch.rows = [batch.rows[slot] for slot in index.tolist()]
    batch.tokens, batch.positions, batch.mask = batch.tokens[index], batch.positions[index], batch.mask[index]
    batch.variants = None if batch.variants is None else batch.variants[index.cpu()]
    if all(isinstance(layer, GrowingLayer) for layer in batch.cache.layers):
        for layer in batch.cache.layers:
            layer.keep(target, source, n)
    else:
        batch.cache.reorder_cache(index)


def _advance(subject: Subject, batch: DecodingBatch) -> None:
    """Pass each row's last token, and take the one after it."""
    batch.mask = torch.cat([batch.mask, batch.mask.new_ones(len(batch.rows), 1)], dim=1)
    # Without padding the mask says nothing, and attention is faster without one.
    mask = None if bool(batch.mask.all()) else batch.mask
    with rows_in_pass(batch.variants):
        out = subject.model(
            input_ids=batch.tokens,
            attention_mask=mask,
            position_ids=batch.positions,
            **cache_arguments(subject.model, batch.cache),
        )
    batch.tokens, batch.positions = out.logits[:, -1].argmax(-1, keepdim=True), batch.positions + 1
