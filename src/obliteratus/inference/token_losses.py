"""How likely given texts are: the loss of each of their tokens.

The logits of a batch are the largest tensor of all (512 tokens × 49 152 words are 100 MB in fp32) and are needed for
one number a token: where the LM head is all that makes them, it runs over a part of the vocabulary at a time, which
stays in the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear

from obliteratus.core.progress import progress
from obliteratus.core.shapes import Float, Int
from obliteratus.core.types import Subject
from obliteratus.inference.batching import make_batches, pad_rows, run_or_halve, state_bytes, token_budget
from obliteratus.inference.chat_template import Ids
from obliteratus.inference.hooks import DoneError
from obliteratus.inference.layerwise import LayerwisePass, run_to_head
from obliteratus.inference.memory import LOGIT_TOKENS
from obliteratus.inference.resume import pass_inputs
from obliteratus.inference.row_plans import variants_of
from obliteratus.inference.shared_prefix import PreparedPrompts
from obliteratus.weights.devices import is_sharded

# 512 words × 508 tokens in fp32 are 1 MB, the second-level cache of one core: 98 of 105 GFLOP/s there, softmax and all;
# 94 with four times as many words (docs/experiments/studies.md, "The LM head in parts").
WORDS = 512
SAME = 1e-4  # of two orders of the same fp32 sums; a soft cap or a scale moves logits by more

Losses = tuple[list[int], list[Tensor]]
"""Row numbers, and each row's losses [length − 1]."""


def token_losses(subject: Subject, ids: Ids, *, budget: int = 0, title: str = "texts") -> list[Tensor]:
    """Negative log-likelihood in nats of each token after the first, for each row: a list of [length − 1], fp32.

    budget: tokens a batch; 0 lets memory decide.
    """
    if subject.offloaded is None:
        return prepared_token_losses(
            subject, PreparedPrompts(ids, 0, None, variants=variants_of(len(ids))), budget=budget, title=title
        )
    with run_to_head(subject, [without_prefix(subject, ids)], title) as (prompts,):
        return prepared_token_losses(subject, prompts, budget=budget, title=title)


def without_prefix(subject: Subject, ids: Ids) -> LayerwisePass:
    """Rows of which no prefix is taken off."""
    return LayerwisePass(subject, ids, leave=max(map(len, ids)))


def prepared_token_losses(
    subject: Subject, prompts: PreparedPrompts, *, budget: int = 0, title: str = "texts"
) -> list[Tensor]:
    """`token_losses` of rows that are prepared. ValueError where a prefix was taken off: its tokens have losses too."""
    if prompts.skipped:
        raise ValueError("losses are of all tokens, and a prefix was taken off")
    found: list[Tensor] = [torch.empty(0)] * len(prompts.rows)
    size = budget or token_budget(subject, state_bytes(subject))
    with torch.inference_mode(), progress(title, len(found)) as advance:
        run = _runner(subject, prompts)
        for group in make_batches([len(r) for r in prompts.rows], size):
            for rows, values in run_or_halve(run, group):
                for i, row in zip(rows, values, strict=True):
                    found[i] = row
                advance(len(rows))
    return found


def _runner(subject: Subject, prompts: PreparedPrompts) -> Callable[[list[int]], Losses]:
    """In parts, unless the first batch shows that the model does more to its logits than its head."""
    head, checked = _plain_head(subject), False

    def run(rows: list[int]) -> Losses:
        nonlocal head, checked
        if head is None:
            return _whole(subject, prompts, rows)
        ids, lengths = pad_rows([prompts.rows[i] for i in rows], subject.device)
        with prompts.around(rows), _given(head, go_on=not checked) as given:
            logits = subject.model(**pass_inputs(subject, ids, prompts.lower), use_cache=False).logits
            checked = True
            with align_module_device(head):
                head = head if _same(given[0], logits, head) else None
        if head is None:
            return _whole(subject, prompts, rows)
        with align_module_device(head):  # brings it in where it is kept on disk
            return _in_parts(given[0], ids, lengths, rows, head)

    return run


def _plain_head(subject: Subject) -> nn.Linear | None:
    head = subject.model.get_output_embeddings()
    plain = type(head) is nn.Linear and head.weight.is_floating_point() and not is_sharded(head.weight)
    return head if plain else None


# ------------------------------------------------------------------------------------------- in parts
@contextmanager
def _given(head: nn.Linear, go_on: bool) -> Iterator[list[Tensor]]:
    """Inside, what the head is given is kept, and the pass ends there, or goes on with one position of one row."""
    kept: list[Tensor] = []

    def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        kept.append(args[0])
        if not go_on:
            raise DoneError
        return (args[0][:1, :1],)

    handle = head.register_forward_pre_hook(hook)
    try:
        yield kept
    except DoneError:
        pass
    finally:
        handle.remove()


def _same(states: Tensor, logits: Tensor, head: nn.Linear) -> bool:
    """Whether these logits of the first position are the head's own; a part of the vocabulary tells."""
    own = linear(states[0, :1], head.weight[:WORDS], None if head.bias is None else head.bias[:WORDS])
    return torch.allclose(own.float(), logits[0, :1, :WORDS].float(), SAME, SAME)


def _in_parts(states: Tensor, ids: Tensor, lengths: Tensor, rows: list[int], head: nn.Linear) -> Losses:
    there = torch.arange(ids.shape[1] - 1, device=ids.device) < (lengths - 1)[:, None]  # padding is left out
    values = negative_log_likelihood(states[:, :-1][there], ids[:, 1:][there].to(states.device), head)
    return rows, list(values.cpu().split((lengths - 1).tolist()))


def negative_log_likelihood(
    states: Float[Tensor, "n width"], targets: Int[Tensor, " n"], head: nn.Linear
) -> Float[Tensor, " n"]:
    """−log softmax(W h + b)[target], fp32: the sum over the vocabulary part by part."""
    first = torch.zeros_like(targets)
    total = states.new_full((len(states),), -torch.inf, dtype=torch.float32)
    for start in range(0, head.out_features, WORDS):
        part = slice(start, start + WORDS)
        logits = linear(states, head.weight[part], None if head.bias is None else head.bias[part]).float()
        # log Σ exp of a row is its first logit plus that one's loss: one pass of a fused kernel instead of four
        total = torch.logaddexp(total, cross_entropy(logits, first, reduction="none") + logits[:, 0])
    own = (states.float() * head.weight[targets].float()).sum(-1)
    return total - (own if head.bias is None else own + head.bias[targets].float())


# --------------------------------------------------------------------------------------------- whole
def _whole(subject: Subject, prompts: PreparedPrompts, rows: Sequence[int]) -> Losses:
    """Few rows at a time, so that few logits are held at once; one longer text is not cut."""
    lengths = [len(prompts.rows[i]) for i in rows]
    parts = [_logits_losses(subject, prompts, [rows[k] for k in part]) for part in make_batches(lengths, LOGIT_TOKENS)]
    return [i for own, _ in parts for i in own], [row for _, values in parts for row in values]


def _logits_losses(subject: Subject, prompts: PreparedPrompts, rows: list[int]) -> Losses:
    batch, lengths = pad_rows([prompts.rows[i] for i in rows], subject.device)
    with prompts.around(rows):
        logits = subject.model(**pass_inputs(subject, batch, prompts.lower), use_cache=False).logits[:, :-1].float()
    loss = cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="none").view(len(rows), -1).cpu()
    return rows, [loss[j, : n - 1] for j, n in enumerate(lengths.tolist())]  # padding is left out
