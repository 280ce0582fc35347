"""The page of findings: complete, alone, escaped, and the same each time."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import pytest
from tests.support.contexts import (
    context_of_activations,
    context_of_model,
    prompts_of_categories,
    stars_and_dishes,
    tiny_llama,
)
from tests.support.pages import ParsedPage, check_self_contained
from tests.support.planted import planted

from obliteratus.analyze import Finding, analyze
from obliteratus.analyze.page import findings_page, format_value, number_tables
from obliteratus.core.settings import Step

NAMES = ("geometry", "cones", "separability", "uncertainty", "certificate", "fingerprint")


@dataclass(frozen=True)
class Rude:
    """A finding whose words are HTML."""

    word: str = "<script>alert('x')</script> & \"more\""

    def to_dict(self) -> dict[str, Any]:
        return {self.word: self.word, "list": [self.word]}

    def summary(self) -> str:
        return self.word

    def draw(self, figure: Any) -> None:
        figure.add_subplot(xlabel="x", ylabel=self.word)


@pytest.fixture(scope="module")
def findings() -> dict[str, Finding]:
    """Of every analysis that takes rows, and of one that takes weights."""
    acts, _ = planted(n=40)
    context = context_of_activations(acts, prompts=prompts_of_categories(*("ab" * 20)))
    found = analyze(context, [Step(use=name, draws=19) for name in NAMES])
    writes = context_of_model(tiny_llama(), stars_and_dishes(6))
    return {**found, **analyze(writes, [Step(use="footprint", draws=19)])}


@pytest.fixture(scope="module")
def page(findings: dict[str, Finding]) -> str:
    return findings_page(findings, "The organism")


def test_every_finding_has_its_section(findings: dict[str, Finding], page: str) -> None:
    seen, words = ParsedPage(page), ParsedPage(page).text
    assert seen.tags.count("section") == seen.tags.count("img") == len(findings)
    assert "The organism" in words
    for name, finding in findings.items():
        assert f"#finding-{name}" in seen.addresses
        assert f"finding-{name}" in seen.ids
        assert words.count(finding.summary()) == 2  # in the table of contents, and in the section


def test_it_needs_nothing_beside_it(page: str) -> None:
    check_self_contained(page)


def test_words_are_escaped() -> None:
    rude = Rude()
    text = findings_page({rude.word: rude}, rude.word)
    assert "<script" not in text
    seen = ParsedPage(text)
    assert "script" not in seen.tags
    assert rude.word in seen.text
    assert all(re.fullmatch(r"[A-Za-z0-9-]+", i) for i in seen.ids)


def test_the_same_findings_give_the_same_page(findings: dict[str, Finding], page: str) -> None:
    assert findings_page(findings, "The organism") == page


def test_lists_of_one_length_stand_side_by_side() -> None:
    score = {"value": 0.5, "low": 0.25, "high": 0.75, "n": 8, "unit": "AUC"}
    single, lists = number_tables(
        {"auc": [score, score, score], "p": [0.1, 0.2, -0.3], "found": [1], "deep": {"n": 7}, "m": [[1], [2]]}
    )
    assert single == (["", "value"], [["found", "1"], ["deep: n", "7"], ["m", "2 lists, in the JSON"]])
    assert lists[0] == ["index", "auc", "p"]
    assert lists[1][0] == ["0", "0.5 [0.25, 0.75], n = 8", "0.1"]
    assert [row[2] for row in lists[1]] == ["0.1", "0.2", "−0.3"]


def test_shown() -> None:
    assert [format_value(x) for x in (True, None, -0.123456, [], "s", 3)] == ["yes", "–", "−0.1235", "none", "s", "3"]


def test_an_empty_page_is_a_page() -> None:
    assert "<h1>none</h1>" in findings_page({}, "none")
