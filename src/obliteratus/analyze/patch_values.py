"""Activations put in place of others, at one module, position and run of columns of each row; many rows a pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from obliteratus.core.progress import progress
from obliteratus.core.shapes import Float
from obliteratus.core.types import Subject
from obliteratus.inference.batching import make_batches, pad_rows, run_or_halve, state_bytes, token_budget
from obliteratus.inference.chat_template import Ids
from obliteratus.inference.hidden_states import STREAM_ONLY
from obliteratus.inference.hooks import StreamCapture
from obliteratus.inference.shared_prefix import prepare_prompts, run_backbone

Side = Literal["output", "input"]


@dataclass(frozen=True)
class Patch:
    """A value in place of what a module gives, or is given, at one token."""

    path: str
    """Module path."""
    position: int
    """Token, counted from the end of the row."""
    value: Float[Tensor, " width"]
    side: Side = "output"
    columns: tuple[int, int] | None = None
    """(start, stop) of the columns that are replaced; None is all of them."""


def run_patched(subject: Subject, ids: Ids, puts: Sequence[Sequence[Patch]], title: str) -> Float[Tensor, "rows width"]:
    """The last stream at every row's last token, fp32, with that row's values put in. Rows do not see each other.

    Positions may not lie before a row's beginning: ValueError.
    """
    deepest = max((-put.position for row in puts for put in row), default=1)
    if any(-put.position > len(row) for row, mine in zip(ids, puts, strict=True) for put in mine):
        raise ValueError(f"a position {deepest} tokens from the end lies before the beginning of some row")
    result = torch.empty(len(ids), subject.width)
    with torch.inference_mode(), progress(title, len(ids)) as advance:
        prompts = prepare_prompts(subject, ids, leave=deepest)

        def run(rows: list[int]) -> tuple[list[int], Tensor]:
            batch, lengths = pad_rows([prompts.rows[i] for i in rows], subject.device)
            capture = StreamCapture(subject, lengths - 1, STREAM_ONLY, subject.n_layers)
            mine = [puts[i] for i in rows]
            with _putting(subject, mine, lengths), capture.watching(), prompts.around(rows):
                run_backbone(subject, batch, prompts.skipped, prompts.cache(rows))
            return rows, capture.stream[-1]

        for group in make_batches([len(row) for row in prompts.rows], token_budget(subject, state_bytes(subject))):
            for rows, streams in run_or_halve(run, group):
                result[rows] = streams
                advance(len(rows))
    return result


@dataclass(frozen=True)
class _Here:
    """A put, in a pass."""

    row: int
    token: int
    put: Patch


@contextmanager
def _putting(subject: Subject, puts: Sequence[Sequence[Patch]], lengths: Tensor) -> Iterator[None]:
    """Inside, a pass over these rows has their values in it."""
    by_place: dict[tuple[str, Side], list[_Here]] = {}
    for row, (mine, length) in enumerate(zip(puts, lengths.tolist(), strict=True)):
        for put in mine:
            by_place.setdefault((put.path, put.side), []).append(_Here(row, length + put.position, put))
    handles = [_attach(subject.module(path), side, here, len(puts)) for (path, side), here in by_place.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _attach(module: nn.Module, side: Side, here: Sequence[_Here], rows: int) -> RemovableHandle:
    change = _changing(here, rows)
    if side == "input":
        return module.register_forward_pre_hook(lambda module, args: (change(args[0]), *args[1:]))

    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

    return module.register_forward_hook(hook)


def _changing(here: Sequence[_Here], rows: int) -> Callable[[Tensor], Tensor]:
    """Tokens may lie flat, as experts have them: [rows × tokens, width]."""

    def change(x: Tensor) -> Tensor:
        changed = x.clone()
        view = changed.view(rows, -1, x.shape[-1])
        for one in here:
            columns = slice(*one.put.columns) if one.put.columns else slice(None)
            view[one.row, one.token, columns] = one.put.value.to(x.device, x.dtype)
        return changed

    return change
