"""DISTILL: activations to directions.

Each step is one function over tensors; importing this package registers all of them.
It may import core, and never transformers: steps that run the model live in causal.
"""

from obliteratus.distill import combine, eigen, leace, means, sae, svd, whiten, winsorize
from obliteratus.distill.steps import (
    check_needs,
    check_sizes,
    extractors,
    find_directions,
    load_directions,
    save_directions,
)

__all__ = [
    "check_needs",
    "check_sizes",
    "combine",
    "eigen",
    "extractors",
    "find_directions",
    "leace",
    "load_directions",
    "means",
    "sae",
    "save_directions",
    "svd",
    "whiten",
    "winsorize",
]
