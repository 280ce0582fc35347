"""What a run's record says of its passes and its prompts."""

from __future__ import annotations

from typing import Any

from obliteratus.core.run_folder import Store
from obliteratus.core.types import SPLITS, Activations, Directions, Plan, PromptSet, Subject
from obliteratus.inference.chat_template import has_template
from obliteratus.summon.coverage import plan_coverage
from obliteratus.verify.experts import rank_experts

RANKED = 10  # experts that a record names: the first are what is looked at


def describe_pass(subject: Subject, acts: Activations, directions: Directions, plan: Plan) -> dict[str, Any]:
    """What one pass found, and what it changed of the model."""
    best = int(directions.score.argmax())
    return {
        "steps": list(directions.trace),
        "score": float(directions.score.max()),
        "best_stream": best,
        "best_layer": best - 1,  # the block that writes this stream; −1 is the embeddings
        "edits": len(plan.edits),
        "layers": sorted({e.site.layer for e in plan.edits}),
        "edited_share": plan_coverage(subject, plan)["edited_share"],
        "experts": [{"path": r.path, "expert": r.expert, **r.excess.model_dump()} for r in rank_experts(acts)[:RANKED]],
    }


def describe_passes(passes: list[dict[str, Any]], store: Store, ended: str) -> tuple[dict[str, Any], ...]:
    """Each pass with what it cost, what search prompts showed after it, and of the last why none followed."""
    done = []
    for number, found in enumerate(passes, 1):
        stages = {name: f"{name} {number}" for name in ("PROBE", "DISTILL", "EXCISE")} | {
            "CHECK": f"CHECK {number + 1}"
        }
        spent = {name: store.seconds[key] for name, key in stages.items() if key in store.seconds}
        checked = store.values.get(stages["CHECK"])
        refused = checked.scores["refusal.target"] if checked else None
        done.append({**found, "seconds": spent, "refused": refused.model_dump() if refused else None})
        if number == len(passes):
            done[-1]["ended"] = ended
    return tuple(done)


def describe_prompts(prompts: PromptSet, seed: int, subject: Subject) -> dict[str, Any]:
    """The prompts of a run, and how they were shown to the model."""
    parts = dict(zip(SPLITS, prompts.split(seed), strict=True))
    counts = {name: {g: len(ps) for g, ps in part.groups.items()} for name, part in parts.items()}
    return {
        "digest": prompts.digest,
        "counts": counts,
        "template": has_template(subject),
        "thinking": subject.thinking,
    }
