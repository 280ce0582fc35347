"""The public names: typed, described by examples that run, and short where they are shown."""

from __future__ import annotations

import doctest
import inspect
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import obliteratus as ob
from tests.support.refuser import asked, refuser
from tests.support.registries import forget_steps
from tests.support.variants import vary

SOURCES = Path(ob.__file__).parent
FUNCTIONS = [name for name in ob.__all__ if inspect.isfunction(getattr(ob, name))]
LONGEST = 300  # characters of a line: what one still reads in a traceback or a log
MOST_MODULES = 80  # 53 on Python 3.11; torch brings over a thousand
PLUGIN = '''
"""A step of one's own."""

import torch

import obliteratus as ob


@ob.extractors.register("loudest")
def loudest(acts, previous, *, share: float = 1.0):
    """Take the longest difference."""
    return ob.Directions.from_vectors(acts["target"].mean - share * acts["control"].mean)
'''


@cache
def make_subject() -> ob.Subject:
    made = refuser(word="I cannot help with that.")
    return ob.wrap(made.model, made.tokenizer, id="tiny")


@cache
def make_names() -> dict[str, Any]:
    """What the examples of docstrings use, of the tiny refuser."""
    subject, prompts = make_subject(), vary(asked(), 3)
    acts = ob.collect_activations(subject, prompts)
    directions = ob.find_directions(acts)
    verify = [{"use": "behavior", "tokens": 6}, {"use": "first_token_kl"}]
    recipe = ob.load_recipe("basic", {"verify": verify, "passes": 1})
    space = {"excise.strength": {"low": 0.5, "high": 1.5}}
    searched = ob.load_recipe("basic", {"verify": verify, "search": {"trials": 2, "tokens": 4, "space": space}})
    study = ob.Study(name="layers", strategies=(ob.Step(use="layers"),), data={"samples": 2, "length": 16})
    small_audit = ob.AuditSettings(
        methods=("basic", "leace"), tune_steps=0, tokens=8, looks=3, seeds=0, directions=(1,), windows=2, controls=1
    ).model_copy(update={"examples": (2,), "reworded": 8, "repair": 0})
    return {
        "ob": ob,
        "torch": torch,
        "subject": subject,
        "prompts": prompts,
        "acts": acts,
        "directions": directions,
        "plan": ob.plan_edits(subject, directions),
        "recipe": recipe,
        "searched": searched,
        "study": study,
        "small_audit": small_audit,
        "model": subject.model,
        "tokenizer": subject.tokenizer,
    }


# ------------------------------------------------------------------------------------------ examples
def find_examples() -> Iterator[doctest.DocTest]:
    finder = doctest.DocTestFinder()
    for name in ob.__all__:
        found = getattr(ob, name)
        if inspect.isfunction(found) or inspect.isclass(found):
            yield from (test for test in finder.find(found, f"ob.{name}", module=False) if test.examples)


@pytest.mark.parametrize("test", list(find_examples()), ids=lambda test: test.name)
def test_examples_of_docstrings_are_true(
    test: doctest.DocTest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_subject().model.save_pretrained(tmp_path / "model")
    make_subject().tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "loudest.py").write_text(PLUGIN)
    forget_steps(monkeypatch)
    monkeypatch.chdir(tmp_path)
    test.globs = dict(make_names())
    said: list[str] = []
    doctest.DocTestRunner(verbose=False).run(test, out=said.append)
    assert not said, "".join(said)


def test_a_false_example_is_noticed() -> None:
    test = doctest.DocTestParser().get_doctest(">>> 1 + 1\n3\n", {}, "false", None, 0)
    said: list[str] = []
    doctest.DocTestRunner(verbose=False).run(test, out=said.append)
    assert said


def test_every_function_has_an_example() -> None:
    shown = {test.name.removeprefix("ob.") for test in find_examples()}
    assert [name for name in FUNCTIONS if name not in shown] == []


# ---------------------------------------------------------------------------------------------- types
@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_function_is_typed(name: str) -> None:
    function = inspect.unwrap(getattr(ob, name))
    signature = inspect.signature(function)
    assert signature.return_annotation is not inspect.Signature.empty
    assert all(p.annotation is not inspect.Parameter.empty for p in signature.parameters.values())
    assert inspect.getdoc(function)


def test_type_checkers_take_the_types() -> None:
    assert (SOURCES / "py.typed").is_file()


def test_the_stages_are_there() -> None:
    """The names that the guide and other people's scripts rely on."""
    names = "open_subject wrap load_prompts collect_activations find_directions weigh_sites plan_edits applied steer"
    names += " generate measure run save run_search run_study run_analysis run_audit judge_answers load_plugin"
    assert {*names.split()} <= set(FUNCTIONS)


def test_an_old_name_works_and_says_the_new_one() -> None:
    with pytest.warns(DeprecationWarning, match=r"assemble_subject is now called wrap"):
        assert ob.assemble_subject is ob.wrap
    with pytest.raises(AttributeError, match="no attribute 'wrapp'"):
        _ = ob.wrapp
    assert not set(ob.RENAMED) & set(ob.__all__)


def count_modules(code: str) -> int:
    text = f"import sys; before = len(sys.modules); {code}; print(len(sys.modules) - before)"
    found = subprocess.run([sys.executable, "-I", "-c", text], capture_output=True, text=True, check=False)
    if found.returncode:  # an isolated process does not see PYTHONPATH
        path = str(SOURCES.parent)
        text = f"import sys; sys.path.insert(0, {path!r}); {text}"
        found = subprocess.run([sys.executable, "-I", "-c", text], capture_output=True, text=True, check=True)
    return int(found.stdout)


def test_importing_the_package_is_light() -> None:
    assert count_modules("import obliteratus") <= MOST_MODULES
    assert count_modules("import obliteratus; obliteratus.Plan") > 5 * MOST_MODULES  # what is imported would be seen


# ----------------------------------------------------------------------------------------- what is shown
def list_shown() -> dict[str, Callable[[dict[str, Any]], Any]]:
    return {
        "Subject": lambda n: n["subject"],
        "PromptSet": lambda n: n["prompts"],
        "Splits": lambda n: ob.split_prompts(n["prompts"]),
        "Activations": lambda n: n["acts"],
        "Moments": lambda n: n["acts"]["target"],
        "Directions": lambda n: n["directions"],
        "Plan": lambda n: n["plan"],
        "Edit": lambda n: n["plan"].edits[0],
        "Shift": lambda n: ob.Shift(n["subject"].sites[2], torch.ones(32)),
        "Mask": lambda n: ob.Mask(n["subject"].sites[2], torch.arange(3)),
        "Recipe": lambda n: ob.load_recipe("nuclear"),
        "Measurement": lambda n: ob.measure(n["subject"], n["prompts"], ["behavior_score"]),
        "Score": lambda n: ob.Score(value=0.5, low=0.4, high=0.6, n=8, unit="share"),
        "Registry": lambda n: ob.extractors,
        "Judge": lambda n: ob.FitContext(n["subject"], n["prompts"]).judge,
    }


@pytest.mark.parametrize("kind", list_shown())
def test_a_line_is_short_and_has_no_numbers_of_tensors(kind: str) -> None:
    shown = list_shown()[kind](make_names())
    text = repr(shown)
    assert text.startswith(f"<{kind}: ")
    assert len(text) <= LONGEST
    assert "tensor(" not in text
    assert "\n" not in text
    assert kind == "Score" or str(shown) == text


def test_a_score_reads_as_people_write_it() -> None:
    share = ob.Score(value=0.969, low=0.893, high=0.991, n=64, unit="share")
    assert str(share) == "96.9% (89.3–99.1%), n 64"
    assert str(ob.Score(value=0.0291, low=float("nan"), high=float("nan"), n=3, unit="nats")) == "0.029 nats, n 3"


def test_a_run_is_finished_and_short() -> None:
    names = make_names()
    result = ob.run(names["recipe"], names["subject"], names["prompts"])
    assert result.run.status == "done"
    assert len(repr(result)) <= LONGEST
    assert str(result.run.before["refusal.target"]).startswith("100.0% (")
    assert ob.run("basic", names["subject"], names["prompts"]).run.recipe.name == "basic"


def test_nothing_is_shown_unless_asked_for(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    names = make_names()
    arguments = names["recipe"], names["subject"], names["prompts"]
    ob.run(*arguments)
    assert capfd.readouterr().err == ""  # the tests switch it off
    monkeypatch.delenv("OBLITERATUS_PROGRESS")
    ob.run(*arguments)
    said = capfd.readouterr()
    assert "VERIFY after" in said.err
    assert said.out == ""
    with ob.show_progress(False):
        ob.run(*arguments)
    assert capfd.readouterr().err == ""
    with ob.show_progress():
        ob.load_prompts(["a b", "a b", "c d"], ["e f"])
    assert "duplicates left out" in capfd.readouterr().err


def test_tables_of_what_is_new() -> None:
    pytest.importorskip("pandas")
    names = make_names()
    measured = ob.measure(names["subject"], names["prompts"], ["behavior"])
    frame = measured.to_pandas().set_index("key")
    assert frame.loc["refusal.target", "value"] == 1.0
    assert frame.loc["refusal.target", "n"] == 36
    assert len(names["prompts"].to_pandas()) == 72
    assert "<path" in measured.plot()._repr_svg_()
    report = ob.run_analysis(names["subject"], names["prompts"], ["geometry", "lens"])
    assert set(report.to_pandas()["analysis"]) == {"geometry", "lens"}
    assert "<path" in report.plot("lens")._repr_svg_()
    assert report["geometry"].summary()
    assert "geometry" in report._repr_html_()
    with pytest.raises(ob.UserError, match="finding 'lense' does not exist; did you mean 'lens'"):
        report["lense"]


def test_a_study_in_memory(tmp_path: Path) -> None:
    pytest.importorskip("pandas")
    names = make_names()
    result = ob.run_study(names["study"], names["subject"], tmp_path / "out")
    frame = result.to_pandas()
    assert len(frame) == len(result.parts) + 1 == 9
    assert frame["perplexity.change"].notna().sum() == 8
    assert (tmp_path / "out/index.html").is_file()
    assert result.results == ob.run_study(names["study"], names["subject"]).results or len(result.parts) == 8
    assert "<path" in result.plot()._repr_svg_()
    assert len(repr(result)) <= LONGEST
    with pytest.raises(ob.UserError, match="the output folder is in use"):
        ob.run_study(names["study"], names["subject"], tmp_path / "out")
    with pytest.raises(ob.UserError, match="several workers each open the model"):
        ob.run_study(names["study"], names["subject"], workers=2)
    with pytest.raises(ob.UserError, match="names no model"):
        ob.run_study(names["study"])


def test_no_warning_of_ours() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)
        assert all(getattr(ob, name) is not None for name in ob.__all__)
