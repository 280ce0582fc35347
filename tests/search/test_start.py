"""A search from Python: prompts are split, a space is taken, and a study goes on where it is kept."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.support.searches import search_prompts, search_recipe, search_subject

import obliteratus as ob
from obliteratus.core.settings import Recipe


def test_it_finds_what_the_command_finds(tmp_path: Path) -> None:
    subject, prompts = search_subject(), search_prompts()
    found = ob.run_search(search_recipe(4), subject, prompts, storage=tmp_path / "journal", study="mine", force=True)
    assert len(found.trials) == 4
    assert found.plan.edits == found.front[found.picked].plan.edits
    assert "trial" in repr(found.front[0])
    assert len(repr(found.front[0])) < 240
    more = ob.run_search(
        search_recipe(4), subject, prompts, 6, storage=tmp_path / "journal", study="mine", pick="first", force=True
    )
    assert [t.values for t in more.trials[:4]] == [t.values for t in found.trials]
    assert len(more.trials) == 6
    assert more.picked == 0


def test_a_recipe_without_a_space_gets_one() -> None:
    plain = Recipe(**{**dict(search_recipe(2)), "search": None})
    found = ob.run_search(plain, search_subject(), search_prompts(), trials=2, force=True)
    assert len(found.trials) == 2
    assert set(found.trials[0].values) == {"weigh.2.attn", "weigh.2.mlp", "weigh.3.low"}


def test_what_is_asked_wrongly_is_said_at_once() -> None:
    with pytest.raises(ob.UserError, match="--pick knee is now called"):
        ob.run_search(search_recipe(2), search_subject(), search_prompts(), pick="knee")
    with pytest.raises(ob.UserError, match="did you mean 'leace_search'"):
        ob.run_search("leace_serch", search_subject(), search_prompts())
