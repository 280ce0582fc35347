"""PROBE of templated prompts: this program, one prompt at a time, plain batches, and the FLOP floor.

one_at_a_time: each prompt alone through the whole model with its LM head, as the audited program does it.
batched: batches of 32, left-padded, through the LM head, as the peers do it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from bench.common import (
    SMOKE_PROMPTS,
    compute_ratios,
    count_backbone_flops,
    describe_machine,
    describe_memory,
    load_organism,
    measure_machine_rate,
    parse_options,
    print_report,
    run_with_peak,
    say,
    time_in_turns,
    time_sample,
)
from obliteratus.core.settings import Probe
from obliteratus.core.types import PromptSet, Subject
from obliteratus.inference.chat_template import Ids, render_prompts
from obliteratus.probe.probe import collect_activations

PROMPTS, QUICK_EVERY = 256, 4  # with --quick the others take every 4th prompt


def probe_one_at_a_time(subject: Subject, ids: Ids) -> torch.Tensor:
    """Return the streams at the last token as the audited loop collects them. [prompts, streams, width]."""
    rows = []
    with torch.no_grad():
        for row in ids:
            out = subject.model(input_ids=torch.tensor([row]), output_hidden_states=True)
            rows.append(torch.stack([h[0, -1] for h in out.hidden_states]))
    return torch.stack(rows)


def probe_batched(subject: Subject, ids: Ids, size: int = 32) -> None:
    """Collect the same in left-padded batches in file order."""
    with torch.no_grad():
        for start in range(0, len(ids), size):
            part = ids[start : start + size]
            longest = max(map(len, part))
            tokens = torch.tensor([[0] * (longest - len(r)) + r for r in part])
            mask = torch.tensor([[0] * (longest - len(r)) + [1] * len(r) for r in part])
            out = subject.model(input_ids=tokens, attention_mask=mask, output_hidden_states=True)
            torch.stack([h[:, -1] for h in out.hidden_states])


def main(argv: Sequence[str] | None = None) -> None:
    """Print seconds and ratios."""
    options = parse_options(__doc__, argv)
    subject, prompts = load_organism()
    chosen = prompts["control"][: SMOKE_PROMPTS if options.smoke else PROMPTS]
    every = QUICK_EVERY if options.quick else 1
    ids = render_prompts(subject, chosen)
    controls = PromptSet({"control": chosen})

    def ours() -> Any:
        return collect_activations(subject, controls, Probe(keep="rows"))

    before, peak, acts = run_with_peak(ours)
    say("one at a time …")
    seconds = {}
    seconds["one_at_a_time"], expected = time_sample(lambda rows: probe_one_at_a_time(subject, rows), ids, every)
    rows = acts["control"].rows
    error = float((rows[::every, :-1] - expected[:, :-1]).abs().max() / expected[:, :-1].abs().max())
    sample = ids[::every]
    repeats = 1 if options.quick else options.repeats
    seconds |= time_in_turns({"ours": ours, "batched": lambda: probe_batched(subject, sample)}, repeats)
    seconds["batched"] *= len(ids) / len(sample)
    rate = measure_machine_rate()
    seconds["floor"] = count_backbone_flops(subject, ids) / rate
    ratio = compute_ratios(seconds)
    shortened = (
        dict.fromkeys(("one_at_a_time", "batched"), f"every {every}th prompt, scaled to all") if every > 1 else {}
    )
    facts: dict[str, object] = {"prompts": len(ids), "mean_tokens": sum(map(len, ids)) / len(ids), "gflops": rate / 1e9}
    facts |= {"largest_relative_difference": error, **describe_memory(before, peak, rows.nbytes)}
    facts |= {"machine": describe_machine()}
    print_report({"seconds": seconds, "ratio": ratio, "facts": facts, "shortened": shortened}, options.json)


if __name__ == "__main__":
    main()
