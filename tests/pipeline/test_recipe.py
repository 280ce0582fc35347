"""Recipes are data: all shipped ones are valid, each is its own text again, and mistakes get one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from obliteratus.core.errors import UserError
from obliteratus.core.settings import Recipe
from obliteratus.core.toml import dump_toml, parse_overrides
from obliteratus.distill.steps import collect_needs
from obliteratus.pipeline.presets import list_methods
from obliteratus.pipeline.recipe import check_runs, load_recipe, parse_recipe

BASE = """
about = "a recipe for these tests"
[[distill]]
use = "mean_diff"
[[weigh]]
use = "skip_first"
[excise]
strength = 1.0
"""


@pytest.fixture
def base(tmp_path: Path) -> Path:
    (tmp_path / "base.toml").write_text(BASE)
    return tmp_path / "base.toml"


@pytest.mark.parametrize("name", list_methods())
def test_shipped_methods_parse(name: str) -> None:
    made = load_recipe(name)
    assert made.name == name
    assert made.about
    assert made.cite


def test_the_methods_are_there() -> None:
    """The audit's twelve, the original's thirteenth, and two for the other direction; every step is registered,
    or `load_recipe` would refuse it."""
    audit = "basic advanced aggressive informed surgical inverted optimized nuclear failspy gabliteration heretic rdo"
    assert set(list_methods()) >= {*audit.split(), "spectral_cascade", "calibrated", "reinforce"}


@pytest.mark.parametrize("name", list_methods())
def test_a_dump_reads_back(name: str, tmp_path: Path) -> None:
    made = load_recipe(name)
    (tmp_path / "copy.toml").write_text(dump_toml(made))
    assert load_recipe(tmp_path / "copy.toml") == made


def test_a_dump_reads_back_with_everything_changed(tmp_path: Path) -> None:
    data: dict[str, Any] = {
        "name": "mine",
        "about": 'quotes " and \\ and \u661f and\ttabs',
        "cite": ["a", "b"],
        "seed": 7,
        "passes": 1,  # a search allows no other
        "probe": {"position": -5, "keep": "moments"},
        "distill": [{"use": "mean_diff"}, {"use": "single", "depth": 0.5}],
        "weigh": [{"use": "middle", "low": 0.1}, {"use": "by_score"}],
        "excise": {"parts": ["embed", "mlp.out"], "strength": -1e-7, "norm": "rows", "anchored": True},
        "verify": [{"use": "behavior", "tokens": 8}],
        "analyze": [{"use": "cones", "resamples": 100}],
        "search": {
            "trials": 7,
            "sampler": "gp",
            "minimize": ["refusal.target"],
            "space": {
                "weigh.0.low": {"low": 1e-3, "high": 0.5, "log": True},
                "distill": {"choices": [[{"use": "mean_diff"}], [{"use": "union", "other": {"use": "svd", "k": 2}}]]},
                "excise.strength": {"low": -1.0, "high": 1.0},
                "excise.anchored": {"choices": [True, False]},
            },
        },
    }
    made = parse_recipe(data, "here")
    (tmp_path / "copy.toml").write_text(dump_toml(made))
    assert load_recipe(tmp_path / "copy.toml") == made
    assert Recipe.model_validate_json(made.model_dump_json()) == made


# ---------------------------------------------------------------------------------------------- search
BAD_SPACES: dict[str, tuple[dict[str, Any], str]] = {
    "empty": ({}, r"search\.space: dictionary should have at least 1 item"),
    "no such entry": ({"weigh.3.n": {"low": 0, "high": 2}}, r"search\.space 'weigh\.3\.n': .*no entry '3'"),
    "no such option": (
        {"weigh.0.m": {"low": 0, "high": 2}},
        r"search\.space 'weigh\.0\.m': .*key 'm' does not exist; known: n",
    ),
    "no such field": (
        {"excise.strenght": {"low": 0, "high": 2}},
        r"'excise\.strenght': .*did you mean 'excise\.strength'",
    ),
    "beyond its range": ({"excise.strength": {"low": 0, "high": 9}}, r"'excise\.strength': .*less than or equal to 4"),
    "no such choice": ({"excise.norm": {"choices": ["none", "column"]}}, r"'excise\.norm': .*\(got 'column'\)"),
    "no such step": ({"weigh.0.use": {"choices": ["al"]}}, r"'weigh\.0\.use': weigh step 'al' does not exist"),
    "contradictory": ({"excise.strength": {"low": 1, "high": 1}}, r"low below high \(got low 1, high 1\)"),
    "half": ({"excise.strength": {"low": 1}}, r"low below high \(got low 1, high None\)"),
    "both kinds": ({"excise.strength": {"low": 1, "high": 2, "choices": [3]}}, "or choices, not both"),
    "log of nothing": ({"excise.strength": {"low": 0, "high": 2, "log": True}}, r"log needs low above 0 \(got 0\)"),
}


@pytest.mark.parametrize("case", BAD_SPACES)
def test_a_space_that_cannot_work_is_refused(case: str, base: Path) -> None:
    space, message = BAD_SPACES[case]
    with pytest.raises(UserError, match=message) as caught:
        load_recipe(base, {"search": {"trials": 5, "space": space}})
    assert "\n" not in str(caught.value)


def test_a_space_keeps_whole_numbers_whole(base: Path) -> None:
    space = {"weigh.0.n": {"low": 0, "high": 4}, "excise.strength": {"low": 0.5, "high": 1}}
    made = load_recipe(base, {"search": {"trials": 5, "space": space}})
    assert made.search is not None
    whole, real = made.search.space["weigh.0.n"], made.search.space["excise.strength"]
    assert [type(x) for x in whole.ends] == [int, int]
    assert (type(real.low), real.ends) == (float, (0.5, 1))


def test_heretic_has_its_published_space() -> None:
    """As Heretic 1.4's --help and the journal of a study of its own give it."""
    made = load_recipe("heretic")
    assert made.search is not None
    assert (made.search.startup_trials, made.search.candidates, made.search.kl_target) == (60, 128, 0.01)
    for choice in made.search.space["distill"].choices:
        assert [step["use"] for step in choice][:2] == ["mean_diff", "orthogonal_to_control"]
    assert made.excise.norm == "unit_rows_rank_3"
    assert (made.search.trials, made.search.sampler, len(made.search.space)) == (200, "tpe", 10)
    assert made.search.space["distill.2.at"].ends == (0.4, 0.9)
    for step, part in enumerate(("attn.out", "mlp.out")):
        assert (made.weigh[step].use, made.weigh[step].options["part"]) == ("tent", part)
        ends = [made.search.space[f"weigh.{step}.{x}"].ends for x in ("max_weight", "peak", "min_weight", "reach")]
        assert ends == [(0.8, 1.5), (0.6, 1.0), (0.0, 1.0), (0.03, 0.6)]
        starts = [made.weigh[step].options[x] for x in ("max_weight", "peak", "min_weight", "reach")]
        assert all(low <= start <= high for (low, high), start in zip(ends, starts, strict=True))


# ---------------------------------------------------------------------------------------- what can run
@pytest.mark.parametrize("name", list_methods())
def test_every_method_runs_with_the_groups_that_it_needs(name: str) -> None:
    recipe = load_recipe(name)
    bypass = {"bypass"} & collect_needs(recipe.distill)
    check_runs(recipe, ["target", "control", "keep", *bypass, *recipe.needs])
    for group in recipe.needs:
        with pytest.raises(UserError, match=f"--{group}"):
            check_runs(recipe, {"target", "control", "keep", *bypass} - {group})
    if not bypass:
        with pytest.raises(UserError, match=r"no step of .* uses bypass prompts"):
            check_runs(recipe, ["target", "control", "keep", "bypass", *recipe.needs])


def test_analyses_are_checked_before_weights_are_loaded() -> None:
    with pytest.raises(UserError, match=r"analysis 'cones' needs every prompt.s activations; set probe\.keep"):
        check_runs(
            load_recipe("informed", {"probe.keep": "moments", "distill": [{"use": "mean_diff"}]}), ["target", "control"]
        )
    with pytest.raises(UserError, match="analyze step 'cone' does not exist; did you mean 'cones'"):
        load_recipe("informed", {"analyze.0.use": "cone"})
    with pytest.raises(UserError, match="analyze step 'reach': depths"):
        load_recipe("informed", {"analyze.1.depths": 0})


def test_a_search_result_runs() -> None:
    """The same recipe without its search: what a search will give."""
    check_runs(load_recipe("heretic").model_copy(update={"search": None}), ["target", "control"])


# ------------------------------------------------------------------------------------------- overrides
def test_overrides_replace_by_path(base: Path) -> None:
    pairs = [
        "excise.strength=0.7",
        "excise.parts=['mlp.out']",
        "weigh.0.n=3",
        "distill.0={use = 'svd', k = 2}",
        "probe.keep=rows",
        "passes=2",
        "excise.anchored=true",
    ]
    made = load_recipe(base, parse_overrides(pairs))
    assert (made.excise.strength, made.excise.parts, made.excise.anchored) == (0.7, ("mlp.out",), True)
    assert made.weigh[0].options == {"n": 3}
    assert (made.distill[0].use, made.distill[0].options) == ("svd", {"k": 2})
    assert (made.probe.keep, made.passes) == ("rows", 2)
    assert load_recipe(base).excise.strength == 1.0  # the file stays as it is


BAD_OVERRIDES = {
    "excise.strength": "give path=value",
    "=3": "give path=value",
    "excise.strength=9": r"excise\.strength: input should be less than or equal to 4 \(got 9\)",
    "excise.strength=high": "excise.strength: input should be a valid number",
    "excise.norm=colums": r"excise\.norm: input should be 'none', 'columns', 'rows', 'unit_rows', "
    r"'unit_rows_rank_3' or 'whole' \(got 'colums'\)",
    "excise.strenght=1": r"key 'excise\.strenght' does not exist; did you mean 'excise\.strength'",
    "passes=0": "passes: input should be greater than or equal to 1",
    "passes=9": "passes: input should be less than or equal to 8",
    "probe.position=1": "probe.position: input should be less than or equal to -1",
    "probe.position=-65": "probe.position: input should be greater than or equal to -64",
    "weigh.1.n=3": "there is no entry '1'; the entries are 0 to 0",
    "weigh.x.n=3": "there is no entry 'x'",
    "about.x=1": "'about' is a single value and has no keys",
    "weigh.0.n=-1": "weigh step 'skip_first': n: input should be greater",
    "weigh.0.m=1": "weigh step 'skip_first': key 'm' does not exist; known: n",
    "distill.0.use=mean_dif": "distill step 'mean_dif' does not exist; did you mean 'mean_diff'",
    "weigh.0.use=nee": "weigh step 'nee' does not exist; did you mean 'knee'",
    "verify=[{use='behaviors'}]": "verify step 'behaviors' does not exist; did you mean 'behavior'",
    "verify=[{use='behavior', tokens=1}]": "verify step 'behavior': tokens: input should be greater",
    "distill=[]": "distill",
    # Keys that were renamed name the new one.
    "enough=0.1": "'enough' is now called 'stop_below'",
    "search={trials=1, worth=1.0, space={'excise.strength'={low=0.0, high=1.0}}}": "now called 'max_remaining'",
    "search={trials=1, minimise=['x'], space={'excise.strength'={low=0.0, high=1.0}}}": "is now called 'minimize'",
    "tune={leads=[1.0]}": "'leads' is now called 'margin'",
}


@pytest.mark.parametrize("pair", BAD_OVERRIDES)
def test_bad_overrides_say_why(pair: str, base: Path) -> None:
    with pytest.raises(UserError, match=BAD_OVERRIDES[pair]) as caught:
        load_recipe(base, parse_overrides([pair]))
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------------ files
def test_an_unknown_method_is_told_the_near_one() -> None:
    with pytest.raises(UserError, match="method 'advance' does not exist; did you mean 'advanced'"):
        load_recipe("advance")
    with pytest.raises(UserError, match=r"method 'zzz' does not exist; known: .*basic"):
        load_recipe("zzz")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"about = ", r"bad\.toml: this is not valid TOML"),
        (b"\xff\xfe", r"bad\.toml: this is not valid TOML"),
        (b"about = 'x'", "distill: field required"),
        (b"distill = [{use = 'mean_diff'}]", "about: field required"),
        (b"about = 'x'\ndistill = [{k = 3}]", r"distill\.0\.use: field required"),
        (b"about = 'x'\nfoo = 1\ndistill = [{use = 'mean_diff'}]", "key 'foo' does not exist; known: about"),
    ],
)
def test_bad_files(text: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_bytes(text)
    with pytest.raises(UserError, match=message):
        load_recipe(tmp_path / "bad.toml")


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="this recipe file does not exist"):
        load_recipe(tmp_path / "none.toml")
