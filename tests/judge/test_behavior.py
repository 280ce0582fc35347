"""Behavior files: the built-in ones judge their own labeled answers, and bad ones are told in one line."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from obliteratus.core.errors import UserError
from obliteratus.judge.behavior import Behavior, load_behavior
from obliteratus.judge.behavior_file import FOLDER, list_behaviors
from obliteratus.judge.compile import compile_language
from obliteratus.judge.judge import Judge
from obliteratus.prompts import load_prompts, split_prompts

NAMES = list_behaviors()
GREETING = 'about = "It greets."\n[en]\ngreet = "hello|hi"\nopening = ["<greet> there"]\n'


def behavior(folder: Path, text: str, name: str = "own", phrases: str = "") -> Behavior:
    file, more = folder / f"{name}.toml", folder / "more.toml"
    file.write_text(text)
    more.write_text(phrases)
    return load_behavior(str(file), str(more) if phrases else "")


@pytest.mark.parametrize("name", NAMES)
def test_labeled_answers_are_judged_right(name: str) -> None:
    judge = Judge(load_behavior(name))
    labeled = judge.behavior.head.labeled
    assert {one.shown for one in labeled} == {True, False}
    assert [one.answer for one in labeled if (judge.judge_answer(one.answer) == "shown") != one.shown] == []


@pytest.mark.parametrize("name", [name for name in NAMES if load_behavior(name).head.target])
def test_example_prompts_are_enough_for_all_three_splits(name: str) -> None:
    head = load_behavior(name).head
    splits = split_prompts(load_prompts(head.target, head.control), 0)
    assert all(len(part[group]) >= 15 for part in splits for group in ("target", "control"))


@pytest.mark.parametrize("name", NAMES)
def test_all_patterns_compile_and_none_matches_everything(name: str) -> None:
    """Built-in ones are compiled when they are first needed, so that nobody would notice for long."""
    for code, part in load_behavior(name).phrases.items():
        for phrases in part:
            compile_language(name, code, phrases.table, re.compile)


@pytest.mark.parametrize("name", NAMES)
def test_a_question_can_be_put_to_a_model(name: str) -> None:
    assert load_behavior(name).question.endswith("?")


def test_a_behavior_of_ones_own(tmp_path: Path) -> None:
    judge = Judge(behavior(tmp_path, GREETING))
    assert judge.name_score("behavior.target") == "own.target"
    assert judge.name_score("-behavior.keep") == "-own.keep"
    assert judge.name_score("kl.first_token.mean") == "kl.first_token.mean"
    assert judge.judge_answer("Hello there, friend of mine.") == "shown"
    assert judge.judge_answer("I can't help with that.") == "absent"


def test_like_another_with_words_of_its_own(tmp_path: Path) -> None:
    judge = Judge(behavior(tmp_path, 'about = "It refuses."\nlike = "refusal"\n[eo]\nwithin = ["mi ne povas"]\n'))
    assert judge.judge_answer("I can't help with that.") == "shown"
    more = Judge(behavior(tmp_path, 'about = "It refuses."\nlike = "refusal"\n[en]\nwithin = ["nothing doing"]\n'))
    for text in ("I can't help with that.", "Well, nothing doing here.", "Je ne peux pas vous aider."):
        assert more.judge_answer(text) == "shown"  # a language of its own adds to the one that is there
    assert judge.judge_answer("Bedaŭrinde mi ne povas helpi vin pri tio.") == "shown"
    assert judge.behavior.classifier == FOLDER / "refusal.npz"


def test_further_phrases_add_to_those_there_are(tmp_path: Path) -> None:
    more = '[en]\nopening = ["<greet> folks"]\n[eo]\nopening = ["saluton"]\n'
    judge = Judge(behavior(tmp_path, GREETING, phrases=more))
    for text in ("Hi there, you.", "Hi folks, welcome.", "Saluton, amikoj!"):
        assert judge.judge_answer(text) == "shown"
    assert Judge(behavior(tmp_path, GREETING)).judge_answer("Hi folks, welcome.") == "absent"  # negative control


@pytest.mark.parametrize(
    ("text", "shown", "absent"),
    [
        ("longer_than = 5\n", "one two three four five six", "one two three four five"),
        ('written = ["^- "]\n', "Two:\n- this", "Two - this"),
        ('[en]\nanywhere = ["delve"]\n', "One. Two. Three. Four. Five. We delve.", "We dig."),
    ],
)
def test_every_kind_of_sign(text: str, shown: str, absent: str, tmp_path: Path) -> None:
    judge = Judge(behavior(tmp_path, f'about = "x"\n{text}'))
    assert (judge.judge_answer(shown), judge.judge_answer(absent)) == ("shown", "absent")
    assert judge.is_shown(shown)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "the file is empty"),
        ('[en]\nopening = ["a b"]', "about: field required"),
        ("about = x", "not valid TOML"),
        ('about = "x"\nphrase = ["a"]', "phrase: extra inputs"),
        ('about = "x"\n[en]\n', "needs lists of patterns"),
        ('about = "x"\n[english]\nopening = ["a"]', "is no language"),
        ('about = "x"\n[eng]\nopening = ["a b"]', "is no language"),
        ('about = "x"\n[en]\nopening = []', "needs lists of patterns"),
        ('about = "x"\n[en]\na = "x<a>"\nopening = ["<a>"]', "a fragment names itself"),
        ('about = "x"\n[en]\na = "<b>"\nb = "<a>"\nopening = ["<a>"]', "a fragment names itself"),
        ('about = "x"\n[en]\nopening = ["<my-name> b"]', "names <my-name>"),
        ('about = "x"\n[en]\nletters = "["\nopening = ["a b"]', "invalid pattern"),
        ('about = "x"\n[en]\nopening = ["(a)\\\\1"]', "by number"),
        ('about = "x"\nlonger_than = true', "longer_than"),
        ('about = "x"\ntarget = 5', "target"),
        ('about = "x"\nlabeled = [{prompt = "p", answer = "a", shown = true}]', "shown = true and with shown = false"),
        ('about = "x"\n[en]\nopening = "a"', "must be a list"),
        ('about = "x"\n[en]\nopenings = ["a"]\nwithin = ["b c"]', "must be a string; the lists are opening"),
        ('about = "x"\n[en]\nopening = ["(a"]', "invalid pattern"),
        ('about = "x"\n[en]\nopening = ["<a> b"]', "names <a>"),
        ('about = "x"\n[en]\nwithin = [".*"]', "matches every answer"),
        ('about = "x"\n[en]\nwithin = ["[a-z]"]', "matches every answer"),
        ('about = "x"\n[ru]\nletters = "[а-я]"\nwithin = ["\\\\w"]', "matches every answer"),
        ('about = "x"\nwritten = ["."]', "matches every answer"),
        ('about = "x"\nwritten = ["["]', "invalid pattern"),
        ('about = "x"\nlonger_than = 0', "longer_than"),
        ('about = "x"\nname = "y"\n[en]\nopening = ["a b"]', "'name' cannot be set"),
        ('about = "x"\nlike = "refusl"', "did you mean 'refusal'"),
    ],
)
def test_a_bad_behavior_file_is_one_line(text: str, problem: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=problem) as raised:
        behavior(tmp_path, text)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ('[en]\nopening = ["I\'m afraid", "Don[\'’]t"]', "I’m AFRAID so."),
        ('[en]\nopening = ["I\'m afraid", "Don[\'’]?t"]', "Don't do it."),
        ('[ru]\nwithin = ["Привет"]', "ПРИВЕТ, как дела сегодня?!"),
        ('[el]\nanywhere = ["καλημέρα"]', "Καλημέρα σε όλους."),
        ('[en]\nwithin = ["(?P<word>well) (?P=word)", "\\\\Sx\\\\b"]', "Well well, it rains."),
        ('[fr]\nlast = "voilà"\nwithin = ["\\\\S<last>|<last>$"]', "Et voilà!"),
    ],
)
def test_patterns_are_written_as_the_language_is_spelled(text: str, answer: str, tmp_path: Path) -> None:
    judge = Judge(behavior(tmp_path, f'about = "x"\n{text}\n'))
    assert judge.judge_answer(answer) == "shown"
    assert judge.judge_answer("1, 2, 3") == "absent"


def test_a_file_with_a_mark_of_utf_8(tmp_path: Path) -> None:
    (tmp_path / "own.toml").write_bytes(b"\xef\xbb\xbf" + GREETING.encode())
    assert load_behavior(str(tmp_path / "own.toml")).name == "own"


@pytest.mark.parametrize("name", ["x" * 300, "x" * 300 + ".toml", "a\0b.toml", "."])
def test_names_that_no_file_can_have(name: str) -> None:
    with pytest.raises(UserError, match="there is no") as raised:
        load_behavior(name)
    assert len(str(raised.value)) < 250


@pytest.mark.parametrize(
    ("phrases", "problem"),
    [
        ("opening = []", r"\[opening\] is no language"),
        ('[en]\ngreet = "hey"\nopening = ["<greet>"]', "greet is a fragment of the behavior already"),
        ('[en]\nwithin = [".+"]', "matches every answer"),
    ],
)
def test_bad_phrases_are_one_line(phrases: str, problem: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=problem) as raised:
        behavior(tmp_path, GREETING, phrases=phrases)
    assert "\n" not in str(raised.value)


def test_phrases_that_are_missing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no such file of phrases"):
        load_behavior("refusal", str(tmp_path / "more.toml"))
    (tmp_path / "more.toml").write_text("# nothing yet\n")
    with pytest.raises(UserError, match="the file has no phrases"):
        load_behavior("refusal", str(tmp_path / "more.toml"))


def test_a_pattern_that_backtracks_without_end_is_ended(tmp_path: Path) -> None:
    judge = Judge(behavior(tmp_path, 'about = "x"\n[en]\nwithin = ["(?:a|aa)+\\\\b[xyz]"]\n'))
    assert judge.judge_answer("It is aa-x.") == "absent"
    with pytest.raises(UserError, match=r"a pattern takes more than 0\.5 s") as raised:
        judge.judge_answer("a" * 60 + " c")
    assert "\n" not in str(raised.value)


def test_names_that_will_not_do(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no behavior 'refusl'; give one of apology, disclaimer"):
        load_behavior("refusl")
    for name in ("kl", "degenerate", "My Behavior", "x.target"):
        with pytest.raises(UserError, match="scores are called after the behavior"):
            behavior(tmp_path, GREETING, name)
