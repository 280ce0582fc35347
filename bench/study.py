"""A per-layer, per-FFN and per-head study of SmolLM2-135M: ours, the naive loop, and the floor.

The naive loop is the audited one: for each part zero its weights, tokenise the texts anew and measure with an evaluator
of its own, through the whole model with its labels; then copy the whole state dict back. The floor is the FLOPs of what
lies above each edit, attention's products and the LM head included, at the rate of matrix products measured between the
parts. The two take turns; the naive one runs on a sample of parts, since each costs it the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.common import (
    describe_machine,
    measure_machine_rate,
    parse_options,
    print_report,
    resident_bytes,
    run_with_peak,
    say,
    time_call,
)
from obliteratus.core.settings import Step
from obliteratus.core.types import Subject
from obliteratus.inference.memory import held_bytes
from obliteratus.study.base import Knockout
from obliteratus.study.settings import Data, Study
from obliteratus.study.workers import Local

MODEL = "organism:base"
TEXTS, LENGTH = 16, 128
# Words of a text, and from one's beginning to the next's: each has more than LENGTH tokens and is cut there
WORDS, STRIDE = 120, 90
NAIVE_ROWS = 8  # the audited loop's batch size


class Shape(NamedTuple):
    """How much is measured."""

    every: int
    """Of the study's chunks of four parts, every so-many-th; sampled, they share less of what is kept."""
    rounds: int
    naive: int
    """Parts of the naive loop after each round."""
    apart: int
    """How far these are apart in what ours has measured."""


WHOLE, QUICK = Shape(1, 3, 5, 13), Shape(23, 1, 2, 7)


def main() -> None:
    """Prints seconds, ratios, memory and the largest relative difference of perplexities."""
    options = parse_options(__doc__ or "")
    bare, file = resident_bytes(), _texts()
    ours = Local(_study(file), {})
    subject, loaded = ours.engine.subject, resident_bytes()
    race = Race(ours, file)
    race.run(QUICK if options.quick else WHOLE)
    weights = sum(p.numel() * p.element_size() for p in subject.model.parameters())
    kept = sum(metric.passes.bytes_cached() for metric in ours.engine.metrics)
    sizes = {"model_MB": weights, "libraries_MB": bare, "loaded_MB": loaded, "kept_MB": kept, "peak_MB": race.peak}
    memory = {"peak_over_model_and_states": (race.peak - bare) / (weights + kept)}
    memory |= {"peak_over_loaded": race.peak / (loaded + kept)}
    memory |= {name: size / 1e6 for name, size in sizes.items()}
    print_report(race.told() | {"memory": memory, "machine": describe_machine()}, options.json)


def _study(texts: Path) -> Study:
    steps = tuple(Step(use=name) for name in ("layers", "ffn", "heads"))
    return Study(model=MODEL, data=Data(texts=str(texts), samples=TEXTS, length=LENGTH), strategies=steps)


def _texts() -> Path:
    """The licence, cut into texts: prose that every clone holds."""
    words = (Path(__file__).parents[1] / "LICENSE").read_text().split()
    file = Path("/tmp/bench-study.txt")
    file.write_text("\n\n".join(" ".join(words[i * STRIDE : i * STRIDE + WORDS]) for i in range(TEXTS)))
    return file


class Race:
    """Both loops, in turns: a round of ours, a few parts of the naive one."""

    def __init__(self, ours: Local, file: Path) -> None:
        self.ours, self.file, self.subject = ours, file, ours.engine.subject
        self.specs = ours.knockouts
        self.seconds, self.flops, self.floor, self.peak = 0.0, 0.0, 0.0, 0
        self.naive: list[float] = []
        self.measured: dict[str, float] = {}
        """Perplexity by part."""
        self.apart = 0.0

    def run(self, shape: Shape) -> None:
        self.seconds, _ = time_call(self.ours.measure_baseline)
        chunks = self.ours.batches()[shape.every // 2 :: shape.every]
        for start in range(shape.rounds):
            self._round(chunks[start :: shape.rounds])
            for name in list(self.measured)[-1 - start % 3 :: -shape.apart][: shape.naive]:
                self._naive(self.specs[name])

    def _round(self, chunks: Sequence[list[str]]) -> None:
        rate = measure_best_rate()
        held_bytes(self.subject)  # gives back to the system what the naive loop has freed
        seconds, (_, peak, found) = time_call(lambda: run_with_peak(lambda: list(self.ours.measure_batches(chunks))))
        rate = max(rate, measure_best_rate())
        results = [result for part in found for result in part]
        flops = sum(count_floor_flops(self.subject, self.specs[r.component], TEXTS, LENGTH) for r in results)
        self.seconds, self.flops, self.floor = self.seconds + seconds, self.flops + flops, self.floor + flops / rate
        self.peak = max(self.peak, peak)
        self.measured |= {result.component: result.scores["perplexity"].value for result in results}
        each = f"{seconds / len(results):.2f} s each, {flops / rate / len(results):.2f} at best"
        say(f"ours: {len(results)} parts, {each}, {resident_bytes() / 1e6:.0f} MB now, {peak / 1e6:.0f} at most")

    def _naive(self, spec: Knockout) -> None:
        # kept for the whole study there; dropped between parts here, so that the memory told is ours
        saved = {name: value.clone() for name, value in self.subject.model.state_dict().items()}
        seconds, theirs = time_call(lambda: measure_naively(self.subject, spec, self.file, saved))
        own = self.measured[spec.component]
        self.naive.append(seconds)
        self.apart = max(self.apart, abs(own / theirs - 1))
        say(f"    naive, {spec.component}: {seconds:.2f} s, perplexity {theirs:.5f}, ours {own:.5f}")

    def told(self) -> dict[str, Any]:
        """Seconds of the parts that ours measured; the naive loop's, from its sample, for as many and a baseline."""
        naive = sum(self.naive) / len(self.naive) * (len(self.measured) + 1)
        return {
            "seconds": {"ours": self.seconds, "naive": naive, "floor": self.floor},
            "ratio": {"naive": naive / self.seconds, "floor": self.seconds / self.floor},
            "equal": {"relative_difference": f"{self.apart:.1e}"},
            "parts": {"ours": len(self.measured), "of": len(self.specs), "naive": len(self.naive)},
            "rate": {"GFLOPs": self.flops / self.floor / 1e9},
        }


def measure_best_rate() -> float:
    """FLOP/s of fp32 matrix products, the best of eight runs: a floor must not be too high."""
    x, weight = torch.randn(2048, 1024), torch.randn(1024, 1024)
    with torch.inference_mode():
        seconds = min(time_call(lambda: torch.nn.functional.linear(x, weight))[0] for _ in range(8))
    return max(measure_machine_rate(), 2.0 * len(x) * weight.numel() / seconds)


# -------------------------------------------------------------------------------------- the naive loop
@torch.no_grad()
def measure_naively(subject: Subject, spec: Knockout, file: Path, saved: dict[str, Tensor]) -> float:
    """The perplexity without a part: zero, evaluate, copy everything back."""
    for change in spec.plan.edits:
        weight = subject.module(change.site.path).get_parameter(change.site.weight)
        if spec.strategy == "heads":
            weight[:, change.neurons] = 0  # type: ignore[union-attr]
        else:
            weight.zero_()
    found = evaluate_naively(subject, file)
    subject.model.load_state_dict(saved)
    return found


def evaluate_naively(subject: Subject, file: Path) -> float:
    """A new evaluator: tokenises, batches, and asks the model for its loss."""
    texts = file.read_text().split("\n\n")
    losses = []
    for i in range(0, len(texts), NAIVE_ROWS):
        ids = [row[:LENGTH] for row in subject.tokenizer(texts[i : i + NAIVE_ROWS])["input_ids"]]
        batch = torch.tensor(ids)  # all are of full length: nothing is padded
        losses.append(subject.model(input_ids=batch, attention_mask=torch.ones_like(batch), labels=batch).loss)
    return float(torch.stack(losses).double().mean().exp())


# ------------------------------------------------------------------------------------------- the floor
def count_floor_flops(subject: Subject, spec: Knockout, texts: int, length: int) -> float:
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
