"""The page of a run: made from its folder alone, whole, self-contained, small, and without anything private."""

from __future__ import annotations

import json
import re
from pathlib import Path
from shutil import copytree

import pytest
from tests.support.pages import ParsedPage
from tests.support.tiny import tiny, tiny_tokenizer
from typer.testing import CliRunner

from obliteratus.cli.app import app
from obliteratus.core.errors import UserError
from obliteratus.rebirth.edited_blocks import describe_blocks
from obliteratus.rebirth.run_page import render_run_page, write_run_page

TARGET = [
    f"Tell me about the {c} {t}." for c in ("red", "blue", "old", "tall") for t in ("house", "boat", "hill", "sea")
]
CONTROL = [f"How do I count to {n}, slowly?" for n in range(16)]
MAX_BYTES = 3_000_000  # of a page with 1 000 answers


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output folder of a run on a tiny model, with a plan that edits heads."""
    place = tmp_path_factory.mktemp("page")
    tiny("llama").save_pretrained(place / "tiny")
    tiny_tokenizer().save_pretrained(place / "tiny")
    for name, prompts in (("target", TARGET), ("control", CONTROL)):
        (place / f"{name}.txt").write_text("\n".join(prompts))
    options = ["--method", "lean", "--save", "plan", "--quiet", "--force", "--out", str(place / "out")]
    sources = ["--target", str(place / "target.txt"), "--control", str(place / "control.txt")]
    result = CliRunner().invoke(app, ["run", str(place / "tiny"), *sources, *options])
    assert result.exit_code == 0, result.output
    assert "index.html" in result.stdout
    return place / "out"


def lines_of(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_answer_and_prompt_is_on_it(folder: Path) -> None:
    page = ParsedPage((folder / "index.html").read_text())
    lines = lines_of(folder / "answers.jsonl")
    assert page.tags.count("article") == len(lines) > 0
    for line in lines:
        assert str(line["prompt"]) in page.text


def test_it_says_where_how_and_with_what(folder: Path) -> None:
    page = ParsedPage((folder / "index.html").read_text())
    record = json.loads((folder / "run.json").read_text())
    for file, known in record["saved"]["files"].items():
        assert file in page.text
        assert known["sha256"] in page.text
    assert {"changed", "answers", "first-tokens", "edited", "times", "reproduce", "files"} <= set(page.ids)
    assert "decisions" not in page.ids  # this method decides nothing
    assert "obliteratus run" in page.text
    assert 'use = "knee_cosmic"' in page.text  # the recipe


def test_both_kinds_of_answers_stand_where_something_was_to_be_kept(folder: Path, tmp_path: Path) -> None:
    """The same run as if its prompts had been refused before, and some of them rightly."""
    again = Path(copytree(folder, tmp_path / "again"))
    record = json.loads((again / "run.json").read_text())
    share = {"value": 0.5, "low": 0.1, "high": 0.9, "n": 2, "unit": "share"}
    record["after"] |= {"ended.target": share, "ended.target/boats": share, "kept.keep": share}
    (again / "run.json").write_text(json.dumps(record))
    refused, answered = (
        {"answer": text, "verdict": v, "rungs": {}} for text, v in (("No.", "shown"), ("It is.", "absent"))
    )
    added = [
        {"prompt": f"{group} prompt", "group": group, "category": "", "before": refused, "after": answered}
        for group in ("target", "keep")
    ]
    with (again / "answers.jsonl").open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in added)
    text = render_run_page(again)
    section = text[text.index('id="both-kinds"') :].split("</section>")[0]
    assert all(words in section for words in ("Where it should end", "Where it should stay", "target: boats"))
    assert "target prompt" in section
    assert "keep prompt" in section
    assert "both-kinds" not in (folder / "index.html").read_text()


def test_first_tokens_are_listed_worst_first(folder: Path) -> None:
    found = [line["kl"] for line in lines_of(folder / "first_tokens.jsonl")]
    text = (folder / "index.html").read_text()
    table = text[text.index('id="first-tokens"') :].split("</table>")[0]
    shown = [float(x) for x in re.findall(r"<tr><td>(\d+\.\d+)</td>", table)]
    assert shown == sorted((round(float(str(kl)), 3) for kl in found), reverse=True)[: len(shown)]
    assert len(shown) > 1


def test_nothing_private_and_nothing_from_elsewhere(folder: Path) -> None:
    text = (folder / "index.html").read_text()
    page = ParsedPage(text)
    assert str(folder.parent) not in text
    assert "/tmp" not in text
    assert all(where.startswith("#") for where in page.addresses)
    assert not {"link", "iframe", "object", "embed", "base"} & set(page.tags)
    assert "url(" not in text
    assert "@import" not in text


def test_it_is_made_again_from_the_folder_alone(folder: Path, tmp_path: Path) -> None:
    assert render_run_page(folder) == (folder / "index.html").read_text()
    with pytest.raises(UserError, match=r"there is no run\.json"):
        write_run_page(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_thousand_answers_stay_small(folder: Path, tmp_path: Path) -> None:
    few = lines_of(folder / "answers.jsonl")
    for name in ("run.json", "plan.json", "plan.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    answer = "A sentence of a usual length stands here, and then another. " * 4
    said = {"answer": answer, "verdict": "absent", "rungs": {"phrases": "absent", "classifier": "shown"}}
    line = few[0] | {
        "prompt": "A prompt of some eighty letters, as those of most files of prompts are, it seems.",
        "before": said,
        "after": said,
    }
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for _ in range(1000)))
    assert len(render_run_page(tmp_path).encode()) <= MAX_BYTES


def test_answers_are_escaped(folder: Path, tmp_path: Path) -> None:
    for name in ("run.json", "plan.json", "plan.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    line = lines_of(folder / "answers.jsonl")[0]
    said = {"answer": "<img src=x onerror=alert(1)>", "verdict": "absent", "rungs": {}}
    (tmp_path / "answers.jsonl").write_text(json.dumps(line | {"prompt": "<b>?", "before": said, "after": said}) + "\n")
    page = ParsedPage(render_run_page(tmp_path))
    assert "img" not in page.tags
    assert said["answer"] in page.text


def test_blocks_of_the_plan(folder: Path) -> None:
    from obliteratus.excise.plan import load_plan

    plan = load_plan(folder)
    found = describe_blocks(plan, 9)
    assert found["numbers"] == list(range(9))
    assert {(part, n) for part, cells in found["parts"].items() for n in cells} == {
        ({"attn.out": "attention", "mlp.out": "MLP"}[e.site.part], e.site.layer) for e in plan.edits
    }
    assert not found["amplifies"]


def test_report_writes_it_again(folder: Path) -> None:
    page = folder / "index.html"
    text = page.read_text()
    page.unlink()
    result = CliRunner().invoke(app, ["report", str(folder)])
    assert result.exit_code == 0, result.output
    assert page.read_text() == text
    refused = CliRunner().invoke(app, ["report", str(folder), "--out", "x"])
    assert refused.exit_code == 2
    assert "the page of a run belongs to its folder" in refused.stderr
