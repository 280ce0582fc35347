"""How much memory a model needs at least, loaded whole or with its weights on disk, computed from its summary."""

from __future__ import annotations

from obliteratus.core.errors import UserError
from obliteratus.inference.batching import CPU_TOKENS, token_bytes
from obliteratus.inference.memory import LOGIT_COPIES, LOGIT_TOKENS, MEMORY_LIMIT, resident_bytes
from obliteratus.summon.summary import ModelSummary

# Buffers of the libraries, such as packed operands of matrix products (90 MB measured), and memory that glibc holds on
# to until a block is done (50 MB).
LIBRARY_BUFFERS = 140_000_000


def logits_bytes(summary: ModelSummary) -> int:
    """Return the bytes of the logits that are held at once."""
    return 4 * LOGIT_COPIES * LOGIT_TOKENS * summary.vocabulary  # 4: bytes of fp32


def batch_bytes(summary: ModelSummary) -> int:
    """Return the bytes that a batch takes in a block, without the block's weights."""
    return LIBRARY_BUFFERS + int(CPU_TOKENS * token_bytes(summary.width, summary.longest_side))


def bytes_in_memory(summary: ModelSummary) -> int:
    """Return the bytes that the process needs at least with all weights in memory. Call it before they are loaded."""
    return resident_bytes() + summary.loaded_bytes + logits_bytes(summary)


def resident_weight_bytes(summary: ModelSummary) -> int:
    """Return the bytes of weights that are in memory at once if they stay on disk: a table, or two blocks, one of them
    computing while the other is read."""
    return max(2 * summary.block_bytes, summary.table_bytes)


def bytes_offloaded(summary: ModelSummary) -> int:
    """Return the bytes that the process needs at least with the weights on disk."""
    return resident_bytes() + resident_weight_bytes(summary) + max(logits_bytes(summary), batch_bytes(summary))


def check_offloaded_fits(summary: ModelSummary) -> None:
    """Raise UserError if the memory budget is too small even with the weights on disk."""
    if (needed := bytes_offloaded(summary)) > MEMORY_LIMIT.get():
        raise UserError(
            f"--memory: {MEMORY_LIMIT.get() / 1e9:.2f} GB is too little; even with the weights left on disk at least "
            f"{needed / 1e9:.2f} GB are needed, so allow more"
        )
