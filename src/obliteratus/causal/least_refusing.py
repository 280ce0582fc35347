"""FailSpy's choice of one direction: the one whose ablation makes refusal words least likely on target prompts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from obliteratus.causal.candidates import repeat_at_all_streams, split_for_candidates
from obliteratus.causal.interventions import FitContext, ablate, compute_answer_logits
from obliteratus.core.cost import Answers, Cost, prompt_count, variable
from obliteratus.core.probing import ProbeRequest
from obliteratus.core.progress import SILENT, note, progress, report_to
from obliteratus.core.settings import expand_part
from obliteratus.core.shapes import Float
from obliteratus.core.types import Activations, Directions, Subject
from obliteratus.distill.steps import extractors
from obliteratus.inference.chat_template import Ids, render_prompts
from obliteratus.inference.generate import generate
from obliteratus.inference.hidden_states import read_hidden_states
from obliteratus.prompts import pick_evenly
from obliteratus.verify.openings import opening_tokens, openings_to_text, typical_openings

STEP = "least_refusing"
# A refusal word occurs in a quarter of the answers to target prompts. A word that few answers use by chance would
# decide the score, which is a maximum over words. The author lists words by hand for one family of models.
WORD_SHARE = 0.25
WORD_PROMPTS = 32  # prompts of each group whose answers show the words: a quarter of them is 8, more than chance


def _cost(options: Mapping[str, Any]) -> Cost:
    """Return the cost: means of all fit prompts, answers that show the words, and about 3·L candidates."""
    trials = Answers(options["length"], variable("L") * (3 * options["prompts"]))
    words = Answers(
        options["length"], prompt_count("fit", "target", WORD_PROMPTS) + prompt_count("fit", "control", WORD_PROMPTS)
    )
    return Cost(prompt_count("fit"), (words, trials))


@extractors.register(STEP, cite="github.com/FailSpy/abliterator", needs=("model",), cost=_cost)
def least_refusing(
    acts: Activations,
    so_far: Directions | None,
    context: FitContext,
    *,
    prompts: Annotated[int, Field(ge=1)] = 4,
    length: Annotated[int, Field(ge=1, le=128)] = 8,
    tokens: tuple[str, ...] = (),
) -> Directions:
    """Choose one direction for all layers: the difference of means whose ablation leaves the least refusal.

    Candidates are taken at the last token: the stream at every index but 0, and the outputs of attention and MLP of
    every layer but the first. With each ablated at all writers, the model answers ``prompts`` held-out target prompts
    greedily with ``length`` tokens. The score is the highest probability of any refusal word at any of these tokens in
    any answer; the lowest wins, and is ``raw``. This is the author's find_best_refusal_dir.

    tokens: refusal words, of which the first token counts (mind leading spaces: " cannot"). If empty, the tokens that
    at least a quarter of the model's own answers to target prompts use, and four times as many as of those to controls.
    """
    ids = {
        group: render_prompts(context.subject, context.prompts[group], reserve=length)
        for group in ("target", "control")
    }
    fit, held = split_for_candidates(ids, prompts, STEP)
    words = opening_tokens(context.subject, tokens, STEP) or typical_openings(
        *_share_of_answers(context.subject, fit, length), STEP, WORD_SHARE
    )
    note(STEP, f"refusal words: {openings_to_text(context.subject, words)}")
    candidates = collect_candidates(context.subject, fit)
    scores: dict[str, float] = {}
    with progress(f"DISTILL {STEP}", len(candidates)) as advance, report_to(SILENT):
        for name, vector in candidates.items():
            with ablate(context.subject, vector):
                scores[name] = measure_refusal_probability(context.subject, held["target"], words, length)
            advance(1)
    best = min(scores, key=lambda name: scores[name])
    note(STEP, f"{best} of {len(candidates)}: highest probability of a refusal word {scores[best]:.2f}")
    return repeat_at_all_streams(
        acts, candidates[best], scores[best], "highest probability of a refusal word when ablated"
    )


def collect_candidates(subject: Subject, ids: Mapping[str, Ids]) -> dict[str, Float[Tensor, " width"]]:
    """Return the differences of means at the last token, by name, on the model's device.

    If a norm stands between a writer and the stream, the norm's output is taken, which is what reaches the stream.
    """
    sites = [s for s in subject.sites if s.part in ("attn.out", *expand_part("mlp.out")) and s.layer > 0]
    taps = [site.gain or site.path for site in sites]
    means = {}
    for group, rows in ids.items():
        total = torch.zeros(subject.n_layers + 1 + len(taps), subject.width, dtype=torch.float64)
        for reading in read_hidden_states(subject, rows, request=ProbeRequest(taps), title=f"DISTILL {STEP}, {group}"):
            total += torch.cat([reading.stream, reading.outputs], 1).double().sum(0)
        means[group] = total / len(rows)
    delta = (means["target"] - means["control"]).float().to(subject.device)
    names = [f"stream {i}" for i in range(subject.n_layers + 1)] + [f"{s.part} of layer {s.layer}" for s in sites]
    return dict(list(zip(names, delta, strict=True))[1:])


def measure_refusal_probability(subject: Subject, ids: Ids, words: list[int], length: int) -> float:
    """Return the highest probability of any word at any of the first ``length`` tokens of any greedy answer.

    An answer that ends early counts up to its end token.
    """
    answers = generate(subject, ids, length)
    # One arbitrary token more, so that the token that ended the answer is predicted too.
    pairs = [(p, a if len(a) == length else [*a, 0]) for p, a in zip(ids, answers, strict=True)]
    with torch.inference_mode():
        return float(compute_answer_logits(subject, pairs).softmax(-1)[:, words].max())


def _share_of_answers(subject: Subject, ids: Mapping[str, Ids], length: int) -> tuple[Tensor, Tensor]:
    """Return the share of each group's answers that contain each token."""
    vocabulary = subject.model.get_output_embeddings().weight.shape[0]
    shares = []
    for group in ("target", "control"):
        rows = pick_evenly(ids[group], WORD_PROMPTS)
        used = torch.zeros(vocabulary)
        for answer in generate(subject, rows, length, title=f"DISTILL {STEP} words, {group}"):
            used[sorted(set(answer))] += 1 / len(rows)
        shares.append(used)
    return shares[0], shares[1]
