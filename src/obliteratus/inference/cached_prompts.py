"""The same prompts under many plans: the blocks below the lowest edit run once, and no prefill runs twice.

    cached = CachedPrompts(subject, ids, budget=50e6)
    for plan in plans:
        with applied(subject, plan):
            answers = cached.generate(32, accept_first=lambda logp: promising(logp))  # or cached.first_token()

Results equal those of `logits.first_token_log_probs` and `generate.generate` under the same plan.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from copy import copy
from dataclasses import replace

import torch
from torch import Tensor

from obliteratus.core.progress import progress
from obliteratus.core.shapes import Float
from obliteratus.core.types import Subject
from obliteratus.inference.batching import run_or_halve
from obliteratus.inference.chat_template import Ids
from obliteratus.inference.generate import DecodingBatch, IsDone, decode, group_answers, prefill
from obliteratus.inference.kv_cache import prefix_states
from obliteratus.inference.layer_cache import LayerCache
from obliteratus.inference.logits import last_logits, prepared_first_token_log_probs
from obliteratus.inference.row_plans import all_variants, prompt_variants
from obliteratus.inference.shared_prefix import PreparedPrompts, is_recurrent, prepare_prompts
from obliteratus.inference.token_losses import prepared_token_losses
from obliteratus.summon.sites import find_architecture

AcceptFirst = Callable[[Tensor], bool]
KeepGoing = Callable[[Collection[int]], bool]
HookIds = dict[str, tuple[int, ...]]
"""Module path → the ids of its hooks. PyTorch never uses an id twice."""


class CachedPrompts:
    """A fixed list of prompts, and what the blocks below live edits make of them.

    Apart from live edits the model must stay as it was on creation. Live edits are recognized by their hooks, so no
    pass begins above one. Weights that are changed in place are not noticed.
    """

    def __init__(
        self,
        subject: Subject,
        ids: Ids,
        *,
        budget: float,
        answers: Sequence[int] | None = None,
        leave: int = 1,
        depths: Sequence[int] = (),
    ) -> None:
        """Run the shared prefix, which leaves at least ``leave`` tokens of each row. Everything else runs at the first
        call that can use it.

        budget: bytes that may be held. answers: rows that `generate` may be asked for, all by default. They need keys
        and values, which are most of what is held. depths: blocks before which passes may begin, rising; by default
        eighths of the depth.
        """
        self.subject, self.answers = subject, list(range(len(ids)) if answers is None else answers)
        self.hooks = hooks_by_module(subject)
        with torch.inference_mode():
            self.prompts = prepare_prompts(subject, ids, leave=leave)
        self.prefix = ids[0][: self.prompts.prefix_length]
        self.layers = LayerCache(
            subject, self.prompts, self.prefix, budget if supports_caching(subject) else 0.0, self.answers, depths
        )
        self.copies = 1

    def repeat(self, copies: int) -> CachedPrompts:
        """Return the same prompts so many times over, one copy's rows after the other's. The cache is shared."""
        repeated = copy(self)
        repeated.copies = copies
        return repeated

    def first_token(self, rows: Sequence[int] | None = None) -> Float[Tensor, "rows vocabulary"]:
        """Return log-probabilities (natural, fp32) of the first answer token, of all rows or of these in this order."""
        with torch.inference_mode():
            prompts = self.prepare()
            return prepared_first_token_log_probs(self.subject, prompts if rows is None else prompts.select(rows))

    def losses(self, *, budget: int = 0) -> list[Tensor]:
        """Return the losses of each token after the first in nats, as `token_losses` does.

        There must be no shared prefix, so pass ``leave`` as long as the longest row on creation.
        """
        with torch.inference_mode():
            return prepared_token_losses(self.subject, self.prepare(), budget=budget)

    def generate(
        self,
        max_new: int,
        *,
        rows: Sequence[int] | None = None,
        done: IsDone | None = None,
        accept_first: AcceptFirst | None = None,
        keep_going: KeepGoing | None = None,
    ) -> Ids | None:
        """Return greedy answers as `generate.generate` does, to the rows in ``answers`` or to these of them. The other
        rows' answers are empty.

        accept_first: called once before anything is written, with the log-probabilities of all rows' first tokens
        [rows, vocabulary]. keep_going: called after each step, with the rows that ``done`` has ended so far. If either
        returns False, writing ends there and None is returned. Raises ValueError for rows not in ``answers``.
        """
        wanted = self._check_rows(rows)
        with torch.inference_mode():
            prompts = self.prepare()
            groups = group_answers(self.subject, prompts, wanted, max_new)
            started = [
                part
                for group in groups[:1]
                for part in run_or_halve(lambda rows: prefill(self.subject, prompts, rows, max_new), group)
            ]
            if accept_first is not None and not accept_first(self._first_log_probs(prompts, started)):
                return None
            batches: dict[tuple[int, ...], DecodingBatch | None] = {tuple(b.rows): b for b, _ in started}
            batches |= {tuple(group): None for group in groups[1:]}
            return self._write_answers(prompts, batches, max_new, done, keep_going or (lambda decided: True))

    def _check_rows(self, rows: Sequence[int] | None) -> list[int]:
        n = len(self.prompts.rows)
        if rows is None:
            return [n * k + row for k in range(self.copies) for row in self.answers]
        if not {row % n for row in rows} <= set(self.answers):
            raise ValueError("these rows are not in `answers`, so their keys and values were not kept")
        return list(rows)

    def prepare(self) -> PreparedPrompts:
        """Return the prompts, prepared for the model as it is edited at this moment.

        Gradients do not reach what is kept, only the blocks above it.
        """
        lowest = lowest_changed_block(self.subject, self.hooks)
        cut = max((c for c in self.layers.cuts if c <= lowest), default=0)
        if cut and not self.layers.checked:
            self.layers.checked = True
            if not matches_uncached(self.subject, self._prepare_at(cut), self._prepare_at(0), self.answers):
                self.layers.clear()
                cut = 0
        return self._prepare_at(cut)

    def _prepare_at(self, cut: int) -> PreparedPrompts:
        """Return prompts that resume at the cut. The prefix runs through the blocks above it now."""
        resume_from, n = self.layers.resume_point(cut), len(self.prompts.rows)
        prompts = replace(self.prompts, resume_from=resume_from).select(list(range(n)) * self.copies)
        prompts = replace(prompts, variants=prompt_variants(n * self.copies))
        if not self.prefix:
            return prompts
        with resume_from.resume([n] * len(all_variants())) if resume_from else nullcontext():
            above = prefix_states(self.subject, self.prefix, cut)
        assert self.prompts.prefix is not None
        return replace(prompts, prefix=[*self.prompts.prefix[:cut], *above])

    def _first_log_probs(
        self, prompts: PreparedPrompts, started: Sequence[tuple[DecodingBatch, Tensor]]
    ) -> Float[Tensor, "rows vocabulary"]:
        """Return the log-probabilities of the rows that are started, and run a pass for all others."""
        known = [row for batch, _ in started for row in batch.rows]
        rest = sorted(set(range(len(prompts.rows))) - set(known))
        logp = [logits.float().log_softmax(-1).cpu() for _, logits in started]
        logp += [prepared_first_token_log_probs(self.subject, prompts.select(rest))] if rest else []
        return torch.cat(logp)[torch.tensor([*known, *rest]).argsort()]

    def _write_answers(
        self,
        prompts: PreparedPrompts,
        batches: dict[tuple[int, ...], DecodingBatch | None],
        max_new: int,
        done: IsDone | None,
        keep_going: KeepGoing,
    ) -> Ids | None:
        """Write the answers of all batches. batches: rows that are written together → their batch, if its prompts have
        run already. If memory runs out, the halves of a batch start anew."""
        answers: Ids = [[] for _ in prompts.rows]
        decided: set[int] = set()
        with progress("answers", sum(map(len, batches)) * max_new) as advance:

            def run(rows: list[int]) -> bool:
                batch = batches.pop(tuple(rows), None) or prefill(self.subject, prompts, rows, max_new)[0]
                for tokens in decode(self.subject, batch, answers, max_new, done):
                    advance(tokens)
                    decided.update(batch.decided)
                    if not keep_going(decided):
                        return False
                return True

            completed = (part for rows in list(batches) for part in run_or_halve(run, list(rows)))
            return answers if all(completed) else None


# ---------------------------------------------------------------------------------------------- checks
def supports_caching(subject: Subject) -> bool:
    """Return whether the blocks above need nothing of those below but the stream, keys and values."""
    return not is_recurrent(subject) and not find_architecture(subject.model.config).shares_state_across_layers


def hooks_by_module(subject: Subject) -> HookIds:
    """Return the ids of the hooks of every module that has any."""
    hooks = {
        path: (*module._forward_hooks, *module._forward_pre_hooks) for path, module in subject.model.named_modules()
    }
    return {path: ids for path, ids in hooks.items() if ids}


def lowest_changed_block(subject: Subject, before: HookIds) -> int:
    """Return the lowest block in which hooks were added or removed since: 0 also for changes below the blocks, and L if
    nothing changed in or below them."""
    changed = {path for path, _ in hooks_by_module(subject).items() ^ before.items()}
    return min((_block_of_module(subject, path) for path in changed), default=subject.n_layers)


def _block_of_module(subject: Subject, path: str) -> int:
    if path.startswith(f"{subject.layers}."):
        return int(path.removeprefix(f"{subject.layers}.").partition(".")[0])
    above = any(site.path == path and site.layer >= subject.n_layers for site in subject.sites)
    return subject.n_layers if above else 0


@torch.no_grad()
def matches_uncached(subject: Subject, cached: PreparedPrompts, plain: PreparedPrompts, answers: Sequence[int]) -> bool:
    """Return whether the shortest and the longest row come out equal: their next logits, and for rows that are to be
    answered all keys and values."""
    cached, plain = (prompts.select(answers) if answers else prompts for prompts in (cached, plain))
    pairs = (
        pair
        for row in plain.shortest_and_longest()
        for pair in zip(*(_run_row(subject, prompts, row, bool(answers)) for prompts in (cached, plain)), strict=True)
    )
    return all(torch.allclose(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max())) for a, b in pairs)


def _run_row(subject: Subject, prompts: PreparedPrompts, row: int, with_states: bool) -> list[Tensor]:
    """Return a row's next logits, then its keys and values in all blocks if they are wanted."""
    if not with_states:
        return [last_logits(subject, prompts, [row], prompts.make_cache([row]))]
    batch, logits = prefill(subject, prompts, [row], 1)
    return [logits, *(x[:, :, : layer.slots] for layer in batch.cache.layers for x in layer.buffers)]
