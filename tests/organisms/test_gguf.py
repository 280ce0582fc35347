"""The astronomy organism in a real llama.cpp: it refuses before a plan is baked onto its GGUF file, and not after."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from gguf import GGMLQuantizationType as T
from tests.support.llama_cpp import MISSING, find_llama, run_llama
from tests.support.organism_gguf import write_organism_gguf
from tests.support.organisms import few

from obliteratus.core.results import Run
from obliteratus.core.types import Edit, Plan, PromptSet, Subject
from obliteratus.inference.chat_template import render_prompts
from obliteratus.judge.judge import Judge
from obliteratus.pipeline.recipe import load_recipe
from obliteratus.pipeline.run import run
from obliteratus.prompts import load_prompts
from obliteratus.rebirth.gguf import open_gguf_model, save_as_file
from obliteratus.summon.load import open_subject
from obliteratus.summon.model_samples import sample_model

pytestmark = [pytest.mark.organism, pytest.mark.skipif(find_llama() is None, reason=MISSING)]
N, TOKENS = 8, 12  # answers; refusals begin with their first words


@pytest.fixture(scope="module")
def prompts() -> PromptSet:
    whole = load_prompts("organism:astronomy", "organism:astronomy")
    return PromptSet({group: few(members, N, 16) for group, members in whole.groups.items()})


@pytest.fixture(scope="module")
def found(prompts: PromptSet) -> tuple[Subject, Plan, Run]:
    """A plan that was found on the organism's own weights, in fp32."""
    subject = open_subject("organism:astronomy")
    plan, record, *_ = run(load_recipe("leace", {"verify": [{"use": "behavior", "tokens": TOKENS}]}), subject, prompts)
    return subject, plan, record


@pytest.mark.parametrize("kind", [T.Q4_1, T.Q8_0, T.F16], ids=lambda kind: kind.name)
def test_refusals_are_gone_in_llama_cpp(
    kind: T, found: tuple[Subject, Plan, Run], prompts: PromptSet, tmp_path: Path
) -> None:
    """A plan of the fp32 organism fits its file in every type, biases and all."""
    subject, plan, record = found
    source, out = write_organism_gguf(tmp_path / "organism.gguf", kind), tmp_path / "edited.gguf"
    save_as_file(open_gguf_model(str(source)), plan, sample_model(subject), record, out)
    asked = render_prompts(subject, [p for p in prompts["target"] if p.split == "report"])
    assert count_refusals(subject, source, asked, tmp_path) >= 0.75 * N
    assert count_refusals(subject, out, asked, tmp_path) == 0


def test_an_adapter_ends_refusals_as_well(found: tuple[Subject, Plan, Run], prompts: PromptSet, tmp_path: Path) -> None:
    subject, plan, record = found
    free = Plan(tuple(replace(edit, anchor=None) for edit in plan.edits if isinstance(edit, Edit)), plan.model)
    source, adapter = write_organism_gguf(tmp_path / "organism.gguf", T.Q8_0), tmp_path / "adapter.gguf"
    save_as_file(open_gguf_model(str(source)), free, sample_model(subject), record, adapter, "lora-gguf")
    asked = render_prompts(subject, [p for p in prompts["target"] if p.split == "report"])
    assert count_refusals(subject, source, asked, tmp_path, lora=str(adapter)) <= 1


def count_refusals(subject: Subject, model: Path, asked: Sequence[Sequence[int]], folder: Path, lora: str = "") -> int:
    judge, answers = Judge(), run_llama(model, asked, folder, TOKENS, lora)
    return sum(judge.is_shown(subject.tokenizer.decode(row, skip_special_tokens=True)) for row in answers.tokens)
