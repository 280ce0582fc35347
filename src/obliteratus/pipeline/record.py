"""Describe the passes and prompts of a run for its record."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from obliteratus.core.types import SPLITS, Activations, Directions, Plan, Splits, Subject
from obliteratus.inference.chat_template import has_template
from obliteratus.judge.judge import Judge
from obliteratus.summon.coverage import summarize_plan_coverage
from obliteratus.verify import Measurement
from obliteratus.verify.agreement import compare_rungs
from obliteratus.verify.experts import rank_experts

RANKED_EXPERTS = 10  # experts that a record lists, those most particular to target prompts first


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
        "thinking": subject.thinking,
    }
