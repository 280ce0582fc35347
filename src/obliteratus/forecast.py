"""What a model will cost here, from its outline and this machine: memory and time, before anything is loaded."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

import torch

from obliteratus.coverage import shortfall
from obliteratus.summon.memory import host_memory
from obliteratus.summon.outline import Outline
from obliteratus.terminal import results, size, table_of

PROMPTS, TOKENS = 256, 40  # an ordinary probe: as many prompts, with so many tokens beyond the shared prefix
GEMM = 1024  # tokens of the matrix product that measures the machine: those of one CPU batch


def gemm_rate(width: int = 1024, seconds: float = 0.3) -> float:
    """FLOP/s of fp32 matrix products [1024, width] × [width, 4·width] on this machine, the best of ≥ 3 runs."""
    x, w = torch.randn(GEMM, width), torch.randn(4 * width, width)
    best, end, runs = float("inf"), time.perf_counter() + seconds, 0
    while time.perf_counter() < end or runs < 3:
        start = time.perf_counter()
        torch.nn.functional.linear(x, w)
        best, runs = min(best, time.perf_counter() - start), runs + 1
    return 2.0 * GEMM * width * 4 * width / best


def forecast(found: Outline) -> dict[str, Any]:
    """All that `inspect` shows, as plain data."""
    backbone = found.coverage.writers + found.coverage.readers + found.coverage.unclaimed
    rate = gemm_rate()
    weights = found.loaded_bytes
    return {
        "source": found.source,
        "model_type": found.model_type,
        "quantisation": found.quantisation,
        "packed": found.packed,
        "n_layers": found.n_layers,
        "width": found.width,
        "parameters": found.n_params,
        "tied_embeddings": found.tied,
        "sites": [vars(s) for s in found.sites],
        "parts": dict(Counter(s.part for s in found.sites)),
        "coverage": found.coverage.to_dict(),
        "memory": {
            "dtype": found.dtype,
            "weights": weights,
            "cache_per_token": found.kv_bytes_per_token,
            "activations_kept": 4 * 2 * PROMPTS * (found.n_layers + 1) * found.width,
            "free": host_memory(),
        },
        "time": {
            "gemm_flops": rate,
            "probe_prompts": PROMPTS,
            "probe_floor_seconds": 2.0 * backbone * PROMPTS * TOKENS / rate,
        },
    }


def _kind(data: dict[str, Any]) -> str:
    """How the weights are held in memory."""
    dtype, stored = data["memory"]["dtype"], data["quantisation"]
    if not stored:
        return f"in {dtype}"
    return f"as {stored}, the rest in {dtype}" if data["packed"] else f"in {dtype}, from {stored}"


def show(data: dict[str, Any], sites: bool) -> None:
    """The forecast as tables on stdout."""
    memory, cover, clock = data["memory"], data["coverage"], data["time"]
    rows = [
        ["architecture", f"{data['model_type']}, {data['n_layers']} layers of width {data['width']}"],
        ["parameters", f"{data['parameters']:,}" + (" (tied embeddings)" if data["tied_embeddings"] else "")],
        ["sites", ", ".join(f"{part} {n}" for part, n in data["parts"].items())],
        [
            "writers found",
            f"{cover['share']:.1%} of the writing parameters; {len(cover['paths'])} unclaimed matrices",
        ],
        ["weights", f"{size(memory['weights'])} {_kind(data)}; {size(memory['free'])} free here"],
        ["activations", f"{size(memory['activations_kept'])} for {PROMPTS} + {PROMPTS} prompts kept in full"],
        ["key-value cache", f"{size(memory['cache_per_token'])} a token"],
        [
            "PROBE",
            f"≥ {clock['probe_floor_seconds']:.1f} s for {PROMPTS} prompts of {TOKENS} own tokens, at the "
            f"{clock['gemm_flops'] / 1e9:.0f} GFLOP/s just measured here (CPU, fp32)",
        ],
    ]
    results.print(table_of(data["source"], ["what", "how much"], rows))
    if short := shortfall(cover["share"], len(cover["paths"])):
        results.print(f"[bold red]warning[/] {short}")
    for path in cover["paths"]:
        results.print(f"[bold red]unclaimed[/] {path}: in no table, never edited")
    if sites:
        for site in data["sites"]:  # one a line and tab-separated: for grep and cut
            between = f"through {site['gain']}" if site["gain"] else "straight"
            results.out("\t".join([site["path"], site["part"], site["role"], site["layout"], between]))
