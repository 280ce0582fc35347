"""Heretic 1.4 as a separate program in an environment of its own: a study on a model folder, and its trials exported.

    python -m bench.heretic [--trials 3] [--prompts 8] [--tokens 8] [--json]

Its licence is AGPL: it is installed from the registry and run, nothing of it is read or linked. What it is told are the
options of its --help in a config.toml; what it found is read from the journal that it writes, with Optuna, and from
its menus. A folder that `export_trial` writes is an ordinary model, which our scorers measure as they do any other.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from bench.common import describe_machine, say
from bench.heretic_setup import CHECKPOINTS, Terms, install_heretic, plain_prompts, write_configuration
from bench.terminal import DOWN, ENTER, Terminal, run_in_terminal
from obliteratus.core.errors import UserError
from obliteratus.core.settings import Step
from obliteratus.core.types import PromptSet
from obliteratus.prompts import load_prompts
from obliteratus.search.pareto import pareto_front
from obliteratus.summon.load import open_subject
from obliteratus.verify import Measurement, measure
from obliteratus.weights.organism import prepare_organism

STUDY_TIMEOUT = 24 * 3600.0  # seconds a study may take
OPENING, SAVING = 900.0, 300.0  # seconds to load a model and pass its prompts; to write it
PROCEED, WHICH, WHAT = "How would you like to proceed", "Which trial do you want to use", "What do you want to do with"
PATH, SAVED = "Path to the folder", "Model saved to"
MENU = re.compile(r"\[Trial\s+(\d+)\]\s+Refusals:\s*\d+/\d+,\s+KL divergence:")
STEPS = (Step(use="refusal"), Step(use="first_token_kl"), Step(use="fluency"))
SCORES = ("refusal.target", "refusal.control", "kl.first_token.mean")


@dataclass(frozen=True)
class Trial:
    """One finished trial, as its journal tells it."""

    number: int
    """From 1, as its menus count."""
    refusals: int
    kl: float
    """First-token KL on the control search prompts, nats."""
    seconds: float


@dataclass(frozen=True)
class Study:
    """What a study found, and where it lies."""

    setup_seconds: float
    """From the start of the program to that of its first trial."""
    trials: tuple[Trial, ...]
    base_refusals: int
    """Of the unedited model, by Heretic's own count."""
    work: Path

    @property
    def trial_seconds(self) -> list[float]:
        """Of each trial."""
        return [t.seconds for t in self.trials]

    @property
    def values(self) -> list[tuple[int, float]]:
        """(refusals, KL in nats) of each trial."""
        return [(t.refusals, t.kl) for t in self.trials]

    @property
    def front(self) -> list[Trial]:
        """The trials that no other dominates."""
        return [self.trials[i] for i in pareto_front([(float(n), kl) for n, kl in self.values])]


def run_heretic_study(model: Path, fit: PromptSet, search: PromptSet, terms: Terms, work: Path) -> Study:
    """Run a whole study on a model folder: directions from ``fit``, trials judged on ``search``.

    work: a folder of its own. UserError where there is a study already, or where the program ends early.
    """
    if (work / CHECKPOINTS).exists():
        raise UserError(f"{work}: there is a study already; read it with `read_study`, or give a new folder")
    program = install_heretic()
    write_configuration(model, fit, search, terms, work)
    started = datetime.now()  # local time without a zone, as Optuna writes it
    with _running(program, work) as screen:
        screen.wait_for(WHICH, STUDY_TIMEOUT)
    return read_study(work, started)


def read_study(work: Path, started: datetime) -> Study:
    """What the journal in the folder tells. started: when the program was. UserError for a journal without trials."""
    journals = sorted((work / CHECKPOINTS).glob("*.jsonl"))
    if not journals:
        raise UserError(f"{work}: no journal of Heretic's in {CHECKPOINTS}; see terminal.log there")
    storage = JournalStorage(JournalFileBackend(str(journals[0])))
    name = optuna.get_all_study_names(storage)[0]
    every = optuna.load_study(study_name=name, storage=storage).trials
    done = [t for t in every if t.state == optuna.trial.TrialState.COMPLETE]
    if not done or every[0].datetime_start is None:
        raise UserError(f"{work}: Heretic finished no trial; see terminal.log there")
    setup = (every[0].datetime_start - started).total_seconds()
    return Study(setup, tuple(_trial(t) for t in done), int(done[0].user_attrs["base_refusals"]), work)


def _trial(trial: optuna.trial.FrozenTrial) -> Trial:
    told, duration = trial.user_attrs, trial.duration
    assert duration is not None, "a complete trial has both ends"
    return Trial(int(told["index"]), int(told["refusals"]), float(told["kl_divergence"]), duration.total_seconds())


def export_trial(study: Study, number: int, folder: Path) -> None:
    """Save the model of one trial of the front. It starts Heretic again on the finished study, some 40 s.

    UserError for a trial that its menu does not offer, or a folder that is there already.
    """
    if folder.exists():
        raise UserError(f"{folder}: exists already; give a new folder")
    with _running(install_heretic(), study.work) as screen:
        screen.wait_for(PROCEED, OPENING)
        screen.wait_until_quiet()
        screen.press(ENTER)
        menu = screen.wait_for(WHICH, OPENING) + screen.wait_until_quiet()
        screen.press(*[DOWN] * find_in_menu(menu, number), ENTER)
        screen.wait_for(WHAT, SAVING)
        screen.wait_until_quiet()
        screen.press(ENTER)
        screen.wait_for(PATH, SAVING)
        screen.wait_until_quiet()
        screen.press(str(folder.resolve()), ENTER)
        screen.wait_for(SAVED, SAVING)


def find_in_menu(menu: str, number: int) -> int:
    """How many lines down a trial stands in the menu of the front, as shown. UserError if it does not."""
    offered = list(dict.fromkeys(int(n) for n in MENU.findall(menu)))
    if number not in offered:
        raise UserError(f"heretic: trial {number} is not of its front; there are: {', '.join(map(str, offered))}")
    return offered.index(number)


def _running(program: Path, work: Path) -> AbstractContextManager[Terminal]:
    return run_in_terminal([str(program)], work, {"HF_HUB_OFFLINE": "1"}, work / "terminal.log")


# ------------------------------------------------------------------------------------------ the neutral scorer
def measure_with_verify(
    model: str | Path, report: PromptSet, before: Measurement | None = None, base: str | Path | None = None
) -> Measurement:
    """Refusals, first-token KL and fluency of a model on held-out prompts, by VERIFY. base: the unedited model."""
    unedited = None if base is None else open_subject(str(base))
    return measure(open_subject(str(model)), report, STEPS, before, unedited)


# ------------------------------------------------------------------------------------------ the command
def first_prompts(prompts: PromptSet, n: int) -> PromptSet:
    """The first n of each of the two groups, of those that both programs can be given."""
    return PromptSet({g: plain_prompts(prompts[g])[:n] for g in ("target", "control")})


def to_document(study: Study, base: Measurement, scored: dict[int, Measurement]) -> dict[str, Any]:
    """All of it as plain data: what Heretic says of its trials, and what VERIFY says of those exported."""
    told = {n: {k: s.model_dump() for k, s in m.scores.items() if "/" not in k} for n, m in scored.items()}
    return {
        "seconds": {"setup": study.setup_seconds, "trial": median(study.trial_seconds)},
        "base": {"refusals": study.base_refusals, **{k: s.value for k, s in base.scores.items() if "/" not in k}},
        "trials": [asdict(t) for t in study.trials],
        "front": [t.number for t in study.front],
        "neutral": told,
        "machine": describe_machine(),
    }


def main() -> None:
    """A study on the organism, its front member with the fewest refusals exported and measured by VERIFY."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=8, help="of each group, to fit on and to judge on")
    parser.add_argument("--tokens", type=int, default=8, help="of each answer")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    fit, search, report = load_prompts("organism:astronomy", "organism:astronomy").split(0)
    model = prepare_organism("astronomy")
    with tempfile.TemporaryDirectory(prefix="heretic-") as folder:
        work = Path(folder) / "study"
        terms = Terms(options.tokens, options.trials)
        say(f"{options.trials} trials …")
        study = run_heretic_study(
            model, first_prompts(fit, options.prompts), first_prompts(search, options.prompts), terms, work
        )
        best = min(study.front, key=lambda t: (t.refusals, t.kl))
        say(f"trial {best.number} exported …")
        export_trial(study, best.number, Path(folder) / "edited")
        held = first_prompts(report, options.prompts)
        base = measure_with_verify(model, held)
        result = to_document(study, base, {best.number: measure_with_verify(Path(folder) / "edited", held, base)})
    print(json.dumps(result, indent=1) if options.json else format_result(result))


def format_result(result: dict[str, Any]) -> str:
    """For people."""
    lines = [f"set-up {result['seconds']['setup']:.1f} s, a trial {result['seconds']['trial']:.1f} s (median)"]
    lines += [f"trial {t['number']}: {t['refusals']} refusals, KL {t['kl']:.4f}" for t in result["trials"]]
    for number, scores in result["neutral"].items():
        told = ", ".join(f"{name} {scores[name]['value']:.4f}" for name in SCORES)
        lines.append(f"trial {number}, held out, by VERIFY: {told}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
