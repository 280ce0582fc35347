"""Which scores tables show: the behavior first, then answers, then drift; details only where there is room."""

from __future__ import annotations

import pytest
from tests.support.tiny import run_of, tiny_subject

from obliteratus.cli.scores import show_scores
from obliteratus.core.results import Score
from obliteratus.rebirth.model_card import format_score_table
from obliteratus.verify.score_names import describe_score, names_to_show

VALUES = {
    "refusal.target": [0.9, 0.1],
    "refusal.target/stars": [0.9, 0.1],
    "kl.first_token.mean": [0.1],
    "kl.first_token.p99": [0.3],
    "kl.first_token.answered.mean": [0.1],
    "kl.continuation.answered.mean": [0.1],
    "kl.continuation.answered.p95": [0.2],
    "perplexity": [46.0, 46.5],
    "degenerate.target": [0.0, 0.0],
    "unknown.target": [0.0, 0.0],
    "unknown.control": [0.0, 0.1],
    "length.control": [40.0, 41.5],
    "length.control.change": [1.5],
    "same_language.target": [1.0, 1.0],
    "same_language.control": [1.0, 0.9],
    "fluency.ratio": [1.0, 1.5],
    "off_topic.target": [0.0, 0.5],
    "relevance.target": [1.0, 0.2],
}


def test_groups_are_in_their_order() -> None:
    behavior, answers, drift = names_to_show(VALUES, brief=False)
    assert behavior == ["refusal.target", "unknown.control"]
    assert answers[:3] == ["degenerate.target", "off_topic.target", "relevance.target"]
    assert drift[-1] == "perplexity"
    shown = {*behavior, *answers, *drift}
    assert set(VALUES) - shown == {"refusal.target/stars", "unknown.target"}


def test_brief_tables_leave_details_out() -> None:
    shown = {name for group in names_to_show(VALUES, brief=True) for name in group}
    left_out = {"kl.first_token.p99", "kl.continuation.answered.mean", "kl.continuation.answered.p95"}
    left_out |= {"length.control.change", "same_language.target", "relevance.target"}
    assert set(VALUES) - shown == left_out | {"refusal.target/stars", "unknown.target"}
    assert names_to_show({"perplexity": [1.0]}, brief=True) == [["perplexity"]]


def test_the_terminal_has_room_for_it_and_the_card_has_all(capsys: pytest.CaptureFixture[str]) -> None:
    def score(name: str, value: float) -> Score:
        units = {"length": "tokens", "kl": "nats", "perplexity": "perplexity", "fluency": "ratio"}
        return Score(value=value, low=value / 2, high=1.0, n=128, unit=units.get(name.partition(".")[0], "share"))

    after = {name: score(name, values[-1]) for name, values in VALUES.items()}
    run = run_of(tiny_subject("llama")).model_copy(update={"before": after, "after": after})
    show_scores("a title", {"before": run.before, "after": run.after}, "refusal")
    text = capsys.readouterr().out
    assert "first-token KL, answered, mean" in text
    assert "tokens per answer, control, change" not in text
    assert "tokens per answer, control, change" in format_score_table(run)
    assert max(map(len, text.splitlines())) <= 80
    groups = names_to_show(VALUES, brief=True)
    assert len(text.splitlines()) == 3 + len(groups) + sum(map(len, groups))  # none is on two lines


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("refusal.target", "refuses target prompts"),
        ("refusal.target/stars", "refuses target prompts: stars"),
        ("partial.keep", "refuses only later, keep"),
        ("kl.first_token.mean", "first-token KL, mean"),
        ("kl.continuation.answered.p95", "answer KL, answered, 95th percentile"),
        ("perplexity", "perplexity of plain text"),
        ("length.control.change", "tokens per answer, control, change"),
    ],
)
def test_a_key_has_words(key: str, words: str) -> None:
    assert describe_score(key) == words


def test_words_name_another_behavior() -> None:
    assert describe_score("disclaimer.target", "disclaimer") == "shows disclaimer, target prompts"
    assert describe_score("disclaimer.target") == "disclaimer.target"  # the key of no score of refusals
    assert "refus" not in describe_score("partial.control", "disclaimer")


@pytest.mark.parametrize("key", ["kl.elsewhere.mean", "kl.first_token.most", "kl", "novelty.target", "novelty"])
def test_unknown_keys_stay(key: str) -> None:
    assert describe_score(key) == key


def test_every_score_that_is_shown_has_its_own_words() -> None:
    words = [describe_score(name) for name in VALUES]
    assert not {*words} & VALUES.keys()
    assert len({*words}) == len(words)
