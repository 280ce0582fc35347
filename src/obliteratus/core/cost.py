"""How much of the model's work a step asks for, as a formula of prompt and layer counts.

Each step declares its cost where it is registered. The formula is kept as data, so that it can be both printed and
evaluated.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import product

Values = Mapping[str, int | float]
"""Values of a formula's variables, e.g. ``{"N_fit": 512, "L": 30}``."""
Factor = tuple[str, int]
"""A variable, and the largest value that it counts with (0: no cap)."""


@dataclass(frozen=True)
class Amount:
    """A sum of products of variables, such as 2·N_fit + 13·L."""

    terms: Mapping[tuple[Factor, ...], int | float] = field(default_factory=dict)

    def __add__(self, other: Amount) -> Amount:
        return _sum_terms([*self.terms.items(), *other.terms.items()])

    def __mul__(self, other: Amount | int | float) -> Amount:
        pairs = product(self.terms.items(), (other if isinstance(other, Amount) else constant(other)).terms.items())
        return _sum_terms((tuple(sorted(mine + theirs)), a * b) for (mine, a), (theirs, b) in pairs)

    __rmul__ = __mul__

    def __bool__(self) -> bool:
        return any(self.terms.values())

    def __str__(self) -> str:
        return " + ".join(_format_term(factors, times) for factors, times in self.terms.items() if times)

    def substitute(self, amounts: Mapping[str, Amount]) -> Amount:
        """Return the formula with amounts in place of variables. A cap goes with the variable."""
        products = (
            math.prod((amounts.get(name, variable(name, cap)) for name, cap in factors), start=constant(times))
            for factors, times in self.terms.items()
        )
        return sum(products, Amount())

    def evaluate(self, values: Values) -> float:
        """Return the number that the formula gives for these values. Raises KeyError for a variable without one."""
        return float(
            sum(
                times * math.prod(min(values[name], cap) if cap else values[name] for name, cap in factors)
                for factors, times in self.terms.items()
            )
        )


def _sum_terms(terms: Iterable[tuple[tuple[Factor, ...], int | float]]) -> Amount:
    total: dict[tuple[Factor, ...], int | float] = {}
    for factors, times in terms:
        total[factors] = total.get(factors, 0) + times
    return Amount(total)


def _format_term(factors: tuple[Factor, ...], times: int | float) -> str:
    names = [f"min({name}, {cap})" if cap else name for name, cap in factors]
    return "·".join([f"{times:g}"] * (times != 1 or not names) + names)


def constant(value: int | float) -> Amount:
    """Return a plain number as a formula."""
    return Amount({(): value})


def variable(name: str, cap: int = 0) -> Amount:
    """Return a variable as a formula; ``variable("L", 48)`` is min(L, 48)."""
    return Amount({((name, cap),): 1})


def prompt_count(part: str, group: str = "", cap: int = 0) -> Amount:
    """Return the number of prompts of a split (fit, search, report), or of one group of it: N_fit, N_report,control."""
    return variable(f"N_{part},{group}" if group else f"N_{part}", cap)


@dataclass(frozen=True)
class Answers:
    """Prompts that are answered in one batch, ``times`` times. Each prompt also passes through the model once."""

    tokens: int
    """Tokens of each answer, at most."""
    prompts: Amount
    times: int = 1


@dataclass(frozen=True)
class Training:
    """Gradient steps. The weights are frozen, so a prompt costs one forward and one backward pass."""

    steps: int
    """The most steps: training may stop earlier."""
    prompts: int
    """Prompts of each step."""
    tokens: int
    """Tokens of the answer that follows each prompt."""


@dataclass(frozen=True)
class Cost:
    """What a step asks of the model. Everything is empty for a step that only computes with tensors."""

    forwards: Amount = Amount()
    """Prompts that pass through the model once."""
    answers: tuple[Answers, ...] = ()
    texts: Amount = Amount()
    """Paragraphs of prose that pass through the model and its LM head once."""
    training: tuple[Training, ...] = ()
    free_after: str = ""
    """A step whose passes this one reuses, so that it costs nothing after that step."""

    def __add__(self, other: Cost) -> Cost:
        answers, training = self.answers + other.answers, self.training + other.training
        return Cost(self.forwards + other.forwards, answers, self.texts + other.texts, training)

    def __mul__(self, times: int) -> Cost:
        answers = tuple(replace(a, times=a.times * times) for a in self.answers if times)
        training = tuple(replace(t, steps=t.steps * times) for t in self.training if times)
        return Cost(self.forwards * times, answers, self.texts * times, training)

    def __bool__(self) -> bool:
        return bool(self.forwards or self.answers or self.texts or self.training)

    def count_passes(self, values: Values) -> int:
        """Return the most passes of one prompt. Each token of an answer is one, each prompt of a gradient step two."""
        count = self.forwards.evaluate(values) + self.texts.evaluate(values)
        count += sum((1 + a.tokens) * a.times * a.prompts.evaluate(values) for a in self.answers)
        return round(count + sum(2 * t.steps * t.prompts for t in self.training))

    def __str__(self) -> str:
        parts = [f"{_bracket(self.forwards)} forwards"] * bool(self.forwards)
        parts += [f"{_bracket(a.prompts * a.times)} × {a.tokens} tokens" for a in self.answers]
        parts += [f"{t.steps} gradient steps × {t.prompts} prompts" for t in self.training]
        parts += [f"{_bracket(self.texts)} texts"] * bool(self.texts)
        return " + ".join(parts) or "nothing"


def _bracket(amount: Amount) -> str:
    text = str(amount)
    return f"({text})" if " + " in text else text


FREE = Cost()
