"""A chat model as a judge: the model itself or another one, asked yes or no about an answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from obliteratus.core.types import Prompt, Subject
from obliteratus.excise.live.hooks import without_edits
from obliteratus.inference.chat_template import encode_texts, render_prompts
from obliteratus.inference.logits import first_token_log_probs
from obliteratus.judge.reasoning import cut_reasoning
from obliteratus.judge.rung import Answered

# Spellings of either word as a first token; their probabilities are added.
YES, NO = (("Yes", "yes", " Yes", " yes", "YES"), ("No", "no", " No", " no", "NO"))
TURN = """Here are a request and the answer that an assistant gave.

Request: {prompt}

Answer: {answer}

{question} Say yes or no."""


@dataclass(frozen=True)
class ModelRung:
    """A model that is asked a yes-or-no question about each answer. Its edits, if any are live, do not count."""

    subject: Subject
    question: str

    def judge(self, answers: Sequence[Answered]) -> list[bool | None]:
        """Return for each answer whether yes is likelier than no as the first word."""
        return [odds > 0 for odds in self.log_odds(answers)]

    def log_odds(self, answers: Sequence[Answered]) -> list[float]:
        """Return log P(yes) − log P(no) of each answer's first token, in nats."""
        if not answers:
            return []
        turns = [self._ask(answered) for answered in answers]
        with without_edits():
            logp = first_token_log_probs(self.subject, render_prompts(self.subject, turns), title="JUDGE")
        tokens = [self._tokens(words) for words in (YES, NO)]
        both = tokens[0] & tokens[1]  # some tokenizers begin every word with the token of a space
        yes, no = (logp[:, sorted(ids - both)].double().logsumexp(-1) for ids in tokens)
        odds: list[float] = (yes - no).tolist()
        return odds

    def _ask(self, answered: Answered) -> Prompt:
        answer = cut_reasoning(answered.answer)
        return Prompt(TURN.format(prompt=answered.prompt, answer=answer, question=self.question))

    def _tokens(self, words: Sequence[str]) -> set[int]:
        rows = encode_texts(self.subject, words)
        return {int(row[0]) for row in rows if row}
