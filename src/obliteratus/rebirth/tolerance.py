"""How nearly what was saved must answer as what was measured."""

from __future__ import annotations

from collections.abc import Iterable

from obliteratus.core.types import Subject
from obliteratus.weights.bitsandbytes import is_packed

# Largest KL(live ‖ reloaded) in nats. fp32: the two orders of arithmetic differ by about 1e-9. Half precision
# rounds the edited weights once; 1e-2 is ten times what that cost on SmolLM2 in bf16.
TOLERANCE = {"float32": 1e-5, "float64": 1e-5, "bfloat16": 1e-2, "float16": 1e-2}
# The same where edited matrices were packed again, or packed after the edit instead of before it (merged), and where
# they add to int8's activations (adapter): ten times what it cost on the organism, where a forgotten edit costs 5.8.
REQUANTISED = {"bitsandbytes nf4": 1.0, "bitsandbytes fp4": 1.0, "bitsandbytes int8": 0.1}
ADAPTED = {"bitsandbytes int8": 0.1}


def tolerance(subject: Subject, form: str, stored: Iterable[str] = ()) -> float:
    """Largest KL(live ‖ reloaded) in nats. Packing edited matrices again costs more than any rounding. stored: dtypes
    of the saved weights, which may be coarser than those that were measured with."""
    kind = subject.source.quantisation if is_quantized(subject) and form != "plan" else ""
    usual = max(TOLERANCE.get(name, 0.0) for name in (subject.source.dtype, *stored))
    return max(usual, (REQUANTISED if form == "merged" else ADAPTED).get(kind, 0.0))


def is_quantized(subject: Subject) -> bool:
    """Whether some weights are packed in memory."""
    return any(is_packed(subject.module(site.path)) for site in subject.sites)
