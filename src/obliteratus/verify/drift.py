"""Scorers of unwanted change: the first token's distribution on control prompts, and perplexity on plain text."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import torch
from torch import Tensor

from obliteratus.core.cost import Cost, prompt_count, variable
from obliteratus.core.errors import UserError
from obliteratus.core.results import Score
from obliteratus.core.shapes import Bool, Float
from obliteratus.core.types import Subject
from obliteratus.inference.chat_template import Ids, context_length, encode_texts, render_prompts
from obliteratus.inference.logits import kl_divergence
from obliteratus.verify.intervals import mean_score, quantile_score
from obliteratus.verify.scoring import ItemValues, Measurement, ScorerContext, scorers

QUANTILES = {"p95": 0.95, "p99": 0.99}


@scorers.register(
    "first_token_kl",
    cite="arXiv:2406.11717",
    cost=lambda options: Cost(prompt_count("report", "control"), free_after="behavior"),
)
def first_token_kl(context: ScorerContext) -> Measurement:
    """Score KL(base ‖ edited) of the first answer token on control prompts: mean, p95 and p99, in nats.

    ``answered`` is the same over the control prompts whose answers do not show the behavior, since undoing a false
    refusal changes a prompt's first token a lot and is not damage. It needs the behavior scorer to run first, whose
    pass over the same prompts is then reused.
    """
    logp = context.known.tensors.get("first_token.control")
    if logp is None:
        logp = context.first_tokens(render_prompts(context.subject, context.prompts["control"]))
    tensors = {"first_token.control": logp}
    if context.before is None:
        return Measurement(tensors=tensors)
    divergence = kl_divergence(context.before.tensors["first_token.control"], logp)
    scores = drift_scores("kl.first_token", divergence, answered_controls(context.before))
    return Measurement(scores, tensors=tensors, items={"kl.first_token": ItemValues(divergence, "nats")})


def answered_controls(before: Measurement) -> Bool[Tensor, " n"]:
    """Return for which control prompts the base model does not show the behavior; empty if no scorer judged answers."""
    return torch.tensor(
        [r["verdict"] in ("absent", "unknown") for r in before.records if r.get("group") == "control"], dtype=torch.bool
    )


def drift_scores(
    name: str, values: Float[Tensor, " n"], answered: Bool[Tensor, " m"] | None = None
) -> dict[str, Score]:
    """Return NAME.mean, .p95 and .p99 in nats, and NAME.answered.… over the answered rows if there are any."""
    scores = _tail_scores(name, values)
    if answered is None or not bool(answered.any()):
        return scores
    return scores | _tail_scores(f"{name}.answered", values[answered])


def _tail_scores(name: str, values: Tensor) -> dict[str, Score]:
    tails = {f"{name}.{tail}": quantile_score(values, q, "nats") for tail, q in QUANTILES.items()}
    return {f"{name}.mean": mean_score(values, "nats"), **tails}


@scorers.register("perplexity", cost=lambda options: Cost(texts=variable("N_texts")))
def perplexity(context: ScorerContext, *, texts: str = "") -> Measurement:
    """Score exp of the mean loss per text (nats per token) over plain prose, and its ratio to the base model's.

    texts: a file of paragraphs separated by empty lines; empty takes the project's own. Padding never counts.
    """
    losses = context.known.items.get("perplexity")
    if losses is None:
        ids = text_tokens(context.subject, texts) if context.texts is None else context.texts
        means = [loss.mean() for loss in context.losses(ids, "VERIFY perplexity")]
        losses = ItemValues(torch.stack(means), "perplexity")
    scores = {"perplexity": losses.score()}
    if context.before is not None:
        scores["perplexity.ratio"] = losses.change(context.before.items["perplexity"])
    return Measurement(scores, items={"perplexity": losses})


def text_tokens(subject: Subject, texts: str = "") -> Ids:
    """Return the texts of the perplexity scorer as token rows, cut at the model's context length."""
    limit = context_length(subject)
    rows = [row[:limit] for row in encode_texts(subject, load_paragraphs(texts), add_special_tokens=True)]
    return [row for row in rows if len(row) > 1]  # a single token has no loss


def load_paragraphs(texts: str = "") -> list[str]:
    """Return the paragraphs of a text file, each in one line; by default the project's own sixteen.

    Raises UserError if the file is missing or empty.
    """
    path = Path(texts) if texts else files("obliteratus.verify") / "texts.txt"
    if not path.is_file():
        raise UserError(f"{texts}: no such text file for the perplexity scorer")
    content = path.read_text(encoding="utf-8")
    paragraphs = [" ".join(part.split()) for part in content.split("\n\n") if part.strip()]
    if not paragraphs:
        raise UserError(f"{texts}: the text file is empty; give at least one paragraph")
    return paragraphs
