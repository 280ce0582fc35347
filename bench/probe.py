"""PROBE of templated prompts: this program, the audited loop, plain batches, and the FLOP floor.

one_at_a_time: each prompt alone through the whole model, LM head included, as the audit found it.
batched: batches of 32, left-padded, through the LM head, as the peers do.
"""

from __future__ import annotations

from typing import Any

import torch

from bench.common import (
    arguments,
    backbone_flops,
    interleaved,
    machine,
    machine_rate,
    memory,
    organism,
    ratios,
    report,
    say,
    scaled,
    with_peak,
)
from obliteratus.core.settings import Probe
from obliteratus.core.types import PromptSet, Subject
from obliteratus.inference.chat_template import Ids, render_prompts
from obliteratus.probe.probe import collect_activations

PROMPTS, QUICK = 256, 4  # with --quick the others take every 4th prompt


def one_at_a_time(subject: Subject, ids: Ids) -> torch.Tensor:
    """The audited loop. [prompts, streams, width]."""
    rows = []
    with torch.no_grad():
        for row in ids:
            out = subject.model(input_ids=torch.tensor([row]), output_hidden_states=True)
            rows.append(torch.stack([h[0, -1] for h in out.hidden_states]))
    return torch.stack(rows)


def batched(subject: Subject, ids: Ids, size: int = 32) -> None:
    """Left-padded batches in file order through the LM head."""
    with torch.no_grad():
        for start in range(0, len(ids), size):
            part = ids[start : start + size]
            longest = max(map(len, part))
            tokens = torch.tensor([[0] * (longest - len(r)) + r for r in part])
            mask = torch.tensor([[0] * (longest - len(r)) + [1] * len(r) for r in part])
            out = subject.model(input_ids=tokens, attention_mask=mask, output_hidden_states=True)
            torch.stack([h[:, -1] for h in out.hidden_states])


def main() -> None:
    """Print seconds and ratios."""
    options = arguments(__doc__ or "")
    subject, prompts = organism()
    chosen = prompts["control"][:PROMPTS]
    every = QUICK if options.quick else 1
    ids = render_prompts(subject, chosen)
    only = PromptSet({"control": chosen})

    def ours() -> Any:
        return collect_activations(subject, only, Probe(keep="rows"))

    before, peak, kept = with_peak(ours)
    say("one at a time …")
    seconds = {}
    seconds["one_at_a_time"], truth = scaled(lambda rows: one_at_a_time(subject, rows), ids, every)
    rows = kept["control"].rows
    error = float((rows[::every, :-1] - truth[:, :-1]).abs().max() / truth[:, :-1].abs().max())
    sample = ids[::every]
    repeats = 1 if options.quick else options.repeats
    seconds |= interleaved({"ours": ours, "batched": lambda: batched(subject, sample)}, repeats)
    seconds["batched"] *= len(ids) / len(sample)
    rate = machine_rate()
    seconds["floor"] = backbone_flops(subject, ids) / rate
    ratio = ratios(seconds)
    shortened = (
        dict.fromkeys(("one_at_a_time", "batched"), f"every {every}th prompt, scaled to all") if every > 1 else {}
    )
    facts: dict[str, object] = {"prompts": len(ids), "mean_tokens": sum(map(len, ids)) / len(ids), "gflops": rate / 1e9}
    facts |= {"largest_relative_difference": error, **memory(before, peak, rows.nbytes), "machine": machine()}
    report({"seconds": seconds, "ratio": ratio, "facts": facts, "shortened": shortened}, options.json)


if __name__ == "__main__":
    main()
