"""Checks every claim of the architecture table on a loaded model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from obliteratus.core.errors import UnsupportedModelError
from obliteratus.core.shapes import Float, Int
from obliteratus.core.types import Site
from obliteratus.summon.architectures import Architecture
from obliteratus.summon.sites import find_architecture, find_sites, list_blocks, read_gain, stream_width

TOKENS = 8  # long enough for attention to mix, short enough to run a large model dozens of times
ROWS = 16  # cases in one batch: the streams of 128 tokens fit anywhere
SAME_COSINE = 1 - 1e-5  # bf16 rounding leaves this of the cosine of a vector and its multiple; two gains differ by more
ALIGNED_COSINE = 1 - 1e-3  # bf16 rounding leaves 1 − 1e-5; a wrong gain or norm gives far less

Case = Mapping[str, Tensor]
"""Module path → the vector [width] that replaces the module's output at every token."""


def self_test(model: PreTrainedModel, architecture: Architecture | None = None) -> None:
    """Check every claim of the model's architecture (or of `architecture`).

    1. Zeroing one declared writer changes the stream that it is declared to write into.
    2. No writer is missed: with all embeddings zeroed nothing enters the stream, and with all other writers zeroed
       every block passes the stream on unchanged, bit for bit (or a multiple of it, where that is declared).
    3. No writer is invented: a vector put out by one writer alone arrives in the stream, times the declared gain.
    4. A reader's input is the output of its declared norm, or a multiple of it, and that norm is of the declared kind.
    5. Routing weights that are declared to sum to one do so.

    Raises UnsupportedModelError that names the first false claim.
    """
    architecture = architecture or find_architecture(model.config)
    sites = find_sites(model, architecture)
    writers = [site for site in sites if site.role == "writes"]
    with torch.inference_mode():
        ids = _random_ids(model)
        _check_each_matters(model, architecture, writers, ids)
        _check_none_missed(model, architecture, writers, ids)
        _check_none_invented(model, architecture, writers, ids)
        _check_readers(model, [site for site in sites if site.role == "reads"], ids)
        _check_norms(model, sites)
        if architecture.routing_sums_to_one:
            _check_routing(model, writers, ids)


def _random_ids(model: PreTrainedModel) -> Int[Tensor, "1 tokens"]:
    table: Any = model.get_input_embeddings()
    ids = torch.randint(0, table.weight.shape[0], (1, TOKENS), generator=torch.Generator().manual_seed(0))
    return ids.to(table.weight.device)


def _random_vector(width: int) -> Float[Tensor, " width"]:
    return torch.randn(width, generator=torch.Generator().manual_seed(1))


def _check_each_matters(model: PreTrainedModel, architecture: Architecture, writers: list[Site], ids: Tensor) -> None:
    zero = torch.zeros(stream_width(model))
    cases: list[Case] = [{}, *({site.path: zero} for site in writers)]
    streams = _streams(model, architecture, ids, cases)
    base = next(streams)
    for site, stream in zip(writers, streams, strict=True):
        if torch.equal(stream[site.stream], base[site.stream]):
            raise UnsupportedModelError(
                f"self-test: {site.path} is declared as a writer, but the stream does not change without it"
            )


def _check_none_missed(model: PreTrainedModel, architecture: Architecture, writers: list[Site], ids: Tensor) -> None:
    """Check the blocks with the embeddings on, because a missed writer without bias maps zeros to zeros."""
    zero = torch.zeros(stream_width(model))
    tables, blocks = ({site.path: zero for site in writers if (site.layer < 0) == embed} for embed in (True, False))
    without_tables, without_blocks = _streams(model, architecture, ids, [tables, blocks])
    if without_tables[0].any():
        raise UnsupportedModelError(
            "self-test: with all declared embeddings zeroed something still enters the stream, so one is not declared"
        )
    for layer in range(len(without_blocks) - 1):
        before, after = without_blocks[layer], without_blocks[layer + 1]
        scaled = architecture.scales_stream and _cosine(after, before) >= ALIGNED_COSINE
        if not torch.equal(before, after) and not scaled:
            raise UnsupportedModelError(
                f"self-test: with all declared writers zeroed {architecture.layers}.{layer} still changes the stream, "
                "so one is not declared"
            )


def _check_none_invented(model: PreTrainedModel, architecture: Architecture, writers: list[Site], ids: Tensor) -> None:
    zero, vector = torch.zeros(stream_width(model)), _random_vector(stream_width(model))
    zeroed = {site.path: zero for site in writers}
    cases = [{**zeroed, site.path: vector} for site in writers]
    for site, stream in zip(writers, _streams(model, architecture, ids, cases), strict=True):
        gain = read_gain(model, site)
        expected = vector if gain is None else gain.cpu() * vector
        if _cosine(stream[site.stream], expected) < ALIGNED_COSINE:
            raise UnsupportedModelError(
                f"self-test: the output of {site.path} does not reach the stream as declared (gain: {site.gain})"
            )


def _check_readers(model: PreTrainedModel, readers: list[Site], ids: Tensor) -> None:
    """Check the readers behind a norm; the inputs of others cannot be observed from outside the block."""
    seen: dict[str, Tensor] = {}

    def keep_output(path: str) -> Any:
        return lambda module, args, out: seen.__setitem__(path, out.clone())  # Gemma 4 multiplies in place

    def keep_input(path: str) -> Any:
        return lambda module, args: seen.__setitem__(path, args[0])

    pairs = [(site.path, site.gain) for site in readers if site.gain is not None]
    with ExitStack() as stack:
        for path, norm in pairs:
            stack.enter_context(model.get_submodule(norm).register_forward_hook(keep_output(norm)))
            stack.enter_context(model.get_submodule(path).register_forward_pre_hook(keep_input(path)))
        model(input_ids=ids, use_cache=False)
    for path, norm in pairs:
        given, normed = (seen[key].float().cpu().reshape(-1, seen[key].shape[-1]) for key in (path, norm))
        if given.shape != normed.shape or (not torch.equal(given, normed) and _cosine(given, normed) < SAME_COSINE):
            raise UnsupportedModelError(f"self-test: {path} does not read the output of {norm}")


def _check_routing(model: PreTrainedModel, writers: list[Site], ids: Tensor) -> None:
    seen: list[Tensor] = []
    with ExitStack() as stack:
        for site in writers:
            if site.stacked:
                module = model.get_submodule(site.path)
                stack.enter_context(module.register_forward_pre_hook(lambda m, args: seen.append(args[2].sum(-1))))
        model(input_ids=ids, use_cache=False)
    if not all(torch.allclose(total.float(), torch.ones(()).to(total.device), atol=1e-2) for total in seen):  # bf16
        raise UnsupportedModelError("self-test: routing weights are declared to sum to one, but do not")


def _check_norms(model: PreTrainedModel, sites: Iterable[Site]) -> None:
    vector = _random_vector(stream_width(model))
    for site in {site.gain: site for site in sites if site.gain is not None}.values():
        norm = model.get_submodule(str(site.gain))
        zero, gain = torch.zeros_like(vector), read_gain(model, site)
        # A norm maps zero to its bias, if it has one.
        out, bias = (norm(x.to(model.device, model.dtype)).float().cpu() for x in (vector, zero))
        centered = vector - vector.mean() if site.norm == "layer" else vector
        if _cosine(out - bias, centered if gain is None else gain.cpu() * centered) < ALIGNED_COSINE:
            raise UnsupportedModelError(f"self-test: {site.gain} is not a norm of the kind '{site.norm}'")


def _cosine(rows: Tensor, expected: Tensor) -> float:
    """Return the lowest cosine of `rows` [..., width] with `expected`, one row or as many; 0 for a row of zeros."""
    return float(nn.functional.cosine_similarity(rows, expected, dim=-1).min())


def _streams(
    model: PreTrainedModel, architecture: Architecture, ids: Tensor, cases: Sequence[Case]
) -> Iterator[Float[Tensor, "streams tokens width"]]:
    """Yield all L + 1 streams of each case, fp32 on the CPU. The cases run as the rows of a few batches."""
    for start in range(0, len(cases), ROWS):
        rows = cases[start : start + ROWS]
        yield from _run_batch(model, architecture, ids.expand(len(rows), -1), rows)


def _run_batch(model: PreTrainedModel, architecture: Architecture, ids: Tensor, rows: Sequence[Case]) -> Tensor:
    seen: list[Tensor] = []

    def enter(module: nn.Module, args: tuple[Any, ...]) -> None:
        seen.append(args[0].float().cpu())

    def leave(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        # Blocks return the stream, or a tuple that begins with it.
        seen.append((out[0] if isinstance(out, tuple) else out).float().cpu())

    blocks = list_blocks(model, architecture)
    with ExitStack() as stack:
        stack.enter_context(blocks[0].register_forward_pre_hook(enter))
        for block in blocks:
            stack.enter_context(block.register_forward_hook(leave))
        for path in dict.fromkeys(path for case in rows for path in case):
            stack.enter_context(model.get_submodule(path).register_forward_hook(_replace_output(path, rows)))
        model.base_model(input_ids=ids, use_cache=False)
    return torch.stack(seen, dim=1)


def _replace_output(path: str, rows: Sequence[Case]) -> Any:
    """Return a hook that replaces the module's output, bias included, in the rows whose case names the module."""

    def hook(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        table = out.reshape(-1, TOKENS, out.shape[-1])  # OPT flattens to [rows × tokens, width]
        table = table.expand(len(rows), -1, -1).clone()  # GPT-2 computes positions once for all rows
        for row, case in enumerate(rows):
            if path in case:
                _check_width(path, out, case[path])
                table[row] = case[path].to(out)
        return table.flatten(0, 1) if out.ndim == 2 else table

    return hook


def _check_width(path: str, out: Tensor, vector: Tensor) -> None:
    if out.shape[-1] != len(vector):
        raise UnsupportedModelError(
            f"self-test: {path} is declared as a writer, but it puts out {out.shape[-1]} values where the stream has "
            f"{len(vector)}"
        )
