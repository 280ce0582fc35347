"""Tasks give what the harness gives with its own class for these models: the same tokens, likelihoods and answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.support.harness import CHOICES, KINDS, write_task
from tests.support.one_at_a_time import shared_subject
from tests.support.plans import random_plan
from tests.support.tiny import tiny_subject

from obliteratus.benchmark.run import AskingStyle, TaskResults, run_tasks
from obliteratus.benchmark.tasks import LoadedTasks, load_tasks
from obliteratus.core.errors import UserError
from obliteratus.core.types import Subject
from obliteratus.excise.live.hooks import applied
from obliteratus.inference.memory import memory_limit


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("tasks")
    return {kind: str(write_task(folder, kind)) for kind in KINDS}


def load(files: dict[str, str], *kinds: str, shots: int | None = None) -> LoadedTasks:
    return load_tasks(tuple(files[kind] for kind in kinds), "", shots)


def run_theirs(subject: Subject, tasks: LoadedTasks, style: AskingStyle) -> Any:
    """The harness with its own class around the same model."""
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    for task in tasks.tasks.values():
        task.set_fewshot_seed(seed=1234)
    model = HFLM(pretrained=subject.model, tokenizer=subject.tokenizer, batch_size=1)
    return evaluate(
        model,
        tasks.loaded,
        bootstrap_iters=0,
        system_instruction=style.system or None,
        apply_chat_template=style.chat,
        fewshot_as_multiturn=True,
    )


def check_equal(ours: TaskResults, theirs: Any) -> None:
    for values in ours.metrics:
        assert values.value == pytest.approx(
            theirs["results"][values.task][f"{values.metric},{values.filter}"], rel=1e-4
        )
    for task, samples in theirs["samples"].items():
        for own, other in zip(ours.samples[task], samples, strict=True):
            assert own["arguments"] == other["arguments"]
            for one, two in zip(own["filtered_resps"], other["filtered_resps"], strict=True):
                assert one == pytest.approx(two, abs=1e-3) if not isinstance(one, str) else one == two


STYLES = {
    "plain": (AskingStyle(), None),
    "turns": (AskingStyle(chat=True, system="Be brief."), None),
    "shots": (AskingStyle(), 2),
    "shots as turns": (AskingStyle(chat=True), 2),
}


@pytest.mark.parametrize("style", STYLES)
def test_results_are_the_harness_own(style: str, files: dict[str, str]) -> None:
    asking, shots = STYLES[style]
    subject, tasks = shared_subject("llama"), load(files, *KINDS, shots=shots)
    check_equal(run_tasks(subject, tasks, asking), run_theirs(subject, tasks, asking))


def test_an_edit_changes_them_alike(files: dict[str, str]) -> None:
    subject, tasks = tiny_subject("gemma3_text"), load(files, *KINDS)
    unedited = run_tasks(subject, tasks)
    with applied(subject, random_plan(subject, strength=1.5)):
        edited = run_tasks(subject, tasks)
        check_equal(edited, run_theirs(subject, tasks, AskingStyle()))
    assert [m.value for m in edited.metrics] != [m.value for m in unedited.metrics]
    check_equal(run_tasks(subject, tasks), as_theirs(unedited))


def as_theirs(results: TaskResults) -> dict[str, Any]:
    """Results of ours in the form of theirs."""
    values: dict[str, dict[str, float]] = {}
    for metric in results.metrics:
        values.setdefault(metric.task, {})[f"{metric.metric},{metric.filter}"] = metric.value
    return {"results": values, "samples": results.samples}


def test_memory_changes_no_result(files: dict[str, str]) -> None:
    subject, tasks = shared_subject("llama"), load(files, *KINDS)
    whole = run_tasks(subject, tasks)
    with memory_limit(1.0):
        check_equal(run_tasks(subject, tasks), as_theirs(whole))


def test_a_limit_takes_the_first_items(files: dict[str, str]) -> None:
    (values, *_) = run_tasks(shared_subject("llama"), load(files, "choices"), AskingStyle(limit=3)).metrics
    assert len(values.items) == 3 < len(CHOICES)


def test_long_contexts_lose_their_beginning(tmp_path: Path) -> None:
    long = [{**row, "question": "x" * 400 + row["question"]} for row in CHOICES]
    tasks = load_tasks((str(write_task(tmp_path, "choices", long)),))
    subject = shared_subject("llama")
    check_equal(run_tasks(subject, tasks), run_theirs(subject, tasks, AskingStyle()))


def test_a_choice_longer_than_the_context_is_an_error(tmp_path: Path) -> None:
    long = [{**row, "choices": ["x" * 400, "b", "c"]} for row in CHOICES]
    tasks = load_tasks((str(write_task(tmp_path, "choices", long)),))
    with pytest.raises(UserError, match=r"a text to be rated has 40. tokens, and the model's context 256"):
        run_tasks(shared_subject("llama"), tasks)


def test_long_texts_are_read_in_windows(tmp_path: Path) -> None:
    long = [{**row, "question": "a b c d " * 60} for row in CHOICES[:2]]
    tasks = load_tasks((str(write_task(tmp_path, "texts", long)),))
    subject = shared_subject("llama")
    (ours,) = run_tasks(subject, tasks).metrics
    theirs = run_theirs(subject, tasks, AskingStyle())["results"][ours.task]["word_perplexity,none"]
    assert ours.value == pytest.approx(theirs, rel=0.05)  # a window is one token shorter than theirs


def test_tasks_that_draw_at_random_are_refused(tmp_path: Path) -> None:
    rows = KINDS["answers"].replace("max_gen_toks: 12", "do_sample: true\n  temperature: 0.7")
    file = write_task(tmp_path, "answers")
    file.write_text(file.read_text().replace(KINDS["answers"], rows))
    with pytest.raises(UserError, match="draws answers at random"):
        run_tasks(shared_subject("llama"), load_tasks((str(file),)))


def test_an_item_that_does_not_fit_into_memory_is_one_line(files: dict[str, str]) -> None:
    import torch

    subject = tiny_subject("llama")

    def run_out(module: Any, args: Any) -> None:
        raise torch.OutOfMemoryError("no more")

    subject.module(subject.layers)[0].register_forward_pre_hook(run_out)  # type: ignore[index]
    with pytest.raises(UserError, match=r"a single item of .* does not fit into the memory that is left"):
        run_tasks(subject, load(files, "choices"))
