"""Run Heretic 1.4 as a separate program: a study on a model folder, and an export of its best trial.

    python -m bench.heretic [--trials 3] [--prompts 8] [--tokens 8] [--smoke] [--json]

Its license is AGPL, so it is installed from the registry into its own environment and run; nothing of it is read or
linked. Its options, from its --help, are written to a config.toml. Its results are read with Optuna from the journal
that it writes, and from its menus. An exported trial is an ordinary model folder, which our scorers measure.
--smoke runs it only if it is installed already.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from bench.common import describe_machine, make_parser, say
from bench.heretic_setup import (
    CHECKPOINTS,
    StudySettings,
    install_heretic,
    is_installed,
    plain_prompts,
    write_configuration,
)
from bench.terminal import DOWN, ENTER, Terminal, run_in_terminal
from obliteratus.core.errors import UserError
from obliteratus.core.pareto import pareto_front
from obliteratus.core.settings import Step
from obliteratus.core.types import PromptSet
from obliteratus.prompts import load_prompts, split_prompts
from obliteratus.summon.load import open_subject
from obliteratus.verify import Measurement, measure
from obliteratus.weights.organism import prepare_organism

STUDY_TIMEOUT = 24 * 3600.0  # seconds
OPENING, SAVING = 900.0, 300.0  # most seconds to load a model and run its prompts, and to write it
PROCEED, WHICH, WHAT = "How would you like to proceed", "Which trial do you want to use", "What do you want to do with"
PATH, SAVED = "Path to the folder", "Model saved to"
MENU = re.compile(r"\[Trial\s+(\d+)\]\s+Refusals:\s*\d+/\d+,\s+KL divergence:")
STEPS = (Step(use="behavior"), Step(use="first_token_kl"), Step(use="fluency"))
SCORES = ("refusal.target", "refusal.control", "kl.first_token.mean")


@dataclass(frozen=True)
class HereticTrial:
    """A finished trial of its journal."""

    number: int
    """Counted from 1, as in its menus."""
    refusals: int
    kl: float
    """First-token KL on the control search prompts in nats."""
    seconds: float


@dataclass(frozen=True)
class HereticStudy:
    """The results of a study, and its folder."""

    setup_seconds: float
    """Seconds from the start of the program to that of its first trial."""
    trials: tuple[HereticTrial, ...]
    base_refusals: int
    """Refusals of the unedited model, as Heretic counts them."""
    work: Path

    @property
    def trial_seconds(self) -> list[float]:
        """Seconds of each trial."""
        return [t.seconds for t in self.trials]

    @property
    def values(self) -> list[tuple[int, float]]:
        """(refusals, KL in nats) of each trial."""
        return [(t.refusals, t.kl) for t in self.trials]

    @property
    def front(self) -> list[HereticTrial]:
        """The trials that no other dominates."""
        return [self.trials[i] for i in pareto_front([(float(n), kl) for n, kl in self.values])]


def run_heretic(model: Path, fit: PromptSet, search: PromptSet, terms: StudySettings, work: Path) -> HereticStudy:
    """Run a study on a model folder, with directions from ``fit`` and trials judged on ``search``.

    work: a new folder. Raises UserError if it holds a study already, or if the program ends early.
    """
    if (work / CHECKPOINTS).exists():
        raise UserError(f"{work}: this folder holds a study already; read it with `read_study`, or give a new folder")
    program = install_heretic()
    write_configuration(model, fit, search, terms, work)
    started = datetime.now()  # local time without a zone, as Optuna writes it
    with _running(program, work) as screen:
        screen.wait_for(WHICH, STUDY_TIMEOUT)
    return read_study(work, started)


def read_study(work: Path, started: datetime) -> HereticStudy:
    """Return the study in the folder. started: when the program was started. Raises UserError if it has no trials."""
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
    return HereticStudy(setup, tuple(_trial(t) for t in done), int(done[0].user_attrs["base_refusals"]), work)


def _trial(trial: optuna.trial.FrozenTrial) -> HereticTrial:
    attributes, duration = trial.user_attrs, trial.duration
    assert duration is not None, "a complete trial has a duration"
    return HereticTrial(
        int(attributes["index"]),
        int(attributes["refusals"]),
        float(attributes["kl_divergence"]),
        duration.total_seconds(),
    )


def export_trial(study: HereticStudy, number: int, folder: Path) -> None:
    """Save the model of one trial of the front. This starts Heretic again on the finished study, which takes some 40 s.

    Raises UserError for a trial that its menu does not offer, or for a folder that exists already.
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
    """Return how many lines down in the menu of the front a trial is. Raises UserError if it is not there."""
    offered = list(dict.fromkeys(int(n) for n in MENU.findall(menu)))
    if number not in offered:
        raise UserError(f"heretic: trial {number} is not on its front, which has {', '.join(map(str, offered))}")
    return offered.index(number)


def _running(program: Path, work: Path) -> AbstractContextManager[Terminal]:
    return run_in_terminal([str(program)], work, {"HF_HUB_OFFLINE": "1"}, work / "terminal.log")


# ------------------------------------------------------------------------------------------ measuring
def measure_with_verify(
    model: str | Path, report: PromptSet, before: Measurement | None = None, base: str | Path | None = None
) -> Measurement:
    """Return VERIFY's measurement of a model on held-out prompts. base: the unedited model."""
    unedited = None if base is None else open_subject(str(base))
    return measure(open_subject(str(model)), report, STEPS, before, unedited)


# ------------------------------------------------------------------------------------------ the command
def first_prompts(prompts: PromptSet, n: int) -> PromptSet:
    """Return the first n prompts of each of the two groups that both programs can take."""
    return PromptSet({g: plain_prompts(prompts[g])[:n] for g in ("target", "control")})


def to_document(study: HereticStudy, base: Measurement, scored: dict[int, Measurement]) -> dict[str, Any]:
    """Return Heretic's results of its trials, and VERIFY's of exported ones, as plain data."""
    verified = {n: {k: s.model_dump() for k, s in m.scores.items() if "/" not in k} for n, m in scored.items()}
    return {
        "seconds": {"setup": study.setup_seconds, "trial": median(study.trial_seconds)},
        "base": {"refusals": study.base_refusals, **{k: s.value for k, s in base.scores.items() if "/" not in k}},
        "trials": [asdict(t) for t in study.trials],
        "front": [t.number for t in study.front],
        "neutral": verified,
        "machine": describe_machine(),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Run a study on the organism, export the member of its front with the fewest refusals, and measure it."""
    parser = make_parser(__doc__)
    parser.add_argument("--trials", type=int, default=3, help="trials of the study")
    parser.add_argument("--prompts", type=int, default=8, help="prompts of each group, to fit on and to judge on")
    parser.add_argument("--tokens", type=int, default=8, help="tokens of each answer")
    options = parser.parse_args(argv)
    if options.smoke:
        options.trials, options.prompts, options.tokens = 1, 2, 4
    splits = split_prompts(load_prompts("organism:astronomy", "organism:astronomy"), 0)
    fit, search, report = (first_prompts(part, options.prompts) for part in splits)
    model, settings = prepare_organism("astronomy"), StudySettings(options.tokens, options.trials)
    base = measure_with_verify(model, report)
    with tempfile.TemporaryDirectory(prefix="heretic-") as folder:
        work, edited = Path(folder) / "study", Path(folder) / "edited"
        if options.smoke and not is_installed():
            write_configuration(model, fit, search, settings, work)
            say("Heretic is not installed: this smoke run covers our side only")
            return
        say(f"{options.trials} trials …")
        study = run_heretic(model, fit, search, settings, work)
        best = min(study.front, key=lambda t: (t.refusals, t.kl))
        say(f"exporting trial {best.number} …")
        export_trial(study, best.number, edited)
        result = to_document(study, base, {best.number: measure_with_verify(edited, report, base, model)})
    print(json.dumps(result, indent=1) if options.json else format_result(result))


def format_result(result: dict[str, Any]) -> str:
    """Return the document as text."""
    lines = [f"set-up {result['seconds']['setup']:.1f} s, a trial {result['seconds']['trial']:.1f} s (median)"]
    lines += [f"trial {t['number']}: {t['refusals']} refusals, KL {t['kl']:.4f}" for t in result["trials"]]
    for number, scores in result["neutral"].items():
        values = ", ".join(f"{name} {scores[name]['value']:.4f}" for name in SCORES)
        lines.append(f"trial {number}, held out, by VERIFY: {values}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
