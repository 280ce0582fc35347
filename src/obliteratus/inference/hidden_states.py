"""The stream at one position of every prompt, and what else passes there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from obliteratus.core.progress import progress
from obliteratus.core.shapes import Float, Int
from obliteratus.core.types import ProbeRequest, Subject
from obliteratus.inference.batching import (
    TOKENS,
    make_batches,
    pad_rows,
    run_or_halve,
    state_bytes,
    token_budget,
    tokens_per_batch,
)
from obliteratus.inference.chat_template import Ids
from obliteratus.inference.hooks import ExpertRouting, StreamCapture
from obliteratus.inference.layerwise import LayerwisePass, run_layerwise
from obliteratus.inference.shared_prefix import PreparedPrompts, prepare_prompts, run_backbone
from obliteratus.inference.spill import SpilledRows, allocate_rows

STREAM_ONLY = ProbeRequest()


@dataclass(frozen=True)
class BatchStates:
    """What one batch gave."""

    rows: list[int]
    """Which prompts these are."""
    stream: Float[Tensor, "rows streams *positions width"]
    """fp32, at the wanted position; the axis is there only where several were asked for."""
    outputs: Float[Tensor, "rows taps *positions width"]
    """fp32 outputs of the tapped modules at the same position, in the order asked for."""
    inputs: dict[str, Tensor]
    """Module path → fp32 input at the same position [rows, in]."""
    routing: dict[str, ExpertRouting]
    """Path of a stack of experts → what it did at the same position."""

    def of(self, places: Sequence[int]) -> BatchStates:
        """Some of the batch's rows."""
        at = torch.tensor(places)
        inputs = {path: x[at] for path, x in self.inputs.items()}
        routing = {path: routed.of(at) for path, routed in self.routing.items()}
        return BatchStates([self.rows[i] for i in places], self.stream[at], self.outputs[at], inputs, routing)


def read_hidden_states(
    subject: Subject,
    ids: Ids,
    *,
    position: int | Sequence[int] = -1,
    request: ProbeRequest = STREAM_ONLY,
    last: int | None = None,
    budget: int = 0,
    reuse: bool = True,
    title: str = "reading",
) -> Iterator[BatchStates]:
    """The stream at one position of every prompt, batch by batch.

    position: counted from the end of each row (−1 is its last token; shorter rows give their first). Several are
    read in the same pass.
    request: modules whose outputs or inputs are wanted too. last: highest stream index wanted (default L); blocks
    above do not run. budget: tokens a batch, 0 lets memory decide. Weights on disk are read once for all prompts, and
    the first batch comes when all are through.
    """
    if subject.offloaded is not None:
        with tokens_per_batch(budget or TOKENS.get()):
            yield from _swept(subject, ids, position, request, subject.n_layers if last is None else last, title)
        return
    with torch.inference_mode(), progress(title, len(ids)) as advance:
        prompts = prepare_prompts(
            subject, ids, reuse, leave=-(position if isinstance(position, int) else min(position))
        )
        run = _reader(subject, prompts, position, request, last)
        size = budget or token_budget(subject, state_bytes(subject))
        for rows in make_batches([len(r) for r in prompts.rows], size):
            for reading in run_or_halve(run, rows):
                advance(len(reading.rows))
                yield reading


def _reader(
    subject: Subject,
    prompts: PreparedPrompts,
    position: int | Sequence[int],
    request: ProbeRequest,
    last: int | None = None,
) -> Callable[[list[int]], BatchStates]:
    top = subject.n_layers if last is None else last
    wanted = torch.tensor(position)

    def run(rows: list[int]) -> BatchStates:
        ids, lengths = pad_rows([prompts.rows[i] for i in rows], subject.device)
        capture = StreamCapture(subject, _at(lengths, wanted), request, top)
        with capture.watching(), prompts.around(rows):
            run_backbone(subject, ids, prompts.skipped, prompts.cache(rows))
        return BatchStates(rows, *capture.stacked(), capture.inputs, capture.routing)

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
    routing: dict[str, ExpertRouting] = field(default_factory=dict)


def _swept(
    subject: Subject, ids: Ids, position: int | Sequence[int], request: ProbeRequest, top: int, title: str
) -> Iterator[BatchStates]:
    wanted = torch.tensor(position)
    streams = allocate_rows(subject, len(ids) * (top + 1), subject.width * wanted.numel(), torch.float32)
    kept: dict[tuple[int, ...], _Kept] = {}

    @contextmanager
    def look(stream: int, rows: list[int], lengths: Tensor) -> Iterator[None]:
        capture = StreamCapture(
            subject, _at(lengths, wanted), _within(subject, request, stream - 1), stream, first=stream
        )
        with capture.watching():
            yield
        mine = kept.setdefault(tuple(rows), _Kept())
        for row, states in zip(rows, capture.stream[0], strict=True):
            streams[torch.tensor([row * (top + 1) + stream])] = states.reshape(1, -1)
        mine.outputs |= capture.outputs
        mine.inputs |= capture.inputs
        mine.routing |= capture.routing

    run_layerwise(subject, LayerwisePass(subject, ids, -int(wanted.min())), top=top, look=look, title=title)
    for rows, found in kept.items():
        yield _reading(list(rows), found, streams, request, (top + 1, *wanted.shape, subject.width))


def _within(subject: Subject, request: ProbeRequest, block: int) -> ProbeRequest:
    """Those of one block."""
    start = f"{subject.layers}.{block}."
    parts = (request.output_modules, request.input_modules, request.expert_modules)
    return ProbeRequest(*([path for path in part if path.startswith(start)] for part in parts))


def _reading(
    rows: list[int], found: _Kept, streams: Tensor | SpilledRows, request: ProbeRequest, shape: tuple[int, ...]
) -> BatchStates:
    numbers = torch.tensor(rows)[:, None] * shape[0] + torch.arange(shape[0])
    outputs = [found.outputs[path] for path in request.output_modules]
    none = torch.empty(len(rows), 0, *shape[1:])
    return BatchStates(
        rows,
        torch.stack([streams[own] for own in numbers]).view(len(rows), *shape),
        torch.stack(outputs, 1) if outputs else none,
        found.inputs,
        found.routing,
    )
