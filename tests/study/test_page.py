"""A study's pictures and page: what is drawn is what was measured, complete, alone, escaped, the same each time."""

from __future__ import annotations

import base64
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from tests.support.studies import part, refusing, score, studied, whole

from obliteratus.core.errors import UserError
from obliteratus.study.base import KnockoutResult
from obliteratus.study.maps import averaged
from obliteratus.study.output import write, write_beside
from obliteratus.study.page import drawn, page
from obliteratus.study.plots import BARS, Picture, barred, beside_picture, on_axis, pictures
from obliteratus.study.ranking import knocked, metrics, ranked


def figure_of(picture: Picture) -> Figure:
    figure = Figure(figsize=picture.size, layout="constrained")
    picture.draw(figure)
    figure.draw_without_rendering()
    return figure


def seen(results: tuple[KnockoutResult, ...]) -> dict[str, dict[str, str]]:
    return {name: drawn(pictures(results, name), name) for name in metrics(results)}


class Seen(HTMLParser):
    """Tags, and all that a browser would fetch or follow."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.goes: list[str] = []
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        given = {k: v or "" for k, v in attrs}
        self.ids += [given["id"]] if "id" in given else []
        self.goes += [given[k] for k in ("src", "href", "srcset", "action", "data") if k in given]

    def handle_data(self, data: str) -> None:
        self.words += data


# -------------------------------------------------------------------------------------------- pictures
def test_a_study_has_the_pictures_of_what_it_knocked_out() -> None:
    assert list(pictures(studied(), "perplexity")) == ["impact", "blocks", "heads", "embeddings"]
    assert list(pictures(refusing(), "refusal.target")) == ["impact", "blocks"]
    assert pictures((whole(),), "perplexity") == {}
    assert pictures(studied(), "refusal.target") == {}


def test_bars_stand_in_the_order_of_damage() -> None:
    axes = figure_of(pictures(studied(), "perplexity")["impact"]).axes[0]
    names = [label.get_text().removesuffix(" (control)") for label in axes.get_yticklabels()]
    order = [r.component for r in ranked(studied(), "perplexity")]
    assert names == [n for n in order if n in names]
    top, bottom = axes.get_ylim()
    assert bottom < top  # the first is drawn at the top
    widths = {round(p.get_y() + p.get_height() / 2): p.get_width() for c in axes.containers for p in c}
    assert [widths[i] for i in sorted(widths)] == sorted(widths.values(), reverse=True)
    assert widths[0] == pytest.approx(30)  # from 1, no change, to 31


def test_only_so_many_bars_and_the_controls_in_a_colour_of_their_own() -> None:
    shown = barred(knocked(studied(20, 9)), "perplexity")
    assert sum(not r.control for r in shown) == BARS
    assert sum(r.control for r in shown) == 4
    axes = figure_of(pictures(studied(), "perplexity")["impact"]).axes[0]
    colours = {c.get_label(): c.patches[0].get_facecolor() for c in axes.containers}
    assert len(set(colours.values())) == len(colours)
    assert "drawn at random" in colours


def test_intervals_are_drawn_where_they_are() -> None:
    axes = figure_of(pictures(refusing(), "refusal.target")["impact"]).axes[0]
    lines = [sorted(line.get_xdata()) for line in axes.lines[:6]]
    assert lines[0] == pytest.approx([-91, -79])  # percentage points
    assert lines[1] == pytest.approx([-8, 4])


def test_what_has_no_end_is_cut_behind_all_others_and_says_so() -> None:
    changes = [score(math.inf), score(8.0), score(math.nan)]
    cut, plain, none = on_axis(changes, "perplexity")
    assert cut.broken
    assert none.broken
    assert not plain.broken
    assert math.isfinite(cut.value)
    assert cut.value == none.value > plain.high
    axes = figure_of(pictures(studied(infinite=True), "perplexity")["impact"]).axes[0]
    assert [t.get_text().strip() for t in axes.texts] == ["∞"]
    plain_axes = figure_of(pictures(studied(), "perplexity")["impact"]).axes[0]
    assert not plain_axes.texts


@pytest.mark.parametrize("results", [studied(), studied(infinite=True)])
def test_every_picture_is_titled_and_labelled(results: tuple[KnockoutResult, ...]) -> None:
    for name, picture in pictures(results, "perplexity").items():
        figure = figure_of(picture)
        assert "perplexity" in (figure.get_suptitle() or "")
        words = [figure.axes[0].get_xlabel(), figure.axes[0].get_ylabel(), figure.axes[-1].get_ylabel()]
        assert any("×" in word for word in words), name


def test_a_map_holds_means_of_parts() -> None:
    found = [part("heads", f"block 0 head {h}", 2.0**h, 0, h) for h in range(3)]
    rows = averaged([*found, part("layers", "block 1", 4.0, 1)], "perplexity")
    assert rows == {"whole block": {1: math.log(4)}, "heads, mean": {0: pytest.approx(math.log(2))}}
    control = part("heads", "drawn", 9.0, 1, 0, control=True)
    assert averaged([control], "perplexity") == {}


def test_a_grid_has_a_field_for_each_head() -> None:
    axes = figure_of(pictures(studied(6, 4), "perplexity")["heads"]).axes[0]
    values = axes.images[0].get_array()
    assert values is not None
    assert values.shape == (4, 6)
    assert values[3, 2] == pytest.approx(math.log(1.18))


def test_studies_side_by_side_share_an_axis() -> None:
    axes = figure_of(beside_picture({"one": studied(), "two": studied(infinite=True)}, "perplexity")).axes[0]
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names[:2] == ["block 0", "block 1"]
    assert len(names) == BARS
    dots = {line.get_label(): line.get_xdata() for line in axes.lines if line.get_label() in ("one", "two")}
    assert dots["one"][1] == pytest.approx(dots["two"][1])
    assert dots["two"][0] > dots["one"][0]
    assert "∞" in axes.texts[0].get_text()


# ------------------------------------------------------------------------------------------------ page
def test_every_metric_has_its_section_and_every_part_its_row() -> None:
    results = refusing()
    shown = Seen(page(results, "Blocks of a model", seen(results)))
    assert shown.tags.count("section") == len(metrics(results)) + 1
    assert shown.tags.count("img") == 2 * len(metrics(results))
    assert all(f"#finding-{i.removeprefix('finding-')}" in shown.goes for i in shown.ids if "All" not in i)
    assert "Blocks of a model" in shown.words
    assert all(r.component in shown.words for r in results)
    assert "−85.0 [−91.0, −79.0]" in shown.words


def test_it_needs_nothing_beside_it() -> None:
    text = page(studied(), "x", seen(studied()), settings="name = 'x'")
    shown = Seen(text)
    assert all(where.startswith(("#", "data:image/svg+xml;base64,")) for where in shown.goes)
    assert not {"script", "link", "iframe", "object", "embed", "base"} & set(shown.tags)
    assert "url(" not in text
    for where in shown.goes:
        if where.startswith("data:"):
            svg = base64.b64decode(where.partition(",")[2]).decode()
            assert all(h.startswith(("#", "data:")) for h in re.findall(r'href="([^"]*)"', svg))


def test_words_are_escaped() -> None:
    rude = "<script>alert('x')</script> & \"more\""
    results = (whole(), part("layers", rude, 2.0))
    text = page(results, rude, seen(results), settings=rude)
    assert "<script" not in text
    assert Seen(text).words.count(rude) >= 3


def test_the_same_results_give_the_same_page() -> None:
    results = studied(3, 2)
    assert page(results, "x", seen(results)) == page(results, "x", seen(results))


# ---------------------------------------------------------------------------------------------- folders
@pytest.mark.parametrize("results", [studied(infinite=True), refusing()])
def test_everything_is_written_and_nothing_beside_it(results: tuple[KnockoutResult, ...], tmp_path: Path) -> None:
    (tmp_path / "study.toml").write_text("# how it was made")
    write(results, tmp_path, "A study")
    files = {str(f.relative_to(tmp_path)) for f in tmp_path.rglob("*") if f.is_file()}
    plots = {f"plots/{m}-{name}.svg" for m in metrics(results) for name in pictures(results, m)}
    assert files == plots | {"study.toml", "results.csv", "results.json", "table.md", "table.tex", "index.html"}
    assert "# how it was made" in (tmp_path / "index.html").read_text()
    write(results, tmp_path, "A study")  # again, over what is there


def test_studies_are_written_side_by_side(tmp_path: Path) -> None:
    studies = {"one": studied(), "two": refusing()}
    write_beside(studies, tmp_path / "both", "Both")
    text = (tmp_path / "both" / "index.html").read_text()
    assert Seen(text).tags.count("img") == 4  # metrics of either
    assert (tmp_path / "both" / "perplexity.md").is_file()
    assert "–" in (tmp_path / "both" / "refusal.target.md").read_text()
    with pytest.raises(UserError, match="in use"):
        write_beside(studies, tmp_path / "both", "Both")
