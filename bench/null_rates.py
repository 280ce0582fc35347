"""How often each analysis finds something where labels mean nothing: `python -m bench.null_rates`.

Each draw splits the control prompts of a model by labels that mean nothing, into fit and held-out prompts of both
groups, and runs one analysis as `analyze` does. An analysis that keeps to its level of 5 % claims something in at most
1 of 20 draws. Models are random ones of four blocks, a new one every few draws, and two organisms.

`transfer` and `tuned_lens` say nothing about labels: the two models' prompts, and the lower streams and the last one,
are those of different prompts. An analysis that runs the model in every draw gets fewer draws on an organism.
"""

from __future__ import annotations

import argparse
import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from bench.common import format_rows, make_parser, open_organism, say, time_call
from obliteratus.analyze import AnalysisContext, analyses, analyze
from obliteratus.analyze.readout import compute_next_token_log_probs
from obliteratus.analyze.run import DISTILL_STEPS
from obliteratus.analyze.transfer import measure_transfer
from obliteratus.analyze.tuned_lens import fit_map, score_lenses
from obliteratus.core.progress import SILENT, report_to
from obliteratus.core.results import Score
from obliteratus.core.settings import Probe, Step
from obliteratus.core.types import Activations, Moments, Prompt, PromptSet, Subject
from obliteratus.distill import find_directions
from obliteratus.probe.probe import collect_activations
from obliteratus.prompts import load_prompts, pick_evenly
from obliteratus.summon.load import assemble_subject
from obliteratus.verify.intervals import wilson_rate
from obliteratus.weights.organism import prepare_base

LEVEL = 0.05  # that every analysis states
GROUPS = ("target", "control")
ORGANISMS = ("astronomy", "gardening-railways")
RANDOM_MODELS = "random models"
CLAIMS = ("found", "found_heads", "sparse", "telling", "unusual")  # keys of `Finding.to_dict` that list what was found
CATEGORIES = ("a", "b", "c")
LABEL_SEED = 1_000_003  # keeps the labels apart from an analysis' own draws, which begin at small seeds


@dataclass(frozen=True)
class Sizes:
    """Prompts of each draw and group, and of the pool that they are drawn from."""

    pool: int
    fit: int
    held_out: int
    models: int
    """Random models."""


WHOLE, SMOKE = Sizes(pool=160, fit=32, held_out=16, models=20), Sizes(pool=80, fit=26, held_out=8, models=1)


@dataclass(frozen=True)
class Draws:
    """How one analysis is run."""

    options: Mapping[str, Any]
    share: float = 1.0
    """Of the draws, that are made on an organism."""


# Options that make a draw cheaper and leave the test as it is. Shares: what an organism's draw costs in passes.
RUNS: Mapping[str, Draws] = {
    "sae": Draws({"draws": 99}),
    "decomposition": Draws({}, 0.2),
    "entanglement": Draws({"prompts": 2}, 0.05),
    "footprint": Draws({"draws": 39}),
    "lens": Draws({"draws": 99}, 0.25),
    "patching": Draws({"score": "projection", "positions": 1, "heads": 18}, 0.05),
    "positions": Draws({"last": 4}, 0.2),
    "reach": Draws({"prompts": 16, "depths": 3, "tries": 0}, 0.1),
    "repair": Draws({"prompts": 3, "depths": 3}, 0.1),
    "tuned_lens": Draws({}, 0.25),
}


# ----------------------------------------------------------------------------------------------------- sources
@dataclass(frozen=True)
class Source:
    """A model and its activations on the pool of prompts, probed once."""

    subject: Subject
    prompts: tuple[Prompt, ...]

    @cached_property
    def rows(self) -> Tensor:
        """[prompts, streams, width]."""
        groups = PromptSet({"control": self.prompts})
        rows = collect_activations(self.subject, groups, Probe(keep="rows"))["control"].rows
        assert rows is not None
        return rows

    def draw(self, sizes: Sizes, seed: int) -> AnalysisContext:
        """Return a context whose labels mean nothing."""
        generator = torch.Generator().manual_seed(LABEL_SEED + seed)
        order = torch.randperm(len(self.prompts), generator=generator)
        parts = order[: 2 * (sizes.fit + sizes.held_out)].split([sizes.fit] * 2 + [sizes.held_out] * 2)
        acts = make_activations([self.rows[part] for part in parts[:2]])
        fit, held_out = (
            PromptSet(
                {g: tuple(self._categorize(int(i), seed) for i in part) for g, part in zip(GROUPS, two, strict=True)}
            )
            for two in (parts[:2], parts[2:])
        )
        return AnalysisContext(acts, find_directions(acts, DISTILL_STEPS), self.subject, fit, held_out)

    def _categorize(self, i: int, seed: int) -> Prompt:
        """Return the prompt with a category that means nothing."""
        return replace(self.prompts[i], category=CATEGORIES[zlib.crc32(f"{seed} {i}".encode()) % len(CATEGORIES)])


def make_activations(groups: Sequence[Tensor]) -> Activations:
    """Return activations with these rows of the target and the control, [prompts, streams, width]."""
    moments = {g: Moments(len(x), x.double().mean(0).float(), x) for g, x in zip(GROUPS, groups, strict=True)}
    return Activations(moments, -1)


def open_sources(name: str, sizes: Sizes) -> Sequence[Callable[[], Source]]:
    """Return what opens the models of one kind: an organism, or random models."""
    organism = f"organism:{name if name in ORGANISMS else ORGANISMS[0]}"
    control = load_prompts(organism, organism)["control"]
    pool = tuple(pick_evenly(control, sizes.pool))
    if name in ORGANISMS:
        source = Source(open_organism(name), pool)
        return [lambda: source]
    return [partial(_open_random_model, seed, pool) for seed in range(sizes.models)]


def _open_random_model(seed: int, pool: tuple[Prompt, ...]) -> Source:
    return Source(make_random_model(seed, AutoTokenizer.from_pretrained(prepare_base())), pool)


def make_random_model(seed: int, tokenizer: Any) -> Subject:
    """Return a random Llama of four blocks, 32 dimensions and 4 heads."""
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_attention_heads=4,
        num_hidden_layers=4,
        vocab_size=len(tokenizer),
        initializer_range=0.2,  # at which attention and MLPs write about as much as the embeddings
        tie_word_embeddings=False,
    )
    torch.manual_seed(seed)
    return assemble_subject(LlamaForCausalLM(config).eval().requires_grad_(False), tokenizer, id=f"random:{seed}")


# ------------------------------------------------------------------------------------------------------- draws
def claims_something(numbers: Mapping[str, Any]) -> bool:
    """Return whether a finding, by its `to_dict`, claims anything."""
    named = [numbers[key] for key in CLAIMS if key in numbers]
    return any(any(x.values()) if isinstance(x, dict) else bool(x) for x in named)


def run_draw(name: str, source: Source, sizes: Sizes, seed: int) -> bool:
    """Return whether the analysis claims something in one draw."""
    context = source.draw(sizes, seed)
    if name == "transfer":
        return _transfer_between_strangers(context, source, seed)
    if name == "tuned_lens":
        return _read_streams_of_others(context, source, seed)
    options = dict(RUNS[name].options) if name in RUNS else {}
    return claims_something(analyze(context, [Step(use=name, **options, **_seed_of(name, seed))])[name].to_dict())


def _seed_of(name: str, seed: int) -> dict[str, int]:
    return {"seed": seed} if "seed" in analyses[name].options.model_fields else {}


def _transfer_between_strangers(context: AnalysisContext, source: Source, seed: int) -> bool:
    """Map a stream to another one, of other prompts."""
    order = torch.randperm(len(source.rows), generator=torch.Generator().manual_seed(2 * LABEL_SEED + seed))
    n = len(context.prompts["target"])
    others = source.rows[order[: 2 * n]]
    two = make_activations(others.split(n))
    middle = source.subject.n_layers // 2
    return measure_transfer(context.activations, two, (middle, middle), seed=seed).significant


def _read_streams_of_others(context: AnalysisContext, source: Source, seed: int) -> bool:
    """Fit and score tuned lenses where the lower streams are those of other prompts than the last one."""
    generator = torch.Generator().manual_seed(LABEL_SEED + seed)
    order = torch.randperm(len(source.rows), generator=generator)
    n, h = (sum(map(len, prompts.groups.values())) for prompts in (context.prompts, context.held_out))
    fit, held_out = source.rows[order[:n]], source.rows[order[n : n + h]]
    maps = [
        fit_map(fit[:, stream], fit[torch.randperm(n, generator=generator), -1]) for stream in range(fit.shape[1] - 1)
    ]
    moved = torch.cat([held_out[torch.randperm(h, generator=generator), :-1], held_out[:, -1:]], 1)
    true = compute_next_token_log_probs(source.subject, held_out[:, -1])
    return bool(score_lenses(context, maps, moved, true).significant)


def measure_rate(name: str, sources: Sequence[Callable[[], Source]], sizes: Sizes, draws: int) -> Score:
    """Return the share of draws in which the analysis claims something."""
    claims, each = 0, -(-draws // len(sources))
    with report_to(SILENT):
        for first in range(0, draws, each):
            source = sources[first // each]()
            claims += sum(run_draw(name, source, sizes, seed) for seed in range(first, min(first + each, draws)))
    return wilson_rate(claims, draws)


def count_draws(name: str, model: str, draws: int) -> int:
    share = RUNS[name].share if name in RUNS and model in ORGANISMS else 1.0
    return max(1, round(share * draws))


# ------------------------------------------------------------------------------------------------------ output
def describe_rate(rate: Score) -> str:
    """Return ``4.5 % (9 of 200; 2.4–8.3)``."""
    ends = f"{100 * rate.low:.1f}–{100 * rate.high:.1f}"
    return f"{100 * rate.value:.1f} % ({round(rate.value * rate.n)} of {rate.n}; {ends})"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--draws", type=int, default=200, help="draws of each analysis on random models")
    parser.add_argument("--only", default="", help="names of analyses separated by commas; by default all")
    parser.add_argument("--models", default=",".join((RANDOM_MODELS, *ORGANISMS)), help="separated by commas")
    options = parser.parse_args(argv)
    if options.smoke:
        options.draws, options.models = 2, RANDOM_MODELS
    return options


def main(argv: Sequence[str] | None = None) -> None:
    """Print a table of false-positive rates with 95 % Wilson intervals."""
    options = parse(argv)
    sizes, models = SMOKE if options.smoke else WHOLE, options.models.split(",")
    names = [n for n in options.only.split(",") if n] or [*analyses, "transfer"]
    found: dict[str, dict[str, Score]] = {name: {} for name in names}
    for model in models:
        sources = open_sources(model, sizes)
        for name in names:
            draws = count_draws(name, model, options.draws)
            seconds, found[name][model] = time_call(lambda: measure_rate(name, sources, sizes, draws))  # noqa: B023
            say(f"{model}, {name}: {describe_rate(found[name][model])}, {seconds / draws:.2f} s a draw")
    if options.json:
        print(json.dumps({n: {m: r.model_dump() for m, r in row.items()} for n, row in found.items()}, indent=1))
    else:
        print(format_rows(["analysis", *models], [[n, *map(describe_rate, row.values())] for n, row in found.items()]))


if __name__ == "__main__":
    main()
