"""VERIFY of held-out prompts: this program, one prompt at a time, plain batches, and the FLOP floor.

All write greedy answers of at most 48 tokens to all held-out prompts; the verdicts must be equal.
one_at_a_time: transformers' generate on each prompt alone. batched: generate on left-padded batches of 32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from bench.common import (
    SMOKE_PROMPTS,
    compute_ratios,
    count_backbone_flops,
    count_head_flops,
    describe_machine,
    describe_memory,
    load_organism,
    measure_machine_rate,
    parse_options,
    print_report,
    run_with_peak,
    say,
    time_call,
    time_in_turns,
    time_sample,
)
from obliteratus.core.settings import Step
from obliteratus.core.types import PromptSet, Subject
from obliteratus.inference.chat_template import Ids, render_prompts
from obliteratus.inference.generate import kv_bytes
from obliteratus.judge.judge import Judge
from obliteratus.prompts import split_prompts
from obliteratus.verify import measure

TOKENS = 48
QUICK_EVERY = {"one_at_a_time": 16, "batched": 5}  # every n-th prompt: 10 of 160, and one batch of 32


def answer_one_at_a_time(subject: Subject, ids: Ids) -> list[str]:
    """Return the answers of generate to each prompt alone."""
    return [text for row in ids for text in _generate(subject, [row])]


def answer_batched(subject: Subject, ids: Ids, size: int = 32) -> list[str]:
    """Return the answers of generate to left-padded batches in file order."""
    return [text for i in range(0, len(ids), size) for text in _generate(subject, ids[i : i + size])]


def _generate(subject: Subject, rows: Ids) -> list[str]:
    longest, pad = max(map(len, rows)), subject.tokenizer.pad_token_id
    tokens = torch.tensor([[pad] * (longest - len(r)) + r for r in rows])
    mask = torch.tensor([[0] * (longest - len(r)) + [1] * len(r) for r in rows])
    out = subject.model.generate(
        input_ids=tokens, attention_mask=mask, max_new_tokens=TOKENS, do_sample=False, pad_token_id=pad
    )
    return list(subject.tokenizer.batch_decode(out[:, longest:], skip_special_tokens=True))


def kept_cache_bytes(subject: Subject, ids: Ids, written: list[int]) -> float:
    """Return the bytes of keys and values at the end, where rows are padded at the left."""
    longest = max(map(len, ids))
    return sum(longest + n for n in written) * kv_bytes(subject)


def main(argv: Sequence[str] | None = None) -> None:
    """Print seconds and ratios."""
    options = parse_options(__doc__, argv)
    subject, everything = load_organism()
    held_out = split_prompts(everything, 0).report
    most = SMOKE_PROMPTS if options.smoke else None
    prompts = PromptSet({g: held_out[g][:most] for g in ("target", "control")})
    ids = [row for g in ("target", "control") for row in render_prompts(subject, prompts[g])]
    every = QUICK_EVERY if options.quick else dict.fromkeys(QUICK_EVERY, 1)
    steps = (Step(use="behavior", tokens=TOKENS),)
    seconds = {}
    loaded, peak, (seconds["ours"], measured) = run_with_peak(
        lambda: time_call(lambda: measure(subject, prompts, steps))
    )
    say("one at a time …")
    seconds["one_at_a_time"], texts = time_sample(
        lambda rows: answer_one_at_a_time(subject, rows), ids, every["one_at_a_time"]
    )
    say("batched …")
    seconds["batched"], _ = time_sample(lambda rows: answer_batched(subject, rows), ids, every["batched"])
    if not options.quick:
        fast = {"ours": lambda: measure(subject, prompts, steps), "batched": lambda: answer_batched(subject, ids)}
        seconds |= time_in_turns(fast, options.repeats)
    rate = measure_machine_rate()
    written = [len(subject.tokenizer(r["answer"])["input_ids"]) for r in measured.records]
    new = sum(written)
    flops = count_backbone_flops(subject, ids) + count_backbone_flops(subject, [[0] * (new + 1)])
    seconds["floor"] = (flops + count_head_flops(subject, new)) / rate
    ratio = compute_ratios(seconds)
    verdicts = [r["verdict"] for r in measured.records][:: every["one_at_a_time"]]
    same = sum(Judge().judge_answer(text) == ours for text, ours in zip(texts, verdicts, strict=True))
    shortened = {n: f"every {k}th prompt, scaled to all" for n, k in every.items()} if options.quick else {}
    facts: dict[str, object] = {
        "prompts": len(ids),
        "equal_verdicts": f"{same} of {len(verdicts)}",
        "tokens_written": new,
        "gflops": rate / 1e9,
        **describe_memory(loaded, peak, kept_cache_bytes(subject, ids, written)),
        "machine": describe_machine(),
    }
    print_report({"seconds": seconds, "ratio": ratio, "facts": facts, "shortened": shortened}, options.json)


if __name__ == "__main__":
    main()
