"""DISTILL: activations to directions. Each step is one small function over tensors; importing registers them."""

from obliteratus.distill import means, sae, svd
from obliteratus.distill.steps import distill, extractors

__all__ = ["distill", "extractors", "means", "sae", "svd"]
