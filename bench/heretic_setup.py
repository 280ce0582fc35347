"""What Heretic is given: an environment of its own, and its options and prompts in a folder, as its --help has them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.common import say
from obliteratus.core.errors import UserError
from obliteratus.core.types import Prompt, PromptSet
from obliteratus.verify.refusal import load_markers
from obliteratus.weights.organism import get_cache_folder

TORCH, RELEASE = "torch==2.13.0", "heretic-llm==1.4.*"
# What SmolLM2's template writes where no system turn is given. Heretic always gives one, so it is given this: then both
# programs pass the same tokens.
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
RANDOM = 0.3  # share of trials drawn at random before the sampler begins: 60 of 200, its defaults
CHECKPOINTS = "checkpoints"


@dataclass(frozen=True)
class Terms:
    """What a study is given beside the model and the prompts."""

    tokens: int
    """Of each answer, at most."""
    trials: int
    seed: int = 0
    batch: int = 32
    """Prompts a batch; 0 lets Heretic try sizes, which then counts as set-up."""
    system: str = SYSTEM


def install_heretic(folder: Path | None = None) -> Path:
    """The executable, installed into its own environment if it is not there. UserError where pip fails."""
    folder = folder or get_cache_folder() / "heretic-venv"
    program = folder / "bin" / "heretic"
    if not program.is_file():
        say(f"installing {RELEASE} into {folder} …")
        _call([sys.executable, "-m", "venv", str(folder)])
        for wanted in (TORCH, RELEASE):  # torch first and pinned: a bare one would bring several GB of CUDA
            _call([str(folder / "bin" / "pip"), "install", "--quiet", wanted])
    return program


def _call(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"{' '.join(command)}: {last}; Heretic is only needed for this comparison")


def write_configuration(model: Path, fit: PromptSet, search: PromptSet, terms: Terms, work: Path) -> None:
    """Write config.toml and the prompts into the folder. UserError for prompts that do not stay the same there."""
    sets = {"good_prompts": fit["control"], "bad_prompts": fit["target"]}
    sets |= {"good_evaluation_prompts": search["control"], "bad_evaluation_prompts": search["target"]}
    settings = {
        "model": str(model.resolve()),
        "dtypes": ["float32"],
        "device_map": "cpu",
        "batch_size": terms.batch,
        "max_response_length": terms.tokens,
        "n_trials": terms.trials,
        "n_startup_trials": min(terms.trials, max(1, round(RANDOM * terms.trials))),
        "seed": terms.seed,
        "study_checkpoint_dir": CHECKPOINTS,
        "export_strategy": "merge",
        "system_prompt": terms.system,
        "refusal_markers": list(load_markers()),
    }
    work.mkdir(parents=True, exist_ok=True)
    for name, prompts in sets.items():
        (work / f"{name}.txt").write_text(_lines(prompts))
    tables = "".join(f'\n[{name}]\ndataset = "{name}.txt"\n' for name in sets)
    # A JSON value of these kinds is a TOML value.
    flat = "".join(f"{key} = {json.dumps(value, ensure_ascii=False)}\n" for key, value in settings.items())
    (work / "config.toml").write_text(flat + tables)


def plain_prompts(prompts: Sequence[Prompt]) -> tuple[Prompt, ...]:
    """Those that a file with one prompt a line can hold: without system turn, line breaks and double blanks."""
    return tuple(p for p in prompts if not p.system and p.text == " ".join(p.text.split()))


def _lines(prompts: tuple[Prompt, ...]) -> str:
    if not prompts:
        raise UserError("heretic: a group has no prompts for it; give some")
    kept = set(plain_prompts(prompts))
    for prompt in prompts:
        if prompt not in kept:
            raise UserError(f"heretic: '{prompt.text[:40]}' has a system turn or lines; it takes a plain prompt a line")
    return "".join(f"{prompt.text}\n" for prompt in prompts)
