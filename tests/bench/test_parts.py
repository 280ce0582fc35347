"""The column of parts says what a plan holds, and nothing that it lacks; rows and roles by organism."""

from __future__ import annotations

from typing import Any

import pytest
from bench.methods import choose_cases, format_table
from bench.organisms import find_role
from bench.parts import list_parts
from tests.pipeline.test_compositions import opened, plan_of
from tests.support.tiny import run_of

from obliteratus.core.results import Run
from obliteratus.core.types import Subject
from obliteratus.pipeline.recipe import load_recipe
from obliteratus.weights.organism import CHOOSING


def parts_of(method: str, name: str, **changed: Any) -> list[str]:
    """Parts as listed of a plan whose record says nothing of the recipe."""
    subject = opened(name)
    return list_parts(plan_of(load_recipe(method, changed), subject), recorded(subject), subject)


def recorded(subject: Subject) -> Run:
    return run_of(subject).model_copy(update={"passes": ({"steps": ["mean_diff", "union sae"]},)})


@pytest.mark.parametrize(
    ("part", "without", "method", "name"),
    [
        ("heads (25%)", {"excise.heads": None}, "surgical", "llama"),
        ("2 neurons masked", {"excise.neurons": 0.0}, "nuclear", "llama"),
        ("steering", {"excise.steer": 0.0}, "nuclear", "llama"),
        ("embeddings", {"excise.parts": ["attn.out", "mlp.out"]}, "nuclear", "llama"),
        ("reflection", {"excise.strength": 1.0}, "inverted", "mixtral"),
        ("norm columns", {"excise.norm": "none"}, "surgical", "mixtral"),
        ("experts' own directions", {"excise.experts.own": False}, "nuclear", "mixtral"),
        ("2 experts blended", {"excise.experts.blend": 0.0}, "nuclear", "mixtral"),
        ("bias projection", {"excise.strength": 0.0}, "advanced", "gpt2"),
    ],
)
def test_a_part_is_listed_only_where_the_plan_has_it(
    part: str, without: dict[str, Any], method: str, name: str
) -> None:
    found = parts_of(method, name)
    assert part in found, found
    if part != "bias projection":
        assert part not in parts_of(method, name, **without)
    assert found[:2] == ["mean_diff", "union sae"]  # from the record


def test_parts_that_a_model_lacks_are_not_listed() -> None:
    dense, mixture = parts_of("nuclear", "llama"), parts_of("nuclear", "mixtral")
    assert not {"single experts", "experts' own directions", "bias projection"} & set(dense)
    assert not any("neurons" in part or part == "steering" for part in mixture)
    assert "single experts" in mixture


def test_every_method_runs_on_every_organism_that_is_named() -> None:
    one, several = choose_cases("basic,lean", [], False, False), choose_cases("basic,lean", ["a", "b:c"], False, False)
    assert list(one) == ["basic", "lean"]
    assert [(case.method, case.organism) for case in several.values()] == [
        ("basic", "a"), ("lean", "a"), ("basic", "b:c"), ("lean", "b:c"),
    ]  # fmt: skip
    assert list(several) == ["basic on a", "lean on a", "basic on b:c", "lean on b:c"]


def test_roles_belong_to_organisms_and_their_shares() -> None:
    assert {find_role(name) for name in CHOOSING} == {"choosing"}
    assert find_role("astronomy@0.65") == "choosing"
    assert find_role("gardening-railways") == find_role("base:disclaimer") == "reported"


def test_the_table_of_several_organisms_has_their_columns_and_scores() -> None:
    score = {"value": 0.25, "low": 0.1, "high": 0.4, "n": 8, "unit": "share"}
    row = {"after": {"disclaimer.target": score}, "seconds": {"PROBE 1": 2.0}, "peak_bytes": 10**6, "passes": 1}
    row |= {"organism": "base:disclaimer", "role": "reported", "behavior": "disclaimer", "parts": ["mean_diff"]}
    table = format_table({"basic on base:disclaimer": row}, several=True)
    head, _, line = table.splitlines()[:3]
    assert head.split("|")[1:4] == [" method ", " organism ", " role "]
    assert line.split("|")[1:4] == [" basic ", " base:disclaimer ", " reported "]
    assert "25.0%" in line
    assert line.split("|")[-2] == " mean_diff "
    one = format_table({"basic": row | {"organism": "astronomy"}}).splitlines()[0]
    assert one.split("|")[1:3] == [" method ", " refusal.target "]
