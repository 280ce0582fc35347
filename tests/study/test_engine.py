"""A study's numbers are the scorers'; neither batches nor cached outputs of lower blocks change them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from math import isfinite
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.tiny import tiny_subject

from obliteratus.core.errors import UserError
from obliteratus.core.settings import Step
from obliteratus.core.types import Subject
from obliteratus.excise.live.hooks import applied
from obliteratus.inference.cached_prompts import hooks_by_module
from obliteratus.prompts import load_prompts, split_prompts
from obliteratus.study import Study, metrics
from obliteratus.study.data import check_study
from obliteratus.study.engine import Engine, batch_knockouts, list_differences
from obliteratus.study.metrics import WORST, bound_values
from obliteratus.verify import ItemValues, measure

THINGS = ("rice", "an egg", "peas", "a soup", "the moon", "a comet", "rain", "iron", "a fern", "gold", "tin", "ash")
OTHERS = ("sand", "tea", "wood", "snow")
PARTS = ("layers", "ffn", "heads", "embeddings")
CLOSE = {"rel": 1e-4, "abs": 1e-5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts, prompts and questions, all harmless and all short."""
    place = tmp_path_factory.mktemp("data")
    (place / "texts.txt").write_text("\n\n".join(f"Here is a text about {x}, and it ends." for x in THINGS))
    for group, verb in (("target", "Tell me about"), ("control", "How heavy is")):
        rows = [{"prompt": f"{verb} {x}.", "split": "report" if i > 3 else "fit"} for i, x in enumerate(THINGS)]
        rows += [{"prompt": f"{verb} {x}.", "split": "fit"} for x in OTHERS]
        (place / f"{group}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    asked = [
        {"prompt": f"Is {x} heavy?", "choices": ["yes", "no", "perhaps so"], "answer": i % 3}
        for i, x in enumerate(THINGS)
    ]
    (place / "asked.jsonl").write_text("\n".join(map(json.dumps, asked)))
    return place


def study_of(folder: Path, *metrics: Step, parts: tuple[str, ...] = PARTS, **changes: object) -> Study:
    data = {"texts": str(folder / "texts.txt"), "target": str(folder / "target.jsonl")}
    data |= {
        "control": str(folder / "control.jsonl"),
        "labeled": str(folder / "asked.jsonl"),
        "samples": 6,
        "length": 20,
    }
    steps = metrics or (
        Step(use="perplexity"),
        Step(use="behavior", tokens=6),
        Step(use="first_token_kl"),
        Step(use="accuracy"),
    )
    return Study(data=data, strategies=tuple(Step(use=p) for p in parts), metrics=steps, **changes)


@contextmanager
def untouched(subject: Subject) -> Iterator[None]:
    ids = torch.tensor([[65, 66, 67, 68]])
    before, hooked = subject.model(ids).logits, hooks_by_module(subject)
    yield
    assert torch.equal(subject.model(ids).logits, before)
    assert hooks_by_module(subject) == hooked


# -------------------------------------------------------------------------------- equal to the scorers
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "mixtral"])
def test_every_number_is_what_the_scorer_says_of_the_edited_model(name: str, folder: Path) -> None:
    subject = tiny_subject(name)
    made = study_of(folder, parts=("layers", "ffn", "heads"))
    engine = Engine.create(subject, made)
    report = split_prompts(load_prompts(made.data.target, made.data.control), 0).report
    report = type(report)({g: tuple(p[i * len(p) // 6] for i in range(6)) for g, p in report.groups.items()})
    steps = (
        Step(use="behavior", tokens=6),
        Step(use="first_token_kl"),
        Step(use="accuracy", labeled=str(half(folder))),
    )
    before = measure(subject, report, steps)
    assert engine.measure_baseline().scores["accuracy"].value == before.scores["accuracy"].value
    chosen = engine.knockouts[:: len(engine.knockouts) // 4]
    with untouched(subject):
        results = engine.measure(chosen)
    for knockout, result in zip(chosen, results, strict=True):
        with applied(subject, knockout.plan):
            expected = measure(subject, report, steps, before).scores
        for group in ("target", "control"):
            assert result.scores[f"refusal.{group}"].value == expected[f"refusal.{group}"].value
            assert result.scores[f"degenerate.{group}"].value == expected[f"degenerate.{group}"].value
        assert result.scores["kl.first_token"].value == pytest.approx(expected["kl.first_token.mean"].value, **CLOSE)
        assert result.scores["accuracy"].value == expected["accuracy"].value


def half(folder: Path) -> Path:
    """Every second question: what ``samples`` = 6 takes of twelve."""
    path = folder / "half.jsonl"
    path.write_text("\n".join((folder / "asked.jsonl").read_text().splitlines()[::2]))
    return path


@pytest.mark.parametrize("name", ["llama", "gemma2", "mixtral"])
def test_perplexity_against_the_model_alone(name: str, folder: Path) -> None:
    """One text at a time, logits in float64."""
    subject = tiny_subject(name)
    engine = Engine.create(subject, study_of(folder, Step(use="perplexity")))
    texts = engine.data.texts
    assert [len(row) for row in texts] == [20] * 6
    for spec in engine.knockouts[:: len(engine.knockouts) // 7]:
        losses = []
        with applied(subject, spec.plan):
            for row in texts:
                logp = subject.model(torch.tensor([row])).logits[0, :-1].double().log_softmax(-1)
                losses.append(-logp[torch.arange(19), torch.tensor(row[1:])].mean())
        found = engine.measure([spec])[0]
        assert found.scores["perplexity"].value == pytest.approx(float(torch.stack(losses).mean().exp()), rel=1e-4)
        ratio = found.scores["perplexity"].value / engine.measure_baseline().scores["perplexity"].value
        assert found.change["perplexity"].value == pytest.approx(ratio, rel=1e-4)


def test_parts_differ(folder: Path) -> None:
    """Negative control: nothing is measured of another part, or of none."""
    engine = Engine.create(tiny_subject("llama"), study_of(folder, Step(use="perplexity")))
    results = [r for chunk in batch_knockouts(engine.knockouts) for r in engine.measure(chunk)]
    values = {r.scores["perplexity"].value for r in results} | {engine.measure_baseline().scores["perplexity"].value}
    assert len(values) == len(results) + 1


# ---------------------------------------------------------------------------------- batching and lanes
def test_rows_together_are_what_they_are_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = tiny_subject("llama")
    engine = Engine.create(subject, study_of(folder))
    chosen = engine.knockouts[::4]  # some of each kind
    together = engine.measure(chosen)
    monkeypatch.setattr(metrics, "MAX_ROWS", 1)
    for result, alone in zip(together, engine.measure(chosen), strict=True):
        for name, score in alone.scores.items():
            assert result.scores[name].value == pytest.approx(score.value, **CLOSE), name
    values = {tuple(score.value for score in result.scores.values()) for result in together}
    assert len(values) == len(chosen)  # negative control: no plan reads another's rows


@pytest.mark.parametrize("batch", [8, 64])
def test_the_batch_shows_in_no_number(folder: Path, batch: int) -> None:
    subject = tiny_subject("llama")
    plain, small = (Engine.create(subject, study_of(folder, batch=b, parts=("layers",))) for b in (0, batch))
    for knockout in plain.knockouts[1:2]:
        one, other = (e.measure([knockout])[0] for e in (plain, small))
        for name in one.scores:
            assert one.scores[name].value == pytest.approx(other.scores[name].value, **CLOSE)


def test_chunks_rise_and_hold_every_part_once(folder: Path) -> None:
    engine = Engine.create(tiny_subject("llama"), study_of(folder))
    made = batch_knockouts(engine.knockouts, 4)
    assert [len(chunk) for chunk in made[:-1]] == [4] * (len(made) - 1)
    layers = [spec.layer for chunk in made for spec in chunk]
    assert layers == sorted(layers)
    assert sorted(s.component for c in made for s in c) == sorted(s.component for s in engine.knockouts)
    assert max(map(len, engine.batches())) == 16  # twelve prompts: sixteen plans are 192 of 256 rows
    no_prompts = {"texts": str(folder / "texts.txt")}
    alone = Engine.create(tiny_subject("llama"), Study(data=no_prompts, strategies=(Step(use="heads"),)))
    assert {len(batch) for batch in alone.batches()[:-1]} == {4}


# ------------------------------------------------------------------------------------------- numbers
def items(values: list[float], unit: Any = "perplexity") -> ItemValues:
    return ItemValues(torch.tensor(values, dtype=torch.float64), unit)


def test_a_broken_model_is_as_bad_as_can_be() -> None:
    broken = bound_values(items([1.0, torch.nan, torch.inf]))
    assert broken.values.tolist() == [1.0, WORST, WORST]
    score, change = broken.score(), broken.change(items([1.0, 1.0, 1.0]))
    assert all(isfinite(s.value) for s in (score, change))


def test_changes_are_paired() -> None:
    """The difficulty of a text cancels."""
    noise = torch.randn(2, 20, generator=torch.Generator().manual_seed(0)).double()
    base, moved = 3 + noise[0], 3.5 + noise[0] + 0.01 * noise[1]
    change = items(moved.tolist()).change(items(base.tolist()))
    assert change.value == pytest.approx(float((moved - base).mean().exp()))
    assert change.high - change.low < 0.05
    unpaired = items(moved.flip(0).tolist()).change(items(base.tolist()))
    assert unpaired.high - unpaired.low > 1  # negative control: other pairs, the same means
    assert unpaired.value == pytest.approx(change.value)
    differences = list_differences(items(moved.tolist()), items(base.tolist()))
    assert differences == pytest.approx((moved - base).tolist(), abs=1e-6)


def test_a_change_of_shares_never_has_an_interval_of_no_width() -> None:
    before = items([1.0, 1.0, 0.0, 0.0], "share")
    for after in ([1.0, 1.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]):
        change = items(after, "share").change(before)
        assert change.value == (sum(after) - 2) / 4
        assert change.low < change.value < change.high or change.low < change.value <= change.high


# ---------------------------------------------------------------------------------------------- wrong
def test_what_cannot_work_is_said_before_the_model_is_opened(folder: Path) -> None:
    made = study_of(folder, Step(use="behavior"))
    check_study(made)
    for change, said in (
        ({"data": made.data.model_copy(update={"target": ""})}, "target"),
        ({"metrics": (Step(use="behaviors"),)}, "did you mean 'behavior'"),
        ({"metrics": (Step(use="behavior", token=4),)}, "token"),
        ({"metrics": (Step(use="fluency"),)}, "metric 'fluency' does not exist"),  # a scorer, but none of a study
        ({"metrics": (Step(use="perplexity", texts="mine.txt"),)}, "data.texts"),
        ({"metrics": (Step(use="accuracy"),), "data": made.data.model_copy(update={"labeled": ""})}, "labeled"),
        ({"data": made.data.model_copy(update={"texts": "nowhere.txt"})}, "nowhere.txt"),
        ({"strategies": (Step(use="layers", sizes=3),)}, "sizes"),
    ):
        with pytest.raises(UserError, match=said):
            check_study(made.model_copy(update=change))


def test_a_part_named_twice_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match="two strategies knock out block 0"):
        Engine.create(tiny_subject("llama"), study_of(folder, parts=("layers", "layers")))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "not a JSON object"),
        ("[1]", "not a JSON object"),
        ('{"prompt": "x", "choices": ["a"], "answer": 0}', "choices"),
        ('{"prompt": "x", "choices": ["a", "b"], "answer": 2}', "not the index of any of the 2 choices"),
        ('{"prompt": "x", "choices": ["a", "b"]}', "answer"),
    ],
)
def test_wrong_questions_are_named_by_line(line: str, said: str, tmp_path: Path) -> None:
    from obliteratus.verify.questions import load_questions

    path = tmp_path / "q.jsonl"
    path.write_text('{"prompt": "x", "choices": ["a", "b"], "answer": 1, "more": 3}\n' + line)
    with pytest.raises(UserError, match=said) as error:
        load_questions(path)
    assert f"{path}:2" in str(error.value)
