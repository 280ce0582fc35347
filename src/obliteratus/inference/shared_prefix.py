"""What all prompts begin with, a template's head, is run once and its keys and values shared."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from obliteratus.core.shapes import Float
from obliteratus.core.types import ProbeRequest, Subject
from obliteratus.inference.batching import PreparedPrompts, pad_rows, run_backbone, shared_prefix_length
from obliteratus.inference.chat_template import Ids
from obliteratus.inference.hooks import StreamCapture
from obliteratus.inference.kv_cache import prefix_states
from obliteratus.inference.row_plans import variants_of
from obliteratus.summon.sites import architecture_of


def prepare_prompts(subject: Subject, ids: Ids, reuse: bool = True, leave: int = 1) -> PreparedPrompts:
    """Compute the shared prefix once, where that gives the same result."""
    n = shared_prefix_length(ids, leave) if reuse else 0
    whole = PreparedPrompts(ids, 0, None, variants=variants_of(len(ids)))
    if not n or is_recurrent(subject):
        return whole
    prompts = replace(whole, rows=[row[n:] for row in ids], skipped=n, prefix=prefix_states(subject, ids[0][:n]))
    return prompts if has_full_attention(subject) or _equal(subject, whole, prompts) else whole


def is_recurrent(subject: Subject) -> bool:
    """Whether anything but attention keeps states between tokens: there is no prefix of keys and values to share, and
    padding would enter the states of what comes after it."""
    return architecture_of(subject.model.config).recurrent


def has_full_attention(subject: Subject) -> bool:
    """Full attention in every layer: then a cached prefix is exact by construction."""
    config = subject.model.config.get_text_config().to_dict()
    kinds = set(config.get("layer_types") or ["full_attention"])
    return kinds == {"full_attention"} and not config.get("sliding_window")


def _equal(subject: Subject, whole: PreparedPrompts, prompts: PreparedPrompts) -> bool:
    """Windows: reuse only if the shortest and the longest row come out equal."""
    ends = whole.ends()
    found, known = (torch.cat([_last(subject, trial, i) for i in ends]) for trial in (prompts, whole))
    return bool(torch.allclose(found, known, rtol=1e-4, atol=1e-4 * float(known.abs().max())))


def _last(subject: Subject, prompts: PreparedPrompts, row: int) -> Float[Tensor, "1 streams width"]:
    """The stream at a row's last token."""
    ids, lengths = pad_rows([prompts.rows[row]], subject.device)
    capture = StreamCapture(subject, lengths - 1, ProbeRequest(), subject.n_layers)
    with capture.watching(), prompts.around([row]):
        run_backbone(subject, ids, prompts.skipped, prompts.cache([row]))
    return capture.stacked()[0].detach()
