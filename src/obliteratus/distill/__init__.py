"""DISTILL: activations to directions. Each step is one small function over tensors; importing registers them."""

from obliteratus.distill import combine, leace, means, robust, sae, svd, whiten
from obliteratus.distill.disk import load_directions, save_directions
from obliteratus.distill.steps import check_needs, check_sizes, extractors, find_directions

__all__ = [
    "check_needs",
    "check_sizes",
    "combine",
    "extractors",
    "find_directions",
    "leace",
    "load_directions",
    "means",
    "robust",
    "sae",
    "save_directions",
    "svd",
    "whiten",
]
