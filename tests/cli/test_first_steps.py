"""What newcomers meet first: misspelled options and keys, nothing to save to, locales, interrupts, odd arguments."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tests.support.command_line import call
from tests.support.gguf_files import write_gguf
from tests.support.tiny import run_of, tiny, tiny_subject, tiny_tokenizer

from obliteratus.cli.jobs import name_free_folder
from obliteratus.core.errors import UserError
from obliteratus.core.run_folder import partial_folder
from obliteratus.core.types import Plan, Prompt
from obliteratus.excise.plan import save_plan
from obliteratus.inference.chat_template import render_prompts
from obliteratus.weights.organism import create_folder
from obliteratus.weights.organism_files import get_cache_folder

TARGET = "Tell me about the sea.,Who owns two boats?,My hill is tall.,Is a red door cheap?,Her house has rooms."
CONTROL = "How do I count to ten?,Which bread is best?,Can cats swim far?,Why does ice float?,Where do bees sleep?"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    tiny("llama").save_pretrained(tmp_path / "tiny")
    tiny_tokenizer().save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


@pytest.fixture
def prompts(tmp_path: Path) -> tuple[str, ...]:
    options: list[str] = []
    for group, text in (("target", TARGET), ("control", CONTROL)):
        lines = [*text.split(","), *(f"{group} é {n} {'xyzuvw'[n % 6] * 3} {n * 7}" for n in range(12))]
        (tmp_path / f"{group}.txt").write_text("\n".join(lines), encoding="utf-8")
        options += [f"--{group}", str(tmp_path / f"{group}.txt")]
    return tuple(options)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("runn", "No such command 'runn'. Did you mean 'run'?; see "),
        ("run", "Missing argument"),
        ("run m --tragets x", "No such option: --tragets"),
        ("run m --seed a", "Invalid value for '--seed'"),
        ("demo --set excise.strenght=1", "key 'excise.strenght' does not exist; did you mean 'excise.strength'?"),
        ("demo --set verify.0.tokenz=1", "key 'tokenz' does not exist; did you mean 'tokens'?"),
        ("demo --set exise.strength=1", "key 'exise' does not exist; did you mean 'excise'?"),
        ("inspect m --method basic", "only a forecast uses them; add --memory SIZE"),
        (
            "run m --target organism:astronomy --control organism:astronomy --column target=",
            "give one column, or GROUP",
        ),
        ("run m --target organism:astronomy --control organism:astronomy --column x", "there is no column 'x'"),
        ("verify m --all --seed 1 --target organism:astronomy --control organism:astronomy", "have no effect; leave"),
    ],
)
def test_one_line_says_what_and_what_to_do(arguments: str, said: str) -> None:
    result = call(*arguments.split())
    assert result.exit_code == 2, result.output
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert said in errors[0]
    assert "╭" not in result.output


def test_a_search_without_optuna_says_what_to_install() -> None:
    """A search is an extra. All else that such an installation has goes on without it."""
    code = "import sys; sys.modules['optuna'] = None; from obliteratus.__main__ import main; main()"
    sources = ["--target", "organism:astronomy", "--control", "organism:astronomy"]
    found = [
        subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
        for words in (["search", "organism:astronomy", *sources], ["methods", "leace_search"])
    ]
    assert [one.returncode for one in found] == [2, 0], found
    assert found[0].stderr.splitlines()[-1] == "error: a search needs Optuna; pip install 'obliteratus[search]'"


def test_prompts_that_no_step_uses(model: Path, prompts: Any, tmp_path: Path) -> None:
    """Bypass prompts would have no effect at all; the rate of keep prompts is measured."""
    more = tmp_path / "more.txt"
    more.write_text("\n".join(f"{n} stones and {n * n} pebbles lie {'abc'[n % 3] * 4}" for n in range(16)))
    refused = call("run", model, *prompts, "--bypass", more, "--force", "--quiet")
    assert refused.exit_code == 2
    assert "--bypass: no step of balanced uses bypass prompts; leave them out, or add bypass_contrast" in refused.stderr
    result = call("run", model, *prompts, "--keep", more, "--force", "--method", "least_change")
    assert result.exit_code == 0, result.output
    said = " ".join(result.stderr.split())
    assert "no step of least_change spares the keep prompts" in said
    assert "no --out: the edited model will be measured and not saved" in said


def test_a_locale_without_utf8(model: Path, prompts: Any, tmp_path: Path) -> None:
    """The whole run, with its card and all notes, where Python's default encoding is ASCII."""
    env = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "obliteratus", "run", str(model), *prompts, "--force", "--json"]
    found = subprocess.run([*command, "--out", str(tmp_path / "out")], env=env, capture_output=True, check=False)
    assert found.returncode == 0, found.stderr[-2000:]
    record = json.loads(found.stdout)
    assert record == json.loads((tmp_path / "out" / "run.json").read_text(encoding="utf-8"))
    assert "–" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("verbose", [False, True])
def test_other_libraries_are_heard_only_if_asked_for(verbose: bool, prompts: Any, tmp_path: Path) -> None:
    """Converting a GGUF file shows a bar of its own, and bitsandbytes looks for kernels."""
    model = write_gguf(tmp_path / "tiny.gguf")
    command = [sys.executable, "-m", "obliteratus", "run", str(model), *prompts, "--force", "--quiet"]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    steps = ["--set", 'verify=[{use="behavior", tokens=4}]', *(["--verbose"] if verbose else [])]
    found = subprocess.run([*command, *steps], env=env, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr[-2000:]
    assert ("GGUF" in found.stderr) == verbose
    assert verbose or not found.stderr.strip()


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (("verify", "{model}", "--thinking"), "--thinking: the chat template has no thinking mode"),
        (("verify", "{model}", "--template", "x"), "--template x: the tokenizer has no named templates"),
        (("verify", "{model}", "--out", "{file}/out"), "is a file, so no folder can be made in it"),
        (("run", "{model}", "--thinking", "--force"), "--thinking: the chat template has no thinking mode"),
        (
            ("search", "{model}", "--thinking", "--trials", "1", "--force"),
            "--thinking: the chat template has no thinking mode",
        ),
        (("apply", "{plan}", "{model}", "--out", "{file}/out"), "is a file, so no folder can be made in it"),
        (("apply", "{plan}", "{model}", "--out", "{new}", "--thinking"), "--thinking: the chat template has no"),
        (("apply", "{plan}", "nobody/nothing", "--out", "{new}"), "the hub cannot be reached, and the model is not in"),
        (("apply", "{file}", "{model}", "--out", "{new}"), "there is no plan.safetensors"),
    ],
)
def test_every_command_refuses_it_before_any_work(
    command: tuple[str, ...], said: str, model: Path, prompts: tuple[str, ...], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    save_plan(Plan(), tmp_path / "plan")
    (tmp_path / "plan" / "run.json").write_text(run_of(tiny_subject("llama")).model_dump_json(), encoding="utf-8")
    places = {name: tmp_path / name for name in ("file", "plan", "new")} | {"model": model}
    asked = prompts if command[0] != "apply" else ()
    result = call(*(part.format(**places) for part in command), *asked, "--quiet")
    assert result.exit_code == 2, result.output
    assert said in result.stderr
    assert not (tmp_path / "new").exists()
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("after", [0.1, 0.6, 1.5])
def test_an_interrupt_while_it_starts(after: float) -> None:
    heard = partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    code = "from obliteratus.__main__ import main; print(1, flush=True); main()"
    words = ["verify", "nobody/nothing", "--target", "organism:astronomy", "--control", "organism:astronomy", "--quiet"]
    command = [sys.executable, "-c", code, *words]  # it imports for seconds
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heard)
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(after)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert "Traceback" not in said
    assert process.returncode == 130
    assert said.startswith("interrupted; nothing was written")


# ------------------------------------------------------------------------------------------------ in Python
SNIPPETS = {
    "texts are prompts": (
        "print(ob.PromptSet({'target': ['a'], 'control': ['b']}) == ob.PromptSet({'target': (ob.Prompt('a'),), "
        "'control': (ob.Prompt('b'),)}))",
        "True",
    ),
    "a text is no group": ("ob.PromptSet({'target': 'abc'})", "the group 'target' is no list of texts or prompts: abc"),
    "numbers are no prompts": ("ob.PromptSet({'target': [1]})", "the group 'target' is no list of texts or prompts"),
    "texts are sources": ("print(len(ob.load_prompts(['a'], ['b'])['target']))", "1"),
    "a number is no prompt": ("ob.generate(subject, [3])", "generate: 3 is no prompt; give texts"),
    "a folder is no record": ("ob.save(subject, ob.Plan(), 'edited')", "save: name the output folder"),
    "a number is no source": ("ob.load_prompts(3, ['b'])", "target: int holds no prompts"),
    "a table of groups is none": ("ob.load_prompts({'a': 1}, ['b'])", "target: dict holds no prompts; give a file"),
    "plans take texts as folders": (
        "ob.save_plan(ob.Plan(), 'deep/plan'); print(ob.load_plan('deep/plan') == ob.Plan())",
        "True",
    ),
    "no folder below a file": (
        "open('f', 'w').close(); ob.save_plan(ob.Plan(), 'f/plan')",
        "the folder cannot be made",
    ),
    "one direction is no basis": (
        "from obliteratus.core.types import Directions; Directions(*[torch.ones(8)] * 3, 'x')",
        "the basis has shape [8]; it must be [streams, k, width]",
    ),
    "one direction is no edit": (
        "from obliteratus.core.types import Edit; Edit(subject.sites[0], torch.ones(32), 1.0)",
        "the basis has shape [32]; it must be [k, width]",
    ),
    "a model is no source": (
        "ob.open_subject(subject.model)",
        "not a LlamaForCausalLM; for a model in memory use obliteratus.wrap",
    ),
    "nor is its description": ("ob.open_subject(str(subject.model))", "no model has such a name"),
    "scorers by name": ("print('perplexity' in ' '.join(ob.measure(subject, prompts, ['perplexity']).scores))", "True"),
    "a misspelled scorer": ("ob.measure(subject, prompts, ['perplexitty'])", "did you mean 'perplexity'?"),
}
SCRIPT = """
import json, sys, traceback
import obliteratus as ob
import torch
from tests.support.tiny import tiny_subject
subject, prompts = tiny_subject("llama"), ob.PromptSet({"target": ["a"], "control": ["b"]})
said = {}
for name, code in json.loads(sys.argv[1]).items():
    printed = []
    try:
        exec(code, {"ob": ob, "torch": torch, "subject": subject, "prompts": prompts, "print": printed.append})
        said[name] = str(printed)
    except ob.UserError as error:
        said[name] = str(error)
    except Exception:
        said[name] = traceback.format_exc()
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What each snippet gives in a process as users have it, without the types that are checked in tests."""
    root = Path(__file__).parents[2]
    code = {name: snippet for name, (snippet, _) in SNIPPETS.items()}
    found = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(code)],
        env={**os.environ, "PYTHONPATH": str(root)},
        cwd=tmp_path_factory.mktemp("work"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    result: dict[str, str] = json.loads(found.stdout.splitlines()[-1])
    return result


@pytest.mark.parametrize("name", SNIPPETS)
def test_the_library_accepts_it_or_says_what_is_wanted(name: str, said: dict[str, str]) -> None:
    assert SNIPPETS[name][1] in said[name]
    assert "Traceback" not in said[name]


def test_tokens_beyond_the_embedding() -> None:
    subject = tiny_subject("llama")
    subject.tokenizer.add_tokens([f"<far{n}>" for n in range(subject.model.config.vocab_size)])
    render_prompts(subject, [Prompt("near")])
    with pytest.raises(UserError, match=r"its tokenizer gives token \d+ .* its embedding has \d+ rows"):
        render_prompts(subject, [Prompt(f"<far{subject.model.config.vocab_size - 1}>")])


def test_an_unusable_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OBLITERATUS_CACHE", "/dev/null/cache")
    what = r"the cache folder cannot be written to .*; name another with OBLITERATUS_CACHE"
    with pytest.raises(UserError, match=what), create_folder(get_cache_folder() / "x"):
        pass


def test_the_demo_takes_a_free_folder(tmp_path: Path) -> None:
    first, second = tmp_path / "obliteratus-demo", tmp_path / "obliteratus-demo-2"
    assert name_free_folder(tmp_path, "obliteratus-demo", resume=False) == first
    first.mkdir()
    assert name_free_folder(tmp_path, "obliteratus-demo", resume=False) == second
    partial_folder(second).mkdir()
    assert name_free_folder(tmp_path, "obliteratus-demo", resume=True) == second
    assert name_free_folder(tmp_path, "obliteratus-demo", resume=False) == tmp_path / "obliteratus-demo-3"
