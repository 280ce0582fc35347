"""What each stage of a run takes when the weights stay on disk.

Speeds are measured on a few blocks of the model; the rest is computed from sizes.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, NamedTuple

from obliteratus.core.settings import Probe, Recipe
from obliteratus.core.types import PromptSet, Subject
from obliteratus.forecast.machine import measure_gemm_rate
from obliteratus.inference.batching import CPU_TOKENS, make_batches
from obliteratus.inference.chat_template import Ids, render_prompts
from obliteratus.inference.layerwise import LayerwisePass, block_parameters, outer_parameters, run_layerwise
from obliteratus.inference.memory import memory_limit, resident_bytes
from obliteratus.inference.memory_needs import LIBRARY_BUFFERS, bytes_in_memory, bytes_offloaded, check_offloaded_fits
from obliteratus.inference.shared_prefix import shared_prefix_length
from obliteratus.pipeline.offloaded import adapt_recipe
from obliteratus.prompts import split_prompts
from obliteratus.summon.load_offloaded import open_offloaded
from obliteratus.summon.summary import ModelSummary
from obliteratus.verify.drift import text_tokens
from obliteratus.weights.rewrite import HashingReader, HashingWriter

BLOCKS = 3  # blocks that are measured: the first warms up, and the fastest of the others counts
BATCHES = 6  # batches run through each of them: enough for the next block to be read meanwhile, as in a real run
COPIED_BYTES = 256_000_000  # bytes copied, hashed and synced to measure the disk: half a second on a slow one
SCORED = 16  # prompts that REBIRTH scores before and after saving


class StageForecast(NamedTuple):
    """Memory, bytes read and seconds that one stage of a run takes."""

    peak: int
    """Most bytes that the process holds."""
    read: int
    """Bytes of weights read from disk."""
    seconds: float


class Rates(NamedTuple):
    """Speeds of this machine on this model."""

    read: float
    """Bytes of a block's weights read in a second."""
    token: float
    """Seconds of one token in one block while nothing is read."""
    block: float
    """Seconds of one block beyond the longer of reading it and computing it."""
    gemm: float
    """FLOP/s of the LM head's matrix products."""
    copy: float
    """Bytes read, hashed, written and synced in a second."""


def forecast_run(
    summary: ModelSummary, limit: float, recipe: Recipe, prompts: PromptSet, opening: dict[str, Any]
) -> dict[str, Any]:
    """Return where a run's weights are kept under the limit in bytes, and what each stage takes if that is on disk.

    In that case a few blocks are read and run to measure them, and ``stages`` is not empty. opening: arguments for
    `open_offloaded`. Raises UserError where the limit is too small even for weights on disk.
    """
    fit, _, report = split_prompts(prompts, recipe.seed, split_by=recipe.split_by)
    count = sum(map(len, (*fit.groups.values(), *report.groups.values())))
    needed, stages = bytes_in_memory(summary), dict[str, StageForecast]()
    if needed > limit:
        with memory_limit(limit):
            check_offloaded_fits(summary)
            subject = open_offloaded(summary.source, **opening)
            stages = forecast_stages(summary, subject, adapt_recipe(subject, recipe), fit, report)
    return {
        "limit": limit,
        "weights": "on disk" if stages else "in memory",
        "needed_in_memory": needed,
        "prompts": count,
        "stages": {name: stage._asdict() for name, stage in stages.items()},
        "peak": max((stage.peak for stage in stages.values()), default=needed),
        "seconds": sum(stage.seconds for stage in stages.values()),
    }


def forecast_stages(
    summary: ModelSummary, subject: Subject, recipe: Recipe, fit: PromptSet, report: PromptSet
) -> dict[str, StageForecast]:
    """Return the forecast of each stage. The recipe must have gone through `adapt_recipe`."""
    fit_ids, report_ids = _render(subject, fit), _render(subject, report)
    texts = text_tokens(subject) if any(step.use == "perplexity" for step in recipe.verify) else []
    rates, base = measure_rates(subject, fit_ids), resident_bytes()
    table, head = (subject.offloaded.stored_bytes(outer_parameters(subject, head=end)) for end in (False, True))
    head = 0 if summary.tied else int(head)  # a tied head is in memory already
    weights = int(subject.offloaded.stored_bytes(list(subject.offloaded)))
    tied_table = summary.table_bytes if summary.tied else 0  # stays in memory from the first tokens to the last
    logits, stream = 4 * summary.vocabulary, 4 * summary.width  # bytes of one token, fp32
    reading = _block_bytes(subject) / rates.read
    run_seconds = partial(_pass_seconds, rates, summary.n_layers, table / rates.read, reading)
    passing = bytes_offloaded(summary)
    probe_rows = len(fit_ids) + _rows_kept(recipe.probe, fit)
    verify_tokens = 2 * (_count_tokens(report_ids) + sum(map(len, texts)))  # before and after the edit
    head_rows = 2 * len(report_ids)
    head_seconds = 2.0 * summary.vocabulary * summary.width * (head_rows + 2 * sum(map(len, texts))) / rates.gemm
    scored = report_ids[-SCORED:]
    return {
        f"PROBE × {recipe.passes}": StageForecast(
            passing + stream * (summary.n_layers + 1) * probe_rows,
            recipe.passes * (weights - head),
            recipe.passes * run_seconds(_count_tokens(fit_ids)),
        ),
        "VERIFY": StageForecast(
            passing + tied_table + stream * verify_tokens + 2 * head_rows * logits,
            weights,
            run_seconds(verify_tokens) + head / rates.read + head_seconds,
        ),
        # An edited matrix is at most half of its block, and has a copy beside it.
        "SAVE": StageForecast(base + 2 * (summary.block_bytes // 2) + LIBRARY_BUFFERS, weights, weights / rates.copy),
        "SCORE × 2": StageForecast(
            passing + tied_table + len(scored) * logits,
            2 * weights,
            2 * (run_seconds(_count_tokens(scored)) + head / rates.read),
        ),
    }


def _pass_seconds(rates: Rates, n_layers: int, reading_table: float, reading_block: float, tokens: int) -> float:
    """Return the seconds of one pass: the table, then each block, which is read while the one before it computes."""
    return reading_table + reading_block + n_layers * (max(reading_block, tokens * rates.token) + rates.block)


def _render(subject: Subject, prompts: PromptSet) -> Ids:
    return render_prompts(subject, list(chain.from_iterable(prompts.groups.values())))


def _count_tokens(ids: Ids) -> int:
    """Return the tokens that are computed; those of the shared prefix count once."""
    n = shared_prefix_length(ids)
    return sum(len(row) - n for row in ids) + n


def _rows_kept(options: Probe, fit: PromptSet) -> int:
    """Return how many prompts' streams PROBE's result takes as much memory as."""
    sizes = [len(members) for members in fit.groups.values()]
    return {"rows": sum(sizes), "sketch": 2 * options.sketch * len(sizes), "moments": 0}[options.keep]


def _block_bytes(subject: Subject) -> int:
    return int(subject.offloaded.stored_bytes(block_parameters(subject, subject.n_layers - 1)))


# ------------------------------------------------------------------------------------------ measuring
def measure_rates(subject: Subject, ids: Ids) -> Rates:
    """Read some blocks, run prompts through the first of them, copy part of a file, and return the speeds."""
    read = _measure_read(subject)
    token, block = _measure_block(subject, ids, read)
    files = list(subject.offloaded.checkpoint.shards)
    return Rates(read, token, block, measure_gemm_rate(), _measure_copy(files[len(files) // 2]))


def _measure_read(subject: Subject) -> float:
    """Return bytes a second. Only the last two blocks count: they are read into memory that was in use before."""
    names = [block_parameters(subject, block) for block in range(subject.n_layers)[-BLOCKS - 1 :]]
    times = [time.perf_counter()]
    for own, following in zip(names, [*names[1:], ()], strict=True):
        with subject.offloaded.load_block(own, following):
            times.append(time.perf_counter())
    seconds = [after - before for before, after in pairwise(times)]
    return float(subject.offloaded.stored_bytes(names[-1]) / min(seconds[-2:]))


def _measure_block(subject: Subject, ids: Ids, read: float) -> tuple[float, float]:
    """Return `Rates.token` and `Rates.block`, each the smallest value measured on the first blocks."""
    n = shared_prefix_length(ids)
    rows = [ids[i] for batch in make_batches([len(row) - n for row in ids], CPU_TOKENS)[:BATCHES] for i in batch]
    starts: dict[int, float] = {}
    token_seconds: list[float] = []

    @contextmanager
    def clock(stream: int, rows: Sequence[int], lengths: Any) -> Iterator[None]:
        start = time.perf_counter()
        starts.setdefault(stream, start)
        try:
            yield
        finally:  # a pass ends by an exception
            if stream:  # stream 0 is the embedding table
                token_seconds.append((time.perf_counter() - start) / int(lengths.sum()))

    top = min(BLOCKS + 1, subject.n_layers)
    run_layerwise(subject, LayerwisePass(subject, rows), top=top, around=clock, title="measuring")
    block_seconds = [after - before for before, after in pairwise(starts[stream] for stream in sorted(starts))][1:]
    token = min(token_seconds)
    known = max(_block_bytes(subject) / read, _count_tokens(rows) * token)
    return token, max(0.0, min(block_seconds, default=0.0) - known)


def _measure_copy(file: Path) -> float:
    size, start = min(file.stat().st_size, COPIED_BYTES), time.perf_counter()
    with tempfile.TemporaryFile() as copy, file.open("rb") as opened:
        HashingReader(opened, "").copy(HashingWriter(copy), size)
        copy.flush()
        os.fsync(copy.fileno())
    return size / (time.perf_counter() - start)
