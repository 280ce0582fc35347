"""Register steps by name. A technique registers one function with its citation; its options are its signature."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, get_args, get_type_hints

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from obliteratus.core.cost import FREE, Cost
from obliteratus.core.errors import UserError, unknown_name
from obliteratus.core.plugins import load_packages, note_registered

F = TypeVar("F", bound=Callable[..., Any])
Costing = Callable[[Mapping[str, Any]], Cost]
"""Maps a step's options, defaults included, to what one call of it costs."""


@dataclass(frozen=True)
class RunInputs:
    """What is known about a run before any weight is loaded."""

    counts: Mapping[str, int]
    """Number of fit prompts by group."""
    width: Callable[[], int]
    """Returns the width of the residual stream. It reads the model's configuration, so call it only if needed."""
    keep: str = "rows"
    """``probe.keep``."""


Fits = Callable[[Mapping[str, Any], RunInputs], None]
"""Takes a step's options, defaults included, and the run's inputs. Raises UserError if the step cannot work."""


@dataclass(frozen=True)
class Entry(Generic[F]):
    """A registered step."""

    name: str
    function: F
    cite: str
    options: type[BaseModel]
    """Model of the keyword-only parameters, which validates them and fills in defaults."""
    needs: tuple[str, ...] = ()
    """What the step cannot run without: ``rows`` (activations of every prompt), ``spread``, ``model``, or a group; of a
    scorer ``answers`` (those of the step ``behavior``, before it) and ``base`` (the unedited model)."""
    fits: Fits = lambda options, given: None
    cost: Costing = lambda options: FREE

    @property
    def about(self) -> str:
        """First line of the function's docstring."""
        return (inspect.getdoc(self.function) or "").partition("\n")[0]


class Registry(Generic[F]):
    """All steps of one kind, by name."""

    def __init__(self, kind: str, renamed: Mapping[str, str] | None = None) -> None:
        """renamed: old names of steps (``"old": "new"``) and of options (``"step.old": "new"``), for error messages."""
        self.kind = kind
        self.renamed = dict(renamed or {})
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
        """Return a decorator that registers a function. Its keyword-only parameters become the step's options.

        cite: source of the technique. needs: see `Entry.needs`; recipes are refused by it before weights are loaded.
        fits: checks, at the same time, the options against numbers of prompts and the model's width. cost: what the
        step asks of the model; a step over tensors asks nothing.
        """

        def add(function: F) -> F:
            if name in self._entries and not _is_again(function, self._entries[name].function):
                raise ValueError(f"{self.kind} step '{name}' is registered twice")
            self._entries[name] = Entry(name, function, cite, _options(function), needs, fits, cost)
            note_registered(f"{self.kind} step '{name}'")
            return function

        return add

    def __repr__(self) -> str:
        return f"<Registry: {len(self._entries)} {self.kind} steps>"

    def __contains__(self, name: object) -> bool:
        load_packages()
        return name in self._entries

    def __getitem__(self, name: str) -> Entry[F]:
        """Return a registered step. Raises UserError for one that does not exist, with the nearest name."""
        load_packages()
        if name in self.renamed:
            raise UserError(f"{self.kind} step '{name}' is now called '{self.renamed[name]}'; change the name")
        if name not in self._entries:
            raise UserError(f"{unknown_name(f'{self.kind} step', name, self._entries)}; {OWN_STEP}")
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        load_packages()
        return iter(sorted(self._entries))

    def check(self, name: str, options: dict[str, Any]) -> dict[str, Any]:
        """Validate options and return them with all defaults. Raises UserError that names the step and the option."""
        for option in options:
            if new := self.renamed.get(f"{name}.{option}"):
                raise UserError(f"{self.kind} step '{name}': option '{option}' is now called '{new}'; change the name")
        try:
            made = self[name].options(**options)
        except ValidationError as error:
            raise UserError(
                f"{self.kind} step '{name}': {explain_validation_error(error, self[name].options)}"
            ) from error
        return {key: getattr(made, key) for key in type(made).model_fields}


OWN_STEP = "a step of your own comes with --plugin FILE.py"


def _is_again(new: Callable[..., Any], old: Callable[..., Any]) -> bool:
    """Return whether the same code was run again, such as a notebook's cell or a plug-in that has changed."""
    return (new.__module__, new.__qualname__) == (old.__module__, old.__qualname__)


def _options(function: Callable[..., Any]) -> type[BaseModel]:
    hints = get_type_hints(function, include_extras=True)
    keywords = [p for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
    fields: dict[str, Any] = {p.name: (hints[p.name], ... if p.default is p.empty else p.default) for p in keywords}
    return create_model(function.__name__, __config__=ConfigDict(extra="forbid", frozen=True), **fields)


def list_keys(model: type[BaseModel], path: Sequence[str | int]) -> list[str]:
    """Return the keys of the part of a model that a path leads to; none if that has keys of any name."""
    for name in path:
        field = model.model_fields.get(str(name))
        kinds = [] if field is None else [field.annotation, *get_args(field.annotation)]
        inner = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
        if not inner:
            return []
        model = inner[0]
    return list(model.model_fields)


def explain_validation_error(error: ValidationError, model: type[BaseModel] | None = None) -> str:
    """Return a pydantic error as one line: the key, what is wrong, and the value.

    model: what was validated. A key that it does not have is then shown with the nearest that it has.
    """

    def one(item: Any) -> str:
        where = ".".join(str(x) for x in item["loc"])
        known = list_keys(model, item["loc"][:-1]) if model and item["type"] == "extra_forbidden" else []
        if known:
            return unknown_name("key", where, [".".join(map(str, (*item["loc"][:-1], key))) for key in known])
        if item["type"] == "value_error":  # our own validators already name the values
            return f"{where}: {item['ctx']['error']}"
        given = "" if item["type"] == "missing" else f" (got {item['input']!r})"
        return f"{where}: {item['msg'][0].lower()}{item['msg'][1:]}{given}"

    return "; ".join(one(item) for item in error.errors())
