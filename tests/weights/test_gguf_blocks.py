"""Blocks of GGML's types, beside the gguf package's own numbers: steps stay, codes are the nearest."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as T

from obliteratus.weights.gguf_blocks import (
    CODES,
    bits_of,
    can_read,
    choose_written_type,
    count_levels,
    decode,
    encode,
    read_grid,
    write_codes,
)

# Where a type has its scales in fp16; random bytes would make some infinite.
SCALES = {
    T.Q2_K: (80, 82),
    T.Q3_K: (108,),
    T.Q4_K: (0, 2),
    T.Q5_K: (0, 2),
    T.Q6_K: (208,),
    T.Q4_1: (0, 2),
    T.Q5_1: (0, 2),
}


def random_rows(kind: T, rows: int = 5, blocks: int = 3) -> np.ndarray:
    """Any bytes that are numbers."""
    draw, size = np.random.default_rng(0), GGML_QUANT_SIZES[kind][1]
    stored = draw.integers(0, 256, (rows, blocks * size), dtype=np.uint8)
    for place in SCALES.get(kind, (0,)):
        halves = draw.standard_normal((rows * blocks, 1)).astype(np.float16)
        stored.reshape(-1, size)[:, place : place + 2] = halves.view(np.uint8)
    return stored


@pytest.mark.parametrize("kind", CODES, ids=lambda kind: kind.name)
def test_numbers_are_the_packages_and_codes_say_where_they_lie(kind: T) -> None:
    stored = random_rows(kind)
    numbers = torch.from_numpy(gguf.dequantize(stored, kind))
    assert torch.equal(decode(stored, kind), numbers)
    grid = read_grid(stored, kind)
    again = write_codes(stored, grid.codes(numbers), kind)
    assert torch.equal(torch.from_numpy(gguf.dequantize(again, kind)), numbers)
    torch.testing.assert_close(grid.values(grid.codes(numbers)), numbers, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", CODES, ids=lambda kind: kind.name)
def test_every_number_within_reach_is_stored_within_half_a_step(kind: T) -> None:
    stored = random_rows(kind)
    grid, levels = read_grid(stored, kind), count_levels(kind)
    codes = torch.rand(decode(stored, kind).shape, generator=torch.Generator().manual_seed(0)) * (levels - 1)
    wanted = grid.values(codes)
    written = torch.from_numpy(gguf.dequantize(write_codes(stored, grid.codes(wanted), kind), kind))
    steps = grid.step[..., 0].abs().repeat_interleave(wanted.shape[1] // grid.step.shape[1], 1)
    assert bool(((written - wanted).abs() <= 0.5001 * steps + 1e-6).all())
    assert float((written - wanted).abs().max()) > 0.4 * float(steps.max())  # they did not lie on the grid


def test_a_part_of_a_grid_is_that_of_the_whole() -> None:
    stored = random_rows(T.Q4_K)
    grid, values = read_grid(stored, T.Q4_K), torch.randn(5, 768, generator=torch.Generator().manual_seed(1))
    codes, some, rows = grid.codes(values), torch.tensor([0, 17, 300, 767]), torch.tensor([3, 1])
    assert torch.equal(grid.select(rows).codes(values[rows]), codes[rows])
    assert torch.equal(grid.transpose(768).select(some).codes(values.T[some]), codes.T[some])


@pytest.mark.parametrize("kind", [T.F32, T.F16, T.BF16, T.Q8_0, T.Q4_0])
def test_new_blocks_are_the_packages(kind: T) -> None:
    values = torch.randn(4, 96, generator=torch.Generator().manual_seed(2))
    assert encode(values, kind).tobytes() == np.ascontiguousarray(gguf.quantize(values.numpy(), kind)).tobytes()


def test_a_type_that_cannot_be_written_becomes_a_larger_one() -> None:
    for kind in T:
        written = choose_written_type(kind)
        assert bits_of(written) >= min(bits_of(kind), 16)
        if kind in CODES or kind in (T.F32, T.F16, T.BF16):
            assert written == kind
    assert choose_written_type(T.IQ4_XS) == T.Q5_0
    assert can_read(T.IQ4_XS)
    assert not can_read(T.I8)
