"""The dial's first token over the unedited model's, in pairs of answers to the same question in a new conversation.

turned: at a strength that was not used before, so that the plan is compiled within it. set: at one that is compiled, as
after /strength.
token: each later token. second_turn: the first token of a second turn, over the same without the first turn's cache.
The plans edit attention and MLP outputs of all layers along random directions, under norm rules of different costs:
with none nothing is read from the weights, with unit_rows every edited matrix is multiplied once.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

import torch

from bench.common import describe_machine, load_organism, parse_options, print_report, say, time_call
from obliteratus.core.chat import Turn
from obliteratus.core.norms import NormRule
from obliteratus.core.types import Edit, Plan, Prompt, Subject
from obliteratus.inference.stream import AnswerLimits, ConversationCache
from obliteratus.serve.dial import Answer, Dial

NORMS: tuple[NormRule, ...] = ("none", "columns", "unit_rows")
PAIRS, SMOKE_PAIRS = 15, 1
TOKENS = 16  # whose mean time is that of a later token
SET = 0.9


def make_plan(subject: Subject, norm: NormRule) -> Plan:
    """Return a plan with one random direction at each attention and MLP output."""
    sites = [site for site in subject.sites if site.part in ("attn.out", "mlp.out")]
    rows = torch.nn.functional.normalize(torch.randn(len(sites), subject.width), dim=1)
    edits = tuple(Edit(site, row[None], 1.0, norm) for site, row in zip(sites, rows, strict=True))
    return Plan(edits, subject.source.digest)


def ask(dial: Dial, question: str, strength: float, tokens: int = TOKENS) -> Answer:
    """Return the answer to a first question."""
    return dial.stream([Turn("user", question)], strength, AnswerLimits(tokens))


def time_first(dial: Dial, question: str, strength: float) -> tuple[float, float]:
    """Return the seconds to the first piece, the strength's setting included, and those of each later piece."""
    first, answer = time_call(lambda: _start(dial, question, strength))
    rest, pieces = time_call(lambda: list(answer))
    return first, rest / max(1, len(pieces))


def _start(dial: Dial, question: str, strength: float) -> Answer:
    answer = ask(dial, question, strength)
    next(answer, "")
    return answer


def forget_conversation(dial: Dial) -> None:
    """Let the settings stay compiled and their conversations begin anew."""
    for setting in dial.settings.values():
        setting.cache = ConversationCache(dial.subject)


def measure_pairs(dial: Dial, questions: Sequence[Prompt]) -> dict[str, float]:
    """Return the medians of the ratios, and of the unedited model's seconds to its first token."""
    found: dict[str, list[float]] = {name: [] for name in ("turned", "set", "token", "unedited_seconds")}
    for n, prompt in enumerate(questions):
        dial.settings.clear()
        for strength in (0.0, SET):
            dial.prepare(strength)
        seconds = {}
        for name, strength in (("base", 0.0), ("set", SET))[:: 1 if n % 2 else -1]:  # neither always goes first
            forget_conversation(dial)
            seconds[name] = time_first(dial, prompt.text, strength)
        turned = time_first(dial, prompt.text, 1 + n / 1000)[0]  # a strength that is new each time
        base, token = seconds["base"]
        for name, value in (("turned", turned / base), ("set", seconds["set"][0] / base)):
            found[name].append(value)
        found["token"].append(seconds["set"][1] / token)
        found["unedited_seconds"].append(base)
    return {name: median(values) for name, values in found.items()}


def measure_second_turn(subject: Subject, questions: Sequence[Prompt]) -> float:
    """Return the median ratio of a second turn's first token to the same in a conversation that starts anew."""
    ratios, dial = [], Dial(subject)
    for prompt in questions:
        forget_conversation(dial)
        answer = "".join(ask(dial, prompt.text, 0.0, 64))
        turns = [Turn("user", prompt.text), Turn("assistant", answer), Turn("user", "And why?")]
        kept = _time_turns(dial, turns)
        forget_conversation(dial)
        ratios.append(kept / _time_turns(dial, turns))
    return median(ratios)


def _time_turns(dial: Dial, turns: Sequence[Turn]) -> float:
    return time_call(lambda: next(dial.stream(turns, 0.0), ""))[0]


def main(argv: Sequence[str] | None = None) -> None:
    """Print the ratios by norm rule."""
    options = parse_options(__doc__, argv)
    subject, prompts = load_organism()
    questions = prompts["control"][: SMOKE_PAIRS if options.smoke else PAIRS]
    ask(Dial(subject), questions[0].text, 0.0)  # what happens once is not measured
    result: dict[str, Any] = {"machine": describe_machine(), "pairs": len(questions)}
    for norm in NORMS:
        say(f"norm rule {norm} …")
        result[norm] = measure_pairs(Dial(subject, make_plan(subject, norm)), questions)
    result["second_turn"] = measure_second_turn(subject, questions)
    print_report(result, options.json)


if __name__ == "__main__":
    main()
