"""Results as rows: in the order of damage, with every number, in every format, infinite ones too."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.support.studies import (
    make_baseline,
    make_measured,
    make_part,
    make_refusal_results,
    make_results,
    make_score,
)

from obliteratus.core.errors import UserError
from obliteratus.study.base import KnockoutResult
from obliteratus.study.output import RESULTS, check_metric, load_results, study_title, write_report
from obliteratus.study.ranking import damage_of, is_clear_damage, metric_names, ordering_metric, rank_results
from obliteratus.study.tables import (
    changes_table,
    comparison_table,
    escape_latex,
    format_number,
    format_score,
    summarize,
    to_csv,
    to_json,
    to_latex,
    to_markdown,
)


def kept(results: tuple[KnockoutResult, ...], folder: Path) -> Path:
    (folder / RESULTS).write_text("".join(r.model_dump_json() + "\n" for r in results))
    return folder


# -------------------------------------------------------------------------------------------- ranking
def test_the_worst_comes_first() -> None:
    order = rank_results(make_results(infinite=True), "perplexity")
    assert order[0].component == "block 0"
    values = [r.change["perplexity"].value for r in order]
    assert values == sorted(values, reverse=True)
    assert len(order) == len(make_results()) - 1  # all but the baseline


def test_a_fall_of_refusals_is_damage_and_a_rise_of_others() -> None:
    found = make_refusal_results()
    assert rank_results(found, "refusal.target")[0].component == "block 2"
    assert damage_of(rank_results(found, "refusal.target")[0], "refusal.target") == 0.85
    assert rank_results(found, "kl.first_token")[0].component == "block 5"
    assert damage_of(found[1], "refusal.control") > 0
    assert damage_of(found[1], "accuracy") == -math.inf  # not measured: last, wherever it is asked for


def test_what_is_no_number_is_the_worst() -> None:
    found = (make_baseline(), make_part("layers", "sound", 9.0), make_part("layers", "broken", math.nan))
    assert [r.component for r in rank_results(found, "perplexity")] == ["broken", "sound"]


@given(st.permutations(range(len(make_results(3, 2)) - 1)))
def test_the_order_of_finishing_does_not_show(order: list[int]) -> None:
    first, *others = make_results(3, 2)
    assert changes_table((first, *(others[i] for i in order))) == changes_table((first, *others))


def test_clear_damage_leaves_no_change_out() -> None:
    assert is_clear_damage(make_score(1.2, 0.1), "perplexity")
    assert not is_clear_damage(make_score(1.2, 0.3), "perplexity")
    assert not is_clear_damage(make_score(0.5, 0.1), "perplexity")  # clear, and no damage
    assert is_clear_damage(make_score(-0.5, 0.1), "refusal.target")
    assert not is_clear_damage(make_score(0.5, 0.1), "refusal.target")


def test_metrics_are_those_that_changed() -> None:
    assert metric_names(make_refusal_results()) == ["refusal.target", "kl.first_token", "refusal.control", "perplexity"]
    assert metric_names([make_baseline()]) == ["perplexity"]  # nothing knocked out yet
    assert ordering_metric(make_refusal_results()) == "refusal.target"
    with pytest.raises(UserError, match="did you mean 'perplexity'"):
        ordering_metric(make_refusal_results(), "perplexty")
    with pytest.raises(UserError, match=r"study 'a': metric 'kl\.first_token' does not exist"):
        check_metric({"a": make_results()}, "kl.first_token")


def test_what_is_told() -> None:
    """Results of earlier versions, without differences, go by each part's own interval."""
    assert summarize(make_results(), "perplexity") == (
        "block 0 matters most, ×31.000 [30.950, 31.050]; 42 of 48 parts show damage only, each by its own 95 % "
        "interval (1.2 would by chance); 36 of 48 do more damage than each of 4 random controls"
    )
    assert "interval" not in summarize(make_refusal_results(), "kl.first_token")  # a KL is never below 0
    assert summarize([make_baseline()], "perplexity") == "no part has been knocked out yet"


def test_no_part_matters_where_none_does_anything() -> None:
    idle = [make_part("heads", f"head {i}", 1.01) for i in range(5)]  # half the interval's width is 0.05
    assert summarize([make_baseline(), *idle], "perplexity") == (
        "no part changes perplexity beyond chance: of 5 intervals none shows damage only"
    )
    silent = [r.model_copy(update={"change": {"kl.first_token": make_score(0.0, 0.0, "nats")}}) for r in idle]
    assert summarize([make_baseline(), *silent], "kl.first_token") == "no part changes kl.first_token by 1e-06 nats"


def test_all_parts_together_are_told() -> None:
    rows = 0.001 * torch.randn(12, 4, generator=torch.Generator().manual_seed(0)).double()
    rows[:, 2] += 0.5
    assert summarize(make_measured(rows), "perplexity") == (
        "part 2 matters most, ×1.649 [1.599, 1.699]; 1 of 4 parts do damage beyond chance "
        "(4 parts, 12 items, level 0.05 over all parts)"
    )
    assert summarize(make_measured(-rows), "perplexity") == (
        "1 of 4 parts improve perplexity beyond chance (4 parts, 12 items, level 0.05 over all parts)"
    )
    assert summarize(make_measured(rows[:5]), "perplexity") == (
        "no part changes perplexity beyond chance "
        "(4 parts, 5 items, level 0.05 over all parts; fewer than 6 items show nothing)"
    )
    assert "differences" not in json.dumps(to_json(make_measured(rows)))


# -------------------------------------------------------------------------------------------- for people
def test_rows_hold_changes_with_intervals() -> None:
    columns, rows = changes_table(make_refusal_results())
    assert columns == [
        "part",
        "parameters",
        "refusal.target, %",
        "kl.first_token, nats",
        "refusal.control, %",
        "perplexity",
    ]
    assert rows[0] == ["whole model", "", "90.0 [85.0, 95.0]", "–", "10.0 [5.0, 15.0]", "40.000 [35.000, 45.000]"]
    assert rows[1][:4] == ["block 2", "1,000", "−85.0 [−91.0, −79.0]", "0.120 [0.100, 0.140]"]
    assert rows[1][4:] == ["+5.0 [−1.0, +11.0]", "×1.100 [1.050, 1.150]"]


def test_the_ordering_metric_comes_first() -> None:
    columns, rows = changes_table(make_refusal_results(), by="kl.first_token", columns=1)
    assert columns == ["part", "parameters", "kl.first_token, nats"]
    assert rows[1][0] == "block 5"


def test_top_keeps_parts_and_controls() -> None:
    _, rows = changes_table(make_results(), top=2)
    assert [r[0] for r in rows[:3]] == ["whole model", "block 0", "block 1"]
    assert [r[0] for r in rows[3:]] == [f"random {i}, as large as a head (control)" for i in (3, 2)]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1.0484, "1.048 [0.998, 1.098]"),
        (math.inf, "∞ [∞, ∞]"),
        (math.nan, "undefined"),
        (1.23e7, "1.23e07 [1.23e07, 1.23e07]"),
    ],
)
def test_shown(value: float, text: str) -> None:
    assert format_score(make_score(value)) == text


def test_nothing_has_no_sign() -> None:
    assert [format_number(x, 1, sign=True) for x in (-0.04, 0.0, 0.04, -0.06, 0.06)] == ["0.0"] * 3 + ["−0.1", "+0.1"]


def test_studies_stand_side_by_side() -> None:
    columns, rows = comparison_table({"one": make_results(), "two": make_results(7, infinite=True)}, "perplexity")
    assert columns == ["part", "one", "two"]
    assert rows[1] == ["block 0", "×31.000 [30.950, 31.050]", "×∞ [∞, ∞]"]
    assert next(r for r in rows if r[0] == "block 6")[1] == "–"  # the first has no such block
    assert len(comparison_table({"one": make_results()}, "perplexity", top=3)[1]) == 4


# ------------------------------------------------------------------------------------------ for machines
def test_csv_holds_every_result_and_number() -> None:
    found = make_results(infinite=True)
    rows = list(csv.DictReader(io.StringIO(to_csv(found))))
    assert len(rows) == len(found)
    by_name = {r["component"]: r for r in rows}
    for result in found:
        row = by_name[result.component]
        assert float(row["perplexity"]) == result.scores["perplexity"].value
        assert (row["layer"], row["control"]) == (str(result.layer), str(result.control))
        if result.strategy:
            change = result.change["perplexity"]
            ends = [float(row[f"perplexity.change{end}"]) for end in ("", ".low", ".high")]
            assert ends == [change.value, change.low, change.high]
    assert rows[0]["perplexity.change"] == ""
    assert by_name["block 0"]["perplexity.change"] == "inf"


def test_json_is_json_and_reads_back() -> None:
    found = make_results(infinite=True)
    text = json.dumps(to_json(found), allow_nan=False)  # JSON itself knows no infinity
    data = json.loads(text)
    again = [KnockoutResult.model_validate(r) for r in [data["baseline"], *data["results"]]]
    assert sorted(again, key=str) == sorted(found, key=str)
    assert data["metrics"] == ["perplexity"]


# ---------------------------------------------------------------------------------------------- for papers
def test_markdown_has_as_many_cells_in_every_line() -> None:
    lines = to_markdown((["part", "a|b"], [["x|y", "1"], ["z", "2"]])).splitlines()
    assert {len(re.split(r"(?<!\\)\|", line)) for line in lines} == {4}
    assert lines[1] == "| --- | ---: |"


def test_latex_escapes_what_it_would_read() -> None:
    text = "50 % of $a_b & {c} #1 \\d ~e ^f −1 ×2 ∞"
    plain = escape_latex(text)
    assert plain == (
        r"50 \% of \$a\_b \& \{c\} \#1 \textbackslash{}d \textasciitilde{}e \textasciicircum{}f $-$1 $\times$2 $\infty$"
    )
    assert escape_latex("block 3 head 2") == "block 3 head 2"
    assert escape_latex("[a") == "{[a}"  # else the line break before it takes it for its option


def test_a_latex_table_is_whole() -> None:
    text = to_latex(changes_table(make_results(infinite=True)), "50 % of_it")
    assert r"\caption{50 \% of\_it}" in text
    assert r"$\times$$\infty$ [$\infty$, $\infty$]" in text
    body = text.partition("\\toprule\n")[2].partition("\\bottomrule")[0].replace("\\midrule\n", "")
    lines = body.strip().splitlines()
    assert len(lines) == len(make_results()) + 1
    assert all(line.endswith(r" \\") and len(re.findall(r"(?<!\\)&", line)) == 2 for line in lines)
    assert not re.search(r"[−×∞–]", text)


# --------------------------------------------------------------------------------------------- reading
def test_results_read_back(tmp_path: Path) -> None:
    found = make_results(infinite=True)
    assert load_results(kept(found, tmp_path)) == found


@pytest.mark.parametrize("cut", [1, 2, 40])
def test_a_torn_last_line_is_left_out(cut: int, tmp_path: Path) -> None:
    found = make_results()
    kept(found, tmp_path)
    text = (tmp_path / RESULTS).read_bytes()
    (tmp_path / RESULTS).write_bytes(text[:-cut])
    assert load_results(tmp_path) == (found if cut == 1 else found[:-1])  # of the first only the line's end is gone


def test_a_line_torn_within_a_letter_is_left_out(tmp_path: Path) -> None:
    kept((make_baseline(),), tmp_path)
    with (tmp_path / RESULTS).open("ab") as file:
        file.write('{"component":"é'.encode()[:-1])
    assert load_results(tmp_path) == (make_baseline(),)


def test_a_torn_line_in_the_middle_is_refused(tmp_path: Path) -> None:
    lines = (kept(make_results(), tmp_path) / RESULTS).read_text().splitlines(keepends=True)
    lines[3] = lines[3][:30] + "\n"
    (tmp_path / RESULTS).write_text("".join(lines))
    with pytest.raises(UserError, match=rf"{RESULTS}:4: not a study's result") as caught:
        load_results(tmp_path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400  # it does not recite the line


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: lines[1:], ":1: the baseline must be the first line"),
        (lambda lines: [lines[0], *lines], ":2: the baseline must"),
        (lambda lines: [*lines, lines[2]], "'feed-forward of block 0' comes twice"),
        (lambda lines: [*lines[:2], '{"scores": 3}\n'], ":3: not a study's result"),
        (lambda lines: [lines[0].rstrip("\n")[:-5]], "holds no result yet"),
        (lambda lines: [], "holds no result yet"),
    ],
)
def test_a_file_that_is_no_study_is_refused(change, message: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    lines = (kept(make_results(), tmp_path) / RESULTS).read_text().splitlines(keepends=True)
    (tmp_path / RESULTS).write_text("".join(change(lines)))
    with pytest.raises(UserError, match=message) as caught:
        load_results(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_folder_without_results_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no results"):
        load_results(tmp_path)


def test_a_study_is_called_by_its_file(tmp_path: Path) -> None:
    assert study_title(tmp_path) == f"Study {tmp_path.name}"
    (tmp_path / "study.toml").write_text('name = "mine"\nmodel = "a/b"\n[[strategies]]\nuse = "layers"\n')
    assert study_title(tmp_path) == "Study mine of a/b"


def test_a_study_that_only_began_is_written(tmp_path: Path) -> None:
    write_report((make_baseline(),), tmp_path, "begun")
    assert len((tmp_path / "results.csv").read_text().splitlines()) == 2
    assert "no part has been knocked out yet" in (tmp_path / "index.html").read_text()
