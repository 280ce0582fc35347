"""Registries: a function's keyword-only parameters are its options, checked and filled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import pytest
from pydantic import Field

from obliteratus.core.errors import UserError, unknown_name
from obliteratus.core.registry import Registry
from obliteratus.distill import extractors
from obliteratus.verify import scorers
from obliteratus.weigh import weighers


def made() -> Registry[Callable[..., Any]]:
    registry: Registry[Callable[..., Any]] = Registry("test")

    @registry.register("first", cite="somewhere")
    def first(x: int, *, share: Annotated[float, Field(ge=0, le=1)] = 0.5, name: str) -> int:
        """One line.

        More lines.
        """
        return x

    return registry


def test_options_are_the_keyword_parameters() -> None:
    registry = made()
    assert registry.check("first", {"name": "a"}) == {"share": 0.5, "name": "a"}
    assert registry.check("first", {"name": "a", "share": 1}) == {"share": 1.0, "name": "a"}
    assert (registry["first"].about, registry["first"].cite) == ("One line.", "somewhere")
    assert registry["first"].function(3, name="a") == 3
    assert list(registry) == ["first"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "test step 'first': name: field required$"),
        ({"name": 3}, r"name: input should be a valid string \(got 3\)"),
        ({"name": "a", "share": 1.5}, r"share: input should be less than or equal to 1 \(got 1.5\)"),
        ({"name": "a", "shares": 1}, "key 'shares' does not exist; did you mean 'share'"),
        ({"name": "a", "x": 1}, "key 'x' does not exist; known: name, share"),  # positional parameters are no options
    ],
)
def test_bad_options_in_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        made().check("first", options)


def test_unknown_steps_and_near_names() -> None:
    with pytest.raises(UserError, match="test step 'frist' does not exist; did you mean 'first'"):
        made()["frist"]
    assert unknown_name("thing", "q", ["b", "a"]) == "thing 'q' does not exist; known: a, b"


def test_no_name_is_taken_twice() -> None:
    registry = made()
    with pytest.raises(ValueError, match="'first' is registered twice"):
        registry.register("first")(lambda: None)


@pytest.mark.parametrize("registry", [extractors, weighers, scorers], ids=lambda r: r.kind)
def test_every_step_says_what_it_does(registry: Registry[Any]) -> None:
    for name in registry:
        assert registry[name].about.endswith((".", ":"))
        registry.check(name, {})  # all shipped options have defaults
