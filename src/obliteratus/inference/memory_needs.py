"""What a model takes of memory, told from its outline: loaded whole, or with its weights on disk."""

from __future__ import annotations

from obliteratus.core.errors import UserError
from obliteratus.inference.batching import CPU_TOKENS, token_bytes
from obliteratus.inference.memory import COPIES, LIMIT, LOGIT_TOKENS, resident_bytes
from obliteratus.summon.summary import ModelSummary

# What matrix products pack and other buffers of the libraries (90 MB were measured), and what glibc holds on to until
# a block is done (50 MB).
BUFFERS = 140_000_000


def logits_bytes(made: ModelSummary) -> int:
    """Bytes of the logits that are held at once."""
    return 4 * COPIES * LOGIT_TOKENS * made.vocabulary  # 4: bytes of fp32


def batch_bytes(made: ModelSummary) -> int:
    """Bytes that a batch takes in a block, beside its weights."""
    return BUFFERS + int(CPU_TOKENS * token_bytes(made.width, made.inner))


def bytes_in_memory(made: ModelSummary) -> int:
    """Bytes that are needed at least with all weights loaded, asked before any is: this process now, and they."""
    return resident_bytes() + made.loaded_bytes + logits_bytes(made)


def resident_weight_bytes(made: ModelSummary) -> int:
    """Bytes of weights that are in memory at once where they stay on disk: two blocks, of which one computes while the
    other is read, or a table."""
    return max(2 * made.block_bytes, made.table_bytes)


def bytes_offloaded(made: ModelSummary) -> int:
    """Bytes that are needed at least with the weights on disk."""
    return resident_bytes() + resident_weight_bytes(made) + max(logits_bytes(made), batch_bytes(made))


def check_offloaded_fits(made: ModelSummary) -> None:
    """UserError where the budget is less than that."""
    if (needed := bytes_offloaded(made)) > LIMIT.get():
        raise UserError(
            f"--memory: with the weights left on disk {needed / 1e9:.2f} GB are needed at least, and "
            f"{LIMIT.get() / 1e9:.2f} GB are allowed; allow more"
        )
