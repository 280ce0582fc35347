"""What a run with weights on disk will take, stage by stage: measured on a few blocks, and reckoned for the rest."""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

from obliteratus.forecast import gemm_rate
from obliteratus.ondisk import suited_to
from obliteratus.prompts import parts_checked
from obliteratus.settings import Probe, Recipe
from obliteratus.summon.forward import CPU_TOKENS, batched, shared_prefix
from obliteratus.summon.memory import resident, within
from obliteratus.summon.needs import BUFFERS, check_on_disk, held, in_memory, work
from obliteratus.summon.outline import Outline
from obliteratus.summon.render import Ids, render
from obliteratus.summon.shelved import open_shelved
from obliteratus.summon.sweep import Sweep, names_of, names_outside, swept
from obliteratus.types import PromptSet, Subject
from obliteratus.verify.drift import text_tokens

BLOCKS = 3  # that are run: the first warms up, and the fastest of the others stands for all
# Of a saved file, so many bytes are written, summed and synced to measure the disk: half a second on a slow one.
WRITTEN = 128_000_000
SCORED = 16  # prompts that REBIRTH scores again, live and as saved


class Stage(NamedTuple):
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
    """Seconds a token takes in one block."""
    gemm: float
    """FLOP/s of the head's products."""
    written: float
    """Bytes a second, summed and synced."""


def planned(made: Outline, subject: Subject, recipe: Recipe, parts: tuple[PromptSet, PromptSet]) -> dict[str, Stage]:
    """By stage of a run whose weights stay on disk. recipe: as it is `suited_to` that. parts: the prompts to fit on,
    and those to report on."""
    fit, report = (_ids(subject, part) for part in parts)
    texts = text_tokens(subject) if any(s.use == "perplexity" for s in recipe.verify) else []
    rates = measured(subject, fit)
    base = resident()
    weights = subject.shelf.stored_bytes(list(subject.shelf))
    row = 4 * (made.n_layers + 1) * made.width  # bytes of a prompt's streams, fp32
    scored, rows = report[-SCORED:], 2 * len(report)
    head = _head_flops(made, rows + 2 * sum(map(len, texts)))
    probe, twice = _own(fit), 2 * (_own(report) + sum(map(len, texts)))
    ahead = held(made)
    vocabulary = 4 * made.vocabulary
    stream = 4 * made.width * twice
    verify = ahead + _kept_table(made) + work(made) + stream + 2 * rows * vocabulary
    score = ahead + _kept_table(made) + work(made) + len(scored) * vocabulary
    saved = _saved(made, base, weights, rates)
    return {
        f"PROBE × {recipe.passes}": Stage(
            base + ahead + work(made) + row * (len(fit) + _rows_kept(recipe.probe, parts[0])),
            recipe.passes * (weights - _head(made, subject)),
            recipe.passes * _blocks(made, subject, probe, rates),
        ),
        "VERIFY": Stage(base + verify, weights, _blocks(made, subject, twice, rates) + head / rates.gemm),
        "SAVE": saved,
        "SCORE × 2": Stage(base + score, 2 * weights, 2 * _blocks(made, subject, _own(scored), rates)),
    }


def measured(subject: Subject, ids: Ids) -> Rates:
    """Run a batch through the first blocks, and write a little."""
    n = shared_prefix(ids)
    own = [len(row) - n for row in ids]
    rows = [ids[i] for i in batched(own, CPU_TOKENS)[0]]  # as a pass of the run will be
    names = names_of(subject, subject.n_layers - 1)
    start = time.perf_counter()
    with subject.shelf.holding(names):
        read = subject.shelf.stored_bytes(names) / (time.perf_counter() - start)
    return Rates(read, _token(subject, rows), gemm_rate(), _written())


def _token(subject: Subject, rows: Ids) -> float:
    """Seconds a token takes in one block, beyond what reading takes: the least of some blocks."""
    seconds: list[float] = []

    @contextmanager
    def clock(*of: Any) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:  # a pass ends by an exception
            seconds.append(time.perf_counter() - start)

    sweep = Sweep(subject, rows)
    tokens = sum(map(len, sweep.rows[: sweep.n]))
    swept(subject, sweep, top=min(BLOCKS, subject.n_layers), look=clock, title="measuring")
    return min(seconds[1:]) / tokens  # the first is of the table


def _written() -> float:
    data, start = os.urandom(WRITTEN // 8), time.perf_counter()
    with tempfile.TemporaryFile() as file:
        for _ in range(8):
            hashlib.sha256(data)
            file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return WRITTEN / (time.perf_counter() - start)


def _blocks(made: Outline, subject: Subject, tokens: int, rates: Rates) -> float:
    """Seconds of one pass: the table, then each block, read while the one before it computes."""
    shelf = subject.shelf
    reading = shelf.stored_bytes(names_of(subject, made.n_layers - 1)) / rates.read
    table = shelf.stored_bytes(names_outside(subject)) / rates.read
    return float(table + reading + made.n_layers * max(reading, tokens * rates.token))


def _saved(made: Outline, base: int, weights: int, rates: Rates) -> Stage:
    largest = made.block_bytes // 2  # an edited matrix is at most half of its block, and has a copy beside it
    return Stage(base + 2 * largest + BUFFERS, weights, weights / rates.read + weights / rates.written)


def _rows_kept(options: Probe, fit: PromptSet) -> int:
    """Prompts' worth of streams that PROBE holds, beside those that it reads."""
    sizes = [len(members) for members in fit.groups.values()]
    return {"rows": sum(sizes), "sketch": 2 * options.sketch * len(sizes), "moments": 0}[options.keep]


def _head(made: Outline, subject: Subject) -> int:
    """Bytes of a head that PROBE need not read."""
    names = names_outside(subject, head=True)
    return 0 if made.tied else int(subject.shelf.stored_bytes(names))


def _kept_table(made: Outline) -> int:
    """A tied table stays in memory from the first tokens to the last."""
    return made.table_bytes if made.tied else 0


def _head_flops(made: Outline, rows: int) -> float:
    return 2.0 * made.vocabulary * made.width * rows


def _own(ids: Ids) -> int:
    """Tokens that are run: those that all share once."""
    n = shared_prefix(ids)
    return sum(len(row) - n for row in ids) + n


def _ids(subject: Subject, prompts: PromptSet) -> Ids:
    return render(subject, list(chain.from_iterable(prompts.groups.values())))


@dataclass(frozen=True)
class Forecast:
    """What `inspect --memory` says."""

    limit: float
    needed: int
    """Bytes with all weights loaded."""
    stages: dict[str, Stage]
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


def plan_for(made: Outline, limit: float, recipe: Recipe, prompts: PromptSet, opening: dict[str, Any]) -> Forecast:
    """Where the weights of a run go under the limit (bytes), and what each stage takes if they stay on disk: then three
    blocks are read and run. UserError where it cannot work."""
    fit, _, report = parts_checked(prompts, recipe.seed)
    count = sum(map(len, (*fit.groups.values(), *report.groups.values())))
    needed = in_memory(made)
    if needed <= limit:
        return Forecast(limit, needed, {}, count)
    with within(limit):
        check_on_disk(made)
        subject = open_shelved(made.source, **opening)
        stages = planned(made, subject, suited_to(subject, recipe), (fit, report))
    return Forecast(limit, needed, stages, count)
