"""Run a model with activations replaced at one module, token and column range of each row; many rows per pass."""

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
from obliteratus.inference.batching import make_batches, pad_rows, run_or_halve, token_budget
from obliteratus.inference.chat_template import Ids
from obliteratus.inference.hidden_states import STREAM_ONLY
from obliteratus.inference.hooks import StreamCapture
from obliteratus.inference.shared_prefix import prepare_prompts, run_backbone

Side = Literal["output", "input"]


@dataclass(frozen=True)
class Patch:
    """A value that replaces a module's output or input at one token."""

    path: str
    """Module path."""
    position: int
    """Token, counted from the end of the row: −1 is the last."""
    value: Float[Tensor, " width"]
    side: Side = "output"
    columns: tuple[int, int] | None = None
    """(start, stop) of the columns that are replaced; None replaces all."""


def run_patched(
    subject: Subject, ids: Ids, patches: Sequence[Sequence[Patch]], title: str
) -> Float[Tensor, "rows width"]:
    """Return the last stream at every row's last token, fp32, with that row's patches applied to that row only.

    Raises ValueError for a position before the beginning of its row.
    """
    deepest = max((-patch.position for row in patches for patch in row), default=1)
    if any(-patch.position > len(row) for row, own in zip(ids, patches, strict=True) for patch in own):
        raise ValueError(f"a position {deepest} tokens from the end lies before the beginning of some row")
    result = torch.empty(len(ids), subject.width)
    with torch.inference_mode(), progress(title, len(ids)) as advance:
        prompts = prepare_prompts(subject, ids, leave=deepest)

        def run(rows: list[int]) -> tuple[list[int], Tensor]:
            batch, lengths = pad_rows([prompts.rows[i] for i in rows], subject.device)
            capture = StreamCapture(subject, lengths - 1, STREAM_ONLY, subject.n_layers)
            with _patched(subject, [patches[i] for i in rows], lengths), capture.attach(), prompts.pass_over(rows):
                run_backbone(subject, batch, prompts.prefix_length, prompts.make_cache(rows))
            return rows, capture.stream[-1]

        for group in make_batches([len(row) for row in prompts.rows], token_budget(subject)):
            for rows, streams in run_or_halve(run, group):
                result[rows] = streams
                advance(len(rows))
    return result


@dataclass(frozen=True)
class _PlacedPatch:
    """A patch with its row and token in a batch."""

    row: int
    token: int
    patch: Patch


@contextmanager
def _patched(subject: Subject, patches: Sequence[Sequence[Patch]], lengths: Tensor) -> Iterator[None]:
    """Inside, a pass over these rows has their values replaced."""
    by_module: dict[tuple[str, Side], list[_PlacedPatch]] = {}
    for row, (own, length) in enumerate(zip(patches, lengths.tolist(), strict=True)):
        for patch in own:
            by_module.setdefault((patch.path, patch.side), []).append(_PlacedPatch(row, length + patch.position, patch))
    handles = [_attach(subject.module(path), side, placed, len(patches)) for (path, side), placed in by_module.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _attach(module: nn.Module, side: Side, placed: Sequence[_PlacedPatch], rows: int) -> RemovableHandle:
    change = _make_change(placed, rows)
    if side == "input":
        return module.register_forward_pre_hook(lambda module, args: (change(args[0]), *args[1:]))

    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

    return module.register_forward_hook(hook)


def _make_change(placed: Sequence[_PlacedPatch], rows: int) -> Callable[[Tensor], Tensor]:
    """Return the function that applies the patches to [rows, tokens, width] or, for experts, [rows × tokens, width]."""

    def change(x: Tensor) -> Tensor:
        changed = x.clone()
        view = changed.view(rows, -1, x.shape[-1])
        for p in placed:
            columns = slice(*p.patch.columns) if p.patch.columns else slice(None)
            view[p.row, p.token, columns] = p.patch.value.to(x.device, x.dtype)
        return changed

    return change
