"""VERIFY of a model whose weights are on disk: unedited and edited side by side, in one pass over the weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from obliteratus.core.progress import note
from obliteratus.core.settings import Step
from obliteratus.core.types import Plan, PromptSet, Subject
from obliteratus.excise.live.hooks_per_row import applied_per_row
from obliteratus.inference.chat_template import render_prompts
from obliteratus.inference.layerwise import LayerwisePass, run_to_head
from obliteratus.inference.logits import prepared_first_token_log_probs
from obliteratus.inference.row_plans import with_variants
from obliteratus.inference.token_losses import prepared_token_losses, without_prefix
from obliteratus.verify.drift import text_tokens
from obliteratus.verify.refusal import GROUPS
from obliteratus.verify.steps import Measurement, measure

STREAMED = ("refusal_score", "first_token_kl", "perplexity")


def streamable_steps(steps: Sequence[Step]) -> tuple[Step, ...]:
    """The steps that one pass can serve. Whole answers would read all weights once a token, so the refusal score of
    first tokens stands in for `refusal`."""
    first = any(step.use == "refusal" for step in steps) and all(step.use != "refusal_score" for step in steps)
    kept = [step for step in steps if step.use in STREAMED]
    if left := [step.use for step in steps if step.use not in (*STREAMED, "refusal")]:
        note("VERIFY", f"left out, since answers would read all weights once a token: {', '.join(left)}")
    return (*([Step(use="refusal_score")] if first else []), *kept)


def measure_side_by_side(
    subject: Subject, plan: Plan, prompts: PromptSet, steps: Sequence[Step]
) -> tuple[Measurement, Measurement]:
    """What `streamable_steps` steps find of the model as it is, and under the plan."""
    found = _one_pass(subject, plan, prompts, [step for step in steps if step.use == "perplexity"])
    before = measure(subject, prompts, steps, found=found[0])
    return before, measure(subject, prompts, steps, before, found=found[1])


def _one_pass(subject: Subject, plan: Plan, prompts: PromptSet, texts: Sequence[Step]) -> list[Measurement]:
    """First tokens of all prompts and losses of the texts, under no edits and under the plan's."""
    groups = [group for group in GROUPS if group in prompts.groups]
    ids = render_prompts(subject, [prompt for group in groups for prompt in prompts[group]])
    rows = text_tokens(subject, str(texts[0].options.get("texts", ""))) if texts else []
    with torch.inference_mode(), applied_per_row(subject, [Plan(), plan], _each(len(ids))):
        sweeps = [LayerwisePass(subject, ids * 2)]
        if rows:
            with with_variants(_each(len(rows))):
                sweeps.append(without_prefix(subject, rows * 2))
        with run_to_head(subject, sweeps, "VERIFY both models") as (asked, *told):
            first = prepared_first_token_log_probs(subject, asked, title="VERIFY first tokens").chunk(2)
            loss = [row.mean() for of in told for row in prepared_token_losses(subject, of, title="VERIFY perplexity")]
    sizes = [len(prompts[group]) for group in groups]
    return [
        Measurement(tensors=_named(groups, logp.split(sizes)) | _texts(loss[len(rows) * i : len(rows) * (i + 1)]))
        for i, logp in enumerate(first)
    ]


def _each(rows: int) -> list[int]:
    """All rows unedited, then all under the plan."""
    return [0] * rows + [1] * rows


def _named(groups: Sequence[str], parts: Sequence[Tensor]) -> dict[str, Tensor]:
    return {f"first_token.{group}": part.contiguous() for group, part in zip(groups, parts, strict=True)}


def _texts(losses_: Sequence[Tensor]) -> dict[str, Tensor]:
    return {"losses.texts": torch.stack(list(losses_))} if losses_ else {}
