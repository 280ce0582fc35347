"""Named steps. A technique registers one function with its citation; its options are its signature."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, get_type_hints

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from obliteratus.core.cost import FREE, Cost
from obliteratus.core.errors import UserError

F = TypeVar("F", bound=Callable[..., Any])
Costing = Callable[[Mapping[str, Any]], Cost]
"""A step's options, filled with their defaults → what one call of it asks of the model."""


@dataclass(frozen=True)
class RunInputs:
    """What is known of a run before any weight is loaded."""

    counts: Mapping[str, int]
    """Fit prompts by group."""
    width: Callable[[], int]
    """Of the model's stream; asked for only where a step must know, since it reads the model's configuration."""
    keep: str = "rows"
    """``probe.keep``."""


Fits = Callable[[Mapping[str, Any], RunInputs], None]
"""(a step's options, filled with their defaults; what it will be given) → UserError where it cannot work."""


@dataclass(frozen=True)
class Entry(Generic[F]):
    """A registered step."""

    name: str
    function: F
    cite: str
    options: type[BaseModel]
    """Built from the keyword-only parameters; validates and fills defaults."""
    needs: tuple[str, ...] = ()
    """What it cannot run without: ``rows`` (every prompt's activations), ``model``, or a group of prompts by name."""
    fits: Fits = lambda options, given: None
    cost: Costing = lambda options: FREE

    @property
    def about(self) -> str:
        """First line of the docstring."""
        return (inspect.getdoc(self.function) or "").partition("\n")[0]


class Registry(Generic[F]):
    """Steps of one kind, by name."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, Entry[F]] = {}

    def register(
        self,
        name: str,
        *,
        cite: str = "",
        needs: tuple[str, ...] = (),
        fits: Fits = lambda options, given: None,
        cost: Costing = lambda options: FREE,
    ) -> Callable[[F], F]:
        """Decorator. The keyword-only parameters of the function become the step's options.

        needs: what the step cannot run without, so that a recipe can be refused before weights are loaded.
        fits: a check, for the same purpose, of its options against numbers of prompts and the model's width.
        cost: what it asks of the model, from its options; a step over tensors asks nothing.
        """

        def add(function: F) -> F:
            if name in self._entries:
                raise ValueError(f"{self.kind} step '{name}' is registered twice")
            self._entries[name] = Entry(name, function, cite, _options(function), needs, fits, cost)
            return function

        return add

    def __getitem__(self, name: str) -> Entry[F]:
        if name not in self._entries:
            raise UserError(unknown_name(f"{self.kind} step", name, self._entries))
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._entries))

    def check(self, name: str, options: dict[str, Any]) -> dict[str, Any]:
        """All options of a step, given ones validated. Raises UserError naming the step and the option."""
        try:
            made = self[name].options(**options)
        except ValidationError as error:
            raise UserError(f"{self.kind} step '{name}': {explain_validation_error(error)}") from error
        return {key: getattr(made, key) for key in type(made).model_fields}


def _options(function: Callable[..., Any]) -> type[BaseModel]:
    hints = get_type_hints(function, include_extras=True)
    keywords = [p for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
    fields: dict[str, Any] = {p.name: (hints[p.name], ... if p.default is p.empty else p.default) for p in keywords}
    return create_model(function.__name__, __config__=ConfigDict(extra="forbid", frozen=True), **fields)


def unknown_name(what: str, name: str, known: Any) -> str:
    """One line for a name that does not exist, with the near one."""
    near = difflib.get_close_matches(name, list(known), n=1)
    hint = f"did you mean '{near[0]}'?" if near else "known: " + ", ".join(sorted(known))
    return f"{what} '{name}' does not exist; {hint}"


def explain_validation_error(error: ValidationError) -> str:
    """A pydantic error in one line: where, what, what was given."""

    def one(item: Any) -> str:
        where = ".".join(str(x) for x in item["loc"])
        if item["type"] == "value_error":  # a rule of our own about several values: its text says what was given
            return f"{where}: {item['ctx']['error']}"
        given = "" if item["type"] == "missing" else f" (got {item['input']!r})"
        return f"{where}: {item['msg'][0].lower()}{item['msg'][1:]}{given}"

    return "; ".join(one(item) for item in error.errors())
