"""What a step asks of the model, as a formula of prompts and layers. Steps declare it where they are registered.

A formula is kept as data, so that it is read by people and evaluated by forecasts: nobody writes a number twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

Values = Mapping[str, int | float]
"""What the names of a formula stand for, e.g. ``{"N_fit": 512, "L": 30}``."""
Factor = tuple[str, int]
"""A name, and the most that is taken of it (0: all)."""


@dataclass(frozen=True)
class Amount:
    """A sum of products, such as 2·N_fit + 13·L."""

    terms: Mapping[tuple[Factor, ...], int | float] = field(default_factory=dict)

    def __add__(self, other: Amount) -> Amount:
        names = dict.fromkeys([*self.terms, *other.terms])
        return Amount({name: self.terms.get(name, 0) + other.terms.get(name, 0) for name in names})

    def __mul__(self, other: Amount | int | float) -> Amount:
        other = other if isinstance(other, Amount) else Amount({(): other})
        total = Amount()
        for mine, one in self.terms.items():
            for theirs, two in other.terms.items():
                total += Amount({tuple(sorted(mine + theirs)): one * two})
        return total

    __rmul__ = __mul__

    def __bool__(self) -> bool:
        return any(self.terms.values())

    def __str__(self) -> str:
        return " + ".join(_term(factors, times) for factors, times in self.terms.items() if times)

    def of(self, values: Values) -> float:
        """The number, names replaced by their values. KeyError for a name that has none."""
        total = 0.0
        for factors, times in self.terms.items():
            for name, most in factors:
                times = times * (min(values[name], most) if most else values[name])
            total += times
        return total


def _term(factors: tuple[Factor, ...], times: int | float) -> str:
    names = [f"min({name}, {most})" if most else name for name, most in factors]
    return "·".join([f"{times:g}"] * (times != 1 or not names) + names)


def amount(name: str, most: int = 0) -> Amount:
    """A name by itself; ``most`` caps it: ``amount("N_search", 48)`` is min(N_search, 48)."""
    return Amount({((name, most),): 1})


def number(value: int) -> Amount:
    """A plain number."""
    return Amount({(): value})


def n_of(part: str, group: str = "", most: int = 0) -> Amount:
    """Prompts of one part (fit, search, report), of all groups together or of one: N_fit, N_report,control."""
    return amount(f"N_{part},{group}" if group else f"N_{part}", most)


@dataclass(frozen=True)
class Answers:
    """Prompts that are answered together, so many times. Each prompt is passed once as well."""

    tokens: int
    """Of each answer, at most."""
    prompts: Amount
    """Of one time."""
    times: int = 1


@dataclass(frozen=True)
class Training:
    """Gradient steps. Weights are frozen, so a prompt costs one pass forward and one back."""

    steps: int
    """The cap: a step may stop earlier."""
    prompts: int
    """Passed forward and back at each step."""
    tokens: int
    """Of the answer behind each prompt."""


@dataclass(frozen=True)
class Cost:
    """What is asked of the model. All parts are empty for steps over tensors."""

    forwards: Amount = Amount()
    """Prompts passed once."""
    answers: tuple[Answers, ...] = ()
    texts: Amount = Amount()
    """Paragraphs of prose passed once, LM head and all."""
    training: tuple[Training, ...] = ()
    free_after: str = ""
    """The step whose passes this one takes over, and then costs nothing."""

    def __add__(self, other: Cost) -> Cost:
        answers, training = self.answers + other.answers, self.training + other.training
        return Cost(self.forwards + other.forwards, answers, self.texts + other.texts, training)

    def __mul__(self, times: int) -> Cost:
        answers = tuple(replace(a, times=a.times * times) for a in self.answers if times)
        training = tuple(replace(t, steps=t.steps * times) for t in self.training if times)
        return Cost(self.forwards * times, answers, self.texts * times, training)

    def __bool__(self) -> bool:
        return bool(self.forwards or self.answers or self.texts or self.training)

    def passes(self, values: Values) -> int:
        """Forward passes of one prompt, at most: every token of an answer is one, and a gradient step's prompt two."""
        count = self.forwards.of(values) + self.texts.of(values)
        count += sum((1 + a.tokens) * a.times * a.prompts.of(values) for a in self.answers)
        return round(count + sum(2 * t.steps * t.prompts for t in self.training))

    def __str__(self) -> str:
        parts = [f"{_bracketed(self.forwards)} forwards"] * bool(self.forwards)
        parts += [f"{_bracketed(a.prompts * a.times)} × {a.tokens} tokens" for a in self.answers]
        parts += [f"{t.steps} gradient steps × {t.prompts} prompts" for t in self.training]
        parts += [f"{_bracketed(self.texts)} texts"] * bool(self.texts)
        return " + ".join(parts) or "nothing"


def _bracketed(what: Amount) -> str:
    return f"({what})" if len([t for t in what.terms.values() if t]) > 1 else str(what)


FREE = Cost()
