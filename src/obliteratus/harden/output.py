"""The card and the JSON record of a hardened model, and what is said of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from obliteratus.audit.claims import GOAL_WORDS, format_cost, format_interval, format_number, format_percent
from obliteratus.audit.firmness_page import to_dict as audit_to_dict
from obliteratus.core.results import replace_infinities
from obliteratus.core.run_folder import write_atomic
from obliteratus.harden.measure import CostChange, Effect, find_twentieth
from obliteratus.harden.run import Hardening
from obliteratus.rebirth.base_card import read_base_card
from obliteratus.weights.rewrite import describe_files
from obliteratus.weights.side_files import find_side_folder

RECORD, CARD = "harden.json", "README.md"
COLUMNS = ["", "before", "after"]
LIMITS = (
    "Both costs are those of the methods listed, fitted anew on the model as it then is. A better attack costs less.",
    "It says nothing of further training, which can remove a behavior from any open weights, nor of prompts, prefilled "
    "answers and sampling.",
)


def describe_factor(change: CostChange) -> str:
    """Return how many times the cost is what it was."""
    if change.factor is None:
        return "there is no ratio, since it cost nothing before" if change.before.reached else "there is no ratio"
    more = "at least " if not change.after.reached else ""
    return f"{more}{format_number(change.factor)} times"


def describe_hardening(done: Hardening) -> str:
    """Return what became of the cost of removal, in a sentence or two."""
    change = find_twentieth(done.costs)
    if change is None:
        return f"The hardened model no longer shows {done.behavior}: {done.after.presence.against}."
    return (
        f"Bringing {done.behavior} down to {GOAL_WORDS[change.goal]} costs {format_cost(change.after)} nats, and "
        f"{format_cost(change.before)} before: {describe_factor(change)}. Controls moved by "
        f"{format_interval(done.effect.kl)} nats. {describe_over_refusal(done.behavior, done.effect)}"
    )


def describe_over_refusal(behavior: str, effect: Effect) -> str:
    """Return what became of the behavior on control prompts, and whether that is beyond chance."""
    before, after = format_percent(effect.control_before), format_percent(effect.control_after)
    told = "more than by chance" if effect.control_change.low > 0 else "not more than chance allows"
    rise = f", {told}" if effect.control_after.value > effect.control_before.value else ""
    return f"Of control prompts {after} show {behavior}, and {before} before{rise}."


def list_rows(done: Hardening) -> list[list[str]]:
    """Return the table of what was measured before and after."""
    effect = done.effect
    costs = [
        [f"cost of removal to {GOAL_WORDS[c.goal]}, nats", _name_cost(c, "before"), _name_cost(c, "after")]
        for c in done.costs
    ]
    return [
        *costs,
        [f"{done.behavior} on target", format_percent(effect.target_before), format_percent(effect.target_after)],
        [f"{done.behavior} on control", format_percent(effect.control_before), format_percent(effect.control_after)],
        ["KL(base ‖ hardened) on control, nats", "", format_interval(effect.kl)],
    ]


def _name_cost(change: CostChange, when: str) -> str:
    cost = change.before if when == "before" else change.after
    return f"{format_cost(cost)}, {cost.best}" if cost.reached else format_cost(cost)


def to_dict(done: Hardening, sources: Mapping[str, str], files: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return all numbers as JSON types. sources: where the prompts come from."""
    numbers = {
        "version": version("obliteratus"),
        "headline": describe_hardening(done),
        "model": done.model,
        "behavior": done.behavior,
        "form": done.form,
        "prompts": dict(sources),
        "settings": done.settings.model_dump(mode="json"),
        "checks": done.checks.model_dump(mode="json"),
        "costs": [change.to_dict() for change in done.costs],
        "effect": done.effect.model_dump(mode="json"),
        "losses": [one.model_dump() for one in done.losses],
        "max_kl_reloaded": done.max_kl,
        "before": audit_to_dict(done.before),
        "after": audit_to_dict(done.after),
        "seconds": done.seconds,
        "files": dict(files or {}),
    }
    return {name: replace_infinities(value) for name, value in numbers.items()}


def write_hardening(done: Hardening, folder: Path, sources: Mapping[str, str]) -> None:
    """Write card and record beside the model."""
    (folder / CARD).write_text(render_card(done), encoding="utf-8")
    record = to_dict(done, sources, describe_files(folder))
    write_atomic(folder / RECORD, json.dumps(record, indent=1))


def render_card(done: Hardening) -> str:
    """Return the card as Markdown with the YAML header that model hubs read."""
    header = ModelCardData(
        **read_base_card(done.model, find_side_folder(done.model)), tags=["obliteratus", "hardened", done.form]
    )
    lines = [f"| {' | '.join(row)} |" for row in (COLUMNS, ["---"] * len(COLUMNS), *list_rows(done))]
    what = "whole model" if done.form == "merged" else "LoRA adapter on top of the base model"
    settings = done.settings
    return f"""---
{header.to_yaml()}
---
# {done.model.rstrip("/").rpartition("/")[2]}, hardened

**This model was trained so that edits of its weights remove {done.behavior} less easily.** {describe_hardening(done)}

This is a {what}. An adapter of rank {settings.rank} was trained for {settings.steps} steps while edits by
{", ".join(settings.attacks)} were live, fitted anew every {settings.refit} steps on the model as it then was.

## How it was measured
On prompts that were held out. The attacker fits {", ".join(done.checks.methods)} anew on the model before and after.
Intervals are 95 % intervals; KL is of the first answer token on control prompts.

{chr(10).join(lines)}

## What this does not say
{chr(10).join(f"- {limit}" for limit in LIMITS)}

`{RECORD}` has everything else.
"""
