"""`informed` beside `two_directions` and `basic` on three organisms whose truth is known.

    python -m bench.informed [--quick | --smoke] [--json] [--only NAME]

astronomy refuses one topic. gardening-railways refuses two, each in its own words; both are target here, with the topic
as category. weather-late was trained in its last ten layers alone. Seconds are of all stages but the shared VERIFY
before. The last rows run each organism with the advice for the others, which shows what the measurements were worth.
--quick uses every second report prompt and answers of 24 tokens, and leaves these last rows out.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from bench.common import format_rows, make_parser, open_organism, say
from bench.methods import COLUMNS, Row, SharedBaseline, format_scores, make_row, measure_method, shorten_steps
from bench.organisms import shorten
from obliteratus.core.types import PromptSet, Subject
from obliteratus.pipeline.recipe import load_recipe, parse_recipe
from obliteratus.pipeline.run import run
from obliteratus.prompts import load_prompts

METHODS = ("basic", "two_directions", "informed")
TRUTH = {
    "astronomy": "one topic: one direction",
    "gardening-railways": "two refusals: two directions",
    "weather-late": "trained into blocks 20 to 29: edits there",
}
# A few cheap measurements, and one pass.
SMOKE_MEASURES = {"analyze.1.depths": 2, "analyze.1.prompts": 4, "analyze.1.answers": 4, "passes": 1}
TOPICS = {"gardening-railways": ("gardening", "railways")}


def load_organism_prompts(name: str) -> PromptSet:
    """Return the organism's prompts. Two topics are both target, alternating, and named by the category."""
    source = f"organism:{name}"
    if name not in TOPICS:
        return load_prompts(source, source)
    prompts = load_prompts(source, source, keep=source)
    pairs = zip(prompts["target"], prompts["keep"], strict=True)
    target = tuple(replace(p, category=t) for pair in pairs for p, t in zip(pair, TOPICS[name], strict=True))
    return PromptSet({"target": target, "control": prompts["control"]})


def measure_methods(
    subject: Subject, prompts: PromptSet, overrides: dict[str, Any], known: dict[str, Any], smoke: bool
) -> dict[str, Row]:
    """Return each method's row, and for `informed` what it decided."""
    rows = {}
    for name in METHODS[:-1]:
        say(f"{name} …")
        rows[name] = measure_method(load_recipe(name, overrides), subject, prompts, known)
    say("informed …")
    recipe = load_recipe("informed", overrides | (SMOKE_MEASURES if smoke else {}))
    result = run(recipe, subject, prompts, SharedBaseline(known), force=True)
    row = make_row(result.before, result.after, result.run.seconds, 0, len(result.run.passes))
    decided = {"advice": result.run.advice, "recipe": result.run.recipe.model_dump(mode="json")}
    return rows | {"informed": row | decided}


def format_table(rows_of: dict[str, dict[str, Row]]) -> str:
    """Return a row for each organism and method as a Markdown table, followed by the decisions of `informed`."""
    columns = ["organism", "method", *COLUMNS, "seconds", "of two_directions", "passes"]
    lines = []
    for organism, rows in rows_of.items():
        usual = sum(rows["two_directions"]["seconds"].values())
        for name, row in rows.items():
            seconds = sum(row["seconds"].values())
            lines.append(
                [organism, name, *format_scores(row), f"{seconds:.0f}", f"{seconds / usual:.2f}", str(row["passes"])]
            )
    decisions = [f"\n{name} ({TRUTH[name]}):\n{format_decisions(rows)}" for name, rows in rows_of.items()]
    return "\n".join([format_rows(columns, lines), *decisions])


def format_decisions(rows: dict[str, Row]) -> str:
    """Return a line for each decision: what was measured, its threshold, and what changed."""
    lines = []
    for reason in rows["informed"]["advice"]["reasons"]:
        value = "not measured" if reason["value"] is None else f"{reason['value']:.3g}"
        side = "≤" if reason["at_most"] else "≥"
        changes = json.dumps(reason["changes"]) if reason["changes"] else "unchanged"
        lines.append(f"- {reason['decides']}: {reason['measures']} {value} ({side} {reason['threshold']:g}): {changes}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table or the document."""
    parser = make_parser(__doc__, "use fewer and shorter answers, and no advice of other organisms")
    parser.add_argument("--only", default="", choices=["", *TRUTH], help="one organism")
    options = parser.parse_args(argv)
    chosen = [options.only] if options.only else list(TRUTH)[: 1 if options.smoke else None]
    overrides = shorten_steps(options.quick, options.smoke)
    rows: dict[str, dict[str, Row]] = {}
    prompts, known = {}, {name: dict[str, Any]() for name in chosen}
    for name in chosen:
        say(f"{name}:")
        prompts[name] = shorten(load_organism_prompts(name), options.quick, options.smoke)
        rows[name] = measure_methods(open_organism(name), prompts[name], overrides, known[name], options.smoke)
    if not options.quick and not options.smoke:
        for name in chosen:
            for other in chosen:
                if other != name:
                    say(f"{name} with the advice for {other} …")
                    advised = parse_recipe(rows[other]["informed"]["recipe"], other)
                    row = measure_method(advised, open_organism(name), prompts[name], known[name])
                    rows[name][f"advice for {other}"] = row
    print(json.dumps(rows, indent=1) if options.json else format_table(rows))


if __name__ == "__main__":
    main()
