"""The same prompts under many edits: the blocks below the lowest edit run once, and no prefill runs twice.

    trunk = Trunk(subject, ids, budget=50e6)
    for plan in plans:
        with applied(subject, plan):
            answers = trunk.generate(32, go_on=lambda logp: promising(logp))  # or trunk.first_token()

Results are those of `logits.first_token_log_probs` and `generate.generate` under the same plan.
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
from obliteratus.inference.generate import DecodingBatch, Done, decode, group_answers, prefill
from obliteratus.inference.kv_cache import prefix_states
from obliteratus.inference.layer_cache import LayerCache
from obliteratus.inference.logits import last_logits, prepared_first_token_log_probs
from obliteratus.inference.row_plans import all_variants, variants_of
from obliteratus.inference.shared_prefix import PreparedPrompts, is_recurrent, prepare_prompts
from obliteratus.inference.token_losses import prepared_token_losses
from obliteratus.summon.sites import find_architecture

GoOn = Callable[[Tensor], bool]
Worth = Callable[[Collection[int]], bool]
Begun = dict[tuple[int, ...], DecodingBatch | None]
"""Rows that are written together → their batch, if its prompts have passed already."""
Hooks = dict[str, tuple[int, ...]]
"""Module path → the ids of its hooks. Ids are never used twice."""


class CachedPrompts:
    """A fixed list of prompts, and what the blocks below live edits make of them.

    The model is to be as it was when the trunk was made but for live edits: these are told by their hooks, so no pass
    begins above one. Weights changed in place are not noticed.
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
        """Runs the shared prefix, which leaves at least ``leave`` tokens of each row; all else at the first call that
        can use it.

        budget: bytes that may be held. answers: the rows that `generate` may be asked for, all by default: they need
        keys and values, which are most of what is held. depths: blocks before which passes may begin, rising; by
        default at eighths of the depth.
        """
        self.subject, self.answers = subject, list(range(len(ids)) if answers is None else answers)
        self.hooks = hooks_by_module(subject)
        with torch.inference_mode():
            self.prompts = prepare_prompts(subject, ids, leave=leave)
        self.prefix = ids[0][: self.prompts.skipped]
        self.kept = LayerCache(
            subject, self.prompts, self.prefix, budget if supports_caching(subject) else 0.0, self.answers, depths
        )
        self.copies = 1

    def times(self, copies: int) -> CachedPrompts:
        """The same prompts so many times over, one trial's rows after the other's; what is kept is shared."""
        several = copy(self)
        several.copies = copies
        return several

    def on(self, twin: Subject) -> CachedPrompts:
        """The same prompts for a twin of the model, which another thread edits; what is kept is shared."""
        other = copy(self)
        other.subject, other.hooks, other.kept = twin, hooks_by_module(twin), self.kept.on(twin)
        return other

    def first_token(self, rows: Sequence[int] | None = None) -> Float[Tensor, "rows vocabulary"]:
        """Log-probabilities (natural, fp32) of the first answer token, of all rows or of these in this order."""
        with torch.inference_mode():
            prompts = self.now()
            return prepared_first_token_log_probs(self.subject, prompts if rows is None else prompts.of(rows))

    def losses(self, *, budget: int = 0) -> list[Tensor]:
        """Of each token after the first, natural: a list of [length − 1]; see `losses.token_losses`. For a trunk that
        has no shared prefix: ``leave`` as long as the longest row."""
        with torch.inference_mode():
            return prepared_token_losses(self.subject, self.now(), budget=budget)

    def generate(
        self,
        max_new: int,
        *,
        rows: Sequence[int] | None = None,
        done: Done | None = None,
        go_on: GoOn | None = None,
        worth: Worth | None = None,
    ) -> Ids | None:
        """Greedy answers as of `generate.generate`, to the trunk's ``answers`` or these of them; the others' are empty.

        go_on: called once before anything is written, with the first token's log-probabilities of all rows [rows,
        vocabulary]. worth: called after each step, with the rows that ``done`` has ended so far. False of either ends
        it there, and None is returned. Raises ValueError for rows not in ``answers``.
        """
        wanted = self._wanted(rows)
        with torch.inference_mode():
            prompts = self.now()
            groups = group_answers(self.subject, prompts, wanted, max_new)
            begun = [part for group in groups[:1] for part in run_or_halve(self._begin(prompts, max_new), group)]
            if go_on is not None and not go_on(self._first(prompts, begun)):
                return None
            later = {tuple(batch.rows): batch for batch, _ in begun} | {tuple(group): None for group in groups[1:]}
            return self._written(prompts, later, max_new, done, worth or (lambda decided: True))

    def _wanted(self, rows: Sequence[int] | None) -> list[int]:
        n = len(self.prompts.rows)
        if rows is None:
            return [n * copy + row for copy in range(self.copies) for row in self.answers]
        if not {row % n for row in rows} <= set(self.answers):
            raise ValueError("rows that the trunk was not made to answer: their keys and values are not kept")
        return list(rows)

    def now(self) -> PreparedPrompts:
        """The prompts for the model as it is edited at this moment.

        What is kept is made at the first call that can use it, without gradients; above it they pass.
        """
        first = lowest_changed_block(self.subject, self.hooks)
        cut = max((c for c in self.kept.cuts if c <= first), default=0)
        if cut and not self.kept.checked:
            self.kept.checked = True
            if not matches_uncached(self.subject, self._at(cut), self._at(0), self.answers):
                self.kept.drop()
                cut = 0
        return self._at(cut)

    def _at(self, cut: int) -> PreparedPrompts:
        """The prompts with the blocks below the cut known; what the prefix gives above it is computed."""
        lower, n = self.kept.lower(cut), len(self.prompts.rows)
        made = replace(self.prompts, lower=lower).of(list(range(n)) * self.copies)
        made = replace(made, variants=variants_of(n * self.copies))
        if not self.prefix:
            return made
        with lower.entering([n] * len(all_variants())) if lower else nullcontext():
            above = prefix_states(self.subject, self.prefix, cut)
        assert self.prompts.prefix is not None
        return replace(made, prefix=[*self.prompts.prefix[:cut], *above])

    def _begin(self, prompts: PreparedPrompts, max_new: int) -> Callable[[list[int]], tuple[DecodingBatch, Tensor]]:
        return lambda rows: prefill(self.subject, prompts, rows, max_new)

    def _first(
        self, prompts: PreparedPrompts, begun: Sequence[tuple[DecodingBatch, Tensor]]
    ) -> Float[Tensor, "rows vocabulary"]:
        """Log-probabilities of the rows that are begun, and of all others by a pass."""
        known = [row for batch, _ in begun for row in batch.rows]
        rest = sorted(set(range(len(prompts.rows))) - set(known))
        logp = [logits.float().log_softmax(-1).cpu() for _, logits in begun]
        logp += [prepared_first_token_log_probs(self.subject, prompts.of(rest))] if rest else []
        return torch.cat(logp)[torch.tensor([*known, *rest]).argsort()]

    def _written(
        self,
        prompts: PreparedPrompts,
        groups: dict[tuple[int, ...], DecodingBatch | None],
        max_new: int,
        done: Done | None,
        worth: Worth,
    ) -> Ids | None:
        """Answers of all groups; a group that is begun goes on, unless memory runs out: then its halves start anew."""
        answers: Ids = [[] for _ in prompts.rows]
        decided: set[int] = set()
        with progress("answers", sum(map(len, groups)) * max_new) as advance:

            def run(rows: list[int]) -> bool:
                batch = groups.pop(tuple(rows), None) or prefill(self.subject, prompts, rows, max_new)[0]
                for tokens in decode(self.subject, batch, answers, max_new, done):
                    advance(tokens)
                    decided.update(batch.decided)
                    if not worth(decided):
                        return False
                return True

            parts = (part for group in list(groups) for part in run_or_halve(run, list(group)))
            return answers if all(parts) else None


# ---------------------------------------------------------------------------------------------- checks
def supports_caching(subject: Subject) -> bool:
    """Whether the stream, keys and values are all that the blocks above need of those below."""
    return not is_recurrent(subject) and not find_architecture(subject.model.config).shares_state_across_layers


def hooks_by_module(subject: Subject) -> Hooks:
    """The hooks of every module that has some."""
    found = {
        path: (*module._forward_hooks, *module._forward_pre_hooks) for path, module in subject.model.named_modules()
    }
    return {path: ids for path, ids in found.items() if ids}


def lowest_changed_block(subject: Subject, before: Hooks) -> int:
    """The lowest block in which hooks were set or taken off since; 0 if so before the blocks, L if in none."""
    changed = {path for path, _ in hooks_by_module(subject).items() ^ before.items()}
    return min((_block_of(subject, path) for path in changed), default=subject.n_layers)


def _block_of(subject: Subject, path: str) -> int:
    if path.startswith(f"{subject.layers}."):
        return int(path.removeprefix(f"{subject.layers}.").partition(".")[0])
    after = any(site.path == path and site.layer >= subject.n_layers for site in subject.sites)
    return subject.n_layers if after else 0


@torch.no_grad()
def matches_uncached(subject: Subject, found: PreparedPrompts, plain: PreparedPrompts, answers: Sequence[int]) -> bool:
    """Whether the shortest and the longest row come out equal: next logits, and of answers all keys and values."""
    found, plain = (prompts.of(answers) if answers else prompts for prompts in (found, plain))
    pairs = (
        pair
        for row in plain.ends()
        for pair in zip(
            _come_out(subject, found, row, bool(answers)), _come_out(subject, plain, row, bool(answers)), strict=True
        )
    )
    return all(torch.allclose(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max())) for a, b in pairs)


def _come_out(subject: Subject, prompts: PreparedPrompts, row: int, answers: bool) -> list[Tensor]:
    if not answers:
        return [last_logits(subject, prompts, [row], prompts.cache([row]))]
    batch, logits = prefill(subject, prompts, [row], 1)
    return [logits, *(x[:, :, : layer.slots] for layer in batch.cache.layers for x in layer.buffers)]
