"""Every method on the organism: what it removes, what it costs, beside its controls. One run, one baseline a model.

    python -m bench.methods [--quick] [--json] [--only NAME,NAME]

Rows are methods, and controls: a random direction; reflection's own edit at strength 1; basic where one of two refusals
is to be kept. A method that shows nothing on the astronomy organism runs on one that it is for (`ON`).
--quick reads every second report prompt and answers of 24 tokens, and leaves out what takes minutes (`SLOW`).
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, TypeVar

import torch

from bench.common import say, with_peak
from obliteratus.core.errors import UserError
from obliteratus.core.results import Score
from obliteratus.core.run_folder import Store
from obliteratus.core.settings import Recipe
from obliteratus.core.types import PromptSet, Subject
from obliteratus.distill import find_directions
from obliteratus.distill.steps import orthonormalize
from obliteratus.excise.live.hooks import applied
from obliteratus.excise.plan import plan_edits
from obliteratus.pipeline.offloaded import measured
from obliteratus.pipeline.recipe import check_runs, list_methods, load_recipe
from obliteratus.pipeline.run import probed, run
from obliteratus.prompts import load_prompts
from obliteratus.rebirth.model_card import format_score
from obliteratus.summon.load import open_subject
from obliteratus.verify import Measurement
from obliteratus.weigh import weigh_sites

T = TypeVar("T")
BASELINE = "VERIFY before"
ASTRONOMY, TWO_TOPICS = "astronomy", "gardening-railways"
ON = {"calibrated": TWO_TOPICS, "reinforce": f"{ASTRONOMY}@0.65"}  # the share at which half of the topic is refused
CONTROLS: dict[str, tuple[str, dict[str, Any], str]] = {
    "inverted, strength 1": ("inverted", {"excise.strength": 1.0}, ASTRONOMY),
    "basic, two topics": ("basic", {}, TWO_TOPICS),
}
SLOW = ("rdo", "failspy")
KEPT = "refusal.keep"
COLUMNS = ("refusal.target", "refusal.control", "kl.first_token.mean", "kl.first_token.p95", "perplexity.ratio")
SHORT = [{"use": "refusal", "tokens": 24}, {"use": "first_token_kl"}, {"use": "perplexity"}]


class Sharing(Store):
    """A store that keeps the baseline of the first method for all others."""

    def __init__(self, known: dict[str, Any]) -> None:
        super().__init__()
        self.known = known

    def stage(self, name: str, make: Callable[[], T], save: Any, load: Any) -> T:
        """``make()``, except for a baseline that is known."""
        if name == BASELINE and name in self.known:
            kept: T = self.known[name]
            self.values[name] = kept
            return kept
        value: T = super().stage(name, make, save, load)
        if name == BASELINE:
            self.known[name] = value
        return value


def halved(prompts: PromptSet) -> PromptSet:
    """Every second report prompt; fit and search whole."""
    groups = {}
    for name, members in prompts.groups.items():
        held = [p for p in members if p.split == "report"]
        groups[name] = (*(p for p in members if p.split != "report"), *held[::2])
    return PromptSet(groups)


def one(made: Recipe, subject: Subject, prompts: PromptSet, known: dict[str, Any]) -> dict[str, Any]:
    """One method's row, or why it was refused."""
    try:
        check_runs(made, prompts.groups)
    except UserError as error:
        return {"refused": str(error)}
    _, peak, (_, found) = with_peak(lambda: run(made, subject, prompts, Sharing(known)))
    return row(found.before, found.after, found.seconds, peak, len(found.passes))


def row(
    before: Mapping[str, Score], after: Mapping[str, Score], seconds: Mapping[str, float], peak: int, passes: int
) -> dict[str, Any]:
    """What the document holds of a method."""
    scores = [{k: v.model_dump() for k, v in s.items() if "/" not in k} for s in (before, after)]
    spent = {k: v for k, v in seconds.items() if k != BASELINE}
    return {"before": scores[0], "after": scores[1], "seconds": spent, "peak_bytes": peak, "passes": passes}


def chance(made: Recipe, subject: Subject, prompts: PromptSet, known: dict[str, Any]) -> dict[str, Any]:
    """A recipe with random directions of the same rank in place of those it finds: the control row."""
    fit, _, report = prompts.split(made.seed)
    store = Sharing(known)

    def measure() -> tuple[Measurement, Measurement]:
        acts = probed(store, "PROBE", subject, fit, made)
        found = find_directions(acts, made.distill)
        noise = torch.randn(found.basis.shape, generator=torch.Generator().manual_seed(0))
        drawn = replace(found, basis=orthonormalize(noise * (found.basis.norm(dim=-1, keepdim=True) > 0)))
        plan = plan_edits(subject, drawn, weigh_sites(drawn, subject.sites, acts, made.weigh), acts, made.excise)
        before = measured(store, BASELINE, subject, report, made.verify)
        with applied(subject, plan):
            return before, measured(store, "VERIFY after", subject, report, made.verify, before)

    _, peak, (before, after) = with_peak(measure)
    return row(before.scores, after.scores, store.seconds, peak, 1)


@dataclass
class Model:
    """An organism with its prompts and the baseline that its rows share."""

    subject: Subject
    prompts: PromptSet
    known: dict[str, Any] = field(default_factory=dict)


@cache
def opened(name: str, quick: bool) -> Model:
    """The organism, opened once; the second one's kept topic is the group keep."""
    source = f"organism:{name.partition('@')[0]}"
    prompts = load_prompts(source, source, keep=source if name == TWO_TOPICS else None)
    return Model(open_subject(f"organism:{name}"), halved(prompts) if quick else prompts)


def wanted(only: str, quick: bool) -> dict[str, tuple[str, dict[str, Any], str]]:
    """Row → method, what is changed of it, and the organism; grouped by organism, since each takes memory."""
    shown_now = [name for name in list_methods() if not quick or name not in SLOW]
    chosen: dict[str, tuple[str, dict[str, Any], str]] = {
        n: (n, {}, ON.get(n, ASTRONOMY)) for n in shown_now
    } | CONTROLS
    if only:
        chosen = {name: (name, {}, ON.get(name, ASTRONOMY)) for name in only.split(",")}
    return dict(sorted(chosen.items(), key=lambda item: item[1][2]))


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Markdown."""
    heads = ["method", *COLUMNS, "seconds", "peak MB", "passes"]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for name, found in rows.items():
        if "refused" in found:
            lines.append(f"| {name} | {found['refused']} |" + " |" * (len(heads) - 2))
            continue
        scores = [format_score(Score(**found["after"][c])) for c in COLUMNS]
        spent = f"{sum(found['seconds'].values()):.0f} | {found['peak_bytes'] / 1e6:.0f} | {found['passes']}"
        lines.append(f"| {name} | {' | '.join(scores)} | {spent} |")
    return "\n".join([*lines, "", *stages(rows), "", *others(rows)])


def stages(rows: dict[str, dict[str, Any]]) -> list[str]:
    """Seconds by stage, the same of all passes together."""
    lines = []
    for name, found in rows.items():
        spent: dict[str, float] = defaultdict(float)
        for stage, seconds in found.get("seconds", {}).items():
            spent[stage.split()[0]] += seconds
        lines += [f"{name}: " + ", ".join(f"{k} {v:.1f} s" for k, v in spent.items())] if spent else []
    return lines


def others(rows: dict[str, dict[str, Any]]) -> list[str]:
    """Before and after of the rows whose organism is not the first, kept refusals included."""
    lines = []
    for name, found in rows.items():
        if found.get("organism", ASTRONOMY) != ASTRONOMY:
            both = [{k: format_score(Score(**v)) for k, v in found[when].items()} for when in ("before", "after")]
            told = [f"{c} {both[0].get(c, '–')} → {both[1][c]}" for c in (*COLUMNS[:2], KEPT) if c in both[1]]
            lines.append(f"{name} on {found['organism']}: " + "; ".join(told))
    return lines


def main() -> None:
    """Print the table, or the document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--only", default="", help="methods, separated by commas")
    options = parser.parse_args()
    overrides = {"verify": SHORT} if options.quick else {}
    rows = {}
    for name, (method, changes, where) in wanted(options.only, options.quick).items():
        say(f"{name} …")
        model = opened(where, options.quick)
        rows[name] = one(load_recipe(method, overrides | changes), model.subject, model.prompts, model.known)
        rows[name]["organism"] = where
    say("random …")
    model = opened(ASTRONOMY, options.quick)
    rows["random"] = chance(load_recipe("advanced", overrides), model.subject, model.prompts, model.known)
    shortened = {"report": "every second prompt", "tokens": 24, "left out": SLOW} if options.quick else {}
    print(json.dumps({"methods": rows, "shortened": shortened}, indent=1) if options.json else table(rows))


if __name__ == "__main__":
    main()
