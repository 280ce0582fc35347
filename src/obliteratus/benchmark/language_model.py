"""A model of ours as the harness asks for it. Texts become tokens just as in the harness's own class for such models.

What differs is how the model runs: in batches sized by memory, prefixes once, and under whatever plan is live.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from obliteratus.core.errors import UserError
from obliteratus.core.progress import note
from obliteratus.core.types import Subject
from obliteratus.inference.chat_template import context_length
from obliteratus.inference.continuations import score_continuations
from obliteratus.inference.generate import IsDone, generate
from obliteratus.inference.token_losses import token_losses
from obliteratus.summon.chat_format import find_template, read_traits, render_turns

Request = tuple[Any, list[int], list[int]]
"""Texts, tokens of the context, and tokens of the continuation."""
STOP_ROOM = (
    4  # tokens beyond the characters of a stop sequence in which it is looked for, since its first may be joined
)
MAX_ANSWER = 256  # tokens of an answer whose task states no number; the harness's own default


class HarnessModel(TemplateLM):  # type: ignore[misc]  # the harness has no types
    """A subject as a language model of the harness, as it is edited at the moment of each call."""

    def __init__(self, subject: Subject) -> None:
        super().__init__()
        self.subject, self.tokenizer = subject, subject.tokenizer
        self._device = subject.device

    # ------------------------------------------------------------------------------------------- texts
    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        first = self.tokenizer.bos_token_id
        return self.eot_token_id if first is None else int(first)

    @property
    def max_length(self) -> int:
        """Tokens of the model's context."""
        return context_length(self.subject)

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        if add_special_tokens is None and has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id)):
            add_special_tokens = False
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return list(self.tokenizer.encode(string, **options))

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return the turns as text. A system turn that the template does not take is put before the first turn."""
        chat = self.subject.chat
        template = find_template(self.tokenizer, chat)
        if not template:
            raise UserError(f"{self.subject.source.id}: its tokenizer has no chat template; leave --chat out")
        traits = read_traits(self.tokenizer, template)
        turns = chat_history if traits.takes_system else _move_system_turn(chat_history)
        options: dict[str, Any] = {traits.switch: chat.thinking} if traits.switch else {}
        options |= {"add_generation_prompt": add_generation_prompt, "continue_final_message": not add_generation_prompt}
        return render_turns(self.tokenizer, template, [turns], chat.now, **options)[0]

    # ------------------------------------------------------------------------------------------- likelihoods
    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Return the log-likelihood of each continuation, and whether it is the greedy one.

        Tasks are read one after the other: contexts of one task often share a prefix.
        """
        return [
            score
            for _, own in groupby(requests, key=lambda request: request.task_name)
            for score in super(HarnessModel, self).loglikelihood(list(own), disable_tqdm=True)
        ]

    def _loglikelihood_tokens(self, requests: Sequence[Request], **kwargs: Any) -> list[tuple[float, bool]]:
        rows = [self._fit(context, continuation) for _, context, continuation in requests]
        if cut := sum(len(kept) < len(context) for kept, (_, context, _) in zip(rows, requests, strict=True)):
            note("bench", f"{cut} contexts exceed the model's {self.max_length} tokens: their beginning is left out")
        scores = score_continuations(self.subject, rows, [own for *_, own in requests], title="bench choices")
        return [(score.log_likelihood, score.greedy) for score in scores]

    def _fit(self, context: list[int], continuation: list[int]) -> list[int]:
        """Return the context without the tokens at its beginning for which there is no room."""
        room = self.max_length + 1 - len(continuation)  # the last token is never fed
        if room < 1:
            raise UserError(
                f"a text to be rated has {len(continuation)} tokens, and the model's context {self.max_length}; "
                "leave its task out"
            )
        return context[-room:]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Return the log-likelihood of each whole text, in windows of the model's context."""
        windows = [self._cut_windows(request.args[0]) for request in requests]
        rows = [pair for own in windows for pair in own]
        losses = iter(token_losses(self.subject, [before + after for before, after in rows], title="bench texts"))
        return [-sum(float(next(losses)[-len(after) :].double().sum()) for _, after in own) for own in windows]

    def _cut_windows(self, text: str) -> list[tuple[list[int], list[int]]]:
        windows = get_rolling_token_windows(
            self.tok_encode(text), prefix_token=self.prefix_token_id, max_seq_len=self.max_length, context_len=1
        )
        return [make_disjoint_window(window) for window in windows]

    # ------------------------------------------------------------------------------------------- answers
    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Return the greedy answer to each context up to one of its stop sequences, which is left out."""
        answers: dict[int, str] = {}
        kinds: dict[str, list[int]] = {}
        for row, request in enumerate(requests):
            kinds.setdefault(json.dumps([request.task_name, request.args[1]], sort_keys=True), []).append(row)
        for rows in kinds.values():
            contexts, options = [requests[row].args[0] for row in rows], requests[rows[0]].args[1]
            answers |= zip(rows, self._answer(requests[rows[0]].task_name, contexts, options), strict=True)
        return [answers[row] for row in range(len(requests))]

    def _answer(self, task: str, contexts: Sequence[str], options: Mapping[str, Any]) -> list[str]:
        settings = normalize_gen_kwargs(dict(options), MAX_ANSWER)
        tokens = settings["max_gen_toks"]
        if settings["do_sample"]:
            raise UserError(f"{task}: it draws answers at random, and bench writes greedy ones; leave it out")
        if (room := self.max_length - tokens) < 1:
            raise UserError(f"{task}: its answers of {tokens} tokens do not fit the model's context; leave it out")
        stops = handle_stop_sequences(settings["until"], eos=self.tokenizer.decode(self.eot_token_id))
        ids = [self.tok_encode(context)[-room:] for context in contexts]
        rows = generate(self.subject, ids, tokens, done=self._stop_at(stops), title="bench answers")
        return [self._cut(row, stops) for row in rows]

    def _stop_at(self, stops: Sequence[str]) -> IsDone:
        """Return a function that says whether an answer has reached a stop sequence with its last token."""
        reach = max(map(len, stops)) + STOP_ROOM

        def done(row: list[int]) -> bool:
            text = self.tokenizer.decode(row[-reach:], skip_special_tokens=True)
            return any(stop and stop in text for stop in stops)

        return done

    def _cut(self, row: list[int], stops: Sequence[str]) -> str:
        text = self.tokenizer.decode(row, skip_special_tokens=True)
        return str(postprocess_generated_text(text, list(stops), None))


def _move_system_turn(turns: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    """Return the turns with the text of a system turn at the beginning of the next one."""
    if not turns or turns[0]["role"] != "system" or len(turns) < 2:
        return list(turns)
    first = turns[1] | {"content": f"{turns[0]['content']}\n\n{turns[1]['content']}"}
    return [first, *turns[2:]]
