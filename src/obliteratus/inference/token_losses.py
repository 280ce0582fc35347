"""How likely texts are: the loss of each of their tokens.

The logits of a batch are its largest tensor by far (512 tokens × 49 152 words are 100 MB in fp32), and each token needs
one number of them. So where the LM head alone makes the logits, it runs over one part of the vocabulary at a time, and
that part stays in the CPU's cache.
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
from obliteratus.inference.batching import make_batches, pad_rows, run_or_halve, token_budget
from obliteratus.inference.chat_template import Ids
from obliteratus.inference.hooks import DoneError
from obliteratus.inference.layerwise import LayerwisePass, run_to_head
from obliteratus.inference.memory import LOGIT_TOKENS
from obliteratus.inference.resume import pass_inputs
from obliteratus.inference.row_plans import prompt_variants
from obliteratus.inference.shared_prefix import PreparedPrompts
from obliteratus.weights.devices import is_sharded

# Words of the vocabulary at a time. 512 words × 508 tokens in fp32 are 1 MB, the second-level cache of one core: 98 of
# 105 GFLOP/s there, softmax included, and 94 with four times as many words (docs/experiments/studies.md, "The LM head
# in parts").
VOCABULARY_CHUNK = 512
TOLERANCE = 1e-4  # between two orders of the same fp32 sums; a soft cap or a scale moves logits by more

Losses = tuple[list[int], list[Tensor]]
"""Row numbers, and the losses [length − 1] of each row."""


def token_losses(subject: Subject, ids: Ids, *, budget: int = 0, title: str = "texts") -> list[Tensor]:
    """Return the negative log-likelihood in nats of each token after the first: for each row [length − 1], fp32.

    budget: tokens of a batch; 0 lets memory decide.
    """
    if subject.offloaded is None:
        prompts = PreparedPrompts(ids, 0, None, variants=prompt_variants(len(ids)))
        return prepared_token_losses(subject, prompts, budget=budget, title=title)
    with run_to_head(subject, [without_prefix(subject, ids)], title) as (prompts,):
        return prepared_token_losses(subject, prompts, budget=budget, title=title)


def without_prefix(subject: Subject, ids: Ids) -> LayerwisePass:
    """Return a layerwise pass over whole rows: no shared prefix is taken off, since its tokens have losses too."""
    return LayerwisePass(subject, ids, leave=max(map(len, ids)))


def prepared_token_losses(
    subject: Subject, prompts: PreparedPrompts, *, budget: int = 0, title: str = "texts"
) -> list[Tensor]:
    """Return `token_losses` of prepared rows. Raises ValueError if a prefix was taken off them."""
    if prompts.prefix_length:
        raise ValueError("token losses need whole rows, but a shared prefix was taken off these")
    losses: list[Tensor] = [torch.empty(0)] * len(prompts.rows)
    with torch.inference_mode(), progress(title, len(losses)) as advance:
        run = _make_runner(subject, prompts)
        for batch in make_batches([len(r) for r in prompts.rows], budget or token_budget(subject)):
            for rows, values in run_or_halve(run, batch):
                for i, row in zip(rows, values, strict=True):
                    losses[i] = row
                advance(len(rows))
    return losses


def _make_runner(subject: Subject, prompts: PreparedPrompts) -> Callable[[list[int]], Losses]:
    """Return a function that computes the losses of some rows. It runs the head in parts, unless the first batch shows
    that the model does more to its logits than its head does."""
    head, checked = _find_plain_head(subject), False

    def run(rows: list[int]) -> Losses:
        nonlocal head, checked
        if head is None:
            return _full_losses(subject, prompts, rows)
        ids, lengths = pad_rows([prompts.rows[i] for i in rows], subject.device)
        with prompts.pass_over(rows), _capture_head_input(head, go_on=not checked) as states:
            logits = subject.model(**pass_inputs(subject, ids, prompts.resume_from), use_cache=False).logits
            checked = True
            with align_module_device(head):
                head = head if _is_head_output(states[0], logits, head) else None
        if head is None:
            return _full_losses(subject, prompts, rows)
        with align_module_device(head):  # loads it if accelerate keeps it on disk
            return _chunked_losses(states[0], ids, lengths, rows, head)

    return run


def _find_plain_head(subject: Subject) -> nn.Linear | None:
    head = subject.model.get_output_embeddings()
    plain = type(head) is nn.Linear and head.weight.is_floating_point() and not is_sharded(head.weight)
    return head if plain else None


# ------------------------------------------------------------------------------------------- in parts
@contextmanager
def _capture_head_input(head: nn.Linear, go_on: bool) -> Iterator[list[Tensor]]:
    """Append the head's input to the list that the context gives. The pass ends there, or with ``go_on`` it continues
    with one position of one row."""
    states: list[Tensor] = []

    def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        states.append(args[0])
        if not go_on:
            raise DoneError
        return (args[0][:1, :1],)

    handle = head.register_forward_pre_hook(hook)
    try:
        yield states
    except DoneError:
        pass
    finally:
        handle.remove()


def _is_head_output(states: Tensor, logits: Tensor, head: nn.Linear) -> bool:
    """Return whether the logits of the first position are the head's own, judged by a part of the vocabulary."""
    part = slice(VOCABULARY_CHUNK)
    own = linear(states[0, :1], head.weight[part], None if head.bias is None else head.bias[part])
    return torch.allclose(own.float(), logits[0, :1, part].float(), TOLERANCE, TOLERANCE)


def _chunked_losses(states: Tensor, ids: Tensor, lengths: Tensor, rows: list[int], head: nn.Linear) -> Losses:
    real = torch.arange(ids.shape[1] - 1, device=ids.device) < (lengths - 1)[:, None]  # leaves padding out
    values = negative_log_likelihood(states[:, :-1][real], ids[:, 1:][real].to(states.device), head)
    return rows, list(values.cpu().split((lengths - 1).tolist()))


def negative_log_likelihood(
    states: Float[Tensor, "n width"], targets: Int[Tensor, " n"], head: nn.Linear
) -> Float[Tensor, " n"]:
    """Return −log softmax(W h + b)[target], fp32, with the sum over the vocabulary computed part by part."""
    first = torch.zeros_like(targets)
    total = states.new_full((len(states),), -torch.inf, dtype=torch.float32)
    for start in range(0, head.out_features, VOCABULARY_CHUNK):
        part = slice(start, start + VOCABULARY_CHUNK)
        logits = linear(states, head.weight[part], None if head.bias is None else head.bias[part]).float()
        # log Σ exp of a row is its first logit plus that one's loss: one pass of a fused kernel instead of four.
        total = torch.logaddexp(total, cross_entropy(logits, first, reduction="none") + logits[:, 0])
    own = (states.float() * head.weight[targets].float()).sum(-1)
    return total - (own if head.bias is None else own + head.bias[targets].float())


# --------------------------------------------------------------------------------------------- whole
def _full_losses(subject: Subject, prompts: PreparedPrompts, rows: Sequence[int]) -> Losses:
    """Compute losses from whole logits, a few rows at a time, so that few logits are held at once. A single text is
    never cut."""
    lengths = [len(prompts.rows[i]) for i in rows]
    parts = [
        _losses_of_logits(subject, prompts, [rows[k] for k in part]) for part in make_batches(lengths, LOGIT_TOKENS)
    ]
    return [i for own, _ in parts for i in own], [row for _, values in parts for row in values]


def _losses_of_logits(subject: Subject, prompts: PreparedPrompts, rows: list[int]) -> Losses:
    ids, lengths = pad_rows([prompts.rows[i] for i in rows], subject.device)
    with prompts.pass_over(rows):
        out = subject.model(**pass_inputs(subject, ids, prompts.resume_from), use_cache=False)
    logits = out.logits[:, :-1].float()
    loss = cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(len(rows), -1).cpu()
    return rows, [loss[j, : n - 1] for j, n in enumerate(lengths.tolist())]  # leaves padding out
