"""Search: this program and Heretic on the same model, prompts, token budget and number of trials, in one run.

    python -m bench.search [--trials 24] [--prompts 48] [--tokens 32] [--seed 0] [--tuned] [--quick] [--json]

Seconds a trial of both, ours over the method `optimized`; set-up before the first trial apart. --tuned: beside them the
method `tuned`, which makes no trials: its seconds are of all its stages but VERIFY. Then each front's
member with the fewest refusals is measured by VERIFY on report prompts that neither saw. --quick: 2 trials, 16
prompts, 16 tokens, nothing exported; the ratio is then of few and short trials.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from statistics import mean, median
from time import perf_counter
from typing import Any

from bench.common import describe_machine, say
from bench.heretic import SCORES, STEPS, Study, export_trial, first_prompts, measure_with_verify, run_heretic_study
from bench.heretic_setup import Terms, plain_prompts
from bench.hypervolume import hypervolume
from obliteratus.core.run_folder import Store
from obliteratus.core.settings import Recipe
from obliteratus.core.types import Plan, PromptSet, Subject
from obliteratus.excise.live.hooks import applied
from obliteratus.pipeline.recipe import load_recipe
from obliteratus.pipeline.run import run
from obliteratus.prompts import load_prompts
from obliteratus.search import SearchResult, StudyLocation, search
from obliteratus.search.pareto import pareto_front
from obliteratus.search.trials import front_objectives
from obliteratus.summon.load import open_subject
from obliteratus.verify import Measurement, measure
from obliteratus.weights.organism import prepare_organism

WORST = (1.0, 1.0)  # of the hypervolume: all refused, and a KL of one nat, which no member of either front reaches
EXPORTED = 1  # members of Heretic's front: each costs it a start of some 40 s


def search_ours(
    made: Recipe, prompts: PromptSet, base: Measurement
) -> tuple[float, SearchResult, list[dict[str, float]]]:
    """Set-up seconds, what the search found, and what VERIFY says of its front on report prompts."""
    began = perf_counter()
    subject = open_subject("organism:astronomy")
    found = search(made, subject, prompts.split(made.seed), Store(), StudyLocation("", "bench"), "first")
    spent = perf_counter() - began - sum(t.seconds for t in found.trials)
    told = [
        score_held_out(subject, member.plan, prompts.split(made.seed).report, base) for member in found.front[:EXPORTED]
    ]
    return spent, found, told


def run_tuned(seed: int, prompts: PromptSet, base: Measurement) -> tuple[float, list[dict[str, float]]]:
    """Seconds of `tuned` without VERIFY, opening the model included; and what VERIFY says on report prompts."""
    say("ours, tuned …")
    began = perf_counter()
    subject, store = open_subject("organism:astronomy"), Store()
    plan, _, *_ = run(load_recipe("tuned", {"seed": seed, "verify": []}), subject, prompts, store)
    return perf_counter() - began, [score_held_out(subject, plan, prompts.split(seed).report, base)]


def score_held_out(subject: Subject, plan: Plan, report: PromptSet, base: Measurement) -> dict[str, float]:
    """What VERIFY says of a plan."""
    with applied(subject, plan):
        return select_scores(measure(subject, report, STEPS, base, subject))


def score_heretic(study: Study, folder: Path, report: PromptSet, base: Measurement) -> list[dict[str, float]]:
    """What VERIFY says on report prompts of the models that Heretic saves of its front, fewest refusals first."""
    chosen = sorted(study.front, key=lambda t: (t.refusals, t.kl))[:EXPORTED]
    told = []
    for trial in chosen:
        say(f"Heretic's trial {trial.number} exported …")
        export_trial(study, trial.number, folder / str(trial.number))
        told.append(select_scores(measure_with_verify(folder / str(trial.number), report, base, "organism:astronomy")))
    return told


def select_scores(found: Measurement) -> dict[str, float]:
    """By name, those by category left out."""
    return {name: score.value for name, score in found.scores.items() if "/" not in name}


def compute_volume(points: list[tuple[float, float]]) -> float:
    """Hypervolume of (refused share, KL), up to `WORST`."""
    return hypervolume([points[i] for i in pareto_front(points)], WORST)


def compare(trials: int, prompts: int, tokens: int, seed: int, exported: bool, tune: bool) -> dict[str, Any]:
    """Both programs, one after the other."""
    every = load_prompts("organism:astronomy", "organism:astronomy")
    whole = PromptSet(
        {group: plain_prompts(members) for group, members in every.groups.items()}
    )  # what both can be given
    fit, held, report = whole.split(seed)
    change = {"search.trials": trials, "search.prompts": prompts, "search.tokens": tokens, "seed": seed}
    base = measure(open_subject("organism:astronomy"), report, STEPS)
    say(f"ours, {trials} trials …")
    set_up, found, own = search_ours(load_recipe("optimized", change), whole, base)
    tuned_seconds, tuned = run_tuned(seed, whole, base) if tune else (0.0, [])
    with tempfile.TemporaryDirectory(prefix="heretic-") as folder:
        say(f"Heretic, {trials} trials …")
        terms = Terms(tokens, trials, seed)
        study = run_heretic_study(
            prepare_organism("astronomy"), fit, first_prompts(held, prompts), terms, Path(folder) / "study"
        )
        other = score_heretic(study, Path(folder), report, base) if exported else []
    seconds = {"ours": mean(t.seconds for t in found.trials), "heretic": mean(study.trial_seconds)}
    values = [(r / prompts, k) for r, k in study.values]
    return {
        "seconds": {
            **seconds,
            "heretic_median": median(study.trial_seconds),
            "ours_set_up": set_up,
            "heretic_set_up": study.setup_seconds,
            "tuned": tuned_seconds,
        },
        "ratio": {"heretic": seconds["heretic"] / seconds["ours"]},
        "hypervolume": {
            "ours": compute_volume([(x, y) for x, y in front_objectives(found.trials)]),
            "heretic": compute_volume(values),
        },
        "fronts": {
            "ours": front_objectives(found.trials),
            "heretic": [(t.refusals / prompts, t.kl) for t in study.front],
        },
        "report": {"ours": own, "tuned": tuned, "heretic": other},
        "trials": {"ours": [(t.objectives, t.answered) for t in found.trials], "heretic": values},
        "machine": describe_machine(),
    }


def format_result(result: dict[str, Any]) -> str:
    """For people."""
    seconds = result["seconds"]
    lines = [f"{name}: {value:.2f} s" for name, value in seconds.items()]
    lines.append(f"a trial of Heretic's takes {result['ratio']['heretic']:.1f} times ours")
    for name, front in result["fronts"].items():
        points = ", ".join(f"({x:.3f}, {y:.4f})" for x, y in sorted(front))
        lines.append(f"{name}: hypervolume {result['hypervolume'][name]:.4f}, front (refused, KL) {points}")
    for name, members in result["report"].items():
        lines += [f"{name}, report prompts: " + ", ".join(f"{k} {m[k]:.4f}" for k in KEYS) for m in members]
    return "\n".join(lines)


KEYS = (*SCORES, "kl.first_token.answered.mean", "fluency.ratio", "degenerate.target")


def main() -> None:
    """Print seconds, ratio and fronts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("trials", 24), ("prompts", 48), ("tokens", 32), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=value)
    for name in ("tuned", "quick", "json"):
        parser.add_argument(f"--{name}", action="store_true")
    o = parser.parse_args()
    trials, prompts, tokens = (2, 16, 16) if o.quick else (o.trials, o.prompts, o.tokens)
    result = compare(trials, prompts, tokens, o.seed, not o.quick, o.tuned)
    print(json.dumps(result, indent=1) if o.json else format_result(result))


if __name__ == "__main__":
    main()
