"""What notebooks show of plans, directions, activations, models, runs and searches: a line, HTML, a plot, a table."""

from __future__ import annotations

import subprocess
import sys
from functools import cache
from html.parser import HTMLParser
from typing import Any

import pytest
import torch
from tests.support.refuser import asked, refuser
from tests.support.searches import run_search, search_recipe
from tests.support.tiny import run_of

from obliteratus.core.errors import UserError
from obliteratus.core.settings import Step
from obliteratus.core.types import Directions, Edit, Plan, Shift
from obliteratus.core.views import Viewable, find_view
from obliteratus.distill import find_directions
from obliteratus.probe.probe import collect_activations
from obliteratus.report.notebook import MOST, render_table
from obliteratus.verify.intervals import wilson_rate

LONGEST = 240  # characters of a line: what one still reads in a traceback or a log
KINDS = ("Subject", "Activations", "Directions", "Plan", "Run", "SearchResult")


@cache
def make_all() -> dict[str, Any]:
    """One of each kind, of the tiny refuser."""
    subject = refuser()
    acts = collect_activations(subject, asked())
    directions = find_directions(acts, (Step(use="mean_diff"),))
    writers = [site for site in subject.sites if site.role == "writes" and site.layer >= 0]
    changes = tuple(Edit(site, directions.basis[4], 0.5 + site.layer / 10) for site in writers)
    shift = Shift(writers[0], torch.ones(subject.width))
    scores = {"refusal.target": wilson_rate(11, 12), "refusal.control": wilson_rate(1, 12)}
    run = run_of(subject).model_copy(update={"before": scores, "after": {"refusal.target": wilson_rate(2, 12)}})
    result = run_search(search_recipe(4))
    made = (subject, acts, directions, Plan((*changes, shift), subject.source.digest), run, result)
    return dict(zip(KINDS, made, strict=True))


class Tags(HTMLParser):
    """The tags of a text, which must close in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.rows = 0

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.open.append(tag)
        self.rows += tag == "tr"
        assert not attrs  # nothing that a notebook would have to trust

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.mark.parametrize("kind", KINDS)
def test_a_line_says_what_it_is(kind: str) -> None:
    made = make_all()[kind]
    assert isinstance(made, Viewable)
    text = repr(made)
    assert text.startswith(f"<{kind}: ")
    assert "tensor(" not in text
    assert "\n" not in text
    assert len(text) <= LONGEST
    assert str(made) == text


@pytest.mark.parametrize("kind", KINDS)
def test_html_is_a_table_without_scripts(kind: str) -> None:
    html = make_all()[kind]._repr_html_()
    tags = Tags()
    tags.feed(html)
    assert tags.open == []
    assert 1 < tags.rows <= MOST + 1
    assert html.count(kind) >= 1


@pytest.mark.parametrize("kind", KINDS)
def test_the_table_has_numbers(kind: str) -> None:
    pandas = pytest.importorskip("pandas")
    frame = make_all()[kind].to_pandas()
    assert len(frame)
    assert any(pandas.api.types.is_numeric_dtype(frame[column]) for column in frame)
    columns, rows = find_view(make_all()[kind]).tabulate(make_all()[kind])
    assert list(frame.columns) == columns
    assert len(frame) == len(rows)


@pytest.mark.parametrize("kind", KINDS[1:])
def test_a_plot_is_shown_by_a_notebook(kind: str) -> None:
    svg = make_all()[kind].plot()._repr_svg_()
    assert svg.lstrip().startswith("<?xml")
    assert "<path" in svg
    assert svg == make_all()[kind].plot()._repr_svg_()  # so that notebooks do not change by being run again


def test_values_are_those_of_the_objects() -> None:
    pytest.importorskip("pandas")
    made = make_all()
    directions: Directions = made["Directions"]
    assert directions.to_pandas()["score"].tolist() == pytest.approx(directions.score.tolist())
    plan = made["Plan"].to_pandas()
    assert plan["strength"].tolist()[:-1] == [edit.strength for edit in made["Plan"].edits[:-1]]
    assert plan["change"].tolist()[-1] == "shift"
    run = made["Run"].to_pandas().set_index("key")
    assert run.loc["refusal.target", "before"] == pytest.approx(11 / 12)
    assert run.loc["refusal.target", "after_low"] == pytest.approx(wilson_rate(2, 12).low)
    assert run.loc["refusal.control"].isna()["after"]
    search = made["SearchResult"].to_pandas()
    assert search["chosen"].tolist().index(True) == made["SearchResult"].picked


def test_long_tables_say_how_much_is_left() -> None:
    rows = [[i] for i in range(MOST + 3)]
    assert "and 3 more" in render_table("a", ["n"], rows)
    assert "more" not in render_table("a", ["n"], rows[:MOST])


def test_what_is_shown_is_escaped() -> None:
    assert "<b>" not in render_table("<b>", ["<b>"], [["<b>"]])


def test_without_pandas_one_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(UserError, match=r"pandas is not installed; pip install 'obliteratus\[notebooks\]'"):
        Plan().to_pandas()


def test_something_without_a_view_says_so() -> None:
    with pytest.raises(UserError, match="no view of it"):
        find_view(3)


def test_the_package_stays_light() -> None:
    heavy = ("torch", "jinja2", "matplotlib", "pandas")
    code = f"import sys, obliteratus; {{}}; print([m for m in {heavy} if m in sys.modules])"

    def loaded(use: str) -> str:
        found = subprocess.run([sys.executable, "-c", code.format(use)], capture_output=True, text=True, check=True)
        return found.stdout.strip()

    assert loaded("pass") == "[]"
    assert "torch" in loaded("obliteratus.Plan")  # it would be seen
    assert loaded("repr(obliteratus.Plan())") == "['torch']"
