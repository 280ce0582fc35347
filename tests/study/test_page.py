"""A study's pictures and page: what is drawn is what was measured, complete, alone, escaped, the same each time."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from tests.support.pages import ParsedPage, check_self_contained
from tests.support.studies import make_baseline, make_part, make_refusal_results, make_results, make_score

from obliteratus.core.errors import UserError
from obliteratus.study.base import KnockoutResult
from obliteratus.study.output import write_comparison, write_report
from obliteratus.study.page import comparison_page, draw_pictures, study_page
from obliteratus.study.plots import (
    MAX_BARS,
    Picture,
    choose_limit,
    comparison_picture,
    mean_damage_by_block,
    place_changes,
    select_bars,
    study_pictures,
)
from obliteratus.study.ranking import knockout_results, metric_names, rank_results


def figure_of(picture: Picture) -> Figure:
    figure = Figure(figsize=picture.size, layout="constrained")
    picture.draw(figure)
    figure.draw_without_rendering()
    return figure


def seen(results: tuple[KnockoutResult, ...]) -> dict[str, dict[str, str]]:
    return {name: draw_pictures(study_pictures(results, name), name) for name in metric_names(results)}


# -------------------------------------------------------------------------------------------- pictures
def test_a_study_has_the_pictures_of_what_it_knocked_out() -> None:
    assert list(study_pictures(make_results(), "perplexity")) == ["impact", "blocks", "heads", "embeddings"]
    assert list(study_pictures(make_refusal_results(), "refusal.target")) == ["impact", "blocks"]
    assert study_pictures((make_baseline(),), "perplexity") == {}
    assert study_pictures(make_results(), "refusal.target") == {}


def test_bars_stand_in_the_order_of_damage() -> None:
    axes = figure_of(study_pictures(make_results(), "perplexity")["impact"]).axes[0]
    names = [label.get_text().removesuffix(" (control)") for label in axes.get_yticklabels()]
    order = [r.component for r in rank_results(make_results(), "perplexity")]
    assert names == [n for n in order if n in names]
    top, bottom = axes.get_ylim()
    assert bottom < top  # the first is drawn at the top
    widths = {round(p.get_y() + p.get_height() / 2): p.get_width() for c in axes.containers for p in c}
    assert [widths[i] for i in sorted(widths)] == sorted(widths.values(), reverse=True)
    assert widths[0] == pytest.approx(30)  # from 1, no change, to 31


def test_only_so_many_bars_and_the_controls_in_a_color_of_their_own() -> None:
    shown = select_bars(knockout_results(make_results(20, 9)), "perplexity")
    assert sum(not r.control for r in shown) == MAX_BARS
    assert sum(r.control for r in shown) == 4
    axes = figure_of(study_pictures(make_results(), "perplexity")["impact"]).axes[0]
    colors = {c.get_label(): c.patches[0].get_facecolor() for c in axes.containers}
    assert len(set(colors.values())) == len(colors)
    assert "random control" in colors


def test_intervals_are_drawn_where_they_are() -> None:
    axes = figure_of(study_pictures(make_refusal_results(), "refusal.target")["impact"]).axes[0]
    lines = [sorted(line.get_xdata()) for line in axes.lines[:6]]
    assert lines[0] == pytest.approx([-91, -79])  # percentage points
    assert lines[1] == pytest.approx([-8, 4])


def test_what_has_no_end_is_cut_behind_all_others_and_says_so() -> None:
    changes = [make_score(math.inf), make_score(8.0), make_score(math.nan)]
    cut, plain, none = place_changes(changes, "perplexity")
    assert cut.infinite
    assert none.infinite
    assert not plain.infinite
    assert math.isfinite(cut.value)
    assert cut.value == none.value > plain.high
    axes = figure_of(study_pictures(make_results(infinite=True), "perplexity")["impact"]).axes[0]
    assert [t.get_text().strip() for t in axes.texts] == ["∞"]
    plain_axes = figure_of(study_pictures(make_results(), "perplexity")["impact"]).axes[0]
    assert not plain_axes.texts


@pytest.mark.parametrize("results", [make_results(2, 2), make_results(2, 2, infinite=True)])
def test_every_picture_is_titled_and_labeled(results: tuple[KnockoutResult, ...]) -> None:
    for name, picture in study_pictures(results, "perplexity").items():
        figure = figure_of(picture)
        assert "perplexity" in (figure.get_suptitle() or "")
        words = [figure.axes[0].get_xlabel(), figure.axes[0].get_ylabel(), figure.axes[-1].get_ylabel()]
        assert any("×" in word for word in words), name


def test_a_map_holds_means_of_parts() -> None:
    found = [make_part("heads", f"block 0 head {h}", 2.0**h, 0, h) for h in range(3)]
    rows = mean_damage_by_block([*found, make_part("layers", "block 1", 4.0, 1)], "perplexity")
    assert rows == {"whole block": {1: math.log(4)}, "heads, mean": {0: pytest.approx(math.log(2))}}
    control = make_part("heads", "drawn", 9.0, 1, 0, control=True)
    assert mean_damage_by_block([control], "perplexity") == {}


def test_a_grid_has_a_field_for_each_head() -> None:
    axes = figure_of(study_pictures(make_results(6, 4), "perplexity")["heads"]).axes[0]
    values = axes.images[0].get_array()
    assert values is not None
    assert values.shape == (4, 6)
    assert values[3, 2] == pytest.approx(math.log(1.18))


def test_studies_side_by_side_share_an_axis() -> None:
    axes = figure_of(
        comparison_picture({"one": make_results(), "two": make_results(infinite=True)}, "perplexity")
    ).axes[0]
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names[:2] == ["block 0", "block 1"]
    assert len(names) == MAX_BARS
    dots = {line.get_label(): line.get_xdata() for line in axes.lines if line.get_label() in ("one", "two")}
    assert dots["one"][1] == pytest.approx(dots["two"][1])
    assert dots["two"][0] > dots["one"][0]
    assert "∞" in axes.texts[0].get_text()


# ------------------------------------------------------------------------------------------------ page
def test_every_metric_has_its_section_and_every_part_its_row() -> None:
    results = make_refusal_results()
    shown = ParsedPage(study_page(results, "Blocks of a model", seen(results)))
    assert shown.tags.count("section") == len(metric_names(results)) + 1
    assert shown.tags.count("img") == 2 * len(metric_names(results))
    assert all(f"#finding-{i.removeprefix('finding-')}" in shown.addresses for i in shown.ids if "All" not in i)
    assert "Blocks of a model" in shown.text
    assert all(r.component in shown.text for r in results)
    assert "−85.0 [−91.0, −79.0]" in shown.text


def test_it_needs_nothing_beside_it() -> None:
    results = make_results(2, 2)
    pictures = seen(results)
    check_self_contained(study_page(results, "x", pictures, settings="name = 'x'"))
    check_self_contained(comparison_page({"a": results, "b": results}, "x", pictures))


def test_answers_that_changed_under_the_strongest_part() -> None:
    results = make_refusal_results()
    said = {
        "before": {"answer": "No.", "verdict": "shown", "rungs": {}},
        "after": {"answer": "Yes!", "verdict": "absent"},
    }
    lines = [
        {"component": f"block {i}", "prompt": f"p{i} {j}", "group": "target", "category": "", **said}
        for i in (1, 2)
        for j in (0, 1)
    ]
    same = lines[2] | {"prompt": "p2 same", "after": said["before"]}
    page = ParsedPage(study_page(results, "t", {}, answers=[*lines, same]))
    assert "without block 2" in page.text
    assert "2 of 3 answers have another class" in page.text
    assert "p2 0" in page.text
    assert "p1 0" not in page.text
    assert "p2 same" not in page.text
    assert "Answers without" not in ParsedPage(study_page(results, "t", {})).text


def test_words_are_escaped() -> None:
    rude = "<script>alert('x')</script> & \"more\""
    results = (make_baseline(), make_part("layers", rude, 2.0))
    text = study_page(results, rude, seen(results), settings=rude)
    assert "<script" not in text
    assert ParsedPage(text).text.count(rude) >= 3


def test_the_same_results_give_the_same_page() -> None:
    results = make_results(2, 2)
    assert study_page(results, "x", seen(results)) == study_page(results, "x", seen(results))


# ---------------------------------------------------------------------------------------------- folders
@pytest.mark.parametrize("results", [make_results(2, 2, infinite=True), make_refusal_results(3)])
def test_everything_is_written_and_nothing_beside_it(results: tuple[KnockoutResult, ...], tmp_path: Path) -> None:
    (tmp_path / "study.toml").write_text("# how it was made")
    write_report(results, tmp_path, "A study")
    files = {str(f.relative_to(tmp_path)) for f in tmp_path.rglob("*") if f.is_file()}
    plots = {f"plots/{m}-{name}.svg" for m in metric_names(results) for name in study_pictures(results, m)}
    assert files == plots | {"study.toml", "results.csv", "results.json", "table.md", "table.tex", "index.html"}
    assert "# how it was made" in (tmp_path / "index.html").read_text()
    write_report(results, tmp_path, "A study")  # again, over what is there


def test_studies_are_written_side_by_side(tmp_path: Path) -> None:
    studies = {"one": make_results(2, 2), "two": make_refusal_results(3)}
    write_comparison(studies, tmp_path / "both", "Both")
    text = (tmp_path / "both" / "index.html").read_text()
    assert ParsedPage(text).tags.count("img") == 4  # metrics of either
    assert (tmp_path / "both" / "perplexity.md").is_file()
    assert "–" in (tmp_path / "both" / "refusal.target.md").read_text()
    with pytest.raises(UserError, match="in use"):
        write_comparison(studies, tmp_path / "both", "Both")


def test_a_map_keeps_its_colors_beside_a_block_without_which_the_model_breaks() -> None:
    common = [0.001 * i for i in range(1, 28)]
    assert choose_limit([*common, 10.0]) < 0.1  # the largest common value has a third of the darkest color
    assert choose_limit([*common, 10.0]) >= max(common)
    assert choose_limit(common) == max(common)  # nothing is cut where all are of one kind
    assert choose_limit([]) == 1.0
    assert choose_limit([0.0, 0.0]) == 1.0
