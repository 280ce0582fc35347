"""The check that the architecture table cannot lie: each claim is tried on the loaded model itself."""

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
from obliteratus.summon.sites import architecture_of, find_sites, gain_in, width_of

TOKENS = 8  # long enough for attention to mix, short enough to run a large model dozens of times
ROWS = 16  # cases in one batch: 128 tokens, whose streams fit anywhere
SAME = 1 - 1e-5  # what bf16 rounding leaves of the cosine of a vector and its multiple; two norms' gains differ by more
ALIGNED = 1 - 1e-3  # bf16 rounding leaves a cosine of 1 − 1e-5; a wrong gain or norm falls far below this

Case = Mapping[str, Tensor]
"""Path → the vector [width] that the module puts out at every token."""


def self_test(model: PreTrainedModel, family: Architecture | None = None) -> None:
    """Try every claim of the model's family (or of `family`); UnsupportedModelError names the false one.

    1. Zeroing one claimed writer changes the stream that it is said to write into.
    2. With all embeddings zeroed nothing enters the stream, and with all other writers zeroed every block
       passes it on unchanged, bit for bit (or a multiple, where that is declared): none was missed.
    3. A vector put out by one writer alone arrives in the stream, times the declared gain: none is invented.
    4. A reader's input is the output of its declared norm, or a multiple of it, and that norm is of the declared kind.
    5. Where routing weights are declared to sum to one, they do.
    """
    family = family or architecture_of(model.config)
    sites = find_sites(model, family)
    writers = [site for site in sites if site.role == "writes"]
    with torch.inference_mode():
        ids = _random_ids(model)
        _check_each_matters(model, family, writers, ids)
        _check_none_missed(model, family, writers, ids)
        _check_none_invented(model, family, writers, ids)
        _check_readers(model, [site for site in sites if site.role == "reads"], ids)
        _check_norms(model, sites)
        if family.routing_sums_to_one:
            _check_routing(model, writers, ids)


def _random_ids(model: PreTrainedModel) -> Int[Tensor, "1 tokens"]:
    table: Any = model.get_input_embeddings()
    ids = torch.randint(0, table.weight.shape[0], (1, TOKENS), generator=torch.Generator().manual_seed(0))
    return ids.to(table.weight.device)


def _random_vector(width: int) -> Float[Tensor, " width"]:
    return torch.randn(width, generator=torch.Generator().manual_seed(1))


def _check_each_matters(model: PreTrainedModel, family: Architecture, writers: list[Site], ids: Tensor) -> None:
    zero = torch.zeros(width_of(model))
    cases: list[Case] = [{}, *({site.path: zero} for site in writers)]
    streams = _streams(model, family, ids, cases)
    base = next(streams)
    for site, stream in zip(writers, streams, strict=True):
        if torch.equal(stream[site.stream], base[site.stream]):
            raise UnsupportedModelError(
                f"self-test: {site.path} is claimed as a writer, and the stream does not change without it"
            )


def _check_none_missed(model: PreTrainedModel, family: Architecture, writers: list[Site], ids: Tensor) -> None:
    """Blocks are tried with the tables on: fed with zeros, a missed writer without bias is silent too."""
    zero = torch.zeros(width_of(model))
    tables, blocks = ({site.path: zero for site in writers if (site.layer < 0) == embed} for embed in (True, False))
    without_tables, without_blocks = _streams(model, family, ids, [tables, blocks])
    if without_tables[0].any():
        raise UnsupportedModelError(
            "self-test: with all claimed embeddings silent, something still enters the stream: one is missed"
        )
    for layer in range(len(without_blocks) - 1):
        before, after = without_blocks[layer], without_blocks[layer + 1]
        if not torch.equal(before, after) and not (family.scales_stream and _cosine(after, before) >= ALIGNED):
            raise UnsupportedModelError(
                f"self-test: with all claimed writers silent, {family.layers}.{layer} still changes the "
                "stream: one is missed"
            )


def _check_none_invented(model: PreTrainedModel, family: Architecture, writers: list[Site], ids: Tensor) -> None:
    zero, vector = torch.zeros(width_of(model)), _random_vector(width_of(model))
    silent = {site.path: zero for site in writers}
    cases = [{**silent, site.path: vector} for site in writers]
    for site, stream in zip(writers, _streams(model, family, ids, cases), strict=True):
        gain = gain_in(model, site)
        expected = vector if gain is None else gain.cpu() * vector
        if _cosine(stream[site.stream], expected) < ALIGNED:
            raise UnsupportedModelError(
                f"self-test: the output of {site.path} reaches the stream not as declared (gain: {site.gain})"
            )


def _check_readers(model: PreTrainedModel, readers: list[Site], ids: Tensor) -> None:
    """Readers without a norm are not tried: what a block passes on inside cannot be seen from without."""
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
        given, made = (seen[at].float().cpu().reshape(-1, seen[at].shape[-1]) for at in (path, norm))
        if given.shape != made.shape or (not torch.equal(given, made) and _cosine(given, made) < SAME):
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
        raise UnsupportedModelError("self-test: routing weights are declared to sum to one, and do not")


def _check_norms(model: PreTrainedModel, sites: Iterable[Site]) -> None:
    vector = _random_vector(width_of(model))
    for site in {site.gain: site for site in sites if site.gain is not None}.values():
        norm = model.get_submodule(str(site.gain))
        zero, gain = torch.zeros_like(vector), gain_in(model, site)
        # What a norm makes of zero is its bias, if it has one.
        out, bias = (norm(x.to(model.device, model.dtype)).float().cpu() for x in (vector, zero))
        centred = vector - vector.mean() if site.norm == "layer" else vector
        if _cosine(out - bias, centred if gain is None else gain.cpu() * centred) < ALIGNED:
            raise UnsupportedModelError(f"self-test: {site.gain} is not a norm of the kind '{site.norm}'")


def _cosine(found: Tensor, expected: Tensor) -> float:
    """The worst cosine of the rows of `found` [..., width] with `expected`, one or as many; 0 for a row of zeros."""
    return float(nn.functional.cosine_similarity(found, expected, dim=-1).min())


def _streams(
    model: PreTrainedModel, family: Architecture, ids: Tensor, cases: Sequence[Case]
) -> Iterator[Float[Tensor, "streams tokens width"]]:
    """All L + 1 streams, fp32 on the CPU, in each case; the cases are the rows of a few batches."""
    for start in range(0, len(cases), ROWS):
        rows = cases[start : start + ROWS]
        yield from _batch(model, family, ids.expand(len(rows), -1), rows)


def _batch(model: PreTrainedModel, family: Architecture, ids: Tensor, rows: Sequence[Case]) -> Tensor:
    seen: list[Tensor] = []

    def enter(module: nn.Module, args: tuple[Any, ...]) -> None:
        seen.append(args[0].float().cpu())

    def leave(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        # Blocks return the stream, alone or first.
        seen.append((out[0] if isinstance(out, tuple) else out).float().cpu())

    blocks = list(model.get_submodule(family.layers).children())
    with ExitStack() as stack:
        stack.enter_context(blocks[0].register_forward_pre_hook(enter))
        for block in blocks:
            stack.enter_context(block.register_forward_hook(leave))
        for path in dict.fromkeys(path for case in rows for path in case):
            stack.enter_context(model.get_submodule(path).register_forward_hook(_puts_out(path, rows)))
        model.base_model(input_ids=ids, use_cache=False)
    return torch.stack(seen, dim=1)


def _puts_out(path: str, rows: Sequence[Case]) -> Any:
    """A hook that replaces, in the rows that say so, whatever the module computes, its bias included."""

    def hook(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        table = out.reshape(-1, TOKENS, out.shape[-1])  # OPT works on [rows × tokens, width]
        table = table.expand(len(rows), -1, -1).clone()  # GPT-2 looks positions up once for all rows
        for row, case in enumerate(rows):
            if path in case:
                _check_width(path, out, case[path])
                table[row] = case[path].to(out)
        return table.flatten(0, 1) if out.ndim == 2 else table

    return hook


def _check_width(path: str, out: Tensor, vector: Tensor) -> None:
    if out.shape[-1] != len(vector):
        raise UnsupportedModelError(
            f"self-test: {path} is claimed as a writer and puts out {out.shape[-1]} values, "
            f"where the stream has {len(vector)}"
        )
