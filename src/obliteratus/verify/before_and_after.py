"""Measure a model before and after a plan, in one pass over the weights where they stay on disk."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from obliteratus.core.progress import note
from obliteratus.core.settings import Step
from obliteratus.core.types import Plan, PromptSet, Subject
from obliteratus.excise.live.hooks import applied
from obliteratus.excise.live.hooks_per_row import applied_per_row
from obliteratus.inference.chat_template import render_prompts
from obliteratus.inference.layerwise import LayerwisePass, run_to_head
from obliteratus.inference.logits import prepared_first_token_log_probs
from obliteratus.inference.row_plans import assign_prompt_variants
from obliteratus.inference.token_losses import prepared_token_losses, without_prefix
from obliteratus.judge.judge import Judge
from obliteratus.verify.behavior import GROUPS
from obliteratus.verify.drift import text_tokens
from obliteratus.verify.scoring import ItemValues, Measurement, measure

ONE_PASS_SCORERS = ("behavior_score", "first_token_kl", "perplexity")


def measure_before_and_after(
    subject: Subject,
    plan: Plan,
    prompts: PromptSet,
    steps: Sequence[Step],
    before: Measurement | None = None,
    judge: Judge | None = None,
) -> tuple[Measurement, Measurement]:
    """Return what the scorers measure of the unedited model and of the model under the plan.

    A model whose weights stay on disk is measured in both states side by side, in one pass over its weights, by the
    scorers that `streamable_steps` keeps. before: the unedited model's measurement, if it was already taken. judge:
    None looks for refusals.
    """
    if subject.offloaded is not None and before is None:
        return measure_side_by_side(subject, plan, prompts, streamable_steps(steps), judge)
    if before is None:
        before = measure(subject, prompts, steps, base=subject, judge=judge)
    with applied(subject, plan):
        return before, measure(subject, prompts, steps, before, base=subject, judge=judge)


def streamable_steps(steps: Sequence[Step]) -> tuple[Step, ...]:
    """Return the steps that one pass over the weights can serve.

    Whole answers would read all weights once per token, so `behavior_score`, which reads first tokens,
    replaces `behavior`. Steps that are dropped are named in a note.
    """
    names = {step.use for step in steps}
    score = (Step(use="behavior_score"),) if "behavior" in names and "behavior_score" not in names else ()
    if dropped := [step.use for step in steps if step.use not in (*ONE_PASS_SCORERS, "behavior")]:
        note("VERIFY", f"skipped {', '.join(dropped)}: one pass over the weights on disk cannot serve them")
    return (*score, *(step for step in steps if step.use in ONE_PASS_SCORERS))


def measure_side_by_side(
    subject: Subject, plan: Plan, prompts: PromptSet, steps: Sequence[Step], judge: Judge | None = None
) -> tuple[Measurement, Measurement]:
    """Return the measurements without and with the plan, from one pass in which each prompt has a row for either.

    steps: only those of `ONE_PASS_SCORERS`.
    """
    texts = [step for step in steps if step.use == "perplexity"]
    unedited, edited = _known_outputs(subject, plan, prompts, texts)
    before = measure(subject, prompts, steps, known=unedited, judge=judge)
    return before, measure(subject, prompts, steps, before, known=edited, judge=judge)


def _known_outputs(
    subject: Subject, plan: Plan, prompts: PromptSet, text_steps: Sequence[Step]
) -> tuple[Measurement, Measurement]:
    """First-token log-probabilities of all prompts and losses of the texts, without and with the plan."""
    groups = [group for group in GROUPS if group in prompts.groups]
    ids = render_prompts(subject, [prompt for group in groups for prompt in prompts[group]])
    texts = text_tokens(subject, str(text_steps[0].options.get("texts", ""))) if text_steps else []
    with torch.inference_mode(), applied_per_row(subject, [Plan(), plan], _plan_of_row(len(ids))):
        passes = [LayerwisePass(subject, ids * 2)]
        if texts:
            with assign_prompt_variants(_plan_of_row(len(texts))):
                passes.append(without_prefix(subject, texts * 2))
        with run_to_head(subject, passes, "VERIFY both models") as (asked, *read):
            first_tokens = prepared_first_token_log_probs(subject, asked, title="VERIFY first tokens").chunk(2)
            losses = [
                loss.mean()
                for batch in read
                for loss in prepared_token_losses(subject, batch, title="VERIFY perplexity")
            ]
    sizes = [len(prompts[group]) for group in groups]

    def known_of(state: int) -> Measurement:
        parts = zip(groups, first_tokens[state].split(sizes), strict=True)
        logp: dict[str, Tensor] = {f"first_token.{group}": part.contiguous() for group, part in parts}
        if not texts:
            return Measurement(tensors=logp)
        means = torch.stack(losses[len(texts) * state : len(texts) * (state + 1)])
        return Measurement(tensors=logp, items={"perplexity": ItemValues(means, "perplexity")})

    return known_of(0), known_of(1)


def _plan_of_row(rows: int) -> list[int]:
    """The index of each row's plan: first all rows unedited, then all under the plan."""
    return [0] * rows + [1] * rows
