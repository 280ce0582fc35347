"""A study of all layers, FFNs and heads of SmolLM2-135M: ours, a naive loop, and the FLOP floor.

The naive loop is that of the audited program. For each part it zeroes the weights, tokenizes the texts again, runs the
whole model with labels, and then copies the whole state dict back. The floor is the FLOPs of all that lies above each
edit, including attention's products and the LM head, at the rate of matrix products measured in between. Both take
turns. The naive loop runs on a sample of parts, since every part costs it the same.
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
# Words in a text, and between the beginnings of two: each has more than LENGTH tokens and is truncated to it.
WORDS, STRIDE = 120, 90
NAIVE_ROWS = 8  # the audited loop's batch size


class Shape(NamedTuple):
    """How much is measured."""

    every: int
    """Measure every n-th batch of the study. Fewer batches share less of what is cached."""
    rounds: int
    naive: int
    """Parts that the naive loop measures after each round."""
    stride: int
    """Distance between these parts in the order in which ours measured them."""


WHOLE, QUICK, SMOKE = Shape(1, 3, 5, 13), Shape(23, 1, 2, 7), Shape(120, 1, 1, 1)


def main(argv: Sequence[str] | None = None) -> None:
    """Print seconds, ratios, memory and the largest relative difference of perplexities."""
    options = parse_options(__doc__, argv)
    libraries, file = resident_bytes(), _texts()
    ours = Local(_study(file), {})
    subject, loaded = ours.engine.subject, resident_bytes()
    race = Race(ours, file)
    race.run(SMOKE if options.smoke else QUICK if options.quick else WHOLE)
    weights = sum(p.numel() * p.element_size() for p in subject.model.parameters())
    cached = sum(metric.passes.bytes_cached() for metric in ours.engine.metrics)
    sizes = {
        "model_MB": weights,
        "libraries_MB": libraries,
        "loaded_MB": loaded,
        "kept_MB": cached,
        "peak_MB": race.peak,
    }
    memory = {"peak_over_model_and_states": (race.peak - libraries) / (weights + cached)}
    memory |= {"peak_over_loaded": race.peak / (loaded + cached)}
    memory |= {name: size / 1e6 for name, size in sizes.items()}
    print_report(race.to_dict() | {"memory": memory, "machine": describe_machine()}, options.json)


def _study(texts: Path) -> Study:
    steps = tuple(Step(use=name) for name in ("layers", "ffn", "heads"))
    return Study(model=MODEL, data=Data(texts=str(texts), samples=TEXTS, length=LENGTH), strategies=steps)


def _texts() -> Path:
    """Return a file with pieces of the license: prose that every clone has."""
    words = (Path(__file__).parents[1] / "LICENSE").read_text(encoding="utf-8").split()
    file = Path("/tmp/bench-study.txt")
    file.write_text(
        "\n\n".join(" ".join(words[i * STRIDE : i * STRIDE + WORDS]) for i in range(TEXTS)), encoding="utf-8"
    )
    return file


class Race:
    """Runs both loops in turns: a round of ours, then a few parts of the naive one."""

    def __init__(self, ours: Local, file: Path) -> None:
        self.ours, self.file, self.subject = ours, file, ours.engine.subject
        self.knockouts = ours.knockouts
        self.seconds, self.flops, self.floor, self.peak = 0.0, 0.0, 0.0, 0
        self.naive: list[float] = []
        self.measured: dict[str, float] = {}
        """Perplexity by part."""
        self.difference = 0.0

    def run(self, shape: Shape) -> None:
        self.seconds, _ = time_call(self.ours.measure_baseline)
        batches = self.ours.batches()[shape.every // 2 :: shape.every]
        for start in range(shape.rounds):
            self._round(batches[start :: shape.rounds])
            for name in list(self.measured)[-1 - start % 3 :: -shape.stride][: shape.naive]:
                self._naive(self.knockouts[name])

    def _round(self, batches: Sequence[list[str]]) -> None:
        rate = measure_best_rate()
        held_bytes(self.subject)  # returns to the system what the naive loop has freed
        seconds, (_, peak, found) = time_call(lambda: run_with_peak(lambda: list(self.ours.measure_batches(batches))))
        rate = max(rate, measure_best_rate())
        results = [result for part in found for result in part]
        flops = sum(count_floor_flops(self.subject, self.knockouts[r.component], TEXTS, LENGTH) for r in results)
        self.seconds, self.flops, self.floor = self.seconds + seconds, self.flops + flops, self.floor + flops / rate
        self.peak = max(self.peak, peak)
        self.measured |= {result.component: result.scores["perplexity"].value for result in results}
        each = f"{seconds / len(results):.2f} s each, {flops / rate / len(results):.2f} at best"
        say(f"ours: {len(results)} parts, {each}, {resident_bytes() / 1e6:.0f} MB now, {peak / 1e6:.0f} at most")

    def _naive(self, knockout: Knockout) -> None:
        # The audited program keeps this copy during the whole study. Here it is dropped, so that the memory is ours.
        saved = {name: value.clone() for name, value in self.subject.model.state_dict().items()}
        seconds, theirs = time_call(lambda: measure_naively(self.subject, knockout, self.file, saved))
        own = self.measured[knockout.component]
        self.naive.append(seconds)
        self.difference = max(self.difference, abs(own / theirs - 1))
        say(f"    naive, {knockout.component}: {seconds:.2f} s, perplexity {theirs:.5f}, ours {own:.5f}")

    def to_dict(self) -> dict[str, Any]:
        """Return seconds of the parts that ours measured, and the naive loop's for as many, scaled from its sample."""
        naive = sum(self.naive) / len(self.naive) * (len(self.measured) + 1)
        return {
            "seconds": {"ours": self.seconds, "naive": naive, "floor": self.floor},
            "ratio": {"naive": naive / self.seconds, "floor": self.seconds / self.floor},
            "equal": {"relative_difference": f"{self.difference:.1e}"},
            "parts": {"ours": len(self.measured), "of": len(self.knockouts), "naive": len(self.naive)},
            "rate": {"GFLOPs": self.flops / self.floor / 1e9},
        }


def measure_best_rate() -> float:
    """Return the FLOP/s of fp32 matrix products. The best run counts, since the floor must not be too high."""
    x, weight = torch.randn(2048, 1024), torch.randn(1024, 1024)
    with torch.inference_mode():
        seconds = min(time_call(lambda: torch.nn.functional.linear(x, weight))[0] for _ in range(8))
    return max(measure_machine_rate(), 2.0 * len(x) * weight.numel() / seconds)


# -------------------------------------------------------------------------------------- the naive loop
@torch.no_grad()
def measure_naively(subject: Subject, knockout: Knockout, file: Path, saved: dict[str, Tensor]) -> float:
    """Return the perplexity without a part: zero it, evaluate, copy everything back."""
    for change in knockout.plan.edits:
        weight = subject.module(change.site.path).get_parameter(change.site.weight)
        if knockout.strategy == "heads":
            weight[:, change.neurons] = 0  # type: ignore[union-attr]
        else:
            weight.zero_()
    found = evaluate_naively(subject, file)
    subject.model.load_state_dict(saved)
    return found


def evaluate_naively(subject: Subject, file: Path) -> float:
    """Return the perplexity by a new evaluator: tokenize, batch, and use the model's own loss."""
    texts = file.read_text(encoding="utf-8").split("\n\n")
    losses = []
    for i in range(0, len(texts), NAIVE_ROWS):
        ids = [row[:LENGTH] for row in subject.tokenizer(texts[i : i + NAIVE_ROWS])["input_ids"]]
        batch = torch.tensor(ids)  # all have the full length, so none is padded
        losses.append(subject.model(input_ids=batch, attention_mask=torch.ones_like(batch), labels=batch).loss)
    return float(torch.stack(losses).double().mean().exp())


# ------------------------------------------------------------------------------------------- the floor
def count_floor_flops(subject: Subject, knockout: Knockout, texts: int, length: int) -> float:
    """Return the FLOPs of what a missing part changes: from its block's MLP (for a head) or the next block upwards."""
    block, config = subject.module(f"{subject.layers}.0"), subject.model.config
    attention = sum(p.numel() for name, p in block.named_parameters() if "self_attn" in name)
    mlp = sum(p.numel() for name, p in block.named_parameters() if "mlp" in name)
    inner = config.num_attention_heads * config.head_dim
    scores = length * inner  # queries × keys and scores × values, half of each, since attention is causal
    head = subject.model.get_output_embeddings().weight.numel()
    above = (subject.n_layers - 1 - knockout.layer) * (attention + mlp + scores)
    own = mlp + config.head_dim * subject.width if knockout.strategy == "heads" else 0
    return float(2 * texts * length * (above + own + head))


if __name__ == "__main__":
    main()
