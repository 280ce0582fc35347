"""How much a reloaded model may differ from the measured one."""

from __future__ import annotations

from collections.abc import Iterable

from obliteratus.core.types import Subject
from obliteratus.weights.bitsandbytes import is_packed

# Largest KL(measured ‖ reloaded) in nats. In fp32 the two orders of arithmetic differ by about 1e-9. Half precision
# rounds the edited weights once; 1e-2 is ten times what that cost on SmolLM2 in bf16.
TOLERANCE = {"float32": 1e-5, "float64": 1e-5, "bfloat16": 1e-2, "float16": 1e-2}
# The same where edited matrices are quantized again (merged), and where an adapter adds to int8 activations: ten times
# what that cost on the organism, where a forgotten edit costs 5.8 nats.
REQUANTIZED = {"bitsandbytes nf4": 1.0, "bitsandbytes fp4": 1.0, "bitsandbytes int8": 0.1}
# The same for types of GGUF files: ten times what the organism loses with the edit in that type.
REQUANTIZED |= {"F16": 1e-2, "BF16": 1e-2, "Q8_0": 0.1, "Q6_K": 0.1}
GGUF_OTHERWISE = 1.0
ADAPTED = {"bitsandbytes int8": 0.1}


def choose_tolerance(subject: Subject, form: str, stored: Iterable[str] = ()) -> float:
    """Return the largest KL(measured ‖ reloaded) in nats that is accepted.

    stored: dtypes of the saved weights, which may be coarser than the dtype of the measured model.
    """
    kind = subject.source.quantization if (is_quantized(subject) or form == "gguf") and form != "plan" else ""
    rounding = max(TOLERANCE.get(name, 0.0) for name in (subject.source.dtype, *stored))
    if form == "gguf" and kind != "F32":
        return max(rounding, REQUANTIZED.get(kind, GGUF_OTHERWISE))
    return max(rounding, (REQUANTIZED if form == "merged" else ADAPTED).get(kind, 0.0))


def is_quantized(subject: Subject) -> bool:
    """Return whether some weights are quantized in memory."""
    return any(is_packed(subject.module(site.path)) for site in subject.sites)
