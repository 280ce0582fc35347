"""VERIFY of held-out prompts: this program, one-at-a-time generation, plain batches, and the FLOP floor.

All write greedy answers of at most 48 tokens to all held-out prompts; the verdicts must be equal.
one_at_a_time: transformers' generate on each prompt alone. batched: generate on left-padded batches of 32.
"""

from __future__ import annotations

import torch

from bench.common import (
    arguments,
    backbone_flops,
    head_flops,
    interleaved,
    machine,
    machine_rate,
    memory,
    organism,
    ratios,
    report,
    say,
    scaled,
    timed,
    with_peak,
)
from obliteratus.core.settings import Step
from obliteratus.core.types import PromptSet, Subject
from obliteratus.inference.chat_template import Ids, render_prompts
from obliteratus.inference.generate import kv_bytes
from obliteratus.verify import measure
from obliteratus.verify.refusal import judge_answer

TOKENS = 48
QUICK = {"one_at_a_time": 16, "batched": 5}  # every so-many-th prompt: 10 of 160, and one batch of 32


def one_at_a_time(subject: Subject, ids: Ids) -> list[str]:
    """generate on each prompt alone."""
    return [text for row in ids for text in _generate(subject, [row])]


def batched(subject: Subject, ids: Ids, size: int = 32) -> list[str]:
    """generate on left-padded batches in file order."""
    return [text for i in range(0, len(ids), size) for text in _generate(subject, ids[i : i + size])]


def _generate(subject: Subject, rows: Ids) -> list[str]:
    longest, pad = max(map(len, rows)), subject.tokenizer.pad_token_id
    tokens = torch.tensor([[pad] * (longest - len(r)) + r for r in rows])
    mask = torch.tensor([[0] * (longest - len(r)) + [1] * len(r) for r in rows])
    out = subject.model.generate(
        input_ids=tokens, attention_mask=mask, max_new_tokens=TOKENS, do_sample=False, pad_token_id=pad
    )
    return list(subject.tokenizer.batch_decode(out[:, longest:], skip_special_tokens=True))


def cached(subject: Subject, ids: Ids, written: list[int]) -> float:
    """Bytes of the keys and values that are kept: rows end together, padded at the left, till the last is done."""
    longest = max(map(len, ids))
    return sum(longest + n for n in written) * kv_bytes(subject)


def main() -> None:
    """Print seconds and ratios."""
    options = arguments(__doc__ or "")
    subject, everything = organism()
    report_part = everything.split(0).report
    prompts = PromptSet({g: report_part[g] for g in ("target", "control")})
    ids = [row for g in ("target", "control") for row in render_prompts(subject, prompts[g])]
    every = QUICK if options.quick else dict.fromkeys(QUICK, 1)
    steps = (Step(use="refusal", tokens=TOKENS),)
    seconds = {}
    loaded, peak, (seconds["ours"], found) = with_peak(lambda: timed(lambda: measure(subject, prompts, steps)))
    say("one at a time …")
    seconds["one_at_a_time"], texts = scaled(lambda rows: one_at_a_time(subject, rows), ids, every["one_at_a_time"])
    say("batched …")
    seconds["batched"], _ = scaled(lambda rows: batched(subject, rows), ids, every["batched"])
    if not options.quick:
        fast = {"ours": lambda: measure(subject, prompts, steps), "batched": lambda: batched(subject, ids)}
        seconds |= interleaved(fast, options.repeats)
    rate = machine_rate()
    written = [len(subject.tokenizer(r["answer"])["input_ids"]) for r in found.records]
    new = sum(written)
    flops = backbone_flops(subject, ids) + backbone_flops(subject, [[0] * (new + 1)]) + head_flops(subject, new)
    seconds["floor"] = flops / rate
    ratio = ratios(seconds)
    verdicts = [r["verdict"] for r in found.records][:: every["one_at_a_time"]]
    same = sum(judge_answer(text) == ours for text, ours in zip(texts, verdicts, strict=True))
    shortened = {n: f"every {k}th prompt, scaled to all" for n, k in every.items()} if options.quick else {}
    facts: dict[str, object] = {
        "prompts": len(ids),
        "equal_verdicts": f"{same} of {len(verdicts)}",
        "tokens_written": new,
    }
    facts |= {"gflops": rate / 1e9, **memory(loaded, peak, cached(subject, ids, written)), "machine": machine()}
    report({"seconds": seconds, "ratio": ratio, "facts": facts, "shortened": shortened}, options.json)


if __name__ == "__main__":
    main()
