"""Every method on organisms: what it removes, what that costs and which of its parts acted, beside control rows.

    python -m bench.methods [--quick | --smoke] [--json] [--only NAME,NAME] [--organisms NAME [NAME …]]

Without --organisms all run on astronomy, and a method that has no effect there on one that it is made for
(`ORGANISM_OF`). A row is a method or a control: a random direction, `reflected` at strength 1, and `basic` where one of
two refusals is to be kept. With --organisms (`bench.organisms` says how they are called) every method runs on each, and
a random direction beside them. Methods that search run as searches. --quick uses every second report prompt, answers of
24 tokens and 8 trials, and leaves out the methods that take minutes (`SLOW`). --smoke runs few rows on few prompts.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from bench.common import SMOKE_PROMPTS, SPLITS, format_rows, make_parser, run_with_peak, say
from bench.organisms import ASTRONOMY, TWO_TOPICS, choose_prompts, find_role, load_organism
from bench.parts import list_parts
from obliteratus.core.errors import UserError
from obliteratus.core.results import Score
from obliteratus.core.run_folder import Store
from obliteratus.core.settings import Recipe
from obliteratus.core.types import PromptSet, Subject
from obliteratus.distill.steps import orthonormalize
from obliteratus.excise.plan import plan_edits
from obliteratus.pipeline.presets import list_methods
from obliteratus.pipeline.recipe import check_runs, load_recipe
from obliteratus.pipeline.run import RunResult, run
from obliteratus.pipeline.stages import Stages
from obliteratus.prompts import split_prompts
from obliteratus.rebirth.model_card import format_score
from obliteratus.search import SearchResult, StudyLocation, search
from obliteratus.verify import Measurement
from obliteratus.weigh import weigh_sites

T = TypeVar("T")
Overrides = dict[str, Any]
Row = dict[str, Any]
SHARED = ("ANSWERS", "VERIFY before")  # stages of the unedited model, the same for every method
ORGANISM_OF = {name: TWO_TOPICS for name in ("calibrated", "calibrated_search")}
ORGANISM_OF["reinforce"] = f"{ASTRONOMY}@0.65"  # with 0.65 half of the topic is refused
SLOW = ("rdo", "failspy")
KEEP_SCORE = "refusal.keep"
COLUMNS = (
    *("refusal.target", "refusal.control", "degenerate.target", "degenerate.control", "fluency.ratio"),
    *("kl.first_token.answered.mean", "kl.first_token.mean", "kl.first_token.p95"),
    *("kl.continuation.mean", "perplexity.ratio"),
)
QUICK_TRIALS, SMOKE_TRIALS = 8, 2
SHORT_STEPS = [
    {"use": "behavior", "tokens": 24},
    *({"use": name} for name in ("first_token_kl", "continuation_kl", "perplexity", "fluency")),
]
SMOKE_STEPS: list[dict[str, Any]] = [{"use": "behavior", "tokens": 4}, {"use": "first_token_kl"}]
# With few prompts a single refusal or loop would exceed the usual margin, and no trial would be feasible.
SMOKE_SEARCH = {
    "search.prompts": SMOKE_PROMPTS,
    "search.tokens": 4,
    "search.control_margin": 1.0,
    "search.degenerate_margin": 1.0,
}


class Case(NamedTuple):
    """What a row runs."""

    method: str
    changes: Overrides
    organism: str


CONTROLS = {
    "reflected at strength 1": Case("reflected", {"excise.strength": 1.0}, ASTRONOMY),
    "basic on two topics": Case("basic", {}, TWO_TOPICS),
}
SMOKE_ROWS = ("basic", "heretic", "basic on two topics")


class SharedBaseline(Store):
    """A store that takes the baseline from ``known``, and puts it there if it is missing."""

    def __init__(self, known: dict[str, Any]) -> None:
        super().__init__()
        self.known = known

    def stage(self, name: str, make: Callable[[], T], save: Callable[[T, Path], None], load: Callable[[Path], T]) -> T:
        """Return the result of a stage."""
        if name not in SHARED:
            return super().stage(name, make, save, load)
        if name not in self.known:
            self.known[name] = super().stage(name, make, save, load)
        baseline: T = self.known[name]
        return baseline


def shorten_steps(quick: bool, smoke: bool) -> Overrides:
    """Return the scorers of a --quick or --smoke run."""
    return {"verify": SMOKE_STEPS if smoke else SHORT_STEPS} if quick or smoke else {}


def measure_method(recipe: Recipe, subject: Subject, prompts: PromptSet, known: dict[str, Any]) -> Row:
    """Return one method's row, or why it was refused. A method with a search runs as one."""
    store = SharedBaseline(known)
    try:
        recipe = check_runs(recipe, prompts.groups)
        if recipe.search is None:
            _, peak, result = run_with_peak(lambda: run(recipe, subject, prompts, store, force=True))
            return make_row(result.before, result.after, store.seconds, peak, len(result.run.passes)) | _parts_of(
                result, subject
            )
        splits = split_prompts(prompts, recipe.seed, recipe.uses_search_split, force=True)
        location = StudyLocation("", "bench")
        _, peak, result = run_with_peak(lambda: search(recipe, subject, splits, store, location, force=True))
    except UserError as error:
        return {"refused": str(error)}
    seconds = {**store.seconds, "SEARCH": sum(trial.seconds for trial in result.trials)}
    return (
        make_row(result.before, result.after, seconds, peak, 1)
        | {"trials": len(result.trials)}
        | _parts_of(result, subject)
    )


def _parts_of(result: RunResult | SearchResult, subject: Subject) -> Row:
    return {"parts": list_parts(result.plan, result.run, subject)}


def make_row(before: Measurement, after: Measurement, seconds: Mapping[str, float], peak: int, passes: int) -> Row:
    """Return what the document holds of a method."""
    scores = [{k: v.model_dump() for k, v in m.scores.items() if "/" not in k} for m in (before, after)]
    spent = {k: v for k, v in seconds.items() if k not in SHARED}
    return {"before": scores[0], "after": scores[1], "seconds": spent, "peak_bytes": peak, "passes": passes}


def measure_random_direction(recipe: Recipe, subject: Subject, prompts: PromptSet, known: dict[str, Any]) -> Row:
    """Return the control row: the recipe with random directions of the rank of those that it finds."""
    splits = split_prompts(prompts, recipe.seed, force=True)
    stages = Stages(subject, splits, SharedBaseline(known), force=True).screened(recipe)

    def measure() -> tuple[Measurement, Measurement]:
        acts = stages.probe(1, recipe)
        found = stages.distill(1, recipe, acts)
        noise = torch.randn(found.basis.shape, generator=torch.Generator().manual_seed(0))
        drawn = replace(found, basis=orthonormalize(noise * (found.basis.norm(dim=-1, keepdim=True) > 0)))
        plan = plan_edits(subject, drawn, weigh_sites(drawn, subject.sites, acts, recipe.weigh), acts, recipe.excise)
        return stages.measure_after(recipe, plan, stages.measure_before(recipe))

    _, peak, (before, after) = run_with_peak(measure)
    return make_row(before, after, stages.store.seconds, peak, 1)


def choose_cases(only: str, organisms: Sequence[str], quick: bool, smoke: bool) -> dict[str, Case]:
    """Return what to run by row. Rows of one organism follow each other, since each organism takes memory."""
    known = {name: Case(name, {}, ORGANISM_OF.get(name, ASTRONOMY)) for name in list_methods()} | CONTROLS
    if only or smoke:
        cases = {name: known[name] for name in (only.split(",") if only else SMOKE_ROWS)}
    else:
        cases = {name: case for name, case in known.items() if not quick or name not in SLOW}
    if organisms:
        methods = {name: case for name, case in cases.items() if name not in CONTROLS}
        return {name_row(n, o): case._replace(organism=o) for o in organisms for n, case in methods.items()}
    return dict(sorted(cases.items(), key=lambda item: item[1].organism))


def name_row(name: str, organism: str) -> str:
    """Return the name of a row where methods run on several organisms."""
    return f"{name} on {organism}"


def load_case(case: Case, behavior: str, quick: bool, smoke: bool) -> Recipe:
    """Return the recipe of a row, shortened if asked for."""
    changes = shorten_steps(quick, smoke) | {"judge.behavior": behavior} | case.changes
    recipe = load_recipe(case.method, changes)
    if recipe.search is None or not (quick or smoke):
        return recipe
    shorter = {"search.trials": SMOKE_TRIALS, **SMOKE_SEARCH} if smoke else {"search.trials": QUICK_TRIALS}
    return load_recipe(case.method, changes | shorter)


def run_case(name: str, case: Case, quick: bool, smoke: bool) -> Row:
    """Return the row of a method or control."""
    say(f"{name} …")
    organism = load_organism(case.organism, quick, smoke)
    recipe = load_case(case, organism.behavior, quick, smoke)
    prompts = organism.prompts if name in CONTROLS else choose_prompts(organism.prompts, recipe)
    row = measure_method(recipe, organism.subject, prompts, organism.share_baseline(prompts))
    row |= describe_organism(case.organism, organism.behavior)
    say(format_line(row))
    return row


def run_random(name: str, quick: bool, smoke: bool) -> Row:
    """Return the row of random directions in the layers of `two_directions`, on an organism."""
    say(f"random on {name} …")
    organism = load_organism(name, quick, smoke)
    recipe = load_case(Case("two_directions", {}, name), organism.behavior, quick, smoke)
    prompts = choose_prompts(organism.prompts, recipe)
    row = measure_random_direction(recipe, organism.subject, prompts, organism.share_baseline(prompts))
    return row | describe_organism(name, organism.behavior)


def describe_organism(name: str, behavior: str) -> Row:
    """Return what a row says of its organism."""
    return {"organism": name, "role": find_role(name), "behavior": behavior}


# ------------------------------------------------------------------------------------------ output
def format_table(rows: dict[str, Row], several: bool = False) -> str:
    """Return the rows as a Markdown table, followed by the seconds of stages and by other organisms' rows.

    several: whether each method ran on each organism, which then has a column, as has its role.
    """
    scores = [name.replace("refusal", "behavior") for name in COLUMNS] if several else COLUMNS
    columns = [*_heads(several), *scores, "seconds", "peak MB", "passes", "parts"]
    lines = []
    for name, row in rows.items():
        heads = [name.partition(" on ")[0], row["organism"], row["role"]] if several else [name]
        if "refused" in row:
            lines.append([*heads, row["refused"], *[""] * (len(columns) - len(heads) - 1)])
            continue
        seconds, peak = sum(row["seconds"].values()), row["peak_bytes"] / 1e6
        spent = [f"{seconds:.0f}", f"{peak:.0f}", str(row["passes"])]
        lines.append([*heads, *format_scores(row), *spent, ", ".join(row.get("parts", []))])
    others = [] if several else format_other_organisms(rows)
    return "\n".join([format_rows(columns, lines), "", *format_stages(rows), "", *others])


def _heads(several: bool) -> list[str]:
    return ["method", "organism", "role"] if several else ["method"]


def format_scores(row: Row) -> list[str]:
    """Return the scores after the edit in the order of `COLUMNS`, those of the row's behavior instead of refusal."""
    names = [c.replace("refusal", row.get("behavior", "refusal")) for c in COLUMNS]
    return [format_score(Score(**row["after"][c]) if c in row["after"] else None) for c in names]


def format_line(row: Row) -> str:
    """Return a row as a line of text, which is shown when its method has run."""
    if "refused" in row:
        return str(row["refused"])
    scores = [f"{c} {s}" for c, s in zip(COLUMNS, format_scores(row), strict=True)]
    return f"{', '.join(scores)}; {sum(row['seconds'].values()):.0f} s; {', '.join(row.get('parts', []))}"


def format_stages(rows: dict[str, Row]) -> list[str]:
    """Return a line for each row with the seconds by stage, all passes together, and the trials of a search."""
    lines = []
    for name, row in rows.items():
        spent: dict[str, float] = defaultdict(float)
        for stage, seconds in row.get("seconds", {}).items():
            spent[stage.split()[0]] += seconds
        trials = f" ({row['trials']} trials)" if "trials" in row else ""
        lines += [f"{name}: " + ", ".join(f"{k} {v:.1f} s" for k, v in spent.items()) + trials] if spent else []
    return lines


def format_other_organisms(rows: dict[str, Row]) -> list[str]:
    """Return a line with before and after for each row on another organism, kept refusals included."""
    lines = []
    for name, row in rows.items():
        if row.get("organism", ASTRONOMY) != ASTRONOMY and "refused" not in row:
            before, after = (
                {k: format_score(Score(**v)) for k, v in row[when].items()} for when in ("before", "after")
            )
            changes = [f"{c} {before.get(c, '–')} → {after[c]}" for c in (*COLUMNS[:2], KEEP_SCORE) if c in after]
            lines.append(f"{name} on {row['organism']}: " + "; ".join(changes))
    return lines


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table or the document."""
    parser = make_parser(__doc__, "use fewer and shorter answers, and leave out slow methods")
    parser.add_argument("--only", default="", help="rows (methods or controls) separated by commas")
    parser.add_argument("--organisms", nargs="+", default=[], help="run every method on each of these")
    options = parser.parse_args(argv)
    quick, smoke, several = options.quick or options.smoke, options.smoke, bool(options.organisms)
    cases = choose_cases(options.only, options.organisms, quick, smoke)
    rows = {name: run_case(name, case, quick, smoke) for name, case in cases.items()}
    for organism in options.organisms or [ASTRONOMY]:
        rows[name_row("random", organism) if several else "random"] = run_random(organism, quick, smoke)
    document = {"methods": rows, "shortened": _shortened(quick, smoke)}
    print(json.dumps(document, indent=1) if options.json else format_table(rows, several))


def _shortened(quick: bool, smoke: bool) -> Row:
    if smoke:
        return {"prompts": f"{SMOKE_PROMPTS} of each of {', '.join(SPLITS)}", "tokens": 4, "trials": SMOKE_TRIALS}
    if quick:
        return {"report": "every second prompt", "tokens": 24, "trials": QUICK_TRIALS, "left out": SLOW}
    return {}


if __name__ == "__main__":
    main()
