"""The rungs beside the phrases: a model that is asked, a sequence classifier, and which of them may decide."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.judge_server import JudgeServer
from tests.support.notes import Notes
from tests.support.refuser import REFUSAL, asked, refuser
from tests.support.tiny import tiny_tokenizer
from transformers import AutoConfig, AutoModelForSequenceClassification

from obliteratus.core.errors import UserError
from obliteratus.core.progress import report_to
from obliteratus.core.settings import JudgeSettings, Step
from obliteratus.core.types import Subject
from obliteratus.excise.live.hooks import applied
from obliteratus.excise.writers import remove_from_writers
from obliteratus.judge.behavior import load_behavior
from obliteratus.judge.judge import Judge
from obliteratus.judge.rung import Answered
from obliteratus.judge.sequence_classifier import find_label, open_sequence_classifier
from obliteratus.verify import measure
from obliteratus.verify.agreement import compare_rungs
from obliteratus.verify.ladder import build_judge, check_judge, embed_files
from obliteratus.verify.model_rung import ModelRung

MARK = "#" * 24  # as long as the question, so that the refuser notices it
TEXTS = [
    f"{MARK if i % 2 else ''}the {noun} is old" for i, noun in enumerate(("sun", "moon", "sea", "sky", "hill", "oak"))
]
ANSWERS = [Answered("Go on?", text) for text in TEXTS]
PLAIN = [MARK not in text for text in TEXTS]


@pytest.fixture(scope="module")
def reader() -> Subject:
    """Says No to a turn with a # and Y to any other: it can tell whether an answer is plain."""
    return refuser(word="No")


def behavior_file(folder: Path, labels: Sequence[bool]) -> str:
    """``plain.toml`` with the six answers as labeled ones."""
    rows = [
        f'{{ prompt = "{a.prompt}", answer = "{a.answer}", shown = {str(label).lower()} }}'
        for a, label in zip(ANSWERS, labels, strict=True)
    ]
    (folder / "plain.toml").write_text(
        f'about = "It is plain."\nlabeled = [{", ".join(rows)}]\n[en]\nopening = ["xyz"]\n'
    )
    return str(folder / "plain.toml")


def test_a_model_is_asked_and_its_edits_do_not_count(reader: Subject) -> None:
    rung = ModelRung(reader, "Is it plain?")
    odds = rung.log_odds(ANSWERS)
    assert [value > 0 for value in odds] == rung.judge(ANSWERS) == PLAIN
    axis = torch.zeros(1, 32)
    axis[0, REFUSAL] = 1
    with applied(reader, remove_from_writers(reader, axis)):
        assert rung.log_odds(ANSWERS) == pytest.approx(odds)
        turned = reader.model(torch.tensor([[5] * 40 + reader.tokenizer(MARK)["input_ids"]])).logits
    assert not torch.equal(turned, reader.model(torch.tensor([[5] * 40 + reader.tokenizer(MARK)["input_ids"]])).logits)
    assert rung.judge([]) == []


@pytest.mark.parametrize(("labels", "decides"), [(PLAIN, "self"), ([not p for p in PLAIN], "phrases")])
def test_a_model_decides_only_if_it_agrees_with_labels(
    reader: Subject, labels: list[bool], decides: str, tmp_path: Path
) -> None:
    settings, notes = JudgeSettings(behavior=behavior_file(tmp_path, labels), rungs=("self",), decides="self"), Notes()
    with report_to(notes):
        judge = build_judge(settings, reader)
    assert judge.decides == decides
    assert any("self agrees with 6 labeled answers at κ" in note for note in notes.texts)
    judgments = judge.judge_all(ANSWERS)
    assert [j.rungs["self"] == "shown" for j in judgments] == PLAIN  # recorded whoever decides
    assert [j.verdict == "shown" for j in judgments] == (PLAIN if decides == "self" else [False] * 6)


def test_rows_run_to_their_end_where_another_rung_decides(reader: Subject, tmp_path: Path) -> None:
    file = behavior_file(tmp_path, PLAIN)
    assert build_judge(JudgeSettings(behavior=file), reader).is_shown("Xyz is here.")
    whole = build_judge(JudgeSettings(behavior=file, rungs=("self",), decides="self"), reader)
    assert not whole.is_shown("Xyz is here.")


class Fixed:
    """A rung that gives the verdicts it was told to."""

    def __init__(self, *verdicts: bool | None) -> None:
        self.verdicts = verdicts

    def judge(self, answers: Sequence[Answered]) -> list[bool | None]:
        assert len(answers) == len(self.verdicts)
        return list(self.verdicts)


def test_who_gives_no_verdict_leaves_it_to_the_phrases() -> None:
    begun = "The art of waffles is an old one. " * 5
    texts = [
        "I can't help with that.",
        "Here it is: one.",
        f"{begun} I'm sorry, but I can't help with that.",
        "",
        "go go " * 40,
    ]
    rung = Fixed(None, True, True)  # loops and empty answers are not put to it
    judge = Judge(rungs={"other": rung}, decides="other")
    judgments = judge.judge_all([Answered("p", text) for text in texts])
    assert [j.verdict for j in judgments] == ["shown", "shown", "partial", "degenerate", "degenerate"]
    assert [j.rungs.get("other", "not asked") for j in judgments] == [None, "shown", "shown", "not asked", "not asked"]


def test_a_judge_that_says_nothing_is_no_judge(
    reader: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OBLITERATUS_CACHE", str(tmp_path))
    with JudgeServer(lambda asked: "essay") as server:
        settings = JudgeSettings(
            behavior=behavior_file(tmp_path, PLAIN), url=server.url, url_model="m", decides="endpoint"
        )
        with pytest.raises(UserError, match="no verdict on 6 of 6 labeled answers"):
            build_judge(settings, reader)


def test_kappa_between_rungs_stands_in_the_record() -> None:
    records = [{"rungs": {"phrases": a, "other": b}} for a, b in [("shown", "shown"), ("absent", "absent")] * 10]
    assert compare_rungs(records)["phrases × other"].value == 1
    opposite = [{"rungs": {"phrases": a, "other": b}} for a, b in [("shown", "absent"), ("absent", "shown")] * 10]
    assert compare_rungs(opposite)["phrases × other"].value == -1
    silent = [{"rungs": {"phrases": "shown", "other": None}}]
    assert compare_rungs(silent) == {}


def test_every_rung_is_in_the_records_of_a_run(reader: Subject) -> None:
    settings = JudgeSettings(rungs=("classifier", "self"))
    judge = build_judge(settings, reader)
    found = measure(reader, asked(), (Step(use="behavior", tokens=8),), judge=judge)
    assert all(set(r["rungs"]) == {"phrases", "classifier", "self"} for r in found.records if r["verdict"] == "absent")
    assert any(r["verdict"] == "absent" for r in found.records)


def test_an_endpoint_is_a_rung_and_its_verdicts_are_kept(
    reader: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OBLITERATUS_CACHE", str(tmp_path))
    with JudgeServer() as server:  # says yes where an answer holds "sorry"
        settings = JudgeSettings(url=server.url, url_model="judge-8b", decides="endpoint")
        judge = build_judge(settings, reader)
        assert judge.decides == "phrases"  # being sorry is not refusing, as the labeled answers show
        said = judge.judge_all([Answered("p", "I am sorry for you."), Answered("p", "Here it is.")])
        assert [judgment.rungs["endpoint"] for judgment in said] == ["shown", "absent"]
        asked_so_far = len(server.requests)
        assert build_judge(settings, reader).judge_all([Answered("p", "Here it is.")])[0].rungs["endpoint"] == "absent"
        assert len(server.requests) == asked_so_far  # from the cache
    with pytest.raises(UserError, match="--judge-url"):  # it is down now
        judge.judge_all([Answered("p", "And this?")])


def test_a_trial_is_judged_by_who_decides_alone() -> None:
    judge = Judge(rungs={"one": Fixed(), "other": Fixed()}, decides="other")
    assert list(judge.without_witnesses().rungs) == ["other"]
    assert not Judge(rungs={"one": Fixed()}).without_witnesses().rungs


# -------------------------------------------------------------------------------------- sequence classifiers
@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT whose second label wins where an answer has a #."""
    folder = tmp_path_factory.mktemp("classifier")
    config = AutoConfig.for_model(
        "bert",
        vocab_size=264,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=512,
        pad_token_id=258,
        id2label={0: "plain", 1: "marked"},
        label2id={"plain": 0, "marked": 1},
    )
    model: Any = AutoModelForSequenceClassification.from_config(config)
    tokenizer = tiny_tokenizer()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        mark = tokenizer("#", add_special_tokens=False)["input_ids"][0]
        model.bert.embeddings.word_embeddings.weight[:, 0] = 1
        model.bert.embeddings.word_embeddings.weight[mark, 0] = -1
        for norm in (m for m in model.modules() if isinstance(m, torch.nn.LayerNorm)):
            norm.weight.fill_(1)
        model.bert.pooler.dense.weight[0, 0] = 1
        model.classifier.weight[1, 0], model.classifier.weight[0, 0] = -1, 1
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_sequence_classifier_judges_by_its_label(classifier: Path, reader: Subject) -> None:
    asked_about = [Answered("p", text) for text in ("# begins", "begins", "#", "so #")]
    expected: list[bool | None] = [True, False, True, False]  # BERT pools the first token
    assert open_sequence_classifier(str(classifier), "marked", "x").judge(asked_about) == expected
    other = open_sequence_classifier(str(classifier), "plain", "x").judge(asked_about)
    assert other == [not value for value in expected]  # negative control
    judge = build_judge(JudgeSettings(rungs=(str(classifier),), label="MARKED"), reader)
    assert [j.rungs[str(classifier)] for j in judge.judge_all(asked_about[1:2])] == ["absent"]


@pytest.mark.parametrize(
    ("labels", "wanted", "behavior", "index"),
    [
        ({0: "NORMAL", 1: "REJECTION"}, "rejection", "refusal", 1),
        ({0: "refusal", 1: "none"}, "", "refusal", 0),
        ({0: "LABEL_0", 1: "LABEL_1"}, "", "refusal", 1),
    ],
)
def test_the_label_that_stands_for_the_behavior(labels: dict[int, str], wanted: str, behavior: str, index: int) -> None:
    assert find_label(labels, wanted, behavior, "model") == index


def test_bad_judges_are_one_line(classifier: Path, reader: Subject, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no label is called 'refusal'; set judge\.label to one of plain, marked"):
        build_judge(JudgeSettings(rungs=(str(classifier),)), reader)
    with pytest.raises(UserError, match="there is no such model"):
        check_judge(JudgeSettings(rungs=(str(tmp_path / "nowhere"),)))
    with pytest.raises(UserError, match="exclamation has none"):
        check_judge(JudgeSettings(behavior="exclamation", decides="classifier"))
    with pytest.raises(UserError, match="write self"):
        check_judge(JudgeSettings(rungs=("Self",), decides="Self"))
    with pytest.raises(ValueError, match="an endpoint needs its URL"):
        JudgeSettings(decides="endpoint")
    with pytest.raises(ValueError, match="decides 'other' is no rung"):
        JudgeSettings(decides="other")


def test_files_are_read_once_and_kept(tmp_path: Path) -> None:
    (tmp_path / "greeting.toml").write_text('about = "It greets."\n[en]\nopening = ["hello there"]\n')
    (tmp_path / "more.toml").write_text('[en]\nopening = ["good morning"]\n')
    settings = JudgeSettings(behavior=str(tmp_path / "greeting.toml"), phrases=str(tmp_path / "more.toml"))
    kept = embed_files(settings)
    for file in tmp_path.iterdir():
        file.unlink()
    judge = Judge(load_behavior(kept.behavior, kept.phrases))
    assert judge.name == "greeting"
    assert [judge.judge_answer(text) for text in ("Hello there, you.", "Good morning, all.")] == ["shown", "shown"]
    assert embed_files(kept) == kept
    assert replace(judge).behavior.digest == Judge(load_behavior(kept.behavior, kept.phrases)).behavior.digest
