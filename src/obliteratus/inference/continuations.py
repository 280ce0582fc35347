"""How likely continuations are behind their contexts. A context that several of them follow runs only once.

Benchmarks ask for the likelihood of each choice of a question. The choices are a few tokens behind a context of
hundreds, so the context's keys and values are computed once and then serve all of its choices.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from obliteratus.core.progress import progress
from obliteratus.core.shapes import Float
from obliteratus.core.types import Subject
from obliteratus.inference.batching import make_batches, pad_rows, run_or_halve, token_budget
from obliteratus.inference.chat_template import Ids
from obliteratus.inference.generate import DecodingBatch, prefill
from obliteratus.inference.kv_cache import GrowingLayer, PrefixLayer, cache_arguments
from obliteratus.inference.logits import last_logits, narrow_head
from obliteratus.inference.memory import LOGIT_TOKENS
from obliteratus.inference.shared_prefix import PreparedPrompts, common_prefix_length, is_recurrent, prepare_prompts
from obliteratus.inference.teacher_forced import read_answers

# Tokens that contexts must share, beyond what all share, to be a run of their own: with 32 and two contexts a run saves
# about what its own pass over a prefix costs.
WORTH_A_RUN = 32


class ContinuationScore(NamedTuple):
    """How a model rates a continuation."""

    log_likelihood: float
    """Sum of the log-probabilities (natural) of its tokens, at most 0."""
    greedy: bool
    """Whether each of its tokens is the likeliest one at its place."""


def score_continuations(
    subject: Subject, contexts: Ids, continuations: Ids, *, title: str = "continuations"
) -> list[ContinuationScore]:
    """Return the score of each continuation (at least one token) behind the context (at least one) of the same row.

    Equal contexts run once for all their continuations, unless the model is recurrent. Log-probabilities are computed
    in fp32, whatever the model's dtype. Raises torch.OutOfMemoryError if a single row does not fit.
    """
    shared = _group_by_context(contexts, continuations, alone=is_recurrent(subject))
    in_groups = {row for rows in shared.values() for row in rows}
    alone = [row for row in range(len(contexts)) if row not in in_groups]
    scores: dict[int, ContinuationScore] = {}
    if alone:
        before, after = ([rows[row] for row in alone] for rows in (contexts, continuations))
        scored = read_answers(subject, before, after, lambda i, logits: _score(logits, after[i]), title=title)
        scores |= dict(zip(alone, scored, strict=True))
    if shared:
        scores |= _score_shared(subject, shared, continuations, title)
    return [scores[row] for row in range(len(contexts))]


Groups = dict[tuple[int, ...], list[int]]
"""Context → rows of its continuations."""


def _group_by_context(contexts: Ids, continuations: Ids, alone: bool) -> Groups:
    """Return the contexts that several continuations follow, or one of a single token, which needs no second pass."""
    groups: Groups = {}
    for row, context in enumerate(contexts if not alone else ()):
        groups.setdefault(tuple(context), []).append(row)
    return {c: rows for c, rows in groups.items() if len(rows) > 1 or len(continuations[rows[0]]) == 1}


def _score_shared(subject: Subject, groups: Groups, continuations: Ids, title: str) -> dict[int, ContinuationScore]:
    """Return the scores of all rows of the groups."""
    scores: dict[int, ContinuationScore] = {}
    contexts = sorted(map(list, groups))
    runs = split_by_prefix(contexts) if subject.device.type == "cpu" else [contexts]
    with torch.inference_mode(), progress(title, sum(map(len, groups.values()))) as advance:
        for contexts in runs:
            prompts, members = prepare_prompts(subject, contexts), [groups[tuple(c)] for c in contexts]
            run = partial(_run_contexts, subject, prompts, members, continuations)
            lengths = [len(row) for row in prompts.rows]
            for batch in make_batches(lengths, token_budget(subject), LOGIT_TOKENS):
                for part in run_or_halve(run, batch):
                    scores |= part
                    advance(len(part))
    return scores


def split_by_prefix(contexts: Ids) -> list[Ids]:
    """Return sorted contexts in runs that share many tokens, such as the questions on one text, beyond what all share.

    Runs are worth it where a batch of some hundred tokens is as fast a token as a larger one, on a CPU.
    """
    least = common_prefix_length(contexts) + WORTH_A_RUN
    runs = [contexts[:1]]
    for before, context in pairwise(contexts):
        if common_prefix_length([before, context]) >= least:
            runs[-1].append(context)
        else:
            runs.append([context])
    return _join_single(runs)


def _join_single(runs: list[Ids]) -> list[Ids]:
    """Return the runs, with all contexts that share with no other one joined into one run, which is batched."""
    single = [context for run in runs if len(run) == 1 for context in run]
    return [run for run in runs if len(run) > 1] + ([single] if single else [])


def _run_contexts(
    subject: Subject, prompts: PreparedPrompts, members: Sequence[list[int]], continuations: Ids, batch: list[int]
) -> dict[int, ContinuationScore]:
    """Return the scores of the continuations of some contexts.

    members: the rows of each context's continuations. batch: numbers of contexts.
    """
    return dict(_score_batch(subject, prompts, batch, [members[i] for i in batch], continuations))


def _score_batch(
    subject: Subject, prompts: PreparedPrompts, batch: list[int], members: Sequence[list[int]], continuations: Ids
) -> Iterator[tuple[int, ContinuationScore]]:
    """Yield each continuation's row and score. members: the rows of each context of the batch."""
    if all(len(continuations[row]) == 1 for rows in members for row in rows):
        logits, started = last_logits(subject, prompts, batch, prompts.make_cache(batch)), None
    else:
        started, logits = prefill(subject, prompts, batch, 1)
    first = {row: k for k, rows in enumerate(members) for row in rows}
    longer = [row for row in first if len(continuations[row]) > 1]
    yield from ((row, _score(logits[[k]], continuations[row])) for row, k in first.items() if row not in longer)
    lengths = [len(continuations[row]) - 1 for row in longer]
    for part in make_batches(lengths, LOGIT_TOKENS):
        assert started is not None, "longer continuations have a cache"
        rows = [longer[i] for i in part]
        later = _read_continuations(subject, started, [first[r] for r in rows], [continuations[r] for r in rows])
        for row, own in zip(rows, later, strict=True):
            yield row, _score(torch.cat([logits[[first[row]]], own]), continuations[row])


def _read_continuations(
    subject: Subject, started: DecodingBatch, slots: list[int], continuations: Ids
) -> list[Float[Tensor, "_ vocabulary"]]:
    """Return, for each continuation, the logits behind all its tokens but the last.

    slots: the row of the started batch that holds each one's context.
    """
    ids, lengths = pad_rows([row[:-1] for row in continuations], subject.device)
    index = torch.tensor(slots, device=ids.device)
    steps = torch.arange(ids.shape[1], device=ids.device)
    row, column = (steps[None] < lengths[:, None]).nonzero(as_tuple=True)
    mask = torch.cat([started.mask[index], started.mask.new_ones(ids.shape)], dim=1)
    with narrow_head(subject, lambda states: states[row, column][:, None]):
        out = subject.model(
            input_ids=ids,
            attention_mask=None if bool(mask.all()) else mask,
            position_ids=started.positions[index] + steps[None],
            **cache_arguments(subject.model, _copy_rows(started.cache, index)),
        )
    return list(out.logits[:, 0].split(lengths.tolist()))


def _copy_rows(cache: Cache, index: Tensor) -> Cache:
    """Return a cache for one pass over rows that continue these rows of another one."""
    layers: list[Any] = [
        PrefixLayer(*(buffer[index, :, : layer.slots] for buffer in layer.buffers))
        if isinstance(layer, GrowingLayer) and layer.is_initialized
        else DynamicLayer()  # a block that uses another block's keys and values
        for layer in cache.layers
    ]
    return Cache(layers=layers)


def _score(logits: Float[Tensor, "tokens vocabulary"], continuation: Sequence[int]) -> ContinuationScore:
    """Return the score of a continuation from the logits that predict its tokens."""
    targets = torch.tensor(continuation, device=logits.device)
    logp = logits.float().log_softmax(-1)
    own = logp.gather(1, targets[:, None]).sum()
    return ContinuationScore(float(own), bool((logp.argmax(-1) == targets).all()))
