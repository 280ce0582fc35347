"""Describe the passes and prompts of a run for its record."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

from obliteratus.core.plugins import describe_plugins
from obliteratus.core.results import Run, Score
from obliteratus.core.settings import Recipe
from obliteratus.core.types import SPLITS, Activations, Directions, Plan, Splits, Subject
from obliteratus.inference.chat_template import has_template
from obliteratus.judge.judge import Judge
from obliteratus.pipeline.stages import Stages
from obliteratus.summon.coverage import summarize_plan_coverage
from obliteratus.verify import Measurement
from obliteratus.verify.agreement import compare_rungs
from obliteratus.verify.experts import rank_experts
from obliteratus.verify.intervals import share_difference

RANKED_EXPERTS = 10  # experts that a record lists, those most particular to target prompts first


def list_versions() -> dict[str, str]:
    """Return the versions of what a run depends on, and of plug-ins."""
    libraries = {name: version(name) for name in ("obliteratus", "torch", "transformers")}
    return libraries | {"python": platform.python_version()} | dict(describe_plugins())


def describe_run(
    recipe: Recipe, stages: Stages, plan: Plan, measured: tuple[Measurement, Measurement], found: dict[str, Any]
) -> Run:
    """Return the record of a run. What remains to be measured for it is measured here.

    measured: before and after. found: the fields ``passes``, ``search`` and ``advice`` of `Run`, as far as they apply.
    Raises UserError if the unedited model does not show the behavior, unless by force.
    """
    before, after = measured
    presence = stages.presence or stages.check_first_tokens(recipe, before)
    on_search = stages.measure_on_search(recipe, plan)
    return Run(
        status="done",
        recipe=recipe,
        source={k: str(v) for k, v in vars(stages.subject.source).items()},
        prompts=describe_prompts(stages.splits, stages.subject),
        before=dict(before.scores),
        after=dict(after.scores),
        change=pair_changes(before, after),
        presence=presence.to_dict() if presence else {},
        optimism=compare_parts(on_search, after.scores, stages.judge.rate_of("target")),
        coverage=summarize_plan_coverage(stages.subject, plan),
        judge=describe_judge(stages.judge, before),
        seconds=dict(stages.store.seconds),
        versions=list_versions(),
        **found,
    )


def describe_pass(subject: Subject, acts: Activations, directions: Directions, plan: Plan) -> dict[str, Any]:
    """Return what one pass found and what it changes in the model."""
    best = int(directions.score.argmax())
    return {
        "steps": list(directions.trace),
        "score": float(directions.score.max()),
        "best_stream": best,
        "best_layer": best - 1,  # the block that writes this stream; −1 stands for the embeddings
        "edits": len(plan.edits),
        "layers": sorted({e.site.layer for e in plan.edits}),
        "edited_share": summarize_plan_coverage(subject, plan)["edited_share"],
        "experts": [
            {"path": r.path, "expert": r.expert, **r.excess.model_dump()} for r in rank_experts(acts)[:RANKED_EXPERTS]
        ],
    }


def describe_judge(judge: Judge, before: Measurement) -> dict[str, Any]:
    """Return what was looked for in answers, by whom, and Cohen's kappa between the rungs on the unedited answers."""
    return {
        "behavior": judge.name,
        "about": judge.behavior.head.about,
        "digest": judge.behavior.digest,
        "own_words": [vars(phrase) for phrase in judge.own_words],
        "decides": judge.decides,
        "kappa": {pair: score.model_dump() for pair, score in compare_rungs(before.records).items()},
    }


def describe_prompts(splits: Splits, subject: Subject) -> dict[str, Any]:
    """Return the digest and counts of the prompts, how far apart their parts are, and how the model sees them."""
    counts = {
        name: {group: len(prompts) for group, prompts in part.groups.items()}
        for name, part in zip(SPLITS, splits, strict=True)
    }
    return {
        "digest": splits.digest,
        "counts": counts,
        **({"separation": asdict(splits.separation)} if splits.separation else {}),
        "template": has_template(subject),
        "chat": {**asdict(subject.chat), "now": subject.chat.now.isoformat(timespec="seconds")},
    }


def compare_parts(on_search: Score | None, after: Mapping[str, Score], rate: str) -> dict[str, Score]:
    """Return the rate on the prompts that the plan was chosen on, on the report prompts, and the difference."""
    if on_search is None or rate not in after:
        return {}
    return {"search": on_search, "report": after[rate], "difference": share_difference(after[rate], on_search)}


def pair_changes(before: Measurement, after: Measurement) -> dict[str, Score]:
    """Return the change of each score whose items were measured before and after, paired item by item."""
    return {name: item.change(before.items[name]) for name, item in after.items.items() if name in before.items}
