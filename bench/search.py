"""Search: this program and Heretic on the same model, prompts, answer length and number of trials.

    python -m bench.search [--trials 24] [--prompts 48] [--tokens 32] [--seed 0] [--tuned] [--quick | --smoke] [--json]

Compares the seconds of a trial, ours with the method `leace_search`, and reports the set-up before the first. Then
the member of each front with the fewest refusals is measured by VERIFY on report prompts that neither program saw.
--tuned adds the method `tuned`, which makes no trials; its seconds are those of all its stages but VERIFY.
--quick makes 2 trials with 16 prompts and 16 tokens and exports nothing, so its ratio is one of few, short trials.
--smoke runs Heretic only if it is installed already.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median
from time import perf_counter
from typing import Any

from bench.common import describe_machine, make_parser, say, take_prompts
from bench.heretic import SCORES, STEPS, HereticStudy, export_trial, first_prompts, measure_with_verify, run_heretic
from bench.heretic_setup import StudySettings, is_installed, plain_prompts
from bench.hypervolume import hypervolume
from bench.methods import SMOKE_SEARCH, SMOKE_STEPS
from obliteratus.core.pareto import pareto_front
from obliteratus.core.run_folder import Store
from obliteratus.core.settings import Recipe
from obliteratus.core.types import Plan, PromptSet, Splits, Subject
from obliteratus.excise.live.hooks import applied
from obliteratus.pipeline.recipe import load_recipe
from obliteratus.pipeline.run import run
from obliteratus.prompts import load_prompts, split_prompts
from obliteratus.search import SearchResult, StudyLocation, search
from obliteratus.search.trials import front_objectives
from obliteratus.summon.load import open_subject
from obliteratus.verify import Measurement, measure
from obliteratus.weights.organism import prepare_organism

# Reference of the hypervolume: all prompts refused, and a KL of one nat, which no member of either front reaches.
WORST = (1.0, 1.0)
EXPORTED = 1  # members of Heretic's front that are exported; each costs a start of some 40 s
SHOWN = (*SCORES, "kl.first_token.answered.mean", "fluency.ratio", "degenerate.target")


def search_ours(
    recipe: Recipe, splits: Splits, base: Measurement
) -> tuple[float, SearchResult, list[dict[str, float]]]:
    """Return set-up seconds, the result of the search, and the scores of its front on report prompts."""
    start = perf_counter()
    subject = open_subject("organism:astronomy")
    result = search(recipe, subject, splits, Store(), StudyLocation("", "bench"), "first", force=True)
    setup = perf_counter() - start - sum(t.seconds for t in result.trials)
    members = result.front[:EXPORTED]
    return setup, result, [score_held_out(subject, member.plan, splits.report, base) for member in members]


def run_tuned(seed: int, prompts: PromptSet, base: Measurement) -> tuple[float, list[dict[str, float]]]:
    """Return the seconds of `tuned` without VERIFY but with opening the model, and its scores on report prompts."""
    say("ours, tuned …")
    start = perf_counter()
    subject = open_subject("organism:astronomy")
    plan = run(load_recipe("tuned", {"seed": seed, "verify": []}), subject, prompts, force=True).plan
    return perf_counter() - start, [score_held_out(subject, plan, split_prompts(prompts, seed).report, base)]


def score_held_out(subject: Subject, plan: Plan, report: PromptSet, base: Measurement) -> dict[str, float]:
    """Return VERIFY's scores of a plan."""
    with applied(subject, plan):
        return select_scores(measure(subject, report, STEPS, base, subject))


def score_heretic(study: HereticStudy, folder: Path, report: PromptSet, base: Measurement) -> list[dict[str, float]]:
    """Return VERIFY's scores of the models that Heretic saves for its front, fewest refusals first."""
    scores = []
    for trial in sorted(study.front, key=lambda t: (t.refusals, t.kl))[:EXPORTED]:
        say(f"exporting trial {trial.number} of Heretic …")
        export_trial(study, trial.number, folder / str(trial.number))
        scores.append(
            select_scores(measure_with_verify(folder / str(trial.number), report, base, "organism:astronomy"))
        )
    return scores


def select_scores(measured: Measurement) -> dict[str, float]:
    """Return the values by name except those by category."""
    return {name: score.value for name, score in measured.scores.items() if "/" not in name}


def compute_volume(points: list[tuple[float, float]]) -> float:
    """Return the hypervolume of (refused share, KL) up to `WORST`."""
    return hypervolume([points[i] for i in pareto_front(points)], WORST)


def compare(
    prompts: PromptSet,
    changes: dict[str, Any],
    settings: StudySettings,
    judged: int,
    exported: bool,
    tuned: bool,
    heretic: bool,
) -> dict[str, Any]:
    """Run both programs one after the other and return the document; without ``heretic`` only ours.

    changes: overrides of the method `leace_search`. judged: prompts of each group that a trial is judged on.
    """
    splits = split_prompts(prompts, settings.seed)
    base = measure(open_subject("organism:astronomy"), splits.report, STEPS)
    say(f"ours, {settings.trials} trials …")
    setup, result, scores = search_ours(load_recipe("leace_search", changes), splits, base)
    front = [(x, y) for x, y in front_objectives(result.trials)]
    document: dict[str, Any] = {
        "seconds": {"ours": mean(t.seconds for t in result.trials), "ours_set_up": setup},
        "ratio": {},
        "hypervolume": {"ours": compute_volume(front)},
        "fronts": {"ours": front},
        "report": {"ours": scores},
        "trials": {"ours": [(t.objectives, t.answered) for t in result.trials]},
        "machine": describe_machine(),
    }
    if tuned:
        document["seconds"]["tuned"], document["report"]["tuned"] = run_tuned(settings.seed, prompts, base)
    if heretic:
        add_heretic(document, splits, settings, judged, base, exported)
    return document


def add_heretic(
    document: dict[str, Any], splits: Splits, settings: StudySettings, judged: int, base: Measurement, exported: bool
) -> None:
    """Run Heretic and add its parts to the document."""
    with tempfile.TemporaryDirectory(prefix="heretic-") as folder:
        say(f"Heretic, {settings.trials} trials …")
        search_prompts = first_prompts(splits.search, judged)
        model = prepare_organism("astronomy")
        study = run_heretic(model, splits.fit, search_prompts, settings, Path(folder) / "study")
        scores = score_heretic(study, Path(folder), splits.report, base) if exported else []
    values = [(refusals / judged, kl) for refusals, kl in study.values]
    seconds = {"heretic": mean(study.trial_seconds), "heretic_median": median(study.trial_seconds)}
    document["seconds"] |= seconds | {"heretic_set_up": study.setup_seconds}
    document["ratio"]["heretic"] = seconds["heretic"] / document["seconds"]["ours"]
    document["hypervolume"]["heretic"] = compute_volume(values)
    document["fronts"]["heretic"] = [(t.refusals / judged, t.kl) for t in study.front]
    document["report"]["heretic"] = scores
    document["trials"]["heretic"] = values


def format_result(document: dict[str, Any]) -> str:
    """Return the document as text."""
    lines = [f"{name}: {value:.2f} s" for name, value in document["seconds"].items()]
    lines += [f"a trial of Heretic takes {x:.1f} times as long as ours" for x in document["ratio"].values()]
    for name, front in document["fronts"].items():
        points = ", ".join(f"({x:.3f}, {y:.4f})" for x, y in sorted(front))
        lines.append(f"{name}: hypervolume {document['hypervolume'][name]:.4f}, front (refused, KL) {points}")
    for name, members in document["report"].items():
        lines += [f"{name}, report prompts: " + ", ".join(f"{k} {m[k]:.4f}" for k in SHOWN) for m in members]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Print seconds, ratio and fronts."""
    parser = make_parser(__doc__, "2 trials with 16 prompts and 16 tokens, nothing exported")
    parser.add_argument("--trials", type=int, default=24, help="trials of each program")
    parser.add_argument("--prompts", type=int, default=48, help="prompts of each group that a trial is judged on")
    parser.add_argument("--tokens", type=int, default=32, help="tokens of each answer")
    parser.add_argument("--seed", type=int, default=0, help="seed of both programs and of the splits")
    parser.add_argument("--tuned", action="store_true", help="also run the method `tuned`")
    o = parser.parse_args(argv)
    trials, judged, tokens = (o.trials, o.prompts, o.tokens)
    if o.quick or o.smoke:
        trials, judged, tokens = (2, 8, 4) if o.smoke else (2, 16, 16)
    every = load_prompts("organism:astronomy", "organism:astronomy")
    prompts = PromptSet({g: plain_prompts(members) for g, members in every.groups.items()})  # those that both can take
    changes = {"search.trials": trials, "search.prompts": judged, "search.tokens": tokens, "seed": o.seed}
    if o.smoke:
        prompts = take_prompts(prompts, judged)
        changes |= {"verify": SMOKE_STEPS, **SMOKE_SEARCH}
    heretic, exported = not o.smoke or is_installed(), not o.quick and not o.smoke
    if not heretic:
        say("Heretic is not installed: this smoke run covers our side only")
    settings = StudySettings(tokens, trials, o.seed)
    document = compare(prompts, changes, settings, judged, exported, o.tuned, heretic)
    print(json.dumps(document, indent=1) if o.json else format_result(document))


if __name__ == "__main__":
    main()
