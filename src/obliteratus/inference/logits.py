"""Next-token logits: log-probabilities of the first token of answers, and KL divergences between them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

from obliteratus.core.progress import progress
from obliteratus.core.shapes import Float
from obliteratus.core.types import Subject
from obliteratus.inference.batching import (
    BATCH_TOKENS,
    make_batches,
    pad_rows,
    run_or_halve,
    token_budget,
    tokens_per_batch,
)
from obliteratus.inference.chat_template import Ids
from obliteratus.inference.kv_cache import cache_arguments
from obliteratus.inference.layerwise import LayerwisePass, run_to_head
from obliteratus.inference.resume import ResumePoint, pass_inputs
from obliteratus.inference.shared_prefix import PreparedPrompts, prepare_prompts


@contextmanager
def narrow_head(subject: Subject, pick: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Let the LM head see ``pick`` of its input [rows, tokens, width] only. The model's own forward still runs, so what
    it does to logits behind the head (soft caps, scales) is kept."""
    head = subject.model.get_output_embeddings()
    handle = head.register_forward_pre_hook(lambda module, args: (pick(args[0]),))
    try:
        yield
    finally:
        handle.remove()


def select_position(subject: Subject, at: Tensor) -> AbstractContextManager[None]:
    """Let the LM head see one position of each row only. at: [rows]."""
    rows = torch.arange(len(at), device=at.device)
    return narrow_head(subject, lambda states: states[rows, at][:, None])


def first_token_log_probs(
    subject: Subject, ids: Ids, *, budget: int = 0, reuse: bool = True, title: str = "first tokens"
) -> Float[Tensor, "rows vocabulary"]:
    """Return the log-probabilities (natural, fp32) of the first token of the answer to each prompt.

    budget: tokens of a batch; 0 lets memory decide. reuse: whether a shared prefix runs only once.
    """
    with torch.inference_mode(), tokens_per_batch(budget or BATCH_TOKENS.get()):
        if subject.offloaded is None:
            return prepared_first_token_log_probs(subject, prepare_prompts(subject, ids, reuse), title=title)
        with run_to_head(subject, [LayerwisePass(subject, ids)], title) as (prompts,):
            return prepared_first_token_log_probs(subject, prompts, title=title)


def prepared_first_token_log_probs(
    subject: Subject, prompts: PreparedPrompts, *, title: str = "first tokens"
) -> Float[Tensor, "rows vocabulary"]:
    """Return `first_token_log_probs` of prepared prompts, of which there must be at least one."""
    result: Tensor | None = None

    def run(rows: list[int]) -> tuple[list[int], Tensor]:
        logits = last_logits(subject, prompts, rows, prompts.make_cache(rows))
        return rows, logits.float().log_softmax(-1).cpu()

    with torch.inference_mode(), progress(title, len(prompts.rows)) as advance:
        for batch in make_batches([len(r) for r in prompts.rows], token_budget(subject)):
            for rows, logp in run_or_halve(run, batch):
                result = logp.new_empty(len(prompts.rows), logp.shape[-1]) if result is None else result
                result[rows] = logp
                advance(len(rows))
    assert result is not None, "no prompts"
    return result


def last_logits(
    subject: Subject, prompts: PreparedPrompts, rows: Sequence[int], cache: Any
) -> Float[Tensor, "rows vocabulary"]:
    """Run one pass over some rows, and return the logits of the token that follows each row."""
    ids, lengths = pad_rows([prompts.rows[i] for i in rows], subject.device)
    with prompts.pass_over(rows), select_position(subject, lengths - 1):
        return next_logits(subject, ids, prompts.prefix_length, cache, prompts.resume_from)


def next_logits(
    subject: Subject, ids: Tensor, start: int, cache: Any, resume_from: ResumePoint | None = None
) -> Float[Tensor, "rows vocabulary"]:
    """Run one pass through the whole model over tokens whose positions begin at ``start``. The caller has narrowed the
    LM head to one position of each row (`select_position`)."""
    positions = torch.arange(start, start + ids.shape[1], device=ids.device)[None]
    inputs = pass_inputs(subject, ids, resume_from)
    out = subject.model(**inputs, position_ids=positions, **cache_arguments(subject.model, cache))
    logits: Tensor = out.logits[:, -1]
    return logits


# Rows in fp64 at a time: 8 × 49 152 are 3 MB, which stay in the cache through all that is done with them.
ROWS = 8


def kl_divergence(base: Float[Tensor, "n vocabulary"], edited: Float[Tensor, "n vocabulary"]) -> Float[Tensor, " n"]:
    """Return KL(base ‖ edited) in nats for each row of log-probabilities, summed in fp64."""
    return torch.cat([_kl(p.double(), q.double()) for p, q in zip(base.split(ROWS), edited.split(ROWS), strict=True)])


# Nats given to a model whose output is not finite, or that is certain of a token that the base model excluded. No
# working model comes near: a uniform distribution over 50 000 tokens is about 10 nats away.
MAX_KL = 100.0


def bounded_kl(base: Float[Tensor, "n vocabulary"], edited: Float[Tensor, "n vocabulary"]) -> Float[Tensor, " n"]:
    """Return `kl_divergence` of each row, at most ``MAX_KL``, which also stands for NaN."""
    return kl_divergence(base, edited).nan_to_num(nan=MAX_KL).clamp(max=MAX_KL)


def _kl(p: Float[Tensor, "n vocabulary"], q: Float[Tensor, "n vocabulary"]) -> Float[Tensor, " n"]:
    return torch.where(p == -torch.inf, 0.0, p.exp() * (p - q)).sum(-1).clamp(min=0).float()
