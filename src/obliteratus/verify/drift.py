"""What else moved: the first token's distribution on control prompts, and perplexity on plain text."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import torch
from torch import Tensor

from obliteratus.core.cost import Cost, amount, n_of
from obliteratus.core.errors import UserError
from obliteratus.core.results import Score
from obliteratus.core.shapes import Bool, Float
from obliteratus.core.types import Subject
from obliteratus.inference.chat_template import Ids, context_length, render_prompts
from obliteratus.inference.logits import first_token_log_probs, kl_divergence
from obliteratus.inference.token_losses import token_losses
from obliteratus.verify.intervals import bootstrap, mean, paired_ratio, quantile
from obliteratus.verify.steps import Measurement, ScorerContext, scorers

TAILS = {"mean": mean, "p95": quantile(0.95), "p99": quantile(0.99)}


SEEN = Cost(n_of("report", "control"), free_after="refusal")


@scorers.register("first_token_kl", cite="arXiv:2406.11717", cost=lambda options: SEEN)
def first_token_kl(context: ScorerContext) -> Measurement:
    """KL(base ‖ edited) of the answer's first token on control prompts: mean, p95 and p99, in nats.

    ``answered`` is the same over the controls that the base model answers: undoing a false refusal moves that
    prompt's first token a long way, and is not damage. Needs the refusal scorer before it for that, which has
    then passed the same prompts through the model already: its first tokens are taken.
    """
    logp = context.found.tensors.get("first_token.control")
    if logp is None:
        ids = render_prompts(context.subject, context.prompts["control"])
        logp = first_token_log_probs(context.subject, ids, title="VERIFY first tokens")
    tensors = {"first_token.control": logp}
    if context.before is None:
        return Measurement(tensors=tensors)
    divergence = kl_divergence(context.before.tensors["first_token.control"], logp)
    scores = drift_scores("kl.first_token", divergence, answered_controls(context.before))
    return Measurement(scores, tensors={**tensors, "kl.control": divergence})


def answered_controls(before: Measurement) -> Bool[Tensor, " n"]:
    """Which control prompts the base answers; empty where no refusal scorer came before."""
    return torch.tensor(
        [r["verdict"] == "complied" for r in before.records if r.get("group") == "control"], dtype=torch.bool
    )


def drift_scores(name: str, values: Float[Tensor, " n"], answered: Bool[Tensor, " m"]) -> dict[str, Score]:
    """NAME.mean, .p95 and .p99 in nats; NAME.answered.… over the rows that are answered, where there are any."""
    scores = _tails(name, values)
    return scores | _tails(f"{name}.answered", values[answered]) if bool(answered.any()) else scores


def _tails(name: str, values: Tensor) -> dict[str, Score]:
    return {f"{name}.{tail}": bootstrap(values, statistic, "nats") for tail, statistic in TAILS.items()}


@scorers.register("perplexity", cost=lambda options: Cost(texts=amount("N_texts")))
def perplexity(context: ScorerContext, *, texts: str = "") -> Measurement:
    """exp of the mean loss a text (nats a token) over plain prose, and its ratio to the base model's.

    texts: a file of paragraphs parted by empty lines; empty takes the project's own. Padding never counts.
    """
    losses = context.found.tensors.get("losses.texts")
    if losses is None:
        ids = text_tokens(context.subject, texts)
        losses = torch.stack([loss.mean() for loss in token_losses(context.subject, ids, title="VERIFY perplexity")])
    scores = {"perplexity": bootstrap(losses, lambda x: x.mean(-1).exp(), "perplexity")}
    if context.before is not None:
        scores["perplexity.ratio"] = paired_ratio(losses, context.before.tensors["losses.texts"])
    return Measurement(scores, tensors={"losses.texts": losses})


def text_tokens(subject: Subject, texts: str = "") -> Ids:
    """The texts of the perplexity scorer as token rows, cut at the model's context."""
    limit = context_length(subject)
    rows = [list(row)[:limit] for row in subject.tokenizer(paragraphs(texts))["input_ids"]]
    return [row for row in rows if len(row) > 1]  # a single token has no loss


def paragraphs(texts: str = "") -> list[str]:
    """What stands between empty lines of a text file, each in one line; by default the project's own sixteen.

    Raises UserError where there is no such file, or nothing in it.
    """
    path = Path(texts)
    if texts and not path.is_file():
        raise UserError(f"{texts}: no such text file for the perplexity scorer")
    content = path.read_text() if texts else (files("obliteratus.measure") / "texts.txt").read_text()
    found = [" ".join(p.split()) for p in content.split("\n\n") if p.strip()]
    if not found:
        raise UserError(f"{texts}: the text file is empty; give at least one paragraph")
    return found
