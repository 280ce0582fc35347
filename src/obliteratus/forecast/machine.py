"""What a model will cost here, from its outline and this machine: memory and time, before anything is loaded."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

import torch

from obliteratus.inference.memory import host_memory
from obliteratus.summon.summary import ModelSummary

PROMPTS, TOKENS = 256, 40  # an ordinary probe: as many prompts, with so many tokens beyond the shared prefix
GEMM = 1024  # tokens of the matrix product that measures the machine: those of one CPU batch


def measure_gemm_rate(width: int = 1024, seconds: float = 0.3) -> float:
    """FLOP/s of fp32 matrix products [1024, width] × [width, 4·width] on this machine, the best of ≥ 3 runs."""
    x, w = torch.randn(GEMM, width), torch.randn(4 * width, width)
    best, end, runs = float("inf"), time.perf_counter() + seconds, 0
    while time.perf_counter() < end or runs < 3:
        start = time.perf_counter()
        torch.nn.functional.linear(x, w)
        best, runs = min(best, time.perf_counter() - start), runs + 1
    return 2.0 * GEMM * width * 4 * width / best


def forecast_model(found: ModelSummary) -> dict[str, Any]:
    """All that `inspect` shows, as plain data."""
    backbone = found.coverage.writers + found.coverage.readers + found.coverage.unclaimed
    rate = measure_gemm_rate()
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
