"""`informed` beside `advanced` and `basic` on three organisms whose truth is known. One run, one baseline an organism.

    python -m bench.informed [--quick] [--json] [--only NAME]

astronomy refuses one topic; gardening-railways two, each in words of its own, here both as target with the topic as
category; weather-late was trained in its last ten layers alone. Seconds are of all stages but the shared VERIFY before.
Last rows: each organism under the other ones' advice, which says what the measurements were worth.
--quick: every second report prompt, answers of 24 tokens, no foreign advice.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from typing import Any

from bench.common import say
from bench.methods import COLUMNS, SHORT, Sharing, halved, one
from obliteratus.core.results import Score
from obliteratus.core.types import PromptSet, Subject
from obliteratus.pipeline.recipe import load_recipe, parse_recipe
from obliteratus.pipeline.run import run
from obliteratus.prompts import load_prompts
from obliteratus.rebirth.model_card import format_score
from obliteratus.summon.load import open_subject

METHODS = ("basic", "advanced", "informed")
TRUTH = {
    "astronomy": "one topic: one direction",
    "gardening-railways": "two refusals: two directions",
    "weather-late": "trained into blocks 20 to 29: edits there",
}
TOPICS = {"gardening-railways": ("gardening", "railways")}


def prompts_of(name: str) -> PromptSet:
    """The organism's prompts; of two topics both are target, in turn, and the category is the topic."""
    source = f"organism:{name}"
    if name not in TOPICS:
        return load_prompts(source, source)
    found = load_prompts(source, source, keep=source)
    both = zip(found["target"], found["keep"], strict=True)
    target = tuple(replace(p, category=t) for pair in both for p, t in zip(pair, TOPICS[name], strict=True))
    return PromptSet({"target": target, "control": found["control"]})


def measured(subject: Subject, prompts: PromptSet, overrides: dict[str, Any]) -> dict[str, Any]:
    """Each method's row, and of `informed` what it decided."""
    known: dict[str, Any] = {}
    rows = {}
    for name in METHODS[:-1]:
        say(f"{name} …")
        rows[name] = one(load_recipe(name, overrides), subject, prompts, known)
    say("informed …")
    store = Sharing(known)
    _, found, *_ = run(load_recipe("informed", overrides), subject, prompts, store)
    rows["informed"] = {
        "before": plain(found.before),
        "after": plain(found.after),
        "seconds": {k: v for k, v in found.seconds.items() if k != "VERIFY before"},
        "passes": len(found.passes),
        "advice": found.advice,
        "recipe": found.recipe.model_dump(mode="json"),
    }
    return {"rows": rows, "known": known}


def plain(scores: Any) -> dict[str, Any]:
    """Scores but those by category, as data."""
    return {name: score.model_dump() for name, score in scores.items() if "/" not in name}


def seconds(row: dict[str, Any]) -> float:
    """Of all stages but the shared baseline."""
    return float(sum(row["seconds"].values()))


def table(found: dict[str, Any]) -> str:
    """Markdown: a line for each organism and method, then what was decided by which number."""
    heads = ["organism", "method", *COLUMNS, "seconds", "of advanced", "passes"]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for organism, rows in found.items():
        base = seconds(rows["advanced"])
        for name, row in rows.items():
            scores = [format_score(Score(**row["after"][c])) for c in COLUMNS]
            spent = f"{seconds(row):.0f} | {seconds(row) / base:.2f} | {row['passes']}"
            lines.append(f"| {organism} | {name} | {' | '.join(scores)} | {spent} |")
    return "\n".join([*lines, *(f"\n{name} ({TRUTH[name]}):\n{decisions(rows)}" for name, rows in found.items())])


def decisions(rows: dict[str, Any]) -> str:
    """Each reason in a line."""
    lines = []
    for reason in rows["informed"]["advice"]["reasons"]:
        value = "not measured" if reason["value"] is None else f"{reason['value']:.3g}"
        side = "≤" if reason["at_most"] else "≥"
        changes = json.dumps(reason["changes"]) if reason["changes"] else "as it was"
        lines.append(f"- {reason['decides']}: {reason['measures']} {value} ({side} {reason['threshold']:g}): {changes}")
    return "\n".join(lines)


def main() -> None:
    """Print the table, or the document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--only", default="", choices=["", *TRUTH])
    options = parser.parse_args()
    chosen = [options.only] if options.only else list(TRUTH)
    found: dict[str, Any] = {}
    models = {}
    for name in chosen:
        say(f"{name}:")
        subject, prompts = open_subject(f"organism:{name}"), prompts_of(name)
        prompts = halved(prompts) if options.quick else prompts
        models[name] = (subject, prompts, measured(subject, prompts, {"verify": SHORT} if options.quick else {}))
        found[name] = models[name][2]["rows"]
    if not options.quick:
        for name in chosen:
            subject, prompts, own = models[name]
            for other in chosen:
                if other != name:
                    say(f"{name} under the advice for {other} …")
                    advised = parse_recipe(found[other]["informed"]["recipe"], other)
                    found[name][f"advice for {other}"] = one(advised, subject, prompts, own["known"])
    print(json.dumps(found, indent=1) if options.json else table(found))


if __name__ == "__main__":
    main()
