"""Every method on the organism: what it removes, what it costs, beside a random direction. One run, one baseline.

    python -m bench.methods [--quick] [--json] [--only NAME,NAME]

--quick reads every second report prompt and answers of 24 tokens.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

import torch

from bench.common import organism, say, with_peak
from obliteratus.card import shown
from obliteratus.distill import distill
from obliteratus.distill.steps import orthonormal
from obliteratus.errors import UserError
from obliteratus.excise.live import applied
from obliteratus.excise.plan import excise
from obliteratus.pipeline import measured, probed, run
from obliteratus.recipe import check_runs, names, recipe
from obliteratus.store import Store
from obliteratus.types import PromptSet, Recipe, Score, Subject
from obliteratus.verify import Measured
from obliteratus.weigh import weigh

T = TypeVar("T")
BASELINE = "VERIFY before"
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

    def measure() -> tuple[Measured, Measured]:
        acts = probed(store, "PROBE", subject, fit, made)
        found = distill(acts, made.distill)
        noise = torch.randn(found.basis.shape, generator=torch.Generator().manual_seed(0))
        drawn = replace(found, basis=orthonormal(noise * (found.basis.norm(dim=-1, keepdim=True) > 0)))
        plan = excise(subject, drawn, weigh(drawn, subject.sites, acts, made.weigh), acts, made.excise)
        before = measured(store, BASELINE, subject, report, made.verify)
        with applied(subject, plan):
            return before, measured(store, "VERIFY after", subject, report, made.verify, before)

    _, peak, (before, after) = with_peak(measure)
    return row(before.scores, after.scores, store.seconds, peak, 1)


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Markdown."""
    lines = [f"| method | {' | '.join(COLUMNS)} | seconds | peak MB | passes |", "|" + "---|" * (len(COLUMNS) + 4)]
    for name, found in rows.items():
        if "refused" in found:
            lines.append(f"| {name} | refused: {found['refused']} |" + " |" * (len(COLUMNS) + 2))
            continue
        scores = [shown(Score(**found["after"][c])) for c in COLUMNS]
        spent = f"{sum(found['seconds'].values()):.0f} | {found['peak_bytes'] / 1e6:.0f} | {found['passes']}"
        lines.append(f"| {name} | {' | '.join(scores)} | {spent} |")
    return "\n".join(lines)


def main() -> None:
    """Print the table, or the document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--only", default="", help="methods, separated by commas")
    options = parser.parse_args()
    subject, prompts = organism()
    prompts = halved(prompts) if options.quick else prompts
    overrides = {"verify": SHORT} if options.quick else {}
    known: dict[str, Any] = {}
    rows = {}
    for name in options.only.split(",") if options.only else names():
        say(f"{name} …")
        rows[name] = one(recipe(name, overrides), subject, prompts, known)
    say("random …")
    rows["random"] = chance(recipe("advanced", overrides), subject, prompts, known)
    shortened = {"report": "every second prompt", "tokens": 24} if options.quick else {}
    print(json.dumps({"methods": rows, "shortened": shortened}, indent=1) if options.json else table(rows))


if __name__ == "__main__":
    main()
