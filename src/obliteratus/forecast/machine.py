"""What a model will cost on this machine, from its summary alone: memory, and the time of a probe."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

import torch

from obliteratus.inference.memory import host_memory
from obliteratus.summon.summary import ModelSummary

PROMPTS, TOKENS = 256, 40  # a usual probe: prompts of each group, and their tokens beyond the shared prefix
GEMM_TOKENS = 1024  # rows of the matrix product that measures the machine


def measure_gemm_rate(width: int = 1024, seconds: float = 0.3) -> float:
    """Return this machine's FLOP/s on fp32 products [1024, width] × [width, 4·width], the best of at least 3."""
    x, w = torch.randn(GEMM_TOKENS, width), torch.randn(4 * width, width)
    best, end, runs = float("inf"), time.perf_counter() + seconds, 0
    while time.perf_counter() < end or runs < 3:
        start = time.perf_counter()
        torch.nn.functional.linear(x, w)
        best, runs = min(best, time.perf_counter() - start), runs + 1
    return 2.0 * GEMM_TOKENS * width * 4 * width / best


def forecast_model(summary: ModelSummary) -> dict[str, Any]:
    """Return everything that `obliteratus inspect` shows as plain data. Sizes are in bytes, times in seconds."""
    coverage, rate = summary.coverage, measure_gemm_rate()
    backbone = coverage.writers + coverage.readers + coverage.unclaimed
    return {
        "source": summary.source,
        "model_type": summary.model_type,
        "quantization": summary.quantization,
        "packed": summary.packed,
        "n_layers": summary.n_layers,
        "width": summary.width,
        "parameters": summary.n_params,
        "tied_embeddings": summary.tied,
        "sites": [vars(site) for site in summary.sites],
        "parts": dict(Counter(site.part for site in summary.sites)),
        "coverage": coverage.to_dict(),
        "memory": {
            "dtype": summary.dtype,
            "weights": summary.loaded_bytes,
            "cache_per_token": summary.kv_bytes_per_token,
            "activations_kept": 4 * 2 * PROMPTS * (summary.n_layers + 1) * summary.width,  # fp32, two groups
            "free": host_memory(),
        },
        "time": {
            "gemm_flops": rate,
            "probe_prompts": PROMPTS,
            "probe_floor_seconds": 2.0 * backbone * PROMPTS * TOKENS / rate,
        },
    }
