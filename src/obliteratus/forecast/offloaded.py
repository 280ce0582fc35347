"""What a run with weights on disk will take, stage by stage: measured on a few blocks, and reckoned for the rest."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, NamedTuple

from obliteratus.core.settings import Probe, Recipe
from obliteratus.core.types import PromptSet, Subject
from obliteratus.forecast.machine import measure_gemm_rate
from obliteratus.inference.batching import CPU_TOKENS, make_batches, shared_prefix_length
from obliteratus.inference.chat_template import Ids, render_prompts
from obliteratus.inference.layerwise import LayerwisePass, block_parameters, outer_parameters, run_layerwise
from obliteratus.inference.memory import memory_limit, resident_bytes
from obliteratus.inference.memory_needs import BUFFERS, batch_bytes, bytes_in_memory, check_offloaded_fits
from obliteratus.pipeline.offloaded import adapt_recipe
from obliteratus.prompts import parts_checked
from obliteratus.summon.load_offloaded import open_offloaded
from obliteratus.summon.summary import ModelSummary
from obliteratus.verify.drift import text_tokens
from obliteratus.weights.rewrite import Output, Source

BLOCKS = 3  # that are run: the first warms up, and the fastest of the others stands for all
# Of prompts, so many passes are run through each: enough for the next block to be read meanwhile, as it will be.
PASSES = 6
# Of a file, so many bytes are copied, summed and synced to measure the disk: half a second on a slow one.
COPIED = 256_000_000
SCORED = 16  # prompts that REBIRTH scores again, live and as saved


class StageForecast(NamedTuple):
    """What one stage takes."""

    peak: int
    """Bytes that the process holds at most."""
    read: int
    """Bytes of weights read."""
    seconds: float


@dataclass(frozen=True)
class Rates:
    """This machine on this model."""

    read: float
    """Bytes a second, of a block's weights."""
    token: float
    """Seconds a token takes in one block while nothing is read."""
    block: float
    """Seconds that a block takes beside, or beyond reading it where that takes longer."""
    gemm: float
    """FLOP/s of the head's products."""
    copied: float
    """Bytes a second, read, summed, written and synced."""


def forecast_stages(
    made: ModelSummary, subject: Subject, recipe: Recipe, parts: tuple[PromptSet, PromptSet]
) -> dict[str, StageForecast]:
    """By stage of a run whose weights stay on disk. recipe: as it is `adapt_recipe` that. parts: the prompts to fit on,
    and those to report on."""
    fit, report = (_ids(subject, part) for part in parts)
    texts = text_tokens(subject) if any(s.use == "perplexity" for s in recipe.verify) else []
    rates = measure_rates(subject, fit)
    weights = subject.offloaded.stored_bytes(list(subject.offloaded))
    row = 4 * (made.n_layers + 1) * made.width  # bytes of a prompt's streams, fp32
    scored, rows = report[-SCORED:], 2 * len(report)
    probe, twice = _own(fit), 2 * (_own(report) + sum(map(len, texts)))
    head = _head_flops(made, rows + 2 * sum(map(len, texts))) / rates.gemm
    at_head = _head(made, subject) / rates.read  # a tied one is in memory
    vocabulary = 4 * made.vocabulary
    base = resident_bytes()
    passing = base + max(made.table_bytes, 2 * made.block_bytes + batch_bytes(made))
    return {
        f"PROBE × {recipe.passes}": StageForecast(
            passing + row * (len(fit) + _rows_kept(recipe.probe, parts[0])),
            recipe.passes * (weights - _head(made, subject)),
            recipe.passes * _blocks(made, subject, probe, rates),
        ),
        "VERIFY": StageForecast(
            passing + _kept_table(made) + 4 * made.width * twice + 2 * rows * vocabulary,
            weights,
            _blocks(made, subject, twice, rates) + at_head + head,
        ),
        "SAVE": _saved(made, base, weights, rates),
        "SCORE × 2": StageForecast(
            passing + _kept_table(made) + len(scored) * vocabulary,
            2 * weights,
            2 * (_blocks(made, subject, _own(scored), rates) + at_head),
        ),
    }


def measure_rates(subject: Subject, ids: Ids) -> Rates:
    """Read some blocks, run prompts through the first of them, and copy a little."""
    read = _read(subject)
    token, block = _block(subject, ids, read)
    files = list(subject.offloaded.files.shards)
    return Rates(read, token, block, measure_gemm_rate(), _copied(files[len(files) // 2]))


def _read(subject: Subject) -> float:
    """Bytes a second: of the last blocks, the faster of those that are read into memory that was in use before."""
    names = [block_parameters(subject, block) for block in range(subject.n_layers)[-BLOCKS - 1 :]]
    times = [time.perf_counter()]
    for own, then in zip(names, [*names[1:], ()], strict=True):
        with subject.offloaded.holding(own, then):
            times.append(time.perf_counter())
    seconds = [after - before for before, after in pairwise(times)]
    return float(subject.offloaded.stored_bytes(names[-1]) / min(seconds[-2:]))


def _block(subject: Subject, ids: Ids, read: float) -> tuple[float, float]:
    """Seconds of a token in a block, and of a block beside (`Rates`): of the first blocks, those that took least."""
    n = shared_prefix_length(ids)
    rows = [ids[i] for batch in make_batches([len(row) - n for row in ids], CPU_TOKENS)[:PASSES] for i in batch]
    begun: dict[int, float] = {}
    rate: list[float] = []

    @contextmanager
    def clock(stream: int, of: Sequence[int], lengths: Any) -> Iterator[None]:
        start = time.perf_counter()
        begun.setdefault(stream, start)
        try:
            yield
        finally:  # a pass ends by an exception
            if stream:  # not the table
                rate.append((time.perf_counter() - start) / int(lengths.sum()))

    run_layerwise(
        subject, LayerwisePass(subject, rows), top=min(BLOCKS + 1, subject.n_layers), look=clock, title="measuring"
    )
    walls = [after - before for before, after in pairwise(begun[stream] for stream in sorted(begun))][1:]
    token = min(rate)
    return token, max(0.0, min(walls, default=0.0) - max(_reading(subject, read), _own(rows) * token))


def _reading(subject: Subject, read: float) -> float:
    """Seconds that a block takes to be read, at so many bytes a second."""
    return float(subject.offloaded.stored_bytes(block_parameters(subject, subject.n_layers - 1)) / read)


def _copied(file: Path) -> float:
    size, start = min(file.stat().st_size, COPIED), time.perf_counter()
    with tempfile.TemporaryFile() as copy, file.open("rb") as opened:
        Source(opened, "").copy(Output(copy), size)
        copy.flush()
        os.fsync(copy.fileno())
    return size / (time.perf_counter() - start)


def _blocks(made: ModelSummary, subject: Subject, tokens: int, rates: Rates) -> float:
    """Seconds of one pass: the table, then each block, read while the one before it computes."""
    reading = _reading(subject, rates.read)
    table = subject.offloaded.stored_bytes(outer_parameters(subject)) / rates.read
    return float(table + reading + made.n_layers * (max(reading, tokens * rates.token) + rates.block))


def _saved(made: ModelSummary, base: int, weights: int, rates: Rates) -> StageForecast:
    largest = made.block_bytes // 2  # an edited matrix is at most half of its block, and has a copy beside it
    return StageForecast(base + 2 * largest + BUFFERS, weights, weights / rates.copied)


def _rows_kept(options: Probe, fit: PromptSet) -> int:
    """Prompts' worth of streams that PROBE holds, beside those that it reads."""
    sizes = [len(members) for members in fit.groups.values()]
    return {"rows": sum(sizes), "sketch": 2 * options.sketch * len(sizes), "moments": 0}[options.keep]


def _head(made: ModelSummary, subject: Subject) -> int:
    """Bytes of a head that PROBE need not read."""
    names = outer_parameters(subject, head=True)
    return 0 if made.tied else int(subject.offloaded.stored_bytes(names))


def _kept_table(made: ModelSummary) -> int:
    """A tied table stays in memory from the first tokens to the last."""
    return made.table_bytes if made.tied else 0


def _head_flops(made: ModelSummary, rows: int) -> float:
    return 2.0 * made.vocabulary * made.width * rows


def _own(ids: Ids) -> int:
    """Tokens that are run: those that all share once."""
    n = shared_prefix_length(ids)
    return sum(len(row) - n for row in ids) + n


def _ids(subject: Subject, prompts: PromptSet) -> Ids:
    return render_prompts(subject, list(chain.from_iterable(prompts.groups.values())))


@dataclass(frozen=True)
class Forecast:
    """What `inspect --memory` says."""

    limit: float
    needed: int
    """Bytes with all weights loaded."""
    stages: dict[str, StageForecast]
    """Of a run with the weights on disk; empty where they fit into memory."""
    prompts: int
    """Of the run that is reckoned with."""

    @property
    def peak(self) -> int:
        return max((stage.peak for stage in self.stages.values()), default=self.needed)

    def told(self) -> dict[str, Any]:
        """As plain data."""
        stages = {name: stage._asdict() for name, stage in self.stages.items()}
        return {
            "limit": self.limit,
            "weights": "on disk" if self.stages else "in memory",
            "needed_in_memory": self.needed,
            "prompts": self.prompts,
            "stages": stages,
            "peak": self.peak,
            "seconds": sum(stage.seconds for stage in self.stages.values()),
        }


def forecast_run(
    made: ModelSummary, limit: float, recipe: Recipe, prompts: PromptSet, opening: dict[str, Any]
) -> Forecast:
    """Where the weights of a run go under the limit (bytes), and what each stage takes if they stay on disk: then three
    blocks are read and run. UserError where it cannot work."""
    fit, _, report = parts_checked(prompts, recipe.seed)
    count = sum(map(len, (*fit.groups.values(), *report.groups.values())))
    needed = bytes_in_memory(made)
    if needed <= limit:
        return Forecast(limit, needed, {}, count)
    with memory_limit(limit):
        check_offloaded_fits(made)
        subject = open_offloaded(made.source, **opening)
        stages = forecast_stages(made, subject, adapt_recipe(subject, recipe), (fit, report))
    return Forecast(limit, needed, stages, count)
