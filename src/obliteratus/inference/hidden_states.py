"""The stream at one position of every prompt, and what else passes there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from obliteratus.core.progress import progress
from obliteratus.core.shapes import Float, Int
from obliteratus.core.types import Subject
from obliteratus.inference.batching import (
    TOKENS,
    Prompts,
    backbone,
    batched,
    halving,
    padded,
    passes_of,
    state_bytes,
    token_budget,
)
from obliteratus.inference.chat_template import Ids
from obliteratus.inference.hooks import Capture, Routing, Taps
from obliteratus.inference.layerwise import Sweep, swept
from obliteratus.inference.shared_prefix import prepared
from obliteratus.inference.spill import Spilled, room_for

NO_TAPS = Taps()


@dataclass(frozen=True)
class Reading:
    """What one batch gave."""

    rows: list[int]
    """Which prompts these are."""
    stream: Float[Tensor, "rows streams *positions width"]
    """fp32, at the wanted position; the axis is there only where several were asked for."""
    outputs: Float[Tensor, "rows taps *positions width"]
    """fp32 outputs of the tapped modules at the same position, in the order asked for."""
    inputs: dict[str, Tensor]
    """Module path → fp32 input at the same position [rows, in]."""
    routing: dict[str, Routing]
    """Path of a stack of experts → what it did at the same position."""

    def of(self, places: Sequence[int]) -> Reading:
        """Some of the batch's rows."""
        at = torch.tensor(places)
        inputs = {path: x[at] for path, x in self.inputs.items()}
        routing = {path: routed.of(at) for path, routed in self.routing.items()}
        return Reading([self.rows[i] for i in places], self.stream[at], self.outputs[at], inputs, routing)


def read(
    subject: Subject,
    ids: Ids,
    *,
    position: int | Sequence[int] = -1,
    taps: Taps = NO_TAPS,
    last: int | None = None,
    budget: int = 0,
    reuse: bool = True,
    title: str = "reading",
) -> Iterator[Reading]:
    """The stream at one position of every prompt, batch by batch.

    position: counted from the end of each row (−1 is its last token; shorter rows give their first). Several are
    read in the same pass.
    taps: modules whose outputs or inputs are wanted too. last: highest stream index wanted (default L); blocks
    above do not run. budget: tokens a batch, 0 lets memory decide. Weights on disk are read once for all prompts, and
    the first batch comes when all are through.
    """
    if subject.shelf is not None:
        with passes_of(budget or TOKENS.get()):
            yield from _swept(subject, ids, position, taps, subject.n_layers if last is None else last, title)
        return
    with torch.inference_mode(), progress(title, len(ids)) as advance:
        prompts = prepared(subject, ids, reuse, leave=-(position if isinstance(position, int) else min(position)))
        run = _reader(subject, prompts, position, taps, last)
        size = budget or token_budget(subject, state_bytes(subject))
        for rows in batched([len(r) for r in prompts.rows], size):
            for reading in halving(run, rows):
                advance(len(reading.rows))
                yield reading


def _reader(
    subject: Subject, prompts: Prompts, position: int | Sequence[int], taps: Taps, last: int | None = None
) -> Callable[[list[int]], Reading]:
    top = subject.n_layers if last is None else last
    wanted = torch.tensor(position)

    def run(rows: list[int]) -> Reading:
        ids, lengths = padded([prompts.rows[i] for i in rows], subject.device)
        capture = Capture(subject, _at(lengths, wanted), taps, top)
        with capture.watching(), prompts.around(rows):
            backbone(subject, ids, prompts.skipped, prompts.cache(rows))
        return Reading(rows, *capture.stacked(), capture.inputs, capture.routing)

    return run


def _at(lengths: Int[Tensor, " rows"], wanted: Int[Tensor, " *positions"]) -> Tensor:
    """Where in each row the positions are, which are counted from its end: [rows, *positions]."""
    return (lengths.view(-1, *[1] * wanted.ndim) + wanted.to(lengths)).clamp(min=0)


# ------------------------------------------------------------------------------------- weights on disk
@dataclass
class _Kept:
    """What a batch gave so far, but for its stream, block after block."""

    outputs: dict[str, Tensor] = field(default_factory=dict)
    inputs: dict[str, Tensor] = field(default_factory=dict)
    routing: dict[str, Routing] = field(default_factory=dict)


def _swept(
    subject: Subject, ids: Ids, position: int | Sequence[int], taps: Taps, top: int, title: str
) -> Iterator[Reading]:
    wanted = torch.tensor(position)
    streams = room_for(subject, len(ids) * (top + 1), subject.width * wanted.numel(), torch.float32)
    kept: dict[tuple[int, ...], _Kept] = {}

    @contextmanager
    def look(stream: int, rows: list[int], lengths: Tensor) -> Iterator[None]:
        capture = Capture(subject, _at(lengths, wanted), _within(subject, taps, stream - 1), stream, first=stream)
        with capture.watching():
            yield
        mine = kept.setdefault(tuple(rows), _Kept())
        for row, states in zip(rows, capture.stream[0], strict=True):
            streams[torch.tensor([row * (top + 1) + stream])] = states.reshape(1, -1)
        mine.outputs |= capture.outputs
        mine.inputs |= capture.inputs
        mine.routing |= capture.routing

    swept(subject, Sweep(subject, ids, -int(wanted.min())), top=top, look=look, title=title)
    for rows, found in kept.items():
        yield _reading(list(rows), found, streams, taps, (top + 1, *wanted.shape, subject.width))


def _within(subject: Subject, taps: Taps, block: int) -> Taps:
    """Those of one block."""
    start = f"{subject.layers}.{block}."
    parts = (taps.outputs, taps.inputs, taps.experts)
    return Taps(*([path for path in part if path.startswith(start)] for part in parts))


def _reading(rows: list[int], found: _Kept, streams: Tensor | Spilled, taps: Taps, shape: tuple[int, ...]) -> Reading:
    numbers = torch.tensor(rows)[:, None] * shape[0] + torch.arange(shape[0])
    outputs = [found.outputs[path] for path in taps.outputs]
    none = torch.empty(len(rows), 0, *shape[1:])
    return Reading(
        rows,
        torch.stack([streams[own] for own in numbers]).view(len(rows), *shape),
        torch.stack(outputs, 1) if outputs else none,
        found.inputs,
        found.routing,
    )
