"""The residual stream at one position of every prompt, with the outputs, inputs and routing of requested modules."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from obliteratus.core.probing import ProbeRequest
from obliteratus.core.progress import progress
from obliteratus.core.shapes import Float, Int
from obliteratus.core.types import Subject
from obliteratus.inference.batching import (
    BATCH_TOKENS,
    make_batches,
    pad_rows,
    run_or_halve,
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
    """What was read of one batch."""

    rows: list[int]
    """Number of the prompt that each row is."""
    stream: Float[Tensor, "rows streams *positions width"]
    """Residual stream at the wanted position, fp32. There is a positions axis only if several were asked for."""
    outputs: Float[Tensor, "rows modules *positions width"]
    """Outputs of the requested modules at the same position, fp32, in the order of the request."""
    inputs: dict[str, Tensor]
    """Module path → its input at the same position [rows, in], fp32."""
    routing: dict[str, ExpertRouting]
    """Path of a stack of experts → its routing at the same position."""

    def select(self, places: Sequence[int]) -> BatchStates:
        """Return some of the batch's rows."""
        at = torch.tensor(places)
        inputs = {path: x[at] for path, x in self.inputs.items()}
        routing = {path: routing.select(at) for path, routing in self.routing.items()}
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
    """Read the residual stream at one position of every prompt, and yield it batch by batch.

    position: counted from the end of each row, so −1 is its last token; a row that is too short gives its first.
    Several positions are read in the same pass. request: modules that are read as well. last: highest stream index
    wanted (default L); the blocks above do not run. budget: tokens of a batch; 0 lets memory decide. reuse: whether a
    shared prefix runs only once. If the weights are on disk they are read once for all prompts, and the first batch
    comes when all prompts have passed.
    """
    top = subject.n_layers if last is None else last
    if subject.offloaded is not None:
        with tokens_per_batch(budget or BATCH_TOKENS.get()):
            yield from _read_layerwise(subject, ids, position, request, top, title)
        return
    with torch.inference_mode(), progress(title, len(ids)) as advance:
        leave = -(position if isinstance(position, int) else min(position))
        prompts = prepare_prompts(subject, ids, reuse, leave)
        run = _make_reader(subject, prompts, position, request, top)
        for rows in make_batches([len(r) for r in prompts.rows], budget or token_budget(subject)):
            for states in run_or_halve(run, rows):
                advance(len(states.rows))
                yield states


def _make_reader(
    subject: Subject, prompts: PreparedPrompts, position: int | Sequence[int], request: ProbeRequest, top: int
) -> Callable[[list[int]], BatchStates]:
    positions = torch.tensor(position)

    def run(rows: list[int]) -> BatchStates:
        ids, lengths = pad_rows([prompts.rows[i] for i in rows], subject.device)
        capture = StreamCapture(subject, _indices_in_rows(lengths, positions), request, top)
        with capture.attach(), prompts.pass_over(rows):
            run_backbone(subject, ids, prompts.prefix_length, prompts.make_cache(rows))
        return BatchStates(rows, *capture.stack(), capture.inputs, capture.routing)

    return run


def _indices_in_rows(lengths: Int[Tensor, " rows"], positions: Int[Tensor, " *positions"]) -> Tensor:
    """Return token indices [rows, *positions] of positions that are counted from the end of each row."""
    return (lengths.view(-1, *[1] * positions.ndim) + positions.to(lengths)).clamp(min=0)


# ------------------------------------------------------------------------------------- weights on disk
@dataclass
class _ModuleStates:
    """What was read of a batch's modules so far, block after block."""

    outputs: dict[str, Tensor] = field(default_factory=dict)
    inputs: dict[str, Tensor] = field(default_factory=dict)
    routing: dict[str, ExpertRouting] = field(default_factory=dict)


def _read_layerwise(
    subject: Subject, ids: Ids, position: int | Sequence[int], request: ProbeRequest, top: int, title: str
) -> Iterator[BatchStates]:
    positions = torch.tensor(position)
    streams = allocate_rows(subject, len(ids) * (top + 1), subject.width * positions.numel(), torch.float32)
    batches: dict[tuple[int, ...], _ModuleStates] = {}

    @contextmanager
    def read(stream: int, rows: list[int], lengths: Tensor) -> Iterator[None]:
        in_block = _modules_of_block(subject, request, stream - 1)
        capture = StreamCapture(subject, _indices_in_rows(lengths, positions), in_block, stream, first=stream)
        with capture.attach():
            yield
        states = batches.setdefault(tuple(rows), _ModuleStates())
        for row, values in zip(rows, capture.stream[0], strict=True):
            streams[torch.tensor([row * (top + 1) + stream])] = values.reshape(1, -1)
        states.outputs |= capture.outputs
        states.inputs |= capture.inputs
        states.routing |= capture.routing

    run_layerwise(subject, LayerwisePass(subject, ids, -int(positions.min())), top=top, around=read, title=title)
    for rows, states in batches.items():
        yield _join_blocks(list(rows), states, streams, request, (top + 1, *positions.shape, subject.width))


def _modules_of_block(subject: Subject, request: ProbeRequest, block: int) -> ProbeRequest:
    """Return the part of a request that lies in one block."""
    start = f"{subject.layers}.{block}."
    parts = (request.output_modules, request.input_modules, request.expert_modules)
    return ProbeRequest(*([path for path in part if path.startswith(start)] for part in parts))


def _join_blocks(
    rows: list[int], states: _ModuleStates, streams: Tensor | SpilledRows, request: ProbeRequest, shape: tuple[int, ...]
) -> BatchStates:
    """Join what was read of a batch in all blocks. shape: of one row's stream [streams, *positions, width]."""
    numbers = torch.tensor(rows)[:, None] * shape[0] + torch.arange(shape[0])
    outputs = [states.outputs[path] for path in request.output_modules]
    none = torch.empty(len(rows), 0, *shape[1:])
    return BatchStates(
        rows,
        torch.stack([streams[of_row] for of_row in numbers]).view(len(rows), *shape),
        torch.stack(outputs, 1) if outputs else none,
        states.inputs,
        states.routing,
    )
