"""The front on a page is the front that was found: its points, members' answers, history and importances."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.support.searches import run_search, search_recipe

from obliteratus.rebirth.front_section import describe_front
from obliteratus.search import SearchResult
from obliteratus.search.importance import MIN_TRIALS
from obliteratus.search.output import write_front


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, SearchResult]:
    result = run_search(search_recipe(MIN_TRIALS))
    folder = tmp_path_factory.mktemp("front")
    write_front(result, folder, folder / "none.journal")
    return folder, result


def test_every_trial_and_member_is_a_point(found: tuple[Path, SearchResult]) -> None:
    folder, result = found
    front = describe_front(folder, "refusal")
    kinds = [point.kind for point in front["plot"].points]
    assert kinds.count("trial") + kinds.count("answered") == len(result.trials)
    assert kinds.count("front") + kinds.count("chosen") == len(result.front)
    assert kinds.count("chosen") == kinds.count("base") == 1
    links = [point.link for point in front["plot"].points if point.link]
    assert links == [f"#side-{n}" for n in range(1, len(result.front) + 1)]


def test_members_have_their_answers_beside_the_unedited_ones(found: tuple[Path, SearchResult]) -> None:
    folder, result = found
    front = describe_front(folder, "refusal")
    assert [id_ for _, id_ in front["names"]] == ["before", *(str(n) for n in range(1, len(result.front) + 1))]
    by_prompt = {card.prompt: card for card in front["cards"]}
    for number, member in enumerate(result.front, 1):
        for record in member.records:
            (side,) = [s for s in by_prompt[record["prompt"]].sides if s.id == str(number)]
            assert side.answer == record["answer"]
    for record in result.unedited.records:
        assert by_prompt[record["prompt"]].sides[0].answer == record["answer"]


def test_histories_and_importances_are_of_all_trials(found: tuple[Path, SearchResult]) -> None:
    folder, result = found
    front = describe_front(folder, "refusal")
    assert len(front["histories"]) == 2
    for plot in front["histories"].values():
        assert len(plot.points) == len(result.trials)
        heights = [float(pair.split(",")[1]) for pair in plot.line.split()]
        assert heights == sorted(heights)  # the best so far never gets worse, and down is better
    for rows in front["importances"].values():
        assert {name for name, _, _ in rows} == set(result.trials[0].values)
        assert sum(share for _, share, _ in rows) == pytest.approx(1)


def test_the_unedited_model_is_where_it_was_measured(found: tuple[Path, SearchResult]) -> None:
    record = json.loads((found[0] / "front.json").read_text())
    assert record["base"]["refusal.target"] == found[1].unedited.scores["refusal.target"].value
    assert record["base"]["kl.first_token.mean"] == 0


def test_a_fit_shows_its_plans(tmp_path: Path) -> None:
    (tmp_path / "front").mkdir()
    plans = [
        {"number": n, "rate": r, "kl": k, "scale": 1.0, "edits": 3} for n, r, k in ((1, 0.5, 0.01), (2, 0.0, 0.04))
    ]
    (tmp_path / "front" / "front.json").write_text(json.dumps(plans))
    front = describe_front(tmp_path, "refusal")
    assert len(front["plot"].points) == len(front["rows"]) == 2
    assert front["plot"].points[0].x > front["plot"].points[1].x


def test_a_fit_with_keep_prompts_shows_what_is_kept(tmp_path: Path) -> None:
    (tmp_path / "front").mkdir()
    plans = [
        {"number": n, "rate": r, "kl": 0.01 * n, "kept": k, "scale": 1.0, "edits": 3}
        for n, r, k in ((1, 0.5, 1.0), (2, 0.0, 0.75))
    ]
    (tmp_path / "front" / "front.json").write_text(json.dumps(plans))
    front = describe_front(tmp_path, "refusal")
    assert front["columns"][1:3] == ["refuses target prompts", "refusals kept, keep"]
    assert [row[:3] for row in front["rows"]] == [["1", "50.0%", "100.0%"], ["2", "0.0%", "75.0%"]]
    assert front["plot"].points[0].y < front["plot"].points[1].y  # up is more


def test_a_run_without_a_front_has_none(tmp_path: Path) -> None:
    assert describe_front(tmp_path, "refusal") == {}
