"""The generated pages are up to date, and the forecasts on them follow their formulas."""

from __future__ import annotations

from pathlib import Path

import pytest
from bench.architectures import make_architectures_page
from bench.docs import FOLDER, make_costs, make_methods_page, make_pages, make_runtimes_page
from bench.runtimes import MEASURED, SHAPES, Rates, Shape, extrapolate, forecast_seconds, format_seconds, load_rates

from obliteratus.forecast.costs import COSTS
from obliteratus.forecast.formula import stage_costs, total_cost
from obliteratus.pipeline.presets import list_methods
from obliteratus.pipeline.recipe import load_recipe
from obliteratus.summon.architectures import ARCHITECTURES, UNSUPPORTED

RATES = Rates(
    date="2026-01-01",
    machine="a machine",
    beside="nothing",
    gemm={576: 3e11, 2048: 4e11, 4096: 4e11, 8192: 5e11},
    bandwidth=2e10,
    token=1e-3,
    head=2e-4,
    step=0.04,
    row=1.5e-3,
    gradient=2.5e-3,
    check={"PROBE": {"forecast": 10.0, "measured": 8.0}},
)
PARAMETERS = {"135M": 134.5e6, "1B": 1.236e9, "8B": 8.03e9, "70B": 70.55e9}  # from the models' cards


@pytest.mark.parametrize(
    "path",
    [COSTS, *(FOLDER / name for name in ("methods.md", "runtimes.md", "architectures.md"))],
    ids=lambda p: p.name,
)
def test_a_page_is_what_would_be_made_now(path: Path) -> None:
    assert path.read_text() == make_pages()[path], f"{path} is stale: run `make docs`"


def test_a_changed_recipe_makes_a_page_stale() -> None:
    made = [load_recipe(name) for name in list_methods()]
    changed = [one.model_copy(update={"passes": one.passes + 1}) for one in made]
    assert make_costs(changed) != make_costs(made)
    assert make_methods_page(changed) != make_methods_page(made)
    assert make_runtimes_page(changed, RATES) != make_runtimes_page(made, RATES)
    assert make_runtimes_page(made, RATES.model_copy(update={"token": 2e-3})) != make_runtimes_page(made, RATES)


def test_every_architecture_is_in_its_table() -> None:
    page = make_architectures_page("")
    for name, family in ARCHITECTURES.items():
        row = next(line for line in page.splitlines() if line.startswith(f"| `{name}` |"))
        assert row.count("|") == page.splitlines()[3].count("|")
        assert ("recurrent states" in row) == family.recurrent
    assert all(f"| `{name}` | {why} |" in page for name, why in UNSUPPORTED.items())
    assert "`expert.out` [experts, in, out]" in next(x for x in page.splitlines() if x.startswith("| `gpt_oss`"))
    assert "`expert.out` [experts, out, in], `shared.out`" in page


def test_every_number_says_where_it_is_from() -> None:
    page = make_runtimes_page([load_recipe("basic")], RATES)
    for line in page.splitlines():
        if line.startswith("| ") and "FLOP/s" in line:
            assert line.count("measured") == len(SHAPES)
    rates = page.partition("## Rates")[2].partition("## Memory")[0]
    cells = [cell for line in rates.splitlines() if line.startswith("| ") for cell in line.split("|")[2:-1]]
    numbers = [cell for cell in cells if any(c.isdigit() for c in cell) and "(" not in cell]
    assert len(numbers) == 6 * len(SHAPES)
    assert all(("measured" in cell) != ("extrapolated from" in cell) for cell in numbers)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: s.name)
def test_the_sizes_are_those_of_the_models(shape: Shape) -> None:
    assert shape.weights / 4 == pytest.approx(PARAMETERS[shape.name], rel=2e-3)  # norms are left out


def test_at_the_measured_size_the_rates_are_the_measured_ones() -> None:
    found = extrapolate(RATES, MEASURED)
    assert found == pytest.approx({name: getattr(RATES, name) for name in found})


def test_other_sizes_follow_flops_and_bytes() -> None:
    """By hand, for the 8B: parameters over rate for products; bytes over bandwidth, and Python by layer, for steps."""
    large = next(s for s in SHAPES if s.name == "8B")
    found = extrapolate(RATES, large)
    assert found["token"] == pytest.approx(1e-3 * (6.98e9 / 4e11) / (106.2e6 / 3e11), rel=2e-3)
    assert found["row"] == pytest.approx(1.5e-3 * (7.505e9 / 4e11) / (134.5e6 / 3e11), rel=2e-3)
    assert found["step"] == pytest.approx(4 * 7.505e9 / 2e10 + (0.04 - 4 * 134.5e6 / 2e10) * 32 / 30, rel=2e-3)


def test_seconds_are_the_sum_of_the_formula() -> None:
    values = {"N_fit": 100, "N_report": 300, "N_texts": 16, "N_fit,target": 60, "N_fit,control": 40}
    values |= {"N_report,target": 100, "N_report,control": 200}
    probe = 100 * 20 * 1e-3
    screened = 100 * 20 * 1e-3 + 48 * (0.04 + 100 * 1.5e-3)
    once = 300 * 20 * 1e-3 + 48 * (2 * 0.04 + 300 * 1.5e-3)  # 300 rows are two batches
    read = 16 + 3 * (24 + 24) + 32  # paragraphs, answers for fluency and twice for relevance, and the base's own
    verify = 2 * (once + read * 50 * (1e-3 + 2e-4))
    found = forecast_seconds(total_cost(load_recipe("basic")), extrapolate(RATES, MEASURED), values, own=20, text=50)
    assert found == pytest.approx(probe + screened + verify)
    rdo = stage_costs(load_recipe("rdo", {"distill": [{"use": "mean_diff"}, {"use": "rdo"}]}))["DISTILL"]
    trained = 64 * 48 * (24 + 20 + 30) * 2.5e-3 + (14 * 48 + 40) * 20 * 1e-3  # 14 looks, own answers once
    answered = 140 * 20 * 1e-3 + 30 * (3 * 0.04 + 140 * 1.5e-3)  # target once, control twice
    assert forecast_seconds(rdo, extrapolate(RATES, MEASURED), values, own=20) == pytest.approx(trained + answered)


def test_times_are_told_in_units_for_people() -> None:
    told = [format_seconds(x) for x in (0.5, 45, 119, 121, 7199, 7201, 200_000, 1e7)]
    assert told == ["0.5 s", "45 s", "120 s", "2 min", "120 min", "2 h", "2.3 days", "120 days"]


def test_the_committed_rates_are_complete() -> None:
    rates = load_rates()
    assert {shape.width for shape in SHAPES} <= set(rates.gemm)
    assert rates.date
    assert rates.beside
    assert set(rates.check) == {"PROBE", "VERIFY"}
