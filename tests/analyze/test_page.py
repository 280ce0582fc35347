"""The page of findings: complete, alone, escaped, and the same each time."""

from __future__ import annotations

import base64
import re
from dataclasses import dataclass
from html.parser import HTMLParser
from typing import Any

import pytest
import torch
from tests.support.contexts import context_of_activations, prompts_of_categories, tiny_llama
from tests.support.planted import planted

from obliteratus.analyze import AnalysisContext, Finding, analyze
from obliteratus.analyze.page import page, shown, tables
from obliteratus.core.settings import Step
from obliteratus.core.types import Directions

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
    basis = torch.eye(tiny_llama().width)[: tiny_llama().n_layers + 1, None].contiguous()
    score = torch.ones(len(basis))
    writes = AnalysisContext(
        acts, Directions(basis, score, score, ""), context.subject, context.prompts, context.held_out
    )
    return {**found, **analyze(writes, [Step(use="footprint", draws=19)])}


class Seen(HTMLParser):
    """Tags, and all that a browser would fetch or follow."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.goes: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        given = {k: v or "" for k, v in attrs}
        self.ids += [given["id"]] if "id" in given else []
        self.goes += [given[k] for k in ("src", "href", "srcset", "action", "data") if k in given]

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_every_finding_has_its_section(findings: dict[str, Finding]) -> None:
    text = page(findings, "The organism")
    seen, words = Seen(text), " ".join(Seen(text).words)
    assert seen.tags.count("section") == seen.tags.count("img") == len(findings)
    assert "The organism" in words
    for name, finding in findings.items():
        assert f"#finding-{name}" in seen.goes
        assert f"finding-{name}" in seen.ids
        assert words.count(finding.summary()) == 2  # in the table of contents, and in the section


def test_it_needs_nothing_beside_it(findings: dict[str, Finding]) -> None:
    text = page(findings, "x")
    seen = Seen(text)
    assert all(where.startswith(("#", "data:image/svg+xml;base64,")) for where in seen.goes)
    assert not {"script", "link", "iframe", "object", "embed", "base"} & set(seen.tags)
    assert "url(" not in text
    assert "@import" not in text
    for where in seen.goes:
        if where.startswith("data:"):
            svg = base64.b64decode(where.partition(",")[2]).decode()
            assert all(h.startswith(("#", "data:")) for h in re.findall(r'href="([^"]*)"', svg))
            assert all(u.startswith("#") for u in re.findall(r"url\(([^)]*)\)", svg))


def test_words_are_escaped() -> None:
    rude = Rude()
    text = page({rude.word: rude}, rude.word)
    assert "<script" not in text
    seen = Seen(text)
    assert "script" not in seen.tags
    assert rude.word in " ".join(seen.words)
    assert all(re.fullmatch(r"[A-Za-z0-9-]+", i) for i in seen.ids)


def test_the_same_findings_give_the_same_page(findings: dict[str, Finding]) -> None:
    assert page(findings, "x") == page(findings, "x")


def test_lists_of_one_length_stand_side_by_side() -> None:
    score = {"value": 0.5, "low": 0.25, "high": 0.75, "n": 8, "unit": "AUC"}
    text = tables(
        {"auc": [score, score, score], "p": [0.1, 0.2, -0.3], "found": [1], "deep": {"n": 7}, "m": [[1], [2]]}
    )
    rows = re.findall(r"<tr>(.*?)</tr>", text)
    assert "<td>0.5 [0.25, 0.75], n = 8</td><td>0.1</td>" in rows[rows.index(next(r for r in rows if "index" in r)) + 1]
    assert "<td>deep: n</td><td>7</td>" in rows
    assert "<td>found</td><td>1</td>" in rows
    assert "<td>m</td><td>2 lists, in the JSON</td>" in rows


def test_shown() -> None:
    assert [shown(x) for x in (True, None, -0.123456, [], "s", 3)] == ["yes", "–", "−0.1235", "none", "s", "3"]


def test_an_empty_page_is_a_page() -> None:
    assert "<h1>none</h1>" in page({}, "none")
