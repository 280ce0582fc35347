"""Install Heretic into an environment of its own, and write its options and prompts into a folder."""

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
from obliteratus.weights.organism_files import get_cache_folder

TORCH, RELEASE = "torch==2.13.0", "heretic-llm==1.4.*"
# The system turn that SmolLM2's template writes if there is none. Heretic always has one, so it is given this one. Then
# both programs run the same tokens.
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
RANDOM = 0.3  # share of trials drawn at random before the sampler starts: 60 of 200 by default
CHECKPOINTS = "checkpoints"
MARKERS = Path(__file__).with_name("refusal_markers.txt")


@dataclass(frozen=True)
class StudySettings:
    """Settings of a study beside the model and the prompts."""

    tokens: int
    """Most tokens of each answer."""
    trials: int
    seed: int = 0
    batch: int = 32
    """Prompts in a batch; with 0 Heretic tries sizes, which counts as set-up."""
    system: str = SYSTEM


def is_installed() -> bool:
    """Return whether Heretic is installed in the cache."""
    return _program(None).is_file()


def install_heretic(folder: Path | None = None) -> Path:
    """Install Heretic if it is missing, and return its executable. Raises UserError if pip fails."""
    program = _program(folder)
    folder = program.parents[1]
    if not program.is_file():
        say(f"installing {RELEASE} into {folder} …")
        _call([sys.executable, "-m", "venv", str(folder)])
        for wanted in (TORCH, RELEASE):  # torch is pinned, since the default would bring several GB of CUDA
            _call([str(folder / "bin" / "pip"), "install", "--quiet", wanted])
    return program


def _program(folder: Path | None) -> Path:
    return (folder or get_cache_folder() / "heretic-venv") / "bin" / "heretic"


def _call(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"{' '.join(command)}: {last}; Heretic is only needed for this comparison")


def write_configuration(model: Path, fit: PromptSet, search: PromptSet, terms: StudySettings, work: Path) -> None:
    """Write config.toml and the prompts into the folder. Raises UserError for prompts that Heretic would change."""
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
        "refusal_markers": load_markers(),
    }
    work.mkdir(parents=True, exist_ok=True)
    for name, prompts in sets.items():
        (work / f"{name}.txt").write_text(_lines(prompts), encoding="utf-8")
    tables = "".join(f'\n[{name}]\ndataset = "{name}.txt"\n' for name in sets)
    # These JSON values are TOML values too.
    flat = "".join(f"{key} = {json.dumps(value, ensure_ascii=False)}\n" for key, value in settings.items())
    (work / "config.toml").write_text(flat + tables, encoding="utf-8")


def load_markers() -> list[str]:
    """Return the phrases that heretic counts as refusals, which knows no patterns."""
    lines = MARKERS.read_text(encoding="utf-8").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def plain_prompts(prompts: Sequence[Prompt]) -> tuple[Prompt, ...]:
    """Return the prompts that fit on a line of a file: without system turn, line breaks and double spaces."""
    return tuple(p for p in prompts if not p.system and p.text == " ".join(p.text.split()))


def _lines(prompts: tuple[Prompt, ...]) -> str:
    if not prompts:
        raise UserError("heretic: a group has no prompts; give some")
    plain = set(plain_prompts(prompts))
    for prompt in prompts:
        if prompt not in plain:
            raise UserError(f"heretic: '{prompt.text[:40]}' has a system turn or lines; give plain prompts of one line")
    return "".join(f"{prompt.text}\n" for prompt in prompts)
