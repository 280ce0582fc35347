"""The speed of everything: hidden states, first-token probabilities and losses of many prompts.

Batching is invisible: any batch size, any order, any padding side of the tokenizer, prefix reused or not, gives
what one prompt at a time gives. Rows are right-padded and attention is causal, so padding is never seen.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from obliteratus.progress import progress
from obliteratus.shapes import Float
from obliteratus.summon.anatomy import family_of
from obliteratus.summon.cache import KeyValues, expanded, prefix_states, shared
from obliteratus.summon.capture import Capture, Routing, Taps, blocks
from obliteratus.summon.lower import Lower
from obliteratus.summon.memory import free_memory
from obliteratus.summon.quantised import dims
from obliteratus.summon.render import Ids
from obliteratus.summon.variants import under, variants_of
from obliteratus.types import Subject

T = TypeVar("T")
# Tokens of one batch on a CPU: enough rows for the matrix products to run at full rate, few enough for the
# activations to stay in the last-level cache (EXPERIMENTS.md, "How many tokens a pass").
CPU_TOKENS = 512
# A shared prefix shorter than this saves less than its own pass and the longer attention cost.
MIN_PREFIX = 4
NO_TAPS = Taps()


@dataclass(frozen=True)
class Reading:
    """What one batch gave."""

    rows: list[int]
    """Which prompts these are."""
    stream: Float[Tensor, "rows streams *positions width"]
    """fp32, at the wanted position; the axis is there only where several were asked for."""
    outputs: Float[Tensor, "rows taps *positions width"]
    """fp32 outputs of the tapped modules at the same position, in the order asked for."""
    inputs: dict[str, Tensor]
    """Module path → fp32 input at the same position [rows, in]."""
    routing: dict[str, Routing]
    """Path of a stack of experts → what it did at the same position."""


# ---------------------------------------------------------------------------------------- batches
def common_prefix(ids: Ids, leave: int = 1) -> int:
    """Number of leading tokens that all rows share; at least ``leave`` tokens of each row are left."""
    first, last = min(ids), max(ids)
    limit = max(0, min(len(row) for row in ids) - leave)
    same = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), limit)
    return min(same, limit)


def batched(lengths: Sequence[int], budget: int, most: int = sys.maxsize) -> list[list[int]]:
    """Row numbers by batch: longest first, at most ``most`` rows and rows × longest ≤ budget (or one row)."""
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batches and lengths[batches[-1][0]] * (len(batches[-1]) + 1) <= budget and len(batches[-1]) < most:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


TOKENS: ContextVar[int] = ContextVar("tokens of one batch", default=0)


@contextmanager
def passes_of(tokens: int) -> Iterator[None]:
    """Inside, a batch holds at most so many tokens, or one row; 0: as memory and cache decide."""
    token = TOKENS.set(tokens)
    try:
        yield
    finally:
        TOKENS.reset(token)


def token_budget(subject: Subject, bytes_per_token: float) -> int:
    """Tokens of one batch: follows free memory (half of it), and on a CPU the cache. Never cuts a prompt."""
    if TOKENS.get():
        return TOKENS.get()
    fit = max(1, int(0.5 * free_memory(subject) / bytes_per_token))
    return fit if subject.device.type == "cuda" else min(CPU_TOKENS, fit)


def state_bytes(subject: Subject) -> float:
    """Working memory of one token in a forward pass: the stream, and the widest projections, a few times."""
    inner = max(max(dims(p)) for p in blocks(subject)[0].parameters())
    return float(4 * (8 * subject.width + 4 * inner))  # 4 bytes; about 8 + 4 tensors live at a block's peak


def halving(run: Callable[[list[int]], T], rows: list[int]) -> Iterator[T]:
    """Run a batch; when memory runs out, run its halves instead."""
    try:
        result = run(rows)
    except torch.OutOfMemoryError:
        if len(rows) == 1:
            raise
        middle = len(rows) // 2
        yield from halving(run, rows[:middle])
        yield from halving(run, rows[middle:])
        return
    yield result


def padded(ids: Ids, device: torch.device) -> tuple[Tensor, Tensor]:
    """Right-padded ids [rows, longest] and lengths [rows]. The padding id is never seen, so 0 will do."""
    rows = [torch.tensor(row) for row in ids]
    lengths = torch.tensor([len(row) for row in ids], device=device)
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device), lengths


# ---------------------------------------------------------------------------------------- prefixes
@dataclass(frozen=True)
class Prompts:
    """Token rows with their shared prefix taken off and computed."""

    rows: Ids
    skipped: int
    """Length of the prefix that was taken off."""
    prefix: KeyValues | None
    lower: Lower | None = None
    """What the lower blocks gave before, where they need not run."""
    variants: tuple[int, ...] | None = None
    """Under which of several edits each row is; None where all are under the same."""

    def cache(self, rows: Sequence[int]) -> Any:
        """For a pass over these rows; None without a prefix."""
        return shared(self.prefix_of(rows)) if self.prefix else None

    def prefix_of(self, rows: Sequence[int]) -> KeyValues:
        """The prefix's states for these rows, [rows, heads, tokens, head]."""
        return expanded(self.prefix or [], self.variants_of(rows) or [0] * len(rows))

    def variants_of(self, rows: Sequence[int]) -> list[int] | None:
        return None if self.variants is None else [self.variants[i] for i in rows]

    @contextmanager
    def around(self, rows: Sequence[int]) -> Iterator[None]:
        """Around a pass over these rows: known blocks do not run, and hooks know under which edits each row is."""
        with under(self.variants_of(rows)), self.lower.entering(rows) if self.lower else nullcontext():
            yield

    def ends(self) -> list[int]:
        """The shortest and the longest row."""
        return sorted(range(len(self.rows)), key=lambda i: len(self.rows[i]))[:: max(1, len(self.rows) - 1)]

    def of(self, rows: Sequence[int]) -> Prompts:
        """These rows alone, in this order; one may come several times."""
        chosen, kinds = [self.rows[i] for i in rows], self.variants_of(rows)
        lower = self.lower.of(rows) if self.lower else None
        return replace(self, rows=chosen, lower=lower, variants=None if kinds is None else tuple(kinds))


def prepared(subject: Subject, ids: Ids, reuse: bool = True, leave: int = 1) -> Prompts:
    """Compute the shared prefix once, where that gives the same result."""
    n = common_prefix(ids, leave) if reuse and len(ids) > 1 else 0
    whole = Prompts(ids, 0, None, variants=variants_of(len(ids)))
    if n < MIN_PREFIX or recurrent(subject):
        return whole
    prompts = replace(whole, rows=[row[n:] for row in ids], skipped=n, prefix=prefix_states(subject, ids[0][:n]))
    return prompts if _plain(subject) or _equal(subject, whole, prompts) else whole


def recurrent(subject: Subject) -> bool:
    """Whether anything but attention keeps states between tokens: there is no prefix of keys and values to share, and
    padding would enter the states of what comes after it."""
    return family_of(subject.model.config).recurrent


def _plain(subject: Subject) -> bool:
    """Full attention in every layer: then a cached prefix is exact by construction."""
    config = subject.model.config.get_text_config().to_dict()
    kinds = set(config.get("layer_types") or ["full_attention"])
    return kinds == {"full_attention"} and not config.get("sliding_window")


def _equal(subject: Subject, whole: Prompts, prompts: Prompts) -> bool:
    """Windows: reuse only if the shortest and the longest row come out equal."""
    ends = whole.ends()
    states: list[Tensor] = []
    for trial in (prompts, whole):
        run = _reader(subject, trial, -1, NO_TAPS)
        states.append(torch.cat([run([i]).stream.detach() for i in ends]))
    return bool(torch.allclose(states[0], states[1], rtol=1e-4, atol=1e-4 * float(states[1].abs().max())))


def backbone(subject: Subject, ids: Tensor, start: int, cache: Any) -> Any:
    """One pass without the LM head over tokens whose positions begin at ``start``."""
    positions = torch.arange(start, start + ids.shape[1], device=ids.device)[None]
    return subject.model.base_model(
        input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=cache is not None
    )


# ---------------------------------------------------------------------------------------- readings
def read(
    subject: Subject,
    ids: Ids,
    *,
    position: int | Sequence[int] = -1,
    taps: Taps = NO_TAPS,
    last: int | None = None,
    budget: int = 0,
    reuse: bool = True,
    title: str = "reading",
) -> Iterator[Reading]:
    """The stream at one position of every prompt, batch by batch.

    position: counted from the end of each row (−1 is its last token; shorter rows give their first). Several are
    read in the same pass.
    taps: modules whose outputs or inputs are wanted too. last: highest stream index wanted (default L); blocks
    above do not run. budget: tokens a batch, 0 lets memory decide.
    """
    with torch.inference_mode(), progress(title, len(ids)) as advance:
        prompts = prepared(subject, ids, reuse, leave=-(position if isinstance(position, int) else min(position)))
        run = _reader(subject, prompts, position, taps, last)
        size = budget or token_budget(subject, state_bytes(subject))
        for rows in batched([len(r) for r in prompts.rows], size):
            for reading in halving(run, rows):
                advance(len(reading.rows))
                yield reading


def _reader(
    subject: Subject, prompts: Prompts, position: int | Sequence[int], taps: Taps, last: int | None = None
) -> Callable[[list[int]], Reading]:
    top = subject.n_layers if last is None else last
    wanted = torch.tensor(position, device=subject.device)

    def run(rows: list[int]) -> Reading:
        ids, lengths = padded([prompts.rows[i] for i in rows], subject.device)
        at = (lengths.view(-1, *[1] * wanted.ndim) + wanted).clamp(min=0)
        capture = Capture(subject, at, taps, top)
        with capture.watching(), prompts.around(rows):
            backbone(subject, ids, prompts.skipped, prompts.cache(rows))
        return Reading(rows, *capture.stacked(), capture.inputs, capture.routing)

    return run
