"""Inspect runs its own tasks on a live plan: answers, logs, and what is refused."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from inspect_ai import Task, eval
from inspect_ai._util.error import PrerequisiteError
from inspect_ai.dataset import Sample
from inspect_ai.log import EvalLog, read_eval_log
from inspect_ai.model import ChatMessageSystem, ChatMessageUser, ContentImage, GenerateConfig, get_model
from inspect_ai.scorer import includes
from inspect_ai.solver import generate
from inspect_ai.tool import ToolInfo
from tests.support.plans import random_plan
from tests.support.tiny import save_tiny, tiny_subject

import obliteratus.serve.inspect_provider  # noqa: F401  # what the entry point does
from obliteratus.core.chat import Turn
from obliteratus.core.errors import UserError
from obliteratus.excise.plan import load_plan, save_plan
from obliteratus.inference.stream import AnswerLimits
from obliteratus.serve.dial import Dial
from obliteratus.serve.inspect_model import check_request, split_reasoning, to_turns
from obliteratus.summon.load import open_subject

QUESTIONS = ["What is a comet?", "Tell me about tea.", "Why?"]
TOKENS = 6
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inspect")
    subject = open_subject(save_tiny(folder / "model"))
    save_plan(random_plan(subject, strength=1.5), folder / "plan")
    save_plan(random_plan(tiny_subject("qwen2")), folder / "other")
    return folder


def run(folders: Path, logs: Path, **options: Any) -> EvalLog:
    task = Task(dataset=[Sample(input=q, target="a") for q in QUESTIONS], solver=generate(), scorer=includes())
    model = get_model(f"obliteratus/{folders / 'model'}", memoize=False, **options)
    (log,) = eval(task, model=model, log_dir=str(logs), display="none", max_tokens=TOKENS)
    assert log.status == "success", log.error
    return log


def answers(log: EvalLog) -> list[str]:
    return [sample.output.completion for sample in log.samples or []]


def expected(folders: Path, strength: float) -> list[str]:
    dial = Dial(open_subject(folders / "model"), load_plan(folders / "plan"))
    return ["".join(dial.stream([Turn("user", q)], strength, AnswerLimits(TOKENS))) for q in QUESTIONS]


def test_a_task_runs_on_the_live_plan_and_its_log_opens(folders: Path, tmp_path: Path) -> None:
    log = run(folders, tmp_path, plan=str(folders / "plan"), strength=1.5)
    assert answers(log) == expected(folders, 1.5)
    assert answers(log) != expected(folders, 0.0)
    (file,) = tmp_path.glob("*.eval")
    read = read_eval_log(str(file))
    assert answers(read) == answers(log)
    assert read.eval.model == f"obliteratus/{folders / 'model'}"
    assert read.results is not None
    assert read.stats.model_usage[read.eval.model].output_tokens == TOKENS * len(QUESTIONS)


def test_at_strength_zero_it_is_the_unedited_model(folders: Path, tmp_path: Path) -> None:
    assert answers(run(folders, tmp_path, plan=str(folders / "plan"), strength=0)) == expected(folders, 0.0)


def test_drawn_answers_follow_their_seed(folders: Path, tmp_path: Path) -> None:
    config = GenerateConfig(temperature=1.0, seed=3)
    one, two = (answers(run(folders, tmp_path, config=config)) for _ in range(2))
    assert one == two != expected(folders, 0.0)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"plan": "other"}, "other: the plan was made for another model"),
        ({"strength": 0.5}, "there is no plan whose strength could be set"),
        ({"plan": "plan", "strength": 7}, "give a number from -1 to 2"),
        ({"plann": "plan"}, "-M argument 'plann' does not exist; did you mean 'plan'?"),
    ],
)
def test_arguments_are_checked_in_one_line(folders: Path, options: dict[str, Any], said: str) -> None:
    options = {name: str(folders / str(v)) if name == "plan" else v for name, v in options.items()}
    with pytest.raises(PrerequisiteError) as caught:
        get_model(f"obliteratus/{folders / 'model'}", memoize=False, **options)
    assert said in str(caught.value.message)


def test_what_is_not_followed_is_refused() -> None:
    check_request([], GenerateConfig(max_tokens=4, temperature=0.0))
    with pytest.raises(UserError, match=r"offers tools \(search\)"):
        check_request([ToolInfo(name="search", description="looks")], GenerateConfig())
    with pytest.raises(UserError, match="logprobs: "):
        check_request([], GenerateConfig(logprobs=True))
    with pytest.raises(UserError, match="num_choices: "):
        check_request([], GenerateConfig(num_choices=3))
    with pytest.raises(UserError, match="images or files"):
        to_turns([ChatMessageUser(content=[ContentImage(image="a.png")])])


def test_system_messages_come_first_as_one() -> None:
    said = [
        ChatMessageSystem(content="Be brief."),
        ChatMessageSystem(content="Be kind."),
        ChatMessageUser(content="Hi"),
    ]
    assert to_turns(said) == [Turn("system", "Be brief.\n\nBe kind."), Turn("user", "Hi")]


def test_reasoning_is_kept_apart() -> None:
    parts = split_reasoning("<think>two and two</think> Four.")
    assert [part.type for part in parts if not isinstance(part, str)] == ["reasoning", "text"]
    assert not isinstance(parts, str)
    assert parts[1].text == "Four."  # type: ignore[union-attr]
    assert split_reasoning(" Four.") == " Four."


def test_the_entry_point_is_declared_and_light() -> None:
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["inspect_ai"]
    assert points == {"obliteratus": "obliteratus.serve.inspect_provider"}
    assert import_module(points["obliteratus"])
    light = "import sys, obliteratus.serve.inspect_provider; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", light], check=False).returncode == 0


TASK = """
from inspect_ai import Task, task
from inspect_ai.dataset import Sample
from inspect_ai.scorer import includes
from inspect_ai.solver import generate

@task
def small():
    return Task(dataset=[Sample(input="What is a comet?", target="a")], solver=generate(), scorer=includes())
"""


def test_the_command_of_the_guide_works(folders: Path, tmp_path: Path) -> None:
    (tmp_path / "task.py").write_text(TASK)
    options = ["-M", f"plan={folders / 'plan'}", "-M", "strength=1", "--max-tokens", "4", "--display", "none"]
    command = ["-m", "inspect_ai", "eval", "task.py", "--model", f"obliteratus/{folders / 'model'}", *options]
    done = subprocess.run(
        [sys.executable, *command], cwd=tmp_path, capture_output=True, text=True, env=dict(os.environ), check=False
    )
    assert done.returncode == 0, done.stderr
    (file,) = (tmp_path / "logs").glob("*.eval")
    listed = subprocess.run(
        [sys.executable, "-m", "inspect_ai", "log", "dump", str(file)], capture_output=True, text=True, check=False
    )
    assert '"status": "success"' in listed.stdout
