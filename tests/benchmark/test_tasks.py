"""The shipped tasks are right and need no network, and what cannot be loaded is refused in one line."""

from __future__ import annotations

import ast
import json
import operator
import re
from pathlib import Path
from typing import Any

import pytest
from tests.support.harness import write_task

from obliteratus.benchmark import tasks as finding
from obliteratus.benchmark.questions import TASKS, list_shipped_tasks
from obliteratus.benchmark.tasks import find_folders, load_tasks, split_names
from obliteratus.core.errors import UserError

SIGNS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "//": operator.floordiv}


def read(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (TASKS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def compute(expression: str) -> int:
    """The value of a sum of products, which are computed first."""
    terms = re.split(r" (?=[+-] )", expression)
    return sum(_sign(term) * _product(term.removeprefix("+ ").removeprefix("- ")) for term in terms)


def _sign(term: str) -> int:
    return -1 if term.startswith("- ") else 1


def _product(term: str) -> int:
    first, *rest = term.split(" ")
    value = int(first)
    for sign, number in zip(rest[::2], rest[1::2], strict=True):
        value = SIGNS[sign](value, int(number))
    return value


def test_the_checker_of_sums_knows_precedence() -> None:
    assert compute("2 + 3 * 4 - 10 // 5") == 12


def test_the_answers_of_arithmetic_are_right() -> None:
    for item in read("arithmetic"):
        assert item["choices"][item["answer"]] == str(compute(item["expression"])), item
        numbers = re.findall(r"\d+", item["question"])
        assert set(re.findall(r"\d+", item["expression"])) <= {*numbers, "2"}, item  # 2 of "twice" and "half"


def test_reading_asks_five_questions_on_each_of_twelve_texts() -> None:
    items = read("reading")
    texts = {item["passage"] for item in items}
    assert [len(texts), len(items)] == [12, 60]
    assert all(sum(item["passage"] == text for item in items) == 5 for text in texts)


def test_answers_cannot_be_told_from_their_form() -> None:
    """Neither the place of the right choice nor its length gives it away."""
    for name in ("arithmetic", "reading"):
        items = read(name)
        places = [item["answer"] for item in items]
        assert all(0.1 * len(items) < places.count(i) < 0.45 * len(items) for i in range(4)), name
        longest = [max(range(4), key=lambda i, it=it: len(it["choices"][i])) == it["answer"] for it in items]
        assert sum(longest) < 0.45 * len(items), name


@pytest.mark.parametrize("name", ["arithmetic", "reading"])
def test_items_are_well_formed(name: str) -> None:
    items = read(name)
    questions = [(item.get("passage"), item["question"]) for item in items]
    assert len(set(questions)) == len(items)
    assert all(len(set(item["choices"])) == 4 and 0 <= item["answer"] < 4 for item in items)


def test_shipped_tasks_load_without_the_harness_own() -> None:
    loaded = load_tasks(("arithmetic", "reading"))
    assert list(loaded.tasks) == list_shipped_tasks() == ["arithmetic", "reading"]
    assert [len(task.eval_docs) for task in loaded.tasks.values()] == [96, 60]
    assert find_folders(("arithmetic", "reading")) == [TASKS]


def test_a_task_of_the_harness_is_found_by_its_folder() -> None:
    assert [folder.name for folder in find_folders(("hellaswag", "arithmetic"))] == ["hellaswag", "tasks"]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("hellaswagg", "task 'hellaswagg' does not exist; did you mean 'hellaswag'?"),
        ("nothing.yaml", "nothing.yaml: no such task file"),
    ],
)
def test_a_task_that_there_is_not_is_refused(name: str, said: str) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        load_tasks((name,))


def test_a_task_without_network_is_one_line() -> None:
    with pytest.raises(UserError, match="task hellaswag: its data are not here and could not be fetched") as caught:
        load_tasks(("hellaswag",))
    assert "\n" not in str(caught.value)


def test_an_unknown_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        load_tasks(("arithmetic",), str(tmp_path / "none"))


def test_a_folder_adds_its_tasks(tmp_path: Path) -> None:
    write_task(tmp_path, "choices", name="mine")
    assert list(load_tasks(("mine", "reading"), str(tmp_path)).tasks) == ["mine", "reading"]


def test_a_damaged_file_is_one_line(tmp_path: Path) -> None:
    file = write_task(tmp_path, "choices")
    file.write_text(file.read_text().replace("multiple_choice", "guessing"))
    with pytest.raises(UserError, match=r"cannot be loaded .*mend its file or leave it out"):
        load_tasks((str(file),))


def test_tasks_that_run_code_are_refused(tmp_path: Path) -> None:
    file = write_task(tmp_path, "choices", more="\nunsafe_code: true")
    with pytest.raises(UserError, match="it would run code that the model wrote"):
        load_tasks((str(file),))


@pytest.mark.parametrize("names", ["", " , ", "a,b,a"])
def test_lists_of_names_are_checked(names: str) -> None:
    with pytest.raises(UserError, match=r"none are given|given twice"):
        split_names(names)


def test_without_the_harness_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finding, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"not installed; pip install 'obliteratus\[bench\]'"):
        load_tasks(("arithmetic", "a-name-of-no-other-test"))


def test_only_what_runs_tasks_imports_the_harness() -> None:
    """So every other command works without it."""
    needing = {
        path.name for path in Path(finding.__file__).parents[1].rglob("*.py") if imports_at_once(path, "lm_eval")
    }
    assert needing == {"run.py", "language_model.py"}


def imports_at_once(path: Path, library: str) -> bool:
    """Whether importing a module imports the library: a top-level import of it, or of one of its parts."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = [alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names]
    names += [str(node.module) for node in tree.body if isinstance(node, ast.ImportFrom)]
    return any(name.partition(".")[0] == library for name in names)
