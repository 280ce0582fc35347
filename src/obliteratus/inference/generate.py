"""Greedy answers to many prompts, in batches that rows leave when they are finished or their verdict is certain."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from obliteratus.core.progress import progress
from obliteratus.core.types import Subject
from obliteratus.inference.batching import make_batches, run_or_halve, token_budget
from obliteratus.inference.chat_template import Ids, find_answer_end
from obliteratus.inference.kv_cache import FillTarget, GrowingLayer, cache_arguments, fill_rows, growing_cache
from obliteratus.inference.logits import last_logits
from obliteratus.inference.memory import free_memory
from obliteratus.inference.row_plans import assign_pass_variants
from obliteratus.inference.shared_prefix import PreparedPrompts, is_recurrent, prepare_prompts

IsDone = Callable[[list[int]], bool]
OnFirstLogits = Callable[[list[int], Tensor], None]
# Compacting moves one row for each finished one, so finished rows may wait until they are an eighth of all.
COMPACT_AT = 0.875


@dataclass
class DecodingBatch:
    """Answers that are being written side by side."""

    rows: list[int]
    """Number of the prompt that each row answers."""
    cache: Any
    tokens: Tensor
    """Last token of each row [rows, 1]."""
    positions: Tensor
    """Position of that token [rows, 1]."""
    mask: Tensor
    """[rows, slots], 0 on padding. Rows are aligned at their ends, so padding is on the left."""
    variants: Tensor | None = None
    """Variant (plan) of each row [rows]; None if all are under the same plan."""
    live: set[int] = field(default_factory=set)
    """Prompts whose answers go on."""
    decided: set[int] = field(default_factory=set)
    """Prompts whose answers ``done`` ended."""


def generate(
    subject: Subject,
    ids: Ids,
    max_new: int,
    *,
    done: IsDone | None = None,
    on_first_logits: OnFirstLogits | None = None,
    reuse: bool = True,
    title: str = "answers",
) -> Ids:
    """Return the greedy continuation of each row, at most ``max_new`` tokens, without the end token.

    done: called with a row's new tokens after each step; True ends the row, e.g. because its verdict is certain.
    on_first_logits: called with row numbers and the logits of their first tokens [rows, vocabulary], batch by batch.
    reuse: whether a shared prefix runs only once.
    """
    answers: Ids = [[] for _ in ids]
    with torch.inference_mode(), progress(title, len(ids) * max_new) as advance:
        prompts = prepare_prompts(subject, ids, reuse)

        def run(rows: list[int]) -> None:
            batch, logits = prefill(subject, prompts, rows, max_new)
            if on_first_logits is not None:
                on_first_logits(rows, logits)
            for tokens in decode(subject, batch, answers, max_new, done):
                advance(tokens)

        for group in group_answers(subject, prompts, range(len(ids)), max_new):
            list(run_or_halve(run, group))
    return answers


def group_answers(subject: Subject, prompts: PreparedPrompts, rows: Sequence[int], max_new: int) -> list[list[int]]:
    """Return the rows that are written together, within `answer_budget` and `MAX_ROWS`. In recurrent models they have
    equal lengths."""
    lengths = [prompts.prefix_length + len(prompts.rows[row]) + max_new for row in rows]
    kinds: Sequence[int | None] = sorted(set(lengths), reverse=True) if is_recurrent(subject) else [None]
    groups = []
    for length in kinds:
        members = [i for i, own in enumerate(lengths) if length in (None, own)]
        batches = make_batches([lengths[i] for i in members], answer_budget(subject), MAX_ROWS)
        groups += [[rows[members[i]] for i in batch] for batch in batches]
    return groups


# On a CPU a step costs reading all weights once, and a token's arithmetic for each row: 42 ms + 1.25 ms a row on
# SmolLM2 (docs/experiments/speed.md, "How many tokens a pass"). With this many rows reading is an eighth of the step.
MAX_ROWS = 256


def answer_budget(subject: Subject) -> int:
    """Return how many tokens the cache of one batch may hold: as many as fit into half of the free memory."""
    return max(1, int(0.5 * free_memory(subject) / kv_bytes(subject)))


def kv_bytes(subject: Subject) -> float:
    """Return the bytes of cache that one token takes; an upper bound if some blocks keep no keys and values."""
    config = subject.model.config.get_text_config()
    latent = config.to_dict().get("kv_lora_rank")
    if latent:  # latent attention caches what keys and values are computed from, and the rotary part of keys
        return float(subject.n_layers * (latent + config.qk_rope_head_dim) * subject.model.dtype.itemsize)
    heads = config.to_dict().get("num_key_value_heads") or config.num_attention_heads
    size = config.to_dict().get("head_dim") or subject.width // config.num_attention_heads
    return float(2 * subject.n_layers * heads * size * subject.model.dtype.itemsize)


def stop_tokens(subject: Subject) -> set[int]:
    """Return the token ids that end an answer: those of the model, its tokenizer, and the template's end of turn."""
    ends = subject.model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    mark = find_answer_end(subject)
    return {t for t in [*ends, subject.tokenizer.eos_token_id, *(mark if len(mark) == 1 else ())] if t is not None}


def decode(subject: Subject, batch: DecodingBatch, answers: Ids, max_new: int, done: IsDone | None) -> Iterator[int]:
    """Write all answers to their end. Yield how many tokens each step settled, written or no longer needed."""
    stops, mark = stop_tokens(subject), find_answer_end(subject)
    for row in batch.rows:
        answers[row] = []  # rows start again after memory ran out
    for step in range(max_new):
        before = len(batch.live)
        for slot, token in enumerate(batch.tokens[:, 0].tolist()):
            _append(batch, slot, token, answers, stops, done)
            if len(mark) > 1:
                _cut_mark(batch, slot, answers, mark)
        yield before + (before - len(batch.live)) * (max_new - step - 1)
        if not batch.live or step + 1 == max_new:
            return
        if len(batch.live) <= COMPACT_AT * len(batch.rows):
            _compact(batch)
        _advance(subject, batch)


def _append(batch: DecodingBatch, slot: int, token: int, answers: Ids, stops: set[int], done: IsDone | None) -> None:
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


def _cut_mark(batch: DecodingBatch, slot: int, answers: Ids, mark: tuple[int, ...]) -> None:
    """End an answer at a mark of several tokens, which is no part of it."""
    row = batch.rows[slot]
    if row in batch.live and tuple(answers[row][-len(mark) :]) == mark:
        del answers[row][-len(mark) :]
        batch.live.discard(row)


def prefill(subject: Subject, prompts: PreparedPrompts, rows: list[int], max_new: int) -> tuple[DecodingBatch, Tensor]:
    """Run prompts in small batches, and align their keys and values in one cache so that all rows end together.

    Return the batch, ready to be written, and the logits of the first tokens [rows, vocabulary].
    """
    if is_recurrent(subject):
        return _prefill_recurrent(subject, prompts, rows)
    lengths = torch.tensor([len(prompts.rows[i]) for i in rows], device=subject.device)
    longest = int(lengths.max())
    slots = prompts.prefix_length + longest
    cache = growing_cache(subject, prompts.expand_prefix(rows), len(rows), slots, max_new)
    parts, first = [], 0
    for part in make_batches(lengths.tolist(), token_budget(subject)):
        with fill_rows(cache, FillTarget(slice(first, first + len(part)), lengths[part].max() - lengths[part])):
            parts.append(_fill_cache(subject, prompts, [rows[k] for k in part], cache))
        first += len(part)
    mask = (torch.arange(slots, device=subject.device)[None] >= (longest - lengths)[:, None]).long()
    logits = torch.cat(parts)
    return _start_batch(prompts, rows, cache, mask, logits), logits


def _prefill_recurrent(subject: Subject, prompts: PreparedPrompts, rows: list[int]) -> tuple[DecodingBatch, Tensor]:
    """Run prompts of one length together, unpadded, with the model's own kind of cache."""
    lengths = {len(prompts.rows[i]) for i in rows}
    assert len(lengths) == 1, "padding would enter recurrent states"
    cache = DynamicCache(config=subject.model.config)
    logits = last_logits(subject, prompts, rows, cache)
    return _start_batch(prompts, rows, cache, torch.ones(len(rows), *lengths, dtype=torch.long), logits), logits


def _start_batch(prompts: PreparedPrompts, rows: list[int], cache: Any, mask: Tensor, logits: Tensor) -> DecodingBatch:
    lengths = torch.tensor([[prompts.prefix_length + len(prompts.rows[i])] for i in rows], device=logits.device)
    of_rows = prompts.select_variants(rows)
    variants = None if of_rows is None else torch.tensor(of_rows)
    tokens = logits.argmax(-1, keepdim=True)
    return DecodingBatch(rows, cache, tokens, lengths, mask.to(logits.device), variants, set(rows))


def _fill_cache(subject: Subject, prompts: PreparedPrompts, rows: list[int], cache: Any) -> Tensor:
    logits = last_logits(subject, prompts, rows, cache)
    if prompts.resume_from is not None:
        prompts.resume_from.fill_cache(cache, rows)
    return logits


def _compact(batch: DecodingBatch) -> None:
    """Move the last live rows into the places of finished ones."""
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
            layer.compact(target, source, n)
    else:
        batch.cache.reorder_cache(index)


def _advance(subject: Subject, batch: DecodingBatch) -> None:
    """Run each row's last token, and take the token after it."""
    batch.mask = torch.cat([batch.mask, batch.mask.new_ones(len(batch.rows), 1)], dim=1)
    # Without padding the mask says nothing, and attention is faster without it.
    mask = None if bool(batch.mask.all()) else batch.mask
    with assign_pass_variants(batch.variants):
        out = subject.model(
            input_ids=batch.tokens,
            attention_mask=mask,
            position_ids=batch.positions,
            **cache_arguments(subject.model, batch.cache),
        )
    batch.tokens, batch.positions = out.logits[:, -1].argmax(-1, keepdim=True), batch.positions + 1
