"""A per-layer, per-FFN and per-head study of SmolLM2-135M: ours, the naive loop, and the floor.

The naive loop is the audited one: for each part zero its weights, tokenise the texts anew and measure with an evaluator
of its own, through the whole model with its labels; then copy the whole state dict back. The floor is the FLOPs of what
lies above each edit, attention's products and the LM head included, at the rate of matrix products measured between the
parts. Both loops are interleaved; the naive one runs on a sample of parts, since each costs it the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.common import arguments, machine, machine_rate, report, resident, say, timed, with_peak
from obliteratus.settings import Step
from obliteratus.study.base import Result, Spec
from obliteratus.study.engine import Engine, chunks
from obliteratus.study.metrics import Perplexity
from obliteratus.study.settings import Data, Study
from obliteratus.summon.open import open_subject
from obliteratus.types import Subject

MODEL = "organism:base"
TEXTS, LENGTH = 16, 128
# Words of a text, and from one's beginning to the next's: each has more than LENGTH tokens and is cut there
WORDS, STRIDE = 120, 90
NAIVE_ROWS = 8  # the audited loop's batch size
NAIVE_EVERY, QUICK_EVERY = 25, 30


def main() -> None:
    """Prints seconds, ratios, memory and the largest relative difference of perplexities."""
    options = arguments(__doc__ or "")
    bare = resident()
    subject = open_subject(MODEL)
    loaded = resident()
    file = _texts()
    engine = Engine(subject, _study(file))
    every = QUICK_EVERY if options.quick else 1
    specs = engine.specs[::every]
    run = Race(engine, file).run(specs, 1 if options.quick else NAIVE_EVERY)
    meter = engine.meters[0]
    assert isinstance(meter, Perplexity)
    kept = meter.trunk.kept.bytes_held()
    weights = sum(p.numel() * p.element_size() for p in subject.model.parameters())
    sizes = {"model_MB": weights, "libraries_MB": bare, "loaded_MB": loaded, "kept_MB": kept, "peak_MB": run.peak}
    memory = {"peak_over_model_and_states": (run.peak - bare) / (weights + kept)}
    memory |= {"peak_over_loaded": run.peak / (loaded + kept)}
    memory |= {name: size / 1e6 for name, size in sizes.items()}
    report(run.told(specs, len(engine.specs)) | {"memory": memory, "machine": machine()}, options.json)


def _study(texts: Path) -> Study:
    steps = tuple(Step(use=name) for name in ("layers", "ffn", "heads"))
    return Study(data=Data(texts=str(texts), samples=TEXTS, length=LENGTH), strategies=steps)


def _texts() -> Path:
    """The licence, cut into texts: prose that every clone holds."""
    words = (Path(__file__).parents[1] / "LICENSE").read_text().split()
    file = Path("/tmp/bench-study.txt")
    file.write_text("\n\n".join(" ".join(words[i * STRIDE : i * STRIDE + WORDS]) for i in range(TEXTS)))
    return file


@dataclass
class Timed:
    """What was measured of some parts."""

    ours: float = 0.0
    floor: float = 0.0
    flops: float = 0.0
    naive: float = 0.0
    naive_parts: int = 0
    peak: int = 0
    """Resident bytes, at most, of ours."""
    apart: float = 0.0
    """Largest relative difference of perplexities."""

    def told(self, specs: Sequence[Spec], whole: int) -> dict[str, Any]:
        naive = self.naive / self.naive_parts * len(specs)
        return {
            "seconds": {"ours": self.ours, "naive": naive, "floor": self.floor},
            "ratio": {"naive": naive / self.ours, "floor": self.ours / self.floor},
            "equal": {"largest_relative_difference": self.apart},
            "parts": {"measured": len(specs), "of": whole, "naive_measured": self.naive_parts},
            "rate": {"GFLOPs": self.flops / self.floor / 1e9},
        }


class Race:
    """Both loops over the same parts, in turns."""

    def __init__(self, engine: Engine, file: Path) -> None:
        self.engine, self.subject, self.file = engine, engine.subject, file
        self.seen = 0

    def run(self, specs: Sequence[Spec], every: int) -> Timed:
        total = Timed()
        seconds, _ = timed(self.engine.baseline)
        total.ours += seconds  # the baseline, and what is kept of it, are the study's too
        for chunk in chunks(specs):
            rate = machine_rate(2)
            (_, peak, results), seconds = self._ours(chunk)
            flops = sum(floor_flops(self.subject, spec, TEXTS, LENGTH) for spec in chunk)
            total.ours, total.flops = total.ours + seconds, total.flops + flops
            total.peak = max(total.peak, peak)
            total.floor += flops / max(rate, machine_rate(2))
            say(f"{chunk[0].component} … {chunk[-1].component}: {seconds / len(chunk):.2f} s a part")
            for spec, result in zip(chunk, results, strict=True):
                self._naive(spec, result, every, total)
        return total

    def _ours(self, chunk: Sequence[Spec]) -> tuple[tuple[int, int, list[Result]], float]:
        seconds, found = timed(lambda: with_peak(lambda: self.engine.measure(chunk)))
        return found, seconds

    def _naive(self, spec: Spec, result: Result, every: int, total: Timed) -> None:
        self.seen += 1
        if self.seen % every:
            return
        # kept for the whole study there; dropped between parts here, so that the memory told is ours
        saved = {name: value.clone() for name, value in self.subject.model.state_dict().items()}
        seconds, theirs = timed(lambda: naive(self.subject, spec, self.file, saved))
        ours = result.scores["perplexity"].value
        total.naive, total.naive_parts = total.naive + seconds, total.naive_parts + 1
        total.apart = max(total.apart, abs(ours / theirs - 1))
        say(f"    naive {seconds:.2f} s, perplexity {theirs:.5f}, ours {ours:.5f}")


# -------------------------------------------------------------------------------------- the naive loop
@torch.no_grad()
def naive(subject: Subject, spec: Spec, file: Path, saved: dict[str, Tensor]) -> float:
    """The perplexity without a part: zero, evaluate, copy everything back."""
    for change in spec.plan.edits:
        weight = subject.module(change.site.path).get_parameter(change.site.weight)
        if spec.strategy == "heads":
            weight[:, change.neurons] = 0  # type: ignore[union-attr]
        else:
            weight.zero_()
    found = evaluate(subject, file)
    subject.model.load_state_dict(saved)
    return found


def evaluate(subject: Subject, file: Path) -> float:
    """A new evaluator: tokenises, batches, and asks the model for its loss."""
    texts = file.read_text().split("\n\n")
    losses = []
    for i in range(0, len(texts), NAIVE_ROWS):
        ids = [row[:LENGTH] for row in subject.tokenizer(texts[i : i + NAIVE_ROWS])["input_ids"]]
        batch = torch.tensor(ids)  # all are of full length: nothing is padded
        losses.append(subject.model(input_ids=batch, attention_mask=torch.ones_like(batch), labels=batch).loss)
    return float(torch.stack(losses).double().mean().exp())


# ------------------------------------------------------------------------------------------- the floor
def floor_flops(subject: Subject, spec: Spec, texts: int, length: int) -> float:
    """Multiply-adds × 2 of what a part's absence changes: from its block's MLP (of a head) or the next block on."""
    block, config = subject.module(f"{subject.layers}.0"), subject.model.config
    attention = sum(p.numel() for name, p in block.named_parameters() if "self_attn" in name)
    mlp = sum(p.numel() for name, p in block.named_parameters() if "mlp" in name)
    inner = config.num_attention_heads * config.head_dim
    scores = length * inner  # queries × keys and scores × values, half of each, since a token sees those before it
    head = subject.model.get_output_embeddings().weight.numel()
    above = (subject.n_layers - 1 - spec.layer) * (attention + mlp + scores)
    own = mlp + config.head_dim * subject.width if spec.strategy == "heads" else 0
    return float(2 * texts * length * (above + own + head))


if __name__ == "__main__":
    main()
